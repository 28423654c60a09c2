"""Is a method no worse than its baseline, and what did it forget? Losses of several seeds in pairs, and an interval.

The differences of method and baseline with the same seed have Student's t-interval (seeds.py).

"No worse" is claimed as non-inferiority (Piaggio et al., JAMA 308, 2012): the one-sided 95 % upper bound of method
minus baseline is below a margin set beforehand. That bound is the upper end of the two-sided 90 % interval, which is
what is shown everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from lightweight.record import BASELINE, SAME_BASELINE, Entry
from lightweight.verdict import seeds
from lightweight.verdict.seeds import Estimate as Estimate

Conclusion = Literal["no worse", "worse", "inconclusive"]
"""Which side of the margin the whole interval is on; inconclusive where it is on both."""

MARGIN = 0.05
"""Nats a token that a method may lose on its baseline: 5 % more perplexity. A person does not tell two models of one
size apart by that, and it is a small part of what fine-tuning is done for: a sixth of what twelve steps of two
pairs bring the baseline of smollm2-135m on the English dialogues (CHANGELOG.md)."""

CONFIDENCE = 0.95
"""Of the one-sided bound."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A method beside the baseline of the same seeds, all losses in nats a token.

    `heldout` and `elsewhere` are the method's mean losses before and after training, None where there are none;
    `difference` is the held-out loss after it less the baseline's, None for the baseline itself, and `differences` are
    those of each seed, held against `margin`; `gained` is what the baseline itself gained in training; `forgotten` is
    how much the loss elsewhere rose. `entries` are the method's, one a seed; `failed` counts those of them without
    losses or without a baseline of their seed that has some, which no mean includes.
    """

    model: str
    method: str
    heldout: tuple[float, float] | None
    elsewhere: tuple[float, float] | None
    difference: Estimate | None
    forgotten: Estimate | None
    failed: int
    entries: Sequence[Entry]
    differences: Sequence[float] = ()
    margin: float = MARGIN
    gained: float | None = None

    @property
    def conclusion(self) -> Conclusion | None:
        """Whether the method was shown to be no worse, None for the baseline. A failed trial shows nothing."""
        if self.method == BASELINE:
            return None
        return "inconclusive" if self.difference is None or self.failed else conclusion(self.difference, self.margin)

    @property
    def too_wide(self) -> str | None:
        """What `too_wide` says of the margin, None for the baseline and where there are no losses."""
        return None if self.method == BASELINE or self.gained is None else too_wide(self.margin, self.gained)


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean of one value a seed, in nats a token, between the one-sided bounds on either side. Raises ValueError
    without any."""
    return seeds.over_seeds(values, 2 * CONFIDENCE - 1)


def conclusion(difference: Estimate, margin: float = MARGIN) -> Conclusion:
    """No worse when the whole interval is below `margin`, worse when it is all above, else inconclusive."""
    if difference.high < margin:
        return "no worse"
    return "worse" if difference.low > margin else "inconclusive"


def too_wide(margin: float, gained: float) -> str | None:
    """In words, where a method that learns nothing is no worse as well: `margin` is larger than what the baseline
    `gained` in training, its held-out loss before less that after, in the mean over seeds. Else None."""
    if gained >= margin:
        return None
    return (
        f"the margin is larger than the {gained:.3f} nats that the baseline gained in training, so that what learns "
        "nothing is no worse: train for longer, or take a smaller margin"
    )


SAME_JOB = SAME_BASELINE.also("elsewhere_digest", "planned_steps", "max_length", "tokens_per_step", "loss_on", "long")
"""What method and baseline must have in common beside the seed."""


def qualities(entries: Iterable[Entry], margin: float = MARGIN) -> list[Quality]:
    """Every method with trained weights that has been trained with at least two seeds, in the order of `entries`, the
    baseline itself included. Random weights say nothing of quality and are left out."""
    pretrained = [entry for entry in entries if entry.weights == "pretrained"]
    baselines = [entry for entry in pretrained if entry.method == BASELINE]
    return [
        _quality(of_method, [entry for entry in baselines if SAME_JOB.of(entry) == SAME_JOB.of(of_method[0])], margin)
        for of_method in SAME_JOB.also("method", "method_digest").groups(pretrained)
        if len({entry.seed for entry in of_method}) > 1
    ]


def _quality(of_method: Sequence[Entry], baselines: Sequence[Entry], margin: float) -> Quality:
    newest = {entry.seed: entry for entry in of_method}
    of_baseline = {entry.seed: losses for entry in baselines if (losses := _heldout(entry))}
    known = {seed: losses for seed, entry in newest.items() if seed in of_baseline and (losses := _heldout(entry))}
    differences = [after - of_baseline[seed][1] for seed, (_, after) in known.items()]
    gains = [before - after for before, after in map(of_baseline.__getitem__, known)]
    elsewhere = [losses for seed in known if (losses := _elsewhere(newest[seed]))]
    rises = [after - before for before, after in elsewhere]
    return Quality(
        model=of_method[0].model,
        method=of_method[0].method,
        heldout=_means([*known.values()]),
        elsewhere=_means(elsewhere),
        difference=over_seeds(differences) if known and of_method[0].method != BASELINE else None,
        forgotten=over_seeds(rises) if rises else None,
        failed=len(newest) - len(known),
        entries=list(newest.values()),
        differences=differences,
        margin=margin,
        gained=fmean(gains) if gains else None,
    )


def _heldout(entry: Entry) -> tuple[float, float] | None:
    """Held-out loss before and after training, of a trial that ended as it should."""
    return _of_completed(entry, entry.heldout_loss_before, entry.heldout_loss_after)


def _elsewhere(entry: Entry) -> tuple[float, float] | None:
    """Loss elsewhere before and after training, of a trial that ended as it should."""
    return _of_completed(entry, entry.elsewhere_loss_before, entry.elsewhere_loss_after)


def _of_completed(entry: Entry, before: float | None, after: float | None) -> tuple[float, float] | None:
    return None if entry.outcome != "completed" or before is None or after is None else (before, after)


def _means(losses: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    return (fmean(before for before, _ in losses), fmean(after for _, after in losses)) if losses else None
