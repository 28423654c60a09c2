"""On which tokens a trial trains, and in what order: dialogue turns, paired, split and digested.

A corpus file is a JSON list of turns `{"role": "user"|"therapist", "content": "..."}` in alternation. A user turn and
the therapist's answer to it are one pair; a pair is one training sequence.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import signal
import threading
import time
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lightweight.models import ModelError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLIT_SEED = 350
"""Chooses the held-out pairs; the same for every trial, whatever the trial's own seed, so that losses compare."""

HELDOUT_SHARE = 1 / 6
"""20 of the 120 pairs of corpus.json."""

MIN_LENGTH = 2
"""Tokens of a row: one of the prompt and one of the answer."""

RENDER_SECONDS = 10.0
"""What a chat template may take for one turn; those that end take a thousandth."""

MARKUP_CHARACTERS = 1_000_000
"""What a chat template may write around one turn; a long system prompt has a hundredth."""

IGNORED = -100
"""The label that transformers' losses leave out: prompt and padding."""


class CorpusError(ValueError):
    """A corpus file that cannot be used. The message names the file, the turn's index and the mend."""


@dataclass(frozen=True)
class Pair:
    """A user's turn and the therapist's answer to it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Corpus:
    """Pairs to train on and pairs held out, with the sha256 of all of them in file order.

    `elsewhere` is plain text from somewhere else, nothing of which is trained on: what a model could say of it before
    and cannot after training is what it forgot. None leaves that unmeasured.
    """

    train: tuple[Pair, ...]
    heldout: tuple[Pair, ...]
    digest: str
    elsewhere: str | None = None

    @property
    def elsewhere_digest(self) -> str | None:
        """The sha256 of `elsewhere`."""
        return None if self.elsewhere is None else hashlib.sha256(self.elsewhere.encode()).hexdigest()


def load(path: Path) -> Corpus:
    """Read, check and split the corpus at `path`. Raises CorpusError."""
    pairs = _pairs(_turns(path), path)
    if len(pairs) < 2:
        _fail(path, f"has {len(pairs)} pair(s): add turns until there are at least 2, one to train on and one held out")
    count = max(1, round(len(pairs) * HELDOUT_SHARE))
    heldout = set(random.Random(SPLIT_SEED).sample(range(len(pairs)), count))  # noqa: S311  no secret
    return Corpus(
        train=tuple(pair for index, pair in enumerate(pairs) if index not in heldout),
        heldout=tuple(pairs[index] for index in sorted(heldout)),
        digest=_digest(pairs),
    )


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A user's turn up to where the answer begins, as ids: the tokenizer's own chat template, or plain names of the
    roles where it has none. The answer after it ends with `eos_token_id`."""
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": text}]
        marked = _rendered(turn, tokenizer)
        return list(tokenizer.encode(marked, add_special_tokens=False))
    ids = tokenizer.encode(f"User: {text}\nTherapist: ", add_special_tokens=False)
    return [*ids] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]


def _rendered(turn: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """One turn in the tokenizer's chat template. Raises ModelError for a template that raises, does not
    end, writes too much or no text, or leaves the turn out: rows without their prompts would train all the same."""
    try:
        with _time_limit(RENDER_SECONDS):
            marked = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
            text = turn[0]["content"].strip()
            if text not in marked and marked == tokenizer.apply_chat_template(
                [{"role": "user", "content": f"{text} {text}."}], tokenize=False, add_generation_prompt=True
            ):
                raise ValueError("it leaves out what the user says")
            if len(marked) > len(text) + MARKUP_CHARACTERS:
                raise ValueError(f"it writes {len(marked):,} characters for one turn")
            marked.encode()  # half a character, which no tokenizer takes
    except Exception as error:  # a template is a program, and may raise what it likes
        raise ModelError(
            f"model {tokenizer.name_or_path}: its chat template cannot be used ({reason(error)}): mend chat_template"
        ) from error
    return marked


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after `seconds`, which only a process's main thread can; in another there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> NoReturn:
        raise TimeoutError(f"not done after {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    began, (left, interval) = time.monotonic(), signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:  # somebody else's alarm, pytest-timeout's say
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3), interval)


def in_latin_letters(corpus: Corpus) -> Corpus:
    """The pairs of `corpus` without a letter of another script, on the side of the split where they were; of
    corpus.json the English half. Where any is left out, the digest is that of the others, those to train on first.
    Raises CorpusError."""
    train, heldout = (
        tuple(pair for pair in pairs if _is_latin(pair.prompt) and _is_latin(pair.answer))
        for pairs in (corpus.train, corpus.heldout)
    )
    if not (train and heldout):
        raise CorpusError(
            f"corpus: has {len(train)} pairs in Latin letters to train on and {len(heldout)} held out: "
            "add some until there is one of each"
        )
    if (train, heldout) == (corpus.train, corpus.heldout):
        return corpus
    return replace(corpus, train=train, heldout=heldout, digest=_digest((*train, *heldout)))


