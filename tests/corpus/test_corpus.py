import json
import re
from pathlib import Path

import pytest

from conftest import turns
from lightweight import corpus
from lightweight.corpus import CorpusError
from lightweight.corpus.conversation import contents

OURS = Path(__file__).parents[2] / "corpus.json"
USER = {"role": "user", "content": "a"}
THERAPIST = {"role": "therapist", "content": "b"}


def write(folder: Path, content: object) -> Path:
    path = folder / "talks.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_our_corpus_is_120_pairs_half_korean_no_two_alike():
    loaded = corpus.load(OURS)
    pairs = loaded.train + loaded.heldout
    assert (len(loaded.train), len(loaded.heldout)) == (100, 20)
    said = [contents(pair) for pair in pairs]
    assert len({prompt for prompt, _ in said}) == len({answer for _, answer in said}) == 120
    assert sum(bool(re.search("[가-힣]", prompt)) for prompt, _ in said) == 60
    assert all(bool(re.search("[가-힣]", prompt)) == bool(re.search("[가-힣]", answer)) for prompt, answer in said)


def test_the_english_half_of_our_corpus_is_what_latin_letters_leave():
    loaded = corpus.load(OURS)
    english = corpus.in_latin_letters(loaded)
    assert (len(english.train), len(english.heldout)) == (51, 9)
    assert not any(re.search("[가-힣]", "".join(contents(pair))) for pair in english.train + english.heldout)
    for whole, half in ((loaded.train, english.train), (loaded.heldout, english.heldout)):
        assert half == tuple(pair for pair in whole if pair in half)  # on its side of the split, in its order
    # what records are compared by: a changed corpus or filter changes it
    assert english.digest == "334f713ab50267d0a5b73fe3507fec911851a46a662f2b5282ee98493227f505"
    assert corpus.in_latin_letters(english) == english


def test_latin_letters_are_those_of_every_language_that_uses_them(tmp_path):
    written = turns(40)
    for index, turn in enumerate(written):
        turn["content"] = f"Ça va, naïve señor №{index} – “ok” 🙂" if index % 4 < 2 else f"ok {index} 그래"
    loaded = corpus.load(write(tmp_path, written))
    found = corpus.in_latin_letters(loaded)
    assert len(found.train + found.heldout) == 20
    assert all("Ça" in text for pair in found.train + found.heldout for text in contents(pair))


def test_a_corpus_without_a_pair_in_latin_letters_is_told(tmp_path):
    mixed = turns(12)  # users write Korean, therapists English
    other = [turn | {"role": role} for turn, role in zip(mixed[1:-1], ["user", "therapist"] * 11, strict=True)]
    for written in (mixed, other):
        loaded = corpus.load(write(tmp_path, written))
        with pytest.raises(CorpusError, match="has 0 examples in Latin letters to train on and 0 held out: add some"):
            corpus.in_latin_letters(loaded)


def test_a_corpus_written_elsewhere_goes_through_unchanged(tmp_path):
    written = turns(7)
    written[3]["id"] = "extra keys are nobody's business"
    loaded = corpus.load(write(tmp_path, written))
    said = {turn["content"] for turn in written}
    assert {text for pair in loaded.train + loaded.heldout for text in contents(pair)} == said
    assert len(loaded.heldout) == 1


def test_a_byte_order_mark_is_no_error(tmp_path):
    plain = corpus.load(write(tmp_path, turns(3)))
    assert corpus.load(write(tmp_path, b"\xef\xbb\xbf" + json.dumps(turns(3)).encode())) == plain


def test_split_is_the_same_every_time_and_digest_follows_the_content(tmp_path):
    first = corpus.load(write(tmp_path, turns(12)))
    assert corpus.load(write(tmp_path, json.dumps(turns(12), indent=3).encode())) == first
    changed = turns(12)
    changed[5]["content"] += "!"
    assert corpus.load(write(tmp_path, changed)).digest != first.digest


MALFORMED = {
    "not JSON": (b"[{]", "line 1, column 3"),
    "empty file": (b"", "is not JSON"),
    "an object": ({"turns": []}, "JSON object: write a list of rows"),
    "a string": ("hello", "JSON string"),
    "null": (None, "JSON null"),
    "too deep": (b"[" * 100_000, "nested too deeply"),
    "no pair": ([], "has 0 pair(s)"),
    "one pair": ([USER, THERAPIST], "has 1 pair(s)"),
    "turn is a string": ([USER, "b"], "turn 1: is a JSON string"),
    "turn is a list": ([["user", "a"]], "turn 0: is a JSON list"),
    "unknown role": ([USER, {"role": "assistant", "content": "b"}], "turn 1: unknown role 'assistant': use"),
    "role is a number": ([{"role": 1, "content": "a"}], "turn 0: unknown role 1"),
    "no role": ([{"content": "a"}], "turn 0: has no 'role'"),
    "no content": ([USER, {"role": "therapist"}], "turn 1: has no 'content': give it a text"),
    "content is null": ([USER, {"role": "therapist", "content": None}], "turn 1: 'content' is a JSON null"),
    "content is a number": ([{"role": "user", "content": 3}], "turn 0: 'content' is a JSON number"),
    "content is empty": ([USER, THERAPIST, {"role": "user", "content": ""}], "turn 2: 'content' is empty"),
    "content is blank": ([{"role": "user", "content": " \n"}], "turn 0: 'content' is empty"),
    "two users in a row": ([USER, USER, THERAPIST], "turn 1: two 'user' turns in a row"),
    "two therapists": ([USER, THERAPIST, THERAPIST], "turn 2: two 'therapist' turns in a row"),
    "therapist first": ([THERAPIST, USER], "turn 0: the first turn is the therapist's"),
    "no last answer": ([USER, THERAPIST, USER], "turn 2: the last user turn has no answer"),
    "wrong encoding": (json.dumps(turns(2), ensure_ascii=False).encode("euc-kr"), "is not UTF-8 at byte"),
    "a number of thousands of digits": (b"[" + b"9" * 5000 + b"]", "holds a number of thousands of digits"),
    "a role of a million characters": ([{"role": "u" * 10**6, "content": "a"}], "turn 0: unknown role 'uuu"),
    "a role that is a list": ([{"role": ["user"] * 10**5, "content": "a"}], "turn 0: unknown role ['user'"),
    "half a surrogate": (b'[{"role": "user", "content": "\\ud83d"}]', "turn 0: 'content' holds half of a surrogate"),
}


@pytest.mark.parametrize(("content", "expected"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_corpus_is_one_line_with_file_place_and_mend(tmp_path, content, expected):
    path = write(tmp_path, content)
    with pytest.raises(CorpusError) as raised:
        corpus.load(path)
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < len(str(path)) + 200
    assert str(path) in message
    assert expected in message


@pytest.mark.parametrize(("name", "expected"), [("nowhere.json", "does not exist"), ("", "is a directory")])
def test_corpus_that_is_no_file(tmp_path, name, expected):
    with pytest.raises(CorpusError, match=expected):
        corpus.load(tmp_path / name)
