"""From files to a network: all of its tensors on the device, or only their shapes."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightweight.models.config import CAUSAL, configuration_beside_weights
from lightweight.models.model import Model, ModelError, reason, refused
from lightweight.models.quantized_checkpoint import is_undone, quantization_of, stored_quantization

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.utils.quantization_config import QuantizationConfigMixin

BUFFERS = re.compile(
    r"(^|\.)(attn|attention)\.(masked_)?bias$|masked_bias$|causal_mask$|inv_freq$|position_ids$|decoder\.version$"
)
"""Tensors that old checkpoints (those of GPT-2, GPT-Neo, OPT and others) hold beside their weights: constants, which
transformers computes now."""

IN_ORDER = {"HF_DEACTIVATE_ASYNC_LOAD": "1"}
"""Has transformers put one weight after the other on the device. Its threads put them where they come, so that what a
job that moves them reserves differs from run to run. A captured llama-3.2-1b was set up in 2.4 s with them, and in
2.7 s without (H100, three processes at once)."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""What safetensors calls the types of weights that are the numbers they mean."""


def skeleton(
    config: PretrainedConfig, dtype: torch.dtype, quantization: QuantizationConfigMixin | None
) -> PreTrainedModel:
    """The network that `load` would return, on the meta device: shapes without weights. `quantization` is what
    `methods.settle_quantization` returned, and must have passed `check_forecastable`."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from lightweight.internals.transformers import quantize_shapes

    described = Model(name=config.name_or_path or config.model_type)
    if is_undone(quantization):
        quantization = None
    assert quantization is None or isinstance(quantization, BitsAndBytesConfig), "see check_forecastable"
    with refused(described, "no network can be built of its config.json", CAUSAL), torch.device("meta"):
        network: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        if quantization is not None:
            quantize_shapes(network, quantization)
    return network


def load(
    model: Model,
    dtype: torch.dtype,
    device: torch.device,
    quantization: QuantizationConfigMixin | None,
    *,
    in_order: bool = False,
) -> PreTrainedModel:
    """The network on `device`, with unquantized weights in `dtype`. Loads only safetensors, and runs no code from the
    repository.

    `quantization` is what `methods.settle_quantization` returned; None leaves a checkpoint as it is. With `in_order`,
    weights are placed in the device's memory in the order of their names. Raises ModelError, also if a tensor of the
    network did not come from the files, or if the files have others.
    """
    from unittest import mock  # it imports asyncio, and this module is one of every command's

    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from lightweight.internals.bitsandbytes import layers_without_scales

    assert model.location is not None
    config = configuration_beside_weights(model)
    asked = {} if quantization is None else {"quantization_config": quantization}
    stored = stored_quantization(model, config)
    if stored is None:
        _check_stored(model, config)
    elif isinstance(quantization, BitsAndBytesConfig):
        config.quantization_config, asked = quantization.to_dict(), {}
    with refused(model, f"the weights in {model.location} cannot be loaded", "give a whole folder of safetensors"):
        network: Any
        tensors: dict[str, Any]
        with mock.patch.dict(os.environ, IN_ORDER if in_order else {}):
            network, tensors = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]  # with the loading info
                model.location,
                config=config,
                dtype=dtype,
                device_map={"": device},
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # told below, in one line
                output_loading_info=True,
                **asked,
            )
    check_whole(model, tensors)
    if stored is not None and quantization_of(network) is None:  # dequantized, by which tensors keep their files' dtype
        network.to(dtype)
    if (layer := next(layers_without_scales(network), None)) is not None:
        raise ModelError(
            f"model {model.name}: config.json says that {layer} is quantized, and its tensor is not: "
            "give weights and config.json of one model"
        )
    return network  # type: ignore[no-any-return]


def _check_stored(model: Model, config: PretrainedConfig) -> None:
    """Raise ModelError where the files in a folder, which are not quantized, hold fewer numbers than the network has
    parameters: transformers would draw the others, in memory that there may not be; or a parameter of another type."""
    import torch
    from safetensors import safe_open

    files = sorted(Path(model.location or "").glob("*.safetensors"))
    if not files:
        return
    stored, not_floats = 0, {}
    with refused(model, f"the weights in {model.location} cannot be read", "give a whole folder of safetensors"):
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    tensor = opened.get_slice(name)
                    stored += math.prod(tensor.get_shape())
                    if tensor.get_dtype() not in FLOATS:
                        not_floats[name] = tensor.get_dtype()
    network = skeleton(config, torch.float32, None)
    for name, _ in network.named_parameters() if not_floats else ():
        kind = not_floats.get(name) or not_floats.get(name.removeprefix(f"{network.base_model_prefix}."))
        if kind is not None:  # transformers would cast it
            raise ModelError(
                f"model {model.name}: {name} is stored as {kind}, and config.json names no quantization that would say "
                "what it means: give weights and config.json of one model"
            )
    if (wanted := count_parameters(network)) > stored:
        raise ModelError(
            f"model {model.name}: config.json describes {wanted:,} parameters and the files in {model.location} hold "
            f"{stored:,}: give a folder whose weights are whole"
        )


def check_whole(model: Model, tensors: dict[str, Any]) -> None:
    """Raise ModelError if a tensor of the network did not come from the files, or if one of theirs has no place in it.
    `tensors` is transformers' loading info, in which tied weights and ignored keys are already resolved."""
    unexpected = {name for name in tensors["unexpected_keys"] if not BUFFERS.search(name)}
    mismatched = {name for name, *_ in tensors["mismatched_keys"]}
    problems = {
        "missing": set(tensors["missing_keys"]),
        "of another shape": mismatched,
        "no part of the network": unexpected,
    }
    differences = [f"{len(names)} {what} ({min(names)})" for what, names in problems.items() if names]
    if differences or tensors.get("error_msgs"):
        text = ", ".join(differences) or reason(ValueError(tensors["error_msgs"][0]))
        raise ModelError(
            f"model {model.name}: the tensors of its files are not those that config.json describes: {text}: "
            "give weights and config.json of one model"
        )


def count_parameters(network: torch.nn.Module, *, trainable: bool = False) -> int:
    """All parameters, or only the trainable ones. A 4-bit weight counts as the elements it packs."""
    from lightweight.internals.bitsandbytes import count_elements

    counted = (parameter for parameter in network.parameters() if parameter.requires_grad or not trainable)
    return sum(map(count_elements, counted))
