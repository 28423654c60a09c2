"""How does a network without weights become one of fake tensors, whose every weight is allocated as on a GPU?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightweight.preload import peft  # isort: skip  # before transformers, which may import it

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor, nn

from lightweight.forecast.recorder import Recorder
from lightweight.internals import bitsandbytes as bitsandbytes_internals
from lightweight.internals import torch as torch_internals


def materialise(network: Any, dtype: torch.dtype, recorder: Recorder, *, in_one_block: bool = True) -> None:
    """Turn a network on the meta device into one of fake tensors, piece by piece, quantized as it comes. `dtype` is
    what unquantized weights are held in; `in_one_block`: whether memory for all is allocated first."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:  # tied weights stay tied
            new: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            made[id(tensor)] = new
        return made[id(tensor)]

    if in_one_block:
        recorder.reserve(_bytes_to_load(network))
    for module, key, tensor in _as_loaded(network):
        if isinstance(module, Linear4bit) and key == "weight":
            module.weight = _quantized(tensor, dtype, recorder)
            bitsandbytes_internals.keep_state(module)
        elif isinstance(module, Linear8bitLt) and key == "weight":
            module.weight, scales = bitsandbytes_internals.in_8_bits_like(tensor)
            recorder.mark(scales, "quantization state")
        else:
            setattr(module, key, fake(tensor))
    bitsandbytes_internals.never_repack(network)
    torch_internals.pin(network)  # it is where it is to be


def _as_loaded(network: Any) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Module, name and tensor of all that is allocated, in that order: a checkpoint's weights as transformers sorts
    them, then buffers, and an adapter's weights, which no checkpoint has. It decides which holes are left where some
    are replaced. transformers/core_model_loading.py, `convert_and_load_state_dict_in_model`."""
    loaded: list[tuple[list[tuple[int, int, str]], nn.Module, str, Tensor]] = []
    made: list[tuple[list[tuple[int, int, str]], nn.Module, str, Tensor]] = []
    is_adapted = isinstance(network, peft.PeftModel)
    for name, module in network.named_modules():
        own = {"recurse": False, "remove_duplicate": False}
        for key, weight in module.named_parameters(**own):
            place = f"{name}.{key}".replace(".base_layer.", ".").split(".")
            order = [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in place]
            (made if is_adapted and weight.requires_grad else loaded).append((order, module, key, weight))
        made += [([], module, key, buffer) for key, buffer in module.named_buffers(**own)]
    loaded.sort(key=lambda found: found[0])
    yield from ((module, key, tensor) for _, module, key, tensor in [*loaded, *made])


def _quantized(weight: Any, dtype: torch.dtype, recorder: Recorder) -> nn.Parameter:
    """What bitsandbytes' own quantization makes of a 4-bit layer's weight."""
    quantized, state = bitsandbytes_internals.packed_like(weight, torch.empty(weight.shape, dtype=dtype))
    for tensor in state:
        recorder.mark(tensor, "quantization state")
    return quantized


def _bytes_to_load(network: nn.Module) -> int:
    """The weights' bytes, for which transformers allocates one block before it loads them into what it has left.
    transformers/modeling_utils.py, `caching_allocator_warmup`."""
    packed = {m.weight: m for m in network.modules() if isinstance(m, Linear4bit | Linear8bitLt)}

    def bytes_of(weight: nn.Parameter) -> int:
        if (layer := packed.get(weight)) is None:
            return weight.numel() * weight.element_size()
        return weight.numel() // 2 if isinstance(layer, Linear4bit) else weight.numel()

    return sum(bytes_of(weight) for weight in network.parameters())
