"""What is private to bitsandbytes: how its layers keep their weights. Read in bitsandbytes 0.50.2.

It says of no layer whether its weight has been quantized, or how many numbers that packs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

LAYERS = ("Linear4bit", "Linear8bitLt")
"""Its layers with packed weights, by name: to compare types would import the package where nothing is quantized."""

STATES = ("quant_state", "SCB")
"""What a packed weight of either kind carries beside its bits."""


def layers_without_scales(network: torch.nn.Module) -> Iterator[str]:
    """Names of the layers that are of a packed kind and whose weight is not packed."""
    for name, module in network.named_modules():
        if type(module).__name__ in LAYERS and all(getattr(module.weight, state, None) is None for state in STATES):
            yield name


def count_elements(parameter: torch.nn.Parameter) -> int:
    """The numbers that a parameter stands for, of which a 4-bit weight packs two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def never_repack(network: torch.nn.Module) -> None:
    """Where the CPU has AVX512-BF16, 4-bit weights are repacked at the first evaluation, and what was repacked can no
    longer be trained (Linear4bit.forward); have that not happen."""
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
