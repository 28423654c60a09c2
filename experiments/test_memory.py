"""Does the budget decide? The large model runs out of memory as the original scripts did, and only because of the card.

Out of memory here is torch's own OutOfMemoryError, raised by a real allocation under the target's budget.
"""

import pytest
import torch

from lightweight.plugin import NOT_RUN, Laboratory, Train
from lightweight.targets import NATIVE
from lightweight.trial import Completed, OutOfMemory

LARGE = "gpt-neo-1.3b"
pytestmark = [pytest.mark.needs_cuda, pytest.mark.model(LARGE)]
FULL_TRAINING_BYTES = 16 * 1_315_575_808  # fp32 weight, gradient and two Adam moments of each of its parameters


@pytest.fixture(autouse=True)
def target_too_small(laboratory: Laboratory) -> None:
    budget = laboratory.target.budget_bytes
    if budget is None or budget >= FULL_TRAINING_BYTES:
        pytest.skip(f"{NOT_RUN}target {laboratory.target.name} is not smaller than what {LARGE} x baseline must hold")


def test_large_model_runs_out_of_memory_on_the_target(outcome_of: Train, laboratory: Laboratory) -> None:
    outcome = outcome_of(LARGE, "baseline")
    assert isinstance(outcome, OutOfMemory)
    assert outcome.phase in ("build", "evaluate", "forward", "backward", "optimizer")
    assert outcome.budget_bytes == laboratory.target.budget_bytes
    reserved = outcome.measured.peak_reserved_bytes
    assert reserved is not None and reserved <= outcome.budget_bytes
    assert not torch.cuda.is_initialized(), "this process, which trains nothing, holds a CUDA context"


def test_large_model_completes_a_step_with_the_cap_removed(outcome_of: Train, laboratory: Laboratory) -> None:
    if not laboratory.target.emulated_on(laboratory.device.name) or (laboratory.device.total_bytes or 0) < 32 * 2**30:
        pytest.skip(f"{NOT_RUN}the control needs a card with 32 GiB")
    outcome = outcome_of(LARGE, "baseline", target=NATIVE, max_steps=2)
    assert isinstance(outcome, Completed), outcome.reason
    peak = outcome.measured.peak_allocated_bytes
    assert peak is not None and peak > FULL_TRAINING_BYTES


def test_large_model_trains_within_the_target_by_qlora(outcome_of: Train, laboratory: Laboratory) -> None:
    outcome = outcome_of(LARGE, "qlora")
    assert isinstance(outcome, Completed), outcome.reason
    reserved, budget = outcome.measured.peak_reserved_bytes, laboratory.target.budget_bytes
    assert reserved is not None and budget is not None and reserved <= budget
