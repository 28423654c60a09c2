"""Which rows does each optimizer step of a job take, and in which static shape?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.utils.data import BatchSampler
from transformers import Trainer

from lightweight.captured import agreement, packing
from lightweight.captured.agreement import Parts, Sample
from lightweight.captured.packing import Layout, Shape
from lightweight.training import ranks
from lightweight.training.stock import Row
from lightweight.trial import Trial

PACKING_SHARE = 1 / 8
"""Rows that packing must save, of all: it pays with a mask in every attention, which flash kernels do not take."""


class Epochs:
    """The layouts of every epoch of a job, with one dialogue a row and packed; once it is known which of both is
    trained, `layouts`, epoch by epoch, are this rank's, and `shapes` those that they run in, by their number of rows.

    `first_epoch` has for each of its optimizer steps the passes, which are numbers of rows. `packs` is whether packing
    was asked for and is worth its mask, and `note` what it makes of the rows, None where it was not asked for.
    """

    layouts: list[list[Layout]]
    shapes: dict[int, Shape]

    def __init__(self, trial: Trial, trainer: Trainer, rows: Sequence[Row], *, packing_asked: bool, most: int | None):
        """`most`: shapes in all, None for any number."""
        self.rows = rows
        self._trial, self._most = trial, most
        self._over_step = trainer.model_accepts_loss_kwargs
        order = _drawn(trial, trainer, rows)
        self.first_epoch = order[0]
        self._alone = [[self._one_a_row(passes) for passes in epoch] for epoch in order]
        self._packed, self.packs = self._alone, False
        self.note: str | None = None
        if packing_asked:
            packed = [[packing.packed(layout, rows) for layout in epoch] for epoch in self._alone]
            before, after = (
                sum(len(layout.rows) for epoch in epochs for layout in epoch) for epochs in (self._alone, packed)
            )
            self.packs = after <= before * (1 - PACKING_SHARE)
            self.note = f"packing {'makes' if self.packs else 'would make'} {after} rows of {before}"
            if self.packs:
                self._packed = packed

    def lay_out(self, parts: Parts) -> None:
        """Take the layouts and shapes of steps with `parts`."""
        world_size = self._trial.world_size
        self.layouts = self._packed if parts.packing else self._alone
        if world_size > 1:
            self.layouts = [
                [packing.share(layout, ranks.rank(), world_size) for layout in epoch] for epoch in self.layouts
            ]
        self.shapes = self._shaped([layout for epoch in self.layouts for layout in epoch], parts)

    def shape_of(self, layout: Layout) -> Shape:
        """The shape that `layout`, one of the job's, runs in."""
        return self.shapes[len(layout.rows)]

    def samples(self) -> list[Sample]:
        """The dialogues that speak for the job: see `agreement.samples`."""
        layouts = [layout for epoch in self._packed for layout in epoch]
        return agreement.samples(layouts, self.first_epoch[0], self.rows, self._trial.method.sequences_per_pass)

    def laid_out(self, sample: Sample, parts: Parts) -> tuple[Layout, Shape]:
        """This rank's share of `sample` in a step with `parts`, and the job's shape for it, or one of its own."""
        layout = self._one_a_row(sample.passes)
        if parts.packing:
            layout = replace(layout, rows=sample.rows)
        layout = packing.share(layout, ranks.rank(), self._trial.world_size)
        shape = packing.holding(layout, self.rows, () if parts.needs_trainers_passes else self.shapes.values())
        if shape is None:
            (shape,) = self._shaped([layout], parts).values()
        return layout, shape

    def fullest_row(self) -> tuple[Layout, Shape]:
        """The row with the most dialogues, alone in a step, whose loss nobody asks for."""
        row = max((row for epoch in self._packed for layout in epoch for row in layout.rows), key=len)
        layout = Layout([row], dict.fromkeys(row, 1.0), 0)
        return layout, packing.exact_shapes([layout], self.rows, 1)[1]

    def _one_a_row(self, passes: list[list[int]]) -> Layout:
        return packing.one_a_row(passes, self.rows, over_step=self._over_step)

    def _shaped(self, layouts: list[Layout], parts: Parts) -> dict[int, Shape]:
        rows_per_pass = self._trial.running_method.sequences_per_pass
        if parts.needs_trainers_passes:
            return packing.exact_shapes(layouts, self.rows, rows_per_pass)
        return packing.shapes(layouts, self.rows, rows_per_pass, most=self._most)


def _drawn(trial: Trial, trainer: Trainer, rows: Sequence[Row]) -> list[list[list[list[int]]]]:
    """epoch -> optimizer step -> pass -> numbers of its rows, as the Trainer would draw them on one rank."""
    sampler, size = ranks.draws(trainer, rows), trial.method.sequences_per_pass
    accumulation = trial.method.sequences_per_step // size
    epochs, left = [], trial.steps
    for epoch in range(trial.rounds):
        sampler.set_epoch(epoch)  # as the Trainer does: the order follows from the seed and the epoch's number
        passes = [list(numbers) for numbers in BatchSampler(sampler, size, drop_last=False)]
        steps = [passes[start : start + accumulation] for start in range(0, len(passes), accumulation)]
        epochs.append(steps[:left])
        left -= len(epochs[-1])
    return epochs
