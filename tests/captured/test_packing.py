import itertools

import numpy as np
import pytest
import torch

from lightweight.captured import packing
from lightweight.captured.packing import Buffers, Layout, Shape
from lightweight.corpus import IGNORED, Rows

TIME = 16


def row(prompt, answer):
    """`prompt` and `answer` tokens: the token at place i is 100 x answer tokens + i."""
    length = prompt + answer
    ids = np.array([100 * answer + place for place in range(length)], np.int32)
    return {"input_ids": ids, "labels": np.where(np.arange(length) < prompt, IGNORED, ids)}


PAD = 7

ROWS = Rows([row(2, 3), row(4, 8), row(1, 5), row(3, 1), row(6, 10), row(2, 2)], PAD)


def test_a_steps_tokens_weigh_alike_over_all_its_passes():
    layout = packing.one_a_row([[0, 1], [3]], ROWS, over_step=True)
    assert layout.rows == [[0], [1], [3]]
    assert layout.answers == 12
    assert layout.weights == pytest.approx({0: 1 / 12, 1: 1 / 12, 3: 1 / 12})


def test_or_each_pass_weighs_alike_where_the_model_takes_its_own_mean():
    layout = packing.one_a_row([[0, 1], [3]], ROWS, over_step=False)
    assert layout.weights == pytest.approx({0: 1 / 22, 1: 1 / 22, 3: 1 / 2})


def test_every_dialogue_is_packed_once_and_no_row_overflows():
    layout = packing.packed(packing.one_a_row([list(range(6))], ROWS, over_step=True), ROWS)
    assert sorted(number for numbers in layout.rows for number in numbers) == list(range(6))
    lengths = [sum(packing.length(ROWS[number]) for number in numbers) for numbers in layout.rows]
    assert max(lengths) <= TIME
    assert len(layout.rows) == 3  # 16, 12 + 4, 6 + 5 + 4: 47 tokens need no fewer
    assert set(layout.weights) == set(range(6))


def layouts(*sizes):
    return [Layout([[0]] * size, {0: 1.0}, 3 * size) for size in sizes]


def test_a_smaller_shape_is_made_only_where_enough_steps_use_it(monkeypatch):
    monkeypatch.setattr(packing, "BUCKET_STEPS", 3)
    sizes = [8] * 5 + [6, 6, 5] + [2]
    found = packing.shapes(layouts(*sizes), ROWS, 8, most=None)
    assert {size: shape.rows for size, shape in found.items()} == {2: 6, 5: 6, 6: 6, 8: 8}
    found = packing.shapes(layouts(*sizes), ROWS, 8, most=1)
    assert {shape.rows for shape in found.values()} == {8}


def test_rows_are_spread_over_as_few_passes_as_hold_them():
    (shape,) = packing.shapes(layouts(5), ROWS, 2, most=None).values()
    assert (shape.passes, shape.rows, shape.time) == (3, 2, TIME)
    assert shape.answers == packing.ANSWER_BLOCK  # six are needed


def test_buffers_hold_each_token_its_position_and_what_it_weighs():
    layout = Layout([[1, 0], [2], [3]], {0: 0.5, 1: 0.25, 2: 0.125, 3: 1.0}, 17)
    with pytest.raises(RuntimeError):  # 17 tokens do not fit
        Buffers(Shape(2, 2, TIME, 64), torch.device("cpu")).fill(layout, ROWS)
    layout = Layout([[0, 3], [2], [1]], layout.weights, 17)
    buffers = Buffers(Shape(passes=2, rows=2, time=TIME, answers=64), torch.device("cpu"))
    buffers.fill(Layout([[4]] * 4, {4: 9.0}, 40), ROWS)  # what was there before must go
    buffers.fill(layout, ROWS)
    ids, positions, dialogues = (each[0, 0] for each in (buffers.input_ids, buffers.position_ids, buffers.dialogues))
    assert ids[:9].tolist() == [300, 301, 302, 303, 304, 100, 101, 102, 103]
    assert positions[:9].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert dialogues.tolist() == [0] * 5 + [3] * 4 + [packing.NO_DIALOGUE] * 7
    assert buffers.dialogues[1, 1].tolist() == [packing.NO_DIALOGUE] * TIME
    assert buffers.attention_mask[0, 1].tolist() == [1] * 6 + [0] * (TIME - 6)
    assert buffers.input_ids[0, 1, 6:].tolist() == [PAD] * (TIME - 6)  # as a batch of it alone
    assert buffers.count.item() == 17
    predicted = []
    for index in range(2):
        flat = buffers.input_ids[index].flatten()
        for place, target, weight in zip(
            buffers.answers[index], buffers.targets[index], buffers.weights[index], strict=True
        ):
            if weight:
                assert flat[place + 1] == target
                predicted.append((target.item(), weight.item()))
    assert sorted(predicted) == sorted(
        (label, layout.weights[number])
        for number in range(4)
        for label in ROWS[number]["labels"][1:]
        if label != IGNORED
    )


