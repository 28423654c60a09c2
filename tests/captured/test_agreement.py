"""What is compared, and how far apart two ways of computing a step are."""

import dataclasses
import functools

import pytest
import torch

from lightweight.captured import agreement
from lightweight.captured.agreement import Deviation, Gradients, Tolerance
from lightweight.captured.parts import Parts


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
