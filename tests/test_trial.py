import pickle
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest

from experiments import test_training as training_experiment
from lightweight import targets
from lightweight.corpus import Conversation, Message, Text
from lightweight.methods import BASELINE, LORA, LORA_CAPTURED, QLORA
from lightweight.models import OPT_350M
from lightweight.trial import Completed, Measurements, Trial


@pytest.fixture
def trial(small_corpus):
    return Trial(model=OPT_350M, method=QLORA, target=targets.T4, corpus=small_corpus)


def test_the_original_job_is_130_steps_of_2048_tokens(trial):
    pairs = trial.corpus.train * 5
    for method in (BASELINE, LORA, QLORA):
        job = replace(trial, method=method, corpus=replace(trial.corpus, train=pairs))
        assert len(pairs) == 100
        assert (job.steps, job.rounds, job.steps_per_epoch, job.tokens_per_step) == (130, 10, 13, 2048)


@pytest.mark.parametrize(("max_steps", "rounds"), [(1, 1), (3, 1), (4, 2), (7, 3)])
def test_a_job_cut_short_has_the_rounds_it_needs(trial, max_steps, rounds):
    assert trial.steps_per_epoch == 3
    assert replace(trial, max_steps=max_steps).rounds == rounds


def test_a_trial_crosses_a_process_boundary_whole(trial):
    assert repr(pickle.loads(pickle.dumps(trial))) == repr(trial)


def test_bf16_on_a_target_without_it_is_refused(trial):
    method = replace(LORA, name="mine", training_arguments={"bf16": True})
    with pytest.raises(ValueError, match=r"method mine computes in bf16, which target t4 does not have: use fp16"):
        replace(trial, method=method)
    assert replace(trial, method=method, target=targets.L4).method is method


def test_a_method_runs_in_the_format_that_device_and_target_have(trial):
    trial = replace(trial, method=LORA_CAPTURED)
    assert trial.running_method.weights_dtype == "float32"  # no GPU
    assert replace(trial, device_index=0).running_method.weights_dtype == "float16"  # a T4
    assert replace(trial, device_index=0, target=targets.L4).running_method.weights_dtype == "bfloat16"


def test_an_adapter_learns_nothing_from_random_weights(trial):
    random, pretrained = (replace(OPT_350M, weights=weights) for weights in ("random", "pretrained"))
    assert not replace(trial, model=random).can_learn
    assert replace(trial, model=random, method=BASELINE).can_learn
    assert replace(trial, model=pretrained).can_learn


def test_cold_seconds_leave_the_heldout_evaluations_out():
    measured = Measurements(phase_seconds={"start": 1.0, "build": 2.0, "evaluate": 100.0, "train": 4.0, "save": 8.0})
    assert measured.cold_seconds == 15.0


def test_pairs_are_padded_as_the_original_scripts_do_and_others_to_the_longest_of_a_batch(trial):
    talk = Conversation((Message("user", "Hi"), Message("assistant", "Hello")))
    assert (trial.corpus.kind, trial.pads_to_max) == ("pairs", True)
    for train, kind in (((talk,), "conversations"), ((Text("", "Once"),), "texts")):
        of_it = replace(trial, corpus=replace(trial.corpus, train=train))
        assert (of_it.corpus.kind, of_it.pads_to_max) == (kind, False)
        assert replace(of_it, padding="max").pads_to_max
    assert not replace(trial, padding="longest").pads_to_max


def test_steps_are_those_of_the_rows_that_examples_became(trial):
    assert trial.with_rows(None) is trial
    split = replace(trial, epochs=2).with_rows(41)
    assert (split.steps_per_epoch, split.steps, split.rounds) == (6, 12, 2)
    assert replace(split, max_steps=7).rounds == 2


@pytest.mark.parametrize(
    ("after", "ends"), [(1.0, nullcontext()), (3.0, pytest.raises(AssertionError, match="held-out"))]
)
def test_of_a_trial_of_one_step_the_held_out_loss_is_the_answer(micro, small_corpus, after, ends):
    """As where a batch has the whole corpus: there is no later training loss to compare with."""
    trial = Trial(model=micro, method=BASELINE, target=targets.CPU, corpus=small_corpus, max_steps=1)
    measured = Measurements(train_loss=(2.0,), step_seconds=(1.0,), heldout_loss_before=2.0, heldout_loss_after=after)
    laboratory = SimpleNamespace(takes_long=lambda _: False, trial=lambda *_: trial, has_cuda=False)
    with ends:
        training_experiment.test_training(lambda *_: Completed(measured=measured), laboratory, "micro", "baseline")  # type: ignore[arg-type]
