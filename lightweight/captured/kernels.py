"""The captured step's own GPU kernels: a LoRA adapter in a few passes over memory instead of nine, a softmax
that becomes its own gradient, a norm together with the sum it is taken of, and activations in one pass each.

A small step is many small kernels: each takes some 2 us to begin and to end whatever it does, so that what can be one
kernel is one.

Dropout keeps no mask. Which elements fall follows from a seed on the device, so the backward pass draws the same
numbers again while it has the elements in hand: a mask would cost a byte an element for as long as the forward pass
lasts.
Importing this needs Triton, which torch brings along on CUDA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import triton
import triton.language as tl

from lightweight.internals.triton import build_launcher

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

VARYING = ["site", "threshold", "tokens", "rank_"]
"""What a kernel is not compiled anew for."""

_asked_for: dict[object, tuple[Any, tuple[object, ...], dict[str, Any]]] | None = None
_started: Future[None] | None = None


def warm_up() -> None:
    """Start Triton in a thread, beside whatever else there is to be done: what it reads, hashes and builds for itself
    takes a second of a process's first kernel."""
    global _started
    thread = _threads(1)
    _started = thread.submit(_compile, _relu_backward, (torch.float16, torch.uint8, torch.float16, 16), {"elements": 8})
    thread.shutdown(wait=False)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Inside, no kernel is launched, and what was to be written is left as it was; leaving compiles all that would have
    been launched, at once, in threads: Triton compiles what it first meets one after the other."""
    global _asked_for
    _asked_for = {}
    try:
        yield
        jobs = [*_asked_for.values()]
    finally:
        _asked_for = None
    if _started is not None:
        _started.result()
    with _threads(len(jobs)) as threads:
        for job in [threads.submit(_compile, *job) for job in jobs]:
            job.result()


def _threads(count: int) -> ThreadPoolExecutor:
    """Each with this thread's current device as its own."""
    if not torch.cuda.is_available():
        return ThreadPoolExecutor(max(1, count))
    device = torch.cuda.current_device()
    return ThreadPoolExecutor(max(1, count), initializer=torch.cuda.set_device, initargs=(device,))


def _compile(kernel: Any, types: tuple[object, ...], settings: dict[str, Any]) -> None:
    compiled = kernel.warmup(*types, grid=(1,), **settings)
    if compiled is not None:  # as it is where kernels are interpreted
        build_launcher(compiled)


