"""What do the seeds of a cell say together? One line a cell that `--seeds` has repeated: means, intervals, pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from lightweight.record import BASELINE, SAME_BASELINE, SAME_CELL, Entry
from lightweight.report.speed import faster
from lightweight.verdict import seeds
from lightweight.verdict.seeds import Estimate

SAME_BUT_SEED = SAME_CELL.also("planned_steps", "elsewhere_digest", "task_digest")
"""What the seeds of a cell have in common: everything but the seed."""

PAIRED = SAME_BASELINE.also(
    "seed", "planned_steps", "elsewhere_digest", "max_length", "loss_on", "long", "padding", "tokens_per_step"
)
"""What a trial and the baseline that it makes a pair with have in common: the seed too, so the same batches."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """The trials of a cell, one a seed, in the order of their seeds, and each one's baseline of the same seed, None
    where there is none. Numbers are of those that completed."""

    entries: Sequence[Entry]
    baselines: Sequence[Entry | None]

    @property
    def first(self) -> Entry:
        """The trial that says what is the same for all: one that completed, where any did."""
        return next(iter(self.completed), self.entries[0])

    @property
    def completed(self) -> list[Entry]:
        """The trials that ended as they should."""
        return [entry for entry in self.entries if entry.outcome == "completed"]

    @property
    def is_baseline(self) -> bool:
        """Whether these are what others are held against."""
        return self.entries[0].method == BASELINE

    def mean(self, of: Callable[[Entry], float | None]) -> Estimate | None:
        """The mean over seeds of what `of` says of a trial; None where it says nothing of one that completed."""
        values = [value for entry in self.completed if (value := of(entry)) is not None]
        return seeds.over_seeds(values) if values and len(values) == len(self.completed) else None

    def geometric_mean(self, of: Callable[[Entry], float | None]) -> Estimate | None:
        """The same of a time or a rate, which is above 0: its geometric mean."""
        values = [value for entry in self.completed if (value := of(entry)) is not None and value > 0]
        return seeds.geometric_over_seeds(values) if values and len(values) == len(self.completed) else None

    @property
    def over_baseline(self) -> Estimate | None:
        """Held-out loss after training less that of the baseline of the same seed, in nats a token; None for the
        baseline, and where a trial lacks its pair."""
        pairs = [
            (entry.heldout_loss_after, baseline.heldout_loss_after)
            for entry, baseline in self._pairs
            if baseline.outcome == "completed"
        ]
        differences = [loss - of for loss, of in pairs if loss is not None and of is not None]
        if self.is_baseline or not differences or len(differences) < len(self.completed):
            return None
        return seeds.over_seeds(differences)

    @property
    def answered(self) -> Estimate | None:
        """The share of the task's questions that was answered exactly right after training, with Wilson's interval; of
        several seeds their mean, with Student's where it is wider: seeds that agree say nothing of other questions."""
        shares = [
            (entry.task_matches_after, entry.task_questions)
            for entry in self.completed
            if entry.task_matches_after is not None and entry.task_questions
        ]
        if not shares or len(shares) < len(self.completed):
            return None
        over_questions = seeds.share(round(fmean(count for count, _ in shares)), shares[0][1])
        if len(shares) == 1:
            return over_questions
        mean, low, high = dataclasses.astuple(seeds.over_seeds([count / of for count, of in shares]))
        return Estimate(mean, max(0, min(low, over_questions.low)), min(1, max(high, over_questions.high)))

    @property
    def speedup(self) -> Estimate | None:
        """How many times as fast as the baseline of the same seed, per token: from each seed's own pairs of rounds, or
        from steady steps of both; None where a seed has no ratio."""
        gains = [gain.ratio for entry, baseline in self._pairs if (gain := faster(entry, baseline))]
        if self.is_baseline or not gains or len(gains) < len(self.completed):
            return None
        return seeds.geometric_over_seeds(gains)

    @property
    def _pairs(self) -> list[tuple[Entry, Entry]]:
        both = zip(self.entries, self.baselines, strict=True)
        return [(entry, other) for entry, other in both if other is not None and entry.outcome == "completed"]


def studies(entries: Sequence[Entry], least: int = 2) -> list[Study]:
    """The cells of `entries` that at least so many seeds have trained; of a trial that is there twice the last. Rungs
    and peers, whose tables compare steps, are none."""
    found = []
    cells = [entry for entry in entries if entry.shown_as is None]
    baselines = {PAIRED.of(entry): entry for entry in cells if entry.method == BASELINE}
    for group in SAME_BUT_SEED.groups(cells):
        of_seed = {entry.seed: entry for entry in group}
        if len(of_seed) >= least:
            each = [of_seed[seed] for seed in sorted(of_seed, key=lambda seed: -1 if seed is None else seed)]
            found.append(Study(entries=each, baselines=[baselines.get(PAIRED.of(entry)) for entry in each]))
    return found