def test_a_dialogues_first_token_is_never_predicted_from_the_one_before_it():
    rows = Rows([row(2, 3), row(0, 4)], PAD, TIME)
    layout = packing.packed(packing.one_a_row([[0, 1]], rows, over_step=True), rows)
    assert layout.rows == [[0, 1]]
    buffers = Buffers(Shape(passes=1, rows=1, time=TIME, answers=64), torch.device("cpu"))
    buffers.fill(layout, rows)
    assert layout.answers == 6
    assert (buffers.weights > 0).sum() == 6
    assert 400 not in buffers.targets[buffers.weights > 0].tolist()
    assert buffers.labels[0, 0, 5] == IGNORED


def joined(*numbers, most=40, ranks=1):
    return packing.joined(packing.one_a_row([list(numbers)], ROWS, over_step=True), ROWS, most, ranks)


def lengths(layout):
    return [packing.tokens_of(row, ROWS) for row in layout.rows]


def test_a_steps_dialogues_are_joined_to_as_few_rows_as_hold_them_and_evenly():
    assert lengths(joined(0, 1, 2, 3, 4, 5, most=47)) == [47]
    assert sorted(lengths(joined(0, 1, 2, 3, 4, 5, most=40))) == [22, 25]  # not 40 and 7
    assert sorted(number for row in joined(0, 1, 2, 3, 4, 5).rows for number in row) == list(range(6))
    tight = Rows([row(1, length - 1) for length in (2, 2, 3, 6, 7)], PAD)
    layout = packing.joined(packing.one_a_row([[*range(5)]], tight, over_step=True), tight, 10)
    assert [packing.tokens_of(row, tight) for row in layout.rows] == [10, 10]  # spread evenly, one would have 11


def test_every_rank_has_as_many_joined_rows():
    layout = joined(0, 1, 2, most=47, ranks=2)
    assert sorted(lengths(layout)) == [11, 12]
    assert [len(packing.share(layout, rank, 2).rows) for rank in range(2)] == [1, 1]
    assert lengths(joined(5, most=47, ranks=2)) == [4, 0]


def test_every_rank_runs_a_step_in_one_shape(monkeypatch):
    """What they add up of their gradients, they add up in that shape's graph: as many are captured on every rank."""
    monkeypatch.setattr(packing, "TOKEN_BLOCK", 1)
    monkeypatch.setattr(packing, "SHAPE_TOKENS", 0)
    layouts = [joined(4, 3, 5, most=47, ranks=2), joined(5, 3, 2, most=47, ranks=2), joined(5, most=47, ranks=2)]
    found = packing.joined_shapes(layouts, ROWS, 2, compiled=False)
    assert len(found) == 3
    for layout in layouts:
        shares = [packing.share(layout, rank, 2) for rank in range(2)]
        assert lengths(shares[0]) != lengths(shares[1])
        assert packing.holding_joined(shares[0], ROWS, found) == packing.holding_joined(shares[1], ROWS, found)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(packing, "TOKEN_BLOCK", 4)


