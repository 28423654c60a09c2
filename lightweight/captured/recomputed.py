"""What is computed again in the backward pass instead of kept? Norms and activations, from what they are of.

A tensor that can be is marked with how: its recipe. Who would keep it keeps what it is made from, which a layer before
keeps anyway.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lightweight import preload  # isort: skip  # noqa: F401  # before transformers, which may import peft

import torch
from torch.nn.functional import layer_norm, rms_norm
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from lightweight.captured import kernels, launching
from lightweight.captured.dropout import drop, drop_backward, probability
from lightweight.captured.kernels import Norm, Sum, Summed

Recipe = tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]
"""How to compute a tensor again, and from what."""


def recipe_of(x: torch.Tensor) -> tuple[Callable[..., torch.Tensor] | None, tuple[torch.Tensor, ...]]:
    """How `x` can be computed again, and from what; None, and `x` itself, where it must be kept."""
    recipe: Recipe | None = getattr(x, "recipe", None)
    return recipe or (None, (x,))


def recomputable(function: Callable[..., torch.Tensor], *sources: torch.Tensor) -> torch.Tensor:
    """`function(*sources)`, marked with how it came about."""
    result = function(*sources)
    result.recipe = (function, sources)  # type: ignore[attr-defined]
    return result


def norm(norm: Norm, x: torch.Tensor, room: int = 0) -> torch.Tensor:
    """`norm` of `x`: [..., width] -> [..., width]; by our kernel, with `room` at the end of each row."""
    if launching.take(x):
        result: torch.Tensor = _Norm.apply(x, norm, room)  # type: ignore[no-untyped-call]
        return result
    weight = norm.weight + norm.offset if norm.offset else norm.weight
    if norm.centred:
        return layer_norm(x, weight.shape, weight, norm.bias, norm.eps)
    return rms_norm(x, weight.shape, weight, norm.eps)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: Norm, room: int) -> torch.Tensor:
        result, statistics = kernels.norm(x, norm, room)
        ctx.save_for_backward(x, statistics)
        ctx.norm = norm
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, statistics = ctx.saved_tensors
        return kernels.norm_backward(grad_output, x, ctx.norm, statistics), None, None


def relu(widths: set[int], x: torch.Tensor) -> torch.Tensor:
    """ReLU. Its output costs nothing where an adapter that takes one of `widths` keeps it; else one byte an element, or
    a bit, is enough."""
    if x.shape[-1] in widths:
        return torch.relu(x)
    result: torch.Tensor = _Relu.apply(x)  # type: ignore[no-untyped-call]
    return result


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        result, positive = kernels.relu(x) if launching.take(x) else (torch.relu(x), x > 0)
        ctx.save_for_backward(positive)
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> torch.Tensor:
        (positive,) = ctx.saved_tensors
        if launching.take(grad_output):
            return kernels.relu_backward(grad_output, positive)
        grad: torch.Tensor = grad_output * positive
        return grad


def is_post_norm_opt(module: Any) -> bool:
    """An OPT layer that norms the sum of a branch and what goes past it, as opt-350m alone does."""
    if type(module) is not OPTDecoderLayer or module.do_layer_norm_before:
        return False
    return bool(module.self_attn_layer_norm.elementwise_affine and module.final_layer_norm.elementwise_affine)


def post_norm_opt(
    module: Any, seed: torch.Tensor, site: int, hidden_states: torch.Tensor, attention_mask: Any = None, **options: Any
) -> torch.Tensor:
    """The layer's forward pass, [rows, time, hidden], with dropout, sum and norm as one; dropout's numbers are drawn
    with `site` and the one after it."""
    p = probability(module, module.dropout)
    past = getattr(hidden_states, "past", hidden_states)
    branch, _ = module.self_attn(hidden_states=hidden_states, attention_mask=attention_mask, **options)
    hidden_states, past = _add_norm(branch, past, module.self_attn_layer_norm, p, seed, site)
    branch = module.fc2(module.activation_fn(module.fc1(hidden_states)))
    hidden_states, past = _add_norm(branch, past, module.final_layer_norm, p, seed, site + 1)
    hidden_states.past = past  # type: ignore[attr-defined]
    return hidden_states


def _add_norm(
    branch: torch.Tensor, past: torch.Tensor, layer: torch.nn.LayerNorm, p: float, seed: torch.Tensor, site: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm `layer` of past + dropout(branch), twice: for the next branch and for what goes past it, so that the
    gradients of both are added where they are used."""
    made = Sum(Norm(layer.weight, layer.bias, layer.eps, True), None, p, site)
    result, past, total = _RecomputedAddNorm.apply(branch, past, made, seed)  # type: ignore[no-untyped-call]
    result.recipe = (functools.partial(norm, made.norm), (total,))
    return result, past


class _RecomputedAddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, branch: torch.Tensor, past: torch.Tensor, made: Sum, seed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mask = None
        if launching.take(branch):
            total, result, statistics, _ = kernels.add_norm(branch, past, made, seed)
        else:
            weight, bias, eps, *_ = made.norm
            kept, mask = drop(branch, made.p)
            total = past + kept
            result, mean, factor = torch.native_layer_norm(total, weight.shape, weight, bias, eps)
            statistics = torch.cat([mean, factor], -1)
        ctx.save_for_backward(total, statistics, seed, mask)
        ctx.made = made
        ctx.mark_non_differentiable(total)
        ctx.set_materialize_grads(False)
        return result, result.detach(), total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        total, statistics, seed, mask = ctx.saved_tensors
        made: Sum = ctx.made
        grads = [grad for grad in grad_outputs[:2] if grad is not None]
        if launching.take(total):
            summed = Summed(total, total, statistics, None)
            grad_branch, grad_past = kernels.add_norm_backward(grads, None, None, summed, made, seed)
        else:
            weight = made.norm.weight
            mean, factor = (part.contiguous() for part in statistics.split(1, -1))
            ends = [True, False, False]
            grad_past, *_ = torch.ops.aten.native_layer_norm_backward(
                sum(grads), total, weight.shape, mean, factor, weight, None, ends
            )
            grad_branch = drop_backward(grad_past, mask, made.p)
        return grad_branch, grad_past, None, None
