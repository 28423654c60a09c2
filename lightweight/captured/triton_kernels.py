"""The captured step's own GPU kernels, as Triton compiles them. What calls them is `kernels`.

Importing this needs Triton, which torch brings along on CUDA.
"""

import triton
import triton.language as tl

VARYING = ["site", "threshold", "tokens", "rank_"]
"""What a kernel is not compiled anew for."""


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


@triton.jit  # type: ignore[untyped-decorator]
def _projected(  # type: ignore[no-untyped-def]
    x, a, row, seed, site, threshold, tokens, width, stride, a_stride, rank_,
    drops: tl.constexpr, rank: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """The product of some rows of an adapter's input, less what dropout drops of them, with its first factor:
    [rows, rank] in fp32."""
    unit = tl.arange(0, rank)
    start = row[:, None].to(tl.int64) * stride
    total = tl.zeros((rows, rank), dtype=tl.float32)
    key = tl.load(seed) + site
    for tile in range(0, tl.cdiv(width, columns)):
        column = tile * columns + tl.arange(0, columns)
        inside = (row[:, None] < tokens) & (column[None, :] < width)
        value = tl.load(x + start + column[None, :], mask=inside, other=0.0)
        if drops:
            value = tl.where(_kept(key, row, tile, width, threshold, columns), value, 0.0).to(x.dtype.element_ty)
        there = (unit[None, :] < rank_) & (column[:, None] < width)
        weight = tl.load(a + unit[None, :] * a_stride + column[:, None], mask=there, other=0.0)
        total = tl.dot(value, weight, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def project(  # type: ignore[no-untyped-def]
    x, a, projected, beside, seed, site, threshold, scale, tokens, width, rank_, stride, a_stride,
    drops: tl.constexpr, twice: tl.constexpr, rank: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """The first product of an adapter, and which elements dropout keeps of its input. It may be written `twice`, also
    at the ends of the input's rows."""
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    unit = tl.arange(0, rank)
    total = _projected(
        x, a, row, seed, site, threshold, tokens, width, stride, a_stride, rank_, drops, rank, rows, columns
    ) * scale  # fmt: skip
    there = (row[:, None] < tokens) & (unit[None, :] < rank_)
    tl.store(projected + row[:, None] * rank_ + unit[None, :], total, mask=there)
    if twice:
        tl.store(beside + row[:, None].to(tl.int64) * stride + unit[None, :], total, mask=there)


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def project_backward(  # type: ignore[no-untyped-def]
    grad, x, a, grad_x, grad_a, seed, site, threshold, scale, tokens, width, rank_, grad_stride, a_stride,
    drops: tl.constexpr, reaches_x: tl.constexpr, rank: tl.constexpr, share: tl.constexpr, rows: tl.constexpr,
    columns: tl.constexpr,
):  # fmt: skip
    """The gradients of an adapter's input and of its first factor."""
    tile = tl.program_id(1)
    column, unit = tile * columns + tl.arange(0, columns), tl.arange(0, rank)
    there = (unit[:, None] < rank_) & (column[None, :] < width)
    if reaches_x:
        weight = tl.load(a + unit[:, None] * a_stride + column[None, :], mask=there, other=0.0)
    total = tl.zeros((rank, columns), dtype=tl.float32)
    key = tl.load(seed) + site
    for step in range(0, share // rows):
        row = tl.program_id(0) * share + step * rows + tl.arange(0, rows)
        inside = (row[:, None] < tokens) & (column[None, :] < width)
        place = row[:, None].to(tl.int64) * width + column[None, :]
        value = tl.load(x + place, mask=inside, other=0.0)
        here = (row[:, None] < tokens) & (unit[None, :] < rank_)
        inner = tl.load(grad + row[:, None].to(tl.int64) * grad_stride + unit[None, :], mask=here, other=0.0)
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
def add_adapter(  # type: ignore[no-untyped-def]
    y, x, a, b, inner, seed, site, threshold, scale, tokens, width, out, stride, rank_,
    drops: tl.constexpr, rank: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """An adapter's output, added to its layer's."""
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    unit = tl.arange(0, rank)
    total = _projected(x, a, row, seed, site, threshold, tokens, width, width, width, rank_, drops, rank, rows, columns)
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
def adapter_backward(  # type: ignore[no-untyped-def]
    grad, inner, x, a, b, grad_x, shares, seed, site, threshold, scale, tokens, width, out, rank_,
    drops: tl.constexpr, reaches_x: tl.constexpr, rank: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """The gradients of what an adapter multiplies."""
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
def cross_entropy(  # type: ignore[no-untyped-def]
    logits, targets, scales, losses, vocabulary, stride, columns: tl.constexpr
):
    """The loss of each row of logits, and its gradient in their place."""
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
def norm(  # type: ignore[no-untyped-def]
    x, weight, bias, result, statistics, eps, offset, width, stride, centred: tl.constexpr, biased: tl.constexpr,
    columns: tl.constexpr,
):  # fmt: skip
    """A norm of each row; those of the result lie `stride` apart."""
    row = tl.program_id(0) + tl.arange(0, 1)
    column = tl.arange(0, columns)[None, :]
    inside = column < width
    place = row[:, None].to(tl.int64) * width + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    scaled = _normal(
        value, weight, bias, statistics, eps, offset, width, row, column, inside, centred=centred, biased=biased
    )
    tl.store(result + row[:, None].to(tl.int64) * stride + column, scaled, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _normal(  # type: ignore[no-untyped-def]
    value, weight, bias, statistics, eps, offset, width, row, column, inside, centred: tl.constexpr,
    biased: tl.constexpr,
):  # fmt: skip
    """The norm of rows, [rows, columns], whose means and reciprocal deviations are written to `statistics`."""
    mean = tl.zeros_like(row).to(tl.float32)
    if centred:
        mean = tl.sum(value, 1) / width
    centre = tl.where(inside, value - mean[:, None], 0.0)
    factor = 1 / tl.sqrt(tl.sum(centre * centre, 1) / width + eps)
    tl.store(statistics + 2 * row, mean)
    tl.store(statistics + 2 * row + 1, factor)
    scaled = centre * factor[:, None]
    scaled *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
    if biased:
        scaled += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return scaled


@triton.jit  # type: ignore[untyped-decorator]
def norm_backward(  # type: ignore[no-untyped-def]
    grad, x, weight, statistics, grad_x, offset, width, centred: tl.constexpr, columns: tl.constexpr
):
    """The gradient of a norm's input."""
    row = tl.program_id(0) + tl.arange(0, 1)
    column = tl.arange(0, columns)[None, :]
    inside = column < width
    place = row[:, None].to(tl.int64) * width + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    change = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    result = _normal_backward(change, value, weight, statistics, offset, width, row, column, inside, centred=centred)
    tl.store(grad_x + place, result, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _normal_backward(  # type: ignore[no-untyped-def]
    change, value, weight, statistics, offset, width, row, column, inside, centred: tl.constexpr
):
    """The gradient of what `_normal` was given, from that of its result."""
    mean, factor = tl.load(statistics + 2 * row)[:, None], tl.load(statistics + 2 * row + 1)[:, None]
    normal = tl.where(inside, (value - mean) * factor, 0.0)
    change *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
    change = tl.where(inside, change, 0.0)
    result = change - normal * (tl.sum(change * normal, 1)[:, None] / width)
    if centred:
        result -= tl.sum(change, 1)[:, None] / width
    return result * factor


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def add_norm(  # type: ignore[no-untyped-def]
    branch, residual, weight, bias, after, result, sums, statistics, after_statistics, eps, offset, after_eps,
    after_offset, seed, site, threshold, factor_kept, width, branch_stride, stride,
    drops: tl.constexpr, centred: tl.constexpr, biased: tl.constexpr, normed: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """A sum, of which one term may be normed, and a norm of each row of it. Rows of that term and of the result lie
    `branch_stride` and `stride` apart."""
    row = tl.program_id(0) + tl.arange(0, 1)
    column = tl.arange(0, columns)[None, :]
    inside = column < width
    place = row[:, None].to(tl.int64) * width + column
    added = tl.load(branch + row[:, None].to(tl.int64) * branch_stride + column, mask=inside, other=0.0).to(tl.float32)
    if normed:
        added = _normal(
            added, after, after, after_statistics, after_eps, after_offset, width, row, column, inside,
            centred=False, biased=False,
        )  # fmt: skip
    if drops:
        added = tl.where(_kept(tl.load(seed) + site, row, 0, width, threshold, columns), added * factor_kept, 0.0)
    value = tl.load(residual + place, mask=inside, other=0.0).to(tl.float32) + added
    value = value.to(sums.dtype.element_ty)  # as it is kept: the norm is computed again from that
    tl.store(sums + place, value, mask=inside)
    scaled = _normal(
        value.to(tl.float32), weight, bias, statistics, eps, offset, width, row, column, inside,
        centred=centred, biased=biased,
    )  # fmt: skip
    tl.store(result + row[:, None].to(tl.int64) * stride + column, scaled, mask=inside)


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def add_norm_backward(  # type: ignore[no-untyped-def]
    first, second, past, sums, weight, statistics, branch, after, after_statistics, grad_branch, grad_residual, offset,
    after_offset, seed, site, threshold, factor_kept, width, past_stride, branch_stride, residual_stride,
    drops: tl.constexpr, two: tl.constexpr, passed: tl.constexpr, centred: tl.constexpr, normed: tl.constexpr,
    columns: tl.constexpr,
):  # fmt: skip
    """The gradients of both terms of a sum of which a norm was taken. Rows of the branch and of its gradient lie
    `branch_stride` apart."""
    row = tl.program_id(0) + tl.arange(0, 1)
    column = tl.arange(0, columns)[None, :]
    inside = column < width
    place = row[:, None].to(tl.int64) * width + column
    value = tl.load(sums + place, mask=inside, other=0.0).to(tl.float32)
    change = tl.load(first + place, mask=inside, other=0.0).to(tl.float32)
    if two:
        change += tl.load(second + place, mask=inside, other=0.0).to(tl.float32)
    grad = _normal_backward(change, value, weight, statistics, offset, width, row, column, inside, centred=centred)
    line = row[:, None].to(tl.int64)
    if passed:
        grad += tl.load(past + line * past_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_residual + line * residual_stride + column, grad, mask=inside)
    if drops:
        kept = _kept(tl.load(seed) + site, row, 0, width, threshold, columns)
        grad = tl.where(kept, grad * factor_kept, 0.0)
    if normed:
        value = tl.load(branch + line * branch_stride + column, mask=inside, other=0.0).to(tl.float32)
        grad = _normal_backward(
            grad, value, after, after_statistics, after_offset, width, row, column, inside, centred=False
        )
    if drops or normed:
        tl.store(grad_branch + line * branch_stride + column, grad, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def relu(x, result, positive, count, elements: tl.constexpr):  # type: ignore[no-untyped-def]
    """ReLU, and where its input was above zero."""
    first = tl.program_id(0).to(tl.int64) * elements
    place = first + tl.arange(0, elements)
    value = tl.load(x + place, mask=place < count, other=0.0)
    tl.store(result + place, tl.where(value < 0, 0.0, value), mask=place < count)  # as torch does, NaN stays NaN
    bits = tl.reshape((value > 0).to(tl.int32), (elements // 8, 8)) << tl.arange(0, 8)[None, :]
    byte = first // 8 + tl.arange(0, elements // 8)
    tl.store(positive + byte, tl.sum(bits, 1).to(tl.uint8), mask=byte < tl.cdiv(count, 8))


@triton.jit  # type: ignore[untyped-decorator]
def relu_backward(grad, positive, result, count, elements: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gradient of ReLU's input."""
    first = tl.program_id(0).to(tl.int64) * elements
    place = first + tl.arange(0, elements)
    value = tl.load(grad + place, mask=place < count, other=0.0)
    byte = first // 8 + tl.arange(0, elements // 8)
    bits = tl.load(positive + byte, mask=byte < tl.cdiv(count, 8), other=0).to(tl.int32)
    kept = tl.reshape((bits[:, None] >> tl.arange(0, 8)[None, :]) & 1, (elements,))
    tl.store(result + place, tl.where(kept != 0, value, 0.0), mask=place < count)


@triton.jit  # type: ignore[untyped-decorator]
def _activated(value, activation: tl.constexpr):  # type: ignore[no-untyped-def]
    """An activation and its slope, in fp32."""
    if activation == "silu":
        share = tl.sigmoid(value)
        result = value * share
        slope = share * (1 + value * (1 - share))
    elif activation == "gelu":
        share = 0.5 * (1 + tl.erf(value * 0.7071067811865476))
        result = value * share
        slope = share + value * 0.3989422804014327 * tl.exp(-0.5 * value * value)
    elif activation == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) is sigmoid(2 u)
        share = tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
        result = value * share
        slope = share + result * (1 - share) * (1.5957691216057308 + 0.21406444881780076 * value * value)
    else:
        tl.static_assert(activation == "relu2")
        above = tl.where(value < 0, 0.0, value)  # NaN stays NaN
        result = above * above
        slope = 2 * above
    return result, slope


@triton.jit  # type: ignore[untyped-decorator]
def gate(  # type: ignore[no-untyped-def]
    gate, up, result, stride, result_stride, width, activation: tl.constexpr, gated: tl.constexpr,
    columns: tl.constexpr,
):  # fmt: skip
    """An activated gate, times what it lets through. Rows of both lie `stride` apart."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    place = row * stride + column
    value, _ = _activated(tl.load(gate + place, mask=column < width, other=0.0).to(tl.float32), activation)
    if gated:
        value *= tl.load(up + place, mask=column < width, other=0.0).to(tl.float32)
    tl.store(result + row * result_stride + column, value, mask=column < width)


@triton.jit  # type: ignore[untyped-decorator]
def gate_backward(  # type: ignore[no-untyped-def]
    grad, gate, up, grad_gate, grad_up, stride, grad_stride, width,
    activation: tl.constexpr, gated: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """The gradients of a gate and of what it lets through, which may be written over the two."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    place, there = row * stride + column, row * grad_stride + column
    change = tl.load(grad + row * width + column, mask=column < width, other=0.0).to(tl.float32)
    value, slope = _activated(tl.load(gate + place, mask=column < width, other=0.0).to(tl.float32), activation)
    if gated:
        passed = tl.load(up + place, mask=column < width, other=0.0).to(tl.float32)
        tl.debug_barrier()  # one thread may load what another writes over
        tl.store(grad_up + there, change * value, mask=column < width)
        change *= passed
    tl.store(grad_gate + there, change * slope, mask=column < width)


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def gate_project_backward(  # type: ignore[no-untyped-def]
    grad, reached, gate, up, a, grad_gate, grad_up, grad_a, scale, tokens, width, rank_, stride, grad_stride,
    reached_stride, activation: tl.constexpr, reaches: tl.constexpr, rank: tl.constexpr, share: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """`project_backward` of a gate's product, which is made again, and `gate_backward` of what it makes of `grad`,
    which may have the adapter's share already.

    The gradients may be written over gate and up. A tile is one program's alone, and all of it is loaded before its
    dot, whose operands threads exchange behind a barrier; one of our own could keep loads from being pipelined.
    """
    column, unit = tl.program_id(1) * columns + tl.arange(0, columns), tl.arange(0, rank)
    there = (unit[:, None] < rank_) & (column[None, :] < width)
    if reaches:
        weight = tl.load(a + unit[:, None] * width + column[None, :], mask=there, other=0.0)
    total = tl.zeros((rank, columns), dtype=tl.float32)
    for step in range(0, share // rows):
        row = tl.program_id(0) * share + step * rows + tl.arange(0, rows)
        inside = (row[:, None] < tokens) & (column[None, :] < width)
        place = row[:, None].to(tl.int64) * stride + column[None, :]
        value, slope = _activated(tl.load(gate + place, mask=inside, other=0.0).to(tl.float32), activation)
        passed = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
        here = (row[:, None] < tokens) & (unit[None, :] < rank_)
        inner = tl.load(reached + row[:, None].to(tl.int64) * reached_stride + unit[None, :], mask=here, other=0.0)
        product = (value * passed).to(gate.dtype.element_ty)  # as it was projected
        total = tl.dot(tl.trans(inner), product, total, input_precision="ieee")
        place = row[:, None].to(tl.int64) * width + column[None, :]
        change = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        if reaches:
            change += tl.dot(inner, weight, input_precision="ieee") * scale
        place = row[:, None].to(tl.int64) * grad_stride + column[None, :]
        tl.store(grad_up + place, change * value, mask=inside)
        tl.store(grad_gate + place, change * passed * slope, mask=inside)
    first = tl.program_id(0) * rank_ * width
    tl.store(grad_a + first + unit[:, None] * width + column[None, :], total * scale, mask=there)
