"""Inside the child: one trial from its first allocation to its outcome.

Requests come and reports go over a pipe; stdout and stderr belong to the libraries and go into a log file, whose end
becomes a crash's last words. Imports no pytest, no plugin and no report.
"""

from __future__ import annotations

import faulthandler
import gc
import math
import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from lightweight import preload  # isort: skip  # noqa: F401  # before Trainer, which imports peft

import torch
import transformers

from lightweight import corpus, methods, models
from lightweight.captured import attention, launching, loop, offload
from lightweight.child.failure import outcome_of
from lightweight.child.process import lead_a_group, log_of, redirect_output, see_gpus
from lightweight.internals.bitsandbytes import never_repack
from lightweight.internals.transformers import call_first, loaded_one_by_one
from lightweight.targets import Device
from lightweight.training import answers, ranks, stock, unsloth
from lightweight.training.heldout import heldout_loss
from lightweight.training.meter import DivergedError, Meter
from lightweight.training.rounds import Request, Rounds
from lightweight.trial import Completed, Measurements, Outcome, Phase, Trial


@dataclass(frozen=True)
class Ready:
    """Built, evaluated, and the training set up; the first round may be asked for."""

    measured: Measurements


@dataclass(frozen=True)
class StepEnded:
    """Optimizer step `step` (from 1) has ended; `loss` is the newest one known."""

    step: int
    loss: float | None


@dataclass(frozen=True)
class Entered:
    """The trial entered a phase."""

    phase: Phase


@dataclass(frozen=True)
class Preparing:
    """How far something is that takes long before the first step, in a line."""

    text: str


@dataclass(frozen=True)
class RoundEnded:
    """The round asked for has ended and the device is idle."""

    measured: Measurements


Report = Ready | StepEnded | Entered | Preparing | RoundEnded | Outcome


def describe_device(index: int) -> Device:
    """The GPU at `index` among the visible ones. Initialises CUDA, so only a child may call it."""
    import pynvml

    properties = torch.cuda.get_device_properties(index)
    pynvml.nvmlInit()
    driver = pynvml.nvmlSystemGetDriverVersion()
    pynvml.nvmlShutdown()
    return Device(
        name=properties.name,
        total_bytes=properties.total_memory,
        capability=(properties.major, properties.minor),
        driver=driver,
    )


def take_device(trial: Trial) -> torch.device:
    """The device of this process's rank of `trial`, from now on CUDA's current one."""
    if trial.device_index is None:
        return torch.device("cpu")
    device = torch.device("cuda", ranks.local_rank())
    if trial.world_size > 1:
        torch.cuda.set_device(device)
    return device


def run(
    connection: Connection,
    trial: Trial,
    folder: Path,
    started: float,
    environment: Mapping[str, str] | None = None,
    tells_steps: bool = True,
) -> None:
    """Run `trial`, or one rank of it, answering requests on `connection`; the last report is the Outcome.

    `folder` exists and is the trial's own; `started` is the owner's `time.monotonic()` when it started this process.
    `environment` says which rank this is, where there are several. Steps are reported where it `tells_steps`. SIGUSR1
    has it write where it is into its log.
    """
    meter = None
    try:
        device = _begin(trial, folder, environment or {})
        meter = Meter(device, start_seconds=time.monotonic() - started)
        outcome: Outcome = _complete(trial, device, folder, meter, _OwnersEnd(connection, meter, tells_steps))
    except _OwnerGoneError:
        return
    except Exception as error:  # noqa: BLE001  it is the outcome
        with suppress(OSError):  # the disk of its log may be full
            traceback.print_exc()
        outcome = outcome_of(error, trial, meter, folder)
    with suppress(OSError):
        connection.send(outcome)


