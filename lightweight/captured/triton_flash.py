"""Causal attention for Hopper, as Triton compiles it: several sequences one behind the other, grouped queries, windows
and soft caps. What calls it is `flash`.

FlashAttention-2's kernels, which torch brings along, multiply as Ampere does; Triton's multiply as Hopper does. The
passes are those of that paper: nothing of [time, time] is ever written, and the backward pass computes the scores
again, once for the gradient of queries and once for those of keys and values, so that every sum has its own order.

Importing this needs Triton, which torch brings along on CUDA.
"""

import triton
import triton.language as tl

VARYING = ["time", "tokens", "window", "heads", "group"]
"""What a kernel is not compiled anew for."""


@triton.jit  # type: ignore[untyped-decorator]
def _sequence(ends, index, time, joined: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a sequence begins, and its length: by `ends`, or each of `time` tokens."""
    first, length = index * time, time
    if joined:
        first = tl.load(ends + index)
        length = tl.load(ends + index + 1) - first
    return first, length


@triton.jit  # type: ignore[untyped-decorator]
def _bent(product, scale, cap, capped: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores without the `_factor` that makes exponents of two of them."""
    if capped:
        return (2 * tl.sigmoid(2 * product * scale / cap) - 1) * cap
    return product


@triton.jit  # type: ignore[untyped-decorator]
def _factor(scale, capped: tl.constexpr):  # type: ignore[no-untyped-def]
    if capped:
        return 1.4426950408889634
    return scale * 1.4426950408889634


@triton.jit  # type: ignore[untyped-decorator]
def _seen(row, column, window, length, windowed: tl.constexpr):  # type: ignore[no-untyped-def]
    seen = (column <= row) & (column < length) & (row < length)
    if windowed:
        seen = seen & (column > row - window)
    return seen


@triton.jit  # type: ignore[untyped-decorator]
def _reach(begin, rows, window, columns: tl.constexpr, windowed: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the keys that `rows` queries from `begin` on see, where the first are, where those begin that all of them see,
    and where these end; in whole tiles."""
    low, middle = 0, 0
    high = begin // columns * columns
    if windowed:
        low = tl.maximum(0, begin - window + 1) // columns * columns
        middle = tl.maximum(0, begin + rows - window + columns - 1) // columns * columns
        middle = tl.maximum(tl.minimum(middle, high), low)
    return low, middle, high


@triton.jit  # type: ignore[untyped-decorator]
def _attend_over(  # type: ignore[no-untyped-def]
    query, total, sums, largest, k, v, low, high, row, length, k_token, v_token, window, scale, cap,
    masked: tl.constexpr, windowed: tl.constexpr, capped: tl.constexpr, width: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Go on with attention over the keys from `low` to `high`."""
    unit = tl.arange(0, width)
    factor = _factor(scale, capped)
    for start in range(low, high, columns):
        column = start + tl.arange(0, columns)
        place, inside = column[:, None] * k_token + unit[None, :], column[:, None] < length
        key = tl.load(k + place, mask=inside, other=0.0) if masked else tl.load(k + place)
        scores = _bent(tl.dot(query, tl.trans(key), input_precision="ieee"), scale, cap, capped)
        if masked:
            scores = tl.where(_seen(row[:, None], column[None, :], window, length, windowed), scores, float("-inf"))
        highest = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest) if masked else highest
        share = tl.exp2(scores * factor - (base * factor)[:, None])
        shrink = tl.exp2((largest - base) * factor)
        sums = sums * shrink + tl.sum(share, 1)
        place = column[:, None] * v_token + unit[None, :]
        value = tl.load(v + place, mask=inside, other=0.0) if masked else tl.load(v + place)
        total = tl.dot(share.to(value.dtype), value, total * shrink[:, None], input_precision="ieee")
        largest = highest
    return total, sums, largest


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def attend(  # type: ignore[no-untyped-def]
    q, k, v, out, sums, ends, scale, cap, time, tokens, window, heads, group, q_token, q_head, k_token, k_head, v_token,
    v_head,
    joined: tl.constexpr, windowed: tl.constexpr, capped: tl.constexpr, width: tl.constexpr, rows: tl.constexpr,
    columns: tl.constexpr,
):  # fmt: skip
    """Attention of `rows` queries of a head, and the logarithm of what its shares were divided by. Those that see most
    go first."""
    head = tl.program_id(0) % heads
    first, length = _sequence(ends, tl.program_id(0) // heads, time, joined)
    begin = (tl.num_programs(1) - 1 - tl.program_id(1)) * rows
    if begin >= length:
        return
    row, unit = begin + tl.arange(0, rows), tl.arange(0, width)
    inside = row[:, None] < length
    first = first.to(tl.int64)
    q += first * q_token + head * q_head
    k += first * k_token + head // group * k_head
    v += first * v_token + head // group * v_head
    query = tl.load(q + row[:, None] * q_token + unit[None, :], mask=inside, other=0.0)
    total = tl.zeros((rows, width), dtype=tl.float32)
    largest = tl.full((rows,), float("-inf"), dtype=tl.float32)
    summed = tl.zeros((rows,), dtype=tl.float32)
    low, middle, high = _reach(begin, rows, window, columns, windowed)
    if windowed:
        total, summed, largest = _attend_over(
            query, total, summed, largest, k, v, low, middle, row, length, k_token, v_token, window, scale, cap,
            True, windowed, capped, width, columns,
        )  # fmt: skip
    total, summed, largest = _attend_over(
        query, total, summed, largest, k, v, middle, high, row, length, k_token, v_token, window, scale, cap,
        False, windowed, capped, width, columns,
    )  # fmt: skip
    total, summed, largest = _attend_over(
        query, total, summed, largest, k, v, high, tl.minimum(begin + rows, length), row, length, k_token, v_token,
        window, scale, cap, True, windowed, capped, width, columns,
    )  # fmt: skip
    at = head.to(tl.int64) * tokens + first + row
    tl.store(sums + at, largest * _factor(scale, capped) + tl.log2(summed), mask=row < length)
    place = ((first + row) * heads + head)[:, None] * width + unit[None, :]
    tl.store(out + place, total / summed[:, None], mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _slope(share, back, delta, scores, cap, capped: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gradient of scores before they were bent, but for their scale."""
    slope = share * (back - delta)
    if capped:
        bend = scores / cap
        slope = tl.where(share > 0, slope * (1 - bend * bend), 0.0)
    return slope


@triton.jit  # type: ignore[untyped-decorator]
def _query_gradient_over(  # type: ignore[no-untyped-def]
    query, change, total, delta, sums, k, v, low, high, row, length, k_token, v_token, window, scale, cap,
    masked: tl.constexpr, windowed: tl.constexpr, capped: tl.constexpr, width: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    unit = tl.arange(0, width)
    factor = _factor(scale, capped)
    for start in range(low, high, columns):
        column = start + tl.arange(0, columns)
        of_key = column[:, None] * k_token + unit[None, :]
        of_value, inside = column[:, None] * v_token + unit[None, :], column[:, None] < length
        key = tl.load(k + of_key, mask=inside, other=0.0) if masked else tl.load(k + of_key)
        value = tl.load(v + of_value, mask=inside, other=0.0) if masked else tl.load(v + of_value)
        scores = _bent(tl.dot(query, tl.trans(key), input_precision="ieee"), scale, cap, capped)
        if masked:
            scores = tl.where(_seen(row[:, None], column[None, :], window, length, windowed), scores, float("-inf"))
        share = tl.exp2(scores * factor - sums[:, None])
        slope = _slope(
            share, tl.dot(change, tl.trans(value), input_precision="ieee"), delta[:, None], scores, cap, capped
        )
        total = tl.dot(slope.to(key.dtype), key, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def attend_backward_query(  # type: ignore[no-untyped-def]
    grad, q, k, v, out, sums, deltas, grad_q, ends, scale, cap, time, tokens, window, heads, group, grad_token,
    grad_head, q_token, q_head, k_token, k_head, v_token, v_head,
    joined: tl.constexpr, windowed: tl.constexpr, capped: tl.constexpr, width: tl.constexpr, rows: tl.constexpr,
    columns: tl.constexpr,
):  # fmt: skip
    """The gradient of `rows` queries of a head; and of each what it loses to the sum that shares are divided by, for
    `attend_backward_key`."""
    head = tl.program_id(0) % heads
    first, length = _sequence(ends, tl.program_id(0) // heads, time, joined)
    begin = (tl.num_programs(1) - 1 - tl.program_id(1)) * rows
    if begin >= length:
        return
    row, unit = begin + tl.arange(0, rows), tl.arange(0, width)
    inside = row[:, None] < length
    first = first.to(tl.int64)
    q += first * q_token + head * q_head
    k += first * k_token + head // group * k_head
    v += first * v_token + head // group * v_head
    grad += first * grad_token + head * grad_head
    query = tl.load(q + row[:, None] * q_token + unit[None, :], mask=inside, other=0.0)
    change = tl.load(grad + row[:, None] * grad_token + unit[None, :], mask=inside, other=0.0)
    place = ((first + row) * heads + head)[:, None] * width + unit[None, :]
    delta = tl.sum(tl.load(out + place, mask=inside, other=0.0).to(tl.float32) * change.to(tl.float32), 1)
    at = head.to(tl.int64) * tokens + first + row
    tl.store(deltas + at, delta, mask=row < length)
    summed = tl.load(sums + at, mask=row < length, other=float("inf"))
    total = tl.zeros((rows, width), dtype=tl.float32)
    low, middle, high = _reach(begin, rows, window, columns, windowed)
    if windowed:
        total = _query_gradient_over(
            query, change, total, delta, summed, k, v, low, middle, row, length, k_token, v_token, window, scale, cap,
            True, windowed, capped, width, columns,
        )  # fmt: skip
    total = _query_gradient_over(
        query, change, total, delta, summed, k, v, middle, high, row, length, k_token, v_token, window, scale, cap,
        False, windowed, capped, width, columns,
    )  # fmt: skip
    total = _query_gradient_over(
        query, change, total, delta, summed, k, v, high, tl.minimum(begin + rows, length), row, length, k_token,
        v_token, window, scale, cap, True, windowed, capped, width, columns,
    )  # fmt: skip
    tl.store(grad_q + place, total * scale, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _key_gradient_over(  # type: ignore[no-untyped-def]
    key, value, total_k, total_v, q, grad, sums, deltas, low, high, column, length, q_token, grad_token, window, scale,
    cap,
    masked: tl.constexpr, windowed: tl.constexpr, capped: tl.constexpr, width: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    unit = tl.arange(0, width)
    factor = _factor(scale, capped)
    for start in range(low, high, rows):
        row = start + tl.arange(0, rows)
        inside = row[:, None] < length
        query = tl.load(q + row[:, None] * q_token + unit[None, :], mask=inside, other=0.0)
        change = tl.load(grad + row[:, None] * grad_token + unit[None, :], mask=inside, other=0.0)
        summed = tl.load(sums + row, mask=row < length, other=float("inf"))
        delta = tl.load(deltas + row, mask=row < length, other=0.0)
        scores = _bent(tl.dot(key, tl.trans(query), input_precision="ieee"), scale, cap, capped)  # [columns, rows]
        if masked:
            scores = tl.where(_seen(row[None, :], column[:, None], window, length, windowed), scores, float("-inf"))
        share = tl.exp2(scores * factor - summed[None, :])
        total_v = tl.dot(share.to(change.dtype), change, total_v, input_precision="ieee")
        slope = _slope(
            share, tl.dot(value, tl.trans(change), input_precision="ieee"), delta[None, :], scores, cap, capped
        )
        total_k = tl.dot(slope.to(query.dtype), query, total_k, input_precision="ieee")
    return total_k, total_v


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def attend_backward_key(  # type: ignore[no-untyped-def]
    grad, q, k, v, sums, deltas, grad_k, grad_v, ends, scale, cap, time, tokens, window, heads, group, grad_token,
    grad_head, q_token, q_head, k_token, k_head, v_token, v_head,
    joined: tl.constexpr, windowed: tl.constexpr, capped: tl.constexpr, width: tl.constexpr, rows: tl.constexpr,
    columns: tl.constexpr,
):  # fmt: skip
    """The gradients of `columns` keys and values of a head of theirs, from all queries of its group that see them."""
    heads_of_keys = heads // group
    head = tl.program_id(0) % heads_of_keys
    first, length = _sequence(ends, tl.program_id(0) // heads_of_keys, time, joined)
    begin = tl.program_id(1) * columns
    if begin >= length:
        return
    column, unit = begin + tl.arange(0, columns), tl.arange(0, width)
    inside = column[:, None] < length
    first = first.to(tl.int64)
    k += first * k_token + head * k_head
    v += first * v_token + head * v_head
    key = tl.load(k + column[:, None] * k_token + unit[None, :], mask=inside, other=0.0)
    value = tl.load(v + column[:, None] * v_token + unit[None, :], mask=inside, other=0.0)
    total_k = tl.zeros((columns, width), dtype=tl.float32)
    total_v = tl.zeros((columns, width), dtype=tl.float32)
    low, high = begin // rows * rows, length
    whole = tl.cdiv(begin + columns, rows) * rows  # from here on all queries see all of these keys
    if windowed:
        high = tl.minimum(length, begin + columns + window - 1)
    for each in range(0, group):
        of_queries = head * group + each
        at = of_queries.to(tl.int64) * tokens + first
        q_at, grad_at = q + first * q_token + of_queries * q_head, grad + first * grad_token + of_queries * grad_head
        total_k, total_v = _key_gradient_over(
            key, value, total_k, total_v, q_at, grad_at, sums + at, deltas + at, low, tl.minimum(whole, high), column,
            length, q_token, grad_token, window, scale, cap, True, windowed, capped, width, rows,
        )  # fmt: skip
        last = high
        if windowed:  # until the first of them is out of reach
            last = tl.maximum(whole, tl.minimum((begin + window) // rows * rows, high))
        total_k, total_v = _key_gradient_over(
            key, value, total_k, total_v, q_at, grad_at, sums + at, deltas + at, whole, last, column, length, q_token,
            grad_token, window, scale, cap, False, windowed, capped, width, rows,
        )  # fmt: skip
        if windowed:
            total_k, total_v = _key_gradient_over(
                key, value, total_k, total_v, q_at, grad_at, sums + at, deltas + at, tl.cdiv(last, rows) * rows, high,
                column, length, q_token, grad_token, window, scale, cap, True, windowed, capped, width, rows,
            )  # fmt: skip
    place = ((first + column) * heads_of_keys + head)[:, None] * width + unit[None, :]
    tl.store(grad_k + place, total_k * scale, mask=inside)
    tl.store(grad_v + place, total_v, mask=inside)
