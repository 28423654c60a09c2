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
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lightweight import preload  # isort: skip  # noqa: F401  # before Trainer, which imports peft

import torch
from accelerate.utils import gather_object
from transformers.integrations import integration_utils
from transformers.trainer_callback import PrinterCallback

from lightweight import corpus, methods, models, record, targets
from lightweight.child import owner, worker
from lightweight.child.process import see_gpus
from lightweight.cli import checkpoints
from lightweight.cli.callbacks import Checkpoints, Progress
from lightweight.cli.checkpoints import Interruption, step_of
from lightweight.cli.model_card import model_card
from lightweight.cli.output import RECORD_NAME, Interrupted, Output, OutputError
from lightweight.forecast import plan, tracer
from lightweight.methods import Method, MethodError
from lightweight.models import Model
from lightweight.names import one_line
from lightweight.targets import CPU, NATIVE, Device, GiB, MiB, Target
from lightweight.training import ranks, stock
from lightweight.training.meter import Meter
from lightweight.training.stock import Request
from lightweight.trial import (
    MAX_LENGTH,
    Completed,
    Crashed,
    Diverged,
    Measurements,
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


class JobError(ValueError):
    """A job that cannot start. The message names what it is about and the mend."""


class NothingFitsError(JobError):
    """No method is forecast to fit."""


REFUSALS = (
    *(JobError, OutputError, corpus.CorpusError, models.ModelError, tracer.ForecastError, MethodError),
    ranks.RanksError,
)
"""What a job raises that cannot start, each with one clear line."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to train and where to leave it. Names are those of the command line; `None` is what it chooses itself.

    `save_steps` are optimizer steps between checkpoints, `None` one every five minutes.
    """

    model: str
    corpus: Path
    output: Path
    method: str | None = None
    target: str | None = None
    weights: models.Weights | None = None
    epochs: int = 10
    max_steps: int | None = None
    max_length: int = MAX_LENGTH
    batch_size: int | None = None
    learning_rate: float | None = None
    seed: int = 0
    report_to: str = "none"
    save_steps: int | None = None
    resume: bool = False
    overwrite: bool = False


def run(job: Job, progress: Callable[[str], None] = lambda text: None) -> Outcome:
    """Train `job` and save what it gives; anything but Completed has been told in one line.

    `progress` is told what is happening before there are steps. Raises KeyboardInterrupt where SIGINT, SIGTERM or
    SIGHUP stopped it, and one of REFUSALS where it cannot start.
    """
    interruption = Interruption(repeats=ranks.world_size() > 1)
    with checkpoints.signals_to(interruption.receive):
        return _run(job, progress, interruption)


def _run(job: Job, progress: Callable[[str], None], interruption: Interruption) -> Outcome:
    output = Output(job.output.absolute())
    dialogues = corpus.load(job.corpus)
    _check_tracker(job.report_to)
    on_gpu = torch.cuda.is_available()
    if on_gpu and ranks.world_size() == 1:
        see_gpus(0, 1)
    device = worker.describe_device(ranks.local_rank()) if on_gpu else Device(name=f"{platform.machine()} CPU")
    try:
        target = _target(job.target, device, on_gpu)
        method = methods.named(job.method) if job.method else None
    except ValueError as error:
        raise JobError(str(error)) from error
    if on_gpu and ranks.world_size() > 1:
        torch.cuda.set_device(ranks.local_rank())
    ranks.meet(cpu=not on_gpu)
    ranks.of_first(lambda: output.claim(resume=job.resume, overwrite=job.overwrite))
    try:
        model = _found(models.named(job.model), job.weights)
        before = ranks.of_first(output.interrupted) if job.resume else None
        if method is None:
            settings_before = before.settings if before else {}
            method = ranks.of_first(lambda: _chosen(job, model, target, device, settings_before, progress))
        if job.batch_size is not None:
            method = method.with_batch(job.batch_size)
        if job.learning_rate is not None:
            method = method.with_learning_rate(job.learning_rate)
        trial = _trial(job, model, method, target, dialogues, on_gpu)
        if job.resume:
            _check_same(trial, before, output)
        if before and before.finished is not None:
            return _published(before.finished, output)
        progress(f"{trial.name}: loading")
        settings = record.settings(trial)
        trial = replace(trial, model=ranks.of_first(lambda: _written(model, output, job.seed, settings)))
        return _train(trial, job, output, device, progress, interruption, before)
    except REFUSALS:
        raise
    except Exception as error:  # safetensors and torch tell a full disk, and a file's limit, each in their own way
        if os.strerror(errno.EFBIG) in str(error) or (ranks.is_first() and output.is_at_limit):
            raise _unwritable(output, "a file of it is larger than ulimit -f allows: raise that") from error
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or (ranks.is_first() and output.is_full):
            raise _unwritable(output, "the disk is full: free some space") from error
        if isinstance(error, OSError) and output.partial in Path(str(error.filename)).parents:
            what = f"{error.filename} cannot be written ({error.strerror})"
            raise _unwritable(output, f"{what}: leave alone what lies there while it trains") from error
        raise
    finally:
        progress("")
        if ranks.is_first():
            output.release()


def _train(
    trial: Trial,
    job: Job,
    output: Output,
    device: Device,
    progress: Callable[[str], None],
    interruption: Interruption,
    before: Interrupted | None,
) -> Outcome:
    torch_device = worker.take_device(trial)
    meter = Meter(torch_device, start_seconds=0.0)
    checkpoint = before and before.checkpoint
    saving = Checkpoints(
        interruption,
        checkpoints.Clock(None if job.save_steps else checkpoints.SECONDS),
        checkpoints.Shelf(output.partial, checkpoint),
        record.settings(trial),
    )
    try:
        with contextlib.closing(Progress()) as bar:
            trainer, rows, heldout = worker.set_up(
                trial, torch_device, meter, Unattended(), output.unfinished, **_arguments(job, output)
            )
            _, checkpoint_bytes = sizes(trial, trainer.model)
            # A new checkpoint, and the result, which is smaller, are whole before an older one goes.
            more = checkpoints.KEPT + 1 - len(checkpoints.all_in(output.partial)[: checkpoints.KEPT])
            ranks.of_first(lambda: output.require(more * checkpoint_bytes + BESIDES_BYTES))
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, integration_utils.TensorBoardCallback) and callback.logging_dir is None:
                    callback.logging_dir = str(output.partial / "runs")  # one curve, also of a job that is resumed
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(saving)
            trainer.add_callback(bar)
            if checkpoint is not None:
                stock.resume_meter(meter, checkpoint)
                _say(f"going on after step {step_of(checkpoint)} of {trial.steps}")

            def enter(phase: Phase) -> None:
                progress(f"{trial.name}: held-out loss" if phase == "evaluate" else "")

            worker.train(trial, trainer, rows, heldout, meter, enter, checkpoint)
            if saving.stopped:
                raise KeyboardInterrupt
            worker.evaluate(trainer, heldout, meter)
            # Every rank takes part in gathering what is saved; the first one alone writes, and finishes.
            trainer.save_model(str(output.unfinished / "result"))
            outcome = Completed(measured=of_all_ranks(gather_object([meter.measurements()])))
            if ranks.is_first():
                _finish(trial, outcome, device, output)
            ranks.wait_for_all()  # torchrun ends them all as soon as one has failed
            return outcome
    except Exception as error:
        failed = worker.failure(error, trial, meter, output.unfinished)
        if isinstance(failed, Crashed):
            raise
    _tell(failed, trial, job, device, progress)
    return failed


