"""How is the captured step prepared and recorded on fake tensors? By its own code, in the order of `captured.loop`.

The job's check comes first: its peaks do not count, but there must be room for it, and it moves the weights that it
joins. What it compares and reads is taken to agree. Then a step warms up in a stream
of its own, and the step that is recorded allocates from the graph's own pool, which is kept for as long as the job.
"""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from lightweight.captured import dropout, flash, launching, offload, packing, temporary
from lightweight.captured.epochs import Epochs
from lightweight.captured.graphs import what_cannot_be_captured
from lightweight.captured.loop import LAYERS_ARE_DROPPED, RANKS_MOVE, layer_drop
from lightweight.captured.packing import Buffers
from lightweight.captured.parts import Loss, PartError, Parts
from lightweight.captured.passes import NOTHING
from lightweight.captured.reference import Reference
from lightweight.captured.sample import Sample
from lightweight.captured.step import Step
from lightweight.corpus import Row, Rows
from lightweight.forecast.recorder import Recorder
from lightweight.forecast.steps import UNSCHEDULED
from lightweight.internals import accelerate as accelerate_internals
from lightweight.internals import torch as torch_internals
from lightweight.methods import CapturedStep
from lightweight.training import stock
from lightweight.training.rounds import Request
from lightweight.trial import Trial

PASSES = 2
"""The most passes of a step that are traced. The first makes gradients and the second adds to them; every later one
allocates what the second did, where that was: a step of eight is then forecast to the same byte."""


class _FirstPasses(Step):
    """A step of no more passes than differ; the last of them counts for those that are left out."""

    def __init__(self, trial: Trial, trainer: Any, recorder: Recorder) -> None:
        super().__init__(trial, trainer)
        self._recorder = recorder

    def computed_passes(self, buffers: Buffers) -> int:
        return min(buffers.shape.passes, PASSES)

    def _pass(self, buffers: Buffers, index: int) -> None:
        left_out = buffers.shape.passes - PASSES if index == PASSES - 1 else 0
        with self._recorder.counting(1 + max(0, left_out)):
            super()._pass(buffers, index)


class UncapturedError(ValueError):
    """A step that no graph can have. The message names the module that prevents it, and the reason."""


def _one_full_step(trial: Trial) -> tuple[Trial, Rows]:
    """The trial with one optimizer step, and rows for it, each full of an answer: what takes most, where the job's own
    are not at hand."""
    tokens = np.ones(trial.max_length, np.int32)
    row: Row = {"input_ids": tokens, "labels": tokens}
    count = trial.method.sequences_per_step
    return replace(trial, rows=count, max_steps=1), Rows([row] * count, pad_token_id=0)


def train(network: Any, trial: Trial, rows: Rows | None, recorder: Recorder) -> None:
    """Prepare and record the steps of a trial over `rows`, whose method is that of its device. Raises
    UncapturedError."""
    asked = trial.method.captured_step
    assert asked is not None
    if trial.method.moves_ranks:
        raise UncapturedError(RANKS_MOVE)
    if (drop := layer_drop(network.config)) is not None:
        raise UncapturedError(LAYERS_ARE_DROPPED.format(drop))
    if rows is None:
        trial, rows = _one_full_step(trial)
    if asked.offload:
        with offload.told_to(recorder):
            offload.keep_embedding_on_the_host(network)
        recorder.free_unused()  # where it was
    folder = Path(tempfile.gettempdir())  # which is there, as the Trainer will have it, and gets nothing
    trainer = stock.make_trainer(
        replace(trial, device_index=None), network, rows, recorder.meter, _NobodyAsks(), folder, **UNSCHEDULED
    )
    if trial.method.training_arguments.get("fp16"):
        accelerate_internals.autocast_on_cpu(trainer, None)
    network.train()
    if trainer.args.gradient_checkpointing:
        network.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        network.enable_input_require_grads()
    for weight in temporary.trained(network):
        weight.register_post_accumulate_grad_hook(lambda grown: recorder.mark(grown.grad, "gradients"))
    recorder.meter.phase = "capture"
    is_drawn = trial.model.weights == "random"
    with (
        launching.shapes_alone(drawn=is_drawn),
        launching.launches_told_to(recorder.launched),
        flash.as_on(recorder.rules.capability),
        offload.told_to(recorder),
    ):
        step = _FirstPasses(trial, trainer, recorder)
        step.passes.recompute(asked.recompute, offload=asked.offload, keeps_random_numbers=not asked.graph)
        with torch_internals.with_numbers():  # of the rows that are drawn
            joins = step.passes.on_flash and asked.attention == "sdpa"
            epochs = Epochs(trial, trainer, rows, packing_asked=asked.packing, joins=joins, compiled=False)
        with dropout.off():
            _check(step, epochs, Reference(trainer, halves=False), _wanted(asked, step, epochs), recorder)
        _mark_weights(step, recorder)
        temporary.drop_gradients(network)
        recorder.free_unused()
        recorder.begin_training()
        _record(step, epochs, recorder, is_graph=asked.graph)


