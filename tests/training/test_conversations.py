"""What a conversation in one row trains is what its turns in rows of their own train, and long ones train too."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from captured.test_architectures import small
from transformers import ByT5Tokenizer

from lightweight import corpus, models, targets
from lightweight.captured import loop
from lightweight.child import owner, worker
from lightweight.corpus import Conversation, Corpus, Message, Rows
from lightweight.forecast import tracer
from lightweight.methods import BASELINE, LORA, CapturedStep
from lightweight.models import LLAMA_TINY, Model
from lightweight.training import stock
from lightweight.training.meter import Meter
from lightweight.trial import Completed, Crashed, Trial
from training.test_stock import Unattended

CPU = torch.device("cpu")
TALKS = tuple(
    Conversation(
        (
            *(Message("user", f"Hello {number}"), Message("assistant", "Good morning to you" * (1 + number % 2))),
            *(Message("user", "And now?"), Message("assistant", "Sleep well" * (1 + number % 3))),
        )
    )
    for number in range(4)
)


RECURRENT = (
    *("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lfm2", "mamba", "mamba2", "minimax"),
    *("nemotron_h", "olmo_hybrid", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2"),
)
"""Whose tokens see those before them by a state, of one row, whatever the positions and masks say."""

QUICK = ("qwen3_next", "recurrent_gemma")
"""The sample of them; `--every-architecture` takes all. Scans without their own kernels take a minute each."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "recurrent" in metafunc.fixturenames:
        every = metafunc.config.getoption("every_architecture", False)
        metafunc.parametrize("recurrent", RECURRENT if every else QUICK)


def rows_apart(tokenizer):
    """Each answer in a row of its own, behind the same history."""
    firsts = [corpus.encode_whole(replace(talk, messages=talk.messages[:2]), tokenizer) for talk in TALKS]
    return [*firsts, *(corpus.encode_whole(talk, tokenizer, "last") for talk in TALKS)]


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(
    ("step", "note", "padding"),
    [
        ("trainer", None, "longest"),
        ("trainer", None, "max"),
        (CapturedStep(packing=False), "no GPU", "longest"),
        (CapturedStep(packing=False), "no GPU", "max"),
        (CapturedStep(packing=True), "packing makes", "max"),
    ],
    ids=["stock", "stock-max", "captured", "captured-max", "packed"],
)
def test_two_turns_in_one_row_give_the_loss_of_two_rows(micro, folder, step, note, padding, passes):
    notes = check_that_turns_are_rows(micro, folder, step, padding, passes)
    assert all(note is None or (note in told and "given up" not in told) for told in notes)


@pytest.mark.parametrize(
    "step",
    ["trainer", CapturedStep(packing=False), CapturedStep(packing=True)],
    ids=["stock", "captured", "packed"],
)
def test_or_where_a_state_goes_through_a_row_that_is_not_packed(recurrent: str, step: Any, tmp_path: Path) -> None:
    network = small(recurrent)
    if isinstance(network, str):
        assert recurrent not in QUICK, network
        pytest.skip(f"not run: {recurrent} is not made small: {network}")
    network.save_pretrained(tmp_path / "model")
    ByT5Tokenizer().save_pretrained(tmp_path / "model")
    model, _ = models.find(models.named(str(tmp_path / "model")), "pretrained")
    notes = check_that_turns_are_rows(model, tmp_path, step, "longest", passes=2)
    if isinstance(step, CapturedStep) and step.packing and recurrent in QUICK:  # a small lfm2 has attention alone
        assert "packing given up: " in notes[1], notes


