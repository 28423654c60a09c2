"""Frozen weights and the factors of their adapters become one matrix: kernels, as Triton compiles them. What calls them
is `joined`.

Importing this needs Triton, which torch brings along on CUDA.
"""

import triton
import triton.language as tl


@triton.jit
def place(addresses, sizes, scales, like, elements: tl.constexpr):  # type: ignore[no-untyped-def]
    """Matrices, each times a number, copied to where their rows lie further apart: `addresses` [matrices, 2] has those
    of both, `sizes` [matrices, 3] elements, columns and the stride of the copy."""
    index = tl.program_id(0)
    kind = tl.pointer_type(like.dtype.element_ty)
    source, target = tl.load(addresses + 2 * index).to(kind), tl.load(addresses + 2 * index + 1).to(kind)
    count, width = tl.load(sizes + 3 * index), tl.load(sizes + 3 * index + 1)
    stride, scale = tl.load(sizes + 3 * index + 2), tl.load(scales + index)
    for start in range(tl.program_id(1) * elements, count, tl.num_programs(1) * elements):
        place = start + tl.arange(0, elements)
        value = tl.load(source + place, mask=place < count, other=0.0).to(tl.float32) * scale
        tl.store(target + place // width * stride + place % width, value, mask=place < count)


@triton.jit(do_not_specialize=["row", "column"])  # type: ignore[untyped-decorator]
def unpack(  # type: ignore[no-untyped-def]
    packed, scales, code, outer_scales, outer_code, offset, a, b, matrix, factor, row, column, out, width, all_out,
    rank_, room, stride, programs,
    block: tl.constexpr, outer_block: tl.constexpr, nested: tl.constexpr, elements: tl.constexpr,
):  # fmt: skip
    """A weight [out, width] of 4 bits a number into the rows of `matrix` from `row` on, its adapter's second factor
    behind them and its first, times `factor`, below all rows; both from `column` on. The last few programs have the
    factors."""
    if tl.program_id(0) < programs:
        byte = tl.program_id(0).to(tl.int64) * (elements // 2) + tl.arange(0, elements // 2)
        inside = byte < out * width // 2
        pair = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
        of_block = byte * 2 // block
        scale = tl.load(scales + of_block, mask=inside, other=0)
        if nested:
            scale = tl.load(outer_code + scale.to(tl.int32)) * tl.load(
                outer_scales + of_block // outer_block, mask=inside, other=0.0
            ) + tl.load(offset)
        high, low = tl.load(code + (pair >> 4)) * scale, tl.load(code + (pair & 15)) * scale
        place = tl.program_id(0).to(tl.int64) * elements + tl.arange(0, elements)
        at = (row + place // width) * stride + place % width
        tl.store(matrix + at, tl.interleave(high, low), mask=place < out * width)
    else:
        others = tl.num_programs(0) - programs
        for start in range((tl.program_id(0) - programs) * elements, out * room, others * elements):
            place = start + tl.arange(0, elements)
            unit = place % room - column
            own = (place < out * room) & (unit >= 0) & (unit < rank_)
            value = tl.load(b + place // room * rank_ + unit, mask=own, other=0.0)
            at = (row + place // room).to(tl.int64) * stride + width + place % room
            tl.store(matrix + at, value, mask=place < out * room)
        for start in range((tl.program_id(0) - programs) * elements, rank_ * width, others * elements):
            place = start + tl.arange(0, elements)
            value = tl.load(a + place, mask=place < rank_ * width, other=0.0).to(tl.float32) * factor
            at = (all_out + column + place // width).to(tl.int64) * stride + place % width
            tl.store(matrix + at, value, mask=place < rank_ * width)
