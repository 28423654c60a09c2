"""What a CUDA GPU holds where a CPU would hold something else."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch._subclasses.fake_tensor import FakeTensorMode

from lightweight.forecast.cuda_rules import LOWER_PRECISION, PROMOTE, SET_DTYPE, CudaRules
from lightweight.targets import MiB

HOPPER, TURING, AMPERE = (9, 0), (7, 5), (8, 6)


class Saved:
    """The bytes that autograd keeps of what is computed inside, storages counted once."""

    def __init__(self, capability, padding="padded"):
        self.rules = CudaRules(capability, padding)
        self.storages = {}

    def __enter__(self):
        self.modes: list[Any] = [
            FakeTensorMode(),
            self.rules,
            torch.autograd.graph.saved_tensors_hooks(self._keep, lambda t: t),
        ]
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self.modes):
            mode.__exit__(*error)

    def _keep(self, tensor):
        self.storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    @property
    def total(self):
        return sum(self.storages.values())


def registered(key):
    return {
        name.removeprefix("aten::")
        for name in torch._C._dispatch_get_registrations_for_dispatch_key(key)
        if name.startswith("aten::")
    }


def test_autocast_lists_name_only_what_this_torch_registers_for_cuda():
    assert registered("AutocastCUDA") >= LOWER_PRECISION | PROMOTE | SET_DTYPE
    assert not LOWER_PRECISION & PROMOTE
    assert not (LOWER_PRECISION | PROMOTE) & SET_DTYPE


def test_dropout_keeps_a_mask_of_one_byte():
    with Saved(HOPPER) as saved:
        F.dropout(torch.empty(1024, 1024, requires_grad=True), 0.1)
    assert saved.total == MiB
    with Saved(HOPPER) as saved:
        F.dropout(torch.empty(1024, 1024, requires_grad=True), 0.1, training=False)
    assert saved.total == 0


@pytest.mark.parametrize(
    ("operation", "dtype"),
    [
        (lambda x: F.layer_norm(x, (64,)), torch.float32),
        (lambda x: torch.exp(x), torch.float32),
        (lambda x: x.pow(2), torch.float32),
        (lambda x: F.softmax(x, -1), torch.float32),
        (lambda x: x.sum(), torch.float32),
        (lambda x: F.linear(x, x), torch.float16),
        (lambda x: x @ x.t(), torch.float16),
        (lambda x: torch.stack([x, x]), torch.float16),  # a CPU would promote, CUDA leaves it as it is
        (lambda x: F.gelu(x), torch.float16),
    ],
)
def test_under_autocast_operators_compute_in_what_cuda_computes_in(operation, dtype):
    with FakeTensorMode(), CudaRules(HOPPER), torch.autocast("cpu", dtype=torch.float16):
        assert operation(torch.empty(64, 64, dtype=torch.float16)).dtype == dtype


def test_the_dispatcher_is_as_before_once_the_rules_are_left():
    with CudaRules(HOPPER):
        pass
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.exp(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    x = torch.ones(4, 4, requires_grad=True)
    F.dropout(x, 0.5).sum().backward()
    assert x.grad is not None


def test_half_softmax_to_fp32_reads_its_input_as_it_is():
    with FakeTensorMode(), CudaRules(HOPPER):
        x = torch.empty(4, 64, dtype=torch.float16, requires_grad=True)
        result = F.softmax(x, -1, dtype=torch.float32)
        assert result.dtype == torch.float32
        assert result.grad_fn is not None and result.grad_fn.name() == "SoftmaxBackward0"
        before = result.grad_fn.next_functions[0][0]
        assert before is not None and before.name().endswith("AccumulateGrad")  # and no cast between


@pytest.mark.parametrize(
    ("capability", "dtype", "masked", "kernel"),
    [
        (HOPPER, torch.float16, True, "ScaledDotProductCudnnAttention"),
        (HOPPER, torch.bfloat16, False, "ScaledDotProductCudnnAttention"),
        (HOPPER, torch.float32, True, "ScaledDotProductEfficientAttention"),
        (AMPERE, torch.float16, False, "ScaledDotProductFlashAttention"),
        (AMPERE, torch.float16, True, "ScaledDotProductEfficientAttention"),
        (TURING, torch.float16, False, "ScaledDotProductEfficientAttention"),
        (TURING, torch.bfloat16, False, "TransposeBackward"),  # no fused kernel: plain matrix products
    ],
)
def test_attention_runs_in_the_kernel_that_the_card_has(capability, dtype, masked, kernel):
    with FakeTensorMode(), CudaRules(capability):
        q = torch.empty(2, 4, 64, 32, dtype=dtype, requires_grad=True)
        mask = torch.ones(2, 1, 64, 64, dtype=torch.bool) if masked else None
        result = F.scaled_dot_product_attention(q, q, q, attn_mask=mask, is_causal=not masked)
        assert result.shape == q.shape
        assert result.grad_fn is not None
        name = result.grad_fn.name()
    if kernel == "TransposeBackward":
        assert "Attention" not in name
    else:
        assert name.startswith(kernel)


def test_fewer_key_heads_are_expanded_where_the_kernel_wants_them_all():
    with Saved(HOPPER) as saved:
        q = torch.empty(1, 8, 64, 64, requires_grad=True)
        k = torch.empty(1, 2, 64, 64, requires_grad=True)
        F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    scores = 8 * 64 * 64 * 4
    assert saved.total >= 3 * q.numel() * 4 + scores, "in fp32 it is plain products, which keep the scores"


def test_workspaces_are_those_of_the_card():
    product = torch.ops.aten.mm.default
    assert CudaRules(HOPPER).workspace_bytes(product) == {"cublas": 32 * MiB}
    assert CudaRules(TURING).workspace_bytes(product) == {"cublas": 8_519_680}
    with_bias = CudaRules(TURING).workspace_bytes(torch.ops.aten.addmm.default)
    assert with_bias == {"cublas": 8_519_680, "cublasLt": MiB}
    assert CudaRules(HOPPER).workspace_bytes(torch.ops.aten.add.Tensor) == {}


def test_flash_attention_backward_holds_gradients_in_fp32_and_those_of_shared_heads_apart():
    rules = CudaRules(HOPPER)
    operator = torch.ops.aten._flash_attention_backward.default
    rows = [torch.empty(2, 200, heads, 64, dtype=torch.float16) for heads in (8, 8, 8)]
    of_queries = 2 * 256 * 8 * (64 + 1) * 4
    assert rules.scratch_bytes(operator, [rows[0], *rows, None, None, None]) == of_queries
    joined = [torch.empty(400, heads, 64, dtype=torch.float16) for heads in (8, 2, 2)]
    ends = torch.empty(6, dtype=torch.int32)
    of_queries, of_each_head = (400 + 5 * 128) * 8 * (64 + 1) * 4, 2 * 400 * 8 * 64 * 2
    assert rules.scratch_bytes(operator, [joined[0], *joined, None, None, ends]) == of_queries + of_each_head
    assert rules.scratch_bytes(torch.ops.aten.relu.default, rows) == 0


def test_the_gradient_of_a_softmax_is_multiplied_by_its_shares_first():
    """Measured on an H100 (torch 2.11): gpt-oss's attention, which is eager, holds 4 of its [heads, time, time]."""
    grad, shares = torch.empty(2, 8, dtype=torch.float32), torch.empty(2, 8, dtype=torch.float16)
    operator = torch.ops.aten._softmax_backward_data.default
    assert CudaRules(HOPPER).scratch_bytes(operator, [shares, shares, 1, torch.float16]) == 2 * 8 * 2
    assert CudaRules(HOPPER).scratch_bytes(operator, [grad, grad, 1, torch.float16]) == 2 * 8 * 4
    assert CudaRules(HOPPER).scratch_bytes(torch.ops.aten._log_softmax_backward_data.default, [grad, grad]) == 0