class _NobodyAsks:
    """The owner of a training that no request is made of."""

    def training_began(self) -> None: ...
    def await_request(self, request: Request) -> None: ...
    def step_ended(self) -> None: ...
    def round_ended(self) -> None: ...


def _mark_weights(step: Step, recorder: Recorder) -> None:
    """Say so of the network's weights and buffers, which are made anew when they are cast and joined."""
    network = step.passes.network
    for tensor in (*network.parameters(), *network.buffers()):
        recorder.mark(tensor, "weights")


def _mark_state(step: Step, recorder: Recorder) -> None:
    state, gradients = step.optimizer.held()
    for tensor in state:
        recorder.mark(tensor, "optimizer")
    for tensor in gradients:
        recorder.mark(tensor, "gradients")


def _wanted(asked: CapturedStep, step: Step, epochs: Epochs) -> Parts:
    return Parts(
        packing=epochs.packs,
        attention=asked.attention == "sdpa",
        loss="chunked" if asked.loss == "chunked" else "model",
        lean=asked.lean and not step.passes.casts,
    )


def _check(step: Step, epochs: Epochs, reference: Reference, wanted: Parts, recorder: Recorder) -> None:
    """What `check.Check` must have room for, where all that is asked for agrees. The rest it does where there is more,
    the Trainer's whole passes and those in fp32, leaves nothing behind and is not traced."""
    begin, rows = epochs.samples()
    numbers = {*chain(*begin.rows, *rows.rows)}
    is_full = all(packing.length(epochs.rows[number]) == epochs.rows.width for number in numbers)
    recorder.rules.padding = "full" if is_full else "padded"
    with reference.recomputing():
        expected = reference.gradients(reference.least(begin))
    recorder.meter.phase = "capture"
    recorder.free_unused()
    step.make_optimizer()
    _mark_state(step, recorder)
    _take_on(step, epochs, wanted, begin, recorder)
    del expected
    temporary.drop_gradients(step.passes.network)
    _use(step, epochs, step.parts)


def _take_on(step: Step, epochs: Epochs, wanted: Parts, sample: Sample, recorder: Recorder) -> None:
    """Take on as many of the parts that are `wanted` as this network can have, and compute the `sample` with them: some
    networks refuse a part only then."""
    losses: list[Loss] = list(dict.fromkeys([wanted.loss, "logits", "model"]))
    for parts in (*wanted.fewer(losses), NOTHING):
        try:
            with torch_internals.no_hooks_left():
                _use(step, epochs, parts)
                _mark_weights(step, recorder)
                _, shape = epochs.laid_out(sample, step.parts)
                step.gradients(Buffers(shape, step.device), 1.0)
            break
        except PartError:
            if parts == NOTHING:
                raise
            recorder.entered.clear()
            temporary.drop_gradients(step.passes.network)


def _use(step: Step, epochs: Epochs, parts: Parts) -> None:
    step.passes.use(parts, None)
    epochs.lay_out(step.parts)


def _record(step: Step, epochs: Epochs, recorder: Recorder, *, is_graph: bool) -> None:
    """The steps that are warmed up and recorded, the largest shape first, or run twice where there `is_graph` not."""
    buffers = {shape: Buffers(shape, step.device) for shape in epochs.shapes}
    for index, shape in enumerate(sorted(buffers, key=lambda shape: -shape.tokens)):
        run = partial(step.run, buffers[shape])
        with recorder.in_a_stream() if is_graph else nullcontext():
            if (problem := what_cannot_be_captured(step.passes.network, run)) is not None:
                raise UncapturedError(problem)
        _mark_state(step, recorder)
        step.optimizer.clear_gradients()
        with recorder.watching() if index == 0 else nullcontext():  # the largest is that of most steps
            if not is_graph:
                run()
                continue
            recorder.free_unused()
            with recorder.in_the_graphs_pool():
                run()
