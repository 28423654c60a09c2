"""What do the captured step's own GPU kernels take and give back? A LoRA adapter in a few passes over memory instead of
nine, a softmax that becomes its own gradient, a norm together with the sum it is taken of, and activations in one pass
each; `triton_kernels` has what they compute.

A small step is many small kernels: each takes some 2 us to begin and to end whatever it does, so that what can be one
kernel is one.

Dropout keeps no mask. Which elements fall follows from a seed on the device, so the backward pass draws the same
numbers again while it has the elements in hand: a mask would cost a byte an element for as long as the forward pass
lasts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from lightweight.captured.launching import launch
from lightweight.internals.torch import address

COLUMNS = 128
"""Columns of a tile. Every kernel walks over an input in tiles of one width: an element's random number follows from
its row and its place among the tiles."""

ROWS_OF_A_SHARE = 64
"""Rows that one program sums an adapter's gradient over; the shares are added in a fixed order, for a run to repeat."""

NARROW = 1024
"""Layers at most this wide have each pass of their adapter in one kernel, whose programs take whole rows: that spares
launches. Over wider rows such a program waits for memory too long (H100: 35.6 against 33.9 ms a step of gpt-neo-1.3b),
and products, which cuBLAS does best, and passes over memory are kernels of their own."""

NARROW_TILE = {"rows": 16, "num_warps": 8}
"""With tiles of 512 bytes a row, the fastest that were tried for opt-350m (H100); 16 rows are the fewest that a matrix
unit takes."""

ELEMENTS = 2048
"""Elements of one program of an activation."""

GATE_COLUMNS = 1024
"""Columns of one program of a gate."""


def add_adapter_(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    p: float,
    seed: torch.Tensor,
    site: int,
) -> torch.Tensor:
    """Add `scaling * dropout(x) @ a.T @ b.T` to `y` [tokens, out], whose rows may lie apart, given `x` [tokens, in],
    `a` [r, in] and `b` [out, r]. Returns what `b` was multiplied with, [tokens, r].

    Which elements fall depends on `seed` (one int64 on the device, read when the kernel runs), on `site` and on their
    place in `x` alone. 0 <= p < 1.
    """
    x, a, b = x.contiguous(), a.contiguous(), b.contiguous()
    tokens, width = x.shape
    inner = torch.empty(tokens, a.shape[0], dtype=x.dtype, device=x.device)
    dropout = seed, site, _threshold(p), scaling / (1 - p)
    if max(width, b.shape[0]) > NARROW:
        _project(x, a, inner, dropout)
        y.addmm_(inner, b.t())
    else:
        launch(
            "add_adapter", (_over(tokens, NARROW_TILE["rows"]),),
            y, x, a, b, inner, *dropout, tokens, width, b.shape[0], y.stride(0), a.shape[0],
            drops=p > 0, rank=_padded(a.shape[0]), columns=512 // x.element_size(), num_stages=4, **NARROW_TILE,
        )  # fmt: skip
    return inner


