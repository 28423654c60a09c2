"""What does the captured step buy, and does it train the same? From the original's methods to the captured ones, one
change at a time; and its losses beside the Trainer's.

The original reported 3.7x for fp16 and LoRA together; the first rungs part the two. Every rung is a Method made with
`replace`, so that the table this prints says what each change bought in step time and in memory. The mark `shown_as`
has the report draw what a test trains as a ladder, in its order.
"""

import copy
from dataclasses import replace
from typing import Any

import pytest

from experiments.full_rows import ADAPTER, LENGTH, ROWS, full_rows
from lightweight.methods import BASELINE, LORA, LORA_CAPTURED, QLORA, QLORA_CAPTURED, CapturedStep, Method
from lightweight.models import GPT_NEO_1_3B, OPT_350M, Model
from lightweight.models.known import named
from lightweight.plugin import Laboratory, Train
from lightweight.targets import NATIVE
from lightweight.trial import Completed, Outcome, OutOfMemory

needs_cuda = pytest.mark.needs_cuda

# The Trainer's step in the captured step's own loop, with every part still as it was.
PLAIN = CapturedStep(attention="model", loss="model", packing=False, lean=False, graph=False, compile=False)


def climb(bottom: Method, *rungs: tuple[str, dict[str, Any]]) -> list[Method]:
    """`bottom` and what follows from it by one change after the other; a change of the step's parts is a dict there."""
    ladder = [bottom]
    for name, changes in rungs:
        step = changes.pop("step", {})
        if isinstance(step, dict):
            step = replace(ladder[-1].step, **step) if isinstance(ladder[-1].step, CapturedStep) else ladder[-1].step
        ladder.append(replace(ladder[-1], name=name, step=step, **changes))
    return ladder


ONE_PASS = {"per_device_train_batch_size": 8}
CHECKPOINTING = {
    name: value for name, value in QLORA.training_arguments.items() if name.startswith("gradient_checkpointing")
}

LORA_LADDER = climb(
    BASELINE,
    ("baseline-fp16", {"training_arguments": ONE_PASS | {"fp16": True}}),
    ("lora", {"adapter": LORA.adapter}),
    ("lora-loop", {"step": PLAIN}),
    ("lora-half", {"weights_dtype": "half", "training_arguments": ONE_PASS}),
    ("lora-attention", {"step": {"attention": "sdpa"}}),
    ("lora-loss", {"step": {"loss": "chunked"}}),
    ("lora-packing", {"step": {"packing": True}}),
    ("lora-lean", {"step": {"lean": True}}),
    ("lora-graph", {"step": {"graph": True}}),
    ("lora-compile", {"step": {"compile": True}}),
)
QLORA_LADDER = climb(
    QLORA,
    ("qlora-loop", {"step": replace(PLAIN, upcast=True)}),
    (
        "qlora-half",
        {
            "weights_dtype": "half",
            "step": {"upcast": False},
            "training_arguments": {name: value for name, value in QLORA.training_arguments.items() if name != "fp16"},
        },
    ),
    ("qlora-one-pass", {"training_arguments": ONE_PASS | CHECKPOINTING}),
    ("qlora-attention", {"step": {"attention": "sdpa"}}),
    ("qlora-loss", {"step": {"loss": "chunked"}}),
    ("qlora-packing", {"step": {"packing": True}}),
    ("qlora-lean", {"step": {"lean": True}}),
    ("qlora-keeping", {"training_arguments": ONE_PASS}),  # nothing is computed twice from here on
    ("qlora-graph", {"step": {"graph": True}}),
    ("qlora-compile", {"step": {"compile": True}}),
)
TWO_ROWS = {"per_device_train_batch_size": ROWS}
QWEN_LADDER = climb(
    replace(LORA, name="lora-2048", adapter=ADAPTER, training_arguments=TWO_ROWS | {"bf16": True}),
    ("lora-2048-loop", {"step": PLAIN}),
    ("lora-2048-half", {"weights_dtype": "half", "training_arguments": TWO_ROWS}),
    ("lora-2048-attention", {"step": {"attention": "sdpa"}}),
    ("lora-2048-loss", {"step": {"loss": "chunked"}}),
    ("lora-2048-lean", {"step": {"lean": True}}),
    ("lora-2048-graph", {"step": {"graph": True}}),
    ("lora-2048-compile", {"step": {"compile": True}}),
)
"""Of a Qwen3 shape; its rows are full, so that packing has nothing to do."""


