"""What is private or patched in bitsandbytes: read in 0.49 and 0.50.

Imported where it is asked for: `lightweight.preload` keeps its import off the GPU, and has done so before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from lightweight.internals import torch as torch_internals

PAGED_ELEMENTS = 100_000
"""From so many elements on, paged optimizers keep a parameter's state in managed memory.
bitsandbytes/optim/optimizer.py, `get_state_buffer`."""

PACKING = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
"""What a 4-bit weight carries of how it was packed. bitsandbytes/nn/modules.py, `Params4bit`."""

LAYERS = ("Linear4bit", "Linear8bitLt")
"""Its layers with packed weights, by name: to compare types would import the package where nothing is quantized."""

STATES = ("quant_state", "SCB")
"""What a packed weight of either kind carries beside its bits."""


@contextmanager
def as_on_a_gpu(
    page: Callable[[tuple[int, ...], torch.dtype], Tensor], on_the_host: Callable[[], AbstractContextManager[Any]]
) -> Iterator[None]:
    """Inside, optimizers and quantizers do with fake tensors what they do on a GPU. `page` makes a tensor in managed
    memory, and what is made within `on_the_host()` is on the host. What they keep for a whole process is empty inside
    and as before afterwards. bitsandbytes/functional.py and bitsandbytes/optim/optimizer.py."""
    from bitsandbytes import functional
    from bitsandbytes.autograd import _functions as products
    from bitsandbytes.optim.optimizer import GlobalOptimManager, Optimizer8bit

    def paged_as_on_a_gpu(optimizer: Any, parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        if optimizer.is_paged and parameter.numel() >= PAGED_ELEMENTS:
            return page(tuple(parameter.shape), dtype)
        return torch.zeros_like(parameter, dtype=dtype)

    def in_managed_memory(*shape: int, dtype: torch.dtype = torch.float32, **_: Any) -> Tensor:
        return page(shape, dtype)  # which AdEMAMix asks for itself, for the two moments in one tensor

    def numbers_of_8_bits(*_: Any, **__: Any) -> Tensor:  # which bitsandbytes computes one by one, by their values
        with on_the_host():  # until they are in use
            return torch.empty(256)

    with (
        mock.patch.object(Optimizer8bit, "get_state_buffer", paged_as_on_a_gpu),
        mock.patch.object(functional, "get_paged", in_managed_memory),
        mock.patch.object(functional, "fill", return_value=None),
        mock.patch.object(functional, "create_dynamic_map", numbers_of_8_bits),
        mock.patch.dict(functional.name2qmap, clear=True),
        mock.patch.object(GlobalOptimManager, "_instance", None),
        mock.patch.object(products, "MatMul8bitFp", products.MatMul8bitLt),  # the one is the CPU's, the other a GPU's
        mock.patch.object(products.logger, "warning"),  # of each product whose input is not in fp16
        _products_of_8_bits(),
    ):
        yield


@contextmanager
def _products_of_8_bits() -> Iterator[None]:
    """Inside, LLM.int8()'s operators are seen as what a GPU's kernels allocate, no number being an outlier: what theirs
    for fake tensors say is neither. bitsandbytes/backends/cuda/ops.py and bitsandbytes/backends/default/ops.py."""

    def rows_of_8_bits(x: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
        scales, rows = torch.empty(x.numel() // x.shape[-1]), torch.empty(x.shape, dtype=torch.int8)
        if threshold == 0.0:
            return rows, scales, None
        (x.abs() >= threshold).any()
        return rows, scales, torch.empty(0, dtype=torch.int64)

    def product(
        rows: Tensor,
        weight: Tensor,
        _of_rows: Tensor,
        _of_weight: Tensor,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        numbers = torch.ops.bitsandbytes.int8_linear_matmul.default(rows, weight)
        dequantized = torch.empty_like(numbers, dtype=torch.float16)
        if bias is not None and bias.dtype != torch.float16:
            dequantized.add_(bias)
        return dequantized.to(dtype or torch.float16)

    def product_beside_outliers(
        x: Tensor,
        rows: Tensor,
        weight: Tensor,
        _of_rows: Tensor,
        _of_weight: Tensor,
        _outliers: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return product(rows, weight, _of_rows, _of_weight, bias, x.dtype), torch.empty(0, dtype=x.dtype)

    library = torch.library.Library("bitsandbytes", "IMPL")
    library.impl("int8_vectorwise_quant", rows_of_8_bits, "AutogradCPU")
    library.impl("int8_scaled_mm", product, "AutogradCPU")
    library.impl("int8_mixed_scaled_mm", product_beside_outliers, "AutogradCPU")
    try:
        yield
    finally:
        torch_internals.unregister(library)


def packed_like(weight: Any, whole: Tensor) -> tuple[nn.Parameter, list[Tensor]]:
    """What quantization makes of `whole` in the place of `weight`, a 4-bit layer's on the meta device, and the tensors
    of its state. `Params4bit` cannot hold a fake tensor, so a plain parameter carries what layers and peft read.
    bitsandbytes/nn/modules.py."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(whole, **{name: getattr(weight, name) for name in PACKING})
    quantized: Any = nn.Parameter(packed, requires_grad=False)
    for name in PACKING:
        setattr(quantized, name, getattr(weight, name))
    quantized.bnb_quantized, quantized.quant_state = True, state
    parts = (vars(state), vars(state.state2) if state.nested else {}, functional.name2qmap)
    return quantized, [tensor for part in parts for tensor in part.values() if isinstance(tensor, Tensor)]


