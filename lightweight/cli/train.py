"""The job itself, for the person who wants the model: one trial trained to its end and saved.

What trains is the suite's own code (`worker`), in this process. Around it: a method chosen by forecast where none is
given; checkpoints, signals, progress and trackers, which are callbacks of the Trainer and, since it tells them the
same, of the captured step; and an output folder that is whole or not there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightweight import preload  # isort: skip  # noqa: F401  # before Trainer, which imports peft

import torch
from accelerate.utils import gather_object
from transformers import PrinterCallback, Trainer
from transformers.integrations import integration_utils

from lightweight import corpus, methods, models, record, targets
from lightweight.child import failure, host_memory, worker
from lightweight.child.process import see_gpus
from lightweight.cli import checkpoints, reloading
from lightweight.cli.callbacks import Checkpoints, ProgressBar
from lightweight.cli.checkpoints import StopRequest, step_of
from lightweight.cli.choice import choose, instead, placed, timed
from lightweight.cli.job import Job, JobError
from lightweight.cli.output import Interrupted, Output, OutputError
from lightweight.cli.result import finish, publish_finished
from lightweight.cli.terminal import fail, say
from lightweight.forecast import tracer
from lightweight.forecast.step_time import StepTime, span
from lightweight.internals.transformers import draw_curves_in
from lightweight.methods import Method, MethodError, check_layers
from lightweight.models import Model
from lightweight.targets import CPU, NATIVE, Device, MiB, Target, size
from lightweight.training import ranks, stock
from lightweight.training.meter import Meter
from lightweight.training.rounds import Request
from lightweight.trial import (
    Completed,
    Crashed,
    Diverged,
    Outcome,
    OutOfMemory,
    Phase,
    Trial,
    of_all_ranks,
)

LOG_STEPS = 10
"""Optimizer steps between two entries of a log. The captured step waits for the device at each."""
BESIDES_BYTES = 64 * MiB
"""Room for what is saved beside weights and moments: tokenizer, card, random numbers' state, a tracker's files."""


DISK = (errno.EIO, errno.EROFS, errno.ESTALE, errno.EREMOTEIO)
"""What a disk answers that has failed, or a server of files."""

MENDS = {errno.EMFILE: "raise ulimit -n"} | dict.fromkeys(DISK, "repair that disk, or use another one")
"""Of what keeps a working file from being written, where it is nobody who has changed what lies there."""

REFUSALS = (
    *(JobError, OutputError, corpus.CorpusError, models.ModelError, tracer.ForecastError, MethodError),
    ranks.RanksError,
)
"""What a job raises that cannot start, each with one clear line."""


def run(job: Job, progress: Callable[[str], None] = lambda text: None) -> Outcome:
    """Train `job` and save what it gives; anything but Completed has been told in one line.

    `progress` is told what is happening before there are steps. Raises KeyboardInterrupt where SIGINT, SIGTERM or
    SIGHUP stopped it, and one of REFUSALS where it cannot start.
    """
    stop_request = StopRequest(repeats=ranks.world_size() > 1)
    with checkpoints.signals_to(stop_request.receive):
        return _run(job, progress, stop_request)


def _run(job: Job, progress: Callable[[str], None], stop_request: StopRequest) -> Outcome:
    output = Output(job.output.absolute())
    dialogues = corpus.load(job.corpus, job.reading, progress)
    say(str(dialogues.origin))
    _check_tracker(job.report_to)
    on_gpu = torch.cuda.is_available()
    if on_gpu and ranks.world_size() == 1:
        see_gpus(0, 1)
    device = worker.describe_device(ranks.local_rank()) if on_gpu else Device(name=f"{platform.machine()} CPU")
    try:
        target = _target(job.target, device, on_gpu)
        method = job.settings.applied([methods.named(job.method)], ranks.world_size())[0] if job.method else None
    except ValueError as error:
        raise JobError(str(error)) from error
    if on_gpu and ranks.world_size() > 1:
        torch.cuda.set_device(ranks.local_rank())
    ranks.meet(cpu=not on_gpu)
    ranks.of_first(lambda: output.claim(resume=job.resume, overwrite=job.overwrite))
    try:
        model = _located(models.named(job.model), job.weights)
        before = ranks.of_first(output.interrupted) if job.resume else None
        step = None
        if method is None:
            method, step = ranks.of_first(lambda: choose(job, model, target, device, before, progress, dialogues))
        check_layers(method, model)
        trial = _trial(job, model, method, target, dialogues, on_gpu)
        placement = ranks.of_first(lambda: placed(trial, job, before, device, progress).placement)
        trial = replace(trial, placement=placement)
        if job.resume:
            _check_same(trial, before, output)
        if before and before.is_finished:
            return publish_finished(before.settings, output)
        if step is None:
            step = ranks.of_first(lambda: timed(trial, device, progress))
        progress(f"{trial.name}: loading")
        settings = record.settings(trial)
        trial = replace(trial, model=ranks.of_first(lambda: _written(model, output, job.seed, settings)))
        return _carry_out(trial, job, output, device, progress, stop_request, before, step)
    except REFUSALS:
        raise
    except Exception as error:  # safetensors and torch tell a full disk, and a file's limit, each in their own way
        if ranks.world_size() > 1 and ranks.is_of_a_lost_one(error):
            raise ranks.RanksError(
                f"rank {ranks.rank()} of {ranks.world_size()}: another rank is gone: --resume goes on after the last "
                "checkpoint, also with another number of ranks"
            ) from error
        if os.strerror(errno.EFBIG) in str(error) or (ranks.is_first() and output.is_at_limit):
            raise _unwritable(output, "a file of it is larger than ulimit -f allows: raise that") from error
        number = failure.unwritten(error)
        if number in (errno.ENOSPC, errno.EDQUOT) or (ranks.is_first() and output.is_full):
            raise _unwritable(output, "the disk is full: free some space") from error
        if isinstance(error, OSError) and output.partial in Path(str(error.filename)).parents:
            what = f"{error.filename} cannot be written ({error.strerror})"
            mend = MENDS.get(error.errno or 0, "leave the files there alone while it trains")
            raise _unwritable(output, f"{what}: {mend}") from error
        if number in DISK and getattr(error, "filename", None) is None:  # torch does not say which file it was
            why = error.strerror if isinstance(error, OSError) else models.first_line(error)
            raise _unwritable(output, f"a file in {output.partial} failed ({why}): {MENDS[errno.EIO]}") from error
        raise
    finally:
        progress("")
        if ranks.is_first():
            output.release()


def _carry_out(
    trial: Trial,
    job: Job,
    output: Output,
    device: Device,
    progress: Callable[[str], None],
    stop_request: StopRequest,
    before: Interrupted | None,
    step: StepTime | None,
) -> Outcome:
    torch_device = worker.take_device(trial)
    meter = Meter(torch_device, start_seconds=0.0)
    checkpoint = before.checkpoint if before else None
    saving = Checkpoints(
        stop_request,
        checkpoints.Clock(None if job.save_steps else checkpoints.SECONDS),
        checkpoints.Shelf(output.partial, checkpoint),
        record.settings(trial),
    )
    try:
        with contextlib.closing(ProgressBar()) as bar:
            trial, trainer, rows, heldout = worker.set_up(
                trial, torch_device, meter, Unattended(), output.unfinished, progress, **_arguments(job, output)
            )
            if told := _too_long(trial, meter):
                say(told)
            if told := reloading.check(trial, trainer.model):
                say(told)
            if step is not None:
                say(_how_long(trial, step))
            _require_room(trial, trainer, output)
            draw_curves_in(trainer, output.curves())  # one curve, also of a job that is resumed
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(saving)
            trainer.add_callback(bar)
            if checkpoint is not None:
                stock.resume_meter(meter, trainer, checkpoint)
                say(f"going on after step {step_of(checkpoint)} of {trial.steps}")

            def enter(phase: Phase) -> None:
                progress(f"{trial.name}: held-out loss" if phase == "evaluate" else "")

            worker.train(trial, trainer, rows, heldout, meter, enter, checkpoint)
            if saving.stopped:
                raise KeyboardInterrupt
            worker.evaluate(trainer, heldout, meter)
            return _save(trial, trainer, meter, device, output, step)
    except Exception as error:
        failed = failure.outcome_of(error, trial, meter, output.unfinished)
        if isinstance(failed, Crashed):
            raise
    _tell(failed, trial, job, device, progress)
    return failed


def _save(
    trial: Trial, trainer: Trainer, meter: Meter, device: Device, output: Output, step: StepTime | None
) -> Completed:
    """Save what was trained. Every rank takes part in gathering it; the first one alone writes, and finishes."""
    trainer.save_model(str(output.unfinished / "result"))
    outcome = Completed(measured=of_all_ranks(gather_object([meter.measurements()])))
    if ranks.is_first():
        finish(trial, outcome, device, output, None if step is None else trial.steps * step.seconds)
    ranks.wait_for_all()  # torchrun ends them all as soon as one has failed
    return outcome


# Before the first step


def _too_long(trial: Trial, meter: Meter) -> str:
    """What became of examples that are longer than a row, in one line; nothing where none is."""
    words = {"truncated_sequences": "cut", "split_examples": "split", "dropped_examples": "left out"}
    told = [f"{meter.facts[fact]:,} {what}" for fact, what in words.items() if meter.facts[fact]]
    return f"longer than {trial.max_length:,} tokens: {', '.join(told)}" if told else ""


def _how_long(trial: Trial, step: StepTime) -> str:
    """What the steps of a job are forecast to take, in one line; rows shorter than the longest take less."""
    low, high = (span(trial.steps * seconds) for seconds in (step.low, step.high))
    words = high if step.low == step.high else f"{low} to {high}"
    known = f"calibrated on {step.measured}" if step.is_calibrated else "from its data sheet, not calibrated"
    return f"{trial.steps:,} steps, forecast to take {words} over full rows ({known})"


def _require_room(trial: Trial, trainer: Trainer, output: Output) -> None:
    """Raise OutputError where checkpoints and result have no room: a new checkpoint, and the result, which is smaller,
    are whole before an older one goes."""
    _, checkpoint_bytes = sizes(trial, trainer.model)
    more = checkpoints.KEPT + 1 - len(checkpoints.all_in(output.partial)[: checkpoints.KEPT])
    ranks.of_first(lambda: output.require(more * checkpoint_bytes + BESIDES_BYTES))


def _located(model: Model, weights: models.Weights | None) -> Model:
    """The model with where its weights come from. Nobody wants a trained random network by surprise: one that has
    weights somewhere gets random ones only where they are asked for. Raises ModelError."""
    try:
        return models.find(model, weights or ("random" if model.source is None else "pretrained"))[0]
    except models.ModelError as error:
        if weights is None and models.can_be_random(model):
            raise models.ModelError(f"{error}, or take --weights random") from error
        raise


def _check_tracker(name: str) -> None:
    if name == "none":
        return
    try:
        is_installed = getattr(integration_utils, f"is_{name}_available")()  # some import the package to know
    except ImportError as error:
        raise JobError(
            f"--report-to {name}: the package {name} cannot be imported ({error}): repair or reinstall it"
        ) from error
    if not is_installed:
        raise JobError(f"--report-to {name}: the package is not installed or switched off: pip install {name}")


def _target(name: str | None, device: Device, on_gpu: bool) -> Target:
    if name is None:
        return NATIVE.on(device) if on_gpu else CPU
    target = targets.named(name).on(device)
    if on_gpu and target.emulated_on(device.name) and (target.total_bytes or 0) > (device.total_bytes or 0):
        raise JobError(f"--target {name}: has more memory than {device.name}: choose a smaller target or leave it out")
    return target


def _trial(job: Job, model: Model, method: Method, target: Target, dialogues: corpus.Corpus, on_gpu: bool) -> Trial:
    try:
        record.check_searched(job.settings.learning_rate, model.name, method)
        return Trial(
            model=model,
            method=method,
            target=target,
            corpus=dialogues,
            seed=job.seed,
            epochs=job.epochs,
            max_steps=job.max_steps,
            device_index=0 if on_gpu else None,
            world_size=ranks.world_size(),
            placement=job.settings.placement or "replicated",
            **job.settings.rows,
        )
    except ValueError as error:
        raise JobError(str(error)) from error


def _check_same(trial: Trial, before: Interrupted | None, output: Output) -> None:
    """Say what of the interrupted job is gone on with. Raises JobError where it was another one than `trial`."""
    if before is None:
        say(f"nothing to resume in {output.partial}: starting at the first step")
        return
    for line in before.passed_over:
        say(line)
    settings = json.loads(json.dumps(record.settings(trial)))
    differ = record.differing_settings(before.settings, settings)
    if _is_on_other_ranks(before.settings, settings):
        was, now = (of.get("world_size", 1) for of in (before.settings, settings))
        say(f"going on with {now} rank{'s' * (now > 1)} where there were {was}: only dropout masks change")
        differ = {key: pair for key, pair in differ.items() if key not in OF_RANKS}
    if differ:
        was = ", ".join(f"{key} was {then!r} and is {now!r}" for key, (then, now) in differ.items())
        raise JobError(
            f"--resume: the job in {before.place} is a different one: {was}: give the options it was started with, "
            "or --overwrite without --resume"
        )


OF_RANKS = ("world_size", "placement", "per_device_train_batch_size", "gradient_accumulation_steps")
"""Settings that follow from a method and the number of its ranks."""


def _is_on_other_ranks(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a job of the same method goes on with another number of ranks, whose checkpoint any number can read: one
    of shards has the optimizer's state as FSDP2 gathers it."""
    is_same = then.get("method_digest") == now["method_digest"]
    return (
        is_same
        and then.get("world_size") != now["world_size"]
        and "sharded" not in (then.get("placement"), now["placement"])
    )


