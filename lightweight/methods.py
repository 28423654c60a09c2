"""How a model is trained: a peft config, a quantization config and TrainingArguments overrides, in their own
vocabulary.

`BASELINE`, `LORA` and `QLORA` are the settings of the four original scripts. A variant is made with
`dataclasses.replace`, a new method by writing one `Method`.
"""

from __future__ import annotations

import copy
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from transformers import BitsAndBytesConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from lightweight.preload import peft

Precision = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to fine-tune.

    `adapter` None trains every parameter. `weights_dtype` is what unquantized weights are held in. `training_arguments`
    override transformers' `TrainingArguments`; mixed precision (`fp16`, `bf16`), batch size, accumulation and gradient
    checkpointing are said there. Everything not said is the Trainer's default: AdamW, learning rate 5e-5, linear decay.
    """

    name: str
    adapter: peft.PeftConfig | None = None
    quantization: QuantizationConfigMixin | None = None
    weights_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    training_arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def precision(self) -> Precision:
        """What matrix products are computed in: the autocast format, else that of the weights."""
        if self.training_arguments.get("fp16"):
            return "fp16"
        if self.training_arguments.get("bf16"):
            return "bf16"
        return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[self.weights_dtype]  # type: ignore[return-value]

    @property
    def uses_bf16(self) -> bool:
        """Whether any part of the method asks for bfloat16 arithmetic."""
        compute = getattr(self.quantization, "bnb_4bit_compute_dtype", None)
        return self.precision == "bf16" or "bfloat16" in str(compute)

    @property
    def sequences_per_pass(self) -> int:
        """Sequences of one forward pass; 8 is the Trainer's default."""
        return int(self.training_arguments.get("per_device_train_batch_size", 8))

    @property
    def sequences_per_step(self) -> int:
        """Sequences one optimizer step sees: one forward pass times the accumulation."""
        return self.sequences_per_pass * int(self.training_arguments.get("gradient_accumulation_steps", 1))

    @property
    def expected_cost(self) -> tuple[bool, ...]:
        """What orders methods from the fastest to the slowest where nothing was measured.

        4-bit weights are dequantized in every pass, checkpointing computes each forward twice, fp32 leaves the tensor
        cores idle, and training every parameter moves optimizer state for all of them: in this order on an H200
        (experiments/records), where lora is 1.7 times as fast as baseline and qlora a tenth.
        """
        checkpointing = bool(self.training_arguments.get("gradient_checkpointing"))
        return self.quantization is not None, checkpointing, self.precision == "fp32", self.adapter is None

    def with_batch(self, sequences: int) -> Method:
        """The method with `sequences` in a forward pass."""
        return replace(self, training_arguments={**self.training_arguments, "per_device_train_batch_size": sequences})

    def adapt(self, network: Any) -> Any:
        """`network`, loaded or on the meta device, with its adapter on, as peft's own documentation does it."""
        if self.quantization is not None:
            network = peft.prepare_model_for_kbit_training(
                network,
                use_gradient_checkpointing=self.training_arguments.get("gradient_checkpointing", False),
                gradient_checkpointing_kwargs=self.training_arguments.get("gradient_checkpointing_kwargs"),
            )
        if self.adapter is not None:
            network = peft.get_peft_model(network, copy.deepcopy(self.adapter))  # peft writes what it finds into it
        return network

    def on_cpu(self) -> Method:
        """The method as a CPU can run it: fp16 mixed precision needs a GPU (accelerate refuses it), so fp32 there."""
        quantization = self.quantization
        if isinstance(quantization, BitsAndBytesConfig) and quantization.load_in_4bit:
            quantization = BitsAndBytesConfig(**{**quantization.to_dict(), "bnb_4bit_compute_dtype": "float32"})
        arguments = {name: value for name, value in self.training_arguments.items() if name != "fp16"}
        return replace(self, quantization=quantization, training_arguments=arguments)


BASELINE = Method(name="baseline", training_arguments={"per_device_train_batch_size": 8})

LORA = Method(
    name="lora",
    adapter=peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM, r=8, lora_alpha=32, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]
    ),
    training_arguments={"per_device_train_batch_size": 8, "fp16": True},
)

QLORA = Method(
    name="qlora",
    # 'all-linear' is peft's word for every linear layer but the output head
    adapter=peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM, r=8, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear"
    ),
    quantization=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float16"),
    training_arguments={
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "fp16": True,
    },
)

METHODS = {method.name: method for method in (BASELINE, LORA, QLORA)}


def named(text: str) -> Method:
    """The method called `text`, or the `Method` object at an import path `package.module:NAME`. Raises ValueError."""
    if text in METHODS:
        return METHODS[text]
    if ":" not in text:
        raise ValueError(
            f"unknown method {text!r}: choose one of {', '.join(METHODS)}, or give your own as package.module:NAME"
        )
    try:
        method = pkgutil.resolve_name(text)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"method {text!r} cannot be imported: {error}") from error
    if not isinstance(method, Method):
        raise ValueError(f"method {text!r} is a {type(method).__name__}: give a lightweight.methods.Method")
    return method