def _begin(trial: Trial, folder: Path, environment: Mapping[str, str]) -> torch.device:
    """Make this process a rank of `trial`, its output going to a log in `folder`; the rank's device."""
    lead_a_group()
    os.environ.update(environment)
    redirect_output(log_of(ranks.rank(), folder))
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    see_gpus(*((0, 0) if trial.device_index is None else (trial.device_index, trial.world_size)))
    gc.freeze()  # what the forkserver has imported is never garbage, and looking through it falls into single rounds
    if trial.threads is not None:
        torch.set_num_threads(trial.threads)
    ranks.share_threads()
    return take_device(trial)


def _complete(trial: Trial, device: torch.device, folder: Path, meter: Meter, owner: _OwnersEnd) -> Completed:
    """Train `trial` at its owner's pace, evaluate it and save it."""
    transformers.utils.logging.disable_progress_bar()
    owner.enter("build")
    trial, trainer, train_rows, heldout = set_up(trial, device, meter, owner, folder, owner.tell)
    train(trial, trainer, train_rows, heldout, meter, owner.enter)
    owner.await_request("finish")
    owner.enter("evaluate")
    evaluate(trainer, heldout, meter)
    owner.enter("save")
    with meter.during("save"):
        trainer.save_model(str(folder / "saved"))
        ranks.wait_for_all()  # a rank that ends takes along what the first one is still gathering from it
    if ranks.is_first():
        meter.facts["saved_bytes"] = sum(file.stat().st_size for file in (folder / "saved").iterdir())
    return Completed(measured=meter.measurements())


class Heldout(NamedTuple):
    """What nothing is trained on: rows of the corpus's examples and of plain text from elsewhere, and questions, with
    the tokenizer that their answers are read with."""

    examples: list[corpus.Row]
    elsewhere: list[corpus.Row]
    questions: answers.Questions = answers.Questions()
    tokenizer: Any = None


class Prepared(NamedTuple):
    """A trial before its first step: it, knowing its rows; the Trainer over its network, the training rows, and what is
    held out."""

    trial: Trial
    trainer: transformers.Trainer
    rows: corpus.Rows
    heldout: Heldout


def set_up(
    trial: Trial,
    device: torch.device,
    meter: Meter,
    rounds: Rounds,
    folder: Path,
    progress: Callable[[str], None] = lambda text: None,
    **overrides: Any,
) -> Prepared:
    """Everything before the first step; `progress` is told how far the encoding of a long corpus is. `overrides` are
    TrainingArguments, as for `stock.make_trainer`. Raises CorpusError where no example fits into a row, and what the
    parts raise."""
    with meter.during("build"):
        if device.type == "cuda":
            _cap_memory(trial)
        step = trial.method.captured_step
        if step is not None and step.attention == "sdpa":
            attention.disable_cudnn()
        if step is not None and step.graph and device.type == "cuda":
            launching.warm_up()
        transformers.set_seed(trial.seed)
        network = build(trial, device)
        tokenizer = models.load_tokenizer(trial.model)
        training = _encoded(trial, trial.corpus.train, tokenizer, progress)
        trial = trial.with_rows(len(training.rows))
        heldout = Heldout(
            _encoded(trial, trial.corpus.heldout, tokenizer, progress).rows,
            corpus.encode_text(trial.corpus.elsewhere or "", tokenizer, trial.max_length),
            answers.encode(trial.corpus.task, tokenizer),
            tokenizer,
        )
        ids = [row["input_ids"] for row in (*training.rows, *heldout.examples, *heldout.elsewhere)]
        models.check_rows(
            trial.model,
            network.config,
            longest=max(
                trial.max_length if trial.pads_to_max else max(map(len, ids)),
                heldout.questions.longest,
            ),
            largest=max(int(of_row.max()) for of_row in ids),
        )
        padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        rows = corpus.Rows(training.rows, padding, trial.max_length if trial.pads_to_max else None)
        ranks.meet(cpu=device.type == "cpu")
        trainer = stock.make_trainer(trial, network, rows, meter, rounds, folder, **overrides)
    meter.facts = {
        "parameters": models.count_parameters(network),
        "trainable_parameters": models.count_parameters(network, trainable=True),
        "flop_per_token": models.flop_per_token(network, _context(training.rows)),
        "adapted_layers": methods.adapted_layers(network),
        "base_quantization": models.quantization_of(network),
        "training_rows": len(training.rows),
        "example_tokens": {str(bound): count for bound, count in corpus.histogram(training.tokens).items()},
        "truncated_sequences": training.truncated,
        "split_examples": training.split,
        "dropped_examples": training.dropped,
    }
    return Prepared(trial, trainer, rows, heldout)