def in_8_bits_like(weight: Any) -> tuple[nn.Parameter, Tensor]:
    """What lies on a GPU in the place of `weight`, an 8-bit layer's on the meta device, and its scales, one for each
    row. `Int8Params` cannot hold a fake tensor. Ibid., `Int8Params`."""
    packed: Any = nn.Parameter(torch.empty(weight.shape, dtype=torch.int8), requires_grad=False)
    packed.CB, packed.SCB, packed.has_fp16_weights = packed.data, torch.empty(weight.shape[0]), False
    return packed, packed.SCB


def keep_state(layer: Any) -> None:
    """Have a 4-bit layer give its weight's state back before every forward pass: sharding loses it, and the layer would
    make a `Params4bit` of its weight to say it again. Ibid., `Linear4bit.forward`."""
    layer.quant_state = layer.weight.quant_state
    layer.register_forward_pre_hook(lambda layer, _: setattr(layer.weight, "quant_state", layer.quant_state))


def never_repack(network: Any) -> None:
    """Leave 4-bit weights as they are packed where the CPU has AVX512-BF16: they are packed otherwise at the first
    evaluation, and can no longer be trained. Ibid., `Linear4bit.forward`."""
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def dequantized_to_fp32(network: nn.Module) -> Iterator[set[nn.Parameter]]:
    """Inside, 4-bit layers dequantize their weights to fp32 and compute in it, whatever was asked for when they were
    made. Gives those weights. Ibid., `Linear4bit.compute_dtype`, and bitsandbytes/functional.py, `QuantState.dtype`."""
    from bitsandbytes.nn.modules import Linear4bit

    layers: list[Any] = [module for module in network.modules() if isinstance(module, Linear4bit)]
    with ExitStack() as undo:
        for layer in layers:
            undo.enter_context(mock.patch.object(layer, "compute_dtype", torch.float32))
            undo.enter_context(mock.patch.object(layer.weight.quant_state, "dtype", torch.float32))
        yield {layer.weight for layer in layers}


def layers_without_scales(network: torch.nn.Module) -> Iterator[str]:
    """Names of the layers that are of a packed kind and whose weight is not packed."""
    for name, module in network.named_modules():
        if type(module).__name__ in LAYERS and all(getattr(module.weight, state, None) is None for state in STATES):
            yield name


def count_elements(parameter: torch.nn.Parameter) -> int:
    """The numbers that a parameter stands for, of which a 4-bit weight packs two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())
