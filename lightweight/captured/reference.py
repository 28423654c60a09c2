"""What loss and gradients has the Trainer's own step? Computed by it before anything of the network is replaced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from lightweight.preload import peft  # isort: skip  # noqa: F401  # before Trainer, which imports peft

import torch
from transformers import Trainer

from lightweight.captured.agreement import Gradients
from lightweight.captured.parts import PartError
from lightweight.captured.sample import LEAST_TOKENS, Sample, end_of
from lightweight.captured.temporary import drop_gradients, free_unused, in_fp32, recomputing, trained
from lightweight.internals import accelerate as accelerate_internals
from lightweight.internals import torch as torch_internals
from lightweight.internals import transformers as transformers_internals
from lightweight.training import ranks

SCALES = (2.0**12, 2.0**8, 2.0**4, 1.0)
"""Loss scales to try for fp16, whose smallest number is 6e-8 and largest 65 504."""


class Reference:
    """The Trainer's own steps, computed before anything of the network is replaced or cast."""

    def __init__(self, trainer: Trainer, *, halves: bool) -> None:
        """`halves`: whether gradients may be fp16, and need a scale."""
        self._trainer = trainer
        self._model: Any = trainer.model
        self._scales = SCALES if halves else (1.0,)
        self._loader = trainer.get_train_dataloader()

    def draws(self, passes: Sequence[Sequence[int]]) -> bool:
        """Whether `passes` are the numbers of the rows that the Trainer draws in its first epoch, or the first of them;
        on one rank."""
        if ranks.world_size() > 1:  # which rank draws which rows is for `ranks.Deal`
            return True
        drawn: Any = self._loader.batch_sampler
        return [list(numbers) for numbers, _ in zip(drawn, passes, strict=False)] == [list(own) for own in passes]

    def gradients(self, sample: Sample) -> tuple[Sample, Gradients]:
        """The Trainer's loss and gradients of as many of the sample's dialogues as there is memory for, and those: at
        the least of the end of one, whose layers are computed twice. Raises torch.OutOfMemoryError where it is not
        enough for that."""
        while (gradients := self._where_it_fits(sample)) is None:
            smaller = sample.smaller(self._lengths)
            if smaller is None:
                raise torch.OutOfMemoryError(f"no room for the Trainer's step of {LEAST_TOKENS} tokens")
            sample = smaller
        return sample, gradients

    def least(self, sample: Sample) -> Sample:
        """What `gradients` would take of `sample` in the end."""
        while (smaller := sample.smaller(self._lengths)) is not None:
            sample = smaller
        return sample

    def in_fp32(self, sample: Sample) -> Gradients | None:
        """As `gradients`, of the whole sample and with fp32 in the place of halves, from the weights as they are now.
        None where a rank cannot: there is not enough memory, or the network has to be in half precision."""
        own = None
        with contextlib.suppress(PartError, torch.OutOfMemoryError), in_fp32(self._model):
            with contextlib.suppress(Exception):  # of any model's code
                own = self._gradients(sample, 1.0, autocast=contextlib.nullcontext)
            drop_gradients(self._model)  # before weights are halves again
        (lacks,) = ranks.any_says(own is None, device=self._trainer.args.device)
        return None if own is None or lacks else own.over_ranks(trained(self._model))

    def _where_it_fits(self, sample: Sample) -> Gradients | None:
        """Under the first scale that leaves them finite, or the last; None where a rank has not enough memory."""
        for scale in self._scales:
            own = self._where_there_is_room(sample, scale)
            if own is None and sample.size == 1:
                with self.recomputing():
                    own = self._where_there_is_room(sample, scale)
            (ran_out,) = ranks.any_says(own is None, device=self._trainer.args.device)
            drop_gradients(self._model)
            if own is None or ran_out:
                return None
            gradients = own.over_ranks(trained(self._model))
            if bool(torch.stack([gradient.float().norm() for gradient in gradients.of.values()]).isfinite().all()):
                break
        return gradients

    def recomputing(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the Trainer computes every layer again in the backward pass, as it does by its own argument: what
        takes the least memory. Dropout must be off."""
        return recomputing(transformers_internals.recomputable_layers(self._model))

    def _where_there_is_room(self, sample: Sample, scale: float) -> Gradients | None:
        """None, and nothing left of the attempt, where there is not: an error that is being handled would hold all that
        its frames have."""
        with contextlib.suppress(torch.OutOfMemoryError):
            return self._gradients(sample, scale)
        drop_gradients(self._model)
        free_unused(self._trainer.args.device)
        return None

    def _gradients(self, sample: Sample, scale: float, autocast: Callable[[], Any] | None = None) -> Gradients:
        trainer = self._trainer
        shares = [numbers[ranks.rank() :: ranks.world_size()] for numbers in sample.passes]
        batches, items = trainer.get_batch_samples(
            iter([self._batch(share, sample) for share in shares]), len(shares), trainer.args.device
        )
        trainer.current_gradient_accumulation_steps = len(batches)
        scaler = torch.amp.GradScaler(trainer.args.device.type, init_scale=scale, enabled=scale != 1)
        loss = torch.zeros((), device=trainer.args.device)
        with (
            torch_internals.no_hooks_left(),
            accelerate_internals.losses_scaled_by(trainer, scaler),
            transformers_internals.losses_computed_in(trainer, autocast or trainer.accelerator.autocast),
        ):
            for batch in batches:
                # of the Trainer itself: what the suite adds to it counts the loss as one of the job's
                loss += Trainer.training_step(trainer, self._model, batch, items).float()
        of = {weight: weight.grad for weight in trained(self._model) if weight.grad is not None}
        return Gradients(loss, of, scale)

    def _batch(self, numbers: Sequence[int], sample: Sample) -> dict[str, torch.Tensor]:
        rows: Any = self._trainer.train_dataset
        collate: Any = self._loader.collate_fn
        taken = [rows[number] for number in numbers or [len(rows) - 1]]
        if sample.tokens is None:
            whole: dict[str, torch.Tensor] = collate(taken)
            return whole
        # padded as if they were whole
        batch: dict[str, torch.Tensor] = collate([end_of(row, sample.tokens) for row in taken])
        cut = {name: value[:, : sample.tokens] for name, value in batch.items() if isinstance(value, torch.Tensor)}
        return batch | cut

    @property
    def _lengths(self) -> list[int]:
        rows: Any = self._trainer.train_dataset
        return [len(row["input_ids"]) for row in rows]
