import dataclasses
from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.trainer_pt_utils import LabelSmoother

from captured import flash_reference
from captured.conftest import CONFIGS, LENGTH, WIDE, lora, method, run
from lightweight.captured import (
    agreement,
    attention,
    check,
    flash,
    loop,
    packing,
    passes,
    projections,
    reference,
)
from lightweight.captured.agreement import Tolerance
from lightweight.captured.packing import Buffers
from lightweight.internals import torch as torch_internals
from lightweight.methods import CapturedStep


@pytest.fixture
def losses(prepare):
    """The Trainer's losses of a job, the captured step's, and its note."""

    def losses(architecture, method, **more):
        theirs, _ = run(*prepare(architecture, dataclasses.replace(method, step="trainer"), **more))
        ours, note = run(*prepare(architecture, method, **more))
        return theirs, ours, note

    return losses


@pytest.mark.parametrize(
    ("architecture", "given_up"),
    [
        ("llama", []),
        ("mistral", []),  # its window is shorter than a row
        ("mamba", ["packing"]),  # a state runs along the row
        ("qwen3_next", ["packing"]),
        ("mixtral", ["loss"]),  # the router's
        ("cohere", ["loss"]),  # logits are scaled
        ("gemma2", ["attention and with it packing", "loss"]),  # both are capped
        ("bart", ["packing", "loss"]),  # labels are not shifted, positions are not given
        ("bloom", ["attention and with it packing"]),  # asks no registry
    ],
)
def test_captured_losses_are_the_trainers_in_any_architecture(losses, architecture, given_up):
    theirs, ours, note = losses(architecture, method())
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert note.startswith("packing makes")
    assert [part.split(" given up: ")[0] for part in note.split("; ") if "given up" in part] == given_up
    assert note.endswith("no GPU: the same step without a graph")


@pytest.mark.parametrize(
    ("adapter", "given_up"),
    [
        (lora(), []),
        (lora(target_modules=["q_proj", "lm_head"]), ["loss"]),
        (peft.IA3Config(task_type="CAUSAL_LM"), []),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), ["packing", "loss"]),
    ],
    ids=["lora", "lora of the head", "ia3", "prompt tuning"],
)
def test_captured_losses_are_the_trainers_with_any_adapter(losses, adapter, given_up):
    theirs, ours, note = losses("llama", method(adapter))
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert [part.split(" given up: ")[0] for part in note.split("; ") if "given up" in part] == given_up


