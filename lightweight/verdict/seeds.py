"""What do several seeds say together? A mean, and how far another seed may be from it: Student's t-interval. What is
above 0 and varies by factors, as times, rates and ratios do, has a geometric mean and the interval of its logarithm.

A seed draws the order of the data, an adapter's first values and dropout. What is compared is paired: a method and its
baseline with the same seed see the same batches in the same order, so the difference of a pair leaves out what the
order did. Seeds are the only thing drawn at random, for this corpus and this held-out part.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95
"""Of the two-sided interval."""

LARGEST_LOG = math.log(sys.float_info.max)


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


def geometric_over_seeds(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """The geometric mean of one value a seed, above 0, with the interval of its logarithm; 0 to infinity for one
    seed."""
    of_log = over_seeds([math.log(value) for value in values], confidence)
    high = math.exp(of_log.high) if of_log.high < LARGEST_LOG else math.inf
    return Estimate(values[0] if len(values) == 1 else math.exp(of_log.mean), math.exp(of_log.low), high)
