"""Does a captured step agree with the Trainer's? Loss and gradients of both, over the same dialogues from the same
weights, within the tolerance of their number format.

The Trainer's are computed first, by its own `training_step` on its own batches, before anything is replaced. Then the
captured step computes its own in the shapes it will train in, and where they differ by more than rounding it gives up
what makes the difference.

What this cannot see: dropout, which is off meanwhile, since masks are drawn in another order; what a CUDA graph or a
compiler makes of the step afterwards; and what shows itself only in weights that training reaches later.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightweight.preload import peft  # isort: skip  # noqa: F401  # before Trainer, which imports peft

import torch

from lightweight.captured.parts import Loss, Parts
from lightweight.captured.sample import Sample
from lightweight.training import ranks


@dataclass(frozen=True)
class Gradients:
    """What forward and backward passes over a sample gave: `loss`, a scalar, and `of` each trained weight that they
    reached, times `scale`."""

    loss: torch.Tensor
    of: Mapping[torch.nn.Parameter, torch.Tensor]
    scale: float

    def over_ranks(self, weights: Iterable[torch.nn.Parameter]) -> Gradients:
        """All ranks' together, where these are one's share."""
        if ranks.world_size() == 1:
            return self
        of = {weight: self.of.get(weight, torch.zeros_like(weight)) for weight in weights}
        ranks.add_up([self.loss, *of.values()])
        return replace(self, of=of)


@dataclass(frozen=True)
class Tolerance:
    """How far two ways of computing one step may be apart by rounding: `loss` of the Trainer's loss, `gradient` of the
    norm of the Trainer's gradient, `tensor` of that of any single weight, which is taken to be at least `floor` of the
    whole one: below that there is rounding and little else, as in the bias of keys, which softmax does not see."""

    loss: float
    gradient: float
    tensor: float
    floor: float


TOLERANCES: dict[str, Tolerance] = {
    "fp32": Tolerance(loss=1e-5, gradient=1e-4, tensor=1e-3, floor=1e-3),
    "fp32 on a GPU": Tolerance(loss=1e-5, gradient=1e-3, tensor=1e-2, floor=1e-3),
    "tf32": Tolerance(loss=3e-3, gradient=5e-2, tensor=3e-1, floor=3e-2),
    "fp16": Tolerance(loss=3e-3, gradient=5e-2, tensor=3e-1, floor=3e-2),
    "bf16": Tolerance(loss=1e-2, gradient=2e-1, tensor=8e-1, floor=3e-2),
}
"""By the coarsest number format that a step computes in.

Of some fifty architectures with two layers each, on a CPU, what agrees was off by at most 5e-6 of the gradient in fp32,
1e-2 in fp16 and 3e-2 in bf16, and by 3e-4 of the loss in either half; deeper networks round more often. On a GPU,
whose kernels sum in other orders, opt-350m's 24 layers were off by 2e-4 in fp32, and 4e-4 in one weight (H100, torch
2.11). A forgotten mask, or a loss that is not the model's, is off by 2e-1 and more. A state that runs from one dialogue
into the next may be off by 1e-3 alone, which a half hides; it is looked for in another way, whatever the format.
"""

CHAOTIC = Tolerance(loss=1e-4, gradient=1e-2, tensor=1e-1, floor=1e-3)
"""For fp32 in the place of halves that say nothing: a network of random weights may enlarge the last digit of a number
a thousandfold from layer to layer. That of gpt-neo-1.3b does, whose attention does not scale its products: rounding its
embeddings to fp16 turns half of its gradient, and to fp32 2e-4 of it (CPU, torch 2.13)."""


@dataclass(frozen=True, eq=False)
class Expected:
    """What the Trainer makes of `sample`, in half precision or in fp32 in its place, and what is `allowed` to another
    way of computing it."""

    sample: Sample
    gradients: Gradients
    allowed: Tolerance
    in_fp32: bool = False


@dataclass(frozen=True)
class Deviation:
    """How far a captured step is from the Trainer's: relative, as in `Tolerance`, beside what is `allowed`. `error` is
    why it could not be computed, in one line."""

    loss: float = 0.0
    gradient: float = 0.0
    tensor: float = 0.0
    worst: str = ""
    allowed: Tolerance = TOLERANCES["fp32"]
    error: str | None = None

    @property
    def is_rounding(self) -> bool:
        """Whether this is rounding; what is not a number is not."""
        return (
            self.error is None
            and self.loss <= self.allowed.loss
            and self.gradient <= self.allowed.gradient
            and self.tensor <= self.allowed.tensor
        )

    def __str__(self) -> str:
        if self.error is not None:
            return self.error
        return f"its loss is {self.loss:.0e} off, its gradient {self.gradient:.0e} ({self.worst}: {self.tensor:.0e})"


def deviation(
    ours: Gradients, theirs: Gradients, names: Mapping[torch.nn.Parameter, str], allowed: Tolerance
) -> Deviation:
    """How far `ours` are from `theirs`, the Trainer's. Waits for the device once."""
    apart, norms = [], []
    for weight in names:
        zero = torch.zeros((), device=theirs.loss.device)
        expected = theirs.of[weight].float() / theirs.scale if weight in theirs.of else zero
        norms.append(expected.norm())
        apart.append((ours.of[weight].float() / ours.scale - expected).norm() if weight in ours.of else norms[-1])
    off, norm = torch.stack(apart), torch.stack(norms)
    whole = norm.norm()
    each = off / norm.clamp_min(allowed.floor * whole)
    worst = each.argmax()
    loss = (ours.loss - theirs.loss).abs() / theirs.loss.abs()
    loss_off, gradient, tensor, index = torch.stack([loss, off.norm() / whole, each[worst], worst]).tolist()
    return Deviation(loss_off, gradient, tensor, list(names.values())[int(index)], allowed)


def search(
    parts: Parts, losses: Sequence[Loss], measure: Callable[[Parts], Deviation]
) -> tuple[Parts | None, list[str]]:
    """The most of `parts` that agrees with the Trainer, or None; and a note for each part that was given up, with how
    far it was off beside what is left."""
    measure = functools.cache(measure)
    candidates = parts.fewer(losses)
    agreeing = next((rest for rest in candidates if measure(rest).is_rounding), None)
    if agreeing is None:
        return None, [f"the Trainer runs the steps, since no captured one is its: {measure(candidates[-1])}"]
    notes = []
    for name in parts.given_up(agreeing):
        restored: dict[str, Any] = {name: getattr(parts, name)}
        also = " and with it packing" if name == "attention" and parts.packing else ""
        notes.append(f"{name}{also} given up: {measure(replace(agreeing, **restored))}")
    return agreeing, notes
