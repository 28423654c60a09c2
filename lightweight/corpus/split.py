"""Which examples are trained on and which are held out, and the digest that says whether two corpora are one."""

from __future__ import annotations

import hashlib
import json
import random
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from lightweight.corpus.conversation import THERAPIST, Corpus, CorpusError, Example, Text, contents

SPLIT_SEED = 350
"""Chooses the held-out examples; the same for every trial, whatever the trial's own seed, so that losses compare."""

HELDOUT_SHARE = 1 / 6
"""20 of the 120 pairs of corpus.json."""


def split(examples: Sequence[Example]) -> Corpus:
    """The corpus of at least two `examples`."""
    count = max(1, round(len(examples) * HELDOUT_SHARE))
    heldout = set(random.Random(SPLIT_SEED).sample(range(len(examples)), count))  # noqa: S311  no secret
    return Corpus(
        train=tuple(example for index, example in enumerate(examples) if index not in heldout),
        heldout=tuple(examples[index] for index in sorted(heldout)),
        digest=digest(examples),
    )


def digest(examples: Iterable[Example]) -> str:
    """The sha256 of what `examples` say, in order, whatever format they were written in."""
    canonical = json.dumps([_canonical(example) for example in examples], ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


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
