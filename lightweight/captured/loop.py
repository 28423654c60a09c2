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

import functools
from pathlib import Path
from typing import Any

from lightweight.preload import peft  # isort: skip  # before Trainer, which imports peft

import torch
from transformers import PretrainedConfig, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lightweight.captured import temporary
from lightweight.captured.check import Check
from lightweight.captured.epochs import Epochs
from lightweight.captured.graphs import (
    Graphs,
    on_a_side_stream,
    waiting_forbidden,
    what_cannot_be_captured,
)
from lightweight.captured.packing import Buffers, Layout, Shape
from lightweight.captured.parts import Loss, Parts
from lightweight.captured.step import Step
from lightweight.corpus import Rows
from lightweight.internals import transformers as transformers_internals
from lightweight.internals.torch import free_workspaces
from lightweight.methods import CapturedStep
from lightweight.models import first_line
from lightweight.training import ranks
from lightweight.training.meter import Meter
from lightweight.trial import Trial

COMPILE_STEPS = 6_000
"""Steps from which torch.compile earns its time back: for opt-350m it took 10 to 16 s and brought a captured step from
12.8 to 10.5 ms (H100, torch 2.11)."""


RANKS_MOVE = "AdaLoRA moves its ranks by the gradients of each step"

LAYERS_ARE_DROPPED = "its layers are left out by chance ({}), and a graph would leave out the same ones in every step"

LAYER_DROPS = ("layerdrop", "decoder_layerdrop", "encoder_layerdrop")
"""What configurations call the chance that a layer is left out, which the host draws."""

CAPTURED_STATE = "captured_step.pt"
"""The file of a checkpoint that holds what `Optimizer.state` gives."""


def prepare(trial: Trial, trainer: Trainer, rows: Rows, meter: Meter) -> CapturedTraining | None:
    """A trial's job, ready to be trained; None, and nothing changed, where the Trainer must run the steps."""
    job = CapturedTraining(trial, trainer, rows, meter)
    return job if job.prepare() else None


