"""What do conversations of all lengths cost? Real tokens a second of the Trainer's padded batches and of joined rows:
one GPU, the same conversations, weights, adapter and optimizer steps, bf16, nothing recomputed.

The Trainer pads the conversations of a pass to its longest, and computes what it pads. The captured step lays all
conversations of a step one behind the other.
"""

import random
from dataclasses import replace
from typing import Any

import pytest

from lightweight.corpus import Conversation, Corpus, Message
from lightweight.methods import LORA_CAPTURED, Method
from lightweight.plugin import Train
from lightweight.preload import peft
from lightweight.targets import NATIVE
from lightweight.trial import Completed, Outcome

MODEL = "qwen3-0.6b"
SHORTEST, LONGEST, ROW = 200, 1_800, 2_048
"""Tokens of a conversation, and of a row at most."""

TURNS = 3
COUNT, HELD_OUT = 400, 4
SEED = 2048


def conversation(tokens: int, number: int) -> Conversation:
    """One of `tokens` bytes, which are the tokens of a model without a tokenizer of its own: half of them of
    answers."""
    words = random.Random(number)  # noqa: S311  no secret

    def said(size: int) -> str:
        return "".join(words.choice("etaoinshrdlu ") for _ in range(size))

    size = tokens // (2 * TURNS) - len("User: \nAssistant: .") // 2  # with the names of roles and the ends of answers
    roles = ("user", "assistant") * TURNS
    return Conversation(tuple(Message(role, said(size)) for role in roles))


def conversations() -> Corpus:
    """COUNT of them, of lengths drawn evenly from SHORTEST to LONGEST."""
    lengths = random.Random(SEED)  # noqa: S311  no secret
    drawn = [conversation(lengths.randint(SHORTEST, LONGEST), number) for number in range(COUNT + HELD_OUT)]
    return Corpus(tuple(drawn[HELD_OUT:]), tuple(drawn[:HELD_OUT]), digest=f"conversations {SEED}")


def method(by: str, sequences: int, passes: int) -> Method:
    """LoRA of rank 16 on every linear layer in bf16, `by` the Trainer or the captured step, `sequences` a pass."""
    adapter = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM, r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"
    )
    arguments = {"per_device_train_batch_size": sequences, "gradient_accumulation_steps": passes}
    ours = replace(LORA_CAPTURED, name=f"lora-{by}-{sequences}x{passes}", adapter=adapter, weights_dtype="bfloat16")
    if by == "joined":
        return replace(ours, training_arguments=arguments)
    return replace(ours, step="trainer", training_arguments=arguments | {"bf16": True})


def changes(steps: int) -> dict[str, Any]:
    """Of a trial on these conversations."""
    return {"target": NATIVE, "corpus": conversations(), "max_length": ROW, "padding": "longest", "max_steps": steps}


def real_tokens_a_second(outcome: Outcome) -> float:
    """Tokens of conversations a second, without the first steps, in which libraries prepare themselves."""
    assert isinstance(outcome, Completed), outcome.reason
    steady = slice(4, None)
    return sum(outcome.measured.step_tokens[steady]) / sum(outcome.measured.step_seconds[steady])


STEPS = {"padded": 30, "joined": 300}
"""Padded batches are all of one kind. A job of joined rows has as many shapes as its length pays for."""


@pytest.mark.needs_cuda
@pytest.mark.model(MODEL)
@pytest.mark.parametrize(("sequences", "passes"), [(2, 1), (2, 4), (8, 1)])
@pytest.mark.parametrize("by", STEPS)
def test_conversations_train(train: Train, by: str, sequences: int, passes: int) -> None:
    outcome = train(MODEL, method(by, sequences, passes), **changes(STEPS[by]))
    assert isinstance(outcome, Completed), outcome.reason
    assert by == "padded" or outcome.measured.captured, outcome.measured.capture_note


@pytest.mark.needs_cuda
@pytest.mark.model(MODEL)
@pytest.mark.parametrize(("sequences", "passes"), [(2, 1), (2, 4), (8, 1)])
def test_joined_rows_train_five_times_the_tokens_of_padded_ones(outcome_of: Train, sequences: int, passes: int) -> None:
    """In the same optimizer steps."""
    padded, joined = (
        real_tokens_a_second(outcome_of(MODEL, method(by, sequences, passes), **changes(STEPS[by]))) for by in STEPS
    )
    print(f"{sequences} x {passes}: {padded:,.0f} and {joined:,.0f} real tokens a second, {joined / padded:.1f} times")
    assert joined >= 5 * padded
