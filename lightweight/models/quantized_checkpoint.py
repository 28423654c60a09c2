"""How is a checkpoint quantized, and can an adapter be trained on it as it is?"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from lightweight.models.model import Model, ModelError, refused

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from lightweight.targets import Capability

UNQUANTIZED = "give the unquantized checkpoint, or one quantized by bitsandbytes"
"""The mend where a quantized checkpoint cannot be trained."""

FP8_CAPABILITY = (8, 9)
"""Cards from Ada on multiply FP8. transformers/quantizers/quantizer_finegrained_fp8.py, `validate_environment`."""


def stored_quantization(model: Model, config: PretrainedConfig) -> QuantizationConfigMixin | None:
    """How the checkpoint of `config` is quantized; None if it is not. Raises ModelError for a format that this version
    of transformers does not read, or whose package is not installed."""
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


def check_trainable(model: Model, quantization: QuantizationConfigMixin) -> None:
    """Raise ModelError if transformers cannot train an adapter on weights quantized like this, or if a package for it
    is missing or too old; the message has the ImportError's."""
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.utils.import_utils import is_kernels_available

    what = f"its checkpoint is quantized by {title(quantization)}"
    with refused(model, f"{what}, which cannot be loaded here", _mend(quantization)):
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(quantization), pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)  # FP8: dequantized where no card has it
        if quantizer.quantization_config.quant_method in ("fp8", "mxfp8"):
            if is_undone(quantizer.quantization_config):
                return  # to a network like any other, also where transformers trains on no FP8, up to 5.17
            if not is_kernels_available():
                raise ImportError("its kernels come with the package kernels: pip install kernels")
        trainable = quantizer.is_trainable
        trainable = trainable() if callable(trainable) else trainable  # fp_quant's is a method
    if not trainable:
        raise ModelError(f"model {model.name}: {what}, which transformers cannot train: {_mend(quantization)}")


def check_forecastable(model: Model, quantization: QuantizationConfigMixin | None) -> None:
    """Raise ModelError if training with this `quantization` cannot be forecast."""
    from transformers import BitsAndBytesConfig

    if quantization is None or isinstance(quantization, BitsAndBytesConfig) or is_undone(quantization):
        return
    raise ModelError(
        f"model {model.name}: no forecast can be made of weights quantized by {title(quantization)}, whose layers "
        f"cannot be traced without their values and a GPU: train to see, or {_mend(quantization)}"
    )


def loaded_on(quantization: QuantizationConfigMixin | None, capability: Capability) -> QuantizationConfigMixin | None:
    """What `quantization` is on a card of this `capability`: transformers dequantizes FP8 where a card has no units for
    it."""
    from transformers import FineGrainedFP8Config

    if not isinstance(quantization, FineGrainedFP8Config) or capability >= FP8_CAPABILITY:
        return quantization
    undone = copy.deepcopy(quantization)
    undone.dequantize = True
    return undone


def is_undone(quantization: QuantizationConfigMixin | None) -> bool:
    """Whether quantized weights are dequantized while they are loaded, so the network is like any other."""
    return bool(getattr(quantization, "dequantize", False))


def _mend(quantization: QuantizationConfigMixin) -> str:
    if not hasattr(quantization, "dequantize"):
        return UNQUANTIZED
    return f"{UNQUANTIZED}, or take a method with quantization={type(quantization).__name__}(dequantize=True)"


def title(quantization: QuantizationConfigMixin) -> str:
    """The name of a quantization for a person."""
    method = getattr(quantization.quant_method, "value", quantization.quant_method)
    bits = [f" {bits}-bit" for bits in (4, 8) if getattr(quantization, f"load_in_{bits}bit", False)]
    return f"{method}{''.join(bits)}"


def quantization_of(network: Any) -> str | None:
    """How the weights of a network are quantized; None if they are not."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    if not getattr(network, "is_quantized", False):
        return None
    settings = network.config.quantization_config
    if isinstance(settings, dict):  # which is what Unsloth leaves of it
        settings = AutoQuantizationConfig.from_dict(copy.deepcopy(settings))
    return title(settings)
