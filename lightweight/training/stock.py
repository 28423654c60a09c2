"""How is HF's `Trainer` made for a trial? What is timed is the Trainer people use, not a rewrite of it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lightweight.preload import peft  # isort: skip  # before Trainer, which imports peft

import numpy as np
import torch
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LabelSmoother

from lightweight.corpus import IGNORED, Row, Rows
from lightweight.importable import import_path
from lightweight.internals.transformers import TrainerHooks
from lightweight.methods import Method, MethodError
from lightweight.models import reason
from lightweight.training import own_optimizer, ranks
from lightweight.training.meter import Meter
from lightweight.training.own_loss import OwnLoss
from lightweight.training.rounds import Rounds, callbacks_around, resume
from lightweight.training.seen import Seen
from lightweight.training.updates import Updates, learning_rates
from lightweight.training_arguments import OF_TRAINING, check_schedule
from lightweight.trial import Trial

TOKENS = "tokens"
"""The key of a batch under which it carries how many tokens it has, real ones and all of them, as two integers: asking
a tensor would wait for the device."""


def make_trainer(
    trial: Trial,
    model: torch.nn.Module,
    rows: Rows,
    meter: Meter,
    rounds: Rounds,
    folder: Path,
    **overrides: Any,
) -> Trainer:
    """The Trainer of a trial over the training rows, on this process's rank of it. `overrides` are TrainingArguments
    that go before the suite's own: what is logged and saved on the way, nothing of what is trained. Raises RanksError
    for a model whose loss several ranks would weigh otherwise than one, and MethodError for what TrainingArguments
    refuse."""
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
    if trial.world_size > 1:
        arguments |= ranks.SHARDED if trial.is_sharded else ranks.REPLICATED
    # As the method has them: what its device cannot do, accelerate leaves out, and a forecast is of another device.
    own = dict(trial.method.on_rank(trial.world_size).training_arguments)
    if trial.device_index is None:
        own.pop("tf32", None)  # which TrainingArguments refuse on a CPU, also for a forecast
    try:
        training_arguments = TrainingArguments(**own | arguments | overrides)
        Trainer.get_optimizer_cls_and_kwargs(training_arguments, cast("Any", model))  # whose package may be missing
    except (ImportError, TypeError, ValueError) as error:
        raise MethodError(f"method {trial.method.name}: TrainingArguments refuse it: {reason(error)}") from error
    check_schedule(trial.method, training_arguments, trial.steps)
    trainer = _made(trial, model, training_arguments, rows, meter, rounds)
    if trial.world_size > 1 and not trainer.model_accepts_loss_kwargs:
        raise ranks.RanksError(
            f"model {trial.model.name}: its loss is the mean over the tokens of a rank, not of a step, so that of "
            "several ranks would differ: train it on one"
        )
    return trainer


def _made(
    trial: Trial,
    model: torch.nn.Module,
    arguments: TrainingArguments,
    rows: Rows,
    meter: Meter,
    rounds: Rounds,
) -> MeasuredTrainer:
    """The Trainer, or the method's own kind of it, with what else of the method is its author's code. What measures
    comes before what its author overrides."""
    method = trial.method
    kind: type[MeasuredTrainer] = MeasuredTrainer if trial.world_size == 1 else _RankTrainer
    if method.trainer is not None:
        kind = cast("type[MeasuredTrainer]", type(method.trainer.__name__, (kind, method.trainer), {}))
    collate = Collate(rows.pad_token_id, rows.padded_to)
    own_collate = collate if method.data_collator is None else method.data_collator(collate)
    if not callable(own_collate):
        where = import_path(method.data_collator)
        raise MethodError(
            f"method {method.name}: its data_collator {where} returns a {type(own_collate).__name__}: return a collator"
        )
    callbacks = callbacks_around([make() for make in method.callbacks], meter, rounds)
    if method.moves_ranks and not (method.callbacks or method.trainer):  # which may do so themselves
        callbacks.append(_MovesRanks())
    options: dict[str, Any] = {} if method.compute_loss is None else {"compute_loss_func": OwnLoss(method)}
    try:
        trainer = kind(
            model=model,
            args=arguments,
            data_collator=own_collate,
            train_dataset=list(rows),
            callbacks=callbacks,
            meter=meter,
            method=method,
            collate=collate,
            **options,
        )
    except TypeError as error:
        if method.trainer is None:
            raise
        where = import_path(method.trainer)
        raise MethodError(f"method {method.name}: its trainer {where} cannot be made ({reason(error)})") from error
    optimizer: torch.optim.Optimizer = torch.optim.SGD([torch.zeros(1)], lr=arguments.learning_rate)
    if method.optimizer is not None or method.trainer is not None:
        optimizer = own_optimizer.check(trainer, method)
    if method.captured_step is None and method.own_code:
        trainer.seen = Seen(model, rows, is_compiled=arguments.torch_compile)
        rates = learning_rates(trainer, optimizer, trial.with_rows(len(rows)).steps)
        trainer.updates = Updates(rates, lambda: trainer.accelerator.optimizer_step_was_skipped)
        trainer.add_callback(trainer.updates)
    return trainer


def _planned(trial: Trial, rows: Rows) -> list[list[int]]:
    """The numbers of the rows that each optimizer step of a trial takes, whatever the method."""
    sampler, size = ranks.drawn(rows, trial.seed), trial.method.sequences_per_step
    steps: list[list[int]] = []
    for epoch in range(trial.rounds):
        sampler.set_epoch(epoch)
        numbers = list(sampler)
        steps += [numbers[start : start + size] for start in range(0, len(numbers), size)]
    return steps[: trial.steps]


@dataclass(frozen=True)
class Collate:
    """Makes a batch of rows, padded as `Rows` says. The batch knows its tokens: a row without an answer, which only
    fills a rank's pass, has no real ones."""

    pad_token_id: int
    padded_to: int | None

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """`input_ids`, `attention_mask`, `labels`: [rows, time]."""
        shape = len(rows), self.padded_to or max(len(row["input_ids"]) for row in rows)
        ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        mask, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED, dtype=torch.int64)
        real = 0
        for line, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[line, :length] = torch.from_numpy(row["input_ids"])
            mask[line, :length] = 1
            labels[line, :length] = torch.from_numpy(row["labels"])
            real += length if (row["labels"] != IGNORED).any() else 0
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, TOKENS: (real, ids.numel())}


