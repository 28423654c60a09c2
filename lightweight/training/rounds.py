"""When does a round begin and end, and which requests and reports are exchanged then? A round is an epoch of the
Trainer.

The Trainer owns its loop. A callback waits for a request at the beginning of every epoch and reports at its end, so
that training goes on from round to round.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from lightweight.training import ranks
from lightweight.training.meter import DivergedError, Meter

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


def callbacks_around(own: Sequence[TrainerCallback], meter: Meter, rounds: Rounds) -> list[TrainerCallback]:
    """A method's `own` callbacks between those that begin its rounds and end them, and tell `meter`."""
    return [_RoundBegin(meter, rounds), *own, _RoundBoundary(meter, rounds)]


def resume(meter: Meter, checkpoint: Path) -> None:
    """Give `meter` what was measured when `checkpoint` was saved."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    kept: Any = state.stateful_callbacks
    meter.resume(**kept[_RoundBoundary.__name__]["attributes"])


class _RoundBegin(TrainerCallback):
    """Begins a round before any other callback is told of an epoch, so that what they do then is of the round."""

    def __init__(self, meter: Meter, rounds: Rounds) -> None:
        self.meter, self.rounds = meter, rounds

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.rounds.await_request("round")
        self.meter.begin_round()


class _RoundBoundary(TrainerCallback, ExportableState):
    """Ends steps and rounds after a method's own callbacks, so that what these do is of the step."""

    def __init__(self, meter: Meter, rounds: Rounds) -> None:
        self.meter, self.rounds = meter, rounds

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the measurements."""
        return {"args": {}, "attributes": self.meter.state()}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.rounds.training_began()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **told: Any
    ) -> None:
        self.meter.phase = "optimizer"
        self.meter.see_rates([group["lr"] for group in told["optimizer"].param_groups if group["params"]])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.meter.end_step()
        self.meter.phase = "train"
        self.rounds.step_ended()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **told: Any) -> None:
        """Raise DivergedError before a checkpoint counts that no training could go on from."""
        self.meter.check_losses()
        # A gradient may have overflowed in the last step, whose loss had not.
        (any_is_not_finite,) = ranks.any_says(not _is_finite(told["model"]), device=args.device)
        if any_is_not_finite:
            raise DivergedError(state.global_step, "a trained weight is not finite")

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.meter.end_round()
        self.rounds.round_ended()


def _is_finite(network: torch.nn.Module) -> bool:
    """Whether all that is trained of `network`, or this rank's shards of it, are numbers. Waits for the device."""
    weights = [weight.detach() for weight in network.parameters() if weight.requires_grad]
    shards = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
    return all(bool(shard.isfinite().all()) for shard in shards)
