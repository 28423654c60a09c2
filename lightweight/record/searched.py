"""Were the rates that a sweep found searched for this? They are of one model, and of methods as they were."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightweight.record.writing import method_digest
from lightweight.settings import SweptRates

if TYPE_CHECKING:  # a record is read without torch
    from lightweight.methods import Method


def check_searched(rate: Any, model: str, *methods: Method) -> None:
    """Raise ValueError where `rate`, of `Settings`, is that of a sweep on another model than the one called `model`, or
    of other `methods` than these, which have their rates."""
    if not isinstance(rate, SweptRates):
        return
    here = f"--learning-rate {rate.path}"
    is_folder = Path(model).is_dir() and Path(model).resolve() == Path(rate.model).resolve()
    if model != rate.model and not is_folder:
        raise ValueError(f"{here}: was searched on model {rate.model}, not on {model}: sweep that one, too")
    for method in methods:
        if method_digest(method.with_learning_rate(rate.of[method.name])) != rate.digests[method.name]:
            raise ValueError(
                f"{here}: method {method.name} has changed since the sweep, in its code or its settings: "
                "sweep it again, or undo the change"
            )
