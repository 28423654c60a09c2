"""Is a speedup what it was, or is that noise? Ratios of paired rounds, their interval, and a verdict that may be looked
at while pairs are still being added.

Rounds that follow each other share the machine's temper, so each pair gives one ratio, and the drift both rounds saw
cancels in it. Times are positive and disturbed by factors, so the statistics are those of the ratios' logarithms: the
estimate is the geometric mean, its interval Student's t.

Looking after every few pairs and stopping as soon as the interval is clear of the floor would cheat a fixed-size
interval: it gets many chances to be wrong. So the error is spent over the looks (Lan & DeMets, Discrete sequential
boundaries for clinical trials, Biometrika 70, 1983) in proportion to the pairs seen (Kim & DeMets, Biometrika 74, 1987,
their family with exponent 1), and what decides is the repeated confidence interval (Jennison & Turnbull, JRSS B 51,
1989): all of its looks together miss the truth as often as one look at a fixed size would. The variance is unknown, so
each look's nominal level is used with Student's t (Jennison & Turnbull, Group Sequential Methods, 2000, section 4.4).
Proportional spending was chosen by simulation over O'Brien-Fleming's, which needs twice the pairs where the answer is
plain, and over a Student-t confidence sequence, which misses more where it is not (CHANGELOG.md has the figures).

Where a step waits for Python and the other for the GPU, what else a host does slows one of them for seconds on end, and
pairs that follow each other are alike. So the mean is taken for that of fewer pairs, which are independent: their
number divided by their autocorrelation time, the autocorrelations summed up to the first that is not positive (Geyer,
Practical Markov chain Monte Carlo, Statistical Science 7, 1992, has the initial positive sequence).

What the interval knows is how pairs of rounds scatter. What a process keeps for its whole life, such as where its
memory lies, is the same in all of its pairs and not in it (Kalibera & Jones, Rigorous benchmarking in reasonable time,
ISMM 2013); `child/forkserver.py` keeps that small. Where both sides were measured one after the other, that is most of
what there is, and the machine's temper in either's minute comes on top: `IN_TURN` adds it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from statistics import fmean, variance
from typing import TYPE_CHECKING

from lightweight.schema import GateVerdict

if TYPE_CHECKING:  # the imports in functions take half a second, and most who load this ask for no interval
    import numpy as np

CONFIDENCE = 0.95
CAP = 128
"""Pairs after which a verdict that is not clear stays undecided."""

LARGEST_EXPONENT = 700.0
"""exp() has no number beyond 709."""

IN_TURN = (2 * 0.085**2, 6)
"""Variance of the logarithm of a ratio whose two sides were measured one after the other, beside what their rounds
scatter, and its degrees of freedom. Three trials of each of three stock methods, alike but for the seed, followed each
other on one host (experiments/records/h200-no-worse.json): their median steps have a standard deviation of 8.5 %."""

MOST_PAIRS = 2**16
"""That anybody may plan with: weeks of rounds."""

LOOKS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""After how many pairs a verdict is looked for: whole turns of A B B A B A A B, and each look a third to a half
later than the last, since a look at almost the same pairs costs error and tells nothing new."""


