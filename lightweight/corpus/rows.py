"""Examples as rows of tokens: which ids a network sees, and which of them the loss is on.

Rows have no padding; batches do. A conversation that is longer than a row loses turns or is split between them. Tokens
are lost only if one turn and its answer are too long together.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np

from lightweight.corpus.conversation import Conversation, Example, Message, Text
from lightweight.corpus.template import LossOn, Span, marked_up, prompted
from lightweight.models import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_LENGTH = 2
"""Tokens of a row: one of the prompt and one of the answer."""

MANY = 1000
"""Examples from which on it is told how far their encoding is."""

IGNORED = -100
"""The label that transformers' losses leave out: prompt and padding."""

Long = Literal["cut", "split", "drop"]
"""What becomes of a conversation that is too long: its first turns go, its system message stays; or it becomes several
rows, each of whole turns after the system message; or it is left out."""

Ids = np.ndarray[tuple[int], np.dtype[np.int32]]


class Row(TypedDict):
    """One row without padding, 4 bytes per token. `labels` are the `input_ids` that the loss is on, and IGNORED
    elsewhere; both [time]."""

    input_ids: Ids
    labels: Ids


@dataclass(frozen=True)
class RowForm:
    """How examples become rows.

    Attributes:
        max_length: The longest row, in tokens.
        loss_on: The loss is on each of the assistant's turns ("all"), or on the "last".
        long: What is done with an example that is longer.

    Raises:
        ValueError: For a `max_length` under MIN_LENGTH.
    """

    max_length: int
    loss_on: LossOn = "all"
    long: Long = "cut"

    def __post_init__(self) -> None:
        if self.max_length < MIN_LENGTH:
            raise ValueError(f"rows of {self.max_length} tokens: take a max_length of at least {MIN_LENGTH}")


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """Rows, and how batches of them are padded: on the right, with `pad_token_id`, to `padded_to` tokens; None pads to
    the longest of the batch."""

    each: Sequence[Row]
    pad_token_id: int
    padded_to: int | None = None

    def __len__(self) -> int:
        return len(self.each)

    def __getitem__(self, number: Any) -> Any:
        return self.each[number]

    @cached_property
    def width(self) -> int:
        """Tokens of the longest row, padding included."""
        return self.padded_to or max(len(row["input_ids"]) for row in self.each)


@dataclass(frozen=True)
class Encoded:
    """The rows of some examples.

    Attributes:
        rows: All of them.
        tokens: The tokens of each example when it is whole.
        truncated: Rows that lack a part of their example.
        split: Examples that became several rows.
        dropped: Examples that became none.
    """

    rows: list[Row]
    tokens: tuple[int, ...]
    truncated: int
    split: int
    dropped: int


def encode_all(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    form: RowForm,
    progress: Callable[[str], None] = lambda text: None,
) -> Encoded:
    """All rows of `examples`, in their order. Calls `progress` at each further hundredth, if there are many. Raises as
    `encode` does."""
    fitted = [_fitted(example, tokenizer, form) for example in watched(examples, progress)]
    return Encoded(
        rows=[row for rows, _, _ in fitted for row in rows],
        tokens=tuple(tokens for _, _, tokens in fitted),
        truncated=sum(lacks for _, lacks, _ in fitted),
        split=sum(len(rows) > 1 for rows, _, _ in fitted),
        dropped=sum(not rows for rows, _, _ in fitted),
    )


def watched(examples: Sequence[Example], progress: Callable[[str], None]) -> Iterator[Example]:
    """`examples`; calls `progress` at each further hundredth, if there are many."""
    for index, example in enumerate(examples):
        if len(examples) >= MANY and index % -(-len(examples) // 100) == 0:
            progress(f"encoding {len(examples):,} examples: {100 * index // len(examples)} %")
        yield example


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, form: RowForm) -> list[Row]:
    """The rows of one example: one row, unless it is too long and is split or dropped.

    If one turn and its answer are too long together, the prompt keeps its end, at most half a row, so there is always
    an answer to learn, and the answer loses its end. A text without a prompt is split anywhere. With the loss on the
    last turn only, there is nothing to split, and the first turns are left out. Raises ModelError for a chat template
    that cannot be used, or that does not show which tokens the loss is on.
    """
    return _fitted(example, tokenizer, form)[0]


