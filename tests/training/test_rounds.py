"""Rounds are epochs of one training, and a callback of their own begins and ends them."""

from dataclasses import replace

import pytest

from training.test_stock import prepare

pytestmark = pytest.mark.usefixtures("without_gpu")


def test_a_round_is_an_epoch_and_training_goes_on_from_round_to_round(trial, folder):
    trainer, _, meter, owner = prepare(trial, folder)
    trainer.train()
    assert owner.requests == ["begin", "round", "round"]
    assert (owner.rounds, owner.steps) == (2, trial.steps) == (2, 6)
    losses = meter.measurements().train_loss
    assert len(losses) == 6
    assert trainer.state.global_step == 6
    assert losses[-1] < losses[0]


def test_max_steps_cut_the_job_short(trial, folder):
    trainer, _, _, owner = prepare(replace(trial, max_steps=4), folder)
    trainer.train()
    assert (owner.steps, owner.rounds) == (4, 2)