def rungs(ladder: list[Method]) -> list[Any]:
    return [pytest.param(method, id=method.name) for method in ladder]


def assert_as_good(outcome_of: Train, outcome: Outcome, model: str, stock: str | Method, **changes: Any) -> None:
    """Out of memory is an answer. What completes has the held-out loss of `stock`, but for dropout's draws and
    rounding: the rungs of the committed records differ by less than 0.1 %."""
    assert isinstance(outcome, Completed | OutOfMemory), outcome.reason
    reference = outcome_of(model, stock, **changes)
    if isinstance(outcome, Completed) and isinstance(reference, Completed):
        assert outcome.measured.heldout_loss_after == pytest.approx(reference.measured.heldout_loss_after, rel=0.01)


@needs_cuda
@pytest.mark.shown_as("ladder")
@pytest.mark.model("opt-350m")
@pytest.mark.parametrize("method", rungs(LORA_LADDER))
def test_a_rung_from_baseline_to_lora_captured(train: Train, outcome_of: Train, method: Method) -> None:
    stock = "baseline" if method.adapter is None else "lora"
    assert_as_good(outcome_of, train("opt-350m", method, epochs=2), "opt-350m", stock, epochs=2)


@needs_cuda
@pytest.mark.shown_as("ladder")
@pytest.mark.model("gpt-neo-1.3b")
@pytest.mark.parametrize("method", rungs(QLORA_LADDER))
def test_a_rung_from_qlora_to_qlora_captured(train: Train, outcome_of: Train, method: Method) -> None:
    assert_as_good(outcome_of, train("gpt-neo-1.3b", method, epochs=2), "gpt-neo-1.3b", "qlora", epochs=2)


@needs_cuda
@pytest.mark.shown_as("ladder")
@pytest.mark.model("qwen3-0.6b")
@pytest.mark.parametrize("method", rungs(QWEN_LADDER))
def test_a_rung_of_a_modern_shape(train: Train, outcome_of: Train, method: Method) -> None:
    changes = {"target": NATIVE, "corpus": full_rows(), "max_length": LENGTH, "max_steps": 24, "padding": "max"}
    outcome = train("qwen3-0.6b", method, **changes)
    seconds = sorted(outcome.measured.step_seconds[8:]) or [0.0]
    peak = (outcome.measured.peak_allocated_bytes or 0) >> 20
    print(f"\n{method.name}: {1000 * seconds[len(seconds) // 2]:.1f} ms, {peak} MiB")
    assert_as_good(outcome_of, outcome, "qwen3-0.6b", QWEN_LADDER[0], **changes)


