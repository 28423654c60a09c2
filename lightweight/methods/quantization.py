"""In which quantization does a method train a model? In that of the checkpoint, else in its own.

To add a quantization: a `Method` in `known` with its config, what its packed weights hold in `forecast/skeleton`, and
checkpoints that are stored in it in `models/quantized_checkpoint`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import BitsAndBytesConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from lightweight.methods.method import Method, MethodError
from lightweight.models.model import Model
from lightweight.models.quantized_checkpoint import (
    check_trainable,
    is_undone,
    loaded_on,
    stored_quantization,
    title,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lightweight.targets import Capability

IN_INTEGERS = "in integers, which FSDP cannot share among ranks: train on one, or by the captured step"


def settle_quantization(
    model: Model,
    config: PretrainedConfig,
    method: Method,
    *,
    sharded: bool = False,
    capability: Capability | None = None,
) -> QuantizationConfigMixin | None:
    """The quantization that `method` trains `model` in: that of the checkpoint, else the method's own, else None.

    A quantized checkpoint stays as it is. If the method names the same quantization, its settings for loading
    (`dequantize`, or the format that 4-bit weights are computed with) are used; else 4-bit weights are computed with in
    the method's precision. `sharded` says that ranks share the weights by FSDP, which only shards floating-point
    tensors. `capability` is that of another card than the one here, for a forecast. Raises ModelError if no method can
    train the checkpoint, and MethodError if this one cannot.
    """
    stored, asked = stored_quantization(model, config), method.quantization
    if capability is not None:
        stored, asked = (loaded_on(each, capability) for each in (stored, asked))
    if stored is None:
        if sharded and isinstance(asked, BitsAndBytesConfig) and asked.load_in_8bit:
            raise MethodError(f"method {method.name}: it quantizes to {title(asked)}, {IN_INTEGERS}")
        return asked
    is_same = asked is not None and _is_same_quantization(stored, asked)
    if is_same and is_undone(asked):
        return asked  # to a network like any other
    check_trainable(model, stored)
    what = f"method {method.name}: model {model.name} is quantized by {title(stored)} already"
    if asked is not None and not is_same:
        raise MethodError(f"{what}, which {title(asked)} cannot be put on: take a method that does not quantize")
    if method.adapter is None:
        raise MethodError(f"{what}: its weights cannot be trained directly: take a method with an adapter")
    if sharded and not getattr(getattr(stored, "bnb_4bit_quant_storage", None), "is_floating_point", False):
        raise MethodError(f"{what}, {IN_INTEGERS}")
    if isinstance(stored, BitsAndBytesConfig):
        formats = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16"}
        compute = getattr(asked, "bnb_4bit_compute_dtype", None) or formats[method.precision]
        return BitsAndBytesConfig(**{**stored.to_dict(), "bnb_4bit_compute_dtype": compute})
    return asked or stored


def _is_same_quantization(stored: QuantizationConfigMixin, asked: QuantizationConfigMixin) -> bool:
    """Whether a method that quantizes by `asked` finds in the checkpoint what it would make."""
    if type(stored) is not type(asked):
        return False
    kinds = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type")
    return all(getattr(stored, kind, None) == getattr(asked, kind, None) for kind in kinds)
