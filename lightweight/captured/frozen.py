"""What a frozen layer keeps for its backward pass: at 2048 tokens that, not the weights, is what fills a card.

peft's LoRA layer keeps its dropped-out input and a mask besides what the layer before it keeps anyway, and passes over
its output three times. Here the layers that project one input, as query, key and value do, are one function with their
adapters. It keeps their input once, or, where that is the output of a norm or an activation, nothing: those are
computed again from what they themselves keep. Dropout's masks are drawn again from a seed where Triton can do it in the
same pass over memory. Frozen layers alone are changed, while the captured step trains; everything is exact up to
rounding.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lightweight.preload import peft  # isort: skip  # before transformers, which may import it

import bitsandbytes.functional
import torch
from bitsandbytes.nn.modules import Linear4bit
from torch.nn.functional import gelu, layer_norm, linear, rms_norm, silu
from transformers.activations import NewGELUActivation, SiLUActivation
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from lightweight.captured.dropout import probability

try:
    from lightweight.captured import kernels
except ImportError:  # no Triton: masks are kept
    kernels = None  # type: ignore[assignment]

SIBLINGS = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
"""Names under which a module's children project one and the same input."""

Recipe = tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]
"""How to compute a tensor again, and from what."""


class Lean:
    """The frozen layers of a peft model with this module's forward passes, until `undo`.

    `roll` must be called before every forward pass: dropout's numbers of that pass and its backward pass follow from
    one draw of torch's generator.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.changed: list[Any] = []
        device = next(model.parameters()).device
        self._seed = torch.zeros((), dtype=torch.int64, device=device)
        adapted: list[Any] = [module for module in model.modules() if _is_plain_lora(module)]
        widths = {module.in_features for module in adapted}
        # Rotary embeddings make new queries and keys; in one tensor with the values the old ones would be kept as well.
        joins = getattr(getattr(model, "config", None), "rope_parameters", None) is None
        site = 0
        for modules in _families(model, adapted):
            family = _Family(modules, self._seed, site, joins=joins)
            for index, module in enumerate(modules):
                self._change(module, functools.partial(family.project, index))
            site += len(modules)
        for module in model.modules() if adapted else ():
            if _is_gated(module):
                self._change(module, functools.partial(_gated, module))
            elif _is_post_norm_opt(module):
                self._change(module, functools.partial(_post_norm_opt, module, self._seed, site))
                site += 2
            elif not any(parameter.requires_grad for parameter in module.parameters()) and (
                forward := _forward_of(module, widths)
            ):
                self._change(module, forward)

    def roll(self) -> None:
        """Draw the seed of the next forward pass's dropout, on the device."""
        self._seed.random_(2**31)

    def undo(self) -> None:
        """Give every layer its own forward pass back."""
        for module in self.changed:
            del module.forward
        self.changed.clear()

    def _change(self, module: Any, forward: Callable[..., torch.Tensor]) -> None:
        module.forward = forward
        self.changed.append(module)


def start_quickly() -> None:
    """`kernels.start_quickly`, where there are kernels."""
    if kernels is not None:
        kernels.start_quickly()


def compiling() -> contextlib.AbstractContextManager[None]:
    """`kernels.compiling` where there are kernels; else what is inside is run like anything."""
    return contextlib.nullcontext() if kernels is None else kernels.compiling()


def _recomputable(function: Callable[..., torch.Tensor], *sources: torch.Tensor) -> torch.Tensor:
    """`function(*sources)`, marked with how it came about."""
    result = function(*sources)
    result.recipe = (function, sources)  # type: ignore[attr-defined]
    return result


def _forward_of(module: Any, widths: set[int]) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A forward pass of a norm or an activation whose output can be computed again; None for any other module.

    `widths`: what the adapted layers take; an activation no adapter looks at need not be kept itself.
    """
    function: Callable[[torch.Tensor], torch.Tensor]
    if type(module) is torch.nn.LayerNorm and len(module.normalized_shape) == 1 and module.weight is not None:
        function = functools.partial(_norm, module.weight, module.bias, module.eps, True)
    elif type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        function = functools.partial(_norm, module.weight, None, module.variance_epsilon, False)
        if not _agree(function, module, module.weight):  # some add one to the weight
            return None
    elif type(module) is NewGELUActivation:
        function = functools.partial(gelu, approximate="tanh")  # the same formula, in one pass instead of eight
    elif type(module) in (SiLUActivation, torch.nn.SiLU):
        function = silu
    elif type(module) is torch.nn.ReLU:
        return functools.partial(_relu, widths)
    else:
        return None
    return functools.partial(_recomputable, function)


def _agree(function: Callable[[torch.Tensor], torch.Tensor], module: Any, like: torch.Tensor) -> bool:
    sample = torch.linspace(-3, 3, 4 * like.numel(), device=like.device, dtype=like.dtype).view(4, -1)
    with torch.no_grad():
        return torch.allclose(function(sample), module(sample), rtol=2e-2, atol=1e-3)


def _is_plain_lora(module: Any) -> bool:
    """One LoRA adapter without variants, in its layer's own number format, on a frozen layer."""
    if not isinstance(module, peft.tuners.lora.LoraLayer) or not isinstance(module, torch.nn.Module):
        return False
    base: Any = module.get_base_layer()
    if not (type(base) is torch.nn.Linear or isinstance(base, Linear4bit)):
        return False
    names = list(module.lora_A.keys())
    if len(names) != 1 or module.active_adapters != names or module.merged or module.disable_adapters:
        return False
    (name,) = names
    computed_in = base.weight.dtype if type(base) is torch.nn.Linear else base.compute_dtype
    return (
        not module.lora_variant
        and type(module.lora_B[name]) is torch.nn.Linear  # AdaLoRA's and others' are weights by themselves
        and module.lora_B[name].bias is None
        and not any(parameter.requires_grad for parameter in base.parameters())
        and module.lora_A[name].weight.dtype == computed_in
    )


