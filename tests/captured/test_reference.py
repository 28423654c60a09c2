"""The Trainer's own step, of as much as there is memory for."""

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from torch.utils.data import SequentialSampler
from transformers.modeling_layers import GradientCheckpointingLayer

from captured.conftest import lora, method, run
from captured.test_check import drops_a_weight, halves_a_gradient
from lightweight.captured import loop, reference, sample


@pytest.mark.parametrize("other", ["order", "number"])
def test_rows_that_the_trainer_draws_otherwise_are_its_own_to_train(prepare, other):
    trainer, rows, meter, trial = prepare("opt", method(per_device_train_batch_size=6))
    trial = dataclasses.replace(trial, max_steps=None, epochs=1)
    if other == "order":
        trainer._get_train_sampler = lambda *_: SequentialSampler(rows)
    else:
        trainer.args.dataloader_drop_last = True  # of 20 rows, two
    _, note = run(trainer, rows, meter, trial)
    assert note.endswith("the Trainer runs the steps, since it draws other rows than the captured step")


@pytest.mark.parametrize("fits", [3, 1])
def test_as_many_dialogues_are_compared_as_the_trainers_step_has_memory_for(prepare, monkeypatch, fits):
    real, seen = reference.Reference._gradients, []

    def short_of_memory(reference, sample, scale):
        if sample.size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        seen.append(sample.size)
        return real(reference, sample, scale)

    monkeypatch.setattr(reference.Reference, "_gradients", short_of_memory)
    drops_a_weight(monkeypatch)
    trainer, rows, meter, trial = prepare("opt", method())
    assert loop.CapturedTraining(trial, trainer, rows, meter).prepare()
    assert seen and max(seen) <= fits
    assert "loss given up" in meter.facts["capture_note"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("none left"), RuntimeError("no kernel for fp32")])
def test_where_fp32_cannot_be_had_halves_are_compared(prepare, monkeypatch, error):
    gradients = reference.Reference._gradients
    asked = []

    def short(reference, sample, scale, autocast=None):
        asked.append(next(reference._model.parameters()).dtype)
        if autocast is not None:
            raise error
        return gradients(reference, sample, scale)

    monkeypatch.setattr(reference.Reference, "_gradients", short)
    step = dataclasses.replace(method(lora()), weights_dtype="bfloat16")
    trainer, rows, meter, trial = prepare("opt", step, torch.bfloat16)
    job = loop.CapturedTraining(trial, trainer, rows, meter)
    assert job.prepare()
    assert asked == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert "given up" not in meter.facts["capture_note"] and job.step.parts.lean


def test_as_much_is_compared_in_fp32_as_there_is_memory_for(prepare, monkeypatch):
    gradients = reference.Reference._gradients
    sizes = []

    def short(reference, sample, scale, autocast=None):
        if autocast is not None:
            sizes.append(sample.size)
            if sample.size > 2:
                raise torch.OutOfMemoryError("none left")
        return gradients(reference, sample, scale, autocast)

    monkeypatch.setattr(reference.Reference, "_gradients", short)
    step = dataclasses.replace(method(lora()), weights_dtype="bfloat16")
    trainer, rows, meter, trial = prepare("gpt_neo", step, torch.bfloat16)
    assert loop.CapturedTraining(trial, trainer, rows, meter).prepare()
    assert sizes[-2:] == [4, 2]
    assert "compared in fp32: " in meter.facts["capture_note"] and "given up" not in meter.facts["capture_note"]


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_where_there_is_no_memory_for_one_dialogue_its_layers_are_computed_twice(prepare, monkeypatch, architecture):
    gradients = reference.Reference._gradients
    found = []

    def short(reference, sample, scale, autocast=None):
        twice = [layer.gradient_checkpointing for layer in reference._model.modules() if is_recomputable(layer)]
        if not all(twice):
            raise torch.OutOfMemoryError("none left")
        found.append((sample.size, gradients(reference, sample, scale, autocast)))
        return found[-1][1]

    monkeypatch.setattr(reference.Reference, "_gradients", short)
    trainer, rows, meter, trial = prepare(architecture, method(lora()))
    job = loop.CapturedTraining(trial, trainer, rows, meter)
    assert job.prepare()
    assert "given up" not in meter.facts["capture_note"]
    assert {size for size, _ in found} == {1}
    assert not any(layer.gradient_checkpointing for layer in trainer.model.modules() if is_recomputable(layer))


@pytest.mark.parametrize(("fault", "note"), [(None, None), (halves_a_gradient, "lean given up: ")])
def test_where_there_is_no_memory_for_a_whole_dialogue_its_end_is_compared(prepare, monkeypatch, fault, note):
    gradients = reference.Reference._gradients
    tried = []

    def short(reference, sample, scale, autocast=None):
        tried.append((sample.size, sample.tokens))
        if sample.tokens is None or sample.tokens > 20:
            raise torch.OutOfMemoryError("none left")
        return gradients(reference, sample, scale, autocast)

    monkeypatch.setattr(reference.Reference, "_gradients", short)
    monkeypatch.setattr(sample, "LEAST_TOKENS", 10)
    if fault is not None:
        fault(monkeypatch)
    trainer, rows, meter, trial = prepare("llama", method(lora()))
    assert loop.CapturedTraining(trial, trainer, rows, meter).prepare()
    compared = [tokens for _, tokens in tried if tokens is not None and tokens <= 20]
    assert f"compared over the last {min(compared)} tokens of a row" in meter.facts["capture_note"]
    assert ("given up: " in meter.facts["capture_note"]) == (fault is not None)
    assert note is None or note in meter.facts["capture_note"]


def test_where_there_is_no_memory_for_the_end_of_a_dialogue_there_is_none(prepare, monkeypatch):
    def short(*_):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(reference.Reference, "_gradients", short)
    trainer, rows, meter, trial = prepare("llama", method(lora()))
    with pytest.raises(torch.OutOfMemoryError, match="no room for the Trainer's step of 512 tokens"):
        loop.CapturedTraining(trial, trainer, rows, meter).prepare()


def test_nothing_of_an_attempt_without_memory_is_left_at_the_next(prepare, monkeypatch):
    gradients = reference.Reference._gradients
    held: list[Any] = []
    left: list[list[bool]] = []

    def short(reference, sample, scale, autocast=None):
        left.append([each() is not None for each in held])
        activations = torch.zeros(1)
        held.append(weakref.ref(activations))
        twice = [layer.gradient_checkpointing for layer in reference._model.modules() if is_recomputable(layer)]
        if sample.tokens is None or not all(twice):
            raise torch.OutOfMemoryError("none left")
        return gradients(reference, sample, scale, autocast)

    monkeypatch.setattr(reference.Reference, "_gradients", short)
    monkeypatch.setattr(sample, "LEAST_TOKENS", 10)
    trainer, rows, meter, trial = prepare("llama", method(lora()))
    assert loop.CapturedTraining(trial, trainer, rows, meter).prepare()
    assert len(left) > 4
    assert not any(map(any, left))


def is_recomputable(module):
    return isinstance(module, GradientCheckpointingLayer)
