"""How a checkpoint is quantized, and in what quantization a method trains it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from lightweight.models.model import Model, ModelError, refused

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from lightweight.methods import Method

UNQUANTIZED = "give the unquantized checkpoint, or one quantized by bitsandbytes"
"""The mend where a quantized checkpoint cannot be trained."""


def stored_quantization(model: Model, config: PretrainedConfig) -> QuantizationConfigMixin | None:
    """How the checkpoint that `config` belongs to is quantized; None where it is not. Raises ModelError for a format
    that this transformers does not read, or whose package is not installed."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    settings = getattr(config, "quantization_config", None)
    if settings is None:
        settings = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    if settings is None:
        return None
    settings = settings.to_dict() if hasattr(settings, "to_dict") else settings
    name = settings.get("quant_method") if isinstance(settings, dict) else settings
    name = "what config.json does not name" if name is None else name
    with refused(model, f"its checkpoint is quantized by {name!s:.40}, which cannot be read here", UNQUANTIZED):
        quantization: QuantizationConfigMixin = AutoQuantizationConfig.from_dict(copy.deepcopy(settings))
        return quantization


def settle_quantization(
    model: Model, config: PretrainedConfig, method: Method, *, sharded: bool = False
) -> QuantizationConfigMixin | None:
    """The quantization that `method` trains `model` in: that of the checkpoint, else the method's own, else None.

    A quantized checkpoint stays what it is. The method may name the same quantization: what it says of loading
    (`dequantize`, or the format that 4-bit weights are computed with) then holds. Without it 4-bit weights are computed
    with in the method's precision. `sharded` says that ranks share the weights by FSDP, which deals out floating-point
    tensors alone. Raises ModelError where no method can train the checkpoint, and MethodError where this one cannot.
    """
    from transformers import BitsAndBytesConfig

    from lightweight.methods import MethodError

    stored, asked = stored_quantization(model, config), method.quantization
    if stored is None:
        return asked
    is_same = asked is not None and _is_same_quantization(stored, asked)
    if is_same and getattr(asked, "dequantize", False):
        return asked  # to a network like any other
    _check_trainable(model, stored)
    what = f"method {method.name}: model {model.name} is quantized by {title(stored)} already"
    if asked is not None and not is_same:
        raise MethodError(f"{what}, which {title(asked)} cannot be put on: take a method that does not quantize")
    if method.adapter is None:
        raise MethodError(f"{what}: its weights cannot be trained themselves: take a method with an adapter")
    if sharded and not getattr(getattr(stored, "bnb_4bit_quant_storage", None), "is_floating_point", False):
        raise MethodError(
            f"{what}, in integers, which FSDP cannot share among ranks: train on one, or by the captured step"
        )
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


def _check_trainable(model: Model, quantization: QuantizationConfigMixin) -> None:
    """Raise ModelError where transformers cannot train an adapter on weights quantized like this, or not here."""
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.utils.import_utils import is_kernels_available

    what = f"its checkpoint is quantized by {title(quantization)}"
    with refused(model, f"{what}, which cannot be loaded here", UNQUANTIZED):
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(quantization), pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)  # FP8: dequantized where no card has it
        computes_in_fp8 = quantizer.quantization_config.quant_method in ("fp8", "mxfp8")
        if computes_in_fp8 and not quantizer.quantization_config.dequantize and not is_kernels_available():
            raise ImportError("its kernels come with the package kernels: pip install kernels")
        trainable = quantizer.is_trainable
        trainable = trainable() if callable(trainable) else trainable  # fp_quant's is a method
    if not trainable:
        raise ModelError(f"model {model.name}: {what}, which transformers cannot train: {UNQUANTIZED}")


def title(quantization: QuantizationConfigMixin) -> str:
    """A quantization as a person says it."""
    method = getattr(quantization.quant_method, "value", quantization.quant_method)
    bits = [f" {bits}-bit" for bits in (4, 8) if getattr(quantization, f"load_in_{bits}bit", False)]
    return f"{method}{''.join(bits)}"


def quantization_of(network: Any) -> str | None:
    """How the weights of a network are quantized, None where they are not."""
    if not getattr(network, "is_quantized", False):
        return None
    return title(network.config.quantization_config)
