"""Are layers that are one matrix with their adapters the layers they were? Against float64, whole and of 4 bits; in
Triton's interpreter where there is no GPU."""

import itertools
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit

from lightweight.captured import joined, kernels, launching
from lightweight.captured.joined import Adapter, Placing, whole_of
from lightweight.captured.projections import factor_gradients
from tests.captured.test_kernels import DEVICE, HAS_CUDA, apart, exact, gradient, near, random  # noqa: F401

TOKENS, WIDTH, SCALING = 37, 64, 2.5


def layer(out: int, bits: int, dtype: torch.dtype, nested: bool, kind: str) -> Any:
    (weight,) = random(dtype, (out, WIDTH))
    weight = weight / 8
    if bits == 16:
        plain = torch.nn.Linear(WIDTH, out, bias=False, device=DEVICE, dtype=dtype).requires_grad_(False)
        plain.weight.data = weight
        return plain
    packed = Linear4bit(WIDTH, out, bias=False, compute_dtype=dtype, compress_statistics=nested, quant_type=kind)
    packed.weight = Params4bit(weight.cpu(), requires_grad=False, compress_statistics=nested, quant_type=kind)
    return packed.to(DEVICE)


def adapter(dtype: torch.dtype, out: int) -> Adapter:
    a, b = random(dtype, (8, WIDTH), (out, 8))
    return a, b


def weight_of(base: Any) -> torch.Tensor:
    if isinstance(base, Linear4bit):
        weight: Any = base.weight
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return base.weight.detach()


@pytest.mark.parametrize("has_room", [True, False], ids=["room", "no room"])
@pytest.mark.parametrize(
    ("bits", "nested", "kind"), [(16, False, ""), (4, True, "nf4"), (4, False, "nf4"), (4, True, "fp4")]
)
@pytest.mark.parametrize("widths", [(96,), (64, 32, 40)], ids=["one layer", "three layers"])
def test_layers_and_their_adapters_are_one_product(apart, widths, bits, nested, kind, has_room) -> None:  # noqa: F811
    for dtype in (torch.float32, torch.float16) if HAS_CUDA else (torch.float32,):
        apart(check_whole, widths, bits, nested, kind, has_room, dtype)


def check_whole(
    widths: tuple[int, ...], bits: int, nested: bool, kind: str, has_room: bool, dtype: torch.dtype
) -> None:
    kernels_take, launching.take = launching.take, lambda x: True
    try:
        bases = [layer(width, bits, dtype, nested, kind) for width in widths]
        before = [weight_of(base).clone() for base in bases]
        adapters = [adapter(dtype, width) for width in widths]
        whole = whole_of(bases, adapters, SCALING)
        assert whole is not None
        assert all(torch.equal(weight_of(base), weight) for base, weight in zip(bases, before, strict=True))
        placing = Placing()
        placing.add(whole)
        placing.place()
        room = 8 * len(widths)
        x, upstream = random(dtype, (TOKENS, WIDTH), (TOKENS, sum(widths)))
        given = x
        if has_room:
            given = kernels.with_room(x.shape, room, x)
            given.copy_(x)
        y, inner = whole.forward(given, has_room=has_room)
        grads = upstream.split(widths, -1)
        row = whole.with_room(*grads)
        reached, grad_x = whole.backward(row, reaches_x=True)
        found = factor_gradients(whole, row, reached, inner, x)

        exact_x, *factors = exact(x, *itertools.chain.from_iterable(adapters))
        outputs = [
            exact_x @ weight.cpu().double().t() + SCALING * (exact_x @ a.t()) @ b.t()
            for weight, a, b in zip(before, factors[::2], factors[1::2], strict=True)
        ]
        expected = torch.cat(outputs, -1)
        expected.backward(upstream.cpu().double())
        near(y, expected.detach())
        assert grad_x is not None
        near(grad_x, gradient(exact_x))
        for own, leaf in zip(found, factors, strict=True):
            assert own is not None
            near(own, gradient(leaf))
    finally:
        launching.take = kernels_take


def test_factors_are_placed_as_they_are_now(apart) -> None:  # noqa: F811
    apart(check_placing)


def check_placing() -> None:
    take, launching.take = launching.take, lambda x: True
    try:
        bases = [layer(32, 16, torch.float32, False, ""), layer(48, 16, torch.float32, False, "")]
        adapters = [adapter(torch.float32, width) for width in (32, 48)]
        whole, placing = whole_of(bases, adapters, SCALING), Placing()
        assert whole is not None and whole.there is not None
        placing.add(whole)
        for factor in (1.0, 3.0):
            for a, b in adapters:
                a.mul_(factor)
                b.mul_(factor)
            placing.place()
            (a, b), (other_a, other_b) = adapters
            matrix = whole.there
            assert torch.equal(matrix[80:, :WIDTH], torch.cat([a, other_a]) * SCALING)
            assert torch.equal(matrix[:80, WIDTH:], torch.block_diag(b, other_b))
        adapters[0][0].data = adapters[0][0] + 1  # lies elsewhere now
        placing.place()
        assert torch.equal(matrix[80:88, :WIDTH], adapters[0][0] * SCALING)
        again = whole_of(bases, adapters, SCALING)
        assert again is not None and again.there is whole.there  # nothing is copied twice
    finally:
        launching.take = take


def test_what_cannot_be_one_matrix_is_none() -> None:
    plain = layer(32, 16, torch.float32, False, "").cpu()
    a, b = torch.zeros(8, WIDTH), torch.zeros(32, 8)
    assert whole_of([plain], [(a, b)], 1.0) is not None
    assert whole_of([plain], [None], 1.0) is None
    assert whole_of([plain], [(a[:4], b[:, :4].contiguous())], 1.0) is None  # rows would begin anywhere
    assert whole_of([plain], [(a.half(), b.half())], 1.0) is None
    wide = torch.zeros(joined.MOST_RANKS + 8, WIDTH), torch.zeros(32, joined.MOST_RANKS + 8)
    assert whole_of([plain], [wide], 1.0) is None


def test_rows_with_room_are_written_to_and_others_copied() -> None:
    bases = [layer(width, 16, torch.float32, False, "").cpu() for width in (32, 48)]
    adapters = [(torch.zeros(8, WIDTH), torch.zeros(width, 8)) for width in (32, 48)]
    whole = whole_of(bases, adapters, 1.0)
    assert whole is not None
    roomy = kernels.with_room(torch.Size((5, 80)), 16, torch.zeros(1)).normal_()
    assert whole.with_room(*roomy.split([32, 48], -1)).data_ptr() == roomy.data_ptr()
    other = torch.randn(5, 48)
    row = whole.with_room(roomy[:, :32], other)  # a value's gradient, from attention itself
    assert row.data_ptr() == roomy.data_ptr() and torch.equal(row[:, 32:], other)
    for grads in (torch.randn(5, 80).split([32, 48], -1), torch.randn(5, 97)[:, :80].split([32, 48], -1)):
        row = whole.with_room(*grads)
        assert row.stride() == (96, 1) and torch.equal(row, torch.cat(grads, -1))
    row = whole.with_room(None, other)
    assert not row[:, :32].any() and torch.equal(row[:, 32:], other)
