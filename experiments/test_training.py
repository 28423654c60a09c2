"""Does it train here, how fast, and does the loss fall? One cell of model x method a test.

The original's four scripts are four of these cells: before_small (opt-350m x baseline), lightweight_small (opt-350m x
lora), before_big (gpt-neo-1.3b x baseline) and lightweight_big (gpt-neo-1.3b x qlora).
"""

from statistics import mean

from lightweight.plugin import Laboratory, Train
from lightweight.trial import Completed, OutOfMemory

# Cells that a T4 has no room for; every other cell of the known models has to fit it.
DOES_NOT_FIT_T4 = {("gpt-neo-1.3b", "baseline"), ("gpt-neo-1.3b", "lora")}


def test_training(train: Train, laboratory: Laboratory, model: str, method: str) -> None:
    outcome = train(model, method)

    if isinstance(outcome, OutOfMemory):
        # An answer, not an accident, where it is known of this target; it stays a row of the table.
        expected = (model, method) in DOES_NOT_FIT_T4 or laboratory.target.name != "t4"
        assert expected, f"{model} x {method} no longer fits {laboratory.target.name}: {outcome.reason}"
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
