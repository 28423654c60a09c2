import json
import re

import pytest
from transformers import ByT5Tokenizer

from lightweight import corpus
from lightweight.__main__ import main
from lightweight.cli import data
from lightweight.corpus import IGNORED, histogram
from lightweight.corpus.conversation import contents


def talks(path, count=12):
    """Of 2 to 8 kilobytes each; two begin alike, and two are the same."""
    rows = [
        {"messages": [{"role": "user", "content": f"{n // 2}?"}, {"role": "assistant", "content": f"{n}." * 600}]}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[3]]), "utf-8")
    return path


def test_lengths_are_counted_up_to_powers_of_two_without_a_gap():
    assert histogram([]) == {}
    assert histogram([1, 16, 17, 32, 33, 512, 513]) == {16: 2, 32: 2, 64: 1, 128: 0, 256: 0, 512: 1, 1024: 1}


def test_what_is_counted_is_what_is_trained_on(tmp_path, capsys):
    path = talks(tmp_path / "a.jsonl")
    assert main(["data", str(path), "--model", "opt-tiny", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    read = corpus.load(path)
    tokenizer = ByT5Tokenizer()
    every = read.train + read.heldout
    lengths = [len(corpus.encode_whole(example, tokenizer)["input_ids"]) for example in every]
    assert found["unit"] == "tokens" and found["longest"] == max(lengths)
    assert found["mean"] == pytest.approx(sum(lengths) / len(lengths))
    assert found["lengths"] == {str(bound): count for bound, count in histogram(lengths).items()}
    assert found["cut"] == {str(n): sum(of > n for of in lengths) / len(lengths) for n in (512, 1024, 2048, 4096)}
    assert 0 < found["cut"]["1024"] <= 1
    assert (found["train"], found["heldout"], found["duplicates"]) == (len(read.train), len(read.heldout), 1)
    begun = {contents(example)[0] for example in read.train}
    assert found["shared_prompts"] == sum(contents(example)[0] in begun for example in read.heldout) > 0


def test_characters_are_not_called_tokens(tmp_path, capsys):
    assert main(["data", str(talks(tmp_path / "a.jsonl"))]) == 0
    out = capsys.readouterr().out
    assert "messages: 13 conversations, 2.0 turns each; exact duplicates, each on the side of its first: 1" in out
    assert "characters of an example" in out and "--model NAME counts tokens" in out
    assert "tokens of an example" not in out and "cut" not in out
    assert "held-out examples begin with a prompt that is also trained on" in out


def test_three_conversations_are_shown_with_what_the_loss_is_on(tmp_path):
    read = corpus.load(talks(tmp_path / "a.jsonl"))
    tokenizer = ByT5Tokenizer()
    plain = data.shown(read, tokenizer, in_colour=False)
    coloured = data.shown(read, tokenizer, in_colour=True)
    assert coloured == plain.replace("[[", "\x1b[32m").replace("]]", "\x1b[0m")
    assert len(re.findall(r"^conversation \d, ", plain, re.MULTILINE)) == 3
    asked, answered = contents(read.train[0])
    assert f"User: {asked}\nAssistant: [[{answered[:20]}" in plain
    whole = corpus.Corpus((corpus.Text("The sky is", " blue."),), (), "")
    shown = data.shown(whole, tokenizer, in_colour=False)
    row = corpus.encode_whole(whole.train[0], tokenizer)
    learned = tokenizer.decode([n for n in row["labels"].tolist() if n != IGNORED], skip_special_tokens=False)
    assert f"The sky is[[{learned}]]" in shown


@pytest.mark.parametrize("no_color", ["", "1"])
def test_there_is_colour_on_a_terminal_alone_and_not_where_it_is_refused(tmp_path, capsys, monkeypatch, no_color):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["data", str(talks(tmp_path / "a.jsonl")), "--model", "opt-tiny"]) == 0
    assert ("\x1b[32m" in capsys.readouterr().out) == (not no_color)


def test_escapes_of_a_corpus_do_not_reach_the_terminal(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"\x1b[31m{n}\x07"}) + "\n" for n in range(4)), "utf-8")
    assert main(["data", str(path), "--model", "opt-tiny"]) == 0
    assert not {"\x1b", "\x07"} & set(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere.jsonl"], "corpus nowhere.jsonl: does not exist"),
        (["{}", "--held-out", "2"], "--held-out 2: give a share"),
        (["{}", "--corpus-format", "alpaca"], "line 1: has no 'instruction'"),
        (["{}", "--model", "no-such"], "no-such"),
    ],
)
def test_what_cannot_be_looked_at_is_one_line(tmp_path, capsys, arguments, expected):
    path = talks(tmp_path / "a.jsonl")
    assert main(["data", *(argument.format(path) for argument in arguments)]) == 2
    err = capsys.readouterr().err
    assert expected in err and err.count("\n") == 1


def test_without_the_models_own_tokenizer_it_is_said_what_is_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    corpus_file = str(talks(tmp_path / "a.jsonl"))
    assert main(["data", corpus_file, "--model", "opt-350m"]) == 0
    assert "bytes are counted: its random weights are trained on bytes" in capsys.readouterr().out
    assert main(["data", corpus_file, "--model", "opt-tiny", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["assumed"] is None
    assert main(["data", corpus_file, "--model", "nobody/nothing"]) == 2
    assert "not on this machine and not from the hub" in capsys.readouterr().err
