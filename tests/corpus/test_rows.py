from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from chat_templates import CHATML, TALK, tokenizer
from transformers import ByT5Tokenizer

from lightweight import corpus
from lightweight.corpus import IGNORED, Conversation, Message, RowForm, Rows, Text, pair
from lightweight.corpus.conversation import contents

OURS = Path(__file__).parents[2] / "corpus.json"


def only(rows):
    (row,) = rows
    return row


def text(row, found):
    return found.decode(row["input_ids"])


def learned(row, found):
    return found.decode(row["labels"][row["labels"] != IGNORED])


def test_rows_of_the_originals_corpus_are_what_they_were():
    """As the original scripts made them, in plain Python."""
    found = ByT5Tokenizer()
    for example in corpus.load(OURS).train:
        said, answered = contents(example)
        prompt = found.encode(f"User: {said}\nTherapist: ", add_special_tokens=False)[-128:]
        answer = [*found.encode(answered, add_special_tokens=False), found.eos_token_id][: 256 - len(prompt)]
        row = only(corpus.encode(example, found, RowForm(256)))
        assert row["input_ids"].tolist() == prompt + answer
        assert row["labels"].tolist() == [IGNORED] * len(prompt) + answer


@pytest.mark.parametrize(("prompt", "answer"), [(300, 10), (10, 300), (300, 300)])
@pytest.mark.parametrize("long", ["cut", "split"])
def test_a_long_pair_always_leaves_an_answer_to_learn(prompt, answer, long):
    found = corpus.encode_all([pair("p" * prompt, "a" * answer)], ByT5Tokenizer(), RowForm(256, long=long))
    assert (found.truncated, found.split, found.dropped) == (1, 0, 0)
    row = only(found.rows)
    assert len(row["input_ids"]) <= 256
    places = np.flatnonzero(row["labels"] != IGNORED).tolist()
    assert len(places) >= min(answer + 1, 128)
    assert all(b - a == 1 for a, b in pairwise(places))
    assert str(ByT5Tokenizer().decode(row["input_ids"][: places[0]])).endswith("Therapist: ")


@pytest.mark.parametrize("max_length", [2, 3, 5, 64])
@pytest.mark.parametrize("written", [None, CHATML])
def test_rows_hold_a_prompt_and_an_answer_however_short(max_length, written):
    row = only(corpus.encode(pair("A long enough question", "An answer"), tokenizer(written), RowForm(max_length)))
    assert len(row["input_ids"]) == len(row["labels"]) <= max_length
    assert row["labels"][0] == IGNORED
    assert (row["labels"] != IGNORED).any()


@pytest.mark.parametrize("max_length", [1, 0, -3])
def test_rows_too_short_for_an_answer_are_refused(max_length):
    with pytest.raises(ValueError, match=f"rows of {max_length} tokens: take a max_length of at least 2"):
        RowForm(max_length)


LONG = Conversation(
    (
        Message("system", "Be kind."),
        *(
            message
            for number in range(5)
            for message in (Message("user", f"Question {number}?"), Message("assistant", f"Answer {number}."))
        ),
    )
)
"""A system message and five exchanges of one length."""


def whole(messages, found):
    return len(corpus.encode_whole(Conversation(messages), found)["input_ids"])


@pytest.mark.parametrize("written", [None, CHATML])
@pytest.mark.parametrize("kept", [1, 2, 4])
def test_a_long_conversation_loses_its_first_turns_and_keeps_its_system_message(written, kept):
    found = tokenizer(written)
    messages = (LONG.messages[0], *LONG.messages[-2 * kept :])
    for room in (whole(messages, found), whole(messages, found) + 5):
        encoded = corpus.encode_all([LONG], found, RowForm(room))
        assert (encoded.truncated, encoded.split, encoded.dropped) == (1, 0, 0)
        expected = corpus.encode_whole(Conversation(messages), found)
        row = only(encoded.rows)
        assert np.array_equal(row["input_ids"], expected["input_ids"])
        assert np.array_equal(row["labels"], expected["labels"])


@pytest.mark.parametrize("written", [None, CHATML])
def test_or_is_split_between_turns_each_row_with_the_system_message(written):
    found = tokenizer(written)
    room = whole(LONG.messages[:5], found)  # two exchanges
    encoded = corpus.encode_all([LONG, TALK], found, RowForm(room, long="split"))
    assert (encoded.truncated, encoded.split, encoded.dropped) == (0, 1, 0)
    parts = [LONG.messages[1:5], LONG.messages[5:9], LONG.messages[9:]]
    for row, part in zip(encoded.rows, parts, strict=False):
        expected = corpus.encode_whole(Conversation((LONG.messages[0], *part)), found)
        assert np.array_equal(row["input_ids"], expected["input_ids"])
        assert np.array_equal(row["labels"], expected["labels"])
    assert len(encoded.rows) == 4
    all_of_it = "".join(learned(row, found) for row in encoded.rows[:3])
    assert [all_of_it.count(f"Answer {number}.") for number in range(5)] == [1] * 5


