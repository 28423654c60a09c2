"""Which activation does a module compute, and does it gate? SwiGLU, GeGLU and their like in one pass each
way; the backward pass computes the activation again from what it is of.

What a module computes is asked of itself, with other modules in the place of its own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from lightweight import preload  # isort: skip  # noqa: F401  # before transformers, which may import peft

import torch
from torch.nn import functional

from lightweight.captured import kernels, launching
from lightweight.captured.joined import Whole
from lightweight.captured.kernels import Activation
from lightweight.captured.projections import Family, Projection, drops_any, factor_gradients, weight_of
from lightweight.captured.recomputed import recipe_of
from lightweight.internals import torch as torch_internals

FUNCTIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "relu2": lambda x: torch.relu(x).square(),
}
"""What a gate may be activated by, as torch has it."""


class Stub(torch.nn.Module):
    """In a module's place where another one is asked what it makes of it: `slope * x + offset`, no two alike."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._slope, self._offset = 1 + 0.37 * number, 0.11 * number - 0.4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] -> [..., width]."""
        return self._slope * x + self._offset


def activation_of(module: Any) -> Activation | None:
    """Which of `FUNCTIONS` it is that `module` computes, if any."""
    if not isinstance(module, torch.nn.Module) or next(module.parameters(), None) is not None:
        return None
    with torch_internals.with_numbers(), torch.no_grad():
        sample = torch.linspace(-6, 6, 49, dtype=torch.float64)
        try:
            found = torch_internals.twin_of(module, dict(module.named_children()))(sample)
        except Exception:  # noqa: BLE001  of any module's code: it is none of these
            return None
        for name, function in FUNCTIONS.items():
            if isinstance(found, torch.Tensor) and torch.allclose(found, function(sample), rtol=1e-6, atol=1e-6):
                return name
    return None


def gating_of(module: Any) -> Activation | None:
    """What a gated feed-forward layer, down(activation(gate(x)) * up(x)), is activated by; None for another module."""
    names = [name for name, _ in module.named_children()]
    if sorted(names) != ["act_fn", "down_proj", "gate_proj", "up_proj"]:
        return None
    activation = activation_of(module.act_fn)
    if activation is None:
        return None
    gate, up, down = (Stub(number) for number in range(3))
    stubs = {"gate_proj": gate, "up_proj": up, "down_proj": down, "act_fn": module.act_fn}
    with torch_internals.with_numbers(), torch.no_grad():
        sample = torch.linspace(-2, 2, 24).view(2, 3, 4)
        try:
            found = type(module).forward(torch_internals.twin_of(module, stubs), sample)
        except Exception:  # noqa: BLE001  as above
            return None
        expected = down(FUNCTIONS[activation](gate(sample)) * up(sample))
        is_gated = isinstance(found, torch.Tensor) and torch.allclose(found, expected, atol=1e-5)
    return activation if is_gated else None


_computes_again = False


@contextlib.contextmanager
def gates_computed_again() -> Iterator[None]:
    """Inside, a gated layer keeps neither gate nor up for its backward pass, which computes both again from the layer's
    input, where a kernel does the rest: 28,672 of the 47,104 numbers that a layer of Llama's 8B keeps of a token."""
    global _computes_again
    before, _computes_again = _computes_again, True
    try:
        yield
    finally:
        _computes_again = before


def gated(module: Any, activation: Activation, down: Family | None, x: torch.Tensor) -> torch.Tensor:
    """The forward pass of such a layer, whose last projection is that of `down`, if of any: [..., width] ->
    [..., width]."""
    gate, up = module.gate_proj(x), module.up_proj(x)
    if launching.take(gate) and down is not None and (projection := down.alone()) is not None:
        assert projection.adapter is not None
        again, sources = _kept(module, gate, up, x)
        is_whole = down.whole is not None and gate.dtype == down.whole.dtype
        by: Any = _GatedWhole if is_whole else _GatedProject
        base = down.whole if is_whole else projection
        return by.apply(gate, up, *projection.adapter, base, activation, again, *sources)  # type: ignore[no-any-return]
    product: torch.Tensor = _Gate.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    product.recipe = (functools.partial(_gate, activation), (gate.detach(), up.detach()))  # type: ignore[attr-defined]
    return module.down_proj(product)  # type: ignore[no-any-return]


