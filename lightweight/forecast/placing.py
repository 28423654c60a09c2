"""Does every rank of a trial hold the network, or a part of it? All of it where that is forecast to fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lightweight.trial import Forecast, Trial


def placed(trial: Trial, forecast: Callable[[Trial], Forecast]) -> Trial:
    """`trial` replicated where that fits, or where it cannot be sharded; else sharded. A replica waits for the ranks'
    gradients alone, a shard for every layer's weights as well. Raises what `forecast` raises."""
    replicated = replace(trial, placement="replicated")
    if trial.world_size == 1 or trial.method.captured_step is not None or forecast(replicated).verdict == "fits":
        return replicated
    return replace(trial, placement="sharded")
