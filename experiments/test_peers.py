"""What would a user pick instead? Stock PEFT, the same with Liger's kernels, Unsloth and the captured step side by
side: one run, one GPU, the same rows, weights and adapter, bf16, nothing recomputed; 8 x 256 tokens a step, and of what
people fine-tune today 2 x 2048 that fill their rows.

Unsloth (`pip install unsloth`) loads the network and puts the adapter on; the Trainer then runs its steps, as its own
notebooks do. Its layers take adapters without dropout, so nobody's has any. Liger's kernels (`pip install
liger-kernel`) are what the Trainer's `use_liger_kernel` puts into a network.

`-s` prints a line for each: tokens a second, the peak, the share of the card's own, the seconds until the first step
and those of the whole job.
"""

import importlib.util
import statistics
from dataclasses import replace
from typing import Any

import pytest

from experiments.full_rows import ADAPTER, LENGTH, ROWS, full_rows
from lightweight.methods import LORA_CAPTURED, QLORA_CAPTURED, CapturedStep, Method
from lightweight.models import Model
from lightweight.plugin import NOT_RUN, Laboratory, Train
from lightweight.preload import peft
from lightweight.targets import NATIVE, rates
from lightweight.trial import Completed, Outcome, OutOfMemory

ATTENTION = ["q_proj", "k_proj", "v_proj"]
CELLS = {
    # every linear layer but the head, as `all-linear`
    "tinyllama-1.1b": (QLORA_CAPTURED, [*ATTENTION, "o_proj", "gate_proj", "up_proj", "down_proj"]),
    "gpt-neo-1.3b": (QLORA_CAPTURED, [*ATTENTION, "out_proj", "c_fc", "c_proj"]),
    "opt-350m": (LORA_CAPTURED, ["q_proj", "v_proj"]),
}
BY = ("peft", "unsloth", "captured")

MODERN: dict[str, tuple[str | Model, Method]] = {
    "qwen3-0.6b": ("qwen3-0.6b", LORA_CAPTURED),
    "llama-3.2-1b": ("llama-3.2-1b", QLORA_CAPTURED),
    "gemma-3-1b": ("gemma-3-1b", LORA_CAPTURED),
}
MODERN_BY = ("peft", "liger", "unsloth", "captured")
PACKAGES = {"unsloth": "unsloth", "liger": "liger-kernel"}
STEPS = 40


def method(model: str, by: str) -> Method:
    """The captured method of `model` with a still adapter, or what trains the same otherwise."""
    captured, layers = CELLS[model]
    adapter = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM, r=8, lora_alpha=32, lora_dropout=0.0, target_modules=layers
    )
    name = f"{captured.name.removesuffix('-captured')}-bf16-{by}"
    ours = replace(captured, name=name, adapter=adapter)
    if by == "captured":
        return ours
    return replace(
        ours,
        step="trainer",
        library="unsloth" if by == "unsloth" else "peft",
        # as half-precision fine-tuning is done: weights and products in bf16, the adapter in fp32
        weights_dtype="bfloat16",
        training_arguments={**ours.training_arguments, "bf16": True},
    )


def modern(model: str, by: str) -> Method:
    """As `method`, with an adapter of rank 16 on every linear layer, and two rows a step."""
    captured = MODERN[model][1].with_batch(ROWS)
    ours = replace(captured, name=f"{captured.name.split('-')[0]}-2048-{by}", adapter=ADAPTER)
    if by == "captured":
        return replace(ours, step=CapturedStep(packing=False))
    liger = {"use_liger_kernel": True} if by == "liger" else {}
    return replace(
        ours,
        step="trainer",
        library="unsloth" if by == "unsloth" else "peft",
        weights_dtype="bfloat16",
        training_arguments={**ours.training_arguments, "bf16": True, **liger},
    )


