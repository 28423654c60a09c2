"""What people fine-tune today: rows of 2048 tokens, two a step, and an adapter of rank 16 on every linear layer."""

import random

from lightweight.corpus import Corpus, pair
from lightweight.preload import peft

LENGTH, ROWS = 2048, 2

ADAPTER = peft.LoraConfig(
    task_type=peft.TaskType.CAUSAL_LM,
    r=16,
    lora_alpha=32,
    lora_dropout=0.0,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
)
"""By names, since Unsloth takes no others."""


def full_rows() -> Corpus:
    """Conversations that fill such a row, of whatever tokenizer."""
    rng = random.Random(0)  # noqa: S311  no secret
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in range(500)]
    pairs = [pair("what next?", " ".join(rng.choices(words, k=2 * LENGTH))) for _ in range(20)]
    return Corpus(train=tuple(pairs[:16]), heldout=tuple(pairs[16:]), digest="full rows")