@pytest.mark.parametrize("architecture", ["phi3", "qwen2"])  # LongRoPE, and dynamic rotary embeddings
@pytest.mark.parametrize("step", [CapturedStep(), CapturedStep(packing=False)], ids=["packed", "alone"])
def test_a_network_that_turns_by_the_longest_row_of_a_pass_has_the_trainers_passes(losses, architecture, step):
    """Longest rows and first ones show nothing of it, where each has a long one beside it."""
    alone = method(step=step, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    theirs, ours, note = losses(architecture, alone, padded_to=None)
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert "the Trainer runs the steps, since no captured one is its: a row moves by" in note
    theirs, ours, note = losses(architecture, alone)  # which all end at one place
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert note.endswith("no GPU: the same step without a graph")
    assert ("packing given up: a row moves by" in note) == step.packing


def test_a_network_that_takes_no_positions_is_captured_with_one_dialogue_a_row(losses, monkeypatch):
    forward = LlamaModel.forward

    def refusing(model, *arguments, position_ids=None, **options):
        if position_ids is not None:
            raise ValueError("positions of three dimensions are needed")
        return forward(model, *arguments, **options)

    monkeypatch.setattr(LlamaModel, "forward", refusing)
    alone = method(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    theirs, ours, note = losses("llama", alone, padded_to=None)
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert note == "packing would make 16 rows of 16; no GPU: the same step without a graph"


@pytest.mark.parametrize("architecture", ["mixtral", "bart", "llama"])
def test_accumulated_passes_are_the_trainers_also_where_the_model_computes_its_own_loss(losses, architecture):
    accumulated = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}  # of 20: the last step is short
    theirs, ours, note = losses(architecture, method(**accumulated))
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert "the Trainer runs the steps" not in note


def forgets_its_mask(monkeypatch):
    monkeypatch.setattr(attention, "packed", lambda dialogues: nullcontext())


def counts_positions_through(monkeypatch):
    fill = Buffers.fill

    def wrong(buffers, *arguments):
        fill(buffers, *arguments)
        buffers.position_ids.copy_(torch.arange(buffers.shape.time))

    monkeypatch.setattr(Buffers, "fill", wrong)


def scales_its_scores(monkeypatch):
    forward = attention._OPTAttention.forward

    def wrong(layer, hidden_states, **options):
        return forward(layer, 1.05 * hidden_states, **options)

    monkeypatch.setattr(attention._OPTAttention, "forward", wrong)


def looks_ahead(monkeypatch):
    monkeypatch.setattr(attention, "_mask", lambda *_, q_length, **__: torch.ones(1, 1, q_length, q_length).bool())
    monkeypatch.setattr(
        attention.AttentionMaskInterface,
        "_global_mapping",
        attention.AttentionMaskInterface._global_mapping | {attention.NAME: attention._mask},
    )


def drops_a_weight(monkeypatch):
    real = passes.linear_cross_entropy

    def wrong(hidden, head, bias, tokens, weights):
        return real(hidden, head, bias, tokens, torch.cat([torch.zeros(1), weights[1:]]))

    monkeypatch.setattr(passes, "linear_cross_entropy", wrong)


def halves_a_gradient(monkeypatch):
    real = projections._adapter_backward

    def wrong(*arguments):
        a, b = real(*arguments)
        return a / 2, b

    monkeypatch.setattr(projections, "_adapter_backward", wrong)


def raises(monkeypatch):
    def wrong(*_):
        raise IndexError("index 256 is out of bounds\nand more")

    monkeypatch.setattr(projections.Family, "project", wrong)


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        (forgets_its_mask, "packing given up: "),
        (counts_positions_through, "packing given up: its loss is "),
        (scales_its_scores, "attention and with it packing given up: its loss is "),
        (drops_a_weight, "loss given up: its loss is "),
        (halves_a_gradient, "lean given up: its loss is "),
        (raises, "lean given up: its step fails (IndexError: index 256 is out of bounds);"),
    ],
)
def test_a_fault_in_a_part_costs_that_part_alone(losses, monkeypatch, fault, part):
    fault(monkeypatch)
    theirs, ours, note = losses("opt", method(lora()))
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert part in note
    assert note.count("given up") == 1


@pytest.mark.parametrize("limit", [-1.0, 0, 0.01])
def test_gradients_are_clipped_where_the_trainer_clips_them(losses, limit):
    theirs, ours, _ = losses("llama", method(max_grad_norm=limit))
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_dialogues_are_seen_to_be_apart_under_reentrant_checkpointing(losses):
    arguments = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    theirs, ours, note = losses("llama", method(lora(), **arguments))
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert "given up" not in note
    _, _, note = losses("mamba", method(lora(target_modules=["x_proj"]), **arguments))
    assert "of a dialogue's gradient reaches other dialogues of its row" in note


def test_an_attention_that_looks_ahead_is_given_up(losses, monkeypatch):
    looks_ahead(monkeypatch)
    theirs, ours, note = losses("opt", method(lora(), CapturedStep(packing=False)))
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert note.startswith("attention given up: its loss is ")


def test_two_faults_cost_two_parts(losses, monkeypatch):
    drops_a_weight(monkeypatch)
    halves_a_gradient(monkeypatch)
    theirs, ours, note = losses("opt", method(lora()))
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert "loss given up" in note and "lean given up" in note and note.count("given up") == 2


