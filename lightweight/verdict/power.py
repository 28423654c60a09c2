"""How many seeds show that a method is no worse? Asked before anything is trained, and again where they were too few.

The test is the one of noninferiority.py: Student's, one-sided, on the differences of method and baseline with the same
seed. Its power is that of a noncentral t (Julious, Sample sizes for clinical trials, 2010, section 6). How far the
differences scatter is read from a pilot or from a stored run. Of few seeds that is uncertain itself, so what is planned
with is its one-sided upper bound (Browne, Statistics in Medicine 14, 1995): four times in five the true one is below.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from statistics import stdev

from lightweight.record import BASELINE, Entry
from lightweight.verdict.noninferiority import CONFIDENCE, SAME_JOB

WANTED = 0.8
"""The power that is planned for, and the confidence of the bound of a spread."""

MOST = 1000
"""Seeds; where more are needed, a verdict is out of reach."""


@dataclass(frozen=True)
class Spread:
    """How far the differences of method and baseline scatter from seed to seed, in nats: the standard deviation of
    `seeds` of them, for the method called `of`."""

    nats: float
    seeds: int
    of: str

    @property
    def bound(self) -> float:
        """What it is at most, four times in five."""
        from scipy.stats import chi2

        freedom = self.seeds - 1
        return self.nats * math.sqrt(freedom / float(chi2.ppf(1 - WANTED, freedom)))


def power(spread: float, seeds: int, margin: float, difference: float = 0.0) -> float:
    """How likely so many seeds show a method to be no worse whose true difference from the baseline is `difference`;
    all in nats. 0 for one seed, which has no interval."""
    from scipy.stats import nct, t

    if seeds < 2:
        return 0.0
    if spread == 0:
        return float(difference < margin)
    freedom = seeds - 1
    away = (margin - difference) / (spread / math.sqrt(seeds))
    return float(nct.sf(t.ppf(CONFIDENCE, freedom), freedom, away))


def seeds_needed(spread: float, margin: float, difference: float = 0.0, wanted: float = WANTED) -> int | None:
    """The fewest seeds with the power that is wanted, None where more than MOST were needed or none suffice."""
    if difference >= margin:
        return None
    if power(spread, MOST, margin, difference) < wanted:
        return None
    return next(seeds for seeds in count(2) if power(spread, seeds, margin, difference) >= wanted)


def more_seeds(differences: Sequence[float], margin: float) -> int | None:
    """How many more seeds than those of `differences` would decide, with the power wanted, were the truth their mean
    and their spread: show the method to be no worse, or worse where the mean is above the margin. None where that is
    out of reach, or there are too few to say."""
    if len(differences) < 2:
        return None
    mean, spread = sum(differences) / len(differences), stdev(differences)
    needed = seeds_needed(spread, abs(margin - mean), 0.0)  # the same distance from the margin on either side
    return None if needed is None else max(1, needed - len(differences))


def undecided(differences: Sequence[float], margin: float) -> str:
    """How many seeds would decide where those of `differences` do not, in words."""
    if len(differences) < 2:
        return "one seed has no interval: give --seeds 2 or more"
    more = more_seeds(differences, margin)
    return f"{more} more would decide: --seeds {len(differences) + more}" if more else f"over {MOST} would be needed"


def spreads(entries: Iterable[Entry]) -> list[Spread]:
    """How far each method's held-out losses over its baseline's scatter over the seeds of a stored run, of those with
    at least two pairs."""
    completed = [entry for entry in entries if entry.outcome == "completed" and entry.weights == "pretrained"]
    baselines = {(*SAME_JOB.of(entry), entry.seed): entry for entry in completed if entry.method == BASELINE}
    found = []
    for group in SAME_JOB.also("method", "method_digest").groups(completed):
        pairs = {entry.seed: (entry, baselines.get((*SAME_JOB.of(entry), entry.seed))) for entry in group}
        differences = [
            entry.heldout_loss_after - other.heldout_loss_after
            for entry, other in pairs.values()
            if other and entry.heldout_loss_after is not None and other.heldout_loss_after is not None
        ]
        if group[0].method != BASELINE and len(differences) > 1:
            found.append(Spread(stdev(differences), len(differences), group[0].method))
    return found


def planned(spread: Spread, seeds: int, margin: float) -> str:
    """What `seeds` can show, in a sentence: before they are trained."""
    chance = power(spread.bound, seeds, margin)
    show = "1 seed has no interval, and shows" if seeds == 1 else f"{seeds} seeds show"
    needed = seeds_needed(spread.bound, margin)
    enough = f"{needed} have {WANTED:.0%}" if needed else f"over {MOST} were needed for {WANTED:.0%}"
    return (
        f"{show} a method that is as good as its baseline to be no worse within {margin:g} nats with a "
        f"chance of {chance:.0%}, where differences scatter by up to {spread.bound:.3f} nats ({spread.nats:.3f} over "
        f"{spread.seeds} seeds of {spread.of}); {enough}"
    )
