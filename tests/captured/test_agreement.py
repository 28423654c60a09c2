"""The parts that may be given up, what is compared, and how far apart two ways of computing a step are."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from lightweight.captured import agreement, temporary
from lightweight.captured.agreement import Deviation, Gradients, Tolerance
from lightweight.captured.packing import Layout
from lightweight.captured.parts import Parts
from lightweight.captured.sample import Sample, samples
from lightweight.corpus import Rows


def test_parts_are_given_up_one_by_one_before_two_by_two():
    full = Parts(packing=True, attention=True, loss="chunked", lean=True)
    candidates = full.fewer(["chunked", "logits", "model"])
    lost = [len(full.given_up(rest)) for rest in candidates]
    assert candidates[0] == full and lost == sorted(lost)
    assert len(set(candidates)) == len(candidates) == 18
    assert all(rest.attention or not rest.packing for rest in candidates)
    assert full.given_up(dataclasses.replace(full, packing=False, attention=False)) == ["attention"]
    plain = Parts(packing=False, attention=False, loss="model", lean=False)
    assert plain.fewer(["model"]) == [plain]


def test_what_agrees_with_most_parts_is_taken_and_only_what_it_lacks_is_told():
    full = Parts(packing=True, attention=True, loss="chunked", lean=True)
    measured = []

    def measure(parts):
        measured.append(parts)
        return Deviation(loss=1e-1 if parts.lean else 0.0, gradient=2e-1 if parts.packing else 0.0)

    found, notes = agreement.search(full, ["chunked", "model"], measure)
    assert found == dataclasses.replace(full, lean=False, packing=False)
    assert [note.split(": ")[0] for note in notes] == ["packing given up", "lean given up"]
    assert "gradient 2e-01" in notes[0] and "loss is 1e-01" in notes[1]
    assert len(set(measured)) == len(measured)


def test_a_deviation_is_of_the_loss_the_gradient_and_the_worst_weight():
    large, small = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    names = {large: "large", small: "small"}
    theirs = Gradients(torch.tensor(2.0), {large: torch.full((4,), 0.5), small: torch.full((4,), 0.05)}, 1.0)
    ours = Gradients(torch.tensor(2.2), {large: torch.full((4,), 4.0), small: torch.full((4,), 0.8)}, 8.0)
    allowed = functools.partial(Tolerance, loss=1.0, gradient=1.0, tensor=1.0)
    off = agreement.deviation(ours, theirs, names, allowed(floor=1e-3))
    assert (off.loss, off.worst) == (pytest.approx(0.1), "small")
    assert (off.gradient, off.tensor) == (pytest.approx(0.1 / 1.005, rel=1e-3), pytest.approx(1.0))
    assert agreement.deviation(ours, theirs, names, allowed(floor=1.0)).tensor < 0.2
    missing = Gradients(torch.tensor(2.0), {large: theirs.of[large]}, 1.0)
    assert agreement.deviation(missing, theirs, names, allowed(floor=1e-3)).tensor == pytest.approx(1.0)
    nothing = Gradients(torch.tensor(float("nan")), theirs.of, 1.0)
    assert not agreement.deviation(nothing, theirs, names, allowed(floor=1e-3)).is_rounding


def test_weights_of_zero_are_something_meanwhile_and_zero_again():
    zero, other = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.ones(3))
    seen = []
    for _ in range(2):
        with temporary.nudged([zero, other]):
            seen.append(zero.detach().clone())
            assert torch.equal(other, torch.ones(3))
    assert torch.equal(*seen) and seen[0].any()
    assert not zero.any()


def test_fewer_dialogues_are_those_of_whole_rows():
    sample = Sample([[0, 1], [2, 3]], [[3, 0], [2, 1]])
    assert sample.first(2) == Sample([[0], [3]], [[3, 0]])
    assert sample.first(3) == Sample([[0], [2, 3]], [[3, 0], [2]])
    assert sample.first(1).size == 1


def test_the_longest_dialogue_and_the_fullest_row_are_compared_whichever_steps_have_them():
    """Where a window or a table of positions shows itself, and what runs from one dialogue into the next."""
    of = [np.arange(tokens) for tokens in (4, 5, 6, 16, 2, 3, 4)]
    rows = Rows([{"input_ids": ids, "labels": ids} for ids in of], 0)
    steps = [[[0], [1]], [[2], [3]], [[4, 5, 6]]]
    begin, others = samples([Layout(step, {}, 0) for step in steps], [[0], [1]], rows, rows_per_pass=2)
    assert begin == Sample([[0], [1]], [[0], [1]])
    assert others == Sample([[3, 4], [5, 6]], [[3], [4, 5, 6]])
