"""What do frozen layers that project one input, as query, key and value do, keep for their backward pass? Their input
once, whatever the number of their adapters; or nothing, where that can be computed again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightweight import preload  # isort: skip  # noqa: F401  # before bitsandbytes

import bitsandbytes.functional
import torch
from bitsandbytes.nn.modules import Linear4bit
from torch.nn.functional import linear

from lightweight.captured import kernels
from lightweight.captured.dropout import drop, drop_backward, probability
from lightweight.captured.recomputed import recipe_of


class Family:
    """Layers that project one input. The first one asked computes all; its siblings then hand theirs out.

    Dropout is drawn from `seed`, one number on the device, for each layer with a number of its own from `site` on.
    `joins`: whether their weights may become one.
    """

    def __init__(self, modules: list[Any], seed: torch.Tensor, site: int, *, joins: bool) -> None:
        self._modules, self._seed, self._site = modules, seed, site
        self._joint = _joined([Projection.of(module, site).base for module in modules]) if joins else None
        self._x: torch.Tensor | None = None
        self._waiting: dict[int, torch.Tensor] = {}

    def project(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """What layer `index` makes of `x`: [..., in] -> [..., out]."""
        if self._x is not x or index not in self._waiting:
            projections = [Projection.of(module, self._site + i) for i, module in enumerate(self._modules)]
            function, sources = recipe_of(x)
            adapters = [weight for projection in projections for weight in projection.adapter or ()]
            outputs = _Project.apply(x, self._seed, projections, self._joint, function, *adapters, *sources)  # type: ignore[no-untyped-call]
            self._x, self._waiting = x, dict(enumerate(outputs))
        output = self._waiting.pop(index)
        if not self._waiting:
            self._x = None
        return output


@dataclass(frozen=True)
class Projection:
    """A frozen layer, its adapter's settings where it has one, and the number its dropout is drawn with."""

    base: Any
    site: int
    scaling: float = 0.0
    p: float = 0.0
    adapter: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(cls, module: Any, site: int) -> Projection:
        """The projection that `module` is, peft's LoRA layer or a frozen one itself."""
        if not hasattr(module, "lora_A"):
            return cls(module, site)
        (name,) = module.lora_A.keys()
        dropout = module.lora_dropout[name]
        p = probability(module, dropout.p) if isinstance(dropout, torch.nn.Dropout) else 0.0
        adapter = module.lora_A[name].weight, module.lora_B[name].weight
        return cls(module.get_base_layer(), site, module.scaling[name], p, adapter)


@dataclass(frozen=True)
class _Joint:
    """The weights of several linear layers in one: [sum of `widths`, in], and their biases."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    widths: list[int]


@torch.no_grad()
def _joined(bases: list[Any]) -> _Joint | None:
    """Several whole linear layers as one, which feeds a matrix unit better; their own weights become parts of it. None
    where that cannot be."""
    if len(bases) == 1 or any(type(base) is not torch.nn.Linear for base in bases):
        return None
    biases = [base.bias for base in bases if base.bias is not None]
    if len(biases) not in (0, len(bases)):
        return None
    joint = _Joint(
        torch.cat([base.weight for base in bases]),
        torch.cat(biases) if biases else None,
        [base.out_features for base in bases],
    )
    for base, part in zip(bases, joint.weight.split(joint.widths), strict=True):
        base.weight.data = part
    return joint


class _Project(torch.autograd.Function):
    """x @ W.T + bias + scaling * dropout(x) @ A.T @ B.T for each W, W and bias frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        seed: torch.Tensor,
        projections: list[Projection],
        joint: _Joint | None,
        function: Callable[..., torch.Tensor] | None,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """x: [..., in]; seed: one number; `tensors`: a [r, in] and b [out, r] of each adapter, then the sources. x is
        `function(*sources)` where there is one."""
        flat = x.reshape(-1, x.shape[-1])
        outputs: list[torch.Tensor]
        kept: list[torch.Tensor | None] = []
        if joint is not None:
            outputs = list(linear(x, joint.weight, joint.bias).split(joint.widths, -1))
        else:  # each by its own forward pass, whatever stands in for it
            outputs = [type(projection.base).forward(projection.base, x) for projection in projections]
        weights = iter(tensors)
        for projection, y in zip(projections, outputs, strict=True):
            if projection.adapter:
                a, b = next(weights), next(weights)
                kept += _add_adapter_(y.view(-1, y.shape[-1]), flat, a, b, projection, seed)
        ctx.save_for_backward(seed, *tensors, *kept)
        ctx.settings = projections, function, len(tensors), x.shape
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        projections, function, count, shape = ctx.settings
        seed, *saved = ctx.saved_tensors
        adapted = 2 * sum(projection.adapter is not None for projection in projections)
        weights, sources, kept = iter(saved[:adapted]), saved[adapted:count], iter(saved[count:])
        x = sources[0] if function is None else function(*sources)
        x = x.reshape(-1, x.shape[-1])
        grads = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grad_outputs]  # [tokens, out]
        grad_x = None
        if ctx.needs_input_grad[0]:
            for projection, grad in zip(projections, grads, strict=True):
                if grad is None:
                    continue
                weight = _weight(projection.base, grad.dtype)
                grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
        adapter_grads: list[torch.Tensor | None] = []
        for projection, grad in zip(projections, grads, strict=True):
            if not projection.adapter:
                continue
            adapter = _Kept(next(weights), next(weights), next(kept), next(kept))
            if grad is None:
                adapter_grads += [None, None]
                continue
            adapter_grads += _adapter_backward(grad, adapter, x, grad_x, projection, seed)
        grad_x = None if grad_x is None else grad_x.view(shape)
        return grad_x, None, None, None, None, *adapter_grads, *(None,) * len(sources)


def _add_adapter_(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, projection: Projection, seed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Add scaling * dropout(x) @ a.T @ b.T to y, [tokens, out]; return what b was multiplied with, [tokens, r], and
    dropout's mask where it must be kept."""
    if kernels.take(x):
        site, p = projection.site, projection.p
        return kernels.add_adapter_(y, x, a, b, projection.scaling, p, seed, site), None
    x, mask = drop(x, projection.p)
    inner = (x @ a.t()).mul_(projection.scaling)
    y.addmm_(inner, b.t())
    return inner, mask


class _Kept(NamedTuple):
    """What an adapter's backward pass needs: its weights, and what `_add_adapter_` returned."""

    a: torch.Tensor
    b: torch.Tensor
    inner: torch.Tensor
    mask: torch.Tensor | None


def _adapter_backward(
    grad: torch.Tensor,
    adapter: _Kept,
    x: torch.Tensor,
    grad_x: torch.Tensor | None,
    projection: Projection,
    seed: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of the adapter's two weights, given that of `_add_adapter_`'s y; adds that of x to `grad_x`."""
    a, b, inner, mask = adapter
    if kernels.take(x):
        site, p = projection.site, projection.p
        return kernels.adapter_backward(grad, inner, x, a, b, grad_x, projection.scaling, p, seed, site)
    reached = (grad @ b) * projection.scaling
    if grad_x is not None:
        grad_x += drop_backward(reached @ a, mask, projection.p)
    return reached.t() @ drop_backward(x, mask, projection.p), grad.t() @ inner


def _weight(base: Any, dtype: torch.dtype) -> torch.Tensor:
    """[out, in], dequantized where it is quantized."""
    if isinstance(base, Linear4bit):
        packed: Any = base.weight
        return bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state).to(dtype)
    whole: torch.Tensor = base.weight
    return whole
