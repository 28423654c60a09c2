"""What do frozen layers that project one input, as query, key and value do, keep for their backward pass? Their input
once, whatever the number of their adapters; or nothing, where that can be computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightweight import preload  # isort: skip  # noqa: F401  # before bitsandbytes

import bitsandbytes.functional
import torch
from bitsandbytes.nn.modules import Linear4bit
from torch.nn.functional import linear

from lightweight.captured import joined, kernels, launching
from lightweight.captured.dropout import drop, drop_backward, probability
from lightweight.captured.joined import MOST_RANKS, Joint, Whole
from lightweight.captured.recomputed import recipe_of


class Family:
    """Layers that project one input. The first one asked computes all; its siblings then hand theirs out.

    Dropout is drawn from `seed`, one number on the device, for each layer with a number of its own from `site` on.
    `joins`: whether their outputs may be parts of one tensor; `most` is how many elements a weight may have that is
    dequantized for all of them. Frozen weights `between` theirs move with them.
    """

    def __init__(
        self,
        modules: list[Any],
        seed: torch.Tensor,
        site: int,
        *,
        joins: bool,
        most: int = 0,
        between: Sequence[torch.Tensor] = (),
    ) -> None:
        self._modules, self._seed, self._site = modules, seed, site
        projections = [Projection.of(module, site) for module in modules]
        bases = [projection.base for projection in projections]
        self.whole: Whole | None = None
        if launching.take(seed) and (layers := layers_of(modules, joins=joins)) is not None:
            self.whole = joined.whole_of(*layers, projections[0].scaling)
        self._joint = joined.joint_of(bases, between, most) if joins and self.whole is None else None
        self._x: torch.Tensor | None = None
        self._waiting: dict[int, torch.Tensor] = {}

    @property
    def room(self) -> int:
        """How much the rows of its input had best have at their end."""
        return 0 if self.whole is None else self.whole.room

    def takes(self, width: int) -> bool:
        """Whether its input is so wide."""
        return bool(self._modules[0].in_features == width)

    def project(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """What layer `index` makes of `x`: [..., in] -> [..., out]."""
        if self._x is not x or index not in self._waiting:
            projections = [Projection.of(module, self._site + i) for i, module in enumerate(self._modules)]
            function, sources = recipe_of(x)
            adapters = [weight for projection in projections for weight in projection.adapter or ()]
            outputs: Any
            if self.whole is not None and x.dtype == self.whole.dtype:
                has_room = getattr(x, "room", 0) >= self.room
                outputs = _ProjectWhole.apply(x, self.whole, has_room, function, *adapters, *sources)  # type: ignore[no-untyped-call]
            else:
                outputs = _Project.apply(x, self._seed, projections, self._joint, function, *adapters, *sources)  # type: ignore[no-untyped-call]
            self._x, self._waiting = x, dict(enumerate(outputs))
        output = self._waiting.pop(index)
        if not self._waiting:
            self._x = None
        return output

    def alone(self) -> Projection | None:
        """The projection of a family of one, where it has an adapter, and nothing is dropped of what it takes."""
        if len(self._modules) > 1:
            return None
        projection = Projection.of(self._modules[0], self._site)
        return projection if projection.adapter and not projection.p else None


def layers_of(modules: list[Any], *, joins: bool) -> joined.Layers | None:
    """The frozen layers and adapters of a family that may be one with them: nothing is dropped of its input, and all
    adapters are scaled alike."""
    projections = [Projection.of(module, 0) for module in modules]
    is_alike = len({projection.scaling for projection in projections}) == 1
    if not (joins or len(modules) == 1) or not is_alike or drops_any(modules):
        return None
    return [projection.base for projection in projections], [projection.adapter for projection in projections]


def drops_any(modules: Iterable[Any]) -> bool:
    """Whether a layer drops any of its input in training."""
    dropouts = [each for module in modules for each in getattr(module, "lora_dropout", {}).values()]
    return not all(isinstance(each, torch.nn.Identity) or getattr(each, "p", 1) == 0 for each in dropouts)


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


class _Kept(NamedTuple):
    """What an adapter's backward pass needs: its weights, and what `_add_adapter_` returned."""

    a: torch.Tensor
    b: torch.Tensor
    inner: torch.Tensor | None = None
    mask: torch.Tensor | None = None