def adapter_backward(
    grad: torch.Tensor,
    inner: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    grad_x: torch.Tensor | None,
    scaling: float,
    p: float,
    seed: torch.Tensor,
    site: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `a` [r, in] and `b` [out, r], given `grad` [tokens, out] of the `y` that `add_adapter_` added to
    and the `inner` that it returned; adds that of `x` to `grad_x` [tokens, in], contiguous, where there is one. `p`,
    `seed` and `site` as in the forward pass."""
    grad, x, a, b = grad.contiguous(), x.contiguous(), a.contiguous(), b.contiguous()
    tokens, width = x.shape
    dropout = seed, site, _threshold(p), scaling / (1 - p)
    settings = {"drops": p > 0, "reaches_x": grad_x is not None, "rank": _padded(a.shape[0])}
    if grad_x is None:
        grad_x = x  # not written to
    if max(width, b.shape[0]) > NARROW:
        grad_a = _project_backward(grad @ b, x, a, grad_x, dropout, **settings)
        return grad_a, grad.t() @ inner
    count = _over(tokens, NARROW_TILE["rows"])
    shares = torch.empty(count, a.numel() + b.numel(), dtype=a.dtype, device=a.device)
    launch(
        "adapter_backward", (count,),
        grad, inner, x, a, b, grad_x, shares, *dropout, tokens, width, b.shape[0], a.shape[0],
        columns=512 // x.element_size(), num_stages=3, **settings, **NARROW_TILE,
    )  # fmt: skip
    grad_a, grad_b = shares.sum(0).split([a.numel(), b.numel()])
    return grad_a.view_as(a), grad_b.view_as(b)


def project(x: torch.Tensor, a: torch.Tensor, scaling: float, beside: torch.Tensor | None = None) -> torch.Tensor:
    """`scaling * x @ a.T`, [tokens, r], given `x` [tokens, in] and `a` [r, in], whose rows may lie apart: the first
    product of adapters, where nothing is dropped. Written `beside` the rows of `x` as well, where there is room."""
    inner = torch.empty(x.shape[0], a.shape[0], dtype=x.dtype, device=x.device)
    _project(x, a, inner, (x, 0, 0, scaling), beside)
    return inner


def project_backward(
    grad: torch.Tensor, x: torch.Tensor, a: torch.Tensor, grad_x: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """The gradient of `project`'s `a` [r, in], given that of its result, whose rows may lie apart; adds that of `x` to
    `grad_x` [tokens, in], contiguous, where there is one."""
    reaches_x = grad_x is not None
    return _project_backward(
        grad, x.contiguous(), a, x if grad_x is None else grad_x, (x, 0, 0, scaling),
        drops=False, reaches_x=reaches_x, rank=_padded(a.shape[0]),
    )  # fmt: skip


Dropout = tuple[torch.Tensor, int, int, float]
"""A seed, a site, below which numbers elements fall, and what the rest is multiplied with."""


def _project(
    x: torch.Tensor, a: torch.Tensor, inner: torch.Tensor, dropout: Dropout, beside: torch.Tensor | None = None
) -> None:
    launch(
        "project", (_over(x.shape[0], 16),),
        x, a, inner, inner if beside is None else beside, *dropout, *x.shape, a.shape[0], x.stride(0), a.stride(0),
        drops=dropout[2] > 0, twice=beside is not None, rank=_padded(a.shape[0]), rows=16, columns=COLUMNS,
        num_stages=4,
    )  # fmt: skip


def _project_backward(
    grad: torch.Tensor, x: torch.Tensor, a: torch.Tensor, grad_x: torch.Tensor, dropout: Dropout, **settings: Any
) -> torch.Tensor:
    tokens, width = x.shape
    count = _over(tokens, ROWS_OF_A_SHARE)
    shares = torch.empty(count, *a.shape, dtype=a.dtype, device=a.device)
    tile = {"rows": 32, "num_warps": 4} if settings["drops"] else {"rows": 64, "num_warps": 8}
    launch(
        "project_backward", (count, _over(width, COLUMNS)),
        grad, x, a, grad_x, shares, *dropout, tokens, width, a.shape[0], grad.stride(0), a.stride(0),
        share=ROWS_OF_A_SHARE, columns=COLUMNS, **settings, **tile,
    )  # fmt: skip
    return shares.sum(0)


def cross_entropy_(logits: torch.Tensor, vocabulary: int, targets: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The cross-entropy (nats) of the first `vocabulary` columns of `logits` [tokens, columns] against `targets`
    [tokens]: [tokens], fp32. Afterwards these columns hold `scales` [tokens] times its gradient, and those behind them,
    there to make rows begin where a wide load can, hold zeros."""
    losses = torch.empty(logits.shape[0], device=logits.device)
    launch(
        "cross_entropy", (logits.shape[0],),
        logits, targets, scales, losses, vocabulary, logits.shape[1], columns=4096, num_warps=8,
    )  # fmt: skip
    return losses


class Norm(NamedTuple):
    """Layer norm over the last axis, or RMS norm where it is not `centred`, times `weight + offset`; all frozen."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    centred: bool
    offset: float = 0.0


def with_room(shape: torch.Size, room: int, like: torch.Tensor) -> torch.Tensor:
    """Memory for [..., width], with room for so many more elements at the end of each row."""
    *rest, width = shape
    return torch.empty(*rest, width + room, dtype=like.dtype, device=like.device)[..., :width]


def norm(x: torch.Tensor, norm: Norm, room: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of `x` over its last axis, with `room` behind each row of it, and each row's mean and reciprocal
    deviation, [rows, 2] in fp32, for `norm_backward`."""
    x = x.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    result, statistics = with_room(x.shape, room, x), torch.empty(rows, 2, device=x.device)
    weight, bias, eps, centred, offset = norm
    launch(
        "norm", (rows,),
        x, weight, weight if bias is None else bias, result, statistics, eps, offset, width, width + room,
        centred=centred, biased=bias is not None, columns=power_of_2(width),
    )  # fmt: skip
    return result, statistics


def norm_backward(grad: torch.Tensor, x: torch.Tensor, norm: Norm, statistics: torch.Tensor) -> torch.Tensor:
    """The gradient of `norm`'s `x`, given that of its result and the statistics it returned beside it."""
    grad, x = grad.contiguous(), x.contiguous()
    width = x.shape[-1]
    grad_x = torch.empty_like(x)
    launch(
        "norm_backward", (x.numel() // width,),
        grad, x, norm.weight, statistics, grad_x, norm.offset, width, centred=norm.centred, columns=power_of_2(width),
    )  # fmt: skip
    return grad_x


@dataclass(frozen=True)
class Sum:
    """`residual + dropout(after(branch))`, and the `norm` of that, with `room` behind each row; `after` is an RMS norm,
    if any. Dropout as in `add_adapter_`, with a `site` of its own."""

    norm: Norm
    after: Norm | None = None
    p: float = 0.0
    site: int = 0
    room: int = 0


class Summed(NamedTuple):
    """A sum's `total`, the `result` of the norm of it, and both norms' statistics, as `norm` has them."""

    total: torch.Tensor
    result: torch.Tensor
    statistics: torch.Tensor
    after_statistics: torch.Tensor | None


def add_norm(branch: torch.Tensor, residual: torch.Tensor, made: Sum, seed: torch.Tensor) -> Summed:
    """What is `made` of `branch` and `residual`, [..., width]. Rows of `branch` may lie apart."""
    branch, branch_stride = _rows(branch)
    residual = residual.contiguous()
    width = branch.shape[-1]
    rows = branch.numel() // width
    (weight, bias, eps, centred, offset), after = made.norm, made.after
    result, total = with_room(branch.shape, made.room, branch), torch.empty_like(residual)
    statistics = torch.empty(rows, 2, device=branch.device)
    after_statistics = None if after is None else torch.empty_like(statistics)
    second = after or made.norm
    launch(
        "add_norm", (rows,),
        branch, residual, weight, weight if bias is None else bias, second.weight, result, total, statistics,
        statistics if after_statistics is None else after_statistics, eps, offset, second.eps, second.offset,
        seed, made.site, _threshold(made.p), 1 / (1 - made.p), width, branch_stride, width + made.room,
        drops=made.p > 0, centred=centred, biased=bias is not None, normed=after is not None, columns=_whole(width),
    )  # fmt: skip
    return Summed(total, result, statistics, after_statistics)


def add_norm_backward(
    grads: list[torch.Tensor],
    grad_total: torch.Tensor | None,
    branch: torch.Tensor | None,
    summed: Summed,
    made: Sum,
    seed: torch.Tensor,
    room: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `add_norm`'s `branch` and `residual`, given those of its result, one or two to be added, and
    of its total, where there is one. `branch` is asked for where it was normed; it has `room` behind each row, and so
    has its gradient."""
    first, second = grads[0].contiguous(), grads[-1].contiguous()
    total, after = summed.total.contiguous(), made.after
    past, past_stride = _rows(total if grad_total is None else grad_total)
    width = total.shape[-1]
    grad_branch = with_room(total.shape, room, total)
    grad_residual = torch.empty_like(total) if made.p or after else grad_branch
    extra = after or made.norm
    if branch is not None and _row_stride(branch) != width + room:
        branch = with_room(total.shape, room, total).copy_(branch)
    branch = grad_branch if branch is None else branch
    launch(
        "add_norm_backward", (total.numel() // width,),
        first, second, past, total, made.norm.weight, summed.statistics, branch, extra.weight,
        summed.statistics if summed.after_statistics is None else summed.after_statistics,
        grad_branch, grad_residual, made.norm.offset, extra.offset, seed, made.site, _threshold(made.p),
        1 / (1 - made.p), width, past_stride, width + room, _row_stride(grad_residual),
        drops=made.p > 0, two=len(grads) == 2, passed=grad_total is not None, centred=made.norm.centred,
        normed=after is not None, columns=_whole(width),
    )  # fmt: skip
    return grad_branch, grad_residual


def relu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ReLU of `x` and where `x` is positive, for `relu_backward`: a bit an element."""
    x = x.contiguous()
    result = torch.empty_like(x)
    positive = torch.empty(_over(x.numel(), 8), dtype=torch.uint8, device=x.device)
    launch("relu", (_over(x.numel(), ELEMENTS),), x, result, positive, x.numel(), elements=ELEMENTS)
    return result, positive


def relu_backward(grad: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """The gradient of `relu`'s `x`, given that of its result and the bits it returned beside it."""
    grad = grad.contiguous()
    result = torch.empty_like(grad)
    launch("relu_backward", (_over(grad.numel(), ELEMENTS),), grad, positive, result, grad.numel(), elements=ELEMENTS)
    return result


Activation = Literal["silu", "gelu", "gelu_tanh", "relu2"]
"""What a gate may be activated by: SiLU, GELU as it is and by its usual approximation, or the square of ReLU."""


def gate(gate: torch.Tensor, up: torch.Tensor | None, activation: Activation, room: int = 0) -> torch.Tensor:
    """activation(gate) * up, of one shape, [..., width], with `room` behind each row; without `up`, the activation
    alone. Rows of both may lie apart."""
    gate, up, stride = _rows_alike(gate, up)
    width = gate.shape[-1]
    result = with_room(gate.shape, room, gate)
    launch(
        "gate", (gate.numel() // width, _over(width, GATE_COLUMNS)),
        gate, gate if up is None else up, result, stride, width + room, width,
        activation=activation, gated=up is not None, columns=GATE_COLUMNS,
    )  # fmt: skip
    return result


def gate_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of `gate` and `up`, given that of what `gate` returned: side by side in one tensor, in the place of
    the two where these are parts of one."""
    grad, (gate, up, stride) = grad.contiguous(), _rows_alike(gate, up)
    width = gate.shape[-1]
    grad_gate, grad_up, grad_stride = _for_gradients(gate, up, stride)
    launch(
        "gate_backward", (gate.numel() // width, _over(width, GATE_COLUMNS)),
        grad, gate, gate if up is None else up, grad_gate, grad_gate if grad_up is None else grad_up, stride,
        grad_stride, width,
        activation=activation, gated=up is not None, columns=GATE_COLUMNS,
    )  # fmt: skip
    return grad_gate, grad_up


def _for_gradients(
    gate: torch.Tensor, up: torch.Tensor | None, stride: int
) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """Memory for the gradients of both, side by side, and how far its rows lie apart. It is their own where they lie so
    themselves: nobody asks for them any more, and they are the widest there is."""
    width = gate.shape[-1]
    if up is None:
        return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device), None, width
    is_one = address(gate.untyped_storage()) == address(up.untyped_storage())
    if is_one and stride >= 2 * width and up.storage_offset() - gate.storage_offset() == width:
        return gate.detach(), up.detach(), stride
    whole = torch.empty(*gate.shape[:-1], 2 * width, dtype=gate.dtype, device=gate.device)
    return whole[..., :width], whole[..., width:], 2 * width


class Reached(NamedTuple):
    """What comes back to an adapter's first factor `a` [r, in]: the gradient of its product, [tokens, r], without its
    `scaling`; rows may lie apart. `is_in`: whether the product's input has its share of it already."""

    grad: torch.Tensor
    a: torch.Tensor
    scaling: float
    is_in: bool = False


def gate_project_backward(
    grad: torch.Tensor, reached: Reached, gate: torch.Tensor, up: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `gate` and `up`, as `gate_backward` has them, and of an adapter's first factor, which was
    multiplied with their product, given the gradient that others had for that product and what `reached` the adapter:
    in one pass, without that product."""
    grad, (gate, let_through, stride) = grad.contiguous(), _rows_alike(gate, up)
    width, a = gate.shape[-1], reached.a if reached.is_in else reached.a.contiguous()
    tokens = gate.numel() // width
    grad_gate, grad_up, grad_stride = _for_gradients(gate, let_through, stride)
    assert grad_up is not None
    count = _over(tokens, ROWS_OF_A_SHARE)
    shares = torch.empty(count, *a.shape, dtype=a.dtype, device=a.device)
    launch(
        "gate_project_backward", (count, _over(width, COLUMNS)),
        grad, reached.grad, gate, let_through, a, grad_gate, grad_up, shares, reached.scaling, tokens, width,
        a.shape[0], stride, grad_stride, reached.grad.stride(0),
        activation=activation, reaches=not reached.is_in, rank=_padded(a.shape[0]), share=ROWS_OF_A_SHARE, rows=16,
        columns=COLUMNS, num_warps=8,
    )  # fmt: skip
    return grad_gate, grad_up, shares.sum(0)


def flat(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`x` [..., width] as [rows, width], and how far its rows lie apart; copied where that is not the same for all."""
    x, stride = _rows(x)
    return x.as_strided((x.numel() // x.shape[-1], x.shape[-1]), (stride, 1)), stride


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`x` [..., width] with rows that lie equally far apart, and how far."""
    stride = _row_stride(x)
    return (x.contiguous(), x.shape[-1]) if stride is None else (x, stride)


def _rows_alike(gate: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """Both with rows that lie equally far apart, and how far."""
    strides = {_row_stride(x) for x in (gate, up) if x is not None}
    if len(strides) == 1 and (stride := strides.pop()) is not None:
        return gate, up, stride
    return gate.contiguous(), None if up is None else up.contiguous(), gate.shape[-1]


def _row_stride(x: torch.Tensor) -> int | None:
    """How far apart the rows of `x` [..., width] lie, where that is the same for all."""
    if x.dim() == 1:
        return x.shape[0]
    expected = x.stride(-2)
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if stride != expected and size != 1:
            return None
        expected = stride * size
    return x.stride(-2) if x.stride(-1) == 1 else None


def _threshold(p: float) -> int:
    """A 16-bit random number below this lets its element fall."""
    return round(p * 2**16)


def _over(count: int, size: int) -> int:
    """How many of `size` hold `count`."""
    return -(-count // size)


def power_of_2(count: int) -> int:
    """The smallest power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()


def _whole(width: int) -> int:
    """Columns of a tile that holds a whole row, with room for one draw of random numbers."""
    return max(8, power_of_2(width))


def _padded(rank: int) -> int:
    """A matrix unit takes 16 columns at the least."""
    return max(16, power_of_2(rank))