def check_that_turns_are_rows(model: Model, folder: Path, step: Any, padding: Any, passes: int) -> list[str]:
    """The losses of two steps, so that the first step's gradients are compared as well; fp32, no dropout. Returns what
    captured steps note."""
    tokenizer = models.load_tokenizer(model)
    together = [corpus.encode_whole(talk, tokenizer) for talk in TALKS]
    losses, notes = [], []
    for each in (together, rows_apart(tokenizer)):
        arguments = {"per_device_train_batch_size": len(each) // passes, "gradient_accumulation_steps": passes}
        method = replace(BASELINE, step=step, training_arguments=arguments | {"learning_rate": 1e-3})
        data = Corpus(train=(*TALKS, *TALKS)[: len(each)], heldout=TALKS[:1], digest="")
        trial = Trial(
            model=model, method=method, target=targets.CPU, corpus=data, max_steps=2, padding=padding, max_length=256
        )
        rows = Rows(each, tokenizer.pad_token_id, 256 if padding == "max" else None)
        meter = Meter(CPU, 0.0)
        trainer = stock.make_trainer(trial, worker.build(trial, CPU), rows, meter, Unattended(), folder)
        if step == "trainer":
            trainer.train()
        else:
            job = loop.prepare(trial, trainer, rows, meter)
            assert job is not None
            job.train()
        losses.append(meter.measurements().train_loss)
        notes.append(str(meter.facts.get("capture_note")))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][0] != pytest.approx(losses[0][1], abs=1e-3)
    return notes


LONG = tuple(
    Conversation(
        tuple(
            message
            for turn in range(12)
            for message in (
                Message("user", f"Question {turn} of {number}? " * 3),
                Message("assistant", f"The answer to {turn} is {number}. " * 6),
            )
        )
    )
    for number in range(9)
)
"""Nine of some 2,500 bytes each."""


@pytest.fixture(scope="module")
def llama_tiny(tmp_path_factory):
    found, _ = models.find(LLAMA_TINY)
    return models.write(found, tmp_path_factory.mktemp("llama-tiny"), seed=0)


CAPTURED = replace(LORA, step="captured", name="lora-captured")


@pytest.mark.parametrize(
    ("method", "long"),
    [(CAPTURED, "cut"), (BASELINE, "cut"), (BASELINE, "split"), (BASELINE, "drop")],
    ids=["captured-cut", "stock-cut", "stock-split", "stock-drop"],
)
def test_a_corpus_of_2048_tokens_a_row_trains(llama_tiny, folder, method, long):
    method = method.with_batch(2).with_learning_rate(1e-3)
    few = tuple(replace(talk, messages=talk.messages[:4]) for talk in LONG[:4])
    data = Corpus(train=(*LONG[:4], *few), heldout=(*LONG[4:5], *few[:1]), digest="")
    given = Trial(
        model=llama_tiny,
        method=method,
        target=targets.CPU,
        corpus=data,
        epochs=2,
        max_length=2048,
        long=long,
    )
    with owner.Child(given, folder) as child:
        rows = {"cut": 8, "split": 12, "drop": 4}[long]
        assert (child.trial.rows, child.trial.steps) == (rows, rows)
        outcome = child.finish()
    assert isinstance(outcome, Completed), outcome.reason
    measured = outcome.measured
    assert (measured.training_rows, len(measured.train_loss)) == (rows, rows)
    told = {"cut": (4, 0, 0), "split": (0, 4, 0), "drop": (0, 0, 4)}[long]
    assert (measured.truncated_sequences, measured.split_examples, measured.dropped_examples) == told
    assert measured.train_loss[-1] < measured.train_loss[0]
    if long == "cut":
        assert max(measured.step_padded_tokens) > 2 * 1800
    assert sum(measured.step_tokens) <= sum(measured.step_padded_tokens)
    if method.captured_step is None:
        longest, _ = tracer._longest_batches(*tracer._with_rows(given))
        assert max(measured.step_padded_tokens) <= 2 * longest.max_length <= 2 * 2048


def test_where_every_conversation_is_dropped_that_is_one_line(micro, folder):
    data = Corpus(train=LONG[:4], heldout=LONG[4:5], digest="")
    trial = Trial(
        model=micro, method=BASELINE, target=targets.CPU, corpus=data, max_steps=1, max_length=64, long="drop"
    )
    with owner.Child(trial, folder) as child:
        outcome = child.finish()
    assert isinstance(outcome, Crashed)
    expected = "each of its 4 examples to train on is longer than 64 tokens and was dropped: cut or split them"
    assert expected in outcome.reason
    assert "\n" not in outcome.reason
