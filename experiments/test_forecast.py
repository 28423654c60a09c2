"""Does the forecast say what happens? Peaks forecast without a GPU, beside peaks measured on one.

The frontier of a T4 is asserted by forecast on every machine, for the true sizes. The cells are measured where there is
CUDA; `experiments/records/h200-forecast.json` and `h100-captured-forecast.json` are such runs, and tests/forecast
compares with them anywhere.
"""

import statistics
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from lightweight.methods import BASELINE, LORA, LORA_CAPTURED, QLORA, QLORA_CAPTURED, CapturedStep, Method
from lightweight.models import SMOLLM2_135M, Model
from lightweight.plugin import ForecastOf, Train
from lightweight.targets import CONTEXT_BYTES, HOPPER, NATIVE, T4, Target
from lightweight.trial import Completed, Forecast, Outcome, OutOfMemory

ALLOCATED, RESERVED = 0.02, 0.05
"""How far from the measured peak a forecast may be."""

STEP, STEP_BY_DATA_SHEET = 0.1, 0.2
"""How far from the measured step the forecast of a captured one may be, on a card that was calibrated or was not."""


def without_checkpointing(method: Method) -> Method:
    arguments = {**method.training_arguments, "gradient_checkpointing": False}
    return replace(method, name=f"{method.name}-no-checkpointing", training_arguments=arguments)


def unpacked(method: Method) -> Method:
    return replace(method, name=f"{method.name}-unpacked", step=CapturedStep(packing=False))


SMOLLM2_SHAPE = Model(name="smollm2-135m", architecture=SMOLLM2_135M.architecture)
MODELS: dict[str, str | Model] = {
    "opt-350m": "opt-350m",
    "gpt-neo-1.3b": "gpt-neo-1.3b",
    "smollm2-135m": SMOLLM2_SHAPE,
}
BF16 = replace(BASELINE, name="bf16", weights_dtype="bfloat16")
QLORA_PLAIN = without_checkpointing(QLORA)

CELLS: dict[str, tuple[str, Method, int]] = {
    f"{model} x {method.name}": (model, method, 256)
    for model in MODELS
    for method in (BASELINE, BF16, LORA, QLORA, QLORA_PLAIN)
} | {
    "opt-350m x lora, 4 x 512": ("opt-350m", LORA.with_batch(4), 512),
    "opt-350m x qlora, 8 x 512": ("opt-350m", QLORA.with_batch(8), 512),
    "gpt-neo-1.3b x qlora-no-checkpointing, 1 x 1024": ("gpt-neo-1.3b", QLORA_PLAIN.with_batch(1), 1024),
    "smollm2-135m x baseline, 16 x 128": ("smollm2-135m", BASELINE.with_batch(16), 128),
}
"""Model, method and tokens a row, by name."""

CAPTURED_MODELS: dict[str, str | Model] = MODELS | {
    "qwen3-0.6b": "qwen3-0.6b",
    "llama-3.2-1b": "llama-3.2-1b",
    "gemma-3-1b": "gemma-3-1b",
}

CAPTURED_CELLS: dict[str, tuple[str, Method, int, Target]] = (
    {
        f"{model} x {method.name}, 8 x 256": (model, method, 256, T4 if model in MODELS else NATIVE)
        for model in CAPTURED_MODELS
        for method in (LORA_CAPTURED, QLORA_CAPTURED)
        if (model, method.name) != ("gpt-neo-1.3b", "lora-captured")  # random halves of it agree with nothing
    }
    | {
        f"{model} x {method.name}, 2 x 2048": (model, unpacked(method.with_batch(2)), 2048, NATIVE)
        for model in ("qwen3-0.6b", "llama-3.2-1b", "gemma-3-1b")
        for method in (LORA_CAPTURED, QLORA_CAPTURED)
    }
    | {
        "opt-350m x lora-captured, 4 x 1024 packed": ("opt-350m", LORA_CAPTURED.with_batch(4), 1024, NATIVE),
        "qwen3-0.6b x qlora-captured, 8 x 1024 packed": ("qwen3-0.6b", QLORA_CAPTURED, 1024, NATIVE),
    }
)
"""Model, method, tokens a row and target, by name."""

CAPPED = ("opt-350m x baseline", "opt-350m x lora", "smollm2-135m x lora", "gpt-neo-1.3b x qlora-no-checkpointing")
"""Cells that are also measured under budgets around their peak."""


def of_their_models(cells: Iterable[str]) -> list[Any]:
    return [pytest.param(cell, marks=pytest.mark.model(CELLS[cell][0])) for cell in cells]


