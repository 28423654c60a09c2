"""What do several GPUs buy? A model that one card cannot hold, and tokens a second.

One trial over several ranks, each with the network where it fits, else with a part of it. Batches and losses are those
of one rank; with `--scale batch` steps grow with the ranks, as in the last of these tests.
"""

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from experiments.full_rows import ADAPTER, LENGTH, ROWS, full_rows
from lightweight import record
from lightweight.methods import LORA_CAPTURED, QLORA, QLORA_CAPTURED, Method
from lightweight.plugin import ForecastOf, Train
from lightweight.targets import NATIVE, T4
from lightweight.trial import Completed, Outcome, OutOfMemory

RECORD = Path(__file__).parent / "records" / "h200-two-ranks.json"

needs_two_gpus = pytest.mark.needs_gpus(2)
of_gpt_neo = pytest.mark.model("gpt-neo-1.3b")


@of_gpt_neo
@pytest.mark.parametrize(("world_size", "verdict"), [(2, "does_not_fit"), (3, "fits")])
def test_what_two_t4s_cannot_hold_three_can(forecast_of: ForecastOf, world_size: int, verdict: str) -> None:
    assert forecast_of("gpt-neo-1.3b", "baseline", target=T4, world_size=world_size).verdict == verdict


@of_gpt_neo
def test_a_ranks_forecast_is_what_the_committed_ones_held(forecast_of: ForecastOf) -> None:
    (held,) = (
        entry
        for entry in record.load(RECORD).entries
        if (entry.model, entry.method, entry.outcome) == ("gpt-neo-1.3b", "baseline", "completed")
    )
    found = forecast_of("gpt-neo-1.3b", "baseline", target=T4, world_size=held.world_size, placement=held.placement)
    assert held.rank_peak_allocated_bytes == pytest.approx([found.allocated_bytes] * held.world_size, rel=0.03)
    assert held.peak_reserved_bytes == pytest.approx(found.reserved_bytes, rel=0.03)


@needs_two_gpus
@of_gpt_neo
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_model_runs_out_of_memory_on_one_t4_and_on_two_as_forecast(
    train: Train, forecast_of: ForecastOf, world_size: int
) -> None:
    outcome = train("gpt-neo-1.3b", "baseline", target=T4, epochs=1, world_size=world_size)
    forecast = forecast_of("gpt-neo-1.3b", "baseline", target=T4, world_size=world_size)
    assert forecast.verdict == ("fits" if isinstance(outcome, Completed) else "does_not_fit")
    assert isinstance(outcome, OutOfMemory), outcome
    assert outcome.rank in ((None,) if world_size == 1 else (0, 1))


@needs_two_gpus
@of_gpt_neo
def test_a_rank_holds_what_was_forecast(train: Train, forecast_of: ForecastOf) -> None:
    outcome = train("gpt-neo-1.3b", "baseline", target=NATIVE, epochs=1, world_size=2)
    forecast = forecast_of("gpt-neo-1.3b", "baseline", target=NATIVE, world_size=2)
    assert isinstance(outcome, Completed), outcome.reason
    held = outcome.measured
    assert held.rank_peak_allocated_bytes == pytest.approx([forecast.allocated_bytes] * 2, rel=0.03)
    assert held.rank_peak_reserved_bytes == pytest.approx([forecast.reserved_bytes] * 2, rel=0.03)


@needs_two_gpus
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("model", "method"), [("gpt-neo-1.3b", "qlora"), ("opt-350m", "lora-captured")])
def test_a_cell_on_one_rank_and_on_two(train: Train, model: str, method: str, world_size: int) -> None:
    outcome = train(model, method, epochs=2, world_size=world_size)
    assert isinstance(outcome, Completed), outcome.reason
    assert len(outcome.measured.rank_peak_allocated_bytes) == (world_size if world_size > 1 else 0)


