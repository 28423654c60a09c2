"""Does it train here, how fast, and does the loss fall? One cell of model x method a test.

The original's four scripts are four of these cells: before_small (opt-350m x baseline), lightweight_small (opt-350m x
lora), before_big (gpt-neo-1.3b x baseline) and lightweight_big (gpt-neo-1.3b x qlora).
"""

from statistics import mean

import pytest

from lightweight.plugin import NOT_RUN, Laboratory, Train
from lightweight.trial import Completed, OutOfMemory


def test_training(train: Train, laboratory: Laboratory, model: str, method: str) -> None:
    if laboratory.takes_long(model):
        pytest.skip(f"{NOT_RUN}many minutes a cell on a CPU; --epochs 2 trains them")

    outcome = train(model, method)
    trial = laboratory.trial(model, method)

    if isinstance(outcome, OutOfMemory):
        # Running out of memory is an answer where it was forecast, and a failure where it was not, nor could be.
        forecast = laboratory.try_to_forecast(trial)
        assert forecast is not None, f"{trial.name} was not forecast: {outcome.reason}"
        assert forecast.verdict != "fits", f"{trial.name} was forecast to fit: {outcome.reason}"
        return
    assert isinstance(outcome, Completed), f"{trial.name} {outcome.kind}: {outcome.reason}"
    if laboratory.has_cuda and (forecast := laboratory.try_to_forecast(trial)) is not None:
        assert forecast.verdict != "does_not_fit", f"{trial.name} was forecast not to fit, and does"

    loss = outcome.measured.train_loss
    assert len(loss) == len(outcome.measured.step_seconds)
    if not trial.method.own_code:  # a callback of somebody's may end early, which the record says
        assert len(loss) == trial.steps
    if trial.can_learn:
        window = min(trial.steps_per_epoch, len(loss) // 2)  # none of a single step: only the held-out loss can fall
        has_own_scale = trial.method.compute_loss is not None or trial.method.trainer is not None
        if window and not has_own_scale:
            assert mean(loss[-window:]) < mean(loss[:window]), "training loss did not fall"
        before, after = outcome.measured.heldout_loss_before, outcome.measured.heldout_loss_after
        assert before is not None and after is not None and after < before, "held-out loss did not fall"