def _written(model: Model, output: Output, seed: int, settings: Mapping[str, Any]) -> Model:
    """The model with its weights in a folder; one that had to be made stays until the job has ended."""
    if model.is_loadable:
        return model
    if checkpoints.problem(output.base) is not None:
        models.write(model, output.unfinished / "base", seed)
        output.keep_base(settings)
    return replace(model, location=str(output.base), gguf_file=None)


def _arguments(job: Job, output: Output) -> dict[str, Any]:
    """TrainingArguments of what is logged and saved on the way."""
    saving: dict[str, Any] = {"save_strategy": "no"}
    if job.save_steps is not None:
        saving = {"save_strategy": "steps", "save_steps": job.save_steps}
    return saving | {
        "output_dir": str(output.unfinished),
        "save_total_limit": None,  # a checkpoint leaves that folder when it is whole
        "logging_strategy": "steps",
        "logging_steps": LOG_STEPS,
        "logging_first_step": True,
        "report_to": job.report_to,
        "run_name": output.folder.name,
    }


def sizes(trial: Trial, network: Any) -> tuple[int, int]:
    """Bytes of the result's weights and of a checkpoint: fp32 weights, and two moments of each that is trained.

    A checkpoint has weights once more where what trains them keeps them in its own way: of ranks that share them,
    FSDP2, which also gathers tied ones under each of their names; else the captured step's optimizer, of adapters.
    """
    trained = models.count_parameters(network, trainable=True)
    adapted = trial.method.adapter is not None
    result = 4 * (trained if adapted else models.count_parameters(network))
    own = result if adapted and (trial.is_sharded or trial.method.captured_step) else 0
    if trial.is_sharded and not adapted:
        own = 4 * sum(tensor.numel() for tensor in network.state_dict().values())
    return result, result + own + 8 * trained


