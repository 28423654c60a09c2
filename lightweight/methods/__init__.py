"""How is a model trained? A peft config, a quantization config and TrainingArguments overrides, in their own
vocabulary, and where these do not say it, functions and classes of one's own, in the Trainer's.

`BASELINE`, `LORA` and `QLORA` are the settings of the four original scripts. A variant is made with
`dataclasses.replace`, a new method by writing one `Method`. `*_CAPTURED` train the same with the captured step.
"""

from lightweight.methods.adapter import adapt, adapted_layers, check_layers, named_layers
from lightweight.methods.known import (
    BASELINE,
    BASELINE_CAPTURED,
    LORA,
    LORA_CAPTURED,
    METHODS,
    PLANNED,
    QLORA,
    QLORA_CAPTURED,
    named,
)
from lightweight.methods.method import OWN_CODE, CapturedStep, Method, MethodError, Precision
from lightweight.methods.quantization import settle_quantization

__all__ = [
    "BASELINE",
    "BASELINE_CAPTURED",
    "LORA",
    "LORA_CAPTURED",
    "METHODS",
    "OWN_CODE",
    "PLANNED",
    "QLORA",
    "QLORA_CAPTURED",
    "CapturedStep",
    "Method",
    "MethodError",
    "Precision",
    "adapt",
    "adapted_layers",
    "check_layers",
    "named",
    "named_layers",
    "settle_quantization",
]