def encode(pair: Pair, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[int]]:
    """One training sequence: prompt and answer in one row, the loss on the answer alone.

    Returns `input_ids`, `attention_mask` and `labels`, each [max_length], padded on the right. A prompt longer than
    half the row keeps its end, so that there is always an answer to learn; an answer too long for the rest loses its
    end. Raises ValueError for a `max_length` under MIN_LENGTH, and ModelError for a chat template that cannot be used.
    """
    if max_length < MIN_LENGTH:
        raise ValueError(f"rows of {max_length} tokens: take at least {MIN_LENGTH}")
    prompt = encode_prompt(pair.prompt, tokenizer)
    prompt = prompt[-(max_length // 2) :]
    answer = [*tokenizer.encode(pair.answer, add_special_tokens=False), tokenizer.eos_token_id]
    return _row(prompt, answer[: max_length - len(prompt)], tokenizer, max_length)


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, list[int]]]:
    """Plain text as rows in the form of `encode`, each beginning where the last one ended; the loss is on every token
    but a row's first."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    pieces = [tokens[start : start + max_length] for start in range(0, len(tokens), max_length)]
    return [_row([], piece, tokenizer, max_length) for piece in pieces]


def _turns(path: Path) -> list[Any]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        _fail(path, "does not exist: give --corpus the path of a JSON file")
    except IsADirectoryError:
        _fail(path, "is a directory: give --corpus the path of a JSON file")
    except UnicodeDecodeError as error:
        _fail(path, f"is not UTF-8 at byte {error.start}: save it as UTF-8")
    except OSError as error:
        _fail(path, f"cannot be read ({error.strerror}): make it a readable file")
    try:
        turns = json.loads(text)
    except json.JSONDecodeError as error:
        _fail(path, f"is not JSON at line {error.lineno}, column {error.colno} ({error.msg}): mend it there")
    except RecursionError:
        _fail(path, "is nested too deeply: write a flat list of turns")
    except ValueError:  # Python reads no number of over 4300 digits
        _fail(path, "holds a number of thousands of digits, which JSON readers refuse: write it as text")
    if not isinstance(turns, list):
        _fail(path, f"holds a JSON {_kind(turns)}: write a list of turns")
    return turns


def _pairs(turns: list[Any], path: Path) -> list[Pair]:
    contents = [_content(turn, index, path) for index, turn in enumerate(turns)]
    if len(turns) % 2:
        _fail(path, f"turn {len(turns) - 1}: the last user turn has no answer: add a 'therapist' turn or remove it")
    return [Pair(prompt, answer) for prompt, answer in zip(contents[::2], contents[1::2], strict=True)]


def _row(
    prompt: list[int], answer: list[int], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[int]]:
    length = len(prompt) + len(answer)
    padding = max_length - length
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return {
        "input_ids": prompt + answer + [pad_token_id] * padding,
        "attention_mask": [1] * length + [0] * padding,
        "labels": [IGNORED] * len(prompt) + answer + [IGNORED] * padding,
    }


def _is_latin(text: str) -> bool:
    return all(not letter.isalpha() or unicodedata.name(letter, "").startswith("LATIN") for letter in text)


def _digest(pairs: Iterable[Pair]) -> str:
    canonical = json.dumps([[pair.prompt, pair.answer] for pair in pairs], ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _content(turn: Any, index: int, path: Path) -> str:
    where = f"turn {index}"
    if not isinstance(turn, dict):
        _fail(path, f'{where}: is a JSON {_kind(turn)}: write {{"role": ..., "content": ...}}')
    role, content = turn.get("role"), turn.get("content")
    expected = ("user", "therapist")[index % 2]
    if role not in ("user", "therapist"):
        problem = "has no 'role'" if "role" not in turn else f"unknown role {_short(role)}"
        _fail(path, f"{where}: {problem}: use 'user' or 'therapist'")
    if role != expected:
        problem = f"two {role!r} turns in a row" if index else "the first turn is the therapist's"
        _fail(path, f"{where}: {problem}: a {expected!r} turn belongs here, join or remove one")
    if not isinstance(content, str):
        problem = "has no 'content'" if "content" not in turn else f"'content' is a JSON {_kind(content)}"
        _fail(path, f"{where}: {problem}: give it a text")
    if not content.strip():
        _fail(path, f"{where}: 'content' is empty: write the turn's text or remove its pair")
    try:
        content.encode()
    except UnicodeEncodeError:
        _fail(
            path,
            f"{where}: 'content' holds half of a surrogate pair, which is no character: write the character itself",
        )
    return content


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(value: Any) -> str:
    kinds = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), "null")


def _fail(path: Path, problem: str) -> NoReturn:
    raise CorpusError(f"corpus {path}: {problem}") from None
