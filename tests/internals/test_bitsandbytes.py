from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from bitsandbytes import functional, nn
from bitsandbytes.autograd import _functions as products
from bitsandbytes.nn import Linear4bit
from bitsandbytes.optim import PagedAdamW8bit
from bitsandbytes.optim.optimizer import GlobalOptimManager

from lightweight.internals import bitsandbytes as bitsandbytes_internals
from lightweight.internals.torch import FakeTensorMode


def test_paged_state_is_asked_for_from_the_size_on_that_is_said_and_nothing_is_left_behind():
    """As `get_state_buffer` itself has it, whose GPU pages cannot be had here."""
    paged, on_the_host = [], []

    @contextmanager
    def host():
        on_the_host.append(1)
        yield

    def page(shape, dtype):
        paged.append((shape, dtype))
        return torch.zeros(shape, dtype=dtype)

    before = GlobalOptimManager._instance, dict(functional.name2qmap)
    with FakeTensorMode(), bitsandbytes_internals.as_on_a_gpu(page, host):
        for elements in (bitsandbytes_internals.PAGED_ELEMENTS - 1, bitsandbytes_internals.PAGED_ELEMENTS):
            weight = torch.nn.Parameter(torch.zeros(elements))
            optimizer = PagedAdamW8bit([weight])
            weight.grad = torch.zeros_like(weight)
            optimizer.init_state(optimizer.param_groups[0], weight, 0, 0)
        assert functional.get_paged(2, 3).shape == (2, 3)
    assert [shape for shape, _ in paged] == [(bitsandbytes_internals.PAGED_ELEMENTS,)] * 2 + [(2, 3)]
    assert paged[0][1] == torch.uint8 and on_the_host
    assert (GlobalOptimManager._instance, dict(functional.name2qmap)) == before


def layer(double=False):
    made = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, compress_statistics=double)
    return made.to("cpu")


def test_a_plain_parameter_carries_what_a_packed_weight_does():
    theirs = layer(double=True)
    packed, state = bitsandbytes_internals.packed_like(theirs.weight, torch.ones(64, 64))
    assert type(packed) is torch.nn.Parameter and packed.shape == theirs.weight.shape and packed.bnb_quantized  # type: ignore[attr-defined]
    assert any(tensor is packed.quant_state.absmax for tensor in state)  # type: ignore[attr-defined]
    assert any(tensor is packed.quant_state.state2.absmax for tensor in state)  # type: ignore[attr-defined]
    theirs.weight = packed
    x = torch.linspace(-1, 1, 64).unsqueeze(0)
    assert torch.allclose(theirs(x), x.sum().expand(1, 64), atol=1e-4)


def test_a_layer_gives_its_weight_the_state_back_that_sharding_loses():
    theirs = layer()
    theirs.weight = bitsandbytes_internals.packed_like(theirs.weight, torch.ones(64, 64))[0]
    bitsandbytes_internals.keep_state(theirs)
    theirs.weight = torch.nn.Parameter(theirs.weight.data, requires_grad=False)
    x = torch.linspace(-1, 1, 64).unsqueeze(0)
    assert torch.allclose(theirs(x), x.sum().expand(1, 64), atol=1e-4)


def test_layers_have_the_switch_that_would_repack_them():
    theirs = layer()
    theirs.support_avx512bf16_for_cpu = True
    bitsandbytes_internals.never_repack(torch.nn.Sequential(theirs))
    assert theirs.support_avx512bf16_for_cpu is False
    assert hasattr(Linear4bit(2, 2), "support_avx512bf16_for_cpu")


