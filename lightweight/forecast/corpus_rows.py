"""Which rows does a corpus give a model? By the model's own tokenizer; by what is assumed, where that is not here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightweight import corpus, models
from lightweight.corpus import Corpus, RowForm, Rows
from lightweight.models import Model


@dataclass(frozen=True, kw_only=True, eq=False)
class CorpusRows:
    """What a corpus's examples to train on are to one model, an epoch: `count` rows of `tokens` in all, the longest of
    `longest`, without padding; with it each has `padded_to`, None where that is the longest of its batch. `truncated`
    of them lack something, and `dropped` examples give none.

    `rows` are they. None where the model's tokenizer is not at hand: then `assumed` says why, and the numbers are of
    one row an example, each as long as a row may be.
    """

    count: int
    tokens: int
    longest: int
    padded_to: int | None = None
    truncated: int = 0
    dropped: int = 0
    rows: Rows | None = None
    assumed: str | None = None

    @property
    def width(self) -> int:
        """Tokens of the longest row, padding included."""
        return self.padded_to or self.longest

    def as_json(self) -> dict[str, Any]:
        """What `lightweight plan --format json` writes of it."""
        return {
            "corpus_rows": self.count,
            "corpus_tokens": self.tokens,
            "longest_row": self.longest,
            "corpus_assumed": self.assumed,
        }

    def __str__(self) -> str:
        """One line."""
        what = f"{self.count:,} rows, {self.tokens:,} tokens an epoch, the longest of {self.longest:,}"
        what += "" if self.padded_to is None else f", each padded to {self.padded_to:,}"
        if self.assumed is not None:
            return f"assumed are {what}: {self.assumed}"
        cut = f"; rows that were cut: {self.truncated:,}" if self.truncated else ""
        return what + cut + (f"; examples that were dropped: {self.dropped:,}" if self.dropped else "")


def of_model(
    read: Corpus,
    model: Model,
    form: RowForm,
    *,
    pads_to_max: bool,
    progress: Callable[[str], None] = lambda text: None,
) -> CorpusRows:
    """The rows of `form` that the examples of `read` to train on are to `model`, whose weights are not looked for.
    Raises CorpusError where none of them fits into a row, and ModelError for a tokenizer that cannot be used."""
    progress(f"{model.name}: looking for its tokenizer")
    try:
        tokenizer = models.find_tokenizer(model)
    except models.NoTokenizerError as error:
        count = len(read.train)
        return CorpusRows(count=count, tokens=count * form.max_length, longest=form.max_length, assumed=str(error))
    encoded = corpus.encode_all(read.train, tokenizer, form, progress)
    if not encoded.rows:
        raise corpus.CorpusError(
            f"corpus: each of its {len(read.train)} examples to train on is longer than {form.max_length} tokens of "
            f"{model.name} and is dropped: cut or split them, or take a larger --max-length"
        )
    rows = Rows(encoded.rows, 0, form.max_length if pads_to_max else None)
    lengths = [len(row["input_ids"]) for row in rows]
    return CorpusRows(
        count=len(rows),
        tokens=sum(lengths),
        longest=max(lengths),
        padded_to=rows.padded_to,
        truncated=encoded.truncated,
        dropped=encoded.dropped,
        rows=rows,
    )
