"""Records that were cut off, edited, or written to do harm: each is the right answer or one line, never a traceback."""

import copy
import json
import math
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import pytest

from lightweight import __main__, corpus, models, record, schema, settings, trial
from lightweight.methods import Precision
from lightweight.record import RecordError
from lightweight.report import page, write
from lightweight.verdict import gate

RECORDS = sorted((Path(__file__).parent.parent / "experiments" / "records").glob("*.json"))
ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202eevil\nsecond line\ud800"
VALUES: list[object] = [
    *(None, True, False, 0, 1, -1, -3, 0.5, -0.0, 10**30, -(10**30), 1e308, -1e308, 5e-324, float("nan"), float("inf")),
    *("", " ", "x", "completed", "no_such_word", ESCAPE, "9" * 5000, "[r]", "<script>alert(1)</script>"),
    *([], [None], [[]], ["x"], [1e308] * 3, [True], {}, {"a": {"b": [{}]}}, {"weights": -1}, {ESCAPE: ESCAPE}),
]


def test_the_words_are_those_that_the_modules_write():
    assert set(get_args(schema.Ending)) == {kind.kind for kind in get_args(trial.Outcome)}
    assert set(get_args(schema.Phase)) == set(get_args(trial.Phase))
    assert get_args(schema.TrainedOn) == get_args(corpus.Kind)
    assert get_args(schema.LossOn) == get_args(corpus.LossOn)
    assert get_args(schema.Placement) == get_args(settings.Placement)
    assert get_args(schema.Long) == get_args(corpus.Long)
    assert get_args(schema.Padding) == get_args(trial.Padding)
    assert set(get_args(schema.Weights)) == set(get_args(models.Weights))
    assert set(get_args(schema.Precision)) == set(get_args(Precision))
    assert set(get_args(schema.ForecastVerdict)) == set(get_args(trial.ForecastVerdict))


@pytest.mark.parametrize(
    ("type_", "words", "holding", "refused"),
    [
        (schema.Count | None, "a whole number from 0 to 2^53 or null", [0, None], [-1, True, 0.5]),
        (
            tuple[schema.Loss | None, ...] | None,
            "a list of (a finite number of nats or null) or null",
            [None, [], [1.5, None]],
            [1.5, ["x"], (1.5,)],
        ),
        (Mapping[str, schema.Count], "an object of (a whole number from 0 to 2^53)", [{}, {"a": 1}], [None, {"a": -1}]),
        (schema.ShownAs, "one of ladder, peers", ["ladder"], ["poster", None]),
        (bool, "true or false", [True], [1]),
        (record.Speedup | None, "an object or null", [{}, None], [[]]),
    ],
)
def test_a_fields_type_says_its_kind(type_, words, holding, refused):
    kind = schema.kind(type_)
    assert kind.words == words
    assert all(map(kind.holds, holding)) and not any(map(kind.holds, refused))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_committed_record_is_sound(path):
    run = record.load(path)
    assert run.entries or run.forecasts


def sound():
    """The outcomes of a record with pairs of rounds, as JSON that may be changed."""
    path = next(path for path in RECORDS if path.stem == "h200-one-worker")
    return json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("peak_allocated_bytes", value) for value in (-1, 1.5, True, 10**30, "many", [1])],
        *[("world_size", value) for value in (0, -3, None, 1.0, True)],
        *[("model", value) for value in (["opt"], 3, "", " ", None, "m" * 5000)],
        *[("outcome", value) for value in ("finished", None, ["completed"], {})],  # type: ignore[var-annotated]
        *[("phase", "lunch"), ("precision", "fp8"), ("weights", "borrowed"), ("seed", -1), ("seed", 0.5)],
        *[("steady_step_seconds", value) for value in (0, -1, float("nan"), float("inf"), 1e300, "fast")],
        *[("heldout_loss_after", value) for value in (float("nan"), 1e300, "3.1", True)],
        *[("train_loss", value) for value in ([1, "x"], {"0": 1}, [float("nan")], 3)],
        *[("versions", value) for value in (["torch"], {"torch": 2}, "2.11")],
        *[("forecast_verdict", "perhaps"), ("captured", "yes"), ("shown_as", "poster"), ("worker", {})],
        ("a_key_of_tomorrow", float("inf")),
    ],
)
def test_a_value_of_another_kind_is_one_line_that_names_file_outcome_and_key(tmp_path, key, value):
    document = sound()
    document["outcomes"][2][key] = value
    path = tmp_path / "run.json"
    path.write_text(json.dumps(document), "utf-8")
    with pytest.raises(RecordError) as raised:
        record.load(path)
    line = str(raised.value)
    assert line.startswith(f"record {path}: outcome 2 has ") and repr(key) in line and "\n" not in line
    assert len(line) < 500