def encode_whole(example: Example, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn = "all") -> Row:
    """The row of an example, however long it is.

    With a chat template, `input_ids` are those of `apply_chat_template`, and end with `eos_token_id` if it writes no
    special token after an answer. Without, they are plain names of the roles, and each answer ends with `eos_token_id`.
    Anything after the last answer is left out. Raises ModelError as `encode` does, and ValueError for a conversation
    without an answer.
    """
    if isinstance(example, Text):
        prompt = [*_begin(tokenizer), *tokenizer.encode(example.prompt, add_special_tokens=False)]
        return _joined([(prompt, False), (_answer(example.completion, tokenizer), True)])
    answers = [index for index, message in enumerate(example.messages) if message.role == "assistant"]
    if not answers:
        raise ValueError("a conversation without an answer, which nothing could be learned from")
    messages = example.messages[: answers[-1] + 1]
    if not tokenizer.chat_template:
        pieces = _plainly(messages, tokenizer, example.answerer)
        learned = range(1, len(pieces), 2) if loss_on == "all" else [len(pieces) - 1]
        return _joined((ids, index in learned) for index, ids in enumerate(pieces))
    marked = marked_up(messages, tokenizer, loss_on)
    ids, is_learned = _tokens_of(marked.text, marked.learned, tokenizer)
    if marked.end is None:
        ids, is_learned = np.append(ids, np.int32(tokenizer.eos_token_id)), np.append(is_learned, True)
    return _row(ids, is_learned)