def line(model: str, by: str, outcome: Outcome, device: str) -> str:
    """What a peer of a modern shape did, in the columns of the docstring."""
    measured = outcome.measured
    if not isinstance(outcome, Completed):
        return f"{model} {by}: {outcome.reason}"
    seconds = statistics.median(measured.step_seconds[len(measured.step_seconds) // 2 :])
    speed, peak, card = ROWS * LENGTH / seconds, (measured.peak_allocated_bytes or 0) >> 20, rates(device)
    share = "-" if card is None else f"{speed * (measured.flop_per_token or 0) / card.of('bfloat16'):.0%}"
    phases = measured.phase_seconds
    before = sum(phases.get(phase, 0.0) for phase in ("start", "build", "capture")) + measured.step_seconds[0]
    return (
        f"{model} {by}: {1000 * seconds:.1f} ms, {speed:,.0f} tokens/s, {peak} MiB, {share} of the card, first step "
        f"after {before:.1f} s, job {sum(phases.values()):.1f} s"
    )


@pytest.mark.needs_cuda
@pytest.mark.shown_as("peers")
@pytest.mark.parametrize("by", MODERN_BY)
@pytest.mark.parametrize("model", MODERN)
def test_a_peer_trains_the_same_full_rows_of_a_modern_shape(
    train: Train, outcome_of: Train, laboratory: Laboratory, model: str, by: str
) -> None:
    """And learns as much from them as stock PEFT does."""
    package = PACKAGES.get(by)
    if package is not None and importlib.util.find_spec(package.replace("-", "_")) is None:
        pytest.skip(f"{NOT_RUN}needs {package}: pip install {package}")
    changes: dict[str, Any] = {
        "target": NATIVE, "corpus": full_rows(), "max_length": LENGTH, "max_steps": STEPS, "padding": "max",
    }  # fmt: skip
    shape = MODERN[model][0]
    outcome = train(shape, modern(model, by), **changes)
    print("\n" + line(model, by, outcome, laboratory.device.name))
    assert isinstance(outcome, Completed | OutOfMemory), outcome.reason
    stock = outcome_of(shape, modern(model, "peft"), **changes)
    if isinstance(outcome, Completed) and isinstance(stock, Completed):
        assert outcome.measured.heldout_loss_after == pytest.approx(stock.measured.heldout_loss_after, rel=0.01)


@pytest.mark.needs_cuda
@pytest.mark.shown_as("peers")
@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("model", CELLS)
def test_a_peer_trains_the_same_rows(
    train: Train, outcome_of: Train, laboratory: Laboratory, model: str, by: str
) -> None:
    """And learns as much from them as stock PEFT does: in the committed records their held-out losses differ by up to
    0.6 %."""
    if by == "unsloth" and importlib.util.find_spec("unsloth") is None:
        pytest.skip(f"{NOT_RUN}needs unsloth: pip install unsloth")
    changes: dict[str, Any] = {"target": NATIVE, "epochs": laboratory.option("epochs") or 2}
    outcome = train(model, method(model, by), **changes)
    assert isinstance(outcome, Completed | OutOfMemory), outcome.reason
    stock = outcome_of(model, method(model, "peft"), **changes)
    if isinstance(outcome, Completed) and isinstance(stock, Completed):
        assert outcome.measured.heldout_loss_after == pytest.approx(stock.measured.heldout_loss_after, rel=0.01)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("model", CELLS)
def test_the_captured_step_is_the_fastest_of_its_peers(outcome_of: Train, laboratory: Laboratory, model: str) -> None:
    """And for a Llama shape, Unsloth's own ground, three times as fast as Unsloth within no more than its memory."""
    steps, peaks = {}, {}
    epochs = laboratory.option("epochs") or 2
    for by in BY:
        if by == "unsloth" and importlib.util.find_spec("unsloth") is None:
            continue
        outcome = outcome_of(model, method(model, by), target=NATIVE, epochs=epochs)
        if not isinstance(outcome, Completed):
            continue
        trial = laboratory.trial(model, method(model, by), target=NATIVE, epochs=epochs)
        seconds = outcome.measured.step_seconds
        steady = sorted(seconds[trial.steps_per_epoch :] or seconds)
        steps[by], peaks[by] = steady[len(steady) // 2], outcome.measured.peak_allocated_bytes
    assert min(steps, key=lambda by: steps[by]) == "captured", steps
    if model == "tinyllama-1.1b" and "unsloth" in steps:
        assert steps["unsloth"] >= 3 * steps["captured"], steps
        assert (peaks["captured"] or 0) <= (peaks["unsloth"] or 0), peaks
