"""Which decoder layers add to a residual stream, and where is a norm taken of that sum? Sum and norm become one kernel,
forward and backward; so does the norm that some architectures take of a branch before it is added.

A layer is asked what it does with stubs in the place of its modules, for its names say too little: some scale their
branches, some norm them, some compute both from one norm.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from lightweight.captured import kernels, launching, recomputed
from lightweight.captured.activations import Stub
from lightweight.captured.kernels import Norm, Sum, Summed
from lightweight.internals import torch as torch_internals


@dataclass(frozen=True)
class Form:
    """The names of the norms before a layer's attention and its feed-forward layer, and of those after them, if any."""

    before: tuple[str, str]
    after: tuple[str, str] | None = None


FORMS = (
    Form(("input_layernorm", "post_attention_layernorm")),  # Llama and most others
    Form(
        ("input_layernorm", "pre_feedforward_layernorm"), ("post_attention_layernorm", "post_feedforward_layernorm")
    ),  # Gemma since its second
)
PASSED_ON = ("attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings")
"""What a model gives its layers by name, and a layer of these forms its attention as it is."""


def form_of(layer: Any) -> Form | None:
    """The form that `layer` has, asked of it; None for a module of any other."""
    names = {name for name, _ in layer.named_children()}
    for form in FORMS:
        if names == {"self_attn", "mlp", *form.before, *(form.after or ())}:
            return form if _has(layer, form) else None
    return None


class _Attention(torch.nn.Module):
    """In an attention's place; keeps what it is given by name."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, Any] = {}

    def forward(self, hidden_states: torch.Tensor, **given: Any) -> tuple[torch.Tensor, None]:
        self.given = given
        return hidden_states.sin(), None


def _has(layer: Any, form: Form) -> bool:
    stubs: dict[str, Any] = {name: Stub(n) for n, name in enumerate(("mlp", *form.before, *(form.after or ())), 1)}
    attention = _Attention()
    given = {name: object() for name in PASSED_ON}
    with torch_internals.with_numbers(), torch.no_grad():
        sample = torch.linspace(-2, 2, 24).view(2, 3, 4)
        twin = torch_internals.twin_of(layer, {**stubs, "self_attn": attention})
        try:
            found = type(layer).forward(twin, sample, **given)
        except Exception:  # noqa: BLE001  of any layer's code: it is none of these
            return False
        norms = [stubs[name] for name in form.before]
        after = [stubs[name] for name in form.after] if form.after else [torch.nn.Identity()] * 2
        total = sample + after[0](norms[0](sample).sin())
        expected = total + after[1](stubs["mlp"](norms[1](total)))
        if not isinstance(found, torch.Tensor) or not torch.allclose(found, expected, atol=1e-5):
            return False
    return all(attention.given.get(name) is value for name, value in given.items())


@dataclass(frozen=True)
class Block:
    """A layer of some `form`, with the norms that it and its follower take, by the modules that take them."""

    layer: Any
    form: Form
    norms: dict[Any, Norm]
    follower: Any = None
    """The module that takes a norm of what the layer gives, if that is one of `norms`."""
    rooms: dict[Any, int] = field(default_factory=dict)
    """What room the rows of a norm's result have at their end, by the module that takes it."""

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
        """The layer's forward pass: [rows, time, hidden] -> [rows, time, hidden]."""
        layer = self.layer
        first, second = (getattr(layer, name) for name in self.form.before)
        after = [getattr(layer, name) for name in self.form.after or ()] or [None, None]
        branch, _ = layer.self_attn(hidden_states=first(hidden_states), **options)
        hidden_states = self._add(hidden_states, branch, after[0], second)
        # a layer that is checkpointed computes all of its own again, and nothing of its follower's
        follower = None if getattr(layer, "gradient_checkpointing", False) else self.follower
        return self._add(hidden_states, layer.mlp(second(hidden_states)), after[1], follower)

    def _add(self, past: torch.Tensor, branch: torch.Tensor, after: Any, taker: Any) -> torch.Tensor:
        """past + after(branch). `taker` finds the norm that it takes of it beside it."""
        if taker is None or not launching.take(branch) or branch.dtype != past.dtype:
            return past + (branch if after is None else after(branch))
        room = self.rooms.get(taker, 0)
        made = Sum(self.norms[taker], None if after is None else self.norms[after], room=room)
        total, result = _AddNorm.apply(past, branch, made)  # type: ignore[no-untyped-call]
        result.recipe, result.room = (functools.partial(recomputed.norm, made.norm), (total.detach(),)), room
        total.normed = (taker, result)
        return total  # type: ignore[no-any-return]


