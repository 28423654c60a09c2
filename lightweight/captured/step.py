"""The captured step: how fast can fine-tuning be where Python is not in the way?

A stock step launches thousands of small kernels from Python and leaves a large GPU idle most of the time. Here one
optimizer step - every pass of its accumulation, forward and backward, gradient clipping, AdamW, the loss scaler and the
learning-rate schedule - is recorded once as a CUDA graph over static buffers and then replayed. On the CPU, and for a
model that cannot be recorded, the same step runs without the graph.

What is trained is what the Trainer would train: batches in its order, its loss, parameter groups and schedule are all
taken from the `Trainer` object. Before the first step both compute loss and gradients of the job's own first batches;
what of the captured step keeps it from agreeing is given up, and where nothing agrees the Trainer runs the steps.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightweight.preload import peft  # isort: skip  # before Trainer, which imports peft

import torch
from torch.utils.data import BatchSampler
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lightweight.captured import agreement, packing, probes
from lightweight.captured.agreement import (
    Deviation,
    Expected,
    Gradients,
    PartError,
    Parts,
    Reference,
    Sample,
    Tolerance,
)
from lightweight.captured.capture import first_line, on_a_side_stream, recorded, what_cannot_be_captured
from lightweight.captured.kernels import compiling
from lightweight.captured.optimizer import Optimizer, adamw_of
from lightweight.captured.packing import Buffers, Layout, Shape
from lightweight.captured.passes import NOTHING, Passes
from lightweight.internals import torch as torch_internals
from lightweight.internals import transformers as transformers_internals
from lightweight.methods import CapturedStep
from lightweight.training import ranks
from lightweight.training.meter import Meter
from lightweight.training.stock import Row
from lightweight.trial import Trial

PACKING_SHARE = 1 / 8
"""Rows that packing must save, of all: it pays with a mask in every attention, which flash kernels do not take."""

COMPILE_STEPS = 6_000
"""Steps from which torch.compile earns its time back: for opt-350m it took 10 to 16 s and brought a captured step from
12.8 to 10.5 ms (H100, torch 2.11)."""


CAPTURED_STATE = "captured_step.pt"
"""The file of a checkpoint that holds what `Optimizer.state` gives."""


def prepare(trial: Trial, trainer: Trainer, rows: Sequence[Row], meter: Meter) -> CapturedTraining | None:
    """A trial's job, ready to be trained; None, and nothing changed, where the Trainer must run the steps."""
    job = CapturedTraining(trial, trainer, rows, meter)
    return job if job.prepare() else None


