"""Do the rates of a sweep apply? Only to its model, and to methods that have not changed since."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightweight.record.likeness import arguments_told
from lightweight.record.writing import method_digest
from lightweight.settings import SweptRates

if TYPE_CHECKING:  # a record is read without torch
    from lightweight.methods import Method


def check_searched(rate: Any, model: str, *methods: Method) -> None:
    """Raise ValueError if `rate`, of `Settings`, is from a sweep on another model than `model`, or if one of `methods`
    has changed since."""
    if not isinstance(rate, SweptRates):
        return
    here = f"--learning-rate {rate.path}"
    is_folder = Path(model).is_dir() and Path(model).resolve() == Path(rate.model).resolve()
    if model != rate.model and not is_folder:
        raise ValueError(f"{here}: was searched on model {rate.model}, not on {model}: sweep that one, too")
    for method in methods:
        at_its_rate = method.with_learning_rate(rate.of[method.name])
        if method_digest(at_its_rate) == rate.digests[method.name]:
            continue
        if told := arguments_told(rate.arguments[method.name], at_its_rate.training_arguments):
            raise ValueError(
                f"{here}: method {method.name} was searched for under other settings: {told}: sweep it under those "
                "of here, or take those of the sweep"
            )
        raise ValueError(
            f"{here}: method {method.name} has changed since the sweep, in its code or its settings: "
            "sweep it again, or undo the change"
        )
