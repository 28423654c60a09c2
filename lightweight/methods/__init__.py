"""How is a model trained? A peft config, a quantization config, overrides of TrainingArguments, and your own functions
and classes.

`BASELINE`, `LORA` and `QLORA` have the settings of the four original scripts; `*_CAPTURED` train the same with the
captured step. `dataclasses.replace` makes a variant of one, `Method` a new one.
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