def _context(rows: Sequence[corpus.Row]) -> float:
    """The tokens of the row that a token is of, in the mean over tokens."""
    lengths = [len(row["input_ids"]) for row in rows]
    return sum(length**2 for length in lengths) / sum(lengths)


def _encoded(
    trial: Trial, examples: Sequence[corpus.Example], tokenizer: Any, progress: Callable[[str], None]
) -> corpus.Encoded:
    encoded = corpus.encode_all(examples, tokenizer, trial.row_form, progress)
    if not encoded.rows:
        which = "to train on" if examples is trial.corpus.train else "held out"
        raise corpus.CorpusError(
            f"corpus: each of its {len(examples)} examples {which} "
            f"is longer than {trial.max_length} tokens and was dropped: cut or split them, or take a larger max_length"
        )
    return encoded


def evaluate(trainer: transformers.Trainer, heldout: Heldout, meter: Meter) -> None:
    """Add the losses on what is held out, as they are now, to the meter's. Raises DivergedError where what has been
    trained gives none that is finite; before training the first step's loss says so."""
    with meter.during("evaluate"):
        meter.heldout_losses.append(loss := heldout_loss(trainer, heldout.examples))
        if heldout.elsewhere:
            meter.elsewhere_losses.append(heldout_loss(trainer, heldout.elsewhere))
        if heldout.questions.each:
            assert trainer.model is not None
            attention.give_back(trainer.model)  # after training; losses were taken with what has trained
            meter.task_matches.append(answers.matches(trainer, heldout.questions, heldout.tokenizer))
        if meter.steps and not math.isfinite(loss):
            raise DivergedError(meter.steps, f"held-out loss is {loss}")


def train(
    trial: Trial,
    trainer: transformers.Trainer,
    rows: corpus.Rows,
    heldout: Heldout,
    meter: Meter,
    enter: Callable[[Phase], None],
    checkpoint: Path | None = None,
) -> None:
    """Evaluate, and train the whole job, by the Trainer or by the captured step as the method says, where that is the
    Trainer's step; from `checkpoint` on, where there is one, which has been evaluated. `enter` is told of every phase.
    """

    def begin() -> None:
        if checkpoint is None:
            enter("evaluate")
            evaluate(trainer, heldout, meter)
        meter.begin_training()
        enter("train" if trial.method.captured_step is None else "capture")

    if trial.method.captured_step is None:
        if trial.is_sharded:  # no rank has the network until the Trainer has dealt it out
            call_first(trainer, _Begin(begin, meter))
        else:
            begin()
        with meter.during("train"):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    else:
        begin()
        with meter.during("capture"):
            job = loop.prepare(trial, trainer, rows, meter)
        if checkpoint is not None:
            _check_kind(trial, checkpoint, is_captured=job is not None)
        enter("train")
        with meter.during("train"):
            if job is not None:
                job.train(checkpoint)
            else:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    meter.end_training()
    stock.tell_what_was_seen(trial, trainer, rows, meter)


def _check_kind(trial: Trial, checkpoint: Path, *, is_captured: bool) -> None:
    """Raise MethodError where a checkpoint is of the other step than the one that would go on: their optimizers' states
    differ, and on another machine the check of the captured step may have come out otherwise."""
    if (checkpoint / loop.CAPTURED_STATE).is_file() != is_captured:
        now, then = ("captured step", "Trainer") if is_captured else ("Trainer", "captured step")
        raise methods.MethodError(
            f"--resume: {trial.name}: {checkpoint} was saved by the {then}, and here the {now} runs the steps: "
            "resume where it was begun, or start again with --overwrite and without --resume"
        )


