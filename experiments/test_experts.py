"""Do mixtures of experts train on this GPU, by the Trainer and by the captured step, and in the memory forecast?

Layers of the widths of Mixtral 8x7B, Qwen3 30B-A3B, OLMoE 7B and gpt-oss 20B, two of each, in bf16, with LoRA on
attention alone or on the experts as well. Where routing lets the step be captured it is; where not, its note says why.
Random weights: speed and memory do not depend on them, but for how evenly they route.
"""

from dataclasses import replace
from typing import Any

import pytest

from lightweight.corpus import Corpus, pair
from lightweight.methods import LORA_CAPTURED, Method
from lightweight.models import Model
from lightweight.plugin import ForecastOf, Train
from lightweight.preload import peft
from lightweight.targets import NATIVE
from lightweight.trial import Completed

LENGTH, STEPS = 2_048, 12
COMMON: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": 32_000, "max_position_embeddings": 4_096}
SHAPES: dict[str, dict[str, Any]] = {
    "mixtral": {
        "hidden_size": 4_096, "intermediate_size": 14_336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "hidden_size": 2_048, "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    },
    "olmoe": {
        "hidden_size": 2_048, "intermediate_size": 1_024, "num_attention_heads": 16, "num_key_value_heads": 16,
        "num_experts": 64, "num_experts_per_tok": 8,
    },
    "gpt_oss": {
        "hidden_size": 2_880, "intermediate_size": 2_880, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"], "eos_token_id": 1, "pad_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 150_000.0},
    },
}  # fmt: skip
ATTENTION = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
ADAPTED: dict[str, dict[str, Any]] = {
    "attention": ATTENTION,
    "experts": ATTENTION | {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
}


def model(kind: str) -> Model:
    return Model(name=f"{kind}-2-layers", architecture={"model_type": kind} | COMMON | SHAPES[kind])


def method(adapted: str, step: str) -> Method:
    """LoRA of rank 16 in bf16 on what is `adapted`, by the Trainer or by the captured step."""
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, **ADAPTED[adapted])
    arguments = {"per_device_train_batch_size": 1}
    ours = replace(LORA_CAPTURED, name=f"lora-{adapted}-{step}", adapter=adapter, weights_dtype="bfloat16")
    if step == "captured":
        return replace(ours, training_arguments=arguments)
    return replace(ours, step="trainer", training_arguments=arguments | {"bf16": True})


def full_rows() -> Corpus:
    text = "the quick brown fox jumps over the lazy dog and goes on " * (1 + LENGTH // 50)
    pairs = [pair(text[start : start + 40], text[start + 40 : start + 40 + LENGTH]) for start in range(STEPS + 2)]
    return Corpus(train=tuple(pairs[2:]), heldout=tuple(pairs[:2]), digest="experts")


@pytest.mark.needs_cuda
@pytest.mark.parametrize("step", ["trainer", "captured"])
@pytest.mark.parametrize("adapted", ADAPTED)
@pytest.mark.parametrize("kind", SHAPES)
def test_experts_train_as_forecast(
    train: Train, outcome_of: Train, forecast_of: ForecastOf, kind: str, adapted: str, step: str
) -> None:
    """And captured as they do by the Trainer."""
    job: dict[str, Any] = {"target": NATIVE, "corpus": full_rows(), "max_length": LENGTH, "max_steps": STEPS}
    outcome = train(model(kind), method(adapted, step), **job)
    assert isinstance(outcome, Completed), f"{outcome.reason}\n{getattr(outcome, 'details', '')[-2000:]}"
    measured = outcome.measured
    forecast = forecast_of(model(kind), method(adapted, step), **job)
    assert measured.peak_allocated_bytes == pytest.approx(forecast.allocated_bytes, rel=0.03)
    if step == "captured":
        print(f"\n{kind} {adapted}: {'captured' if measured.captured else 'not captured'}; {measured.capture_note}")
        assert measured.captured or "uncaptured: " in (measured.capture_note or "")
        theirs = outcome_of(model(kind), method(adapted, "trainer"), **job)
        assert isinstance(theirs, Completed)
        assert measured.heldout_loss_after == pytest.approx(theirs.measured.heldout_loss_after, rel=0.01)