class _Project(torch.autograd.Function):
    """x @ W.T + bias + scaling * dropout(x) @ A.T @ B.T for each W, W and bias frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        seed: torch.Tensor,
        projections: list[Projection],
        joint: Joint | None,
        function: Callable[..., torch.Tensor] | None,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """x: [..., in]; seed: one number; `tensors`: a [r, in] and b [out, r] of each adapter, then the sources. x is
        `function(*sources)` where there is one."""
        flat = x.reshape(-1, x.shape[-1])
        outputs: list[torch.Tensor]
        kept: list[torch.Tensor | None] = []
        if joint is not None:
            outputs = list(linear(x, joint.weight(x.dtype), joint.bias_in(x.dtype)).split(joint.widths, -1))
        else:  # each by its own forward pass, whatever stands in for it
            outputs = [type(projection.base).forward(projection.base, x) for projection in projections]
        weights = iter(tensors)
        adapters = [_Kept(next(weights), next(weights)) for projection in projections if projection.adapter]
        adapted = [(projection, y) for projection, y in zip(projections, outputs, strict=True) if projection.adapter]
        together = launching.take(x) and _is_one_product(projections, adapters)
        if together:
            inner = kernels.project(flat, torch.cat([adapter.a for adapter in adapters]), adapted[0][0].scaling)
            for part, adapter, (_, y) in zip(inner.split(_ranks(adapters), -1), adapters, adapted, strict=True):
                y.view(-1, y.shape[-1]).addmm_(part, adapter.b.t())
            kept.append(inner)
        else:
            for adapter, (projection, y) in zip(adapters, adapted, strict=True):
                kept += _add_adapter_(y.view(-1, y.shape[-1]), flat, adapter.a, adapter.b, projection, seed)
        ctx.save_for_backward(seed, *tensors, *kept)
        ctx.settings = projections, joint, function, len(tensors), x.shape, together
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        projections, joint, function, count, shape, together = ctx.settings
        seed, *saved = ctx.saved_tensors
        adapted = 2 * sum(projection.adapter is not None for projection in projections)
        weights, sources, kept = iter(saved[:adapted]), saved[adapted:count], iter(saved[count:])
        x = sources[0] if function is None else function(*sources)
        x = x.reshape(-1, x.shape[-1])
        grads = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grad_outputs]  # [tokens, out]
        grad_x = _grad_of_input(grads, projections, joint) if ctx.needs_input_grad[0] else None
        adapters = [_Kept(next(weights), next(weights)) for projection in projections if projection.adapter]
        own = [(projection, grad) for projection, grad in zip(projections, grads, strict=True) if projection.adapter]
        adapter_grads: list[torch.Tensor | None] = []
        known = [grad for _, grad in own if grad is not None]
        if together and len(known) == len(own):
            adapter_grads += _adapters_backward(known, adapters, next(kept), x, grad_x, own[0][0].scaling)
        else:
            inners = next(kept).split(_ranks(adapters), -1) if together else None
            for index, (adapter, (projection, grad)) in enumerate(zip(adapters, own, strict=True)):
                inner, mask = (inners[index].contiguous(), None) if inners else (next(kept), next(kept))
                if grad is None:
                    adapter_grads += [None, None]
                    continue
                adapter_grads += _adapter_backward(
                    grad, adapter._replace(inner=inner, mask=mask), x, grad_x, projection, seed
                )
        grad_x = None if grad_x is None else grad_x.view(shape)
        return grad_x, None, None, None, None, *adapter_grads, *(None,) * len(sources)


class _ProjectWhole(torch.autograd.Function):
    """The same, of layers that are one with their adapters."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        whole: Whole,
        has_room: bool,
        function: Callable[..., torch.Tensor] | None,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """As `_Project.forward`. `has_room`: whether the rows of x have room for what comes between the factors."""
        flat, _ = kernels.flat(x)
        y, inner = whole.forward(flat, has_room=has_room)
        ctx.save_for_backward(inner, *tensors[2 * len(whole.widths) :])
        ctx.settings = whole, function, x.shape
        ctx.set_materialize_grads(False)
        outputs: tuple[torch.Tensor, ...] = y.view(*x.shape[:-1], whole.out).split(whole.widths, -1)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        whole, function, shape = ctx.settings
        inner, *sources = ctx.saved_tensors
        x = sources[0] if function is None else function(*sources)
        x = x.reshape(-1, x.shape[-1])
        row = whole.with_room(*grad_outputs)
        reached, grad_x = whole.backward(row, reaches_x=ctx.needs_input_grad[0])
        factors = factor_gradients(whole, row, reached, inner, x)
        return None if grad_x is None else grad_x.view(shape), None, None, None, *factors, *(None,) * len(sources)