def encode_prompt(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands before an answer, as ids: a conversation up to and with a user's turn, or the prompt of a text. They
    are those of a row of it where the answer begins. Raises ModelError."""
    if isinstance(example, Text):
        return [*_begin(tokenizer), *tokenizer.encode(example.prompt, add_special_tokens=False)]
    if tokenizer.chat_template:
        return list(tokenizer.encode(prompted(example.messages, tokenizer), add_special_tokens=False))
    begun = _plainly((*example.messages, Message("assistant", "")), tokenizer, example.answerer)
    return [number for piece in begun[:-1] for number in piece]


def ends_of_answers(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: the tokenizer's own end, and what its chat template ends a turn with. Raises
    ModelError."""
    ends: list[Any] = [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        end = marked_up((Message("user", "Hello."), Message("assistant", "Hello.")), tokenizer, "last").end
        ends += [] if end is None else [tokenizer.convert_tokens_to_ids(end)]
    return list(dict.fromkeys(ends))


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """Plain text as rows, each beginning where the last one ended; the loss is on every token but a row's first."""
    ids = np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
    return _pieces(_row(ids, np.ones(len(ids), bool)), max_length)


# What does not fit


def _fitted(example: Example, tokenizer: PreTrainedTokenizerBase, form: RowForm) -> tuple[list[Row], int, int]:
    """The rows of `example`, how many of them lack something, and the tokens of the whole of it."""
    whole = encode_whole(example, tokenizer, form.loss_on)
    tokens = len(whole["input_ids"])
    if tokens <= form.max_length:
        return [whole], 0, tokens
    if form.long == "drop":
        return [], 0, tokens
    if isinstance(example, Conversation):
        exchanges = _Exchanges(example, tokenizer, form)
        rows, lacking = exchanges.split() if form.long == "split" and form.loss_on == "all" else exchanges.cut()
        return rows, lacking, tokens
    if form.long == "split" and not example.prompt:
        pieces = _pieces(whole, form.max_length)
        return pieces, int(sum(len(row["input_ids"]) for row in pieces) < tokens), tokens
    return [_shortened(whole, form.max_length)], 1, tokens


class _Exchanges:
    """A conversation as its system message and exchanges, each of which ends with an answer; as rows of some."""

    def __init__(self, whole: Conversation, tokenizer: PreTrainedTokenizerBase, form: RowForm) -> None:
        self._whole, self._tokenizer, self._form = whole, tokenizer, form
        self._system = tuple(message for message in whole.messages[:1] if message.role == "system")
        rest = whole.messages[len(self._system) :]
        ends = [index + 1 for index, message in enumerate(rest) if message.role == "assistant"]
        self._each = [rest[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def cut(self) -> tuple[list[Row], int]:
        """The last exchanges, as many as fit, in one row."""
        first = bisect_left(range(len(self._each) - 1), True, key=lambda first: self._fits(first, len(self._each)))
        return [_shortened(self._row(first, len(self._each)), self._form.max_length)], 1

    def split(self) -> tuple[list[Row], int]:
        """All exchanges, as many in a row as fit; and how many rows lack something, since one alone does not."""
        rows: list[Row] = []
        lacking = start = 0
        while start < len(self._each):
            more = range(start + 2, len(self._each) + 1)
            end = start + 1 + bisect_left(more, True, key=lambda end: not self._fits(start, end))
            row = self._row(start, end)
            lacking += len(row["input_ids"]) > self._form.max_length
            rows.append(_shortened(row, self._form.max_length))
            start = end
        return rows, lacking

    def _fits(self, start: int, end: int) -> bool:
        return len(self._row(start, end)["input_ids"]) <= self._form.max_length

    def _row(self, start: int, end: int) -> Row:
        messages = self._system + tuple(message for exchange in self._each[start:end] for message in exchange)
        return encode_whole(replace(self._whole, messages=messages), self._tokenizer, self._form.loss_on)


def _shortened(row: Row, max_length: int) -> Row:
    """`row`, its prompt without its beginning and its answer without its end where it is too long."""
    if len(row["input_ids"]) <= max_length:
        return row
    first = int((row["labels"] != IGNORED).argmax())
    prompt = range(max(0, first - max_length // 2), first)
    kept = slice(prompt.start, first + max_length - len(prompt))
    return {"input_ids": row["input_ids"][kept].copy(), "labels": row["labels"][kept].copy()}


def _pieces(row: Row, max_length: int) -> list[Row]:
    """`row` in rows that begin where the last one ended. A single token that would be left for the last is left out:
    nothing before it predicts it, and the mean over no token is no number."""
    starts = range(0, len(row["input_ids"]) - 1, max_length)
    spans = [slice(start, start + max_length) for start in starts]
    return [{"input_ids": row["input_ids"][span].copy(), "labels": row["labels"][span].copy()} for span in spans]


# Tokens


def _tokens_of(text: str, spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase) -> tuple[Ids, Any]:
    """The ids of `text`, and which of them have a character of `spans`; both [time]. Raises ModelError for a tokenizer
    that does not say where in the text its tokens are, where that cannot be found out."""
    is_learned: Any
    if not tokenizer.is_fast:
        ids = np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
        is_learned = np.zeros(len(ids), bool)
        for start, stop in spans:
            is_learned[_count_before(start, text, ids, tokenizer) : _count_before(stop, text, ids, tokenizer)] = True
        return ids, is_learned
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.array(encoded["input_ids"], np.int32)
    starts, stops = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
    stops = np.maximum(stops, starts + 1)  # some tokens have no character of their own
    is_learned = np.zeros(len(ids), bool)
    for start, stop in spans:
        is_learned |= (starts < stop) & (stops > start)
    return ids, is_learned


def _count_before(place: int, text: str, ids: Ids, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of the `ids` of `text` come before the character at `place`."""
    before = tokenizer.encode(text[:place], add_special_tokens=False)
    if ids[: len(before)].tolist() != before:
        raise ModelError(
            f"model {tokenizer.name_or_path}: its tokenizer joins the end of one turn and the beginning of the next, "
            "and does not say where in the text its tokens are: give its tokenizer.json, which does"
        )
    return len(before)


def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]


def _plainly(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, answerer: str) -> list[list[int]]:
    """A conversation that ends with an answer in plain names of the roles: ids of what is before an answer and of the
    answer, in turn."""
    pieces = []
    before = ""
    for message in messages:
        if message.role == "assistant":
            begin = tokenizer.encode(f"{before}{answerer}: ", add_special_tokens=False)
            pieces += [begin, _answer(message.content, tokenizer)]
            before = ""
        else:
            before += f"{'System' if message.role == 'system' else 'User'}: {message.content}\n"
    return [[*_begin(tokenizer), *pieces[0]], *pieces[1:]]


def _answer(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [*tokenizer.encode(text, add_special_tokens=False), int(tokenizer.eos_token_id)]


def _joined(pieces: Iterable[tuple[list[int], bool]]) -> Row:
    """One row of pieces of ids, each learned or not."""
    pieces = list(pieces)
    ids = np.array([number for piece, _ in pieces for number in piece], np.int32)
    return _row(ids, np.repeat([learned for _, learned in pieces], [len(piece) for piece, _ in pieces]))


def _row(ids: Ids, is_learned: Any) -> Row:
    return {"input_ids": ids, "labels": np.where(is_learned, ids, IGNORED).astype(np.int32)}