def test_where_nothing_agrees_the_trainer_runs_the_steps_from_the_same_weights(prepare):
    """Here since the Trainer smooths labels, which no part knows of."""
    results = []
    for step in ("trainer", "captured"):
        trainer, rows, meter, trial = prepare("opt", dataclasses.replace(method(lora(lora_dropout=0.1)), step=step))
        trainer.label_smoother = LabelSmoother(0.3)
        results.append(run(trainer, rows, meter, trial))
        assert trainer.state.global_step == 4
    (theirs, _), (ours, note) = results
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert meter.facts["captured"] is False and meter.facts["compiled"] is False
    assert "the Trainer runs the steps, since no captured one is its: its loss is " in note


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_bit_for_bit_and_in_their_own_format_after_a_step_that_is_withdrawn(prepare, dtype):
    step = dataclasses.replace(method(), weights_dtype="bfloat16")
    trainer, rows, meter, trial = prepare("opt", step, dtype)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.label_smoother = LabelSmoother(0.9)
    assert loop.CapturedTraining(trial, trainer, rows, meter).prepare() is False
    for name, weight in trainer.model.named_parameters():
        assert weight.dtype == dtype and torch.equal(weight, before[name]), name
        assert weight.grad is None


def test_the_comparison_leaves_no_trace_in_what_is_trained(prepare, monkeypatch):
    """Dropout's numbers, moments, schedule and all: the same bits with and without it."""
    dropping = method(lora(lora_dropout=0.2))

    def job():
        trainer, rows, meter, trial = prepare("opt", dropping)
        trial = dataclasses.replace(trial, max_steps=20)
        state = torch.get_rng_state()
        job = loop.CapturedTraining(trial, trainer, rows, meter)
        assert job.prepare()
        assert torch.equal(torch.get_rng_state(), state)
        job.train()
        return meter.measurements().train_loss

    compared = job()
    monkeypatch.setattr(agreement, "search", lambda parts, losses, measure: (parts, []))
    monkeypatch.setattr(reference.Reference, "gradients", lambda reference, sample: (sample, None))
    assert job() == compared
    assert len(compared) == 20


def test_layers_that_are_left_out_by_chance_are_the_trainers(prepare, monkeypatch):
    monkeypatch.setitem(CONFIGS, "opt", CONFIGS["opt"] | {"layerdrop": 0.1})
    trainer, rows, meter, trial = prepare("opt", method())
    assert loop.prepare(trial, trainer, rows, meter) is None
    assert "since its layers are left out by chance (layerdrop=0.1)" in meter.facts["capture_note"]


def test_out_of_memory_of_what_was_asked_for_is_that(prepare, monkeypatch):
    def short_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer, rows, meter, trial = prepare("opt", method())
    monkeypatch.setattr(passes, "linear_cross_entropy", short_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        loop.CapturedTraining(trial, trainer, rows, meter).prepare()


@pytest.mark.parametrize(
    ("architecture", "adapter", "precision"),
    [("llama", lora(lora_dropout=0.1), "bfloat16"), ("opt", None, "bfloat16"), ("opt", lora(), "float16")],
)
def test_half_precision_rounds_but_gives_nothing_up(prepare, architecture, adapter, precision):
    step = dataclasses.replace(method(adapter), weights_dtype=precision)
    trainer, rows, meter, trial = prepare(architecture, step, getattr(torch, precision))
    job = loop.CapturedTraining(trial, trainer, rows, meter)
    assert job.prepare()
    assert "given up" not in meter.facts["capture_note"]
    assert job.step.parts.packing


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_what_passes_for_the_rounding_of_a_half_is_found_in_fp32(prepare, monkeypatch, architecture):
    halves_a_gradient(monkeypatch)
    step = dataclasses.replace(method(lora()), weights_dtype="bfloat16")
    trainer, rows, meter, trial = prepare(architecture, step, torch.bfloat16)
    assert loop.CapturedTraining(trial, trainer, rows, meter).prepare()
    assert "lean given up: " in meter.facts["capture_note"]


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_what_half_precision_makes_of_a_deep_network_is_compared_in_fp32(prepare, precision):
    """Its attention, which does not scale its products, enlarges the last digit of a half until no gradient is left."""
    step = dataclasses.replace(method(lora()), weights_dtype=precision)
    trainer, rows, meter, trial = prepare("gpt_neo", step, getattr(torch, precision))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    job = loop.CapturedTraining(trial, trainer, rows, meter)
    assert job.prepare()
    note = meter.facts["capture_note"]
    assert "compared in fp32: " in note and "given up" not in note
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name].to(tensor.dtype)), name