class CapturedTraining:
    """A trial's training by the captured step: `prepare` once, then `train`.

    Raises MethodError where the method asks for something that only the Trainer does.
    """

    def __init__(self, trial: Trial, trainer: Trainer, rows: Rows, meter: Meter) -> None:
        asked = trial.method.captured_step
        assert asked is not None
        self.trial, self.trainer, self.rows, self.meter, self._asked = trial, trainer, rows, meter, asked
        self.step = Step(trial, trainer)
        self.network, self.model = self.step.passes.network, self.step.passes.model
        self.notes: list[str] = []
        self.captured = False
        self.compiled = self.step.device.type == "cuda" and compiles(asked, trial.steps)
        self._compiled_layers: list[Any] = []
        self._buffers: dict[Shape, Buffers] = {}
        self._graphs = Graphs(several_ranks=trial.world_size > 1)

    def prepare(self) -> bool:
        """Lay the job out in static shapes, see that its step is the Trainer's, warm it up and capture it, leaving no
        trace in what is trained. Whether `train` can follow; where not, the Trainer is to train, from where it was.

        The meter's facts say how the steps will really run.
        """
        self._prepare_network()
        self.epochs = Epochs(
            self.trial,
            self.trainer,
            self.rows,
            packing_asked=self._asked.packing,
            joins=self.step.passes.on_flash and self._asked.attention == "sdpa",
            compiled=self.compiled,
        )
        if self.epochs.note is not None:
            self.notes.append(self.epochs.note)
        with temporary.without_trace(self.network):
            agrees = self._agree()
        self.meter.begin_training()
        if agrees:
            self._capture_or_compile()
        self.meter.facts |= {
            "captured": self.captured,
            "compiled": agrees and self.compiled,
            "capture_note": "; ".join(self.notes) or None,
        }
        if not agrees:
            self.step.passes.recompute(0, keeps_random_numbers=True)
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
        for number, epoch in enumerate(self.epochs.layouts):
            left = epoch[max(0, state.global_step - number * self.trial.steps_per_epoch) :]
            if not left:
                continue
            trainer.control = handler.on_epoch_begin(arguments, state, trainer.control)
            for layout in left:
                trainer.control = handler.on_step_begin(arguments, state, trainer.control)
                self.meter.see_rates(self.step.optimizer.schedule[state.global_step])
                self._run(layout)
                self.meter.add_loss(self.step.loss.clone())
                # every rank has a shape of its own, and the first one's is the largest
                padded = self.epochs.shape_of(layout).tokens * self.trial.world_size
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
        self.step.passes.undo_lean()
        self.step.optimizer.finish()
        trainer.control = handler.on_train_end(arguments, state, trainer.control)

    # What callbacks ask for

    def _log_and_save(self) -> None:
        trainer, state = self.trainer, self.trainer.state
        if trainer.control.should_log and state.global_step > self._logged:
            losses = self.meter.train_loss[self._logged :]
            trainer.log({"loss": sum(losses) / len(losses), "learning_rate": self.step.optimizer.rate})
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
            with self.step.optimizer.masters_in_place():
                transformers_internals.save_in_checkpoint(trainer, folder)
        torch.save(self.step.optimizer.state(), folder / CAPTURED_STATE)
        for callback in (*trainer.callback_handler.callbacks, trainer.control):
            if isinstance(callback, ExportableState):
                kept[type(callback).__name__] = callback.state()
        state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _load(self, checkpoint: Path) -> None:
        self.step.optimizer.load(torch.load(checkpoint / CAPTURED_STATE, map_location="cpu", weights_only=True))
        transformers_internals.load_random_numbers(self.trainer, checkpoint)

    # Before the first step

    def _prepare_network(self) -> None:
        arguments = self.trainer.args
        self.network.train()
        if arguments.gradient_checkpointing:
            self.network.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
            self.network.enable_input_require_grads()
        self._recompute(keeps_random_numbers=not self._is_graph)
        if len(self.step.passes.recomputed) < self._asked.recompute:
            self.notes.append(f"{len(self.step.passes.recomputed)} layers at most can be recomputed")
        if self._asked.offload:
            self.notes.append(f"{len(self.step.passes.offloaded)} layers keep their activations on the host")

    def _recompute(self, *, keeps_random_numbers: bool) -> None:
        asked = self._asked
        self.step.passes.recompute(asked.recompute, offload=asked.offload, keeps_random_numbers=keeps_random_numbers)

    @property
    def _is_graph(self) -> bool:
        return self.step.device.type == "cuda" and self._asked.graph

    def _agree(self) -> bool:
        """Take on as many parts as leave the step the Trainer's, and note what others were off. Whether any do."""
        if self.trial.method.moves_ranks:
            self.notes.append(f"the Trainer runs the steps, since {RANKS_MOVE}")
            return False
        if (drop := layer_drop(self.model.config)) is not None:
            self.notes.append(f"the Trainer runs the steps, since {LAYERS_ARE_DROPPED.format(drop)}")
            return False
        check = Check(self.trial, self.trainer, self.step, self.epochs)
        if not check.draws_the_same():
            self.notes.append("the Trainer runs the steps, since it draws other rows than the captured step")
            return False
        check.expect()
        self.meter.phase = "capture"  # which the Trainer's own steps have left
        wanted = Parts(
            packing=self.epochs.packs,
            attention=self._asked.attention == "sdpa",
            loss=self._losses[0],
            # A compiler decides by itself what to keep, and autocast casts in the middle of what is one function here.
            lean=self._asked.lean and not self.compiled and not self.step.passes.casts,
        )
        parts, notes = check.search(wanted, self._losses)
        self.notes += notes
        if parts is not None:
            self._buffers = {shape: Buffers(shape, self.step.device) for shape in self.epochs.shapes}
        return parts is not None

    @property
    def _losses(self) -> list[Loss]:
        """The losses to try, in order."""
        own: list[Loss] = ["model"] if self.trainer.model_accepts_loss_kwargs else ["logits", "model"]
        return ["chunked", "logits", "model"] if self._asked.loss == "chunked" else own

    def _capture_or_compile(self) -> None:
        if self.step.device.type != "cuda":
            self.notes.append("no GPU: the same step without a graph")
        elif self._asked.graph:
            with self.step.optimizer.rehearsing():
                self.captured = self._repeats_itself() and self._capture()
        if not self.captured:
            self._graphs.clear()
            self._compile()

    def _repeats_itself(self) -> bool:
        """Whether every layer that is computed again drops then what it dropped before. Where one does not, torch is to
        see to it, which waits for the host."""
        passes = self.step.passes
        if not passes.recomputed:
            return True
        layout = self.epochs.layouts[0][0]
        buffers = self._buffers[self.epochs.shape_of(layout)]
        buffers.fill(layout, self.rows)
        with temporary.nudged(temporary.trained(self.network)):  # else nothing that LoRA drops is seen
            changing = passes.changing_layer(buffers)
        if changing is None:
            return True
        self.notes.append(f"uncaptured: {changing} would draw other dropout masks when it is recomputed")
        self._recompute(keeps_random_numbers=True)
        return False

    def _capture(self) -> bool:
        """Record a graph for each shape, all in one memory pool, the largest first. Whether it could be done."""
        examples = {self.epochs.shape_of(layout): layout for epoch in self.epochs.layouts for layout in epoch}
        for shape, layout in sorted(examples.items(), key=lambda item: -item[0].tokens):
            buffers = self._buffers[shape]
            buffers.fill(layout, self.rows)
            is_first = not self._graphs.by_shape
            with on_a_side_stream():
                if is_first:
                    self.step.compile_kernels(buffers)
                self.step.run(buffers)  # libraries initialise themselves, and the optimizer its state
                if is_first:
                    free_workspaces()  # a forward pass that holds the backward pass's takes more than the graph
                    with waiting_forbidden():
                        problem = what_cannot_be_captured(self.network, functools.partial(self.step.run, buffers))
                    if problem:
                        self.notes.append(f"uncaptured: {problem}")
                        return False
                    self._compile()
                if self.compiled:
                    self.step.run(buffers)
                    self.step.run(buffers)
            self.step.optimizer.clear_gradients()
            try:
                self._graphs.record(shape, functools.partial(self.step.run, buffers))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.notes.append(f"uncaptured: {type(self.model).__name__}: {first_line(error)}")
                return False
        return True

    def _compile(self) -> None:
        """Compile the layers one by one: they are alike, so that what one of them costs serves all."""
        if not self.compiled or self._compiled_layers:
            return
        names = transformers_internals.layers_not_split(self.model)
        self._compiled_layers = [module for module in self.model.modules() if type(module).__name__ in names]
        for layer in self._compiled_layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)
        self.compiled = bool(self._compiled_layers)

    def _run(self, layout: Layout) -> None:
        shape = self.epochs.shape_of(layout)
        self._buffers[shape].fill(layout, self.rows)
        if self.captured:
            self._graphs.replay(shape)
        else:
            self.step.run(self._buffers[shape])


def layer_drop(config: PretrainedConfig) -> str | None:
    """By what name, and with what chance, a network of `config` leaves out whole layers; None where it does not."""
    chances = ((name, getattr(config, name, None)) for name in LAYER_DROPS)
    return next((f"{name}={chance}" for name, chance in chances if chance), None)


def compiles(step: CapturedStep, steps: int) -> bool:
    """Whether a job of that many optimizer steps is compiled: as `step` says, else where it earns its time back."""
    if step.compile is None:
        return steps >= COMPILE_STEPS and not step.recompute
    return step.compile