def _finish(trial: Trial, outcome: Completed, device: Device, output: Output) -> None:
    """Complete the saved weights with all that belongs to them, and put them into their place."""
    entry = record.entry(trial, outcome, device, None)
    with output.completing() as result:
        (result / "training_args.bin").unlink(missing_ok=True)  # pickled, and full of this machine's paths
        models.load_tokenizer(trial.model).save_pretrained(result)
        base = base_name(trial.model)
        adapter = result / "adapter_config.json"
        if adapter.exists():  # peft wrote where the weights lay here, which may be a folder that goes now
            config = json.loads(adapter.read_text("utf-8")) | {"base_model_name_or_path": base}
            adapter.write_text(json.dumps(config, indent=2, sort_keys=True), "utf-8")
        (result / RECORD_NAME).write_text(json.dumps({"outcomes": [entry]}, indent=1), "utf-8")
        on_hub = trial.model.weights == "pretrained" and not Path(base).is_absolute()
        model_card(entry, base if on_hub else None).save(result / "README.md")  # in the place of the one peft wrote
        if (output.partial / "runs").exists():
            shutil.copytree(output.partial / "runs", result / "runs")
    output.publish()
    _say(_closing_line(trial, outcome.measured, output))


def _closing_line(trial: Trial, measured: Measurements, output: Output) -> str:
    first, last = record.training_loss(measured.train_loss, trial.steps_per_epoch) or (math.nan, math.nan)
    return (
        f"{trial.name}: {len(measured.train_loss)} steps, training loss {first:.4f} -> {last:.4f}, "
        f"held out {measured.heldout_loss_before:.4f} -> {measured.heldout_loss_after:.4f}; saved in {output.folder}"
    )


