"""What does a captured step do once it has its gradients, on the device alone, and how does a checkpoint keep it?"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lightweight.internals import torch as torch_internals
from lightweight.methods import CapturedStep, MethodError
from lightweight.training.updates import learning_rates
from lightweight.trial import Trial

if TYPE_CHECKING:
    from transformers import Trainer


class Optimizer:
    """AdamW with everything around it on the device: clipping, loss scaler, learning-rate schedule, and fp32 masters of
    trained weights that are computed with in half precision.

    `schedule` has each step's learning rates, of the groups that have weights.

    A bf16 weight keeps three digits, and a step of Adam is smaller than the last of them: such weights would not move.
    """

    def __init__(self, trial: Trial, trainer: Trainer, created: torch.optim.AdamW, device: torch.device) -> None:
        self._max_norm = trainer.args.max_grad_norm
        rates = learning_rates(trainer, created, trial.steps)
        self._rates = torch.tensor(rates, device=device)  # [steps, groups]
        has_weights = [bool(group["params"]) for group in created.param_groups]
        self.schedule = [list(itertools.compress(of_step, has_weights)) for of_step in rates]
        self._taken = torch.zeros(1, dtype=torch.int64, device=device)  # steps that were not skipped
        self._rate = torch.zeros(len(created.param_groups), device=device)
        self.weights = [weight for group in created.param_groups for weight in group["params"]]
        dtype = getattr(torch, trial.running_method.weights_dtype)
        self._masters: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._sums: dict[torch.nn.Parameter, torch.Tensor] = {}  # the masters' gradients
        self._dtypes: dict[torch.nn.Parameter, torch.dtype] = {}  # that the weights came in
        upcast = (trial.method.captured_step or CapturedStep()).upcast
        for weight in self.weights:
            computed_in = weight.dtype if upcast else dtype
            self._dtypes[weight] = weight.dtype
            if computed_in != torch.float32:
                self._masters[weight] = master = weight.detach().clone().float().requires_grad_()
                self._sums[weight] = master.grad = torch.zeros_like(master)
                weight.data = weight.detach().to(computed_in)
        groups = [
            {
                **{name: group[name] for name in OF_GROUP},
                "params": [self._masters.get(weight, weight) for weight in group["params"]],
                "lr": rate,
            }
            for group, rate in zip(created.param_groups, self._rate.unbind(), strict=True)
        ]
        self._adamw = torch.optim.AdamW(
            groups,
            lr=self._rate[0],
            fused=True,
            capturable=device.type == "cuda",
        )
        self._adamw.register_step_pre_hook(self._count_step)
        self._scaler = torch.amp.GradScaler(device.type, enabled=trial.running_method.precision == "fp16")

    def clear_gradients(self) -> None:
        """Forget the last step's gradients, so that the next backward pass writes instead of adding."""
        for weight in self.weights:
            weight.grad = None
        self._passes = 0

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of one pass's loss, those of half-precision weights in fp32."""
        self._scaler.scale(loss).backward()
        self._sum(self.weights)
        self._passes += 1

    def _sum(self, weights: Sequence[torch.nn.Parameter]) -> None:
        """Move the gradients that this pass has made of half-precision `weights` to those of their masters."""
        reached = [(w, w.grad, self._sums[w]) for w in weights if w in self._masters and w.grad is not None]
        if not reached:
            return
        moved, gradients, sums = (list(parts) for parts in zip(*reached, strict=True))
        if self._passes == 0:
            torch_internals.copy_each_(sums, gradients)
        else:
            torch_internals.add_each_(sums, [gradient.float() for gradient in gradients])
        for weight in moved:
            weight.grad = None

    def gradients(self, weights: Sequence[torch.nn.Parameter] | None = None) -> list[torch.Tensor]:
        """The gradients of what AdamW steps, of all or some of the network's weights; all passes must have made theirs.
        A rank whose rows did not reach a weight has zeros for it, since another one's may have."""
        weights = self.weights if weights is None else weights
        self._sum(weights)
        trained = [self._masters.get(weight, weight) for weight in weights]
        for weight in trained:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        return [weight.grad for weight in trained if weight.grad is not None]

    def gradients_of_weights(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """As `gradients`, by the weight of the network that each is of."""
        return dict(zip(self.weights, self.gradients(), strict=True))

    @contextlib.contextmanager
    def scaling_by(self, scale: float) -> Iterator[None]:
        """Inside, `backward` multiplies losses with `scale`; afterwards with what it did before."""
        before, device = self._scaler, self._rate.device.type
        self._scaler = torch.amp.GradScaler(device, init_scale=scale, enabled=scale != 1)
        try:
            yield
        finally:
            self._scaler = before

    @torch.no_grad()
    def step(self) -> None:
        """Unscale, clip, and take the step, unless a gradient is not finite under a loss scale."""
        self._scaler.unscale_(self._adamw)
        if self._max_norm and self._max_norm > 0:  # as the Trainer clips
            torch.nn.utils.clip_grad_norm_(self._trained(), self._max_norm)
        index = self._taken.clamp(max=len(self._rates) - 1)  # a rehearsal may be longer than a very short job
        self._rate.copy_(self._rates.index_select(0, index)[0])
        self._scaler.step(self._adamw)
        self._scaler.update()
        if self._masters:
            torch_internals.copy_each_(list(self._masters), list(self._masters.values()))

    @contextlib.contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Inside, steps run whole at a learning rate of 0; afterwards weights, moments, loss scale and schedule are as
        they were."""
        rates, scaler = self._rates.clone(), self._scaler.state_dict()
        self._rates.zero_()
        try:
            yield
        finally:
            self._rates.copy_(rates)
            self._taken.zero_()
            for state in self._adamw.state.values():
                for tensor in state.values():
                    tensor.zero_()
            self._scaler.load_state_dict(scaler)

    def held(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What is kept beside the network from step to step: masters and moments, and the masters' gradients."""
        moments = [tensor for state in self._adamw.state.values() for tensor in state.values()]
        return [*self._masters.values(), *moments], [*self._sums.values()]

    @property
    def rate(self) -> float:
        """The learning rate of the last step, of the first group as the Trainer logs it; waits for the device."""
        return self._rate[0].item()

    def state(self) -> dict[str, Any]:
        """What `load` needs to go on from here: trained weights, moments, loss scale and place in the schedule."""
        trained = self._trained()
        return {
            "weights": [weight.detach() for weight in trained],
            "moments": [dict(self._adamw.state[weight]) for weight in trained],
            "scaler": self._scaler.state_dict(),
            "taken": self._taken,
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`, in place: a graph has the addresses of what it reads."""
        for weight, saved, moments in zip(self._trained(), state["weights"], state["moments"], strict=True):
            weight.copy_(saved)
            own = self._adamw.state[weight]
            for name, moment in moments.items():
                own[name] = own[name].copy_(moment) if name in own else moment.to(weight.device)
        for weight, master in self._masters.items():
            weight.copy_(master)
        self._scaler.load_state_dict(state["scaler"])
        self._taken.copy_(state["taken"])

    @contextlib.contextmanager
    def masters_in_place(self) -> Iterator[None]:
        """Inside, the network has the fp32 masters in the place of its half-precision weights."""
        computed_with = {weight: weight.data for weight in self._masters}
        for weight, master in self._masters.items():
            weight.data = master.detach()
        try:
            yield
        finally:
            for weight, tensor in computed_with.items():
                weight.data = tensor

    def withdraw(self) -> None:
        """Leave every weight as it was before there was this optimizer, of its number format too."""
        self.clear_gradients()
        for weight, master in self._masters.items():
            weight.data = master.detach().to(self._dtypes[weight])

    def finish(self) -> None:
        """Put the masters in the place of the half-precision weights, so that what was learned is saved in fp32."""
        self.clear_gradients()
        for weight, master in self._masters.items():
            weight.data = master.detach()

    def _trained(self) -> list[torch.Tensor]:
        """What AdamW steps: the masters where there are any."""
        return [weight for group in self._adamw.param_groups for weight in group["params"]]

    def _count_step(self, optimizer: Any, *_: Any) -> None:
        """A skipped step does not move the schedule on, as with the Trainer."""
        skipped = getattr(optimizer, "found_inf", None)  # the loss scaler's, while it runs the step
        self._taken += 1 if skipped is None else (1 - skipped).long()


OF_GROUP = ("betas", "eps", "weight_decay", "amsgrad", "maximize")
"""What AdamW does with a group of weights, but for its learning rate."""


def adamw_of(trial: Trial, trainer: Trainer) -> torch.optim.AdamW:
    """The Trainer's optimizer, with its parameter groups and settings. Raises MethodError for any but torch's AdamW,
    and for one with hooks around its steps."""
    created = trainer.create_optimizer()
    trainer.optimizer = None
    hooks = torch_internals.has_step_hooks(created)
    if type(created) is torch.optim.AdamW and not hooks:
        return created
    by = "its optimizer is" if trial.method.optimizer is not None else "`optim` asks for"
    kind = type(created).__name__ + (" with hooks around its steps" if hooks else "")
    raise MethodError(
        f"method {trial.method.name}: the captured step runs torch's AdamW, and {by} {kind}: leave it out, or let the "
        "Trainer run the steps"
    )
