"""Does it train here, how fast, and does the loss fall? One cell of model x method a test.

The original's four scripts are four of these cells: before_small (opt-350m x baseline), lightweight_small (opt-350m x
lora), before_big (gpt-neo-1.3b x baseline) and lightweight_big (gpt-neo-1.3b x qlora).
"""

from statistics import mean

from lightweight.plugin import Laboratory, Train
from lightweight.trial import Completed, OutOfMemory

# What the committed record shows to fit a T4: there, running out of memory is a regression. Elsewhere it is an answer.
FITS_T4 = {
    ("opt-350m", "baseline"),
    ("opt-350m", "lora"),
    ("opt-350m", "qlora"),
    ("gpt-neo-1.3b", "qlora"),
}


def test_training(train: Train, laboratory: Laboratory, model: str, method: str) -> None:
    outcome = train(model, method)

    if isinstance(outcome, OutOfMemory):
        fitted = laboratory.target.name == "t4" and (model, method) in FITS_T4
        assert not fitted, f"{model} x {method} no longer fits a T4: {outcome.reason}"
        return
    assert isinstance(outcome, Completed), f"{model} x {method} {outcome.kind}: {outcome.reason}"

    trial = laboratory.trial(model, method)
    loss = outcome.measured.train_loss
    assert len(loss) == len(outcome.measured.step_seconds) == trial.steps
    if trial.can_learn:
        window = min(trial.steps_per_epoch, len(loss) // 2)
        assert mean(loss[-window:]) < mean(loss[:window]), "training loss did not fall"
        before, after = outcome.measured.heldout_loss_before, outcome.measured.heldout_loss_after
        assert before is not None and after is not None and after < before, "held-out loss did not fall"