def test_a_further_shape_of_joined_rows_is_made_where_it_saves_enough_tokens(monkeypatch, small_blocks):
    layouts = [joined(1, 4, 0)] * 5 + [joined(5, 2)] * 5 + [joined(5)] * 5  # 33, 10 and 4 tokens: 36, 12 and 4 computed
    monkeypatch.setattr(packing, "SHAPE_TOKENS", 119)
    found = packing.joined_shapes(layouts, ROWS, 1, compiled=False)
    assert [(shape.passes, shape.rows, shape.time) for shape in found] == [(1, 1, 12), (1, 1, 36)]
    held = [packing.holding_joined(layout, ROWS, found) for layout in layouts[::5]]
    assert [shape and shape.time for shape in held] == [36, 12, 12]
    monkeypatch.setattr(packing, "SHAPE_TOKENS", 39)
    assert [shape.time for shape in packing.joined_shapes(layouts, ROWS, 1, compiled=False)] == [4, 12, 36]
    assert [shape.time for shape in packing.joined_shapes(layouts, ROWS, 1, compiled=True)] == [36]
    monkeypatch.setattr(packing, "COMPILED_SHAPE_TOKENS", 119)
    assert [shape.time for shape in packing.joined_shapes(layouts, ROWS, 1, compiled=True)] == [12, 36]
    monkeypatch.setattr(packing, "SHAPE_TOKENS", 10**6)
    assert [shape.time for shape in packing.joined_shapes(layouts, ROWS, 1, compiled=False)] == [36]


def test_every_step_fits_a_shape_in_tokens_sequences_and_answers(monkeypatch, small_blocks):
    monkeypatch.setattr(packing, "SHAPE_TOKENS", 10)
    monkeypatch.setattr(packing, "ANSWER_BLOCK", 1)
    steps = [[0, 1], [2, 3, 5], [4], [0, 1, 2, 3, 4, 5], [5], [1, 4, 0]]
    layouts = [joined(*numbers, most=24) for numbers in steps]
    found = packing.joined_shapes(layouts, ROWS, 1, compiled=False)
    assert len(found) > 2
    for layout in layouts:
        shape = packing.holding_joined(layout, ROWS, found)
        assert shape is not None and shape.longest == 16
        Buffers(shape, torch.device("cpu")).fill(layout, ROWS)
    assert packing.holding_joined(joined(0, 1, 2, 3, 4, 5, most=47), ROWS, found) is None


def test_buffers_of_joined_rows_hold_where_every_sequence_ends(monkeypatch, small_blocks):
    layouts = [joined(0, 2, 3, 1, 4, most=32), joined(0)]
    (shape,) = packing.joined_shapes(layouts, ROWS, 1, compiled=False)
    assert (shape.passes, shape.time, shape.longest) == (2, 24, 16)
    buffers = Buffers(shape, torch.device("cpu"))
    for layout in (layouts[0], layouts[1], layouts[0]):  # what was there before must go
        buffers.fill(layout, ROWS)
        assert buffers.position_ids.max() < shape.longest  # a learned table of positions ends there
        for index in range(shape.passes):
            numbers = layout.rows[index] if index < len(layout.rows) else []
            ends, row = buffers.ends[index].tolist(), buffers.dialogues[index, 0]
            assert buffers.ends.dtype == torch.int32
            assert ends[0] == 0 and ends[-1] == shape.time and ends == sorted(ends)
            spans = [slice(*pair) for pair in itertools.pairwise(ends)]
            assert all(span.stop - span.start <= shape.longest for span in spans)
            for span, number in zip(spans, [*numbers, *[packing.NO_DIALOGUE] * 99], strict=False):
                assert row[span].tolist() == [number] * (span.stop - span.start)
                if number >= 0:
                    assert buffers.input_ids[index, 0, span].tolist() == ROWS[number]["input_ids"].tolist()
                    assert buffers.position_ids[index, 0, span].tolist() == list(range(packing.length(ROWS[number])))
    empty = Buffers(shape, torch.device("cpu"))
    assert empty.ends[0].tolist() == [0, 16, *[24] * (shape.sequences - 1)]


def test_a_part_of_a_row_is_no_longer_than_a_batches_and_two_dialogues_at_least():
    assert packing.part([0, 1], Rows(ROWS.each, PAD, 17), first=1) == [0, 1]
    assert packing.part([0, 1, 2, 3, 4, 5], ROWS) == [3, 5, 0]
    assert packing.part([0, 1, 2, 3, 4, 5], ROWS, first=1) == [1, 3]
    assert packing.part([0, 1, 2, 3, 4, 5], ROWS, first=4) == [4]
    assert packing.part([1, 4], ROWS) == [1, 4]