@needs_cuda
@pytest.mark.parametrize(
    ("model", "stock", "captured"), [("opt-350m", "lora", "lora-captured"), ("gpt-neo-1.3b", "qlora", "qlora-captured")]
)
def test_a_captured_method_is_captured_faster_and_as_good(
    outcome_of: Train, laboratory: Laboratory, model: str, stock: str, captured: str
) -> None:
    """With dropout the two see other random numbers, and their weights other formats: held-out losses within 1 %."""
    theirs, ours = outcome_of(model, stock), outcome_of(model, captured)
    assert isinstance(theirs, Completed), theirs.reason
    assert isinstance(ours, Completed), ours.reason
    assert ours.measured.captured, ours.measured.capture_note
    trial = laboratory.trial(model, captured)
    assert ours.measured.compiled == (trial.steps >= 6_000)
    assert ours.measured.heldout_loss_after == pytest.approx(theirs.measured.heldout_loss_after, rel=0.01)
    # the first epoch holds what the libraries do once
    their_steps, our_steps = (outcome.measured.step_seconds[trial.steps_per_epoch :] for outcome in (theirs, ours))
    assert sorted(our_steps)[len(our_steps) // 2] < sorted(their_steps)[len(their_steps) // 2] / 2


@needs_cuda
@pytest.mark.model("gpt-neo-1.3b")
def test_a_model_that_cannot_be_captured_trains_uncaptured_and_says_what_prevented_it(outcome_of: Train) -> None:
    step = CapturedStep(attention="model", packing=False)  # GPT-Neo's own attention uploads a constant in every forward
    outcome = outcome_of("gpt-neo-1.3b", replace(QLORA_CAPTURED, name="qlora-own-attention", step=step), max_steps=2)
    assert isinstance(outcome, Completed), outcome.reason
    assert outcome.measured.captured is False
    note = outcome.measured.capture_note
    assert note is not None and "uncaptured: " in note and "GPTNeo" in note, note


def still(model: Model, **no_dropout: float) -> Model:
    """`model` on random weights, without dropout of its own."""
    assert model.architecture is not None
    return replace(model, name=f"{model.name}-still", source=None, architecture=model.architecture | no_dropout)


@needs_cuda
@pytest.mark.parametrize(
    ("model", "learning_rate"),
    [
        pytest.param(still(OPT_350M, dropout=0.0), 1e-3, id="opt-350m", marks=pytest.mark.model("opt-350m")),
        pytest.param(still(GPT_NEO_1_3B), 1e-4, id="gpt-neo-1.3b", marks=pytest.mark.model("gpt-neo-1.3b")),
        pytest.param(still(named("qwen3-0.6b")), 1e-4, id="qwen3-0.6b"),
        pytest.param(still(named("llama-3.2-1b")), 1e-4, id="llama-3.2-1b"),
        pytest.param(still(named("gemma-3-1b")), 1e-4, id="gemma-3-1b"),
    ],
)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_twenty_captured_steps_have_the_trainers_losses_in_fp32(
    outcome_of: Train, model: Model, learning_rate: float, accumulation: int
) -> None:
    """GPT-Neo does not scale its attention scores, and random weights make them large: at 1e-3 its loss halves in
    twenty steps and rounding errors grow five hundred times as large as at 1e-4."""
    adapter = copy.deepcopy(LORA.adapter if model.name.startswith(("opt", "gpt")) else ADAPTER)
    vars(adapter)["lora_dropout"] = 0.0
    arguments = {
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": learning_rate,
    }
    stock = Method(name="lora-fp32", adapter=adapter, training_arguments=arguments)
    losses = []
    for method in (stock, replace(stock, name="lora-fp32-captured", step="captured")):
        outcome = outcome_of(model, method, target=NATIVE, max_steps=20)
        assert isinstance(outcome, Completed), outcome.reason
        losses.append(outcome.measured.train_loss)
    assert len(losses[0]) == 20
    apart = max(abs(ours - theirs) for ours, theirs in zip(*losses, strict=True))
    print(f"{model.name}: {losses[0][0]:.3f} -> {losses[0][-1]:.3f}, at most {apart:.1e} apart")
    assert apart < 1e-3


def test_the_ladders_end_in_the_captured_methods() -> None:
    for ladder, captured in ((LORA_LADDER, LORA_CAPTURED), (QLORA_LADDER, QLORA_CAPTURED)):
        assert replace(ladder[-2], name=captured.name, step="captured") == captured
        assert ladder[-2].step == CapturedStep(compile=False)
    assert QWEN_LADDER[-2].step == CapturedStep(packing=False, compile=False)
