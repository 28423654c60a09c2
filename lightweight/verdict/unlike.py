"""How do two trials, or two forecasts, differ? In words: each condition with its two values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

OF_CODE = {"import_path": "import path", "source_sha256": "digest of the code"}
"""What tells an author's code apart, in words."""


def said(differing: Mapping[str, tuple[object, object]]) -> str:
    """The conditions that differ, as they were `there`, in the stored run, and are `here`. One GPU has no placement,
    which says no more than the number of GPUs does."""
    has_no_placement = len(differing) > 1 and None in differing.get("placement", ())
    return ", ".join(
        f"{name} is {_brief(was)} there and {_brief(is_now)} here"
        for key, pair in differing.items()
        if key != "placement" or not has_no_placement
        for name, was, is_now in _parts(key, *pair)
    )


def _parts(name: str, was: Any, is_now: Any) -> Iterator[tuple[str, Any, Any]]:
    """What differs within two values of one condition: the values themselves, unless both have parts with names."""
    match was, is_now:
        case Mapping(), Mapping():
            for key in sorted(was.keys() | is_now.keys()):
                if was.get(key) != is_now.get(key):
                    yield from _parts(f"{OF_CODE.get(key, key)} of {name}", was.get(key), is_now.get(key))
        case ((list() | tuple()), (list() | tuple())) if len(was) == len(is_now):
            for number, (one, other) in enumerate(zip(was, is_now, strict=True), 1):
                if one != other:
                    yield from _parts(f"{name} {number}", one, other)
        case _:
            yield name, was, is_now


def _brief(value: object) -> str:
    if isinstance(value, Mapping) and "import_path" in value:
        value = value["import_path"]
    return str(value)[:40] if len(str(value)) < 60 else f"{str(value)[:12]}..."
