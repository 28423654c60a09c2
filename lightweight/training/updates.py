"""How often, and at which learning rates, did an optimizer change the weights?

A step of the Trainer is one update at the schedule's rates. What code of a method's own makes of that is seen where
torch has an optimizer step, at each class of the optimizer that has a step of its own: one may call the next several
times, or at rates that it has set only for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def learning_rates(trainer: Trainer, optimizer: torch.optim.Optimizer, steps: int) -> list[list[float]]:
    """The learning rates of each of `steps` optimizer steps, one for each group of weights, which begin at those of
    `optimizer`: those of the schedule that the TrainingArguments name, whatever a method makes of it."""
    begin = [{"params": [torch.nn.Parameter(torch.zeros(()))], "lr": group["lr"]} for group in optimizer.param_groups]
    # a schedule that ends at a rate of its own reads where it began in the optimizer's defaults
    stand_in = torch.optim.SGD(begin, lr=optimizer.defaults.get("lr", trainer.args.learning_rate))
    before, trainer.lr_scheduler = trainer.lr_scheduler, None
    scheduler = Trainer.create_scheduler(trainer, num_training_steps=steps, optimizer=stand_in)
    trainer.lr_scheduler = before
    rates = []
    for _ in range(steps):
        rates.append([float(rate) for rate in scheduler.get_last_lr()])
        stand_in.step()
        scheduler.step()
    return rates


class Updates(TrainerCallback):
    """The updates of a training whose schedule has `rates`, [steps, groups]; one of all groups where there is only one.
    To be called after all other callbacks. `was_skipped` says whether a loss scaler left out the step that has just
    been."""

    def __init__(self, rates: Sequence[Sequence[float]], was_skipped: Callable[[], bool]) -> None:
        self._rates, self._was_skipped = rates, was_skipped
        self._taken = 0  # steps of the schedule
        self._scheduled: Sequence[float] | None = None  # of the step that is being taken
        self._step = self._steps = self._updates = 0
        self._is_innermost = False
        self._at_other_rates: set[int] = set()
        self._without_gradients: set[int] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **told: Any
    ) -> None:
        """Look at the optimizer from now on."""
        optimizer = getattr(told["optimizer"], "optimizer", told["optimizer"])  # accelerate's is around it
        self._taken = int(getattr(told["lr_scheduler"], "last_epoch", state.global_step))  # what is resumed has begun
        for of in type(optimizer).__mro__:
            step = vars(of).get("step")
            if step is not None and of is not torch.optim.Optimizer and not getattr(step, "hooked", False):
                hooked: Any = torch.optim.Optimizer.profile_hook_step(step)  # as torch does it for the first class
                hooked.hooked = True
                of.step = hooked  # type: ignore[attr-defined]
        optimizer.register_step_pre_hook(self._begin)
        optimizer.register_step_post_hook(self._end)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **told: Any
    ) -> None:
        """A step of the Trainer begins."""
        self._step = state.global_step
        self._scheduled = self._rates[min(self._taken, len(self._rates) - 1)]
        groups = told["optimizer"].param_groups
        self._compare(groups)
        if all(weight.grad is None for group in groups for weight in group["params"]):
            self._without_gradients.add(self._step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **told: Any
    ) -> None:
        """It ends."""
        self._scheduled = None
        self._steps += 1
        self._taken += not self._was_skipped()

    def told(self) -> list[str]:
        """How they differ from what the Trainer does."""
        told = []
        if self._at_other_rates:
            of_all = f"{len(self._at_other_rates):,} of its {self._steps:,} steps"
            told.append(f"its learning rate was another than its schedule's in {of_all}")
        if self._updates > self._steps:
            told.append(f"its optimizer took {self._updates:,} steps in {self._steps:,} of the Trainer's")
        if 0 < len(self._without_gradients) < self._steps:  # without any, a method may need none
            of_all = f"{len(self._without_gradients):,} of its {self._steps:,} steps"
            told.append(f"no weight had a gradient in {of_all}")
        return told

    def _begin(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._compare(optimizer.param_groups)
        self._is_innermost = True

    def _end(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._compare(optimizer.param_groups)
        self._updates += self._is_innermost
        self._is_innermost = False

    def _compare(self, groups: Sequence[dict[str, Any]]) -> None:
        if self._scheduled is None:
            return
        scheduled = self._scheduled if len(self._scheduled) > 1 else list(self._scheduled) * len(groups)
        if len(scheduled) != len(groups) or not all(map(_is_at, groups, scheduled)):
            self._at_other_rates.add(self._step)


def _is_at(group: dict[str, Any], rate: float) -> bool:
    """Whether a group of weights has the rate; a tensor on a device is not waited for."""
    own = group["lr"]
    return (isinstance(own, torch.Tensor) and own.device.type != "cpu") or math.isclose(own, rate, rel_tol=1e-6)