@pytest.mark.parametrize(
    "changes",
    [
        *({"verdict": "certainly"}, {"pairing": "at once"}, {"cap": 3}, {"cap": 8}, {"cap": 2**40}, {"floor": 2.0}),
        *({"log_ratios": ["fast"]}, {"log_ratios": [1e6] * 8}, {"ratio": 99.0, "low": 98.0, "high": 100.0}),
        *({"low": 50.0}, {"high": 0.1}, {"ratio": None}, {"baseline": 3}, {"steps_per_round": 0}),
    ],
    ids=str,
)
def test_a_speedup_that_contradicts_itself_is_one_line(tmp_path, changes):
    document = sound()
    document["outcomes"][1]["speedup"] |= changes
    path = tmp_path / "run.json"
    path.write_text(json.dumps(document), "utf-8")
    with pytest.raises(RecordError, match="outcome 1 has a 'speedup' ") as raised:
        record.load(path)
    assert "\n" not in str(raised.value)


def test_a_single_pair_bounds_nothing_and_is_sound(tmp_path):
    document = sound()
    speedup = document["outcomes"][1]["speedup"]
    speedup |= {"log_ratios": speedup["log_ratios"][:1], "low": 0.0, "high": None}
    speedup["ratio"] = math.exp(speedup["log_ratios"][0])
    path = tmp_path / "run.json"
    path.write_text(json.dumps(document), "utf-8")
    assert "[0.00, inf]" in write.text([record.load(path)], "terminal")


def everywhere(value, path=()):
    """The path of every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if not isinstance(item, list) or len(item) < 20:
            yield from everywhere(item, (*path, key))
        else:
            yield (*path, key)
            yield (*path, key, 7)


def mutant(draw):
    """A committed record in which one to three places were changed or are gone; text keeps its place for escapes."""
    document = copy.deepcopy(DOCUMENTS[draw.randrange(len(DOCUMENTS))])
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = [path for path in everywhere(document) if path]
        if not places:
            break
        *parents, last = draw.choice(places)
        holder = document
        for key in parents:
            holder = holder[key]
        if draw.random() < 0.2:
            del holder[last]
        elif isinstance(holder[last], str) and draw.random() < 0.5:
            holder[last] += ESCAPE
        else:
            holder[last] = copy.deepcopy(draw.choice(VALUES))
    return document


DOCUMENTS = [
    {key: value for key, value in found.items() if key in ("outcomes", "forecasts", "datetime", "commit_info")}
    if isinstance(found := json.loads(path.read_text("utf-8")), dict)
    else found
    for path in RECORDS
]


def steers(text):
    """Whether `text` has anything that a terminal would obey, or that turns text around."""
    return re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)


@pytest.mark.parametrize("seed", range(25))
def test_mutants_are_a_line_or_an_answer(tmp_path, capsys, seed):
    """Eight a seed, through the report, the gate as the new run and as the old one, and the command lines."""
    draw = random.Random(seed)
    path, whole = tmp_path / "mutant.json", next(path for path in RECORDS if path.stem == "h200-one-worker")
    for number in range(8):
        path.write_text(json.dumps(mutant(draw)), "utf-8")
        commands = [["report", str(path)], ["report", str(path), "--format", "markdown"]]
        commands += [["gate", str(path), "--against", str(whole)], ["gate", str(whole), "--against", str(path)]]
        for command in commands:
            status = __main__.main(command)
            out, err = capsys.readouterr()
            assert not steers(out + err), command
            assert status in (0, 1, 2), command
            assert (status == 2) == bool(err) and err.count("\n") == (status == 2), (command, err)
        if number == 0 and status != 2:
            text = page.html([record.load(path)])
            assert not steers(text.replace("\n", "").replace("\t", ""))
            text.encode("utf-8")


def test_a_name_that_steers_a_terminal_is_shown_as_text(tmp_path, capsys):
    document = sound()
    for entry in document["outcomes"]:
        entry |= {key: entry[key] + ESCAPE for key in ("model", "method", "device")}
    path = tmp_path / "run.json"
    path.write_text(json.dumps(document), "utf-8")
    for command in (["report", str(path)], ["gate", str(path), "--against", str(path)]):
        assert __main__.main(command) == 0
        out = capsys.readouterr().out
        assert "evil second line" in out and not steers(out)


def test_a_file_whose_name_steers_a_terminal_is_shown_as_text(tmp_path, capsys):
    path = tmp_path / "a\x1b[31mb.json"
    path.write_text("{", "utf-8")
    assert __main__.main(["report", str(path)]) == 2
    assert not steers(capsys.readouterr().err)
    assert gate.load([path])[1] and not steers(gate.load([path])[1][0])
