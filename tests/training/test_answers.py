"""Exact answers: as many as are right, padded or not, by either step; and nothing else changes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightweight import corpus, methods, models, targets
from lightweight.child import owner, worker
from lightweight.cli.train import Unattended
from lightweight.corpus import Conversation, Message, Rows, pair
from lightweight.corpus.conversation import Question, Task
from lightweight.training import answers, stock
from lightweight.training.meter import Meter
from lightweight.trial import Completed, Trial

pytestmark = pytest.mark.usefixtures("without_gpu")

PROMPTS = ("Hm?", "What do you say to that, if I may ask", "And?")


def asks(*expected: str, prompts: Sequence[str] = PROMPTS) -> Task:
    questions = zip(prompts, expected, strict=True)
    begun = [(Conversation((Message("user", prompt),), corpus.THERAPIST), answer) for prompt, answer in questions]
    return Task(tuple(Question(*of) for of in begun), "d")


def trial_of(model, small_corpus, method=methods.BASELINE, **changes):
    return Trial(
        **{
            "model": model,
            "method": method,
            "target": targets.CPU,
            "corpus": small_corpus,
            "max_length": 48,
            "max_steps": 2,
        }
        | changes
    )


@pytest.mark.parametrize("architecture", ["opt-tiny", "gpt-neo-tiny", "llama-tiny"])
def test_a_batch_padded_on_the_left_is_answered_as_each_prompt_alone(architecture, small_corpus, tmp_path):
    model = models.write(models.find(models.named(architecture))[0], tmp_path / "weights", seed=0)
    trial = trial_of(model, small_corpus)
    network = worker.build(trial, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # as drawn a network repeats one token, whatever it is asked
        for weight in network.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
    trainer = stock.make_trainer(trial, network, Rows([], 0), Meter(torch.device("cpu"), 0.0), Unattended(), tmp_path)
    tokenizer = models.load_tokenizer(model)
    questions = answers.encode(asks("a", "b", "c"), tokenizer)
    together = answers.answers(trainer, questions.each, 12, tokenizer)
    alone = [answers.answers(trainer, [one], 12, tokenizer)[0] for one in questions.each]
    assert together == alone
    assert len(set(alone)) > 1


def test_a_models_own_penalties_are_not_greedy(micro, small_corpus, tmp_path):
    trial = trial_of(micro, small_corpus)
    network = worker.build(trial, torch.device("cpu"))
    trainer = stock.make_trainer(trial, network, Rows([], 0), Meter(torch.device("cpu"), 0.0), Unattended(), tmp_path)
    tokenizer = models.load_tokenizer(micro)
    each = answers.encode(asks("a", "b", "c"), tokenizer).each
    plain = answers.answers(trainer, each, 12, tokenizer)
    own: Any = network.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size = 50.0, 1
    assert answers.answers(trainer, each, 12, tokenizer) == plain


@pytest.mark.parametrize("step", ["trainer", "captured"])
def test_what_was_learned_is_answered_and_the_training_is_the_same_without_a_task(step, micro, small_corpus, folder):
    """Every answer that is trained on is one word, so that it is the answer to anything."""
    train = tuple(pair(f"{prompt.messages[0].content}", "yes") for prompt in small_corpus.train)
    taught = replace(small_corpus, train=train, digest="taught")
    arguments = {"per_device_train_batch_size": 4, "learning_rate": 3e-3}
    method = replace(methods.BASELINE, name="taught", training_arguments=arguments, step=step)
    prompts = [corpus.conversation.contents(example)[0] for example in small_corpus.heldout]
    task = asks("yes", "yes", "yes", "no", prompts=prompts)
    trial = trial_of(micro, replace(taught, task=task), method, max_steps=150, max_length=96)
    with owner.Child(trial, folder) as child:
        outcome = child.finish()
    assert isinstance(outcome, Completed), outcome.reason
    measured = outcome.measured
    assert (measured.task_matches_before, measured.task_matches_after) == (0, 3)
    (folder.parent / "again").mkdir()
    with owner.Child(replace(trial, corpus=taught), folder.parent / "again") as child:
        without = child.finish()
    assert without.measured.train_loss == measured.train_loss
    assert (without.measured.task_matches_before, without.measured.task_matches_after) == (None, None)


def test_spaces_of_an_answer_are_compared_as_they_are(micro):
    tokenizer = models.load_tokenizer(micro)
    tokenizer.clean_up_tokenization_spaces = True  # as GPT-2's and OPT's tokenizers have it
    said = "3 , 4 .  5"
    assert answers._text([*tokenizer.encode(f" {said}", add_special_tokens=False), 1, 7], [1], tokenizer) == said


def test_ranks_share_no_task(micro, small_corpus):
    with pytest.raises(ValueError, match="a task is asked on one GPU: leave out --task, or --gpus-per-trial"):
        trial_of(micro, replace(small_corpus, task=asks("a", "b", "c")), world_size=2)
