"""Which examples are trained on and which are held out, and the digest that says whether two corpora are one."""

from __future__ import annotations

import hashlib
import json
import random
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightweight.corpus.conversation import THERAPIST, Corpus, CorpusError, Example, Origin, Text, contents

SPLIT_SEED = 350
"""Chooses the held-out examples; the same for every trial, whatever the trial's own seed, so that losses compare."""

HELDOUT_SHARE = 1 / 6
"""20 of the 120 pairs of corpus.json."""


def share_of(text: str | None) -> float | None:
    """The share that `--held-out` says, such as 0.1 or 10%; None where it says a file or nothing. Raises CorpusError
    for one of which nothing would be held out, or nothing trained on."""
    if text is None:
        return None
    if not text.strip():
        raise CorpusError("--held-out: is empty: give a share between 0 and 1, such as 0.1, or a file")
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    if not 0 < share < 1:
        raise CorpusError(f"--held-out {text}: give a share between 0 and 1, such as 0.1, or a file")
    return share


def split(examples: Sequence[Example], origin: Origin, path: Path | str, share: float | None = None) -> Corpus:
    """The corpus of `examples`, `share` of which is held out, a sixth if None. Those that say the same are on the same
    side. Raises CorpusError where all of them say the same."""
    copies: dict[Example, list[int]] = {}
    for index, example in enumerate(examples):
        copies.setdefault(example, []).append(index)
    distinct = list(copies.values())
    if len(distinct) < 2:
        raise CorpusError(
            f"corpus {path}: its {len(examples):,} examples are all the same: add a different one, to be held out"
        )
    count = min(max(1, round(len(distinct) * (HELDOUT_SHARE if share is None else share))), len(distinct) - 1)
    drawn = random.Random(SPLIT_SEED).sample(range(len(distinct)), count)  # noqa: S311  no secret
    heldout = {index for number in drawn for index in distinct[number]}
    sides = _sides(examples, heldout)
    is_usual = share is None and len(distinct) == len(examples)
    return Corpus(
        *sides,
        digest=digest(examples) if is_usual else digest_of_sides(*sides),
        origin=replace(origin, duplicates=len(examples) - len(distinct)),
    )


def split_from(examples: Sequence[Example], heldout: Sequence[Example], origin: Origin, path: Path | str) -> Corpus:
    """The corpus with `heldout` held out, and of `examples` those to train on that do not say the same. Raises
    CorpusError where none is left."""
    said = set(heldout)
    train = tuple(example for example in examples if example not in said)
    if not train:
        raise CorpusError(
            f"corpus {path}: each of its examples is also held out: give --held-out another file, or a share"
        )
    return Corpus(
        train,
        tuple(heldout),
        digest=digest_of_sides(train, heldout),
        origin=replace(
            origin,
            duplicates=len(train) - len(set(train)) + len(heldout) - len(said),
            leaked=len(examples) - len(train),
        ),
    )


def without_heldout(corpus: Corpus, path: Path | str) -> Corpus:
    """The corpus of what `corpus` trains on, a sixth of it held out anew and what was held out left out: to choose by,
    so that what a choice is judged by later has not been seen. Raises CorpusError."""
    if len(corpus.train) < 2:
        raise CorpusError(f"corpus {path}: has {len(corpus.train)} example to train on: add some, to hold one out")
    assert corpus.origin is not None
    halved = split(corpus.train, corpus.origin, path)
    return replace(halved, digest=digest_of_sides(halved.train, halved.heldout))


def _sides(examples: Sequence[Example], heldout: set[int]) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    return (
        tuple(example for index, example in enumerate(examples) if index not in heldout),
        tuple(examples[index] for index in sorted(heldout)),
    )


def digest(examples: Iterable[Example]) -> str:
    """The sha256 of what `examples` say, in order, whatever format they were written in."""
    found = hashlib.sha256()
    _add(found, examples)
    return found.hexdigest()


def digest_of_sides(train: Iterable[Example], heldout: Iterable[Example]) -> str:
    """The sha256 of what is trained on and what is held out, where that is not for `split` alone to say."""
    found = hashlib.sha256(b"trained on ")
    _add(found, train)
    found.update(b", held out ")
    _add(found, heldout)
    return found.hexdigest()


def _add(found: Any, examples: Iterable[Example]) -> None:
    """Add `examples` as one JSON list, of which no more than one is written at a time."""
    found.update(b"[")
    for index, example in enumerate(examples):
        found.update(b", " if index else b"")
        found.update(json.dumps(_canonical(example), ensure_ascii=False).encode())
    found.update(b"]")


def _canonical(example: Example) -> Any:
    if isinstance(example, Text):
        return {"prompt": example.prompt, "completion": example.completion}
    if example.answerer == THERAPIST:  # as records of before the other formats have it
        return [message.content for message in example.messages]
    return {"messages": [[message.role, message.content] for message in example.messages]}


def in_latin_letters(corpus: Corpus) -> Corpus:
    """The examples of `corpus` without a letter of another script, on the side of the split where they were; of
    corpus.json the English half. Where any is left out, the digest is that of the others, those to train on first.
    Raises CorpusError."""
    train, heldout = (
        tuple(example for example in examples if all(map(_is_latin, contents(example))))
        for examples in (corpus.train, corpus.heldout)
    )
    if not (train and heldout):
        raise CorpusError(
            f"corpus: has {len(train)} examples in Latin letters to train on and {len(heldout)} held out: "
            "add some until there is one of each"
        )
    if (train, heldout) == (corpus.train, corpus.heldout):
        return corpus
    return replace(corpus, train=train, heldout=heldout, digest=digest((*train, *heldout)))


def _is_latin(text: str) -> bool:
    return all(not letter.isalpha() or unicodedata.name(letter, "").startswith("LATIN") for letter in text)