def test_a_4_bit_layer_computes_in_fp32_for_a_while_and_dequantizes_to_it():
    theirs = Linear4bit(64, 64, bias=False, compute_dtype=torch.float16).to("cpu")
    theirs.weight.quant_state.dtype = torch.float16  # type: ignore[attr-defined]
    with bitsandbytes_internals.dequantized_to_fp32(torch.nn.Sequential(theirs)) as packed:
        assert packed == {theirs.weight} and theirs.compute_dtype == torch.float32
        whole = functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)  # type: ignore[attr-defined]
        assert whole.dtype == torch.float32
        x = torch.linspace(-1, 1, 64).unsqueeze(0)
        assert torch.allclose(theirs(x), x @ whole.T, atol=1e-5)
    assert (theirs.compute_dtype, theirs.weight.quant_state.dtype) == (torch.float16, torch.float16)  # type: ignore[attr-defined]


LAYERS = {
    "Linear4bit": lambda: nn.Linear4bit(64, 32, bias=False, quant_type="nf4"),
    "Linear8bitLt": lambda: nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False),
}


def test_its_packed_layers_have_these_names():
    assert set(bitsandbytes_internals.LAYERS) == LAYERS.keys()
    assert all(hasattr(nn, name) for name in bitsandbytes_internals.LAYERS)
    assert all(hasattr(layer().weight, name) for name in bitsandbytes_internals.PACKING)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_whose_weight_has_not_been_packed_is_told_from_one_whose_weight_has(kind):
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), LAYERS[kind]())
    assert list(bitsandbytes_internals.layers_without_scales(network)) == ["1"]
    network[1].to("cpu")  # packs it
    assert list(bitsandbytes_internals.layers_without_scales(network)) == []
    states = [getattr(network[1].weight, name, None) for name in bitsandbytes_internals.STATES]
    assert len([state for state in states if state is not None]) == 1
    assert bitsandbytes_internals.count_elements(network[1].weight) == 64 * 32  # type: ignore[arg-type]
    assert bitsandbytes_internals.count_elements(network[0].weight) == 16  # type: ignore[arg-type]


def nothing_is_paged(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    raise AssertionError(f"{shape} of {dtype}")


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fake_product_of_8_bits_leaves_behind_what_a_gpus_does(threshold, dtype):
    """What the class that a GPU computes by has done here, whose operators a CPU has as well."""

    def kept(layer):
        x = torch.zeros(2, 5, 64, dtype=dtype, requires_grad=True)
        y = layer(x + 0)
        function = y.grad_fn.next_functions[0][0]  # below the view of rows as a batch
        function = y.grad_fn if hasattr(y.grad_fn, "tensors") else function
        y.sum().backward()
        held = (y, x.grad, *function.tensors, *function.tensor_states, layer.weight, layer.state.CB, layer.state.SCB)
        return [None if each is None else (tuple(each.shape), each.dtype, each.requires_grad) for each in held]

    def made():
        return nn.Linear8bitLt(64, 32, has_fp16_weights=False, threshold=threshold)

    theirs = made().to("cpu")
    with mock.patch.object(products, "MatMul8bitFp", products.MatMul8bitLt):
        expected = kept(theirs)
    fake = made()
    with (
        FakeTensorMode(),
        bitsandbytes_internals.as_on_a_gpu(nothing_is_paged, nullcontext),
    ):
        fake.bias = torch.nn.Parameter(torch.zeros(32), requires_grad=False)
        fake.weight, scales = bitsandbytes_internals.in_8_bits_like(torch.empty(32, 64, device="meta"))
        assert fake.weight.SCB is scales
        found = kept(fake)
    assert found == expected
    assert any(each is not None and each[:2] == ((10, 64), dtype) for each in found)  # the input, for no gradient


def test_products_of_8_bits_are_bitsandbytes_own_afterwards():
    theirs = nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False, threshold=6.0).to("cpu")
    x = torch.linspace(-10, 10, 64).unsqueeze(0)
    before = theirs.eval()(x)
    with (
        FakeTensorMode(),
        bitsandbytes_internals.as_on_a_gpu(nothing_is_paged, nullcontext),
    ):
        assert products.MatMul8bitFp is products.MatMul8bitLt
    assert products.MatMul8bitFp is not products.MatMul8bitLt
    assert torch.equal(theirs(x), before)
