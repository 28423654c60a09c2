"""Examples as rows of tokens: which ids a network sees, and which of them the loss is on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightweight.corpus.conversation import Example, contents
from lightweight.corpus.template import rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_LENGTH = 2
"""Tokens of a row: one of the prompt and one of the answer."""

IGNORED = -100
"""The label that transformers' losses leave out: prompt and padding."""

Row = dict[str, list[int]]
"""`input_ids`, `attention_mask` and `labels`, each [time]."""


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A user's turn up to where the answer begins, as ids: the tokenizer's own chat template, or plain names of the
    roles where it has none. The answer after it ends with `eos_token_id`."""
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": text}]
        marked = rendered(turn, tokenizer)
        return list(tokenizer.encode(marked, add_special_tokens=False))
    ids = tokenizer.encode(f"User: {text}\nTherapist: ", add_special_tokens=False)
    return [*ids] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Row:
    """One training sequence: prompt and answer in one row, the loss on the answer alone.

    Returns `input_ids`, `attention_mask` and `labels`, each [max_length], padded on the right. A prompt longer than
    half the row keeps its end, so that there is always an answer to learn; an answer too long for the rest loses its
    end. Raises ValueError for a `max_length` under MIN_LENGTH, and ModelError for a chat template that cannot be used.
    """
    if max_length < MIN_LENGTH:
        raise ValueError(f"rows of {max_length} tokens: take at least {MIN_LENGTH}")
    said, answered = contents(example)
    prompt = encode_prompt(said, tokenizer)
    prompt = prompt[-(max_length // 2) :]
    answer = [*tokenizer.encode(answered, add_special_tokens=False), tokenizer.eos_token_id]
    return _row(prompt, answer[: max_length - len(prompt)], tokenizer, max_length)


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """Plain text as rows in the form of `encode`, each beginning where the last one ended; the loss is on every token
    but a row's first."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    pieces = [tokens[start : start + max_length] for start in range(0, len(tokens), max_length)]
    return [_row([], piece, tokenizer, max_length) for piece in pieces]


def _row(prompt: list[int], answer: list[int], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Row:
    length = len(prompt) + len(answer)
    padding = max_length - length
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return {
        "input_ids": prompt + answer + [pad_token_id] * padding,
        "attention_mask": [1] * length + [0] * padding,
        "labels": [IGNORED] * len(prompt) + answer + [IGNORED] * padding,
    }
