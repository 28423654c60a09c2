"""Rounds with HF `Trainer`: what is timed is the Trainer people use, not a rewrite of it.

The Trainer owns its loop. A callback waits for a request at the beginning of every epoch and reports at its end, so
that an epoch is a round and training goes on from round to round.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from lightweight.corpus import IGNORED
from lightweight.meter import Meter
from lightweight.trial import Trial

Row = dict[str, list[int]]
"""`input_ids`, `attention_mask` and `labels`, each [time]."""


Request = Literal["round", "finish"]


class Rounds(Protocol):
    """The owner of the trial, as seen from inside: it asks, one request after the other, and is told."""

    def training_began(self) -> None:
        """Everything before the first step is done."""

    def await_request(self, request: Request) -> None:
        """Return when `request` has been asked for."""

    def step_ended(self) -> None:
        """An optimizer step has ended; the device may still be at it."""

    def round_ended(self) -> None:
        """A round has ended and the device is idle."""


def make_trainer(
    trial: Trial,
    model: torch.nn.Module,
    rows: Sequence[Row],
    meter: Meter,
    rounds: Rounds,
    folder: Path,
    **overrides: Any,
) -> Trainer:
    """The Trainer of a stock method over the training rows. `overrides` are TrainingArguments that go before the
    method's: what is logged and saved on the way, nothing of what is trained."""
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": trial.epochs,
        "max_steps": -1 if trial.max_steps is None else trial.max_steps,
        "seed": trial.seed,
        "use_cpu": trial.device_index is None,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return _MeasuredTrainer(
        model=model,
        args=TrainingArguments(**arguments | dict(trial.method.training_arguments) | overrides),
        train_dataset=list(rows),
        callbacks=[_RoundBoundary(meter, rounds)],
        meter=meter,
    )


def heldout_loss(trainer: Trainer, rows: Sequence[Row]) -> float:
    """Mean cross-entropy (nats a token) over the answers of `rows`, under the trainer's own autocast.

    Weighted by tokens, unlike `Trainer.evaluate`, which averages batches and so depends on the batch size.
    """
    model = trainer.model
    assert model is not None
    model.eval()
    batch_size = trainer.args.per_device_train_batch_size
    total, tokens = 0.0, 0
    with torch.no_grad(), trainer.compute_loss_context_manager():
        for start in range(0, len(rows), batch_size):
            batch = {
                name: torch.tensor([row[name] for row in rows[start : start + batch_size]], device=trainer.args.device)
                for name in rows[0]
            }
            targets = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += float(model(**batch, use_cache=False).loss) * targets
            tokens += targets
    return total / tokens


class _MeasuredTrainer(Trainer):
    """The Trainer, telling the meter where it is and which losses it saw."""

    def __init__(self, *, meter: Meter, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._meter = meter

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        self._meter.phase = "forward"
        loss = super().compute_loss(*arguments, **options)
        self._meter.phase = "backward"
        return loss

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = super().training_step(*arguments, **options)
        self._meter.add_loss(loss)
        return loss


def resume_meter(meter: Meter, checkpoint: Path) -> None:
    """Give `meter` what was measured when `checkpoint` was saved."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    callbacks: Any = state.stateful_callbacks
    meter.resume(**callbacks[_RoundBoundary.__name__]["attributes"])


class _RoundBoundary(TrainerCallback, ExportableState):
    def __init__(self, meter: Meter, rounds: Rounds) -> None:
        self.meter, self.rounds = meter, rounds

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the measurements."""
        return {"args": {}, "attributes": self.meter.state()}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.rounds.training_began()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.rounds.await_request("round")
        self.meter.begin_round()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.meter.phase = "optimizer"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.meter.end_step()
        self.meter.phase = "train"
        self.rounds.step_ended()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.meter.end_round()
        self.rounds.round_ended()
