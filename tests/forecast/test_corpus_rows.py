"""`lightweight plan --corpus`: forecasts of the rows that a corpus really gives, and what is said where they are
assumed."""

import json

import pytest

from conftest import MICRO
from lightweight import corpus, models
from lightweight.__main__ import main
from lightweight.captured import loop
from lightweight.corpus import RowForm
from lightweight.forecast import corpus_rows, plan, replay, tracer
from lightweight.forecast.plan_row import PlanOptions
from lightweight.methods import BASELINE, LORA_CAPTURED
from lightweight.targets import NATIVE, T4, Device
from lightweight.trial import Trial


def talk(number: int, letters: int) -> dict:
    said = [("user", f"{number:02d}"), ("assistant", "a" * letters)]
    return {"messages": [{"role": role, "content": content} for role, content in said]}


@pytest.fixture
def talks(tmp_path):
    """24 conversations of 30 letters, and 12 of 90."""
    path = tmp_path / "talks.jsonl"
    path.write_text("\n".join(json.dumps(talk(n, 90 if n % 3 == 0 else 30)) for n in range(36)), "utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    """A model's configuration, without weights and tokenizer: it would be trained on bytes, with random weights."""
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(MICRO.architecture))
    return place


def planned(capsys, *arguments):
    assert main(["plan", *map(str, arguments), "--target", "t4", "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_numbers_are_those_of_the_rows(talks, folder, capsys):
    read = corpus.load(talks)
    tokenizer = models.find_tokenizer(MICRO)
    lengths = [len(row["input_ids"]) for row in corpus.encode_all(read.train, tokenizer, RowForm(256)).rows]
    (row,) = planned(capsys, folder, "--method", "baseline", "--corpus", talks)
    assert (row["corpus_rows"], row["corpus_tokens"]) == (len(lengths), sum(lengths)) == (30, sum(lengths))
    assert row["longest_row"] == max(lengths) < 256
    assert (row["corpus_digest"], row["corpus_assumed"], row["max_length"]) == (read.digest, None, 256)


def test_a_forecast_is_of_the_longest_batch_that_the_rows_make(talks, folder, capsys):
    (of_corpus,) = planned(capsys, folder, "--method", "baseline", "--corpus", talks)
    (of_length,) = planned(capsys, folder, "--method", "baseline", "--max-length", of_corpus["longest_row"])
    (padded,) = planned(capsys, folder, "--method", "baseline", "--corpus", talks, "--padding", "max")
    assert of_corpus["bytes_by_cause"] == of_length["bytes_by_cause"]
    assert of_corpus["forecast_allocated_bytes"] < padded["forecast_allocated_bytes"]


@pytest.mark.parametrize("method", [BASELINE, LORA_CAPTURED], ids=lambda method: method.name)
def test_a_plan_says_what_the_suite_forecasts_of_the_same_trial(talks, method, micro):
    read = corpus.load(talks)
    (row,) = plan.plan([MICRO], [method], [T4], PlanOptions(corpus=read))
    trial = Trial(model=micro, method=method, target=NATIVE, corpus=read)
    traced = tracer.trace_on(trial, Device(name="a card", capability=T4.capability))
    assert row.forecast == replay.within(traced, T4.budget_bytes)


def test_short_rows_of_a_long_max_length_are_forecast_of_a_model_that_takes_them(talks, folder, capsys):
    """MICRO has 256 positions."""
    (row,) = planned(capsys, folder, "--method", "baseline", "--corpus", talks, "--max-length", "1000")
    assert row["verdict"] == "fits"
    padded = ["--corpus", str(talks), "--max-length", "1000", "--padding", "max"]
    assert main(["plan", str(folder), "--method", "baseline", *padded]) == 2
    assert "rows of 1000 tokens, where the model takes 256" in capsys.readouterr().err


def test_without_a_tokenizer_it_is_said_what_is_assumed(talks, folder, capsys):
    (folder / "model.safetensors").touch()  # somebody's weights, without their tokenizer
    (row,) = planned(capsys, folder, "--method", "baseline", "--corpus", talks, "--max-length", "64")
    assert (row["corpus_rows"], row["corpus_tokens"], row["longest_row"]) == (30, 30 * 64, 64)
    assert "has no tokenizer" in row["corpus_assumed"]
    assert main(["plan", str(folder), "--method", "baseline", "--corpus", str(talks), "--max-length", "64"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "(messages: 36 conversations, 2.0 turns each): assumed are 30 rows, 1,920 tokens" in said
    assert "has no tokenizer" in said


def test_the_table_says_what_the_corpus_gives(talks, folder, capsys):
    assert main(["plan", str(folder), "--method", "baseline", "--corpus", str(talks), "--max-length", "100"]) == 0
    said = capsys.readouterr().out
    assert "rows of up to 100 tokens" in said
    assert "30 rows, " in said
    assert "tokens an epoch, the longest of 100; rows that were cut: " in said


def test_a_corpus_of_which_no_row_is_left_is_one_line(talks, folder, capsys):
    assert main(["plan", str(folder), "--corpus", str(talks), "--max-length", "8", "--long", "drop"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "each of its 30 examples to train on is longer than 8 tokens" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--skip-bad"], "say how a corpus is read, and none is named: give --corpus"),
        (["--held-out", "0.2"], "say how a corpus is read, and none is named: give --corpus"),
        (["--corpus", "nowhere.json"], "corpus nowhere.json: does not exist"),
    ],
)
def test_a_corpus_that_is_not_there_is_one_line(arguments, words, capsys):
    assert main(["plan", "opt-tiny", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_tokenizer_that_cannot_be_used_is_a_matter_of_its_model_alone(talks, folder):
    (folder / "tokenizer.json").write_text("{}")
    broken, sound = plan.plan(
        [models.named(str(folder)), MICRO], [BASELINE], [T4], PlanOptions(corpus=corpus.load(talks))
    )
    assert broken.verdict == "cannot_be_forecast"
    assert broken.reason is not None and "its tokenizer cannot be used" in broken.reason
    assert sound.verdict == "fits"


def test_tokens_that_the_network_has_no_embedding_for_are_a_matter_of_its_model(talks, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 60}))
    known = [models.named(str(folder)), MICRO]
    row, sound = plan.plan(known, [BASELINE], [T4], PlanOptions(corpus=corpus.load(talks)))
    assert (row.verdict, sound.verdict) == ("cannot_be_forecast", "fits")
    assert row.reason is not None and "where the network has 60 embeddings" in row.reason


def test_a_job_that_is_long_enough_to_be_compiled_is_forecast_as_train_takes_it(talks, monkeypatch):
    monkeypatch.setattr(loop, "COMPILE_STEPS", 1)
    (row,) = plan.plan([MICRO], [LORA_CAPTURED], [T4], PlanOptions(corpus=corpus.load(talks)))
    assert row.verdict == "fits"


def test_of_a_long_corpus_it_is_told_how_far_its_encoding_is(talks, monkeypatch):
    monkeypatch.setattr(corpus.rows, "MANY", 30)
    said: list[str] = []
    corpus_rows.of_model(corpus.load(talks), MICRO, RowForm(256), pads_to_max=False, progress=said.append)
    assert said[:3] == ["micro: looking for its tokenizer", "encoding 30 examples: 0 %", "encoding 30 examples: 3 %"]
