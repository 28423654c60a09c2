"""How do two trials, or two forecasts, differ? In words: each condition with its two values."""

from __future__ import annotations

from collections.abc import Mapping


def said(differing: Mapping[str, tuple[object, object]]) -> str:
    """The conditions that differ, as they were `there`, in the stored run, and are `here`. One GPU has no placement,
    which says no more than the number of GPUs does."""
    has_no_placement = len(differing) > 1 and None in differing.get("placement", ())
    return ", ".join(
        f"{key} is {_brief(was)} there and {_brief(is_now)} here"
        for key, (was, is_now) in differing.items()
        if key != "placement" or not has_no_placement
    )


def _brief(value: object) -> str:
    return str(value)[:40] if len(str(value)) < 60 else f"{str(value)[:12]}..."