def test_of_a_split_conversation_an_exchange_that_is_too_long_alone_is_shortened():
    found = tokenizer(None)
    talk = Conversation((*LONG.messages[:3], Message("user", "u" * 200), Message("assistant", "a" * 200)))
    encoded = corpus.encode_all([talk], found, RowForm(64, long="split"))
    assert (encoded.truncated, encoded.split, encoded.dropped) == (1, 1, 0)
    assert [len(row["input_ids"]) <= 64 for row in encoded.rows] == [True, True]
    assert learned(encoded.rows[1], found) == "a" * 32


def test_with_the_loss_on_the_last_turn_nothing_is_split():
    found = tokenizer(None)
    room = whole(LONG.messages[:5], found)
    rows = [corpus.encode(LONG, found, RowForm(room, "last", long)) for long in ("split", "cut")]
    assert [len(each) for each in rows] == [1, 1]
    assert learned(rows[0][0], found) == "Answer 4.</s>"
    assert np.array_equal(rows[0][0]["input_ids"], rows[1][0]["input_ids"])


def test_or_is_dropped():
    found = tokenizer(None)
    encoded = corpus.encode_all(
        [LONG, TALK, pair("Hi", "Hello")], found, RowForm(whole(TALK.messages, found), long="drop")
    )
    assert (len(encoded.rows), encoded.truncated, encoded.split, encoded.dropped) == (2, 0, 0, 1)


def test_a_text_is_learned_behind_its_prompt():
    found = tokenizer(None, bos="<s>")
    row = corpus.encode_whole(Text("2 + 2 =", " 4"), found)
    assert text(row, found) == "<s>2 + 2 = 4</s>"
    assert learned(row, found) == " 4</s>"
    assert corpus.encode_prompt(Text("2 + 2 =", ""), found) == row["input_ids"].tolist()[:-3]
    found.chat_template = CHATML  # which marks up conversations
    assert np.array_equal(corpus.encode_whole(Text("2 + 2 =", " 4"), found)["input_ids"], row["input_ids"])


def test_a_long_text_is_split_anywhere_or_loses_its_end():
    found = tokenizer(None)
    split, cut, dropped = (
        corpus.encode_all([Text("", "abc" * 10)], found, RowForm(10, long=long)) for long in ("split", "cut", "drop")
    )
    assert [len(row["input_ids"]) for row in split.rows] == [10, 10, 10]
    assert "".join(text(row, found) for row in split.rows) == "abc" * 10  # its end would be a row of one token
    longer = corpus.encode_all([Text("", "abc" * 10 + "d")], found, RowForm(10, long="split"))
    assert [len(row["input_ids"]) for row in longer.rows] == [10, 10, 10, 2]
    assert longer.truncated == 0
    assert text(only(cut.rows), found) == "abcabcabca"
    assert (split.split, split.truncated, cut.truncated, dropped.dropped) == (1, 1, 1, 1)
    behind = corpus.encode(Text("p" * 50, "c" * 50), found, RowForm(10, long="split"))
    assert text(only(behind), found) == "pppppccccc"


def test_plain_text_is_cut_into_rows_and_every_token_counts():
    found = ByT5Tokenizer()
    rows = corpus.encode_text("Tides follow the moon.", found, 10)
    assert [len(row["input_ids"]) for row in rows] == [10, 10, 2]
    tokens = [label for row in rows for label in row["labels"].tolist()]
    assert tokens == found.encode("Tides follow the moon.", add_special_tokens=False)
    assert corpus.encode_text("", found, 10) == []
    assert [len(row["input_ids"]) for row in corpus.encode_text("Tides follow the moon", found, 10)] == [10, 10]


def test_a_token_takes_eight_bytes_and_no_row_keeps_a_longer_one_alive():
    """A corpus of a gigabyte has some 250 million tokens."""
    found = tokenizer(None)
    rows = [
        *corpus.encode(LONG, found, RowForm(64, long="split")),
        *corpus.encode(pair("p" * 100, "a" * 100), found, RowForm(64)),
        *corpus.encode_text("abc" * 100, found, 64),
    ]
    arrays = [array for row in rows for array in (row["input_ids"], row["labels"])]
    assert {array.dtype for array in arrays} == {np.dtype(np.int32)}
    assert all(array.base is None for array in arrays)


def test_rows_are_as_wide_as_they_are_padded():
    rows = corpus.encode_text("abcdefg", tokenizer(None), 5)
    assert (len(rows), Rows(rows, 0).width, Rows(rows, 0, 9).width) == (2, 5, 9)
