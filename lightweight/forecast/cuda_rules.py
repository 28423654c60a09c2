"""Which operators allocate differently on a CUDA GPU than on a CPU? The rules by which a trace on a CPU gets a GPU's
memory.

A forecast traces a training step of fake tensors that say they are on the CPU, since torch without CUDA cannot have
fake ones on `cuda`. Inside `CudaRules` the dispatcher takes the way of CUDA for them, where CUDA itself would take it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lightweight.internals import torch as torch_internals
from lightweight.internals.transformers import causal_masks_ignored_by
from lightweight.targets import Capability, MiB

aten = torch.ops.aten

BatchKind = Literal["padded", "full"]
"""Whether a batch holds a row shorter than the others: only then do models build an attention mask, and the mask
decides which attention kernel runs."""

# Autocast's lists for CUDA: AT_FORALL_LOWER_PRECISION_FP, AT_FORALL_PROMOTE and AT_FORALL_FP32_SET_OPT_DTYPE in torch's
# aten/src/ATen/autocast_mode.h. What CUDA registers and none of them names is computed in fp32 (AT_FORALL_FP32).
LOWER_PRECISION = frozenset(
    """
    _convolution _convolution.deprecated _scaled_dot_product_flash_attention _thnn_fused_gru_cell
    _thnn_fused_lstm_cell addbmm addmm addmv addr baddbmm bmm chain_matmul conv1d conv2d conv3d conv_tbc
    conv_transpose1d conv_transpose2d.input conv_transpose3d.input convolution cudnn_convolution
    cudnn_convolution_transpose einsum gru_cell linalg_multi_dot linalg_vecdot linear lstm_cell matmul mm mv prelu
    rnn_relu_cell rnn_tanh_cell scaled_dot_product_attention
    """.split()  # noqa: SIM905
)
PROMOTE = frozenset(
    """
    addcdiv addcmul atan2 bilinear cross dot grid_sampler index_put scatter_add tensordot vdot
    """.split()  # noqa: SIM905
)
SET_DTYPE = frozenset(
    """
    cumprod cumsum linalg_matrix_norm linalg_matrix_norm.str_ord linalg_vector_norm log_softmax.int prod
    prod.dim_int softmax.int sum sum.dim_IntList
    """.split()  # noqa: SIM905
)

CUBLAS_WORKSPACE_BYTES = 2 * 4096 * 1024 + 8 * 16 * 1024  # aten/src/ATen/cuda/CublasHandlePool.cpp, `:4096:2:16:8`
CUBLAS_WORKSPACE_BYTES_HOPPER = 8 * 4096 * 1024  # ibid., where the compute capability is 9.x
CUBLASLT_WORKSPACE_BYTES = MiB  # ibid., getCUDABlasLtWorkspaceSize: for products with a bias added


class CudaRules:
    """A context in which operators on CPU tensors hold what they would hold on a GPU of this compute capability.

    `padding` says what the batches are like, which fake tensors cannot; `cudnn` whether its attention may be chosen.
    """

    def __init__(self, capability: Capability, padding: BatchKind = "padded", *, cudnn: bool = True) -> None:
        self.capability = capability
        self.padding = padding
        self._cudnn = cudnn

    def __enter__(self) -> Self:
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"[\s\S]*overrid", category=UserWarning)  # it is meant
            _set_autocast(library)
            for name, kernel in {
                "dropout": _dropout,
                "softmax.int": _softmax,
                "log_softmax.int": _log_softmax,
                "scaled_dot_product_attention": self._attention,
            }.items():
                library.impl(name, kernel, "AutogradCPU")
        self._stack = ExitStack()
        self._stack.callback(torch_internals.unregister, library)
        self._stack.enter_context(causal_masks_ignored_by(self._ignore_mask))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def workspace_bytes(self, operator: Any) -> dict[str, int]:
        """What the libraries behind a matrix product keep for themselves from the first one on, by library."""
        if operator.name() not in _PRODUCTS:
            return {}
        hopper = self.capability[0] == 9
        workspaces = {"cublas": CUBLAS_WORKSPACE_BYTES_HOPPER if hopper else CUBLAS_WORKSPACE_BYTES}
        if operator is aten.addmm.default:
            workspaces["cublasLt"] = CUBLASLT_WORKSPACE_BYTES
        return workspaces

    def scratch_bytes(self, operator: Any, arguments: Sequence[Any]) -> int:
        """What a kernel allocates for itself and releases before it returns."""
        if operator.name() == "bitsandbytes::gemm_4bit":
            # The whole weight dequantized, where there are enough tokens to make that the faster way.
            # bitsandbytes/backends/cuda/ops.py, _gemm_4bit_use_custom_cuda
            return int(math.prod(arguments[2])) * int(arguments[0].element_size())
        if operator is torch_internals.FLASH_BACKWARD:
            return _flash_scratch_bytes(arguments[1], arguments[2], arguments[6])
        if operator is torch_internals.SOFTMAX_BACKWARD:
            # The gradient times the shares. aten/src/ATen/native/cuda/SoftMax.cu, softmax_backward_cuda_out
            grad, shares = arguments[:2]
            return int(grad.numel()) * torch.promote_types(grad.dtype, shares.dtype).itemsize
        return 0

    def _ignore_mask(
        self, own: Callable[..., bool], padding_mask: Tensor | None, *arguments: Any, **options: Any
    ) -> bool:
        """Whether causality alone says what a mask would. transformers reads the mask for that."""
        if self.padding == "full":
            padding_mask = None
        return bool(own(padding_mask, *arguments, **options))

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The kernel CUDA chooses. aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, _fused_sdp_choice_cuda and
        check_prefer_cudnn_attention (torch 2.11)."""
        rows, heads, length, width = query.shape
        half = query.dtype in (torch.float16, torch.bfloat16)
        fits = width % 8 == 0 and width <= 256 and query.size(-1) == value.size(-1)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            zero = torch.zeros((), dtype=query.dtype)
            attn_mask = torch.where(attn_mask.logical_not(), torch.full_like(zero, float("-inf")), zero)
        needs_grad = any(tensor.requires_grad for tensor in (query, key, value))
        if attn_mask is not None:
            attn_mask = attn_mask.expand(rows, heads, length, key.size(-2))
        if self._cudnn and half and fits and self.capability in ((9, 0), (10, 0)) and width <= 128:
            if enable_gqa:  # the kernel reads one key head for several query heads; its fake twin wants them all
                key, value = (_expand_heads(tensor, heads) for tensor in (key, value))
            return torch_internals.cudnn_attention(  # type: ignore[no-any-return]
                query, key, value, attn_mask, needs_grad, dropout_p, is_causal, scale=scale
            )[0]
        if half and fits and self.capability >= (8, 0) and attn_mask is None:
            if enable_gqa:
                key, value = (_expand_heads(tensor, heads) for tensor in (key, value))
            return torch_internals.flash_attention(  # type: ignore[no-any-return]
                query, key, value, dropout_p, is_causal, scale=scale
            )[0]
        if fits and not enable_gqa and (query.dtype != torch.bfloat16 or self.capability >= (8, 0)):
            if attn_mask is not None and (short := -key.size(-2) % 8):  # the kernel wants rows of 16 bytes
                attn_mask = F.pad(attn_mask, (0, short))[..., : key.size(-2)]
            return torch_internals.efficient_attention(  # type: ignore[no-any-return]
                query, key, value, attn_mask, needs_grad, dropout_p, is_causal, scale=scale
            )[0]
        return torch_internals.math_attention(  # type: ignore[no-any-return]
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]


