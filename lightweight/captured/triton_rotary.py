"""Rotary embeddings as Triton compiles them. What calls them is `rotary`.

Importing this needs Triton, as `triton_kernels` does.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _turns(  # type: ignore[no-untyped-def]
    cos, sin, half_, neighbours: tl.constexpr, repeated: tl.constexpr, half: tl.constexpr
):
    """Where both elements of each pair lie in a head, and cosine and sine that each of them is turned by: [1, half]."""
    pair = tl.arange(0, half)[None, :]
    there = pair < half_
    if neighbours:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + half_
    at, also_at = first, second
    if repeated:
        at, also_at = pair, pair
    first_cos = tl.load(cos + at, mask=there, other=1.0).to(tl.float32)
    second_cos = tl.load(cos + also_at, mask=there, other=1.0).to(tl.float32)
    first_sin = tl.load(sin + at, mask=there, other=0.0).to(tl.float32)
    second_sin = tl.load(sin + also_at, mask=there, other=0.0).to(tl.float32)
    return first, second, first_cos, second_cos, first_sin, second_sin


@triton.jit  # type: ignore[untyped-decorator]
def _rotated(  # type: ignore[no-untyped-def]
    x, result, weight, factors, cos, sin, eps, offset, heads_, head_stride, result_stride, half_, rest_,
    neighbours: tl.constexpr, repeated: tl.constexpr, normed: tl.constexpr, heads: tl.constexpr, half: tl.constexpr,
    rest: tl.constexpr,
):  # fmt: skip
    """All heads of a token, normed and turned."""
    head = tl.arange(0, heads)
    inside = (head[:, None] < heads_) & (tl.arange(0, half)[None, :] < half_)
    first, second, first_cos, second_cos, first_sin, second_sin = _turns(cos, sin, half_, neighbours, repeated, half)
    start, begin = head[:, None] * head_stride, head[:, None] * result_stride
    one = tl.load(x + start + first, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x + start + second, mask=inside, other=0.0).to(tl.float32)
    if normed:
        factor = 1 / tl.sqrt((tl.sum(one * one, 1) + tl.sum(other * other, 1)) / (2 * half_) + eps)
        tl.store(factors + head, factor, mask=head < heads_)
        there = first < 2 * half_
        one *= factor[:, None] * (tl.load(weight + first, mask=there, other=0.0).to(tl.float32) + offset)
        there = second < 2 * half_
        other *= factor[:, None] * (tl.load(weight + second, mask=there, other=0.0).to(tl.float32) + offset)
    tl.store(result + begin + first, one * first_cos - other * first_sin, mask=inside)
    tl.store(result + begin + second, other * second_cos + one * second_sin, mask=inside)
    if rest > 0:
        column = 2 * half_ + tl.arange(0, rest)[None, :]
        inside = (head[:, None] < heads_) & (tl.arange(0, rest)[None, :] < rest_)
        tl.store(result + begin + column, tl.load(x + start + column, mask=inside, other=0.0), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def rotate(  # type: ignore[no-untyped-def]
    q, k, new_q, new_k, q_weight, k_weight, q_factors, k_factors, cos, sin, eps, offset, time, half_, rest_,
    q_heads_, k_heads_, q_batch, q_time, q_head, k_batch, k_time, k_head, new_q_batch, new_q_time, new_q_head,
    new_k_batch, new_k_time, new_k_head, cos_batch, cos_time,
    neighbours: tl.constexpr, repeated: tl.constexpr, normed: tl.constexpr, q_heads: tl.constexpr,
    k_heads: tl.constexpr, half: tl.constexpr, rest: tl.constexpr,
):  # fmt: skip
    """Rotary embedding of a token's queries and keys, and before it a norm of each of their heads."""
    token = tl.program_id(0).to(tl.int64)
    row, at = token // time, token % time
    cos += row * cos_batch + at * cos_time
    sin += row * cos_batch + at * cos_time
    _rotated(
        q + row * q_batch + at * q_time, new_q + row * new_q_batch + at * new_q_time, q_weight,
        q_factors + token * q_heads_, cos, sin, eps, offset, q_heads_, q_head, new_q_head, half_, rest_,
        neighbours, repeated, normed, q_heads, half, rest,
    )  # fmt: skip
    _rotated(
        k + row * k_batch + at * k_time, new_k + row * new_k_batch + at * new_k_time, k_weight,
        k_factors + token * k_heads_, cos, sin, eps, offset, k_heads_, k_head, new_k_head, half_, rest_,
        neighbours, repeated, normed, k_heads, half, rest,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _rotated_backward(  # type: ignore[no-untyped-def]
    grad, kept, result, weight, factors, cos, sin, offset, heads_, grad_stride, kept_stride, result_stride, half_,
    rest_, neighbours: tl.constexpr, repeated: tl.constexpr, normed: tl.constexpr, turned: tl.constexpr,
    heads: tl.constexpr, half: tl.constexpr, rest: tl.constexpr,
):  # fmt: skip
    """The gradient of what `_rotated` was given, from that of its result. Of a norm, its input is `kept`, or what
    became of that where it is `turned`."""
    head = tl.arange(0, heads)
    inside = (head[:, None] < heads_) & (tl.arange(0, half)[None, :] < half_)
    first, second, first_cos, second_cos, first_sin, second_sin = _turns(cos, sin, half_, neighbours, repeated, half)
    start, begin = head[:, None] * grad_stride, head[:, None] * result_stride
    change = tl.load(grad + start + first, mask=inside, other=0.0).to(tl.float32)
    change_other = tl.load(grad + start + second, mask=inside, other=0.0).to(tl.float32)
    one = change * first_cos + change_other * second_sin
    other = change_other * second_cos - change * first_sin
    if normed:
        factor = tl.load(factors + head, mask=head < heads_, other=0.0)[:, None]
        there = first < 2 * half_
        scale = tl.load(weight + first, mask=there, other=1.0).to(tl.float32) + offset
        there = second < 2 * half_
        scale_other = tl.load(weight + second, mask=there, other=1.0).to(tl.float32) + offset
        lies = head[:, None] * kept_stride
        normal = tl.load(kept + lies + first, mask=inside, other=0.0).to(tl.float32)
        normal_other = tl.load(kept + lies + second, mask=inside, other=0.0).to(tl.float32)
        if turned:
            spread = first_cos * second_cos + first_sin * second_sin  # what a turn and its reverse enlarge by
            before = (second_cos * normal + first_sin * normal_other) / (spread * scale)
            normal_other = (first_cos * normal_other - second_sin * normal) / (spread * scale_other)
            normal = before
        else:
            normal *= factor
            normal_other *= factor
        one *= scale
        other *= scale_other
        mean = tl.sum(tl.where(inside, one * normal + other * normal_other, 0.0), 1)[:, None] / (2 * half_)
        one = (one - normal * mean) * factor
        other = (other - normal_other * mean) * factor
    tl.store(result + begin + first, one, mask=inside)
    tl.store(result + begin + second, other, mask=inside)
    if rest > 0:
        column = 2 * half_ + tl.arange(0, rest)[None, :]
        inside = (head[:, None] < heads_) & (tl.arange(0, rest)[None, :] < rest_)
        tl.store(result + begin + column, tl.load(grad + start + column, mask=inside, other=0.0), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def rotate_backward(  # type: ignore[no-untyped-def]
    grad_q, grad_k, q, k, new_q, new_k, q_weight, k_weight, q_factors, k_factors, cos, sin, offset, time, half_, rest_,
    q_heads_, k_heads_, grad_q_batch, grad_q_time, grad_q_head, grad_k_batch, grad_k_time, grad_k_head,
    q_batch, q_time, q_head, k_batch, k_time, k_head, new_q_batch, new_q_time, new_q_head,
    new_k_batch, new_k_time, new_k_head, cos_batch, cos_time,
    neighbours: tl.constexpr, repeated: tl.constexpr, normed: tl.constexpr, turned: tl.constexpr,
    q_heads: tl.constexpr, k_heads: tl.constexpr, half: tl.constexpr, rest: tl.constexpr,
):  # fmt: skip
    """The gradients of what `rotate` was given."""
    token = tl.program_id(0).to(tl.int64)
    row, at = token // time, token % time
    cos += row * cos_batch + at * cos_time
    sin += row * cos_batch + at * cos_time
    _rotated_backward(
        grad_q + row * grad_q_batch + at * grad_q_time, q + row * q_batch + at * q_time,
        new_q + row * new_q_batch + at * new_q_time, q_weight, q_factors + token * q_heads_, cos, sin, offset,
        q_heads_, grad_q_head, q_head, new_q_head, half_, rest_,
        neighbours, repeated, normed, turned, q_heads, half, rest,
    )  # fmt: skip
    _rotated_backward(
        grad_k + row * grad_k_batch + at * grad_k_time, k + row * k_batch + at * k_time,
        new_k + row * new_k_batch + at * new_k_time, k_weight, k_factors + token * k_heads_, cos, sin, offset,
        k_heads_, grad_k_head, k_head, new_k_head, half_, rest_,
        neighbours, repeated, normed, turned, k_heads, half, rest,
    )  # fmt: skip
