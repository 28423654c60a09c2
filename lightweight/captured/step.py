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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightweight.preload import peft  # isort: skip  # before Trainer, which imports peft

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lightweight.captured import agreement, attention, packing
from lightweight.captured.agreement import Deviation, Gradients, PartError, Parts, Reference, Sample, Tolerance
from lightweight.captured.cross_entropy import linear_cross_entropy
from lightweight.captured.frozen import Lean, compiling
from lightweight.captured.optimizer import Optimizer, adamw_of
from lightweight.captured.packing import Buffers, Layout, Shape
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


NOTHING = Parts(packing=False, attention=False, loss="model", lean=False)
"""A step of the model's own."""

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
        self.network: Any = trainer.model
        # without peft around it; the adapters are inside
        self.model: Any = trainer.model.get_base_model() if isinstance(trainer.model, peft.PeftModel) else trainer.model
        self.loss = torch.zeros((), device=self.device)
        self.notes: list[str] = []
        self.captured = False
        self.compiled = self.device.type == "cuda" and compiles(step, trial.steps)
        self.parts = NOTHING
        self._in_fp32 = False
        self._have_kernels: set[tuple[Parts, bool]] = set()
        self._compiled_layers: list[Any] = []
        self._lean: Lean | None = None
        self._undo_attention: Callable[[], None] | None = None
        self._graphs: dict[Shape, torch.cuda.CUDAGraph] = {}
        self._adamw = adamw_of(trial, trainer)

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
        self._lean_on(False)
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
        trainer._save_rng_state(str(folder))
        ranks.wait_for_all()
        if not ranks.is_first():
            return
        if isinstance(self.network, peft.PeftModel):
            with self._optimizer.masters_in_place():
                trainer.save_model(str(folder), _internal_call=True)
        torch.save(self._optimizer.state(), folder / CAPTURED_STATE)
        for callback in (*trainer.callback_handler.callbacks, trainer.control):
            if isinstance(callback, ExportableState):
                kept[type(callback).__name__] = callback.state()
        state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _load(self, checkpoint: Path) -> None:
        self._optimizer.load(torch.load(checkpoint / CAPTURED_STATE, map_location="cpu", weights_only=True))
        self.trainer._load_rng_state(str(checkpoint))

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
        self._exact: dict[int, Gradients | None] = {}  # in fp32
        self._rounding: str | None = None
        if not self._reference.draws([numbers for passes in self._order[0] for numbers in passes]):
            self.notes.append("the Trainer runs the steps, since it draws other rows than the captured step")
            return False
        self._names = agreement.trained(self.network)
        with agreement.nudged(self._names):
            self._expected = [self._reference.gradients(sample) for sample in self._samples()]
        self.meter.phase = "capture"  # which the Trainer's own steps have left
        self._optimizer = Optimizer(self.trial, self.trainer, self._adamw, self.device)
        self._full = Parts(
            packing=self._packs,
            attention=self.step.attention == "sdpa",
            loss=self._losses[0],
            # A compiler decides by itself what to keep, and autocast casts in the middle of what is one function here.
            lean=self.step.lean and not self.compiled and isinstance(self._autocast(), contextlib.nullcontext),
        )
        with agreement.nudged(self._names):
            parts, notes = agreement.search(self._full, self._losses, self._deviation)
        self.notes += notes if self._rounding is None or parts is None else [self._rounding, *notes]
        self._use(parts or NOTHING)
        self._expected.clear()
        self._exact.clear()
        if parts is None:
            self._optimizer.withdraw()
        return parts is not None

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
        """Run steps with `parts` from now on. Raises what a part raises that cannot be had."""
        self._lean_on(False)
        if self._undo_attention is not None:
            self._undo_attention()
        self._undo_attention = None
        self.parts = parts
        if parts.attention:
            self._undo_attention = attention.install(self.model)
        if parts.loss != "model":
            self._check_loss()
        if parts.loss == "chunked":
            self._check_head()
        self._lean_on(parts.lean)
        self._lay_out()

    def _lean_on(self, wanted: bool) -> None:
        """Give frozen layers their lean forward passes, for the number formats that the network has now; or back their
        own."""
        if self._lean is not None:
            self._lean.undo()
        self._lean = Lean(self.model) if wanted else None

    def _check_loss(self) -> None:
        """Raise PartError unless the model's loss is the cross-entropy of its own logits. Both are of one forward pass
        here, so that half precision hides no small further loss, as a router's balance is."""
        ids = torch.arange(1, 9, device=self.device).unsqueeze(0)
        with torch.no_grad(), self._autocast():
            output = self.network(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False)
        expected = cross_entropy(output.logits[0, -ids.shape[1] : -1].float(), ids[0, 1:])
        off = ((output.loss - expected).abs() / expected).item()
        # some take the mean in half precision
        if not off <= (agreement.TOLERANCES["fp32"] if output.loss.dtype == torch.float32 else self._allowed).loss:
            raise PartError(f"the model's loss is {off:.0e} off the cross-entropy of its logits")

    def _check_head(self) -> None:
        """Raise PartError unless the network's logits are its body's output times its head: a soft cap after it leaves
        small logits nearly as they are, so that loss and gradients do not show it before training has enlarged them."""
        head = self.model.get_output_embeddings()
        if type(head) is not torch.nn.Linear:
            raise PartError(f"its head is a {type(head).__module__.split('.')[0]}.{type(head).__name__}")
        ids = torch.arange(1, 9, device=self.device).unsqueeze(0)
        logits: list[torch.Tensor] = []

        def enlarge(module: torch.nn.Module, arguments: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            logits.append(output * (100 / output.abs().max()))
            return logits[0]

        hook = head.register_forward_hook(enlarge)
        try:
            with torch.no_grad(), self._autocast():
                found = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        finally:
            hook.remove()
        if found.shape != logits[0].shape or not torch.allclose(found.float(), logits[0].float(), rtol=1e-2, atol=1e-3):
            raise PartError("its head is not the last thing it does")

    def _deviation(self, parts: Parts) -> Deviation:
        """How far a step with `parts` is from the Trainer's, over the samples; the first that is too far."""

        def take_on() -> None:
            self._use(parts)
            if parts.packing:
                self._check_dialogues_are_apart()
                self._check_positions()

        off = Deviation(error=self._problem_of(take_on, parts))
        for number, (sample, expected) in enumerate(self._expected):
            if not off.is_rounding:
                break
            ours, problem = self._computed(sample, expected.scale, parts)
            if ours is None:
                return Deviation(error=problem)
            off = agreement.deviation(ours, expected, self._names, self._allowed)
            # of the last sample, the smallest, always: a good deal passes for the rounding of a half
            if self._precision in ("fp16", "bf16") and (not off.is_rounding or number == len(self._expected) - 1):
                off = self._deviation_in_fp32(number, ours, off, parts)
        return off

    def _deviation_in_fp32(self, number: int, ours: Gradients, off: Deviation, parts: Parts) -> Deviation:
        """How far a step with `parts` is from the Trainer's over sample `number` where both are computed in fp32. Where
        they cannot be, `off`, the deviation of `ours` in half precision; and where `ours` are so much further from the
        Trainer's in fp32 than its own halves are that rounding does not explain it."""
        sample, expected = self._expected[number]
        if number not in self._exact:
            self._use(NOTHING)
            self._exact[number] = self._reference.in_fp32(sample)
            self._use(parts)
        exact = self._exact[number]
        if exact is None:
            return off
        halves = agreement.deviation(expected, exact, self._names, self._allowed)
        if not off.is_rounding:
            own = agreement.deviation(ours, exact, self._names, self._allowed)
            # two gradients that both are nothing but rounding still are of the same size, more or less
            if not (own.gradient <= 10 * halves.gradient and own.loss <= 2 * halves.loss + self._allowed.loss):
                return off
        with self._fp32():
            in_fp32, _ = self._computed(sample, 1.0, parts)
        if in_fp32 is None:
            return off
        if halves.is_rounding:
            return agreement.deviation(in_fp32, exact, self._names, agreement.TOLERANCES["fp32 on a GPU"])
        moves = f"{self._precision} moves the Trainer's own gradient by {halves.gradient:.0e}"
        self._rounding = f"compared in fp32: {moves}"
        return agreement.deviation(in_fp32, exact, self._names, agreement.CHAOTIC)

    @contextlib.contextmanager
    def _fp32(self) -> Iterator[None]:
        """Inside, steps are computed in fp32 throughout."""
        self._in_fp32 = True
        try:
            with agreement.in_fp32(self.trainer):
                self._lean_on(self._lean is not None)
                yield
        finally:
            self._in_fp32 = False
            self._lean_on(self._lean is not None)

    def _computed(self, sample: Sample, scale: float, parts: Parts) -> tuple[Gradients | None, str | None]:
        """All ranks' loss and gradients of `sample` by a step with `parts`; or None, and what keeps any of them from
        it, in one line."""
        own: list[Gradients] = []
        problem = self._problem_of(functools.partial(self._sampled, sample, scale, own), parts)
        agreement.drop_gradients(self.network)
        return (None, problem) if problem else (own[0].over_ranks(self._names), None)

    def _check_dialogues_are_apart(self) -> None:
        """Raise PartError where a dialogue's gradient reaches another one in its row, by whatever way: a state that is
        carried along, a mask that is not asked for. What a mask hides has a gradient of exactly 0 in every precision,
        where the difference that a little state makes to the step may be less than half precision's rounding."""
        rows = (row for epoch in self._packed for layout in epoch for row in layout.rows)
        row = max(rows, key=len)
        layout = Layout([row], dict.fromkeys(row, 1.0), 0)
        buffers = Buffers(packing.exact_shapes([layout], self.rows, 1)[1], self.device)
        buffers.fill(layout, self.rows)
        embedded: list[torch.Tensor] = []

        def begin_here(module: torch.nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[-1].clone()  # some networks write into what they embedded

        hook = self.model.get_input_embeddings().register_forward_hook(begin_here)
        try:
            inputs, dialogues = self._inputs(buffers, 0)
            with attention.packed(dialogues), self._autocast():
                logits = self.network(**inputs, use_cache=False).logits[0, -buffers.shape.time :]
        finally:
            hook.remove()
        own = buffers.dialogues[0, 0] == row[1]
        # weighed differently, or the sum of what a softmax or a norm gives might not depend on anything
        loss = (logits[own].float() * torch.linspace(-1, 1, logits.shape[-1], device=self.device)).sum()
        loss.backward()  # not autograd.grad, which reentrant checkpointing does not take part in
        reached = sum(found.grad[0].float().norm(dim=-1) for found in embedded if found.grad is not None)
        agreement.drop_gradients(self.network)
        elsewhere = reached[~own].norm() / reached[own].norm()
        if elsewhere.item() != 0:
            raise PartError(f"{elsewhere.item():.0e} of a dialogue's gradient is another's in its row")

    def _check_positions(self) -> None:
        """Raise PartError unless the network takes positions from 0 that it is given for its own. Some do not look at
        them and count through the row, some begin with another number: that makes little of a step's loss, but the same
        numbers are the same in every precision."""
        ids = torch.arange(1, 9, device=self.device).unsqueeze(0)
        positions = torch.arange(8, device=self.device).unsqueeze(0)
        with torch.no_grad(), self._autocast():
            own, given, reversed_ones = (
                self.network(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **more).logits.float()
                for more in ({}, {"position_ids": positions}, {"position_ids": positions.flip(1)})
            )
        off, effect = (own - given).norm().item(), (reversed_ones - given).norm().item()
        if not off < effect / 10:
            raise PartError(
                "it takes no positions" if effect == 0 else "its own positions are others than 0, 1, 2, ..."
            )

    def _problem_of(self, act: Callable[[], None], parts: Parts) -> str | None:
        """What keeps any rank from doing `act` with `parts`, in one line. Raises torch.OutOfMemoryError for the parts
        that were asked for: training would run out of memory as well, since it holds more."""
        problem = None
        try:
            act()
        except torch.OutOfMemoryError:
            if parts == self._full and not self._in_fp32:
                raise
            problem = "out of memory"
        except PartError as error:
            problem = str(error)
        except Exception as error:
            problem = f"its step fails ({type(error).__name__}: {_first_line(error)[:160]})"
        (any_failed,) = ranks.any_says(problem is not None, device=self.device)
        return problem or ("another rank cannot" if any_failed else None)

    def _sampled(self, sample: Sample, scale: float, found: list[Gradients]) -> None:
        """Append to `found` this rank's share of the captured step's loss and gradients of `sample`."""
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
            if self.device.type == "cuda" and (self.parts, self._in_fp32) not in self._have_kernels:
                self._compile_kernels(buffers)
                self._have_kernels.add((self.parts, self._in_fp32))
            self._backward(buffers)
        found.append(Gradients(self.loss.clone(), self._optimizer.gradients_of_weights(), scale))

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
            with _on_a_side_stream():
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
            graph = torch.cuda.CUDAGraph()
            try:
                # The thread that watches over messages to other ranks asks CUDA for their state meanwhile.
                errors = "thread_local" if self.trial.world_size > 1 else "global"
                with torch.cuda.graph(graph, pool=pool, capture_error_mode=errors):
                    self._step(buffers)
            except RuntimeError as error:
                ran_out = next((e for e in (error, error.__context__) if isinstance(e, torch.OutOfMemoryError)), None)
                if ran_out is not None:
                    raise ran_out from None
                self.notes.append(f"uncaptured: {type(self.model).__name__}: {_first_line(error)}")
                return False
            pool = graph.pool()
            self._graphs[shape] = graph
        return True

    def _compile_kernels(self, buffers: Buffers) -> None:
        """A pass that computes nothing of use: Triton then compiles at once what it would else meet one by one."""
        self._optimizer.clear_gradients()
        with compiling():
            self._pass(buffers, 0)

    def _compile(self) -> None:
        """Compile the layers one by one: they are alike, so that what one of them costs serves all."""
        if not self.compiled or self._compiled_layers:
            return
        names = set(self.model._no_split_modules or ())
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
        if self._lean is not None:
            self._lean.roll()
        with self._autocast():
            loss = self._loss(buffers, index)
        self._optimizer.backward(loss)
        self.loss += loss.detach()

    def _loss(self, buffers: Buffers, index: int) -> torch.Tensor:
        """The share of pass `index` in the step's loss: a scalar."""
        inputs, dialogues = self._inputs(buffers, index)
        answers, targets, weights = buffers.answers[index], buffers.targets[index], buffers.weights[index]
        with attention.packed(dialogues):
            if self.parts.loss == "chunked":
                hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
                head = self.model.get_output_embeddings()
                chosen = hidden.flatten(0, 1).index_select(0, answers)
                return linear_cross_entropy(chosen, head.weight, head.bias, targets, weights)
            if self.parts.loss == "model":
                return self._models_own_loss(inputs, buffers, index)
            logits = self.network(**inputs, use_cache=False).logits[:, -buffers.shape.time :]
        chosen = logits.flatten(0, 1).index_select(0, answers).float()
        return (cross_entropy(chosen, targets, reduction="none") * weights).sum()

    def _inputs(self, buffers: Buffers, index: int) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """What the network is given for pass `index`, and which dialogue each token is of, where that says more."""
        inputs = {"input_ids": buffers.input_ids[index], "attention_mask": buffers.attention_mask[index]}
        if not self.parts.packing:
            return inputs, None
        return inputs | {"position_ids": buffers.position_ids[index]}, buffers.dialogues[index]

    def _models_own_loss(self, inputs: dict[str, torch.Tensor], buffers: Buffers, index: int) -> torch.Tensor:
        labels = buffers.labels[index]
        loss: torch.Tensor
        if self.trainer.model_accepts_loss_kwargs:
            loss = self.network(**inputs, labels=labels, num_items_in_batch=buffers.count, use_cache=False).loss
            return loss
        loss = self.network(**inputs, labels=labels, use_cache=False).loss
        return loss / buffers.shape.passes

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        arguments = self.trial.running_method.training_arguments
        dtype = torch.float16 if arguments.get("fp16") else torch.bfloat16 if arguments.get("bf16") else None
        if dtype is None or self._in_fp32:
            return contextlib.nullcontext()
        # Cast weights that it caches would outlive the pass, in a graph's memory.
        return torch.autocast(self.device.type, dtype, cache_enabled=False)


def compiles(step: CapturedStep, steps: int) -> bool:
    """Whether a job of that many optimizer steps is compiled: as `step` says, else where it earns its time back."""
    return steps >= COMPILE_STEPS if step.compile is None else step.compile


def what_cannot_be_captured(network: torch.nn.Module, step: Callable[[], None]) -> str | None:
    """Run `step` with every wait for the device forbidden, since a graph has no host to wait: the innermost module of
    `network` that did wait and why, in one line, or None."""
    inside: list[str] = []
    hooks = []
    for name, module in network.named_modules():
        label = f"{name or 'the network'} ({type(module).__name__})"
        hooks.append(module.register_forward_pre_hook(lambda *_, label=label: inside.append(label), prepend=True))
        hooks.append(module.register_forward_hook(lambda *_: inside.pop() and None))
    waiting = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else 0
    try:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error")
        step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"{inside[-1] if inside else 'backward, loss or optimizer'}: {_first_line(error)}"
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode(waiting)
        for hook in hooks:
            hook.remove()
    return None


@contextlib.contextmanager
def _on_a_side_stream() -> Iterator[None]:
    """Warm-up runs off the stream that is captured, as torch's notes on CUDA graphs ask."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
