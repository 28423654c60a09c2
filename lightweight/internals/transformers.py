"""What is private to transformers: a network's quantizer, and what its Trainer's callbacks keep. Read in transformers
5.23.0."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # Trainer imports peft, which comes after `lightweight.preload`
    from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerCallback
    from transformers.utils.quantization_config import QuantizationConfigMixin


def quantize_shapes(network: PreTrainedModel, quantization: QuantizationConfigMixin) -> None:
    """Give a network on the meta device the layers that it has once its weights are loaded and quantized.
    `from_pretrained` alone does so, and wants the weights."""
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer: Any = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.preprocess_model(model=network, device_map=None)
    network.hf_quantizer = quantizer
    quantizer.postprocess_model(network)


def call_first(trainer: Trainer, callback: TrainerCallback) -> None:
    """Add a callback before all others, where `add_callback` adds it after them."""
    trainer.callback_handler.callbacks.insert(0, callback)


def draw_curves_in(trainer: Trainer, folder: Path) -> None:
    """Have TensorBoard's callback, where there is one, write to `folder` unless the environment names another: a folder
    can be given to the class alone, which the Trainer makes itself."""
    from transformers.integrations.integration_utils import TensorBoardCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder)


def bar_of(progress: ProgressCallback) -> Any:
    """The tqdm bar of a training that has begun, on the one rank that shows it; else None."""
    return progress.training_bar


def begin_bar_at(progress: ProgressCallback, step: int) -> None:
    """Have the bar reckon the time that is left from the steps after `step`, where a training goes on."""
    bar = bar_of(progress)
    bar.initial = bar.n = bar.last_print_n = progress.current_step = step
