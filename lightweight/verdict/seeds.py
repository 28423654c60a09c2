"""What do several seeds say together? A mean, and how far another seed may be from it: Student's t-interval.

A seed draws the order of the data, an adapter's first values and dropout. What is compared is paired: a method and its
baseline with the same seed see the same batches in the same order, so the difference of a pair leaves out what the
order did. Seeds are the only thing drawn at random, for this corpus and this held-out part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95
"""Of the two-sided interval."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and its two-sided t-interval: minus to plus infinity for one seed."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """As a difference, in nats."""
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    def text(self, form: str) -> str:
        """Mean and interval, each as `form` writes a number; the mean alone of one seed."""
        if not math.isfinite(self.high):
            return form.format(self.mean)
        return f"{form.format(self.mean)} [{form.format(self.low)}, {form.format(self.high)}]"


def over_seeds(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """The mean of one value a seed with its interval. Raises ValueError without any."""
    from scipy.stats import t  # half a second, and a record without seeds to compare needs none

    if not values:
        raise ValueError("a mean over seeds needs at least one")
    mean = fmean(values)
    if len(values) == 1:
        return Estimate(mean, -math.inf, math.inf)
    half = float(t.isf((1 - confidence) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def share(count: int, of: int, confidence: float = CONFIDENCE) -> Estimate:
    """A share, `count` of so many, with Wilson's interval: how far it may be on other questions of the kind."""
    from scipy.stats import binomtest

    interval = binomtest(count, of).proportion_ci(confidence, method="wilson")
    return Estimate(count / of, float(interval.low), float(interval.high))


def ratio_over_seeds(ratios: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """The geometric mean of one ratio a seed, above 0, with the interval of its logarithm; 0 to infinity for one
    seed."""
    of_log = over_seeds([math.log(ratio) for ratio in ratios], confidence)
    return Estimate(math.exp(of_log.mean), math.exp(of_log.low), math.exp(of_log.high))