class CapturedTraining:
    """A trial's training by the captured step: `prepare` once, then `train`.

    Raises MethodError where the method asks for something that only the Trainer does.
    """

    def __init__(self, trial: Trial, trainer: Trainer, rows: Sequence[Row], meter: Meter) -> None:
        step = trial.method.captured_step
        assert step is not None and trainer.model is not None
        self.trial, self.trainer, self.rows, self.meter, self.step = trial, trainer, rows, meter, step
        self.device = torch.device(trainer.args.device)
        self._passes = Passes(trainer, trial.running_method)
        self.network, self.model = self._passes.network, self._passes.model
        self.loss = torch.zeros((), device=self.device)
        self.notes: list[str] = []
        self.captured = False
        self.compiled = self.device.type == "cuda" and compiles(step, trial.steps)
        self._have_kernels: set[tuple[Parts, bool]] = set()
        self._compiled_layers: list[Any] = []
        self._graphs: dict[Shape, torch.cuda.CUDAGraph] = {}
        self._adamw = adamw_of(trial, trainer)
        self._both: dict[Expected, tuple[Expected, Expected] | None] = {}  # in half precision and in fp32
        self._chaos: float | None = None  # how far half precision moves the Trainer's own gradient, if too far

    def prepare(self) -> bool:
        """Lay the job out in static shapes, see that its step is the Trainer's, warm it up and capture it, leaving no
        trace in what is trained. Whether `train` can follow; where not, the Trainer is to train, from where it was.

        The meter's facts say how the steps will really run. Raises RanksError where they would be the Trainer's and
        there are several ranks, which share what the captured step trains in another way.
        """
        self._prepare_network()
        self._order_rows()
        with agreement.without_trace(self.network):
            agrees = self._agree()
        self.meter.begin_training()
        if agrees:
            self._capture_or_compile()
        self.meter.facts |= {
            "captured": self.captured,
            "compiled": agrees and self.compiled,
            "capture_note": "; ".join(self.notes) or None,
        }
        if not agrees and self.trial.world_size > 1:
            raise ranks.RanksError(f"{self.trial.name}: {self.notes[-1]}: train it on one rank")
        return agrees

    def train(self, checkpoint: Path | None = None) -> None:
        """Train the whole job, from `checkpoint` on where there is one, telling the Trainer's callbacks what the
        Trainer would: so rounds, logs and checkpoints are theirs to ask for."""
        trainer, handler = self.trainer, self.trainer.callback_handler
        if checkpoint is not None:
            trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        arguments, state = trainer.args, trainer.state
        state.is_local_process_zero, state.is_world_process_zero = trainer.is_local_process_zero(), ranks.is_first()
        state.max_steps, state.num_train_epochs = self.trial.steps, self.trial.rounds
        state.compute_steps(arguments, self.trial.steps)
        self._logged = state.global_step
        trainer.control = handler.on_train_begin(arguments, state, trainer.control)
        # dropout's numbers start here, wherever a rehearsal has left them, and are other ones on every rank
        torch.manual_seed(self.trial.seed + ranks.rank())
        if checkpoint is not None:
            self._load(checkpoint)
        for number, epoch in enumerate(self.epochs):
            left = epoch[max(0, state.global_step - number * self.trial.steps_per_epoch) :]
            if not left:
                continue
            trainer.control = handler.on_epoch_begin(arguments, state, trainer.control)
            for layout in left:
                trainer.control = handler.on_step_begin(arguments, state, trainer.control)
                self._run(layout)
                self.meter.add_loss(self.loss.clone())
                # every rank has a shape of its own, and the first one's is the largest
                padded = self._shapes[len(layout.rows)].tokens * self.trial.world_size
                self.meter.add_tokens(layout.tokens, padded)
                state.global_step += 1
                state.epoch = state.global_step / self.trial.steps_per_epoch
                trainer.control = handler.on_step_end(arguments, state, trainer.control)
                self._log_and_save()
                if trainer.control.should_training_stop:
                    break
            trainer.control = handler.on_epoch_end(arguments, state, trainer.control)
            self._log_and_save()
            if trainer.control.should_training_stop:
                break
        self._graphs.clear()
        for layer in self._compiled_layers:
            del layer.forward  # its class's own again: evaluating is not worth compiling for
        self._passes.undo_lean()
        self._optimizer.finish()
        trainer.control = handler.on_train_end(arguments, state, trainer.control)

    # What callbacks ask for

    def _log_and_save(self) -> None:
        trainer, state = self.trainer, self.trainer.state
        if trainer.control.should_log and state.global_step > self._logged:
            losses = self.meter.train_loss[self._logged :]
            trainer.log({"loss": sum(losses) / len(losses), "learning_rate": self._optimizer.rate})
            self._logged = state.global_step
        if trainer.control.should_save:
            self._save()
            trainer.control = trainer.callback_handler.on_save(trainer.args, state, trainer.control)

    def _save(self) -> None:
        """The files of a checkpoint where the Trainer would write them; what `on_save` calls then makes it whole."""
        trainer, state = self.trainer, self.trainer.state
        kept: Any = state.stateful_callbacks
        folder = Path(str(trainer.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        transformers_internals.save_random_numbers(trainer, folder)
        ranks.wait_for_all()
        if not ranks.is_first():
            return
        if isinstance(self.network, peft.PeftModel):
            with self._optimizer.masters_in_place():
                transformers_internals.save_in_checkpoint(trainer, folder)
        torch.save(self._optimizer.state(), folder / CAPTURED_STATE)
        for callback in (*trainer.callback_handler.callbacks, trainer.control):
            if isinstance(callback, ExportableState):
                kept[type(callback).__name__] = callback.state()
        state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _load(self, checkpoint: Path) -> None:
        self._optimizer.load(torch.load(checkpoint / CAPTURED_STATE, map_location="cpu", weights_only=True))
        transformers_internals.load_random_numbers(self.trainer, checkpoint)

    # Before the first step

    def _prepare_network(self) -> None:
        arguments = self.trainer.args
        self.network.train()
        if arguments.gradient_checkpointing:
            self.network.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
            self.network.enable_input_require_grads()

    def _order_rows(self) -> None:
        """The layouts of every epoch, with one dialogue a row and packed, and whether packing is worth its mask."""
        over_step = self.trainer.model_accepts_loss_kwargs
        self._order = self._draw()
        self._alone = [
            [packing.one_a_row(passes, self.rows, over_step=over_step) for passes in epoch] for epoch in self._order
        ]
        self._packed, self._packs = self._alone, False
        if self.step.packing:
            packed = [[packing.packed(layout, self.rows) for layout in epoch] for epoch in self._alone]
            before, after = (
                sum(len(layout.rows) for epoch in epochs for layout in epoch) for epochs in (self._alone, packed)
            )
            self._packs = after <= before * (1 - PACKING_SHARE)
            self.notes.append(f"packing {'makes' if self._packs else 'would make'} {after} rows of {before}")
            if self._packs:
                self._packed = packed

    def _agree(self) -> bool:
        """Take on as many parts as leave the step the Trainer's, and note what others were off. Whether any do."""
        self._reference = Reference(self.trainer, halves=self._precision == "fp16")
        if not self._reference.draws([numbers for passes in self._order[0] for numbers in passes]):
            self.notes.append("the Trainer runs the steps, since it draws other rows than the captured step")
            return False
        self._names = agreement.trained(self.network)
        self._expected = self._expect()
        self.meter.phase = "capture"  # which the Trainer's own steps have left
        self._full = Parts(
            packing=self._packs,
            attention=self.step.attention == "sdpa",
            loss=self._losses[0],
            # A compiler decides by itself what to keep, and autocast casts in the middle of what is one function here.
            lean=self.step.lean and not self.compiled and not self._passes.casts,
        )
        with agreement.nudged(self._names):
            parts, notes = agreement.search(self._full, self._losses, self._deviation)
        if self._chaos is not None and parts is not None:
            moved = f"{self._precision} moves the Trainer's own gradient by {self._chaos:.0e}"
            self.notes.append(f"compared in fp32: {moved}")
        self.notes += notes
        self._use(parts or NOTHING)
        self._expected.clear()
        self._both.clear()
        if parts is None:
            self._optimizer.withdraw()
        return parts is not None

    def _expect(self) -> list[Expected]:
        """What the Trainer makes of the job's first passes as they are, and of its longest and fullest rows: in fp32 in
        the place of halves where it can, since a good deal passes for the rounding of a half."""
        begin, rows = self._samples()
        with agreement.nudged(self._names):
            expected = [Expected(*self._reference.gradients(begin), self._allowed)]
        self._optimizer = Optimizer(self.trial, self.trainer, self._adamw, self.device)
        if self._precision in ("fp16", "bf16"):
            with agreement.nudged(self._names):
                exact = self._reference.in_fp32(rows)
            if exact is not None:
                return [*expected, Expected(rows, exact, agreement.TOLERANCES["fp32 on a GPU"], in_fp32=True)]
            self._optimizer.withdraw()
        with agreement.nudged(self._names):
            expected.append(Expected(*self._reference.gradients(rows), self._allowed))
        self._optimizer = Optimizer(self.trial, self.trainer, self._adamw, self.device)
        return expected

    @property
    def parts(self) -> Parts:
        """What of the captured step its passes are computed with."""
        return self._passes.parts

    @property
    def _losses(self) -> list[agreement.Loss]:
        """The losses to try, in order."""
        own: list[agreement.Loss] = ["model"] if self.trainer.model_accepts_loss_kwargs else ["logits", "model"]
        return ["chunked", "logits", "model"] if self.step.loss == "chunked" else own

    @property
    def _allowed(self) -> Tolerance:
        """What rounding may amount to."""
        return agreement.TOLERANCES[self._precision]

    @property
    def _precision(self) -> str:
        """The coarsest arithmetic of the step, a key of agreement.TOLERANCES."""
        method = self.trial.running_method
        dtypes = {parameter.dtype for parameter in self.model.parameters()}
        dtypes.add(getattr(method.quantization, "bnb_4bit_compute_dtype", None))
        if method.precision == "bf16" or torch.bfloat16 in dtypes:
            return "bf16"
        if method.precision == "fp16" or torch.float16 in dtypes:
            return "fp16"
        if self.device.type != "cuda":
            return "fp32"
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32 on a GPU"

    def _samples(self) -> list[Sample]:
        layouts = [layout for epoch in self._packed for layout in epoch]
        return agreement.samples(layouts, self._order[0][0], self.rows, self.trial.method.sequences_per_pass)

    def _use(self, parts: Parts) -> None:
        """Run steps with `parts` from now on. Raises what `Passes.use` raises."""
        self._passes.use(parts, self._allowed)
        self._lay_out()

    def _deviation(self, parts: Parts) -> Deviation:
        """How far a step with `parts` is from the Trainer's, over the samples; the first that is too far."""

        def take_on() -> None:
            self._use(parts)
            if parts.packing:
                self._check_dialogues_are_apart()
                probes.check_positions(self.network, self._passes.autocast)

        off = Deviation(error=self._problem_of(take_on, asked_for=parts == self._full))
        for expected in self._expected:
            if off.is_rounding:
                off = self._deviation_from(expected, parts)
        return off

    def _deviation_from(self, expected: Expected, parts: Parts) -> Deviation:
        ours, problem = self._computed(expected, parts)
        if ours is None:
            return Deviation(error=problem)
        chaotic = expected.in_fp32 and self._chaos is not None
        allowed = agreement.CHAOTIC if chaotic else expected.allowed
        off = agreement.deviation(ours, expected.gradients, self._names, allowed)
        if off.is_rounding or expected.in_fp32 or self._precision not in ("fp16", "bf16"):
            return off
        return self._beyond_rounding(expected, ours, parts) or off

    def _beyond_rounding(self, expected: Expected, ours: Gradients, parts: Parts) -> Deviation | None:
        """How far a step with `parts` is from the Trainer's where both are computed in fp32, since `ours` in half
        precision are too far from what is `expected`. None where they cannot be, and where the Trainer's halves are not
        too far from its own fp32 as well."""
        if expected not in self._both:
            self._use(NOTHING)
            self._both[expected] = self._in_both(expected)
            self._use(parts)
        both = self._both[expected]
        if both is None:
            return None
        halves, exact = both
        if halves is not expected:  # of fewer dialogues
            fewer, _ = self._computed(halves, parts)
            if fewer is None:
                return None
            ours = fewer
        theirs, own = (
            agreement.deviation(each, exact.gradients, self._names, expected.allowed)
            for each in (halves.gradients, ours)
        )
        # two gradients that both are nothing but rounding still are of one size, more or less
        if theirs.is_rounding or own.gradient > 10 * theirs.gradient or own.loss > 10 * theirs.loss + own.allowed.loss:
            return None
        self._chaos = theirs.gradient
        return self._deviation_from(exact, parts)

    def _in_both(self, expected: Expected) -> tuple[Expected, Expected] | None:
        """What the Trainer makes of as many of the `expected` dialogues as there is memory for in fp32, in half
        precision and in fp32; None where there is none."""
        sample = expected.sample
        while (exact := self._reference.in_fp32(sample)) is None:
            if sample.size == 1:
                return None
            sample = sample.first(sample.size // 2)
        if sample is not expected.sample:
            expected = Expected(*self._reference.gradients(sample), expected.allowed)
        return expected, Expected(sample, exact, agreement.CHAOTIC, in_fp32=True)

    def _computed(self, expected: Expected, parts: Parts) -> tuple[Gradients | None, str | None]:
        """All ranks' loss and gradients of a sample by a step with `parts`, in the arithmetic of what is `expected`; or
        None, and what keeps any of them from it, in one line."""
        own: list[Gradients] = []

        def compute() -> None:
            with self._passes.fp32() if expected.in_fp32 else contextlib.nullcontext():
                own.append(self._sampled(expected.sample, expected.gradients.scale))
                agreement.drop_gradients(self.network)  # before weights are halves again

        problem = self._problem_of(compute, asked_for=parts == self._full and not expected.in_fp32)
        return (None, problem) if problem else (own[0].over_ranks(self._names), None)

    def _check_dialogues_are_apart(self) -> None:
        """Raise PartError where what shares a row is not apart, by the row with the most dialogues."""
        row = max((row for epoch in self._packed for layout in epoch for row in layout.rows), key=len)
        layout = Layout([row], dict.fromkeys(row, 1.0), 0)
        buffers = Buffers(packing.exact_shapes([layout], self.rows, 1)[1], self.device)
        buffers.fill(layout, self.rows)
        own = buffers.dialogues[0, 0] == row[1]
        embeddings = self.model.get_input_embeddings()
        probes.check_dialogues_are_apart(self.network, embeddings, lambda: self._passes.logits(buffers, 0)[0], own)

    def _problem_of(self, act: Callable[[], None], *, asked_for: bool) -> str | None:
        """What keeps any rank from `act`, in one line. Raises torch.OutOfMemoryError where what acts was `asked_for`:
        training would run out of memory as well, since it holds more."""
        problem = None
        try:
            with torch_internals.no_hooks_left():
                act()
        except torch.OutOfMemoryError:
            if asked_for:
                raise
            problem = "out of memory"
        except PartError as error:
            problem = str(error)
        except Exception as error:  # noqa: BLE001  of any kind: the part is switched off, and the note says why
            problem = f"its step fails ({type(error).__name__}: {first_line(error)[:160]})"
        agreement.drop_gradients(self.network)
        (any_failed,) = ranks.any_says(problem is not None, device=self.device)
        return problem or ("another rank cannot" if any_failed else None)

    def _sampled(self, sample: Sample, scale: float) -> Gradients:
        """This rank's share of the captured step's loss and gradients of `sample`."""
        layout = packing.one_a_row(sample.passes, self.rows, over_step=self.trainer.model_accepts_loss_kwargs)
        if self.parts.packing:
            layout = replace(layout, rows=sample.rows)
        layout = packing.share(layout, ranks.rank(), self.trial.world_size)
        shape = packing.holding(layout, self.rows, () if self._has_trainers_passes else self._shapes.values())
        if shape is None:
            (shape,) = self._shaped([layout]).values()
        buffers = Buffers(shape, self.device)
        buffers.fill(layout, self.rows)
        with self._optimizer.scaling_by(scale):
            if self.device.type == "cuda":
                self._compile_kernels(buffers)
            self._backward(buffers)
        return Gradients(self.loss.clone(), self._optimizer.gradients_of_weights(), scale)

    @property
    def _has_trainers_passes(self) -> bool:
        """Whether a step must have the Trainer's own passes, since the model computes its loss over one of them."""
        return self.parts.loss == "model" and not self.parts.packing

    def _lay_out(self) -> None:
        """The layouts of every epoch, and the static shape that each of them runs in."""
        self.epochs = self._packed if self.parts.packing else self._alone
        world_size = self.trial.world_size
        if world_size > 1:
            self.epochs = [[packing.share(layout, ranks.rank(), world_size) for layout in e] for e in self.epochs]
        self._shapes = self._shaped([layout for epoch in self.epochs for layout in epoch])
        self._buffers = {shape: Buffers(shape, self.device) for shape in self._shapes.values()}

    def _shaped(self, layouts: list[Layout]) -> dict[int, Shape]:
        rows_per_pass = self.trial.running_method.sequences_per_pass
        if self._has_trainers_passes:
            return packing.exact_shapes(layouts, self.rows, rows_per_pass)
        return packing.shapes(layouts, self.rows, rows_per_pass, most=1 if self.compiled else None)

    def _draw(self) -> list[list[list[list[int]]]]:
        """epoch -> optimizer step -> pass -> numbers of its rows, as the Trainer would draw them on one rank."""
        sampler, size = ranks.draws(self.trainer, self.rows), self.trial.method.sequences_per_pass
        accumulation = self.trial.method.sequences_per_step // size
        epochs, left = [], self.trial.steps
        for epoch in range(self.trial.rounds):
            sampler.set_epoch(epoch)  # as the Trainer does: the order follows from the seed and the epoch's number
            passes = [list(numbers) for numbers in BatchSampler(sampler, size, drop_last=False)]
            steps = [passes[start : start + accumulation] for start in range(0, len(passes), accumulation)]
            epochs.append(steps[:left])
            left -= len(epochs[-1])
        return epochs

    def _capture_or_compile(self) -> None:
        if self.device.type != "cuda":
            self.notes.append("no GPU: the same step without a graph")
        elif self.step.graph:
            with self._optimizer.rehearsing():
                self.captured = self._capture()
        if not self.captured:
            self._graphs.clear()
            self._compile()

    def _capture(self) -> bool:
        """Record a graph for each shape, all in one memory pool, the largest first. Whether it could be done."""
        examples = {self._shapes[len(layout.rows)]: layout for epoch in self.epochs for layout in epoch}
        pool = None
        for shape, layout in sorted(examples.items(), key=lambda item: -item[0].passes * item[0].rows):
            buffers = self._buffers[shape]
            buffers.fill(layout, self.rows)
            with on_a_side_stream():
                if pool is None:
                    self._compile_kernels(buffers)
                self._step(buffers)  # libraries initialise themselves, and the optimizer its state
                if pool is None:
                    if problem := what_cannot_be_captured(self.network, functools.partial(self._step, buffers)):
                        self.notes.append(f"uncaptured: {problem}")
                        return False
                    self._compile()
                if self.compiled:
                    self._step(buffers)
                    self._step(buffers)
            self._optimizer.clear_gradients()
            try:
                graph = recorded(functools.partial(self._step, buffers), pool, several_ranks=self.trial.world_size > 1)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.notes.append(f"uncaptured: {type(self.model).__name__}: {first_line(error)}")
                return False
            pool = graph.pool()
            self._graphs[shape] = graph
        return True

    def _compile_kernels(self, buffers: Buffers) -> None:
        """A pass that computes nothing of use: Triton then compiles at once what it would else meet one by one."""
        kernels = (self.parts, self._passes.in_fp32)
        if kernels in self._have_kernels:
            return
        self._have_kernels.add(kernels)
        self._optimizer.clear_gradients()
        with compiling():
            self._pass(buffers, 0)

    def _compile(self) -> None:
        """Compile the layers one by one: they are alike, so that what one of them costs serves all."""
        if not self.compiled or self._compiled_layers:
            return
        names = transformers_internals.layers_not_split(self.model)
        self._compiled_layers = [module for module in self.model.modules() if type(module).__name__ in names]
        for layer in self._compiled_layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)
        self.compiled = bool(self._compiled_layers)

    # The step

    def _run(self, layout: Layout) -> None:
        shape = self._shapes[len(layout.rows)]
        self._buffers[shape].fill(layout, self.rows)
        if self.captured:
            self._graphs[shape].replay()
        else:
            self._step(self._buffers[shape])

    def _step(self, buffers: Buffers) -> None:
        """One optimizer step over what `buffers` hold; `self.loss` is then its loss. Nothing in it may wait for the
        device."""
        self._backward(buffers)
        if self.trial.world_size > 1:
            ranks.add_up([self.loss, *self._optimizer.gradients()])
        self._optimizer.step()

    def _backward(self, buffers: Buffers) -> None:
        """Forward and backward passes of a step on this rank."""
        self._optimizer.clear_gradients()
        self.loss.zero_()
        for index in range(buffers.shape.passes):
            self._pass(buffers, index)

    def _pass(self, buffers: Buffers, index: int) -> None:
        """Forward and backward pass `index` of a step."""
        loss = self._passes.loss(buffers, index)
        self._optimizer.backward(loss)
        self.loss += loss.detach()


def compiles(step: CapturedStep, steps: int) -> bool:
    """Whether a job of that many optimizer steps is compiled: as `step` says, else where it earns its time back."""
    return steps >= COMPILE_STEPS if step.compile is None else step.compile