def _published(entry: record.Entry, output: Output) -> Completed:
    """What the interrupted job had finished, now in its place."""
    ranks.of_first(output.publish)
    names = {field.name for field in fields(Measurements)}
    _say(f"nothing is left to train: the interrupted job had finished; saved in {output.folder}")
    return Completed(measured=Measurements(**{name: value for name, value in entry.items() if name in names}))


def base_name(model: Model) -> str:
    """What finds the base model again: its id on the hub, its folder, or its name here."""
    if model.source is None:
        return model.name
    folder = Path(model.source)
    return str(folder.resolve()) if folder.is_dir() else model.source


# Before the first step


def _found(model: Model, weights: models.Weights | None) -> Model:
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
        found = getattr(integration_utils, f"is_{name}_available")()  # some import the package to know
    except ImportError as error:
        raise JobError(f"--report-to {name}: the package {name} cannot be imported ({error}): mend it") from error
    if not found:
        raise JobError(f"--report-to {name}: the package is not installed or switched off: pip install {name}")


def _target(name: str | None, device: Device, on_gpu: bool) -> Target:
    if name is None:
        return NATIVE if on_gpu else CPU
    target = targets.named(name)
    if on_gpu and target.emulated_on(device.name) and (target.total_bytes or 0) > (device.total_bytes or 0):
        raise JobError(f"--target {name}: has more memory than {device.name}: choose a smaller target or leave it out")
    return target


def _chosen(
    job: Job,
    model: Model,
    target: Target,
    device: Device,
    before: dict[str, Any],
    progress: Callable[[str], None],
) -> Method:
    """The method of a job that was given none, which is told in one line, with as many rows a pass as fit. Raises
    NothingFitsError."""
    if before.get("method") is not None:
        _say(f"method {before['method']}: what the interrupted job was trained with")
        return _with_stored_passes(methods.named(before["method"]), before["training_arguments"])
    if device.total_bytes is None and target.total_bytes is None:
        if model.weights == "random":
            _say("method baseline: without GPU or --target nothing is forecast; random weights give adapters no ground")
            return methods.BASELINE
        _say("method lora: without GPU or --target nothing is forecast; it trains the fewest weights, fp32 on a CPU")
        return methods.LORA
    rows = _forecasts(job, model, target, device, (), progress)
    row = next((row for row in rows if row["chosen"]), None)
    budget = rows[0]["budget_bytes"]
    if row is None:
        known = [row for row in rows if row["verdict"] != "cannot_be_forecast"]
        if not known:
            raise NothingFitsError(f"model {job.model}: no method can be forecast: {rows[0]['reason']}: give --method")
        least = min(known, key=lambda row: row["forecast_reserved_bytes"])
        raise NothingFitsError(
            f"model {job.model}: no method is forecast to fit {_size(budget)}: {least['method']} takes least, "
            f"{_size(least['forecast_reserved_bytes'])}: take a smaller --batch-size or --max-length, or more memory"
        )
    fitting = [row["method"] for row in rows if row["verdict"] == "fits"]
    where = "" if device.total_bytes else ", though trained on this CPU, which has no such budget"
    method = methods.named(row["method"])
    chosen = method.with_passes(row["accumulation"])
    passes = "" if chosen == method else f" in {row['passes']} passes of {row['batch_size']} rows a step"
    _say(
        f"method {row['method']}{passes}: {_size(row['forecast_reserved_bytes'])} of {target.name}'s {_size(budget)} "
        f"by forecast, expected to be the fastest of what fits ({', '.join(fitting)}; captured steps are not forecast)"
        f"{where}"
    )
    return chosen


def _with_stored_passes(method: Method, stored: dict[str, Any]) -> Method:
    """`method` with those passes that a job of its stored arguments was planned with."""
    wanted = stored.get("per_device_train_batch_size", 8), stored.get("gradient_accumulation_steps", 1)
    for planned in (method, *plan.smaller_passes(method, ranks.world_size())):
        on_rank = planned.on_rank(ranks.world_size())
        if (on_rank.sequences_per_pass, on_rank.passes_per_step) == wanted:
            return planned
    return method


