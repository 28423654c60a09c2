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
from torch.nn.functional import layer_norm, rms_norm, silu
from transformers.activations import SiLUActivation
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from lightweight.captured import kernels
from lightweight.captured.dropout import drop, drop_backward, probability

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


def norm(weight: torch.Tensor, bias: torch.Tensor | None, eps: float, centred: bool, x: torch.Tensor) -> torch.Tensor:
    """Layer norm, or RMS norm where it is not `centred`: [..., width] -> [..., width], `weight` and `bias` frozen."""
    if kernels.take(x):
        result: torch.Tensor = _Norm.apply(x, weight, bias, eps, centred)  # type: ignore[no-untyped-call]
        return result
    return layer_norm(x, weight.shape, weight, bias, eps) if centred else rms_norm(x, weight.shape, weight, eps)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, centred: bool
    ) -> torch.Tensor:
        result, statistics = kernels.norm(x, weight, bias, eps, centred)
        ctx.save_for_backward(x, weight, statistics)
        ctx.centred = centred
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, statistics = ctx.saved_tensors
        return kernels.norm_backward(grad_output, x, weight, statistics, ctx.centred), None, None, None, None


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
        result, positive = kernels.relu(x) if kernels.take(x) else (torch.relu(x), x > 0)
        ctx.save_for_backward(positive)
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> torch.Tensor:
        (positive,) = ctx.saved_tensors
        if kernels.take(grad_output):
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
    weight, bias, eps = layer.weight, layer.bias, layer.eps
    result, past, total = _AddNorm.apply(branch, past, weight, bias, eps, p, seed, site)  # type: ignore[no-untyped-call]
    result.recipe = (functools.partial(norm, weight, bias, eps, True), (total,))
    return result, past


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913  autograd takes tensors one by one
        ctx: Any,
        branch: torch.Tensor,
        past: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
        p: float,
        seed: torch.Tensor,
        site: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if kernels.take(branch):
            mask = None
            result, total, statistics = kernels.add_norm(branch, past, weight, bias, eps, p, seed, site)
        else:
            kept, mask = drop(branch, p)
            total = past + kept
            result, mean, factor = torch.native_layer_norm(total, weight.shape, weight, bias, eps)
            statistics = torch.cat([mean, factor], -1)
        ctx.save_for_backward(total, weight, statistics, seed, mask)
        ctx.settings = p, site
        ctx.mark_non_differentiable(total)
        ctx.set_materialize_grads(False)
        return result, result.detach(), total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        total, weight, statistics, seed, mask = ctx.saved_tensors
        p, site = ctx.settings
        grads = [grad for grad in grad_outputs[:2] if grad is not None]
        if kernels.take(total):
            grad_branch, grad_past = kernels.add_norm_backward(grads, total, weight, statistics, p, seed, site)
        else:
            mean, factor = (part.contiguous() for part in statistics.split(1, -1))
            ends = [True, False, False]
            grad_past, *_ = torch.ops.aten.native_layer_norm_backward(
                sum(grads), total, weight.shape, mean, factor, weight, None, ends
            )
            grad_branch = drop_backward(grad_past, mask, p)
        return grad_branch, grad_past, *(None,) * 6


def is_gated(module: Any) -> bool:
    """A gated feed-forward layer as Llama, Mistral and Qwen have it: down(silu(gate(x)) * up(x))."""
    names = [name for name, _ in module.named_children()]
    return sorted(names) == ["act_fn", "down_proj", "gate_proj", "up_proj"] and type(module.act_fn) in (
        SiLUActivation,
        torch.nn.SiLU,
    )


def gated(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The forward pass of such a layer: [..., width] -> [..., width]."""
    gate, up = module.gate_proj(x), module.up_proj(x)
    product: torch.Tensor = _Gate.apply(gate, up)  # type: ignore[no-untyped-call]
    product.recipe = (_gate, (gate.detach(), up.detach()))  # type: ignore[attr-defined]
    down: torch.Tensor = module.down_proj(product)
    return down


def _gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return kernels.gate(gate, up) if kernels.take(gate) else silu(gate) * up


class _Gate(torch.autograd.Function):
    """silu(gate) * up, keeping the two alone."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return _gate(gate, up)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        if kernels.take(gate):
            return kernels.gate_backward(grad_output, gate, up)
        return torch.ops.aten.silu_backward(grad_output * up, gate), grad_output * silu(gate)
