"""How does Unsloth load a network and put an adapter on? What a user might pick instead of peft: it has kernels of its
own for LoRA. All but the network is the suite's own: rows, Trainer, meter, outcome.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightweight import methods
from lightweight.trial import Trial

if TYPE_CHECKING:
    import torch
    from transformers.utils.quantization_config import QuantizationConfigMixin


def build(trial: Trial, device: torch.device, quantization: QuantizationConfigMixin | None) -> torch.nn.Module:
    """The network of a trial as Unsloth loads it and puts its adapter on, ready to train. `quantization` is what
    `methods.settle_quantization` gave. Raises MethodError."""
    import torch
    from unsloth import FastLanguageModel  # for architectures it has no layers for, its FastModel by itself

    method = trial.running_method
    adapter: Any = method.adapter
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    # its own kind of checkpointing, which moves what it keeps to the host, or none
    checkpointing = "unsloth" if method.training_arguments.get("gradient_checkpointing") else False
    network, _tokenizer = FastLanguageModel.from_pretrained(
        trial.model.location,
        max_seq_length=trial.max_length,
        dtype=dtypes[method.precision],
        load_in_4bit=quantization is not None,
        load_in_16bit=quantization is None,
        device_map={"": device},
        use_gradient_checkpointing=checkpointing,
    )
    network = FastLanguageModel.get_peft_model(
        network,
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules=methods.named_layers(method, network),
        bias="none",
        use_gradient_checkpointing=checkpointing,
        random_state=trial.seed,
    )
    FastLanguageModel.for_training(network, use_gradient_checkpointing=checkpointing)
    return network  # type: ignore[no-any-return]