@pytest.mark.parametrize(
    ("model", "method", "verdict"),
    [
        ("opt-350m", "baseline", "fits"),
        ("opt-350m", "lora", "fits"),
        ("opt-350m", "qlora", "fits"),
        ("gpt-neo-1.3b", "lora", "does_not_fit"),
        ("gpt-neo-1.3b", "qlora", "fits"),
        ("opt-350m", "lora-captured", "fits"),
        ("gpt-neo-1.3b", "qlora-captured", "fits"),
    ],
)
def test_frontier_of_a_t4(forecast_of: ForecastOf, model: str, method: str, verdict: str) -> None:
    assert forecast_of(model, method, target=T4).verdict == verdict


@pytest.mark.model("gpt-neo-1.3b")
def test_large_baseline_fits_a_t4_at_no_batch_size(forecast_of: ForecastOf) -> None:
    smallest = forecast_of("gpt-neo-1.3b", BASELINE.with_batch(1), target=T4, max_length=8)
    assert smallest.verdict == "does_not_fit"
    state = sum(smallest.by_cause[cause] for cause in ("weights", "optimizer", "gradients"))
    assert state > (T4.budget_bytes or 0), "what does not depend on the batch is already too much"


@pytest.mark.needs_cuda
@pytest.mark.parametrize("cell", of_their_models(CELLS))
def test_forecast_agrees_with_measurement(train: Train, forecast_of: ForecastOf, cell: str) -> None:
    outcome, forecast = run(train, forecast_of, cell, NATIVE)
    assert isinstance(outcome, Completed), outcome.reason
    assert_agreement(outcome, forecast)


@pytest.mark.needs_cuda
@pytest.mark.parametrize(
    "cell", [pytest.param(cell, marks=pytest.mark.model(CAPTURED_CELLS[cell][0])) for cell in CAPTURED_CELLS]
)
def test_forecast_of_a_captured_step_agrees_with_measurement(train: Train, forecast_of: ForecastOf, cell: str) -> None:
    model, method, max_length, target = CAPTURED_CELLS[cell]
    changes: dict[str, Any] = {"target": target, "max_steps": 13, "max_length": max_length}
    outcome = train(CAPTURED_MODELS[model], method, **changes)
    assert isinstance(outcome, Completed), outcome.reason
    assert outcome.measured.captured, outcome.measured.capture_note
    forecast = forecast_of(CAPTURED_MODELS[model], method, **changes)
    assert_agreement(outcome, forecast)
    if forecast.step_seconds is not None:
        steady = statistics.median(outcome.measured.step_seconds[1:])
        error = STEP if forecast.is_calibrated else STEP_BY_DATA_SHEET
        assert forecast.step_seconds == pytest.approx(steady, rel=error)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("share", ["too little", "in between", "enough"])
@pytest.mark.parametrize("cell", of_their_models(CAPPED))
def test_verdict_is_right_near_the_budget(train: Train, forecast_of: ForecastOf, cell: str, share: str) -> None:
    _, forecast = run(None, forecast_of, cell, NATIVE)
    budget = {
        "too little": round(forecast.allocated_bytes * 0.95),
        "in between": (forecast.allocated_bytes + forecast.reserved_bytes) // 2,
        "enough": round(forecast.reserved_bytes * 1.05),
    }[share]
    target = Target(name=f"{cell}: {share}", capability=HOPPER, total_bytes=budget + CONTEXT_BYTES)
    outcome, forecast = run(train, forecast_of, cell, target)
    assert_right(outcome, forecast)
    if share != "in between":
        assert forecast.verdict == ("fits" if share == "enough" else "does_not_fit")


def run(train: Train | None, forecast_of: ForecastOf, cell: str, target: Target) -> tuple[Any, Forecast]:
    model, method, max_length = CELLS[cell]
    changes = {"target": target, "max_steps": 3, "max_length": max_length}
    outcome = None if train is None else train(MODELS[model], method, **changes)
    return outcome, forecast_of(MODELS[model], method, **changes)


def assert_agreement(outcome: Outcome, forecast: Forecast) -> None:
    measured = outcome.measured
    assert forecast.allocated_bytes == pytest.approx(measured.peak_allocated_bytes, rel=ALLOCATED)
    assert forecast.reserved_bytes == pytest.approx(measured.peak_reserved_bytes, rel=RESERVED)


def assert_right(outcome: Outcome, forecast: Forecast) -> None:
    assert isinstance(outcome, Completed | OutOfMemory), outcome.reason
    wrong = "does_not_fit" if isinstance(outcome, Completed) else "fits"
    assert forecast.verdict != wrong, f"{outcome.kind}, and the forecast said {forecast.verdict}"
