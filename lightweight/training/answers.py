"""How many questions does a network answer right? Greedy, batched, and compared as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, Trainer

from lightweight import corpus
from lightweight.corpus import Task

MORE_TOKENS = 4
"""Tokens that an answer may have beyond those of the longest right one: one that goes on after that is wrong."""


class Asked(NamedTuple):
    """A question's prompt as ids, and its answer as text."""

    prompt: list[int]
    answer: str


class Questions(NamedTuple):
    """A task as a network sees it: `room` is how many tokens an answer gets. Empty where there is no task."""

    each: Sequence[Asked] = ()
    room: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer; 0 where nothing is asked."""
        return max((len(asked.prompt) + self.room for asked in self.each), default=0)


def encode(task: Task | None, tokenizer: PreTrainedTokenizerBase) -> Questions:
    """`task` in ids. Raises ModelError for a chat template that cannot be used."""
    if task is None:
        return Questions()
    each = [Asked(corpus.encode_prompt(one.begun, tokenizer), one.answer) for one in task.questions]
    longest = max(len(tokenizer.encode(asked.answer, add_special_tokens=False)) for asked in each)
    return Questions(each, longest + MORE_TOKENS)


def matches(trainer: Trainer, questions: Questions, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of `questions` are answered with exactly their answer, but for the space around it."""
    size = trainer.args.per_device_train_batch_size
    return sum(
        sum(
            said == asked.answer
            for said, asked in zip(answers(trainer, batch, questions.room, tokenizer), batch, strict=True)
        )
        for batch in (questions.each[start : start + size] for start in range(0, len(questions.each), size))
    )


def answers(trainer: Trainer, batch: Sequence[Asked], room: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the trainer's network says to each of `batch`, of at most `room` tokens, under the trainer's own autocast.
    Prompts are padded on the left, so that every answer begins where its prompt ends."""
    model: Any = trainer.model
    model.eval()
    width = max(len(asked.prompt) for asked in batch)
    ends = corpus.ends_of_answers(tokenizer)
    padding = cast(int, tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    ids = torch.full((len(batch), width), padding, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for line, asked in enumerate(batch):
        ids[line, width - len(asked.prompt) :] = torch.tensor(asked.prompt)
        mask[line, width - len(asked.prompt) :] = 1
    # What a model's own generation config says of sampling and penalties is not greedy.
    greedy = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=room,
        eos_token_id=ends,
        pad_token_id=padding,
    )
    with torch.no_grad(), trainer.compute_loss_context_manager():
        rows = model.generate(
            input_ids=ids.to(trainer.args.device),
            attention_mask=mask.to(trainer.args.device),
            generation_config=greedy,
            use_cache=True,
        )
    return [_text(row[width:].tolist(), ends, tokenizer) for row in rows]


def _text(ids: list[int], ends: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """An answer up to its end, with every space as it was written: many a tokenizer takes those before a comma away."""
    end = next((at for at, number in enumerate(ids) if number in ends), len(ids))
    text = tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text).strip()