# While it trains


class Unattended:
    """The owner of a trial that nobody paces: every round goes on at once."""

    def training_began(self) -> None: ...
    def await_request(self, request: Request) -> None: ...
    def step_ended(self) -> None: ...
    def round_ended(self) -> None: ...


# How it ended


def _tell(
    failed: OutOfMemory | Diverged, trial: Trial, job: Job, device: Device, progress: Callable[[str], None]
) -> None:
    """Say in one line how the job failed, and what would not: on the first rank of all that do."""
    if not ranks.is_first_to_say():
        return
    if isinstance(failed, Diverged):
        before = failed.measured.heldout_loss_before
        mend = "take a smaller --learning-rate"
        if before is not None and math.isnan(before):
            mend = "it was not finite before the first step either: the model's weights hold NaN or infinity"
        fail(f"{trial.name}: {failed.reason}: {mend}")
        return
    asked = "" if failed.requested_bytes is None else f", where {size(failed.requested_bytes)} more were asked for"
    where = f" on rank {ranks.rank()}" if ranks.world_size() > 1 else ""
    _, of_host, in_force = failed.reason.partition(host_memory.HOST)
    of = f"{of_host}{in_force}" if of_host else size(failed.budget_bytes)
    what = f"{trial.name}: out of memory{where} in {failed.phase}{asked}, of {of}"
    fail(f"{what}: {instead(trial, job, device, progress)}")


def _unwritable(output: Output, why: str) -> OutputError:
    return OutputError(
        f"--output {output.folder}: {why}"
        + (f"; --resume then goes on after step {step_of(output.checkpoint)}" if output.checkpoint else "")
    )