class _Begin(transformers.TrainerCallback):
    """Calls `begin` when the Trainer has everything in its place, before the first step."""

    def __init__(self, begin: Callable[[], None], meter: Meter) -> None:
        self._begin, self._meter = begin, meter

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        with self._meter.waiting():  # it has phases of its own
            self._begin()
        self._meter.phase = "train"


def build(trial: Trial, device: torch.device) -> torch.nn.Module:
    """The network of a trial on `device`, quantized and with its adapter on; for a captured step without peft's upcasts
    to fp32, unless it asks for them. One that is going to be sharded stays in the host's memory until then, but for
    4-bit weights, which are made on the device. Raises ModelError and MethodError, and TypeError for bf16 on a target
    without it."""
    method, step = trial.running_method, trial.method.captured_step
    quantization = methods.settle_quantization(
        trial.model, models.configuration_beside_weights(trial.model), method, sharded=trial.is_sharded
    )
    if method.library == "unsloth":
        return unsloth.build(trial, device, quantization)
    if trial.is_sharded and quantization is None:
        device = torch.device("cpu")
    dtype = getattr(torch, method.weights_dtype)
    leaves = step is not None and step.offload
    with loaded_one_by_one() if leaves else nullcontext():
        network = models.load(trial.model, dtype, device, quantization, in_order=step is not None)
    network = methods.adapt(method, network, upcast=step is None or step.upcast)
    if leaves:
        offload.keep_embedding_on_the_host(network)
    if device.type == "cpu":
        never_repack(network)
    if not trial.target.bf16:
        for name, tensor in network.state_dict().items():
            if tensor.dtype == torch.bfloat16:
                raise TypeError(f"{name} is bfloat16, which target {trial.target.name} does not have: use float16")
    return network  # type: ignore[no-any-return]


def _cap_memory(trial: Trial) -> None:
    """Let the allocator reserve no more than the target has; before the first allocation."""
    properties = torch.cuda.get_device_properties()
    if trial.target.emulated_on(properties.name):
        assert trial.target.budget_bytes is not None
        total_bytes = torch.cuda.mem_get_info()[1]  # what the allocator multiplies the fraction with
        torch.cuda.set_per_process_memory_fraction(trial.target.budget_bytes / total_bytes)


class _OwnerGoneError(Exception):
    """The process that owns this trial has closed its end of the pipe."""


class _OwnersEnd:
    """The trial's owner at the other end of the pipe."""

    def __init__(self, connection: Connection, meter: Meter, tells_steps: bool) -> None:
        self.connection, self.meter, self.tells_steps = connection, meter, tells_steps

    def report(self, report: Report) -> None:
        try:
            self.connection.send(report)
        except OSError as error:
            raise _OwnerGoneError from error

    def enter(self, phase: Phase) -> None:
        self.report(Entered(phase))

    def tell(self, text: str) -> None:
        if ranks.is_first():
            self.report(Preparing(text))

    def await_request(self, request: Request) -> None:
        while (received := self._receive()) != request:
            if received != "round":
                raise RuntimeError(f"training goes on after step {self.meter.steps}, the last of its trial")
            self.round_ended()  # the method has ended training early: what is left of the job is nothing

    def _receive(self) -> Any:
        with self.meter.waiting():
            try:
                return self.connection.recv()
            except (EOFError, OSError) as error:
                raise _OwnerGoneError from error

    def training_began(self) -> None:
        self.report(Ready(self.meter.measurements()))

    def step_ended(self) -> None:
        if self.tells_steps:
            self.report(StepEnded(self.meter.steps, self.meter.latest_loss))

    def round_ended(self) -> None:
        self.report(RoundEnded(self.meter.measurements()))
