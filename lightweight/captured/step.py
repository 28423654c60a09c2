"""What is one optimizer step over static buffers? Every pass of its accumulation, and what AdamW makes of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from transformers import Trainer

from lightweight.captured.agreement import Gradients
from lightweight.captured.launching import compiling
from lightweight.captured.optimizer import Optimizer, adamw_of
from lightweight.captured.packing import Buffers
from lightweight.captured.parts import Parts
from lightweight.captured.passes import Passes
from lightweight.training import ranks
from lightweight.trial import Trial


class Step:
    """A trial's optimizer step, without a graph: its `passes` through the network, and the `optimizer`, once
    `make_optimizer` has made one. `loss`, a scalar, is that of the newest step.

    Raises MethodError where the method asks for something that only the Trainer does.
    """

    optimizer: Optimizer

    def __init__(self, trial: Trial, trainer: Trainer) -> None:
        assert trainer.model is not None
        self._trial, self._trainer = trial, trainer
        self.device = torch.device(trainer.args.device)
        self.passes = Passes(trainer, trial.running_method)
        self.loss = torch.zeros((), device=self.device)
        self._adamw = adamw_of(trial, trainer)
        self._have_kernels: set[tuple[Parts, bool]] = set()

    @property
    def parts(self) -> Parts:
        """What of the captured step its passes are computed with."""
        return self.passes.parts

    def make_optimizer(self) -> None:
        """Hold the trained weights as they are trained; `optimizer.withdraw` undoes that."""
        self.optimizer = Optimizer(self._trial, self._trainer, self._adamw, self.device)
        if self._trial.world_size > 1:
            self._reducer = ranks.Reducer(self.optimizer.weights, self.optimizer.gradients, [self.loss])

    def run(self, buffers: Buffers) -> None:
        """One optimizer step over what `buffers` hold; `loss` is then its loss. Nothing in it may wait for the
        device."""
        self._backward(buffers, self._reducer.adding_up() if self._trial.world_size > 1 else nullcontext())
        self.optimizer.step()

    def gradients(self, buffers: Buffers, scale: float) -> Gradients:
        """This rank's share of loss and gradients of the step that `buffers` hold, under a loss scale."""
        with self.optimizer.scaling_by(scale):
            if self.device.type == "cuda":
                self.compile_kernels(buffers)
            self._backward(buffers, nullcontext())
        return Gradients(self.loss.clone(), self.optimizer.gradients_of_weights(), scale)

    def compile_kernels(self, buffers: Buffers) -> None:
        """A pass that computes nothing of use: Triton then compiles at once what it would else meet one by one."""
        kernels = (self.parts, self.passes.in_fp32)
        if kernels in self._have_kernels:
            return
        self._have_kernels.add(kernels)
        self.optimizer.clear_gradients()
        with compiling():
            self._pass(buffers, 0)

    def _backward(self, buffers: Buffers, last: AbstractContextManager[None]) -> None:
        """Forward and backward passes of a step on this rank, the last of them in the context `last`."""
        self.optimizer.clear_gradients()
        self.loss.zero_()
        passes = self.computed_passes(buffers)
        for index in range(passes):
            with last if index == passes - 1 else nullcontext():
                self._pass(buffers, index)

    def computed_passes(self, buffers: Buffers) -> int:
        """How many passes a step over `buffers` computes: all of them."""
        return buffers.shape.passes

    def _pass(self, buffers: Buffers, index: int) -> None:
        """Forward and backward pass `index` of a step."""
        loss = self.passes.loss(buffers, index)
        self.loss += loss.detach()  # before the backward pass, which sends it to other ranks
        self.optimizer.backward(loss)
