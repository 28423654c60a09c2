"""What a frozen layer keeps for its backward pass: at 2048 tokens that, not the weights, is what fills a card.

peft's LoRA layer keeps its dropped-out input and a mask besides what the layer before it keeps anyway, and passes over
its output three times. Here a layer and its adapter are one function that keeps its input once, or, where that is the
output of a norm or an activation, nothing: those are computed again from what they themselves keep. Dropout's masks are
drawn again from a seed where Triton can do it in the same pass over memory. Frozen layers alone are changed, while the
captured step trains; everything is exact up to rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lightweight.preload import peft  # isort: skip  # before transformers, which may import it

import bitsandbytes.functional
import torch
from bitsandbytes.nn.modules import Linear4bit
from torch.nn.functional import gelu, layer_norm, rms_norm, silu
from transformers.activations import NewGELUActivation, SiLUActivation

try:
    from lightweight.dropout import drop_again
except ImportError:  # no Triton: masks are kept
    drop_again = None  # type: ignore[assignment]

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
        for site, module in enumerate(adapted):
            self._change(module, functools.partial(_lora, module, self._seed, site))
        for module in model.modules() if adapted else ():
            if _is_gated(module):
                self._change(module, functools.partial(_gated, module))
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
    if type(module) is torch.nn.LayerNorm:
        function = functools.partial(
            layer_norm, normalized_shape=module.normalized_shape, weight=module.weight, bias=module.bias, eps=module.eps
        )
    elif type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        weight, eps = module.weight, module.variance_epsilon
        function = functools.partial(rms_norm, normalized_shape=weight.shape, weight=weight, eps=eps)
        if not _agree(function, module, weight):  # some add one to the weight
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
        and module.lora_B[name].bias is None
        and not any(parameter.requires_grad for parameter in base.parameters())
        and module.lora_A[name].weight.dtype == computed_in
    )


def _lora(module: Any, seed: torch.Tensor, site: int, x: torch.Tensor) -> torch.Tensor:
    """A LoRA layer's output: [..., in] -> [..., out]."""
    (name,) = module.lora_A.keys()
    dropout = module.lora_dropout[name]
    p = dropout.p if module.training and isinstance(dropout, torch.nn.Dropout) else 0.0
    function, sources = getattr(x, "recipe", (None, (x,)))
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    result: torch.Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        x, a, b, seed, module.get_base_layer(), module.scaling[name], p, site, function, *sources
    )
    return result


class _LoraLinear(torch.autograd.Function):
    """x @ W.T + bias + scaling * dropout(x) @ A.T @ B.T, W and bias frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        seed: torch.Tensor,
        base: Any,
        scaling: float,
        p: float,
        site: int,
        function: Callable[..., torch.Tensor] | None,
        *sources: torch.Tensor,
    ) -> torch.Tensor:
        """x: [..., in]; a: [r, in]; b: [out, r]; seed: one number. x is `function(*sources)` where there is one."""
        y: torch.Tensor = base(x)
        flat, mask = x.reshape(-1, x.shape[-1]), None
        if p and drop_again is not None and x.is_cuda:
            dropped = drop_again(flat, p, seed, site)
        elif p:
            dropped, mask = torch.native_dropout(flat, p, True)
        else:
            dropped = flat
        inner = dropped @ a.t()  # [tokens, r]
        y.view(-1, y.shape[-1]).addmm_(inner, b.t(), alpha=scaling)
        ctx.save_for_backward(a, b, seed, inner, mask, *sources)
        ctx.settings = base, scaling, p, site, function
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        a, b, seed, inner, mask, *sources = ctx.saved_tensors
        base, scaling, p, site, function = ctx.settings

        def dropout(tensor: torch.Tensor) -> torch.Tensor:
            """The forward pass's dropout once more, or its gradient: the same kept elements, the same scale."""
            if not p:
                return tensor
            if mask is None:
                return drop_again(tensor, p, seed, site)
            kept: torch.Tensor = torch.ops.aten.native_dropout_backward(tensor, mask, 1 / (1 - p))
            return kept

        grad = grad_output.reshape(-1, grad_output.shape[-1])  # [tokens, out]
        x = sources[0] if function is None else function(*sources)
        grad_inner = (grad @ b).mul_(scaling)  # [tokens, r]
        grad_a = grad_inner.t() @ dropout(x.reshape(-1, x.shape[-1]))
        grad_b = (grad.t() @ inner).mul_(scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _weight(base, grad.dtype)
            if p:
                grad_x += dropout(grad_inner @ a)
            else:
                grad_x.addmm_(grad_inner, a)
            grad_x = grad_x.view(x.shape)
        return grad_x, grad_a, grad_b, *(None,) * (6 + len(sources))


def _weight(base: Any, dtype: torch.dtype) -> torch.Tensor:
    """[out, in], dequantized where it is quantized."""
    if isinstance(base, Linear4bit):
        packed: Any = base.weight
        return bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state).to(dtype)
    whole: torch.Tensor = base.weight
    return whole


def _relu(widths: set[int], x: torch.Tensor) -> torch.Tensor:
    """A ReLU whose output an adapter keeps costs nothing; else one byte an element is enough."""
    if x.shape[-1] in widths:
        return torch.relu(x)
    result: torch.Tensor = _Relu.apply(x)  # type: ignore[no-untyped-call]
    return result


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x > 0)
        return torch.relu(x)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> torch.Tensor:
        positive: torch.Tensor = ctx.saved_tensors[0]
        return grad_output * positive


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
    return silu(gate) * up


class _Gate(torch.autograd.Function):
    """silu(gate) * up, keeping the two alone."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return _gate(gate, up)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad_output * up, gate), grad_output * silu(gate)