class _NextTokenSmoother(LabelSmoother):
    """Label smoothing of the next token, as every network here predicts it. The Trainer tells by the network's class
    whether labels are to be shifted, and takes FSDP2's class, or a prompt's, for a network whose are not."""

    def __call__(
        self, model_output: Any, labels: torch.Tensor, shift_labels: bool = True, num_items_in_batch: Any = None
    ) -> Any:
        """`labels`: [rows, time]; logits are cut to them where virtual tokens come before the row."""
        logits = model_output["logits"][:, -labels.shape[1] :]
        return super().__call__({"logits": logits}, labels, True, num_items_in_batch)  # type: ignore[no-untyped-call]


class MeasuredTrainer(TrainerHooks, Trainer):
    """The Trainer, telling the meter where it is and which losses it saw. `collate` is the suite's own collator, and
    `seen` what reaches the network, and `updates` what is made of it, where code of the method could change that.
    `said` are the TrainingArguments before such code has had them."""

    seen: Seen | None = None
    updates: Updates | None = None

    def __init__(self, *, meter: Meter, method: Method, collate: Collate, **arguments: Any) -> None:
        self.said = _of_training(arguments["args"])
        super().__init__(**arguments)
        self._meter, self.method, self.collate = meter, method, collate
        if self.label_smoother is not None:
            self.label_smoother = _NextTokenSmoother(epsilon=self.args.label_smoothing_factor)

    def create_optimizer(self, *arguments: Any) -> torch.optim.Optimizer:
        """The method's own, where it brings one along."""
        if self.method.optimizer is None or self.optimizer is not None:
            made: torch.optim.Optimizer = super().create_optimizer(*arguments)
            return made
        network: Any = arguments[0] if arguments and arguments[0] is not None else self.model
        own = own_optimizer.make(self.method, network, self.args)
        if isinstance(own, torch.optim.Optimizer):
            self.optimizer = own
            return own
        self.optimizer_cls_and_kwargs = own
        return Trainer.create_optimizer(self, *arguments)

    @property
    def has_stepped(self) -> bool:
        """Whether anything has been trained."""
        return self._meter.steps > 0

    def evaluating(self) -> contextlib.AbstractContextManager[Any]:
        """What held-out losses are computed in: the autocast that the TrainingArguments ask for."""
        stack = contextlib.ExitStack()
        stack.enter_context(self._autocast())
        if self.seen is not None:
            stack.enter_context(self.seen.looking_away())
        return stack

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return Trainer.compute_loss_context_manager(self)

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        """The loss of a pass. Raises MethodError where no trained weight takes part in it."""
        self._meter.phase = "forward"
        loss = super().compute_loss(*arguments, **options)
        of_pass = loss[0] if isinstance(loss, tuple) else loss
        if torch.is_grad_enabled() and not of_pass.requires_grad:
            network: Any = self.accelerator.unwrap_model(self.model)
            network = network.get_base_model() if isinstance(network, peft.PeftModel) else network
            raise MethodError(
                f"method {self.method.name}: no weight that it trains takes part in the loss of "
                f"{type(network).__name__}: give its adapter other target_modules"
            )
        self._meter.phase = "backward"
        return loss

    def run_epoch(self, *arguments: Any, **options: Any) -> None:
        """Nothing, after the last step: the Trainer, resumed there in the middle of an epoch, would take another."""
        if self.state.global_step < self.state.max_steps:
            super().run_epoch(*arguments, **options)
        if self.seen is not None:
            self.seen.read()

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *arguments: Any, **options: Any
    ) -> torch.Tensor:
        """Forward and backward of a pass. Raises MethodError for a batch of the method's own that has no labels."""
        real, padded = inputs.pop(TOKENS, (0, 0))  # a forecast's batches have none
        if self.seen is not None:
            self.seen.step = self._meter.steps
            labels = inputs.get("labels")
            if isinstance(labels, torch.Tensor):
                self._meter.add_labels((labels[..., 1:] != IGNORED).sum())
        if "labels" not in inputs and self.method.data_collator is not None and self.method.trainer is None:
            raise MethodError(
                f"method {self.method.name}: its data_collator {import_path(self.method.data_collator)} makes a batch "
                "without labels: keep those of the suite's collator"
            )
        with contextlib.nullcontext() if self.seen is None else self.seen.in_pass(inputs):
            loss = super().training_step(model, inputs, *arguments, **options)
        if self.seen is not None:
            real, padded = self.seen.tokens
        of_all, *tokens = self._over_ranks(loss, real, padded)
        self._meter.add_loss(of_all)
        self._meter.add_tokens(*tokens)
        return loss

    def _over_ranks(self, loss: torch.Tensor, real: int, padded: int) -> Any:
        """Loss, real tokens and all tokens of a pass."""
        return loss, real, padded


