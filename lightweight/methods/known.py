"""Which methods are known by name? Those of the four original scripts, and the same with the captured step."""

from __future__ import annotations

import pkgutil
from dataclasses import replace
from pathlib import Path

from transformers import BitsAndBytesConfig

from lightweight import importable, names
from lightweight.methods.method import Method
from lightweight.models import reason
from lightweight.preload import peft

BASELINE = Method(name="baseline", training_arguments={"per_device_train_batch_size": 8})
"""`before_small` and `before_big` of the original scripts: every parameter in fp32, 8 sequences a step."""

LORA = Method(
    name="lora",
    adapter=peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM, r=8, lora_alpha=32, lora_dropout=0.1, target_modules=None
    ),
    training_arguments={"per_device_train_batch_size": 8, "fp16": True},
)
"""`lightweight_small`: LoRA (https://arxiv.org/abs/2106.09685) of rank 8 on frozen fp32 weights, fp16 autocast. Its
layers are those that peft names for the architecture: of OPT, GPT-Neo and Llama the original's q_proj and v_proj."""

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
"""`lightweight_big`: LoRA on weights in NF4 (QLoRA, https://arxiv.org/abs/2305.14314), 4 passes of 2 sequences a step,
each forward computed twice."""

# All parameters are trained, so none is frozen to be held in half precision, and fp32 is what the optimizer adds its
# small updates to: pure fp32 keeps the baseline's arithmetic and its 16 bytes a parameter. Half-precision products with
# fp32 masters beside them are `replace(BASELINE_CAPTURED, weights_dtype="half")`, at 20 bytes a parameter.
BASELINE_CAPTURED = replace(BASELINE, name="baseline-captured", step="captured")
"""`baseline` with the captured step."""

LORA_CAPTURED = replace(
    LORA,
    name="lora-captured",
    step="captured",
    weights_dtype="half",
    training_arguments={"per_device_train_batch_size": 8},
)
"""`lora` with the captured step, its frozen weights held in half precision; what is trained stays fp32."""

QLORA_CAPTURED = replace(
    QLORA,
    name="qlora-captured",
    step="captured",
    weights_dtype="half",
    training_arguments={"per_device_train_batch_size": 8},  # one pass, nothing recomputed
)
"""`qlora` with the captured step: the same 8 sequences a step in one pass."""

METHODS = {method.name: method for method in (BASELINE, LORA, QLORA, BASELINE_CAPTURED, LORA_CAPTURED, QLORA_CAPTURED)}
"""What `--method` knows by name."""

PLANNED = (BASELINE, LORA, QLORA, LORA_CAPTURED, QLORA_CAPTURED)
"""What a plan lists, and a job takes one of, where no method is named."""


def named(text: str) -> Method:
    """The method called `text`, or the `Method` object at an import path `package.module:NAME`, or in a file,
    `path/to/file.py:NAME`. Raises ValueError, also for another method of the name of one of the suite's, which it would
    be taken for."""
    if text in METHODS:
        return METHODS[text]
    names.check_method(text)
    where, _, name = text.rpartition(":")
    try:
        module = importable.module_of(Path(where)) if where.endswith(".py") else where
        method = pkgutil.resolve_name(f"{module}:{name}")
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"method {text!r} cannot be imported: {error}") from error
    except Exception as error:  # of its author's code, whatever that is
        place = "" if isinstance(error, SyntaxError) else importable.place_of(error)
        told = f"{reason(error)} ({place})" if place else reason(error)
        raise ValueError(f"method {text!r} cannot be imported: {told}") from error
    if not isinstance(method, Method):
        raise ValueError(f"method {text!r} is a {type(method).__name__}: give a lightweight.methods.Method")
    names.refuse_namesakes("method", [METHODS.get(method.name, method), method])
    return method