def _launch(kernel: Any, programs: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    if _asked_for is None:
        kernel[programs](*arguments, **settings)
        return
    types = tuple(argument.dtype if isinstance(argument, torch.Tensor) else argument for argument in arguments)
    key = (
        kernel,
        *(value for name, value in zip(kernel.arg_names, types, strict=False) if name not in VARYING),
        *sorted(settings.items()),
    )
    _asked_for[key] = kernel, types, settings


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
        _launch(
            _project, (triton.cdiv(tokens, 16),),
            x, a, inner, *dropout, tokens, width, a.shape[0],
            drops=p > 0, rank=_padded(a.shape[0]), rows=16, columns=COLUMNS, num_stages=4,
        )  # fmt: skip
        y.addmm_(inner, b.t())
    else:
        _launch(
            _add_adapter, (triton.cdiv(tokens, NARROW_TILE["rows"]),),
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
        programs = triton.cdiv(tokens, ROWS_OF_A_SHARE), triton.cdiv(width, COLUMNS)
        shares = torch.empty(programs[0], *a.shape, dtype=a.dtype, device=a.device)
        _launch(
            _project_backward, programs,
            grad @ b, x, a, grad_x, shares, *dropout, tokens, width, a.shape[0],
            share=ROWS_OF_A_SHARE, rows=32, columns=COLUMNS, **settings,
        )  # fmt: skip
        return shares.sum(0), grad.t() @ inner
    programs = triton.cdiv(tokens, NARROW_TILE["rows"])
    shares = torch.empty(programs, a.numel() + b.numel(), dtype=a.dtype, device=a.device)
    _launch(
        _adapter_backward, (programs,),
        grad, inner, x, a, b, grad_x, shares, *dropout, tokens, width, b.shape[0], a.shape[0],
        columns=512 // x.element_size(), num_stages=3, **settings, **NARROW_TILE,
    )  # fmt: skip
    grad_a, grad_b = shares.sum(0).split([a.numel(), b.numel()])
    return grad_a.view_as(a), grad_b.view_as(b)


def cross_entropy_(logits: torch.Tensor, vocabulary: int, targets: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The cross-entropy (nats) of the first `vocabulary` columns of `logits` [tokens, columns] against `targets`
    [tokens]: [tokens], fp32. Afterwards these columns hold `scales` [tokens] times its gradient, and those behind them,
    there to make rows begin where a wide load can, hold zeros."""
    losses = torch.empty(logits.shape[0], device=logits.device)
    _launch(
        _cross_entropy, (logits.shape[0],),
        logits, targets, scales, losses, vocabulary, logits.shape[1], columns=4096, num_warps=8,
    )  # fmt: skip
    return losses


def norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, centred: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Layer norm over the last axis of `x`, or RMS norm where it is not `centred`, and each row's mean and reciprocal
    deviation, [rows, 2] in fp32, for `norm_backward`."""
    x = x.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    result, statistics = torch.empty_like(x), torch.empty(rows, 2, device=x.device)
    _launch(
        _norm, (rows,),
        x, weight, weight if bias is None else bias, result, statistics, eps, width, centred=centred,
        biased=bias is not None, columns=triton.next_power_of_2(width),
    )  # fmt: skip
    return result, statistics


def norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, statistics: torch.Tensor, centred: bool
) -> torch.Tensor:
    """The gradient of `norm`'s `x`, given that of its result and the statistics it returned beside it."""
    grad, x = grad.contiguous(), x.contiguous()
    width = x.shape[-1]
    grad_x = torch.empty_like(x)
    _launch(
        _norm_backward, (x.numel() // width,),
        grad, x, weight, statistics, grad_x, width, centred=centred, columns=triton.next_power_of_2(width),
    )  # fmt: skip
    return grad_x


def add_norm(
    branch: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    p: float,
    seed: torch.Tensor,
    site: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Layer norm over the last axis of `residual + dropout(branch)`; that sum; and its statistics as `norm` has them.
    Dropout as in `add_adapter_`."""
    branch, residual = branch.contiguous(), residual.contiguous()
    width = branch.shape[-1]
    rows = branch.numel() // width
    result, total = torch.empty_like(branch), torch.empty_like(branch)
    statistics = torch.empty(rows, 2, device=branch.device)
    _launch(
        _add_norm, (rows,),
        branch, residual, weight, weight if bias is None else bias, result, total, statistics, eps, seed, site,
        _threshold(p), 1 / (1 - p), width, drops=p > 0, biased=bias is not None, columns=_whole(width),
    )  # fmt: skip
    return result, total, statistics


def add_norm_backward(
    grads: list[torch.Tensor],
    total: torch.Tensor,
    weight: torch.Tensor,
    statistics: torch.Tensor,
    p: float,
    seed: torch.Tensor,
    site: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `add_norm`'s `branch` and `residual`, given those of its result, one or two to be added."""
    first, second = grads[0].contiguous(), grads[-1].contiguous()
    total = total.contiguous()
    width = total.shape[-1]
    grad_residual = torch.empty_like(total)
    grad_branch = torch.empty_like(total) if p else grad_residual
    _launch(
        _add_norm_backward, (total.numel() // width,),
        first, second, total, weight, statistics, grad_branch, grad_residual, seed, site, _threshold(p), 1 / (1 - p),
        width, drops=p > 0, two=len(grads) == 2, columns=_whole(width),
    )  # fmt: skip
    return grad_branch, grad_residual


def relu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ReLU of `x` and where `x` is positive, for `relu_backward`: a bit an element."""
    x = x.contiguous()
    result = torch.empty_like(x)
    positive = torch.empty(triton.cdiv(x.numel(), 8), dtype=torch.uint8, device=x.device)
    _launch(_relu, (triton.cdiv(x.numel(), ELEMENTS),), x, result, positive, x.numel(), elements=ELEMENTS)
    return result, positive


def relu_backward(grad: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """The gradient of `relu`'s `x`, given that of its result and the bits it returned beside it."""
    grad = grad.contiguous()
    result = torch.empty_like(grad)
    _launch(
        _relu_backward, (triton.cdiv(grad.numel(), ELEMENTS),), grad, positive, result, grad.numel(), elements=ELEMENTS
    )
    return result


def gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, of one shape."""
    gate, up = gate.contiguous(), up.contiguous()
    result = torch.empty_like(gate)
    _launch(_gate, (triton.cdiv(gate.numel(), ELEMENTS),), gate, up, result, gate.numel(), elements=ELEMENTS)
    return result


def gate_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `gate` and `up`, given that of what `gate` returned."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    programs = triton.cdiv(gate.numel(), ELEMENTS)
    _launch(_gate_backward, (programs,), grad, gate, up, grad_gate, grad_up, gate.numel(), elements=ELEMENTS)
    return grad_gate, grad_up


def _threshold(p: float) -> int:
    """A 16-bit random number below this lets its element fall."""
    return round(p * 2**16)


def _whole(width: int) -> int:
    """Columns of a tile that holds a whole row, with room for one draw of random numbers."""
    return max(8, int(triton.next_power_of_2(width)))


def _padded(rank: int) -> int:
    """A matrix unit takes 16 columns at the least."""
    return max(16, int(triton.next_power_of_2(rank)))


@triton.jit  # type: ignore[untyped-decorator]
def _kept(seed, row, tile, width, threshold, columns: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether each element of a tile is kept: [rows, columns]. One draw of Philox is eight 16-bit numbers, for eight
    neighbours in a row."""
    group = tile * (columns // 8) + tl.arange(0, columns // 8)
    place = row[:, None] * tl.cdiv(width, columns) * (columns // 8) + group[None, :]
    first, second, third, fourth = tl.randint4x(seed, place, n_rounds=7)
    left = tl.join(_pair(first, threshold), _pair(second, threshold))
    right = tl.join(_pair(third, threshold), _pair(fourth, threshold))
    return tl.reshape(tl.join(left, right), (row.shape[0], columns)) != 0


@triton.jit
def _pair(number, threshold):  # type: ignore[no-untyped-def]
    low = ((number & 0xFFFF) >= threshold).to(tl.int8)
    high = (((number >> 16) & 0xFFFF) >= threshold).to(tl.int8)
    return tl.join(low, high)


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def _project(  # type: ignore[no-untyped-def]
    x, a, projected, seed, site, threshold, scale, tokens, width, rank_,
    drops: tl.constexpr, rank: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    unit = tl.arange(0, rank)
    start = row[:, None].to(tl.int64) * width
    total = tl.zeros((rows, rank), dtype=tl.float32)
    key = tl.load(seed) + site
    for tile in range(0, tl.cdiv(width, columns)):
        column = tile * columns + tl.arange(0, columns)
        inside = (row[:, None] < tokens) & (column[None, :] < width)
        value = tl.load(x + start + column[None, :], mask=inside, other=0.0)
        if drops:
            value = tl.where(_kept(key, row, tile, width, threshold, columns), value, 0.0).to(x.dtype.element_ty)
        there = (unit[None, :] < rank_) & (column[:, None] < width)
        weight = tl.load(a + unit[None, :] * width + column[:, None], mask=there, other=0.0)
        total = tl.dot(value, weight, total, input_precision="ieee")
    there = (row[:, None] < tokens) & (unit[None, :] < rank_)
    tl.store(projected + row[:, None] * rank_ + unit[None, :], total * scale, mask=there)


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def _project_backward(  # type: ignore[no-untyped-def]
    grad, x, a, grad_x, grad_a, seed, site, threshold, scale, tokens, width, rank_,
    drops: tl.constexpr, reaches_x: tl.constexpr, rank: tl.constexpr, share: tl.constexpr, rows: tl.constexpr,
    columns: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    column, unit = tile * columns + tl.arange(0, columns), tl.arange(0, rank)
    there = (unit[:, None] < rank_) & (column[None, :] < width)
    weight = tl.load(a + unit[:, None] * width + column[None, :], mask=there, other=0.0)
    total = tl.zeros((rank, columns), dtype=tl.float32)
    key = tl.load(seed) + site
    for step in range(0, share // rows):
        row = tl.program_id(0) * share + step * rows + tl.arange(0, rows)
        inside = (row[:, None] < tokens) & (column[None, :] < width)
        place = row[:, None].to(tl.int64) * width + column[None, :]
        value = tl.load(x + place, mask=inside, other=0.0)
        here = (row[:, None] < tokens) & (unit[None, :] < rank_)
        inner = tl.load(grad + row[:, None] * rank_ + unit[None, :], mask=here, other=0.0)
        if drops:
            kept = _kept(key, row, tile, width, threshold, columns)
            value = tl.where(kept, value, 0.0).to(x.dtype.element_ty)
        total = tl.dot(tl.trans(inner), value, total, input_precision="ieee")
        if reaches_x:
            change = tl.dot(inner, weight, input_precision="ieee") * scale
            if drops:
                change = tl.where(kept, change, 0.0)
            before = tl.load(grad_x + place, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_x + place, before + change, mask=inside)
    first = tl.program_id(0) * rank_ * width
    tl.store(grad_a + first + unit[:, None] * width + column[None, :], total * scale, mask=there)


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def _add_adapter(  # type: ignore[no-untyped-def]
    y, x, a, b, inner, seed, site, threshold, scale, tokens, width, out, stride, rank_,
    drops: tl.constexpr, rank: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    unit = tl.arange(0, rank)
    start = row[:, None].to(tl.int64) * width
    total = tl.zeros((rows, rank), dtype=tl.float32)
    key = tl.load(seed) + site
    for tile in range(0, tl.cdiv(width, columns)):
        column = tile * columns + tl.arange(0, columns)
        inside = (row[:, None] < tokens) & (column[None, :] < width)
        value = tl.load(x + start + column[None, :], mask=inside, other=0.0)
        if drops:
            value = tl.where(_kept(key, row, tile, width, threshold, columns), value, 0.0).to(x.dtype.element_ty)
        there = (unit[None, :] < rank_) & (column[:, None] < width)
        weight = tl.load(a + unit[None, :] * width + column[:, None], mask=there, other=0.0)
        total = tl.dot(value, weight, total, input_precision="ieee")
    projected = (total * scale).to(x.dtype.element_ty)
    here = (row[:, None] < tokens) & (unit[None, :] < rank_)
    tl.store(inner + row[:, None] * rank_ + unit[None, :], projected, mask=here)
    begin = row[:, None].to(tl.int64) * stride
    for tile in range(0, tl.cdiv(out, columns)):
        reached = tile * columns + tl.arange(0, columns)
        known = (unit[:, None] < rank_) & (reached[None, :] < out)
        spread = tl.load(b + reached[None, :] * rank_ + unit[:, None], mask=known, other=0.0)
        within = (row[:, None] < tokens) & (reached[None, :] < out)
        before = tl.load(y + begin + reached[None, :], mask=within, other=0.0).to(tl.float32)
        tl.store(y + begin + reached[None, :], tl.dot(projected, spread, before, input_precision="ieee"), mask=within)


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def _adapter_backward(  # type: ignore[no-untyped-def]
    grad, inner, x, a, b, grad_x, shares, seed, site, threshold, scale, tokens, width, out, rank_,
    drops: tl.constexpr, reaches_x: tl.constexpr, rank: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    unit = tl.arange(0, rank)
    here = (row[:, None] < tokens) & (unit[None, :] < rank_)
    projected = tl.load(inner + row[:, None] * rank_ + unit[None, :], mask=here, other=0.0)
    share_a = shares + tl.program_id(0).to(tl.int64) * (rank_ * (width + out))
    share_b = share_a + rank_ * width
    total = tl.zeros((rows, rank), dtype=tl.float32)
    begin = row[:, None].to(tl.int64) * out
    for tile in range(0, tl.cdiv(out, columns)):
        reached = tile * columns + tl.arange(0, columns)
        within = (row[:, None] < tokens) & (reached[None, :] < out)
        change = tl.load(grad + begin + reached[None, :], mask=within, other=0.0)
        known = (reached[:, None] < out) & (unit[None, :] < rank_)
        at = reached[:, None] * rank_ + unit[None, :]
        total = tl.dot(change, tl.load(b + at, mask=known, other=0.0), total, input_precision="ieee")
        tl.store(share_b + at, tl.dot(tl.trans(change), projected, input_precision="ieee"), mask=known)
    inner_grad = total.to(x.dtype.element_ty)
    key = tl.load(seed) + site
    start = row[:, None].to(tl.int64) * width
    for tile in range(0, tl.cdiv(width, columns)):
        column = tile * columns + tl.arange(0, columns)
        inside = (row[:, None] < tokens) & (column[None, :] < width)
        value = tl.load(x + start + column[None, :], mask=inside, other=0.0)
        if drops:
            kept = _kept(key, row, tile, width, threshold, columns)
            value = tl.where(kept, value, 0.0).to(x.dtype.element_ty)
        there = (unit[:, None] < rank_) & (column[None, :] < width)
        place = unit[:, None] * width + column[None, :]
        tl.store(share_a + place, tl.dot(tl.trans(inner_grad), value, input_precision="ieee") * scale, mask=there)
        if reaches_x:
            weight = tl.load(a + place, mask=there, other=0.0)
            change_x = tl.dot(inner_grad, weight, input_precision="ieee") * scale
            if drops:
                change_x = tl.where(kept, change_x, 0.0)
            before = tl.load(grad_x + start + column[None, :], mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_x + start + column[None, :], before + change_x, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _cross_entropy(  # type: ignore[no-untyped-def]
    logits, targets, scales, losses, vocabulary, stride, columns: tl.constexpr
):
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * stride
    target = tl.load(targets + row)
    predicted = tl.load(start + target).to(tl.float32)
    largest, total = predicted, 0.0
    for first in range(0, stride, columns):
        column = first + tl.arange(0, columns)
        value = tl.load(start + column, mask=column < stride, other=0.0).to(tl.float32)
        value = tl.where(column < vocabulary, value, float("-inf"))
        highest = tl.maximum(largest, tl.max(value, 0))
        total = total * tl.exp(largest - highest) + tl.sum(tl.exp(value - highest), 0)
        largest = highest
    normaliser = largest + tl.log(total)
    tl.store(losses + row, normaliser - predicted)
    scale = tl.load(scales + row)
    for first in range(0, stride, columns):
        column = first + tl.arange(0, columns)
        value = tl.load(start + column, mask=column < stride, other=0.0).to(tl.float32)
        gradient = (tl.exp(value - normaliser) - tl.where(column == target, 1.0, 0.0)) * scale
        tl.store(start + column, tl.where(column < vocabulary, gradient, 0.0), mask=column < stride)


@triton.jit  # type: ignore[untyped-decorator]
def _norm(  # type: ignore[no-untyped-def]
    x, weight, bias, result, statistics, eps, width, centred: tl.constexpr, biased: tl.constexpr, columns: tl.constexpr
):
    row = tl.program_id(0)
    column = tl.arange(0, columns)
    inside = column < width
    place = row.to(tl.int64) * width + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    mean = 0.0
    if centred:
        mean = tl.sum(value, 0) / width
    centre = tl.where(inside, value - mean, 0.0)
    factor = 1 / tl.sqrt(tl.sum(centre * centre, 0) / width + eps)
    scaled = centre * factor * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if biased:
        scaled += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + place, scaled, mask=inside)
    tl.store(statistics + 2 * row, mean)
    tl.store(statistics + 2 * row + 1, factor)


@triton.jit  # type: ignore[untyped-decorator]
def _norm_backward(  # type: ignore[no-untyped-def]
    grad, x, weight, statistics, grad_x, width, centred: tl.constexpr, columns: tl.constexpr
):
    row = tl.program_id(0)
    column = tl.arange(0, columns)
    inside = column < width
    place = row.to(tl.int64) * width + column
    mean, factor = tl.load(statistics + 2 * row), tl.load(statistics + 2 * row + 1)
    normal = tl.where(inside, (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean) * factor, 0.0)
    change = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    change *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    result = change - normal * (tl.sum(change * normal, 0) / width)
    if centred:
        result -= tl.sum(change, 0) / width
    tl.store(grad_x + place, result * factor, mask=inside)


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def _add_norm(  # type: ignore[no-untyped-def]
    branch, residual, weight, bias, result, sums, statistics, eps, seed, site, threshold, factor_kept, width,
    drops: tl.constexpr, biased: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) + tl.arange(0, 1)
    column = tl.arange(0, columns)[None, :]
    inside = column < width
    place = row[:, None].to(tl.int64) * width + column
    added = tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
    if drops:
        added = tl.where(_kept(tl.load(seed) + site, row, 0, width, threshold, columns), added * factor_kept, 0.0)
    value = tl.load(residual + place, mask=inside, other=0.0).to(tl.float32) + added
    value = value.to(sums.dtype.element_ty)  # as it is kept: the norm is computed again from that
    tl.store(sums + place, value, mask=inside)
    value = value.to(tl.float32)
    mean = tl.sum(value, 1) / width
    centre = tl.where(inside, value - mean[:, None], 0.0)
    factor = 1 / tl.sqrt(tl.sum(centre * centre, 1) / width + eps)
    scaled = centre * factor[:, None] * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if biased:
        scaled += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + place, scaled, mask=inside)
    tl.store(statistics + 2 * row, mean)
    tl.store(statistics + 2 * row + 1, factor)


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def _add_norm_backward(  # type: ignore[no-untyped-def]
    first, second, sums, weight, statistics, grad_branch, grad_residual, seed, site, threshold, factor_kept, width,
    drops: tl.constexpr, two: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) + tl.arange(0, 1)
    column = tl.arange(0, columns)[None, :]
    inside = column < width
    place = row[:, None].to(tl.int64) * width + column
    mean, factor = tl.load(statistics + 2 * row)[:, None], tl.load(statistics + 2 * row + 1)[:, None]
    normal = tl.where(inside, (tl.load(sums + place, mask=inside, other=0.0).to(tl.float32) - mean) * factor, 0.0)
    change = tl.load(first + place, mask=inside, other=0.0).to(tl.float32)
    if two:
        change += tl.load(second + place, mask=inside, other=0.0).to(tl.float32)
    change *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    grad = change - normal * (tl.sum(change * normal, 1)[:, None] / width) - tl.sum(change, 1)[:, None] / width
    grad *= factor
    tl.store(grad_residual + place, grad, mask=inside)
    if drops:
        kept = _kept(tl.load(seed) + site, row, 0, width, threshold, columns)
        tl.store(grad_branch + place, tl.where(kept, grad * factor_kept, 0.0), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _relu(x, result, positive, count, elements: tl.constexpr):  # type: ignore[no-untyped-def]
    first = tl.program_id(0).to(tl.int64) * elements
    place = first + tl.arange(0, elements)
    value = tl.load(x + place, mask=place < count, other=0.0)
    tl.store(result + place, tl.where(value < 0, 0.0, value), mask=place < count)  # as torch does, NaN stays NaN
    bits = tl.reshape((value > 0).to(tl.int32), (elements // 8, 8)) << tl.arange(0, 8)[None, :]
    byte = first // 8 + tl.arange(0, elements // 8)
    tl.store(positive + byte, tl.sum(bits, 1).to(tl.uint8), mask=byte < tl.cdiv(count, 8))


@triton.jit  # type: ignore[untyped-decorator]
def _relu_backward(grad, positive, result, count, elements: tl.constexpr):  # type: ignore[no-untyped-def]
    first = tl.program_id(0).to(tl.int64) * elements
    place = first + tl.arange(0, elements)
    value = tl.load(grad + place, mask=place < count, other=0.0)
    byte = first // 8 + tl.arange(0, elements // 8)
    bits = tl.load(positive + byte, mask=byte < tl.cdiv(count, 8), other=0).to(tl.int32)
    kept = tl.reshape((bits[:, None] >> tl.arange(0, 8)[None, :]) & 1, (elements,))
    tl.store(result + place, tl.where(kept != 0, value, 0.0), mask=place < count)


@triton.jit  # type: ignore[untyped-decorator]
def _gate(gate, up, result, count, elements: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * elements + tl.arange(0, elements)
    value = tl.load(gate + place, mask=place < count, other=0.0).to(tl.float32)
    other = tl.load(up + place, mask=place < count, other=0.0).to(tl.float32)
    tl.store(result + place, value * tl.sigmoid(value) * other, mask=place < count)


@triton.jit  # type: ignore[untyped-decorator]
def _gate_backward(grad, gate, up, grad_gate, grad_up, count, elements: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * elements + tl.arange(0, elements)
    change = tl.load(grad + place, mask=place < count, other=0.0).to(tl.float32)
    value = tl.load(gate + place, mask=place < count, other=0.0).to(tl.float32)
    other = tl.load(up + place, mask=place < count, other=0.0).to(tl.float32)
    share = tl.sigmoid(value)
    tl.store(grad_up + place, change * value * share, mask=place < count)
    tl.store(grad_gate + place, change * other * share * (1 + value * (1 - share)), mask=place < count)
