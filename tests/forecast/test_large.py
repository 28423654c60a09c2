"""Forecasts of 8 billion parameters, long rows and replicas on two GPUs against peaks that were measured."""

from pathlib import Path

import pytest

from experiments.test_large import BY, LONG, job
from experiments.test_ranks import WEAK, strong, weak
from lightweight import corpus, models, record
from lightweight.child import helper
from lightweight.forecast import tracer
from lightweight.forecast.replay import within
from lightweight.targets import HOPPER, Device
from lightweight.trial import Trial

pytestmark = pytest.mark.xdist_group("traces")  # of which one worker makes all

RECORDS = Path(__file__).parents[2] / "experiments" / "records"
CELLS = {
    "8B": ("h100-8b", BY["captured"], 2048, "24GiB"),
    "8B, activations on the host": ("h100-8b", BY["offloaded"], 2048, "7GiB"),
    "8,192 tokens": ("h100-long-rows", LONG, 8192, "40GiB"),
    "32,768 tokens": ("h100-long-rows", LONG, 32768, "40GiB"),
}


def forecast(folder, entry, method, changes):
    """The forecast of a measured cell on the card that it was measured on."""
    model, _ = models.find(models.named(entry.model), "random")
    trial = Trial(model=model, method=method, **changes)
    device = Device(name=entry.device, total_bytes=entry.device_bytes, capability=HOPPER)
    return within(helper.call(tracer.trace_on, folder, trial, device), trial.target.budget_bytes)


def assert_as_measured(forecast, entry):
    assert entry.outcome == "completed"
    assert forecast.verdict == "fits"
    assert forecast.allocated_bytes == pytest.approx(entry.peak_allocated_bytes, rel=0.03)
    assert forecast.reserved_bytes == pytest.approx(entry.peak_reserved_bytes, rel=0.05)


@pytest.mark.parametrize("cell", CELLS)
def test_the_committed_measurement_is_forecast(tmp_path, cell):
    stem, method, length, target = CELLS[cell]
    entries = record.load(RECORDS / f"{stem}.json").entries
    (entry,) = (entry for entry in entries if (entry.max_length, entry.method) == (length, method.name))
    assert_as_measured(forecast(tmp_path, entry, method, job(length, target)), entry)


@pytest.mark.parametrize("model", [*WEAK, "llama-3.1-8b"])
def test_a_measured_rank_of_two_is_forecast(tmp_path, model):
    method, changes = weak(model, 2) if model in WEAK else strong(2)
    entries = record.load(RECORDS / "h100-two-ranks.json").entries
    (entry,) = (entry for entry in entries if (entry.model, entry.world_size) == (model, 2))
    changes = {"corpus": corpus.load(RECORDS.parents[1] / "corpus.json"), **changes}
    assert_as_measured(forecast(tmp_path, entry, method, changes), entry)
