"""Which optimizer steps are traced, and how does HF Trainer run them on fake tensors?

The peak comes once the optimizer has its state and, where a step has several forward passes, once there are gradients
to add to. So each kind of batch is traced after a first optimizer step; or, where passes accumulate, in one step that
begins with state and gradients, which is quicker.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from lightweight.corpus import Row, Rows
from lightweight.forecast.cuda_rules import BatchKind
from lightweight.forecast.recorder import Recorder
from lightweight.internals import accelerate as accelerate_internals
from lightweight.internals import torch as torch_internals
from lightweight.internals import transformers as transformers_internals
from lightweight.training import stock
from lightweight.training.rounds import Request
from lightweight.trial import Trial

UNSCHEDULED: dict[str, Any] = {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": None, "warmup_steps": 0}
"""A schedule holds no memory, and may be impossible for the few steps that are traced."""


class AllTracedError(Exception):
    """Every step there is to trace has been traced."""


def train(network: Any, trial: Trial, paddings: tuple[BatchKind, ...], recorder: Recorder) -> None:
    """Let the Trainer train `network` on batches of the kinds in `paddings`. Raises AllTracedError when done."""
    method = trial.method.on_rank(trial.world_size)
    arguments = method.training_arguments
    accumulates = arguments.get("gradient_accumulation_steps", 1) > 1
    # The kinds of batches that the forward passes of each step see.
    if accumulates and trial.world_size == 1:
        steps = [list(paddings)]
    elif accumulates:  # a step begins without gradients; the first pass makes them, the last one reduces them
        steps = [[paddings[-1], *paddings]]
    else:
        steps = [[kind] for kind in (paddings[0], *paddings)]
    trial = replace(trial, max_steps=len(steps), device_index=None)
    owner = _TracedRounds(len(steps), recorder, begin_in_the_middle=accumulates)
    overrides = {
        "gradient_accumulation_steps": len(steps[0]),
        "logging_nan_inf_filter": False,  # it reads the loss, and a fake one has no value
        **UNSCHEDULED,
    }
    nothing: Row = {"input_ids": np.zeros(1, np.int32), "labels": np.zeros(1, np.int32)}
    rows = Rows([nothing], pad_token_id=0)  # what the passes are fed is made below
    folder = Path(tempfile.gettempdir())  # which is there, as the Trainer will have it, and gets nothing
    trainer: Any = stock.make_trainer(trial, network, rows, recorder.meter, owner, folder, **overrides)
    owner.trainer = trainer
    if method.moves_ranks:
        adalora = network.base_model
        # what is weighed is kept; to which layers it then gives ranks is asked of numbers
        adalora.update_and_allocate = lambda _: adalora.rankallocator.update_ipt(adalora.model)
    if arguments.get("fp16"):
        accelerate_internals.autocast_on_cpu(trainer, torch_internals.FindingAllFinite("cpu"))
    kinds = iter([kind for step in steps for kind in step])
    of_trainer = trainer.training_step

    def training_step(*given: Any, **options: Any) -> Any:  # a method's own may compute a batch several times over
        recorder.rules.padding = next(kinds)
        with recorder.one_pass():
            return of_trainer(*given, **options)

    trainer.training_step = training_step
    batch = _batch(trainer, method.sequences_per_pass, trial.max_length)
    transformers_internals.feed(trainer, [dict(batch) for step in steps for _ in step])
    with _whole_gradients_marked_by(recorder) if trial.world_size > 1 else nullcontext():
        trainer.train()


def _batch(trainer: Any, rows: int, width: int) -> dict[str, Tensor]:
    """What the trainer's collator makes of so many rows, each full of an answer."""
    tokens = np.ones(width, np.int32)
    row: Row = {"input_ids": tokens, "labels": tokens}
    with torch_internals.with_numbers():
        made = trainer.data_collator([row] * rows)
    return {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in made.items() if name != stock.TOKENS}


@contextmanager
def _whole_gradients_marked_by(recorder: Recorder) -> Iterator[None]:
    """Have the gradients of every parameter marked that a module computes with: under FSDP2 the network's own are
    shards, and the whole ones are made in the first forward pass."""
    known: set[int] = set()

    def see(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in known:
                known.add(id(parameter))
                parameter.register_post_accumulate_grad_hook(lambda grown: recorder.mark(grown.grad, "gradients"))

    hook = register_module_forward_hook(see)
    try:
        yield
    finally:
        hook.remove()


class _TracedRounds:
    """The owner of the traced training, which ends it after the last step."""

    def __init__(self, steps: int, recorder: Recorder, begin_in_the_middle: bool) -> None:
        self._steps, self._recorder, self._begin_in_the_middle = steps, recorder, begin_in_the_middle
        self.trainer: Any = None

    def training_began(self) -> None:
        for parameter in self.trainer.model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda grown: self._recorder.mark(grown.grad, "gradients"))
        if self._begin_in_the_middle:
            optimizer = self.trainer.optimizer.optimizer
            self._recorder.meter.phase = "optimizer"
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
                    self._recorder.mark(parameter.grad, "gradients")
            optimizer.step()
            self._mark_state()
            if self.trainer.is_fsdp_enabled:  # what passes add to are whole gradients, which no step begins with
                optimizer.zero_grad()

    def await_request(self, request: Request) -> None: ...

    def step_ended(self) -> None:
        self._mark_state()
        self._steps -= 1
        if self._steps == 0:
            raise AllTracedError

    def round_ended(self) -> None: ...

    def _mark_state(self) -> None:
        for state in self.trainer.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    self._recorder.mark(value, "optimizer")