ON_EXPERTS = {"target_modules": ["q_proj", "v_proj"]}
ON_EXPERTS |= {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
def test_adapters_on_experts_are_trained_as_the_trainer_trains_them(prepare, monkeypatch, architecture):
    monkeypatch.setitem(CONFIGS, architecture, {"rms_norm_eps": 1e-5} | CONFIGS.get(architecture, WIDE | FEW_EXPERTS))
    on_experts = method(lora(**ON_EXPERTS))
    theirs, _ = run(*prepare(architecture, dataclasses.replace(on_experts, step="trainer")))
    ours, note = run(*prepare(architecture, on_experts))
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert theirs[-1] != pytest.approx(theirs[0], abs=1e-4)
    assert "the Trainer runs" not in note


FEW_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        (forgets_its_mask, "packing given up: "),
        (counts_positions_through, "packing given up: its loss is "),
        (halves_a_gradient, "lean given up: its loss is "),
        (drops_a_weight, "loss given up: its loss is "),
    ],
)
def test_a_fault_is_found_where_half_precision_leaves_no_gradient(prepare, monkeypatch, fault, part):
    fault(monkeypatch)
    step = dataclasses.replace(method(lora()), weights_dtype="bfloat16")
    trainer, rows, meter, trial = prepare("gpt_neo", step, torch.bfloat16)
    assert loop.CapturedTraining(trial, trainer, rows, meter).prepare()
    assert part in meter.facts["capture_note"]


def test_a_state_that_half_precision_would_hide_is_found(prepare):
    """Its share in a gradient is less than what bf16 rounds; that it is not 0 tells."""
    step = dataclasses.replace(method(), weights_dtype="bfloat16")
    trainer, rows, meter, trial = prepare("mamba", step, torch.bfloat16)
    assert loop.CapturedTraining(trial, trainer, rows, meter).prepare()
    assert "packing given up: " in meter.facts["capture_note"]
    assert "of a dialogue's gradient reaches other dialogues of its row" in meter.facts["capture_note"]


@pytest.mark.parametrize(
    ("architecture", "further", "given_up"),
    [
        ("mixtral", {"router_aux_loss_coef": 0.001}, "loss"),  # the default, of a loss of 6
        ("bart", {}, "packing"),  # counts positions through
        ("roberta", {}, "packing"),  # begins with another position
        ("gpt_oss", {}, "attention and with it packing"),  # has sinks
    ],
)
def test_what_half_precision_would_hide_is_found(prepare, monkeypatch, architecture, further, given_up):
    monkeypatch.setitem(CONFIGS, architecture, CONFIGS[architecture] | further)
    monkeypatch.setattr(check.Check, "_allowed", Tolerance(loss=1, gradient=1e3, tensor=1e3, floor=1))
    _, note = run(*prepare(architecture, method(bf16=True)))
    assert f"; {given_up} given up: " in note


@pytest.fixture
def asked_of_flash(monkeypatch):
    """What flash kernels were asked for, which the CPU has here; each is new to the check."""
    monkeypatch.setattr(packing, "TOKEN_BLOCK", 16)  # or so short dialogues would be padded as much as rows are
    seen: list[tuple[Any, ...]] = []
    with flash_reference.on_a_cpu(seen):
        yield seen
    flash._met.clear()
    flash._checked.clear()


def half(architecture, prepare, adapter=None, **more):
    """A job in bf16, prepared and trained; the Trainer's losses of the same one, ours, the job and its note."""
    step = dataclasses.replace(method(adapter, **more), weights_dtype="bfloat16")
    theirs, _ = run(*prepare(architecture, dataclasses.replace(step, step="trainer"), torch.bfloat16))
    trainer, rows, meter, trial = prepare(architecture, step, torch.bfloat16)
    job = loop.CapturedTraining(trial, trainer, rows, meter)
    assert job.prepare(), job.notes
    job.train()
    return theirs, meter.measurements().train_loss, job, meter.facts["capture_note"]


