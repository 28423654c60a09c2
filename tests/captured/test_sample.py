"""Which dialogues are compared, and of which only the end."""

import numpy as np

from lightweight import corpus
from lightweight.captured.sample import Sample


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
