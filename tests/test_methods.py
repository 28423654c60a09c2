from dataclasses import replace

import pytest
import torch
from transformers import BitsAndBytesConfig

from lightweight import methods
from lightweight.methods import (
    BASELINE,
    BASELINE_CAPTURED,
    LORA,
    LORA_CAPTURED,
    QLORA,
    QLORA_CAPTURED,
    CapturedStep,
    Method,
)
from lightweight.preload import peft

MINE = replace(LORA, name="mine")


def test_the_three_methods_are_the_originals():
    assert (BASELINE.adapter, BASELINE.quantization, BASELINE.precision) == (None, None, "fp32")
    for method in (LORA, QLORA):
        assert isinstance(method.adapter, peft.LoraConfig)
        assert (method.adapter.r, method.adapter.lora_alpha, method.adapter.lora_dropout) == (8, 32, 0.1)
        assert method.precision == "fp16"
    assert LORA.adapter.target_modules == {"q_proj", "v_proj"}
    assert QLORA.quantization.load_in_4bit
    assert QLORA.training_arguments["gradient_checkpointing"]
    assert (QLORA.sequences_per_pass, QLORA.sequences_per_step) == (2, 8)
    assert BASELINE.sequences_per_step == LORA.sequences_per_step == 8


def test_on_a_cpu_nothing_asks_for_fp16():
    for method in methods.METHODS.values():
        assert method.on_cpu().precision == "fp32"
    assert QLORA.on_cpu().quantization.bnb_4bit_compute_dtype == torch.float32
    assert QLORA.on_cpu().quantization.bnb_4bit_quant_type == "nf4"
    assert QLORA.quantization.bnb_4bit_compute_dtype == torch.float16


@pytest.mark.parametrize(
    "method",
    [
        replace(LORA, training_arguments={"bf16": True}),
        replace(BASELINE, weights_dtype="bfloat16"),
        replace(QLORA, quantization=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16")),
    ],
)
def test_bf16_is_seen_wherever_it_is_asked_for(method):
    assert method.uses_bf16
    assert not any(known.uses_bf16 for known in methods.METHODS.values())


def test_a_method_of_ones_own_is_named_by_its_import_path():
    assert methods.named("test_methods:MINE") is MINE
    assert methods.named("lora") is LORA


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lorra", "unknown method 'lorra': choose one of baseline, lora, qlora"),
        ("nowhere:MINE", "cannot be imported"),
        ("test_methods:NONE", "cannot be imported"),
        ("test_methods:pytest", "is a module"),
    ],
)
def test_a_name_that_is_no_method_is_told(text, expected):
    with pytest.raises(ValueError, match=expected):
        methods.named(text)


def test_batch_is_the_trainers_default_where_nothing_is_said():
    assert Method(name="bare").sequences_per_step == 8


def test_captured_methods_train_what_the_stock_ones_do():
    for stock, captured in ((BASELINE, BASELINE_CAPTURED), (LORA, LORA_CAPTURED), (QLORA, QLORA_CAPTURED)):
        assert stock.captured_step is None
        assert captured.captured_step == CapturedStep()
        assert captured.name == f"{stock.name}-captured"
        assert captured.adapter == stock.adapter
        assert captured.sequences_per_step == stock.sequences_per_step
    assert not QLORA_CAPTURED.training_arguments.get("gradient_checkpointing")
    assert BASELINE_CAPTURED.precision == "fp32"


@pytest.mark.parametrize(("bf16", "dtype", "precision"), [(True, "bfloat16", "bf16"), (False, "float16", "fp16")])
def test_half_is_the_format_the_target_has(bf16, dtype, precision):
    assert not QLORA_CAPTURED.uses_bf16  # no target needs to have it
    method = QLORA_CAPTURED.on_gpu(bf16=bf16)
    assert (method.weights_dtype, method.precision) == (dtype, precision)
    assert method.quantization.bnb_4bit_compute_dtype == getattr(torch, dtype)
    assert QLORA.on_gpu(bf16=bf16) == QLORA


def test_packing_on_the_models_own_attention_is_refused():
    with pytest.raises(ValueError, match="packing needs attention='sdpa'"):
        CapturedStep(attention="model")
    assert Method(name="m", step=CapturedStep(packing=False)).captured_step == CapturedStep(packing=False)


def test_a_peer_needs_a_lora_adapter_and_the_trainers_steps():
    with pytest.raises(ValueError, match="unsloth trains LoRA by the Trainer's steps"):
        replace(BASELINE, library="unsloth")
    with pytest.raises(ValueError, match="unsloth trains LoRA by the Trainer's steps"):
        replace(LORA, step="captured", library="unsloth")
    assert replace(LORA, library="unsloth").library == "unsloth"


def test_a_step_has_as_many_sequences_in_other_passes():
    for method, passes, sequences in ((LORA, 2, 4), (LORA, 8, 1), (QLORA, 1, 8), (QLORA, 8, 1)):
        other = method.with_passes(passes)
        assert (other.passes_per_step, other.sequences_per_pass) == (passes, sequences)
        assert other.sequences_per_step == method.sequences_per_step
    assert LORA.with_passes(1) is LORA
    with pytest.raises(methods.MethodError, match="method lora: 8 sequences a step are not 3 equal passes"):
        LORA.with_passes(3)