def _flash_scratch_bytes(query: Tensor, key: Tensor, ends: Tensor | None) -> int:
    """The gradient of the queries in fp32, and where heads share keys, the keys' and values' for each head.
    aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_bwd and mha_varlen_bwd."""
    heads, width = query.shape[-2:]
    tokens = query.numel() // (heads * width)
    # tiles of 128 tokens; where sequences lie one behind the other, each may begin another one
    rounded = (
        tokens + 128 * (ends.numel() - 1) if ends is not None else query.shape[0] * (-(-query.shape[1] // 128) * 128)
    )
    of_queries = rounded * heads * (-(-width // 32) * 32 + 1) * 4  # and a number for each token and head
    return of_queries + (0 if key.shape[-2] == heads else 2 * tokens * heads * width * key.element_size())


_PRODUCTS = frozenset(["aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "bitsandbytes::gemm_4bit"])


def _expand_heads(tensor: Tensor, heads: int) -> Tensor:
    """[batch, key heads, time, width] as a view of [batch, heads, time, width] that takes no memory."""
    rows, _, length, width = tensor.shape
    return tensor[:, :1].expand(rows, heads, length, width)


def _set_autocast(library: torch.library.Library) -> None:
    cuda, cpu = torch_internals.registered("AutocastCUDA"), torch_internals.registered("AutocastCPU")
    for name in cpu - cuda:
        library.impl(name, torch.library.fallthrough_kernel, "AutocastCPU")
    # Both register LOWER_PRECISION; natively, types promote by themselves.
    for name in cuda - LOWER_PRECISION - PROMOTE:
        library.impl(name, _in_float32(_operator(name), set_dtype=name in SET_DTYPE), "AutocastCPU")


def _operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _in_float32(operator: Any, set_dtype: bool) -> Any:
    """`operator` on arguments cast to fp32, or with the result type fp32 where the caller asks for no other."""

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
            return value.to(torch.float32)
        return [cast(item) for item in value] if isinstance(value, list | tuple) else value

    names = [argument.name for argument in torch_internals.schema(operator).arguments]

    def kernel(*arguments: Any, **options: Any) -> Any:
        with torch_internals.without_autocast_of_cpu():
            if not set_dtype:
                return operator(*map(cast, arguments), **{name: cast(value) for name, value in options.items()})
            given = dict(zip(names, arguments, strict=False)) | options
            if given.get("dtype") is None and arguments[0].is_floating_point():
                options["dtype"] = torch.float32
                arguments = arguments[: names.index("dtype")]
            return operator(*arguments, **options)

    return kernel


GROUPED_ALIGNMENT_BYTES = 16
"""What a row of a grouped product is padded to. aten/src/ATen/native/GroupedMMUtils.h,
create_grouped_gemm_output_tensor."""


GROUPED_PRODUCT = "aten::_grouped_mm"


def grouped_product(
    a: Tensor, b: Tensor, offs: Tensor | None = None, _bias: Any = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """The experts' product: [rows, in] x [experts, in, out], and what is derived from it. CUDA computes it in every
    format, one expert after the other where it has no kernel for all, and torch's own rule of its shape knows bf16
    alone. Whatever is routed to whom, it is as large. On the meta device."""
    experts = 0 if offs is None else offs.size(0)
    sizes = {
        (2, 3): [a.size(0), b.size(-1)],
        (3, 2): [a.size(-2), b.size(1)],
        (2, 2): [experts, a.size(0), b.size(1)],
        (3, 3): [a.size(0), a.size(-2), b.size(-1)],
    }[a.dim(), b.dim()]
    dtype = out_dtype or a.dtype
    unit = GROUPED_ALIGNMENT_BYTES // dtype.itemsize
    width = -(-sizes[-1] // unit) * unit
    strides = [sizes[1] * width, width, 1][-len(sizes) :]
    return torch.empty_strided(sizes, strides, dtype=dtype, device="meta")


def _dropout(input: Tensor, p: float, train: bool) -> Tensor:
    """CUDA keeps a mask of one byte an element, the CPU its noise in the input's type.
    aten/src/ATen/native/Dropout.cpp, is_fused_kernel_acceptable."""
    if p == 0 or not train or input.numel() == 0:
        return input
    return torch.native_dropout(input, p, True)[0] if p < 1 else input * 0


def _softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return _softmax_like(torch_internals.softmax, input, dim, dtype)


def _log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return _softmax_like(torch_internals.log_softmax, input, dim, dtype)


def _softmax_like(operator: Any, input: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    """CUDA reads fp16 and writes fp32 in one kernel, the CPU casts first. aten/src/ATen/native/SoftMax.cpp."""
    if input.dtype == torch.float16 and dtype == torch.float32:
        return operator(input, dim, True)  # type: ignore[no-any-return]
    return operator(input if dtype is None else input.to(dtype), dim, False)  # type: ignore[no-any-return]
