"""The forecasts of mixtures of experts, against what was measured on a GPU."""

from pathlib import Path
from typing import Any

import pytest

from experiments.test_experts import ADAPTED, LENGTH, STEPS, full_rows, method, model
from lightweight import models, record
from lightweight.child import helper
from lightweight.forecast import tracer
from lightweight.targets import HOPPER, NATIVE, Device
from lightweight.trial import Trial

pytestmark = pytest.mark.xdist_group("traces")  # of which one worker makes all

RECORD = Path(__file__).parents[2] / "experiments" / "records" / "h200-experts.json"
KINDS = ("mixtral", "qwen3_moe", "olmoe")
"""Those that were measured; gpt-oss was not before that machine's time was over."""


@pytest.mark.parametrize("step", ["trainer", "captured"])
@pytest.mark.parametrize("adapted", ADAPTED)
@pytest.mark.parametrize("kind", KINDS)
def test_what_experts_take_was_forecast(tmp_path, kind, adapted, step):
    of, found = method(adapted, step), models.find(model(kind), "random")[0]
    entries = record.load(RECORD).entries
    (entry,) = (entry for entry in entries if (entry.model, entry.method) == (found.name, of.name))
    job: dict[str, Any] = {"target": NATIVE, "corpus": full_rows(), "max_length": LENGTH, "max_steps": STEPS}
    device = Device(name=entry.device, total_bytes=entry.device_bytes, capability=HOPPER)
    peak = helper.call(tracer.trace_on, tmp_path, Trial(model=found, method=of, **job), device).replay()
    assert peak.allocated_bytes == pytest.approx(entry.peak_allocated_bytes, rel=0.03)
    assert entry.captured == (True if step == "captured" else None)


def test_the_attention_of_gpt_oss_holds_what_its_softmax_multiplies(tmp_path):
    """Measured on an H100 80GB HBM3 (torch 2.11, transformers 5.17), 2026-11-28, with all but the forecast as it is
    now."""
    job: dict[str, Any] = {"target": NATIVE, "corpus": full_rows(), "max_length": LENGTH, "max_steps": STEPS}
    trial = Trial(model=models.find(model("gpt_oss"), "random")[0], method=method("attention", "trainer"), **job)
    device = Device(name="NVIDIA H100 80GB HBM3", total_bytes=80 * 2**30, capability=HOPPER)
    peak = helper.call(tracer.trace_on, tmp_path, trial, device).replay()
    assert peak.allocated_bytes == pytest.approx(7_005_165_568, rel=0.01)
