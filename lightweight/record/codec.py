"""How is a record said in JSON, and what is it again? Dataclasses to plain JSON and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

from lightweight.record.entries import ONLY_WITH, Entry, ForecastRow, NoForecast, Speedup
from lightweight.schema import NO_KEY


def as_json(one: Entry | ForecastRow | Speedup) -> dict[str, Any]:
    """`one` as the JSON that is written."""
    return {
        key: as_json(value) if isinstance(value := getattr(one, key), Speedup) else plain(value)
        for key, metadata in _keys(type(one)).items()
        if ONLY_WITH not in metadata or getattr(one, metadata[ONLY_WITH]) is not None
    }


def entry_of(values: Mapping[str, Any], **more: Any) -> Entry:
    """The entry that `values`, which is sound JSON, says; `more` are its fields that are no keys."""
    speedup = values.get("speedup")
    return Entry(
        **_fields(Entry, values) | {"speedup": None if speedup is None else Speedup(**_fields(Speedup, speedup))} | more
    )


def forecast_of(values: Mapping[str, Any]) -> ForecastRow:
    """The forecast that `values`, which is sound JSON, says."""
    return ForecastRow(**_fields(ForecastRow, values))


def no_forecast_of(values: Mapping[str, Any]) -> NoForecast:
    """The row without a forecast that `values`, which is sound JSON, says."""
    return NoForecast(**_fields(NoForecast, values))


def _fields(of: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What `values` has for fields of a dataclass, lists as tuples; keys that this version does not know have none."""
    known = {key: values[key] for key in _keys(of) if key in values}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in known.items()}


def _keys(of: type[Any]) -> dict[str, Mapping[str, str]]:
    """The keys that a dataclass has in JSON, with their fields' metadata."""
    return {field.name: field.metadata for field in dataclasses.fields(of) if NO_KEY not in field.metadata}


KEYS, FORECAST_KEYS, NO_FORECAST_KEYS = (
    tuple(field.name for field in dataclasses.fields(of) if field.default is dataclasses.MISSING)
    for of in (Entry, ForecastRow, NoForecast)
)
"""What every entry, every forecast, and every row without one has, and what a reader of records may rely on."""

SPEEDUP_KEYS = tuple(key for key in _keys(Speedup) if key != "ended_after_seconds")
"""What every speedup has; those from before 2026-11-26 do not say whether the time for them was over."""


def plain(value: Any) -> Any:
    """`value` in JSON's own types, which are also all that pytest-xdist carries between processes."""
    match value:
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case set() | frozenset():
            return sorted((plain(item) for item in value), key=str)
        case list() | tuple():
            return [plain(item) for item in value]
        case float() if not math.isfinite(value):
            return None
        case Enum():
            return plain(value.value)
        case str() | int() | float() | None:
            return value
    return str(value)