def blocks_of(model: torch.nn.Module, norms: dict[Any, Norm]) -> Iterator[Block]:
    """The layers of `model` that have one of the forms, given its frozen `norms`."""
    for owner in model.modules():
        for layers in owner.children():
            if not isinstance(layers, torch.nn.ModuleList):
                continue
            forms = [form if (form := form_of(layer)) and _are_taken(layer, form, norms) else None for layer in layers]
            last = [child for child in owner.children() if child in norms]
            for index, (layer, form) in enumerate(zip(layers, forms, strict=True)):
                if form is None:
                    continue
                follower = None
                if index + 1 == len(layers):
                    follower = last[0] if len(last) == 1 else None
                elif (following := forms[index + 1]) is not None:
                    follower = getattr(layers[index + 1], following.before[0])
                yield Block(layer, form, norms, follower)


def _are_taken(layer: Any, form: Form, norms: dict[Any, Norm]) -> bool:
    """Whether the norms of a layer are among those that the kernel takes."""
    after = [norms.get(getattr(layer, name)) for name in form.after or ()]
    return all(getattr(layer, name) in norms for name in form.before) and all(
        norm is not None and not norm.centred and norm.bias is None for norm in after
    )


def normed(module: Any, norm: Norm, room: int, x: torch.Tensor) -> torch.Tensor:
    """The forward pass of a `module` that takes a `norm`, with `room` at the end of each row: what was computed
    together with `x`, if it was."""
    taken: tuple[Any, torch.Tensor] | None = vars(x).pop("normed", None)  # or it would live as long as `x` is kept
    if taken is not None and taken[0] is module:
        return taken[1]
    if not room or not launching.take(x):
        return recomputed.recomputable(functools.partial(recomputed.norm, norm), x)
    result = recomputed.norm(norm, x, room)
    vars(result).update(recipe=(functools.partial(recomputed.norm, norm), (x,)), room=room)
    return result


class _AddNorm(torch.autograd.Function):
    """A sum, and the norm of it."""

    @staticmethod
    def forward(ctx: Any, past: torch.Tensor, branch: torch.Tensor, made: Sum) -> tuple[torch.Tensor, torch.Tensor]:
        summed = kernels.add_norm(branch, past, made, _no_seed(past))
        ctx.save_for_backward(summed.total, summed.statistics, summed.after_statistics, branch if made.after else None)
        ctx.made, ctx.room = made, kernels.flat(branch)[1] - branch.shape[-1]
        ctx.set_materialize_grads(False)
        return summed.total, summed.result

    @staticmethod
    def backward(
        ctx: Any, grad_total: torch.Tensor | None, grad_result: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        total, statistics, after_statistics, branch = ctx.saved_tensors
        made: Sum = ctx.made
        summed = Summed(total, total, statistics, after_statistics)
        if grad_result is None:
            grad_result = torch.zeros_like(total)
        grad_branch, grad_past = kernels.add_norm_backward(
            [grad_result], grad_total, branch, summed, made, _no_seed(total), ctx.room
        )
        return grad_past, grad_branch, None


def _no_seed(x: torch.Tensor) -> torch.Tensor:
    """What stands for a seed where nothing is dropped: any memory of the device."""
    return x
