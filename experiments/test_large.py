"""What do 8 billion parameters take, and rows of 8,192 and 32,768 tokens? Captured under a budget, beside their
forecasts; stock PEFT and Unsloth beside the 8B step. Random weights: speed and memory do not depend on them.
"""

import importlib.util
from dataclasses import replace
from typing import Any

import pytest

from lightweight import targets
from lightweight.corpus import Corpus, pair
from lightweight.forecast.replay import Forecast
from lightweight.methods import LORA_CAPTURED, QLORA_CAPTURED, Method
from lightweight.plugin import NOT_RUN, ForecastOf, Train
from lightweight.preload import peft
from lightweight.trial import Completed

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTER = peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules=LAYERS)
ONE_ROW: dict[str, Any] = {"per_device_train_batch_size": 1}
STEPS = 14

BY: dict[str, Method] = {
    "captured": replace(QLORA_CAPTURED, name="qlora-captured-8b", adapter=ADAPTER, training_arguments=ONE_ROW),
    "offloaded": replace(
        QLORA_CAPTURED.offloading(32), name="qlora-captured-8b-offloaded", adapter=ADAPTER, training_arguments=ONE_ROW
    ),
    **{
        library: replace(
            QLORA_CAPTURED,
            name=f"qlora-8b-{library}",
            adapter=ADAPTER,
            step="trainer",
            library=library,
            weights_dtype="bfloat16",
            # as both recommend at this size: Unsloth's own kind of checkpointing is what it makes of it
            training_arguments=ONE_ROW | {"bf16": True, "gradient_checkpointing": True},
        )
        for library in ("peft", "unsloth")
    },
}

UNDER = {"captured": "24GiB", "offloaded": "7GiB"}
"""What the captured steps are given: a card that people have, and what Unsloth takes."""

LONG = replace(LORA_CAPTURED, name="lora-captured-long", adapter=ADAPTER, training_arguments=ONE_ROW)


def full_rows(length: int) -> Corpus:
    """As many rows as there are steps, each of `length` bytes and so longer than as many tokens."""
    text = "the quick brown fox jumps over the lazy dog and goes on " * (1 + length // 50)
    pairs = [pair(text[start : start + 40], text[start + 40 : start + 40 + length]) for start in range(STEPS + 2)]
    return Corpus(train=tuple(pairs[2:]), heldout=tuple(pairs[:2]), digest=f"{length:064}")


def job(length: int, target: str) -> dict[str, Any]:
    on = {"target": targets.named(target), "corpus": full_rows(length), "max_length": length}
    return {**on, "max_steps": STEPS, "padding": "max"}


@pytest.mark.needs_cuda
@pytest.mark.shown_as("peers")
@pytest.mark.parametrize("by", BY)
def test_a_peer_trains_8b(train: Train, forecast_of: ForecastOf, by: str) -> None:
    """Captured steps under a cap, whatever the card has, as forecast; the others on all of it."""
    if by == "unsloth" and importlib.util.find_spec("unsloth") is None:
        pytest.skip(f"{NOT_RUN}needs unsloth: pip install unsloth")
    changes = job(2048, UNDER.get(by, "native"))
    outcome = train("llama-3.1-8b", BY[by], **changes)
    assert isinstance(outcome, Completed), f"{outcome.reason}\n{getattr(outcome, 'details', '')[-2000:]}"
    if by in UNDER:
        assert_as_forecast(outcome, forecast_of("llama-3.1-8b", BY[by], **changes))


@pytest.mark.needs_cuda
@pytest.mark.parametrize("length", [8192, 32768])
def test_a_long_row_fits_as_forecast(train: Train, forecast_of: ForecastOf, length: int) -> None:
    outcome = train("qwen3-0.6b", LONG, **job(length, "40GiB"))
    assert isinstance(outcome, Completed), outcome.reason
    assert_as_forecast(outcome, forecast_of("qwen3-0.6b", LONG, **job(length, "40GiB")))


def assert_as_forecast(outcome: Completed, forecast: Forecast) -> None:
    assert forecast.verdict == "fits"
    assert outcome.measured.peak_allocated_bytes == pytest.approx(forecast.allocated_bytes, rel=0.03)