@needs_two_gpus
@pytest.mark.parametrize(("model", "method"), [("gpt-neo-1.3b", "qlora"), ("opt-350m", "lora-captured")])
def test_two_ranks_learn_what_one_does(outcome_of: Train, model: str, method: str) -> None:
    """Dropout's numbers are other ones on every rank."""
    one, two = (outcome_of(model, method, epochs=2, world_size=size) for size in (1, 2))
    assert isinstance(one, Completed), one.reason
    assert isinstance(two, Completed), two.reason
    assert two.measured.heldout_loss_after == pytest.approx(one.measured.heldout_loss_after, rel=0.01)


WEAK: dict[str, tuple[Method, float]] = {
    "qwen3-0.6b": (LORA_CAPTURED, 1.9),
    "llama-3.2-1b": (QLORA_CAPTURED, 1.9),
    "gpt-neo-1.3b": (QLORA, 1.7),
}
"""How each is trained where every GPU has the rows that one has, and what two are to do of the tokens of one."""


def weak(model: str, world_size: int) -> tuple[Method, dict[str, Any]]:
    """The method and the changes of such a trial: captured steps have rows of 2,048 tokens, two to a GPU; the stock one
    has the original's."""
    method, _ = WEAK[model]
    changes: dict[str, Any] = {"target": NATIVE, "max_steps": 24, "padding": "max", "placement": "replicated"}
    if method.captured_step is not None:
        method = method.with_batch(ROWS)
        changes |= {"max_length": LENGTH, "corpus": full_rows()}
    return method.scaled(world_size, "batch"), {**changes, "world_size": world_size}


def strong(world_size: int) -> tuple[Method, dict[str, Any]]:
    """A step of two rows of 2,048 tokens by 8 billion parameters, whose rows the GPUs share."""
    method = replace(QLORA_CAPTURED.with_batch(ROWS), name="qlora-captured-8b", adapter=ADAPTER)
    changes = {"target": NATIVE, "max_steps": 14, "padding": "max", "placement": "replicated"}
    return method, {**changes, "max_length": LENGTH, "corpus": full_rows(), "world_size": world_size}


def steady_rate(outcome: Outcome) -> float:
    """Tokens a second of the median step, without the first four."""
    assert isinstance(outcome, Completed), outcome.reason
    measured = outcome.measured
    steady = list(zip(measured.step_padded_tokens, measured.step_seconds, strict=True))[4:]
    return median(tokens / seconds for tokens, seconds in steady)


@needs_two_gpus
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("model", WEAK)
def test_each_gpu_has_the_rows_of_one(train: Train, model: str, world_size: int) -> None:
    method, changes = weak(model, world_size)
    outcome = train(model, method, **changes)
    assert isinstance(outcome, Completed), outcome.reason


@needs_two_gpus
@pytest.mark.parametrize("model", WEAK)
def test_two_gpus_that_each_have_the_rows_of_one_pay(outcome_of: Train, model: str) -> None:
    one, two = (
        steady_rate(outcome_of(model, method, **changes)) for method, changes in (weak(model, 1), weak(model, 2))
    )
    print(f"{model}: {one:,.0f} and {two:,.0f} tokens a second, {two / one:.2f} times")
    assert two >= WEAK[model][1] * one


@needs_two_gpus
@pytest.mark.parametrize("world_size", [1, 2])
def test_gpus_share_the_rows_of_an_8b_step(train: Train, world_size: int) -> None:
    method, changes = strong(world_size)
    outcome = train("llama-3.1-8b", method, **changes)
    assert isinstance(outcome, Completed), outcome.reason


@needs_two_gpus
def test_two_gpus_that_share_the_rows_of_one_are_faster(outcome_of: Train) -> None:
    one, two = (steady_rate(outcome_of("llama-3.1-8b", method, **changes)) for method, changes in map(strong, (1, 2)))
    print(f"llama-3.1-8b: {one:,.0f} and {two:,.0f} tokens a second, {two / one:.2f} times")
    assert two > 1.5 * one
