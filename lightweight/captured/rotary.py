"""Are queries and keys turned by rotary embeddings, and how? In one pass forward and one backward, in place, and with
the norm that some architectures take of each head before it.

transformers' models turn them by a function of their modelling module. A sample shows which elements of a head it
turns, and by what; a function that does anything else is left alone.

In place, what a head was before is gone. The backward pass of a norm needs it, and turns what became of it back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lightweight.captured import launching, recomputed
from lightweight.captured.kernels import Norm, power_of_2
from lightweight.captured.launching import launch
from lightweight.internals import torch as torch_internals
from lightweight.internals import transformers as transformers_internals

MOST_SPREAD = 64.0
"""How many times the smallest weight of a norm its largest may be, for what the norm was of to be computed from its
result: the half that keeps three digits of a large element keeps none of a small one beside it."""

# The kernels


class Turns(NamedTuple):
    """Cosines and sines of rotary embeddings, [batch or 1, time, width], and which elements of a head they turn: pairs
    of `neighbours`, or of one in the first half of `width` and one in the second. A pair has one cosine for each of its
    elements, or, where they are `repeated`, the first half of `width` has those of all pairs."""

    cos: torch.Tensor
    sin: torch.Tensor
    neighbours: bool
    repeated: bool


Pair = tuple[torch.Tensor, torch.Tensor]
"""Of queries and of keys: [batch, heads, time, width], elements of a head side by side."""


def rotate(queries_keys: Pair, results: Pair, turns: Turns, norms: tuple[Norm, Norm] | None) -> Pair | None:
    """Write queries and keys, turned, to `results`, which may be what they are themselves; where there are `norms`, the
    RMS norm of each head first, whose reciprocal deviations are returned."""
    (q, k), (new_q, new_k) = queries_keys, results
    batch, heads, time, width = q.shape
    factors = None
    if norms is not None:
        factors = (
            torch.empty(batch, time, heads, device=q.device),
            torch.empty(batch, time, k.shape[1], device=q.device),
        )
    q_norm, k_norm = norms or (Norm(q, None, 0.0, False),) * 2
    q_factors, k_factors = factors or (q, k)
    sizes, settings = _turned(width, (heads, k.shape[1]), turns, copies=new_q is not q)
    launch(
        "rotate", (batch * time,),
        q, k, new_q, new_k, q_norm.weight, k_norm.weight, q_factors, k_factors, turns.cos, turns.sin, q_norm.eps,
        q_norm.offset, time, *sizes, *_strides(q, k, new_q, new_k), *_turn_strides(turns),
        normed=norms is not None, **settings,
    )  # fmt: skip
    return factors


def rotate_backward(
    grads: Pair,
    kept: Pair,
    results: Pair,
    turns: Turns,
    norms: tuple[Norm, Norm] | None,
    factors: Pair | None,
    *,
    turned: bool,
) -> None:
    """Write the gradients of `rotate`'s queries and keys to `results`, given those of its results. Where there are
    `norms`, `kept` are what it was given, or, where they are `turned`, what it made of them; `factors` what it
    returned."""
    (grad_q, grad_k), (q, k), (new_q, new_k) = grads, kept, results
    batch, heads, time, width = grad_q.shape
    q_norm, k_norm = norms or (Norm(q, None, 0.0, False),) * 2
    q_factors, k_factors = factors or (q, k)
    sizes, settings = _turned(width, (heads, grad_k.shape[1]), turns, copies=True)
    launch(
        "rotate_backward", (batch * time,),
        grad_q, grad_k, q, k, new_q, new_k, q_norm.weight, k_norm.weight, q_factors, k_factors, turns.cos, turns.sin,
        q_norm.offset, time, *sizes, *_strides(grad_q, grad_k, q, k, new_q, new_k), *_turn_strides(turns),
        normed=norms is not None, turned=turned, **settings,
    )  # fmt: skip


def _turned(
    width: int, heads: tuple[int, int], turns: Turns, *, copies: bool
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """What both passes of a rotation are told about sizes, as they are and as tiles hold them."""
    half = turns.cos.shape[-1] // 2
    rest = width - 2 * half if copies else 0
    return (half, rest, *heads), {
        "neighbours": turns.neighbours,
        "repeated": turns.repeated,
        "q_heads": power_of_2(heads[0]),
        "k_heads": power_of_2(heads[1]),
        "half": power_of_2(half),
        "rest": power_of_2(rest) if rest else 0,
    }


def _strides(*tensors: torch.Tensor) -> list[int]:
    """Of [batch, heads, time, width], how far apart rows, tokens and heads lie."""
    return [stride for x in tensors for stride in (x.stride(0), x.stride(2), x.stride(1))]


def _turn_strides(turns: Turns) -> tuple[int, int]:
    """How far apart the turns of rows and of tokens lie."""
    return (turns.cos.stride(0) if turns.cos.shape[0] > 1 else 0), turns.cos.stride(1)


# What a model's function does


class Pairing(NamedTuple):
    """Which elements of a head are turned together, and by which cosines; as in `Turns`."""

    neighbours: bool
    repeated: bool


PAIRINGS = (Pairing(False, False), Pairing(True, False), Pairing(True, True))


def turned(x: torch.Tensor, turns: Turns) -> torch.Tensor:
    """What `rotate` makes of `x` [batch, heads, time, width], by torch."""
    width = turns.cos.shape[-1]
    half = width // 2
    pairs = torch.arange(width).view(half, 2) if turns.neighbours else torch.arange(width).view(2, half).t()
    first, second = pairs.unbind(1)
    at, also_at = (torch.arange(half),) * 2 if turns.repeated else (first, second)
    cos, sin = turns.cos.unsqueeze(1), turns.sin.unsqueeze(1)
    result = x.clone()
    result[..., first] = x[..., first] * cos[..., at] - x[..., second] * sin[..., at]
    result[..., second] = x[..., second] * cos[..., also_at] + x[..., first] * sin[..., also_at]
    return result


@functools.cache
def pairing_of(function: Callable[..., Any], *, is_partial: bool) -> Pairing | None:
    """How `function(q, k, cos, sin)` pairs elements, where it turns whole heads, or a part of them that is as wide as
    the cosines; None where it does something else."""
    generator = torch.Generator().manual_seed(0)
    with torch_internals.with_numbers(), torch.no_grad():
        width = 8 if is_partial else 12
        shapes = (2, 3, 5, 12), (2, 1, 5, 12), (2, 5, width), (2, 5, width)
        q, k, cos, sin = (torch.randn(shape, generator=generator) for shape in shapes)
        try:
            found = function(q.clone(), k.clone(), cos.clone(), sin.clone())
            new_q, new_k = found
        except Exception:  # noqa: BLE001  of any model's code: it cannot do this
            return None
        for pairing in PAIRINGS:
            turns = Turns(cos, sin, *pairing)
            expected = turned(q, turns), turned(k, turns)
            if all(
                found.shape == own.shape and torch.allclose(found, own, atol=1e-5)
                for found, own in zip((new_q, new_k), expected, strict=True)
            ):
                return pairing
    return None


# In its place


@dataclass(frozen=True)
class HeadNorm:
    """A norm of each head, and whether what it was of can be had from its result."""

    norm: Norm
    is_reversible: bool

    @classmethod
    def of(cls, norm: Norm) -> HeadNorm:
        """With its weights looked at."""
        return cls(norm, launching.are_even(norm.weight + norm.offset, MOST_SPREAD))


class Rotation:
    """Stands in for the function of one modelling module by which its attentions turn queries and keys.

    A head's norm that is `deferred` to it is taken together with the turn.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._pending: dict[tuple[int, int], HeadNorm] = {}  # by where its input lies

    @property
    def is_known(self) -> bool:
        """Whether what the function does is what `rotate` does, of whole heads or a part of them."""
        return any(pairing_of(self._function, is_partial=is_partial) is not None for is_partial in (False, True))

    def defer(self, norm: HeadNorm, x: torch.Tensor) -> torch.Tensor:
        """`x`, of which the norm is still to be taken."""
        self._pending[_place(x)] = norm
        return x

    def forward(self, module: Any, norms: dict[Any, Callable[..., Any]], *arguments: Any, **options: Any) -> Any:
        """The forward pass of an attention whose head norms are deferred. Where one of them was not followed by a
        turn, they get the forward passes of their own, `norms`, for good."""
        self._pending.clear()
        result = type(module).forward(module, *arguments, **options)
        if not self._pending:
            return result
        self._pending.clear()
        for norm, forward in norms.items():
            norm.forward = forward
        return type(module).forward(module, *arguments, **options)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: Any, **options: Any
    ) -> Any:
        """As the function: queries and keys, turned."""
        deferred = [self._deferred(x) for x in (q, k)]
        norms = [None if each is None else each.norm for each in deferred]
        pairing = None
        if not more and options.get("unsqueeze_dim", 1) == 1 and len(options) <= 1 and _fit(q, k, cos, sin):
            pairing = pairing_of(self._function, is_partial=cos.shape[-1] < q.shape[-1])
        together = None
        if pairing is not None and cos.shape[-1] == q.shape[-1]:
            together = _alike(*norms)
        if together is None:
            q, k = (x if norm is None else recomputed.norm(norm, x) for norm, x in zip(norms, (q, k), strict=True))
        if pairing is None:
            return self._function(q, k, cos, sin, *more, **options)
        in_place = _is_ours(q) and _is_ours(k)
        if together is not None:
            in_place = in_place and all(each is not None and each.is_reversible for each in deferred)
        return _Rotate.apply(q, k, cos, sin, pairing, together, in_place)  # type: ignore[no-untyped-call]

    def _deferred(self, x: torch.Tensor) -> HeadNorm | None:
        """The norm that is still to be taken of `x`, by head."""
        norm = self._pending.get(_place(x))
        if norm is None or norm.norm.weight.numel() != x.shape[-1]:
            return None
        return self._pending.pop(_place(x))