Again = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""How gate and up are had in the backward pass, from what was kept."""


def _kept(module: Any, gate: torch.Tensor, up: torch.Tensor, x: torch.Tensor) -> tuple[Again, tuple[torch.Tensor, ...]]:
    """What is kept of gate and up, and how they are had from it."""
    if not _computes_again or drops_any((module.gate_proj, module.up_proj)):
        return lambda *both: both, (gate.detach(), up.detach())
    function, sources = recipe_of(x)
    return functools.partial(_computed_again, module, function, getattr(x, "room", 0)), sources


@torch.no_grad()
def _computed_again(
    module: Any, function: Callable[..., torch.Tensor] | None, room: int, *sources: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up, as the forward pass had them, of an input that `function` makes of its `sources`, and that had
    `room` at the end of its rows."""
    x = sources[0] if function is None else function(*sources)
    if room:
        narrow, x = x, kernels.with_room(x.shape, room, x)
        x.copy_(narrow).room = room  # type: ignore[attr-defined]
    return module.gate_proj(x), module.up_proj(x)


def activated(activation: Activation, x: torch.Tensor) -> torch.Tensor:
    """An activation alone, marked with how it came about."""
    result: torch.Tensor = _Gate.apply(x, None, activation)  # type: ignore[no-untyped-call]
    result.recipe = (functools.partial(_gate, activation), (x.detach(),))  # type: ignore[attr-defined]
    return result


def _gate(activation: Activation, gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    if launching.take(gate):
        return kernels.gate(gate, up, activation)
    value = FUNCTIONS[activation](gate)
    return value if up is None else value * up


class _Gate(torch.autograd.Function):
    """activation(gate) * up, keeping the two alone."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor | None, activation: Activation) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _gate(activation, gate, up)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if launching.take(gate):
            return *kernels.gate_backward(grad_output, gate, up, ctx.activation), None
        with torch.enable_grad():
            source = gate.detach().requires_grad_()
            value = FUNCTIONS[ctx.activation](source)
        change = grad_output if up is None else grad_output * up
        (grad_gate,) = torch.autograd.grad(value, source, change)
        return grad_gate, None if up is None else grad_output * value.detach(), None


class _GatedProject(torch.autograd.Function):
    """activation(gate) * up, projected by a frozen layer with its adapter a [r, in] and b [out, r], without dropout."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        up: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        projection: Projection,
        activation: Activation,
        again: Again,
        *sources: torch.Tensor,
    ) -> torch.Tensor:
        """`again` has gate and up from the `sources`, which are kept in their place."""
        product = kernels.gate(gate, up, activation)
        y: torch.Tensor = type(projection.base).forward(projection.base, product)
        inner = kernels.project(product.view(-1, product.shape[-1]), a, projection.scaling)
        y.view(-1, y.shape[-1]).addmm_(inner, b.t())
        ctx.save_for_backward(a, b, inner, *sources)
        ctx.settings = projection, activation, again
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        a, b, inner, *sources = ctx.saved_tensors
        projection, activation, again = ctx.settings
        gate, up = again(*sources)
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        grad_product = grad @ weight_of(projection.base, grad.dtype)
        reached = kernels.Reached(grad @ b, a, projection.scaling)
        grad_gate, grad_up, grad_a = kernels.gate_project_backward(grad_product, reached, gate, up, activation)
        return grad_gate, grad_up, grad_a, grad.t() @ inner, *(None,) * (3 + len(sources))


class _GatedWhole(torch.autograd.Function):
    """The same by a layer that is one with its adapter."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        up: torch.Tensor,
        a: torch.Tensor,
        _b: torch.Tensor,
        whole: Whole,
        activation: Activation,
        again: Again,
        *sources: torch.Tensor,
    ) -> torch.Tensor:
        product, _ = kernels.flat(kernels.gate(gate, up, activation, whole.room))
        y, inner = whole.forward(product, has_room=True)
        ctx.save_for_backward(a, inner, *sources)
        ctx.settings = whole, activation, again
        return y.view(*gate.shape[:-1], whole.out)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        a, inner, *sources = ctx.saved_tensors
        whole, activation, again = ctx.settings
        gate, up = again(*sources)
        grad = whole.with_room(grad_output)
        reached, grad_product = whole.backward(grad, reaches_x=True)
        assert grad_product is not None
        through = kernels.Reached(reached, a, whole.scaling, is_in=True)
        grad_gate, grad_up, grad_a = kernels.gate_project_backward(grad_product, through, gate, up, activation)
        _, grad_b = factor_gradients(whole, grad, reached, inner, None)
        return grad_gate, grad_up, grad_a, grad_b, *(None,) * (3 + len(sources))
