import json
import re
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import ByT5Tokenizer

from conftest import turns
from lightweight import corpus
from lightweight.corpus import IGNORED, CorpusError, pair, template
from lightweight.corpus.conversation import contents
from lightweight.models import ModelError

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


def test_plain_text_is_cut_into_rows_and_every_token_counts():
    tokenizer = ByT5Tokenizer()
    rows = corpus.encode_text("Tides follow the moon.", tokenizer, 10)
    assert [sum(row["attention_mask"]) for row in rows] == [10, 10, 2]
    assert all(len(row[name]) == 10 for row in rows for name in ("input_ids", "attention_mask", "labels"))
    tokens = [label for row in rows for label in row["labels"] if label != IGNORED]
    assert tokens == tokenizer.encode("Tides follow the moon.", add_special_tokens=False)
    assert rows[2]["labels"][2:] == [IGNORED] * 8
    assert corpus.encode_text("", tokenizer, 10) == []


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
    "an object": ({"turns": []}, "JSON object: write a list of turns"),
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


def test_loss_falls_on_the_answer_alone():
    tokenizer = ByT5Tokenizer()
    row = corpus.encode(pair("Hi", "Hello"), tokenizer, max_length=64)
    prompt = len("User: Hi\nTherapist: ")
    assert {len(values) for values in row.values()} == {64}
    assert row["labels"][:prompt] == [IGNORED] * prompt
    learned = [label for label in row["labels"] if label != IGNORED]
    assert tokenizer.decode(learned[:-1]) == "Hello"
    assert learned[-1] == tokenizer.eos_token_id
    assert row["input_ids"][prompt : prompt + 6] == learned
    assert row["attention_mask"] == [1] * (prompt + 6) + [0] * (64 - prompt - 6)


@pytest.mark.parametrize(("prompt", "answer"), [(300, 10), (10, 300), (300, 300)])
def test_a_long_pair_always_leaves_an_answer_to_learn(prompt, answer):
    row = corpus.encode(pair("p" * prompt, "a" * answer), ByT5Tokenizer(), max_length=256)
    assert all(len(values) == 256 for values in row.values())
    learned = [index for index, label in enumerate(row["labels"]) if label != IGNORED]
    assert len(learned) >= min(answer + 1, 128)
    assert all(b - a == 1 for a, b in pairwise(learned))
    assert str(ByT5Tokenizer().decode(row["input_ids"][: learned[0]])).endswith("Therapist: ")


def test_a_chat_template_is_used_where_the_tokenizer_has_one():
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    row = corpus.encode(pair("Hi", "Hello"), tokenizer, max_length=64)
    assert tokenizer.decode([i for i in row["input_ids"] if i > 2]) == "<user>Hi<assistant>Hello"


@pytest.mark.parametrize("max_length", [2, 3, 5, 64])
def test_rows_are_never_ragged_and_hold_a_prompt_and_an_answer(max_length):
    row = corpus.encode(pair("A long enough question", "An answer"), ByT5Tokenizer(), max_length)
    assert {len(values) for values in row.values()} == {max_length}
    assert row["labels"][0] == IGNORED
    assert any(label != IGNORED for label in row["labels"])


@pytest.mark.parametrize("max_length", [1, 0, -3])
def test_rows_too_short_for_an_answer_are_refused(max_length):
    with pytest.raises(ValueError, match=f"rows of {max_length} tokens: take at least 2"):
        corpus.encode(pair("Hi", "Hello"), ByT5Tokenizer(), max_length)


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (ENDLESS, "not done after 0.2 seconds"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ nobody.name.first }}", "is undefined"),
        ("{% for %}", "Expected an expression"),
        ("<user><assistant>", "it leaves out what the user says"),
        ([{"name": "tools", "template": "x"}], "no default"),
        ("{{ messages[0].content }}{{ 'x' * 2_000_000 }}", "it writes 2,000,002 characters for one turn"),
        ("{{ messages[0].content }}\ud800", "surrogates not allowed"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_one_line(monkeypatch, written, expected):
    monkeypatch.setattr(template, "RENDER_SECONDS", 0.2)
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = written if isinstance(written, str) else {"tools": "x"}
    with pytest.raises(ModelError, match=expected) as raised:
        corpus.encode_prompt("Hi", tokenizer)
    assert "its chat template cannot be used" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_time_limit_leaves_anothers_alarm_running():
    """pytest-timeout's, say, which must still come."""
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with template._time_limit(5):
            pass
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.3
        time.sleep(0.4)
        assert rang
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