def _families(model: torch.nn.Module, adapted: list[Any]) -> Iterator[list[Any]]:
    """The adapted layers, each together with the frozen ones that project the same input."""
    left = dict.fromkeys(adapted)
    for parent in model.modules():
        for names in SIBLINGS:
            family = [child for name, child in parent.named_children() if name in names]
            if not any(child in left for child in family) or not all(
                child in left or _is_frozen_linear(child) for child in family
            ):
                continue
            yield family
            for child in family:
                left.pop(child, None)
    yield from ([module] for module in left)


def _is_frozen_linear(module: Any) -> bool:
    return (type(module) is torch.nn.Linear or isinstance(module, Linear4bit)) and not any(
        parameter.requires_grad for parameter in module.parameters()
    )


@dataclass(frozen=True)
class _Projection:
    """A frozen layer, its adapter's settings where it has one, and the number its dropout is drawn with."""

    base: Any
    site: int
    scaling: float = 0.0
    p: float = 0.0
    adapter: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(cls, module: Any, site: int) -> _Projection:
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


class _Family:
    """Layers that project one input. The first one asked computes all; its siblings then hand theirs out."""

    def __init__(self, modules: list[Any], seed: torch.Tensor, site: int, *, joins: bool) -> None:
        self._modules, self._seed, self._site = modules, seed, site
        self._joint = _joined([_Projection.of(module, site).base for module in modules]) if joins else None
        self._x: torch.Tensor | None = None
        self._waiting: dict[int, torch.Tensor] = {}

    def project(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """What layer `index` makes of `x`: [..., in] -> [..., out]."""
        if self._x is not x or index not in self._waiting:
            projections = [_Projection.of(module, self._site + i) for i, module in enumerate(self._modules)]
            function, sources = getattr(x, "recipe", (None, (x,)))
            adapters = [weight for projection in projections for weight in projection.adapter or ()]
            outputs = _Projections.apply(x, self._seed, projections, self._joint, function, *adapters, *sources)  # type: ignore[no-untyped-call]
            self._x, self._waiting = x, dict(enumerate(outputs))
        output = self._waiting.pop(index)
        if not self._waiting:
            self._x = None
        return output


class _Projections(torch.autograd.Function):
    """x @ W.T + bias + scaling * dropout(x) @ A.T @ B.T for each W, W and bias frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        seed: torch.Tensor,
        projections: list[_Projection],
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
            a, b, inner, mask = next(weights), next(weights), next(kept), next(kept)
            if grad is None:
                adapter_grads += [None, None]
                continue
            adapter_grads += _adapter_backward(grad, inner, x, a, b, grad_x, projection, seed, mask)
        grad_x = None if grad_x is None else grad_x.view(shape)
        return grad_x, None, None, None, None, *adapter_grads, *(None,) * len(sources)


def _add_adapter_(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, projection: _Projection, seed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Add scaling * dropout(x) @ a.T @ b.T to y, [tokens, out]; return what b was multiplied with, [tokens, r], and
    dropout's mask where it must be kept."""
    if kernels is not None and x.is_cuda:
        site, p = projection.site, projection.p
        return kernels.add_adapter_(y, x, a, b, projection.scaling, p, seed, site), None
    x, mask = _dropout(x, projection.p)
    inner = (x @ a.t()).mul_(projection.scaling)
    y.addmm_(inner, b.t())
    return inner, mask


def _adapter_backward(  # noqa: PLR0913  the tensors of one formula
    grad: torch.Tensor,
    inner: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    grad_x: torch.Tensor | None,
    projection: _Projection,
    seed: torch.Tensor,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `a` and `b`, given that of `_add_adapter_`'s y and what it returned; adds that of x to
    `grad_x`."""
    if kernels is not None and x.is_cuda:
        site, p = projection.site, projection.p
        return kernels.adapter_backward(grad, inner, x, a, b, grad_x, projection.scaling, p, seed, site)
    reached = (grad @ b) * projection.scaling
    if grad_x is not None:
        grad_x += _dropout_backward(reached @ a, mask, projection.p)
    return reached.t() @ _dropout_backward(x, mask, projection.p), grad.t() @ inner


def _dropout(x: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.native_dropout(x, p, True) if p else (x, None)


def _dropout_backward(x: torch.Tensor, mask: torch.Tensor | None, p: float) -> torch.Tensor:
    if mask is None:
        return x
    kept: torch.Tensor = torch.ops.aten.native_dropout_backward(x, mask, 1 / (1 - p))
    return kept


def _weight(base: Any, dtype: torch.dtype) -> torch.Tensor:
    """[out, in], dequantized where it is quantized."""
    if isinstance(base, Linear4bit):
        packed: Any = base.weight
        return bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state).to(dtype)
    whole: torch.Tensor = base.weight
    return whole


def _norm(weight: torch.Tensor, bias: torch.Tensor | None, eps: float, centred: bool, x: torch.Tensor) -> torch.Tensor:
    """Layer norm, or RMS norm where it is not `centred`: [..., width] -> [..., width], `weight` and `bias` frozen."""
    if kernels is not None and x.is_cuda:
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


def _relu(widths: set[int], x: torch.Tensor) -> torch.Tensor:
    """A ReLU whose output an adapter keeps costs nothing; else one byte an element is enough."""
    if x.shape[-1] in widths:
        return torch.relu(x)
    result: torch.Tensor = _Relu.apply(x)  # type: ignore[no-untyped-call]
    return result


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        result, positive = kernels.relu(x) if kernels is not None and x.is_cuda else (torch.relu(x), x > 0)
        ctx.save_for_backward(positive)
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> torch.Tensor:
        (positive,) = ctx.saved_tensors
        if kernels is not None and grad_output.is_cuda:
            return kernels.relu_backward(grad_output, positive)
        grad: torch.Tensor = grad_output * positive
        return grad


def _is_post_norm_opt(module: Any) -> bool:
    """An OPT layer that norms the sum of a branch and what goes past it, as opt-350m alone does."""
    if type(module) is not OPTDecoderLayer or module.do_layer_norm_before:
        return False
    return bool(module.self_attn_layer_norm.elementwise_affine and module.final_layer_norm.elementwise_affine)


def _post_norm_opt(
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
    branch: torch.Tensor, past: torch.Tensor, norm: torch.nn.LayerNorm, p: float, seed: torch.Tensor, site: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm` of past + dropout(branch), twice: for the next branch and for what goes past it, so that the gradients of
    both are added where they are used."""
    result, past, total = _AddNorm.apply(branch, past, norm.weight, norm.bias, norm.eps, p, seed, site)  # type: ignore[no-untyped-call]
    result.recipe = (functools.partial(_norm, norm.weight, norm.bias, norm.eps, True), (total,))
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
        if kernels is not None and branch.is_cuda:
            mask = None
            result, total, statistics = kernels.add_norm(branch, past, weight, bias, eps, p, seed, site)
        else:
            kept, mask = _dropout(branch, p)
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
        if kernels is not None and total.is_cuda:
            grad_branch, grad_past = kernels.add_norm_backward(grads, total, weight, statistics, p, seed, site)
        else:
            mean, factor = (part.contiguous() for part in statistics.split(1, -1))
            ends = [True, False, False]
            grad_past, *_ = torch.ops.aten.native_layer_norm_backward(
                sum(grads), total, weight.shape, mean, factor, weight, None, ends
            )
            grad_branch = _dropout_backward(grad_past, mask, p)
        return grad_branch, grad_past, *(None,) * 6


def _is_gated(module: Any) -> bool:
    """A gated feed-forward layer as Llama, Mistral and Qwen have it: down(silu(gate(x)) * up(x))."""
    names = [name for name, _ in module.named_children()]
    return sorted(names) == ["act_fn", "down_proj", "gate_proj", "up_proj"] and type(module.act_fn) in (
        SiLUActivation,
        torch.nn.SiLU,
    )


def _gated(module: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    product: torch.Tensor = _Gate.apply(gate, up)  # type: ignore[no-untyped-call]
    product.recipe = (_gate, (gate.detach(), up.detach()))  # type: ignore[attr-defined]
    down: torch.Tensor = module.down_proj(product)
    return down


def _gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return kernels.gate(gate, up) if kernels is not None and gate.is_cuda else silu(gate) * up


class _Gate(torch.autograd.Function):
    """silu(gate) * up, keeping the two alone."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return _gate(gate, up)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        if kernels is not None and gate.is_cuda:
            return kernels.gate_backward(grad_output, gate, up)
        return torch.ops.aten.silu_backward(grad_output * up, gate), grad_output * silu(gate)
