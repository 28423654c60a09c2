"""Is a method no worse than its baseline, and what did it forget? Losses of several seeds in pairs, and an interval.

A method and its baseline are trained with the same seed, so on the same batches in the same order; the difference of
their losses then leaves out what the order did, and its mean over seeds has Student's t-interval. Seeds are the only
thing drawn at random: the interval says how far another seed may be from these, for this corpus and this held-out part.

"No worse" is claimed as non-inferiority (Piaggio et al., JAMA 308, 2012): the one-sided 95 % upper bound of method
minus baseline is below a margin set beforehand. That bound is the upper end of the two-sided 90 % interval, which is
what is shown everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from lightweight.record import BASELINE, BASELINE_SHARES, Entry

Verdict = Literal["no worse", "worse", "not shown"]
"""Which side of the margin the whole interval is on; not shown where it is on both."""

MARGIN = 0.05
"""Nats a token that a method may lose on its baseline: 5 % more perplexity. A person does not tell two models of one
size apart by that, and it is a small part of what fine-tuning is done for: a sixth of what twelve steps of two
pairs bring the baseline of smollm2-135m on the English dialogues (CHANGELOG.md)."""

CONFIDENCE = 0.95
"""Of the one-sided bound."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds in nats a token, and its two-sided 90 % t-interval: minus to plus infinity for one seed."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A method beside the baseline of the same seeds, all losses in nats a token.

    `heldout` and `elsewhere` are the method's mean losses before and after training, None where there are none;
    `difference` is the held-out loss after it less the baseline's, None for the baseline itself; `forgotten` is how
    much the loss elsewhere rose. `entries` are the method's, one a seed; `failed` counts those of them without losses
    or without a baseline of their seed that has some, which no mean includes.
    """

    model: str
    method: str
    heldout: tuple[float, float] | None
    elsewhere: tuple[float, float] | None
    difference: Estimate | None
    forgotten: Estimate | None
    failed: int
    entries: Sequence[Entry]

    @property
    def verdict(self) -> Verdict | None:
        """Whether the method was shown to be no worse, None for the baseline. A failed trial shows nothing."""
        if self.method == BASELINE:
            return None
        return "not shown" if self.difference is None or self.failed else verdict(self.difference)


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean of one value a seed with its interval. Raises ValueError without any."""
    from scipy.stats import t  # half a second, and a record without seeds to compare needs none

    if not values:
        raise ValueError("a mean over seeds needs at least one")
    mean = fmean(values)
    if len(values) == 1:
        return Estimate(mean, -math.inf, math.inf)
    half = float(t.ppf(CONFIDENCE, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def verdict(difference: Estimate, margin: float = MARGIN) -> Verdict:
    """No worse when the whole interval is below `margin`, worse when it is all above, else not shown."""
    if difference.high < margin:
        return "no worse"
    return "worse" if difference.low > margin else "not shown"


SAME_JOB = (*BASELINE_SHARES, "elsewhere_digest", "planned_steps", "max_length", "tokens_per_step")
"""What method and baseline must have in common beside the seed."""


def compare(entries: Iterable[Entry]) -> list[Comparison]:
    """Every method with trained weights that has been trained with at least two seeds, in the order of `entries`, the
    baseline itself included. Random weights say nothing of quality and are left out."""
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        if entry["weights"] == "pretrained":
            groups.setdefault((entry["method"], str(entry.get("method_digest")), *_job(entry)), []).append(entry)
    baselines = [entry for of in groups.values() for entry in of if entry["method"] == BASELINE]
    return [
        _comparison(of_method, [entry for entry in baselines if _job(entry) == _job(of_method[0])])
        for of_method in groups.values()
        if len({str(entry["seed"]) for entry in of_method}) > 1
    ]


def _job(entry: Entry) -> tuple[str, ...]:
    return tuple(str(entry.get(key)) for key in SAME_JOB)


def _comparison(of_method: Sequence[Entry], baselines: Sequence[Entry]) -> Comparison:
    newest = {str(entry["seed"]): entry for entry in of_method}
    baseline = {str(entry["seed"]): entry for entry in baselines if _losses(entry, "heldout")}
    told = [entry for seed, entry in newest.items() if seed in baseline and _losses(entry, "heldout")]
    differences = [entry["heldout_loss_after"] - baseline[str(entry["seed"])]["heldout_loss_after"] for entry in told]
    heldout, elsewhere = ([_losses(entry, where) for entry in told] for where in ("heldout", "elsewhere"))
    rises = [losses[1] - losses[0] for losses in elsewhere if losses]
    return Comparison(
        model=of_method[0]["model"],
        method=of_method[0]["method"],
        heldout=_means(heldout),
        elsewhere=_means(elsewhere),
        difference=over_seeds(differences) if told and of_method[0]["method"] != BASELINE else None,
        forgotten=over_seeds(rises) if rises else None,
        failed=len(newest) - len(told),
        entries=list(newest.values()),
    )


def _losses(entry: Entry, where: str) -> tuple[float, float] | None:
    """Before and after training, of a trial that ended as it should."""
    before, after = entry.get(f"{where}_loss_before"), entry.get(f"{where}_loss_after")
    return None if entry["outcome"] != "completed" or before is None or after is None else (before, after)


def _means(losses: Sequence[tuple[float, float] | None]) -> tuple[float, float] | None:
    known = [pair for pair in losses if pair]
    return (fmean(before for before, _ in known), fmean(after for _, after in known)) if known else None
