"""Dropout that keeps no mask: which elements fall follows from a seed on the device, so they can be found again.

A mask costs a byte an element for as long as the forward pass lasts, beside activations of two; drawing it again in the
same pass over memory costs a counter-based generator's arithmetic. Importing this needs Triton, which torch brings
along on CUDA.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024
"""Elements of a quarter of a program's share: Philox draws four numbers at a time."""


def drop_again(x: torch.Tensor, p: float, seed: torch.Tensor, site: int) -> torch.Tensor:
    """`x`, an element 0 with probability `p` and divided by 1 - p otherwise; a new tensor of its shape and dtype.

    Which elements fall depends on `seed` (one int64 on the device, read when the kernel runs), on `site` and on their
    place in `x` alone: applied to a gradient it is this dropout's backward pass. 0 <= p < 1; `x` is contiguous.
    """
    x = x.contiguous()
    dropped = torch.empty_like(x)
    programs = triton.cdiv(x.numel(), 4 * BLOCK)
    _drop[(programs,)](x, dropped, seed, site, p, 1 / (1 - p), x.numel(), block=BLOCK)
    return dropped


@triton.jit(do_not_specialize=["site"])  # type: ignore[untyped-decorator]  # one kernel for all layers
def _drop(x, dropped, seed, site, p, scale, count, block: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0)
    lane = tl.arange(0, block)
    first, second, third, fourth = tl.rand4x(tl.load(seed) + site, program * block + lane)
    start = program * 4 * block + lane
    _drop_quarter(x, dropped, start, first, p, scale, count)
    _drop_quarter(x, dropped, start + block, second, p, scale, count)
    _drop_quarter(x, dropped, start + 2 * block, third, p, scale, count)
    _drop_quarter(x, dropped, start + 3 * block, fourth, p, scale, count)


@triton.jit
def _drop_quarter(x, dropped, place, random, p, scale, count):  # type: ignore[no-untyped-def]
    inside = place < count
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(dropped + place, tl.where(random >= p, value, 0.0).to(dropped.dtype.element_ty), mask=inside)