def install(model: torch.nn.Module) -> tuple[dict[Any, Rotation], Callable[[], None]]:
    """Stand in for what the attentions of `model` turn queries and keys by, where it is known: who stands in, by
    attention; and what undoes it."""
    rotations: dict[int, Rotation] = {}
    undone: list[Callable[[], None]] = []
    by_attention: dict[Any, Rotation] = {}
    for module in model.modules():
        function, replace = transformers_internals.rotation_of(module)
        if function is None:
            continue
        rotation = function if isinstance(function, Rotation) else rotations.get(id(function))
        if rotation is None:
            rotation = rotations[id(function)] = Rotation(function)
            if rotation.is_known:
                undone.append(replace(rotation))
        if rotation.is_known:
            by_attention[module] = rotation

    def undo() -> None:
        for restore in undone:
            restore()

    return by_attention, undo


def _place(x: torch.Tensor) -> tuple[int, int]:
    """Where a tensor lies, whatever its shape."""
    return torch_internals.address(x.untyped_storage()), int(x.storage_offset())


def _fit(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether the kernel takes these."""
    tensors = (q, k, cos, sin)
    if not all(isinstance(x, torch.Tensor) and x.dtype == q.dtype and x.stride(-1) == 1 for x in tensors):
        return False
    if not (launching.take(q) and q.dim() == k.dim() == 4 and cos.dim() == sin.dim() == 3):
        return False
    batch, _, time, width = q.shape
    return (
        k.shape[::2] == (batch, time)
        and k.shape[-1] == width
        and cos.shape == sin.shape
        and cos.stride() == sin.stride()
        and cos.shape[0] in (1, batch)
        and cos.shape[1] == time
        and cos.shape[2] <= width
        and not (cos.requires_grad or sin.requires_grad)
    )


def _alike(q_norm: Norm | None, k_norm: Norm | None) -> tuple[Norm, Norm] | None:
    """Both, where they are norms that the kernel takes together."""
    if q_norm is None or k_norm is None or q_norm.bias is not None or k_norm.bias is not None:
        return None
    if q_norm.centred or k_norm.centred or (q_norm.eps, q_norm.offset) != (k_norm.eps, k_norm.offset):
        return None
    return q_norm, k_norm


VIEWS = {"ViewBackward0", "TransposeBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "SliceBackward0"}
VIEWS |= {"AliasBackward0", "PermuteBackward0", "UnsqueezeBackward0", "SplitBackward0", "SplitWithSizesBackward0"}


def _is_ours(x: torch.Tensor) -> bool:
    """Whether `x` is what a function of our own gave, none of which needs it any more; in whatever shape."""
    node = x.grad_fn
    while node is not None and node.name() in VIEWS:
        (node, _), *_ = node.next_functions
    return node is not None and node.name() in ("_ProjectBackward", "_ProjectWholeBackward", "_NormBackward")


class _Rotate(torch.autograd.Function):
    """Queries and keys [batch, heads, time, width], normed by head where there are `norms`, and turned."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        pairing: Pairing,
        norms: tuple[Norm, Norm] | None,
        in_place: bool,
    ) -> Pair:
        results = (q, k) if in_place else (_laid_out_alike(q), _laid_out_alike(k))
        factors = rotate((q, k), results, Turns(cos, sin, *pairing), norms)
        kept = () if factors is None else (q, k, *factors)
        ctx.save_for_backward(cos, sin, *kept)
        ctx.settings = pairing, norms, in_place, _row_of(q, k)
        new_q, new_k = results
        return (new_q.detach(), new_k.detach()) if in_place else (new_q, new_k)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        pairing, norms, in_place, row = ctx.settings
        cos, sin, *saved = ctx.saved_tensors
        grad_q, grad_k = (grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grad_outputs)
        q, k, *rest = saved or (grad_q, grad_k)
        factors = (rest[0], rest[1]) if rest else None
        results = (_laid_out_alike(grad_q), _laid_out_alike(grad_k)) if row is None else _parts_of(row, grad_q, grad_k)
        turns = Turns(cos, sin, *pairing)
        rotate_backward((grad_q, grad_k), (q, k), results, turns, norms, factors, turned=in_place)
        return *results, *(None,) * 5


