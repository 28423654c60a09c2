"""What would a user pick instead? The same trial through Unsloth, which comes with kernels of its own for LoRA.

Unsloth rewrites transformers while both are imported, and wants to come first. So its trials get a fresh interpreter
instead of a fork of the one that has transformers already, and only there is it imported. All but the network is the
suite's own: rows, Trainer, meter, outcome.
"""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightweight.child.process import log_of, redirect_output, see_gpus

if TYPE_CHECKING:  # transformers must not come before unsloth
    import torch
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from lightweight.trial import Trial


def run(connection: Connection, pickled: bytes, folder: Path, started: float, device_index: int | None) -> None:
    """`worker.run` for a trial that Unsloth trains, in a process that has imported nothing yet. The trial comes
    `pickled`, since unpickling it imports transformers."""
    redirect_output(log_of(0, folder))
    if device_index is not None:
        see_gpus(device_index, 1)
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # it would ask the hub, and wait for it
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(folder / "unsloth")  # else in the current folder, for the next one
    import unsloth  # isort: skip  # noqa: F401

    from lightweight.child import worker

    trial: Trial = pickle.loads(pickled)  # noqa: S301  from the owner
    worker.run(connection, replace(trial, device_index=None if device_index is None else 0), folder, started)


def build(trial: Trial, device: torch.device, quantization: QuantizationConfigMixin | None) -> torch.nn.Module:
    """The network of a trial as Unsloth loads it and puts its adapter on, ready to train. `quantization` is what
    `models.settle_quantization` gave. Raises MethodError."""
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
        target_modules=method.named_layers(network),
        bias="none",
        use_gradient_checkpointing=checkpointing,
        random_state=trial.seed,
    )
    FastLanguageModel.for_training(network, use_gradient_checkpointing=checkpointing)
    return network  # type: ignore[no-any-return]
