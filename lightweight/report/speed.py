"""How many times as fast is it? A cell against its baseline, a rung against the one below, and what bounds a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from lightweight.record import Entry, Speedup
from lightweight.report.select import pace_of

PRODUCTS_A_SECOND = {"H100": 735e12, "H200": 788e12}
"""FLOP/s of an 8192 x 8192 x 8192 bf16 product on random data, measured; by a word of the device's name."""


@dataclass(frozen=True, kw_only=True)
class Faster:
    """How many times as fast as its baseline a cell is, per token; `interval` has the ends of the 95 % interval where
    it was measured in pairs of rounds, the upper one infinite after a single pair."""

    ratio: float
    interval: tuple[float, float] | None = None


def faster(entry: Entry, baseline: Entry | None) -> Faster | None:
    """From pairs of rounds where there are any, else from the steady steps of both cells; None where there is no ratio
    to give."""
    if entry.speedup and entry.speedup.ratio is not None:
        return Faster(ratio=entry.speedup.ratio, interval=_interval(entry.speedup))
    ratio = step_ratio(baseline, entry)
    return None if ratio is None else Faster(ratio=ratio)


def _interval(paired: Speedup) -> tuple[float, float]:
    """The stored one; that of rounds which were measured one after the other is wider than records used to say."""
    if paired.is_in_turn and paired.log_ratios:
        from lightweight.verdict import ratio  # numpy takes a while, and hardly a record has such pairs

        wide = ratio.interval(paired.log_ratios, in_turn=1)
        return wide.low, wide.high
    return paired.low or 0.0, math.inf if paired.high is None else paired.high


def step_ratio(below: Entry | None, rung: Entry) -> float | None:
    """How many times as fast a step of `rung` is per token, None where one of both has none."""
    return rung.times_as_fast(below) if below and below.outcome == rung.outcome == "completed" else None


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How many times as fast as its baseline a method is, over its seeds: the geometric mean, and the least and the
    most of them."""

    entries: Sequence[Entry]
    ratio: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """In words, with the spread where there are several seeds."""
        seeds = len(self.entries)
        spread = f" ({self.low:.1f} to {self.high:.1f} over {seeds} seeds)" if seeds > 1 else ""
        return f"{self.ratio:.1f} times as fast as baseline{spread}"


def pace(of_method: Sequence[Entry], entries: Sequence[Entry]) -> Pace | None:
    """The pace of a method's trials, one a seed, their baselines among `entries`; None where none of them has a
    ratio."""
    known = [(gain.ratio, entry) for entry in of_method if (gain := faster(entry, pace_of(entry, entries)))]
    if not known:
        return None
    ratios = [ratio for ratio, _ in known]
    return Pace(
        entries=[entry for _, entry in known],
        ratio=math.exp(fmean(map(math.log, ratios))),
        low=min(ratios),
        high=max(ratios),
    )


def products_seconds(entry: Entry) -> float | None:
    """What the products of a LoRA step would take alone: forward, and backward to the inputs."""
    rate = next((rate for word, rate in PRODUCTS_A_SECOND.items() if word in entry.device), None)
    if rate is None or not entry.parameters or not entry.tokens_per_step:
        return None
    return float(4 * entry.parameters * entry.tokens_per_step / rate)
