"""Is it a record, and what does it say? JSON is checked, completed if it is old, and returned as dataclasses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightweight import schema
from lightweight.record import codec
from lightweight.record.codec import FORECAST_KEYS, KEYS, NO_FORECAST_KEYS, SPEEDUP_KEYS
from lightweight.record.entries import Entry, ForecastRow, NoForecast, Run, Speedup
from lightweight.record.likeness import SAME_BASELINE
from lightweight.record.shown import one_line
from lightweight.record.writing import SCHEMA, digest


class RecordError(ValueError):
    """A record that cannot be read. The message names the file and the mend, in one line that a terminal can show."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def load(path: str | Path) -> Run:
    """The run stored at `path`, or the forecasts that `lightweight plan --format json` wrote there. Raises
    RecordError."""
    path = Path(path)
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RecordError(f"record {path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"record {path}: is not JSON ({error}): store the run again") from error
    return run({"outcomes": [], "forecasts": content} if isinstance(content, list) and content else content, path)


def run(document: Any, path: Path) -> Run:
    """The run in `document`, which is the JSON of the file at `path`. Raises RecordError."""
    if not isinstance(document, dict) or not isinstance(document.get("outcomes"), list):
        raise RecordError(
            f"record {path}: has no 'outcomes': give a file that `pytest experiments --benchmark-json` wrote"
        )
    number = document.get("schema", 0)
    if not schema.COUNT.holds(number):
        raise RecordError(
            f"record {path}: has {schema.brief(number)} as 'schema', where a whole number belongs: store the run again"
        )
    if number > SCHEMA:
        raise RecordError(
            f"record {path}: has schema {number}, and this version of lightweight reads up to {SCHEMA}: update it"
        )
    outcomes = [_with_drawing(completed(entry) if number == 0 else entry) for entry in document["outcomes"]]
    forecasts = document.get("forecasts") or []
    if not isinstance(forecasts, list):
        raise RecordError(f"record {path}: has no list as 'forecasts': store the run again")
    for index, entry in enumerate(outcomes):
        if fault := _fault(entry):
            raise RecordError(f"record {path}: outcome {index} {fault}: store the run again")
    for index, row in enumerate(forecasts):
        of, keys = (NoForecast, NO_FORECAST_KEYS) if _is_no_forecast(row) else (ForecastRow, FORECAST_KEYS)
        if fault := schema.fault(row, of, keys) or schema.fault_of_rest(row):
            raise RecordError(
                f"record {path}: forecast {index} {fault}: give what `lightweight plan --format json` wrote"
            )
    if number == 0:
        _tell_namesakes_apart(outcomes)
    command = document.get("command", [])
    if not schema.TEXT.listed().holds(command):
        raise RecordError(f"record {path}: has no list of text as 'command': store the run again")
    commit = document.get("commit_info")
    commit = commit if isinstance(commit, dict) else {}
    ended = _text_or_none(document.get("datetime")) or ""
    return Run(
        path=path,
        ended=ended,
        entries=[codec.entry_of(entry, run=ended, stored=entry | {"run": ended}) for entry in outcomes],
        forecasts=[codec.forecast_of(row) for row in forecasts if not _is_no_forecast(row)],
        unforecast=[codec.no_forecast_of(row) for row in forecasts if _is_no_forecast(row)],
        commit=None if commit.get("id") == "unknown" else _text_or_none(commit.get("id")),
        is_dirty=commit["dirty"] if isinstance(commit.get("dirty"), bool) else None,
        command=tuple(command),
    )


def _fault(entry: Any) -> str | None:
    if fault := schema.fault(entry, Entry, KEYS):
        return fault
    if (speedup := entry.get("speedup")) is not None:
        if fault := schema.fault(speedup, Speedup, SPEEDUP_KEYS):
            return f"has a 'speedup' that {fault}"
        if fault := schema.fault_of_interval(speedup):
            return fault
    return schema.fault_of_steps(entry) or schema.fault_of_rest(entry)


# What records were like before they had a schema number


FORMER_TESTS = {"::test_a_rung_": "ladder", "::test_a_peer_": "peers"}
"""What the tests were called whose cells belong to a table of their own, before records said which."""


def completed(entry: Any) -> Any:
    """An entry with what 0.1.0.dev did not write at first: until 2026-11-25 `world_size`, since every trial was of one
    GPU; until 2026-11-26 `shown_as`, since a test's name said the table, and `method_digest`; until 2026-11-27
    `placement`, since the steps of several ranks were sharded, but for captured ones. What nobody counted then, such as
    `step_tokens`, stays None."""
    if not isinstance(entry, dict):
        return entry
    test = str(entry.get("test"))
    shown_as = next((table for name, table in FORMER_TESTS.items() if name in test), None)
    entry = {"world_size": 1, "shown_as": shown_as, "method_digest": None} | entry
    if entry["world_size"] != 1 and not entry.get("placement"):
        entry["placement"] = "replicated" if entry.get("captured_step") else "sharded"
    return entry


def _with_drawing(entry: Any) -> Any:
    """An entry that says how its random weights were drawn; until 2026-11-27 none did, and all were drawn alike."""
    if isinstance(entry, dict) and entry.get("weights") == "random" and not entry.get("weights_revision"):
        return entry | {"weights_revision": "drawn 1"}
    return entry


def _tell_namesakes_apart(entries: Sequence[dict[str, Any]]) -> None:
    """Methods of one name in one run, from before there were digests, get those of the settings that it stored."""
    settings = ("adapter", "quantization", "weights_dtype", "training_arguments", "captured_step", "library")
    namesakes: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for entry in entries:
        if entry.get("method_digest") is None:
            namesakes.setdefault(tuple(entry[key] for key in (*SAME_BASELINE.keys, "method")), []).append(entry)
    for alike in namesakes.values():
        digests = [digest({key: entry.get(key) for key in settings}) for entry in alike]
        if len(set(digests)) > 1:
            for entry, of_settings in zip(alike, digests, strict=True):
                entry["method_digest"] = of_settings


def _is_no_forecast(row: Any) -> bool:
    """A plan also has rows that say why there is no forecast."""
    return isinstance(row, dict) and row.get("verdict") == "cannot_be_forecast"


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None