@pytest.mark.parametrize(
    ("architecture", "adapter", "arguments", "given_up"),
    [
        ("llama", lora(), {}, []),
        ("llama", lora(), {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, []),
        ("llama", lora(), {"gradient_checkpointing": True}, []),
        ("opt", None, {}, []),
        ("mistral", lora(), {}, []),
        ("gpt_neo", lora(), {}, []),
        ("qwen3_next", None, {}, ["packing"]),  # a state runs along the row
        ("gemma2", lora(), {}, ["attention and with it packing", "loss"]),
        ("bloom", None, {}, ["attention and with it packing"]),
    ],
)
def test_rows_joined_for_flash_kernels_make_the_trainers_step(
    prepare, asked_of_flash, architecture, adapter, arguments, given_up
):
    theirs, ours, job, note = half(architecture, prepare, adapter, **arguments)
    assert ours == pytest.approx(theirs, rel=5e-3 if architecture != "gpt_neo" else 3e-2)  # which is a chaos of halves
    assert [part.split(" given up: ")[0] for part in note.split("; ") if "given up" in part] == given_up
    assert note.startswith("packing makes") and "tokens of" in note.split(";")[0]
    if given_up:
        assert all(shape.time == LENGTH and not shape.sequences for shape in job.epochs.shapes)
        return
    assert all(shape.rows == 1 for shape in job.epochs.shapes)
    in_step = [lengths for _, lengths, *_ in asked_of_flash if lengths]
    assert any(sum(map(bool, lengths)) > 1 for lengths in in_step)
    if architecture == "mistral":
        assert {window for *_, window in asked_of_flash[-8:]} == {15}


@pytest.mark.parametrize(
    ("fault", "note"),
    [
        (lambda options: options | {"window": options["window"] + 1}, "sees 17 tokens instead of 16"),
        (lambda options: options | {"window": None}, "attention and with it packing given up: "),
        (lambda options: options | {"scale": 1.05 * options["scale"]}, "attention and with it packing given up: "),
    ],
    ids=["a token more", "no window", "scaled"],
)
def test_a_flash_kernel_that_computes_something_else_is_given_up(prepare, asked_of_flash, monkeypatch, fault, note):
    """A window's edge is less than what bf16 rounds, and in fp32 flash kernels do not run."""
    real = torch_internals.flash_attention_forward
    monkeypatch.setattr(
        torch_internals, "flash_attention_forward", lambda *tensors, **options: real(*tensors, **fault(options))
    )
    theirs, ours, _, found = half("mistral", prepare, lora())
    assert ours == pytest.approx(theirs, rel=5e-3)
    assert "attention and with it packing given up: " in found and note in found


def test_a_flash_kernel_that_takes_dialogues_for_one_costs_packing_alone(prepare, asked_of_flash, monkeypatch):
    real = torch_internals.flash_attention_forward

    def wrong(query, key, value, ends, longest, **options):
        if ends is not None:
            ends = ends.clone()
            ends[1:] = ends[-1]
            longest = int(ends[-1])
        return real(query, key, value, ends, longest, **options)

    monkeypatch.setattr(torch_internals, "flash_attention_forward", wrong)
    monkeypatch.setattr(flash, "check_met", lambda: None)  # which finds it, too
    theirs, ours, job, note = half("llama", prepare, lora())
    assert ours == pytest.approx(theirs, rel=5e-3)
    assert "; packing given up: " in note and "of a dialogue's gradient reaches other dialogues of its row" in note
    assert job.step.parts.attention


def test_dialogues_are_joined_where_each_pass_has_one(prepare, asked_of_flash):
    """So that none is computed longer than it is; there are no two to hold apart."""
    theirs, ours, job, note = half("llama", prepare, lora(), per_device_train_batch_size=1)
    assert ours == pytest.approx(theirs, rel=5e-3)
    assert "given up" not in note
    assert job.step.parts.packing and all(shape.time < LENGTH for shape in job.epochs.shapes)