def _forecasts(
    job: Job,
    model: Model,
    target: Target,
    device: Device,
    without: Sequence[str],
    progress: Callable[[str], None],
) -> list[plan.PlanRow]:
    """A row for each of the suite's methods that can be forecast, but those called `without`."""
    candidates = [
        method for method in methods.METHODS.values() if method.captured_step is None and method.name not in without
    ]
    if target.total_bytes is None:  # the card as it is
        target = replace(target, total_bytes=device.total_bytes, capability=device.capability or target.capability)
    wanted: dict[str, Any] = {"batch_size": job.batch_size, "max_length": job.max_length, "gpus": ranks.world_size()}
    try:
        if ranks.world_size() == 1:
            return plan.plan([model], candidates, [target], progress=progress, **wanted)
        # A forecast of one of several ranks plays that it is one, which a process that is one cannot.
        with owner.reaper.temporary_folder() as folder:
            return owner.call(plan.plan, folder, [model], candidates, [target], **wanted)
    finally:
        progress("")


def _trial(job: Job, model: Model, method: Method, target: Target, dialogues: corpus.Corpus, on_gpu: bool) -> Trial:
    try:
        return Trial(
            model=model,
            method=method,
            target=target,
            corpus=dialogues,
            seed=job.seed,
            epochs=job.epochs,
            max_steps=job.max_steps,
            max_length=job.max_length,
            device_index=0 if on_gpu else None,
            world_size=ranks.world_size(),
        )
    except ValueError as error:
        raise JobError(str(error)) from error


def _check_same(trial: Trial, before: Interrupted | None, output: Output) -> None:
    """Say what of the interrupted job is gone on with. Raises JobError where it was another one than `trial`."""
    if before is None:
        _say(f"nothing to resume in {output.partial}: starting at the first step")
        return
    for line in before.passed_over:
        _say(line)
    settings = json.loads(json.dumps(record.settings(trial)))
    differ = [key for key in settings if settings[key] != before.settings.get(key)]
    if differ:
        was = ", ".join(f"{key} was {before.settings.get(key)!r} and is {settings[key]!r}" for key in differ)
        raise JobError(
            f"--resume: the job in {before.place} is another one: {was}: give the options it was started with, "
            "or --overwrite without --resume"
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
            mend = "it was none before the first step either: the model's weights hold what is no number"
        _fail(f"{trial.name}: {failed.reason}: {mend}")
        return
    asked = "" if failed.requested_bytes is None else f", where {_size(failed.requested_bytes)} more were asked for"
    where = f" on rank {ranks.rank()}" if ranks.world_size() > 1 else ""
    what = f"{trial.name}: out of memory{where} in {failed.phase}{asked}, of {_size(failed.budget_bytes)}"
    _fail(f"{what}: {_instead(trial, job, device, progress)}")


def _instead(trial: Trial, job: Job, device: Device, progress: Callable[[str], None]) -> str:
    """What to try where `trial` ran out of memory."""
    smaller = "take a smaller --batch-size or --max-length"
    if device.total_bytes is None and trial.target.total_bytes is None:
        return f"{smaller}, or a method that trains less"
    try:
        rows = _forecasts(job, trial.model, trial.target, device, (trial.method.name,), progress)
    except tracer.ForecastError as error:
        return f"{smaller} ({error})"
    row = next((row for row in rows if row["chosen"]), None)
    if row is None:
        return f"no other method is forecast to fit: {smaller}"
    batch = ""
    if row["accumulation"] != methods.named(row["method"]).passes_per_step:
        if row["gpus"] > 1:
            return smaller
        batch = f" --batch-size {row['batch_size']}"
    return f"--method {row['method']}{batch} is forecast to fit, with {_size(row['forecast_reserved_bytes'])}"


def _unwritable(output: Output, why: str) -> OutputError:
    return OutputError(
        f"--output {output.folder}: {why}"
        + (f"; --resume then goes on after step {step_of(output.checkpoint)}" if output.checkpoint else "")
    )


def _say(text: str) -> None:
    if ranks.is_first():
        print(one_line(text), flush=True)


def _fail(text: str) -> None:
    print(f"lightweight: {one_line(text)}", file=sys.stderr, flush=True)


def _size(count: int) -> str:
    return f"{count / GiB:.2f} GiB" if count >= GiB else f"{count / MiB:.0f} MiB"
