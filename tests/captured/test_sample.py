"""Which dialogues are compared, and of which only the end."""

import numpy as np

from lightweight import corpus
from lightweight.captured.packing import Layout
from lightweight.captured.sample import Sample, samples
from lightweight.corpus import Rows


def test_fewer_dialogues_are_those_of_whole_rows():
    sample = Sample([[0, 1], [2, 3]], [[3, 0], [2, 1]])
    assert sample.first(2) == Sample([[0], [3]], [[3, 0]])
    assert sample.first(3) == Sample([[0], [2, 3]], [[3, 0], [2]])
    assert sample.first(1).size == 1


def test_the_end_of_a_dialogue_is_up_to_its_last_answer():
    ids, labels = np.arange(10, dtype=np.int32), np.full(10, corpus.IGNORED, np.int32)
    labels[5:8] = ids[5:8]
    rows = corpus.Rows([{"input_ids": ids, "labels": labels}], 0, 10)
    sample = Sample([[0]], [[0]], tokens=6)
    (row,) = sample.of_each(rows)
    assert row["input_ids"].tolist() == [2, 3, 4, 5, 6, 7]
    assert row["labels"].tolist()[3:] == [5, 6, 7]


def test_half_of_the_dialogues_are_left_and_of_the_last_one_its_end():
    pair = Sample([[0, 1]], [[0, 1]])
    one = pair.smaller([2000, 2000])
    assert one == Sample([[0]], [[0]])
    cut = one.smaller([2000, 2000])
    assert cut is not None and (cut.rows, cut.tokens) == ([[0]], 1000)
    assert cut.smaller([2000, 2000]) is None  # below LEAST_TOKENS


def test_the_longest_dialogue_and_the_fullest_row_are_compared_whichever_steps_have_them():
    """Where a window or a table of positions shows itself, and what runs from one dialogue into the next."""
    of = [np.arange(tokens) for tokens in (4, 5, 6, 16, 2, 3, 4)]
    rows = Rows([{"input_ids": ids, "labels": ids} for ids in of], 0)
    steps = [[[0], [1]], [[2], [3]], [[4, 5, 6]]]
    begin, others = samples([Layout(step, {}, 0) for step in steps], [[0], [1]], rows, rows_per_pass=2)
    assert begin == Sample([[0], [1]], [[0], [1]])
    assert others == Sample([[3, 4], [5, 6]], [[3], [4, 5, 6]])
