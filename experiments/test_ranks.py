"""What do several GPUs buy? A model that one card cannot hold, and tokens a second.

One trial over several ranks: FSDP2 where the Trainer runs the steps, data parallelism where they are captured. Batches
and losses are those of one rank.
"""

from pathlib import Path

import pytest

from lightweight import record
from lightweight.plugin import ForecastOf, Train
from lightweight.targets import NATIVE, T4
from lightweight.trial import Completed, OutOfMemory

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
    found = forecast_of("gpt-neo-1.3b", "baseline", target=T4, world_size=held.world_size)
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