@dataclass(frozen=True)
class Interval:
    """A ratio and the interval it lies in. Where one pair or none is known, that is everything: 0 to infinity."""

    ratio: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Of the interval, as a share of the ratio."""
        return math.sqrt(self.high / self.low) - 1 if self.low else math.inf

    def __str__(self) -> str:
        return f"{self.ratio:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(log_ratios: Sequence[float], confidence: float = CONFIDENCE, in_turn: int = 0) -> Interval:
    """The geometric mean of ratios given by their logarithms, and its t-interval for a number of pairs that was fixed
    beforehand; `in_turn` is 1 where the two sides of every pair were measured one after the other. Raises ValueError
    without any."""
    if not log_ratios:
        raise ValueError("an interval needs at least one ratio")
    center, error, freedom = _difference(log_ratios, (), in_turn)
    return _interval(center, error, (1 - confidence) / 2, freedom)


def looks(cap: int) -> tuple[int, ...]:
    """After how many pairs a verdict is looked for when there are at most `cap`; `cap` is the last. Raises
    ValueError."""
    if not LOOKS[0] <= cap <= MOST_PAIRS or cap % 4:
        raise ValueError(f"{cap} pairs: give a multiple of 4 from {LOOKS[0]} on, at most {MOST_PAIRS}")
    return (*(look for look in LOOKS if look < cap), cap)


def repeated_interval(
    log_ratios: Sequence[float], cap: int = CAP, stored: Sequence[float] = (), in_turn: int = 0
) -> Interval:
    """The interval that may be looked at again and again: of the ratios themselves, or with `stored` of how many times
    the stored ones they are, the error of those included. `in_turn` is how many of the two, 0 to 2, have pairs whose
    sides were measured one after the other.

    Pairs after the last of `looks(cap)` that has been reached are left out. Before the first it is 0 to infinity.
    """
    schedule = looks(cap)
    reached = [look for look in schedule if look <= len(log_ratios)]
    if not reached:
        return Interval(math.exp(_mean(log_ratios) - _mean(stored)), 0.0, math.inf)
    center, error, freedom = _difference(log_ratios[: reached[-1]], stored, in_turn)
    level = nominal_levels(schedule, (1 - CONFIDENCE) / 2)[len(reached) - 1]
    return _interval(center, error, level, freedom)


def independent(log_ratios: Sequence[float]) -> float:
    """How many independent pairs these tell as much as, from 2 to their number."""
    import numpy as np

    count = len(log_ratios)
    apart = np.asarray(log_ratios) - fmean(log_ratios)
    scatter = float(apart @ apart)
    time = 1.0
    for lag in range(1, count // 2 + 1 if scatter else 1):
        alike = float(apart[lag:] @ apart[:-lag]) / scatter
        if alike <= 0:
            break
        time += 2 * alike
    return max(count / time, 2.0)


def verdict(interval: Interval, floor: float) -> GateVerdict:
    """Pass when the whole interval is above `floor`, fail when it is below, else undecided."""
    if interval.low > floor:
        return "pass"
    return "fail" if interval.high < floor else "undecided"


@lru_cache
def nominal_levels(schedule: tuple[int, ...], error: float) -> tuple[float, ...]:
    """The one-sided level of each look, so that a process without drift crosses at any of them with probability
    `error`, spent in proportion to the pairs seen.

    The recursion is that of Armitage, McPherson & Rowe (JRSS A 132, 1969) on a Brownian motion seen at the times
    pairs / cap. A stored run's error, which all looks share, only makes them more alike, so it errs on the safe side.
    """
    import numpy as np
    from scipy.optimize import brentq
    from scipy.stats import norm

    times = [look / schedule[-1] for look in schedule]
    levels = [error * times[0]]
    bound = float(norm.isf(levels[0])) * math.sqrt(times[0])
    grid = np.linspace(-8 * math.sqrt(times[0]), bound, 801)
    density = norm.pdf(grid, scale=math.sqrt(times[0]))
    for before, now in pairwise(times):
        spent, step = error * (now - before), math.sqrt(now - before)

        def crossing(bound: float, grid: np.ndarray = grid, density: np.ndarray = density, step: float = step) -> float:
            return float(np.trapezoid(density * norm.sf((bound - grid) / step), grid))

        bound = brentq(lambda bound, spent=spent, crossing=crossing: crossing(bound) - spent, 0.0, 10.0)
        levels.append(float(norm.sf(bound / math.sqrt(now))))
        following = np.linspace(-8 * math.sqrt(now), bound, 801)
        steps = norm.pdf((following[:, None] - grid[None, :]) / step) / step
        grid, density = following, np.trapezoid(steps * density, grid, axis=1)
    return tuple(levels)


def _difference(now: Sequence[float], stored: Sequence[float], in_turn: int) -> tuple[float, float, float]:
    """The difference of two means of logarithms, its standard error, and Welch's degrees of freedom."""
    if len(now) < 2 or len(stored) == 1:
        return _mean(now) - _mean(stored), math.inf, 1
    counted = [(variance(side), independent(side)) for side in (now, stored) if side]
    shares = [(scatter / count, count - 1) for scatter, count in counted] + [IN_TURN] * in_turn
    total = sum(share for share, _ in shares)
    freedom = total**2 / sum(share**2 / of for share, of in shares) if total else len(now) - 1
    return _mean(now) - _mean(stored), math.sqrt(total), freedom


def _interval(center: float, error: float, level: float, freedom: float) -> Interval:
    from scipy.stats import t

    half = float(t.isf(level, freedom)) * error if error else 0.0
    high = math.exp(center + half) if center + half < LARGEST_EXPONENT else math.inf
    low = math.exp(center - half) if half < LARGEST_EXPONENT else 0.0
    return Interval(math.exp(center), low, high)


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0
