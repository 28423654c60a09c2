"""Did it get worse? `lightweight gate NEW.json --against OLD.json`: the verdicts, and exit status 1 for a failure."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lightweight.cli.terminal import refuse
from lightweight.report import comparison
from lightweight.verdict.limits import LIMITS, Limits


def command(options: argparse.Namespace) -> int:
    """Hold the new record against the older ones; the exit status."""
    try:
        told, failures = comparison.of_files(*_records(options), _limits(options))
    except ValueError as error:
        return refuse(error)
    print(told)
    return 1 if failures else 0


def _records(options: argparse.Namespace) -> tuple[Path, list[Path]]:
    """The new one, and what it is held against."""
    *older, new = options.records
    if len(older) != (options.against is None):
        raise ValueError("gate: give the new record and --against older ones, or an older one and the new one")
    return new, options.against or older


def _limits(options: argparse.Namespace) -> Limits:
    limits: dict[str, Any] = {limit.name: limit.value(getattr(options, limit.name)) for limit in LIMITS}
    return Limits(**limits, **{name: getattr(options, name) for name in ("undecided", "missing", "require_match")})