class _RankTrainer(MeasuredTrainer):
    """The Trainer on one of several ranks, whose batches and losses are together those of one."""

    def __init__(self, *, train_dataset: list[Row], **arguments: Any) -> None:
        ids = train_dataset[0]["input_ids"]
        nothing: Row = {"input_ids": ids, "labels": np.full_like(ids, IGNORED)}
        super().__init__(train_dataset=[*train_dataset, nothing], **arguments)
        self._adds_up = False
        self._deal: ranks.Deal | None = None

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            ranks.gather_as_stored(self)
        # its new name is not known to every version that is supported
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *arguments: Any, **options: Any
    ) -> torch.Tensor:
        if not self._adds_up:
            ranks.add_up_gradients(model)
            self._adds_up = True
        return super().training_step(model, inputs, *arguments, **options)

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        """This rank's share of the loss. The Trainer's is as many times that as there are ranks, for an average of
        gradients; fp16 would overflow under a smaller loss scale then, and a step be skipped that one rank takes."""
        return super().compute_loss(*arguments, **options) / self.args.world_size

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.enter_context(super().compute_loss_context_manager())
        if self.args.fsdp:  # which else leaves casting to FSDP2; see `gather_as_stored`
            stack.enter_context(self.accelerator.autocast())
        return stack

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return self.compute_loss_context_manager()

    def run_epoch(self, model: torch.nn.Module, epoch: int, *arguments: Any, **options: Any) -> None:
        """With the order of this epoch also where batches are skipped to go on in the middle of one: what accelerate
        skips them with does not pass the epoch's number on to a sampler that it has wrapped for several ranks."""
        if self._deal is not None:  # a trace deals no rows
            self._deal.set_epoch(epoch)
        super().run_epoch(model, epoch, *arguments, **options)

    def train_sampler(self, train_dataset: Any = None) -> ranks.Deal:
        rows: Any = self.train_dataset
        self._deal = deal = ranks.Deal(
            ranks.draws(self, rows[:-1]),
            step=self.method.sequences_per_step,
            batch=self.args.per_device_train_batch_size,
            world_size=self.args.world_size,
            nothing=len(rows) - 1,
        )
        return deal

    def _over_ranks(self, loss: torch.Tensor, real: int, padded: int) -> Any:
        """Their sums over all ranks, in one message and without waiting for the device."""
        counts = [torch.full_like(loss, count, dtype=torch.float64) for count in (real, padded)]
        return self.accelerator.reduce(torch.stack([loss.double(), *counts]), "sum")

    def write_weights(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict is not None and not isinstance(self.model, peft.PeftModel):
            state_dict = ranks.without_ties(self.model, state_dict)
        super().write_weights(output_dir, state_dict)


def tell_what_was_seen(trial: Trial, trainer: Trainer, rows: Rows, meter: Meter) -> None:
    """Add to the facts of `meter` how what the network was trained on, and how, differs from what every other method's
    is."""
    measured, told = cast("MeasuredTrainer", trainer), []
    now = _of_training(trainer.args)
    for name, value in measured.said.items():
        if trial.method.own_code and now[name] != value:
            told.append(f"its code changed {name} from {value} to {now[name]}")
    if measured.seen is not None and measured.updates is not None:
        measured.seen.step = meter.steps
        told += [*measured.updates.told(), *measured.seen.told(_planned(trial, rows))]
    else:
        told += _other_order(trial)
    meter.facts["data_note"] = "; ".join(told) or None


def _of_training(arguments: TrainingArguments) -> dict[str, str]:
    """What TrainingArguments say of what is trained, as text."""
    return {name: str(getattr(arguments, name)) for name in OF_TRAINING if hasattr(arguments, name)}


def _other_order(trial: Trial) -> list[str]:
    """What of the TrainingArguments has a method without code of its own draw the rows in another order."""
    usual = {"data_seed": (None, trial.seed), "train_sampling_strategy": ("random",)}
    said = {name: trial.method.training_arguments.get(name, values[0]) for name, values in usual.items()}
    return [f"the rows came in another order: {name}={said[name]}" for name in usual if said[name] not in usual[name]]


def resume_meter(meter: Meter, trainer: Trainer, checkpoint: Path) -> None:
    """Give `meter`, that of `trainer`, what was measured when `checkpoint` was saved."""
    resume(meter, checkpoint)
    if (seen := cast("MeasuredTrainer", trainer).seen) is not None:
        seen.go_on_from(meter.steps)


class _MovesRanks(TrainerCallback):
    """Has AdaLoRA give its ranks to the layers, which peft asks of whoever trains it, and the Trainer does not do."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **told: Any
    ) -> None:
        told["model"].base_model.update_and_allocate(state.global_step)