def _row_of(q: torch.Tensor, k: torch.Tensor) -> int | None:
    """How wide the rows are that begin with a token's queries and then its keys, where they lie so."""
    _, heads, time, width = q.shape
    row = q.stride(2)
    strides = (time * row, width, row, 1)
    if q.stride() != strides or k.stride() != strides or _place(q)[0] != _place(k)[0]:
        return None
    begins = q.storage_offset() == 0 and k.storage_offset() == heads * width
    return row if begins and (heads + k.shape[1]) * width <= row else None


def _parts_of(row: int, q: torch.Tensor, k: torch.Tensor) -> Pair:
    """Room for what is like queries and keys, side by side in rows of that width; the rest is for who has the
    values."""
    batch, heads, time, width = q.shape
    rows = torch.empty(batch, time, row, dtype=q.dtype, device=q.device)
    parts = rows[..., : heads * width], rows[..., heads * width : (heads + k.shape[1]) * width]
    new_q, new_k = (part.unflatten(-1, (-1, width)).transpose(1, 2) for part in parts)
    return new_q, new_k


def _laid_out_alike(x: torch.Tensor) -> torch.Tensor:
    """Room for what is like `x` [batch, heads, time, width], the heads of a token side by side."""
    batch, heads, time, width = x.shape
    return torch.empty(batch, time, heads, width, dtype=x.dtype, device=x.device).transpose(1, 2)