def factor_gradients(
    whole: Whole, grad: torch.Tensor, reached: torch.Tensor, inner: torch.Tensor, x: torch.Tensor | None
) -> list[torch.Tensor | None]:
    """Those of each adapter's two factors, given that of the layers' outputs [tokens, out], what came back through the
    second factors, what they were multiplied with and the layers' input; without that, None in the first ones' place.
    """
    firsts: list[torch.Tensor | None] = [None] * len(whole.ranks)
    if x is not None:
        first = torch.empty(whole.room, x.shape[-1], dtype=x.dtype, device=x.device)
        firsts = [*first.addmm_(reached.t(), x, beta=0, alpha=whole.scaling).split(whole.ranks)]
    second = grad.t() @ inner  # of each layer and each adapter; the layer's own is asked for
    seconds = [part.split(whole.ranks, -1)[index].contiguous() for index, part in enumerate(second.split(whole.widths))]
    return [factor for pair in zip(firsts, seconds, strict=True) for factor in pair]


def _is_one_product(projections: list[Projection], adapters: list[_Kept]) -> bool:
    """Whether the first factors of several adapters can be one: nothing is dropped, so that they see the same."""
    adapted = [projection for projection in projections if projection.adapter]
    if len(adapted) < 2 or len({projection.scaling for projection in adapted}) > 1:
        return False
    return not any(projection.p for projection in adapted) and sum(_ranks(adapters)) <= MOST_RANKS


def _ranks(adapters: list[_Kept]) -> list[int]:
    return [adapter.a.shape[0] for adapter in adapters]


def _grad_of_input(
    grads: list[torch.Tensor | None], projections: list[Projection], joint: Joint | None
) -> torch.Tensor | None:
    """The frozen layers' part of the gradient of their input, [tokens, in], given those of their outputs."""
    if joint is not None and (row := joined.side_by_side(grads)) is not None:
        return row @ joint.weight(row.dtype)
    grad_x = None
    for projection, grad in zip(projections, grads, strict=True):
        if grad is None:
            continue
        weight = weight_of(projection.base, grad.dtype)
        grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
    return grad_x


def _adapters_backward(
    grads: list[torch.Tensor],
    adapters: list[_Kept],
    inner: torch.Tensor,
    x: torch.Tensor,
    grad_x: torch.Tensor | None,
    scaling: float,
) -> list[torch.Tensor]:
    """As `_adapter_backward`, of several adapters whose first factors were one."""
    ranks = _ranks(adapters)
    reached = torch.empty_like(inner)  # what comes back through the second factors
    for part, grad, adapter in zip(reached.split(ranks, -1), grads, adapters, strict=True):
        torch.mm(grad, adapter.b, out=part)
    whole = torch.cat([adapter.a for adapter in adapters])
    grad_a = kernels.project_backward(reached, x, whole, grad_x, scaling)
    grads_b = [grad.t() @ part for part, grad in zip(inner.split(ranks, -1), grads, strict=True)]
    return [each for pair in zip(grad_a.split(ranks), grads_b, strict=True) for each in pair]


def _add_adapter_(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, projection: Projection, seed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Add scaling * dropout(x) @ a.T @ b.T to y, [tokens, out]; return what b was multiplied with, [tokens, r], and
    dropout's mask where it must be kept."""
    if launching.take(x):
        site, p = projection.site, projection.p
        return kernels.add_adapter_(y, x, a, b, projection.scaling, p, seed, site), None
    x, mask = drop(x, projection.p)
    inner = (x @ a.t()).mul_(projection.scaling)
    y.addmm_(inner, b.t())
    return inner, mask


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
    assert inner is not None
    if launching.take(x):
        site, p = projection.site, projection.p
        return kernels.adapter_backward(grad, inner, x, a, b, grad_x, projection.scaling, p, seed, site)
    reached = (grad @ b) * projection.scaling
    if grad_x is not None:
        grad_x += drop_backward(reached @ a, mask, projection.p)
    return reached.t() @ drop_backward(x, mask, projection.p), grad.t() @ inner


def weight_of(base: Any, dtype: torch.dtype) -> torch.Tensor:
    """[out, in], dequantized where it is quantized."""
    if isinstance(base, Linear4bit):
        packed: Any = base.weight
        return bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state).to(dtype)
    whole: torch.Tensor = base.weight
    return whole
