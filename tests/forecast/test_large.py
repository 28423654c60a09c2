"""Forecasts of 8 billion parameters and of long rows against peaks that were measured on a GPU."""

from pathlib import Path

import pytest

from experiments.test_large import BY, LONG, job
from lightweight import models, record
from lightweight.child import helper
from lightweight.forecast import tracer
from lightweight.forecast.replay import within
from lightweight.targets import HOPPER, Device
from lightweight.trial import Trial

pytestmark = pytest.mark.xdist_group("traces")  # of which one worker makes all

RECORDS = Path(__file__).parents[2] / "experiments" / "records"
CELLS = {
    "8B": ("h100-8b", BY["captured"], 2048, "24GiB"),
    "8,192 tokens": ("h100-long-rows", LONG, 8192, "40GiB"),
    "32,768 tokens": ("h100-long-rows", LONG, 32768, "40GiB"),
}


@pytest.mark.parametrize("cell", CELLS)
def test_the_committed_measurement_is_forecast(tmp_path, cell):
    stem, method, length, target = CELLS[cell]
    (entry,) = (entry for entry in record.load(RECORDS / f"{stem}.json").entries if entry.max_length == length)
    model, _ = models.find(models.named(entry.model), "random")
    trial = Trial(model=model, method=method, **job(length, target))
    device = Device(name=entry.device, total_bytes=entry.device_bytes, capability=HOPPER)
    forecast = within(helper.call(tracer.trace_on, tmp_path, trial, device), trial.target.budget_bytes)
    assert entry.outcome == "completed"
    assert forecast.verdict == "fits"
    assert forecast.allocated_bytes == pytest.approx(entry.peak_allocated_bytes, rel=0.03)
    assert forecast.reserved_bytes == pytest.approx(entry.peak_reserved_bytes, rel=0.05)
