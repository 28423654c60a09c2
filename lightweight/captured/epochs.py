"""Which rows does each optimizer step of a job take, and in which static shape?"""

from __future__ import annotations

from dataclasses import replace

from torch.utils.data import BatchSampler
from transformers import Trainer

from lightweight.captured import packing, sample
from lightweight.captured.packing import Layout, Shape
from lightweight.captured.parts import Parts
from lightweight.captured.sample import Sample
from lightweight.corpus import Rows
from lightweight.training import ranks
from lightweight.trial import Trial

PACKING_SHARE = 1 / 8
"""Rows that packing must save, of all, where attention has no kernel that knows dialogues: it pays with a mask in every
layer."""


class Epochs:
    """The layouts of every epoch of a job, with one dialogue a row and packed; once it is known which of both is
    trained, `layouts`, epoch by epoch, are this rank's, and `shapes` those that they run in.

    `first_epoch` has for each of its optimizer steps the passes, which are numbers of rows. `packs` is whether packing
    was asked for and is worth what it costs, and `note` what it makes of the rows, None where it was not asked for.
    """

    layouts: list[list[Layout]]
    shapes: list[Shape]

    def __init__(self, trial: Trial, trainer: Trainer, rows: Rows, *, packing_asked: bool, joins: bool, compiled: bool):
        """`joins`: whether dialogues are packed into a single row for each pass, which attention on flash kernels
        takes without a mask. `compiled`: whether layers are compiled, for each shape anew."""
        self.rows, self.joins = rows, joins
        self._trial, self._compiled = trial, compiled
        self._over_step = trainer.model_accepts_loss_kwargs
        order = _drawn(trial, trainer, rows)
        self.first_epoch = order[0]
        self._dialogues, self._widths = _lengths(order, rows, trial.world_size)
        self._alone = [[self._one_a_row(passes) for passes in epoch] for epoch in order]
        self._packed, self.packs = self._alone, False
        self.note: str | None = None
        if packing_asked:
            self._pack()

    def _pack(self) -> None:
        """Pack what is worth packing, and say what it makes."""
        if self.joins:
            most = self._trial.running_method.sequences_per_pass * self.rows.width
            world_size = self._trial.world_size
            packed = [
                [packing.joined(layout, self.rows, most, world_size) for layout in epoch] for epoch in self._alone
            ]
            self._joined = packing.joined_shapes(
                [layout for epoch in packed for layout in epoch], self.rows, world_size, compiled=self._compiled
            )
            before, after = (
                sum(size(layout) for epoch in epochs for layout in epoch)
                for epochs, size in ((self._alone, self._width), (packed, self._joined_tokens))
            )
            self.packs = after < before
            made, of = f"{after:,} tokens", f"{before:,}"
        else:
            packed = [[packing.packed(layout, self.rows) for layout in epoch] for epoch in self._alone]
            before, after = (
                sum(len(layout.rows) for epoch in epochs for layout in epoch) for epochs in (self._alone, packed)
            )
            self.packs = after <= before * (1 - PACKING_SHARE)
            made, of = f"{after} rows", f"{before}"
        self.note = f"packing {'makes' if self.packs else 'would make'} {made} of {of}"
        if self.packs:
            self._packed = packed

    def _width(self, layout: Layout) -> int:
        """Tokens that are computed for `layout` with a dialogue in each row."""
        return len(layout.rows) * self.rows.width

    def _joined_tokens(self, layout: Layout) -> int:
        """And with all in joined rows, by all ranks."""
        return self._joined_shape(self._share(layout, 0)).tokens * self._trial.world_size

    def _joined_shape(self, layout: Layout) -> Shape:
        shape = packing.holding_joined(layout, self.rows, self._joined)
        assert shape is not None, "every step was counted when shapes were chosen"
        return shape

    def _share(self, layout: Layout, rank: int) -> Layout:
        world_size = self._trial.world_size
        return packing.share(layout, rank, world_size) if world_size > 1 else layout

    def lay_out(self, parts: Parts) -> None:
        """Take the layouts and shapes of steps with `parts`."""
        layouts = self._packed if parts.packing else self._alone
        self.layouts = [[self._share(layout, ranks.rank()) for layout in epoch] for epoch in layouts]
        self._is_joined = parts.packing and self.joins
        if self._is_joined:
            self.shapes = self._joined
        else:
            self._by_rows = self._shaped([layout for epoch in self.layouts for layout in epoch], parts)
            self.shapes = list(dict.fromkeys(self._by_rows.values()))

    def shape_of(self, layout: Layout) -> Shape:
        """The shape that `layout`, one of the job's, runs in."""
        return self._joined_shape(layout) if self._is_joined else self._by_rows[len(layout.rows)]

    def ends(self, parts: Parts) -> tuple[int, int]:
        """The least and the most tokens that a pass's rows may end at, of the Trainer's passes and of those of a step
        with `parts`, whose rows are all made as long as the longest; where they are packed, a dialogue's end is what
        its positions say."""
        return min(self._dialogues if parts.packing else self._widths), self.rows.width

    def samples(self) -> list[Sample]:
        """The dialogues that speak for the job: see `sample.samples`."""
        layouts = [layout for epoch in self._packed for layout in epoch]
        return sample.samples(layouts, self.first_epoch[0], self.rows, self._trial.method.sequences_per_pass)

    def laid_out(self, sample: Sample, parts: Parts) -> tuple[Layout, Shape]:
        """This rank's share of `sample` in a step with `parts`, and the job's shape for it, or one of its own."""
        layout = self._one_a_row(sample.passes)
        if parts.packing:
            layout = replace(layout, rows=sample.rows)
        layout = packing.share(layout, ranks.rank(), self._trial.world_size)
        if parts.packing and self.joins:
            shape = packing.holding_joined(layout, self.rows, self.shapes)
            return layout, shape or self._joined_alone(layout)
        shape = packing.holding(layout, self.rows, () if parts.needs_trainers_passes else self.shapes)
        if shape is None:
            (shape,) = self._shaped([layout], parts).values()
        return layout, shape

    def fullest_row(self) -> tuple[Layout, Shape] | None:
        """The row with the most dialogues, or as many of them as fill one, alone in a step whose loss nobody asks for;
        None where every row has one."""
        row = max((row for epoch in self._packed for layout in epoch for row in layout.rows), key=len)
        if len(row) < 2:
            return None
        row = packing.part(row, self.rows)
        layout = Layout([row], dict.fromkeys(row, 1.0), 0)
        return layout, self._joined_alone(layout) if self.joins else packing.exact_shapes([layout], self.rows, 1)[1]

    def _joined_alone(self, layout: Layout) -> Shape:
        """A shape for `layout`, of joined rows, and nothing else."""
        (shape,) = packing.joined_shapes([layout], self.rows, 1, compiled=False)
        return shape

    def _one_a_row(self, passes: list[list[int]]) -> Layout:
        return packing.one_a_row(passes, self.rows, over_step=self._over_step)

    def _shaped(self, layouts: list[Layout], parts: Parts) -> dict[int, Shape]:
        rows_per_pass = self._trial.running_method.sequences_per_pass
        if parts.needs_trainers_passes:
            return packing.exact_shapes(layouts, self.rows, rows_per_pass)
        return packing.shapes(layouts, self.rows, rows_per_pass, most=1 if self._compiled else None)


def _drawn(trial: Trial, trainer: Trainer, rows: Rows) -> list[list[list[list[int]]]]:
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


def _lengths(order: list[list[list[list[int]]]], rows: Rows, world_size: int) -> tuple[set[int], set[int]]:
    """The lengths of all dialogues of a job, and of all passes of the Trainer, on any rank."""
    passes = [numbers for epoch in order for step in epoch for numbers in step]
    each = [[packing.length(rows[number]) for number in numbers] for numbers in passes]
    widths = {
        rows.padded_to or max(of_pass[rank::world_size])
        for of_pass in each
        for rank in range(min(world_size, len(of_pass)))
    }
    return {length for of_pass in each for length in of_pass}, widths
