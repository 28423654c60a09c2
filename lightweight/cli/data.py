"""What would a training see of this corpus? `lightweight data FILE`: counts, lengths, and conversations as rows."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightweight import corpus, models
from lightweight.cli.terminal import leave_to_us, refuse, show
from lightweight.corpus import IGNORED, Conversation, Corpus, Example, Text
from lightweight.corpus.conversation import contents
from lightweight.names import one_line
from lightweight.settings import how_read

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LENGTHS = (512, 1024, 2048, 4096)
"""Tokens a row, for each of which it is told what share is cut."""

SHOWN = 3
"""Examples that are shown as a model sees them."""

SHOWN_TOKENS = 256
"""Of each of them; a longer one is shown by its beginning and its end."""

BAR = 40
"""Characters of the longest bar of the histogram."""

REFUSALS = (corpus.CorpusError, models.ModelError)
"""What is raised where there is nothing to look at, each with one clear line."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a corpus is before training. `told` is what was read, in one line. Of both sides together: `lengths`,
    examples by up to how many `unit` they have, and the `longest` one; `cut` the share that is longer than so many, for
    tokens alone. `shared_prompts` are held-out examples that begin as one does that is trained on. `assumed` says why
    tokens are not those of the model's own tokenizer."""

    told: str
    format: str
    train: int
    heldout: int
    duplicates: int
    leaked: int
    skipped: int
    shared_prompts: int
    unit: str
    longest: int
    mean: float
    lengths: dict[int, int]
    cut: dict[int, float] | None
    assumed: str | None = None

    def as_json(self) -> dict[str, Any]:
        """What `--format json` writes."""
        return asdict(self)


def look(
    read: Corpus,
    tokenizer: PreTrainedTokenizerBase | None,
    assumed: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Look:
    """What `read` is, in tokens of `tokenizer`, or in characters where there is none; `assumed` says why that is not
    the model's own. Raises ModelError."""
    origin = read.origin
    assert origin is not None
    every = [*read.train, *read.heldout]
    if tokenizer is None:
        lengths = [sum(map(len, contents(example))) for example in every]
    else:
        examples = corpus.watched(every, progress)
        lengths = [len(corpus.encode_whole(example, tokenizer)["input_ids"]) for example in examples]
    begun = {_prompt(example) for example in read.train}
    return Look(
        told=str(origin),
        format=origin.format,
        train=len(read.train),
        heldout=len(read.heldout),
        duplicates=origin.duplicates,
        leaked=origin.leaked,
        skipped=origin.skipped,
        shared_prompts=sum(bool(_prompt(example)) and _prompt(example) in begun for example in read.heldout),
        unit="characters" if tokenizer is None else "tokens",
        longest=max(lengths),
        mean=sum(lengths) / len(lengths),
        lengths=corpus.histogram(lengths),
        assumed=assumed,
        cut=None if tokenizer is None else {size: sum(n > size for n in lengths) / len(lengths) for size in LENGTHS},
    )


def _prompt(example: Example) -> str:
    """What is asked first; nothing for a text without a prompt."""
    if isinstance(example, Text):
        return example.prompt
    return next((message.content for message in example.messages if message.role == "user"), "")


def text(found: Look) -> str:
    """`found` as a person reads it, with a histogram."""
    width = min(BAR, max(10, shutil.get_terminal_size().columns - 30))
    most = max(found.lengths.values())
    of = max(len(f"{bound:,}") for bound in found.lengths)
    lines = [
        found.told,
        f"{found.train:,} to train on, {found.heldout:,} held out",
        "",
        f"{found.unit} of an example: {found.mean:,.0f} on average, {found.longest:,} the longest",
    ]
    for bound, count in found.lengths.items():
        bar = "#" * max(round(width * count / most), bool(count))
        lines.append(f"  up to {bound:>{of},}  {bar:<{width}}  {count:,}")
    if found.cut is None:
        lines.append("These are characters: --model NAME counts tokens with its tokenizer")
    else:
        shares = ", ".join(f"{share:.1%} at {size:,}" for size, share in found.cut.items())
        lines.append(f"longer than a row, and cut: {shares}")
    if found.assumed is not None:
        lines.append(found.assumed)
    if found.shared_prompts:
        lines.append(
            f"{found.shared_prompts:,} held-out examples begin with a prompt that is also trained on: "
            "their loss says little of what is new"
        )
    return "\n".join(lines)


def shown(read: Corpus, tokenizer: PreTrainedTokenizerBase, *, in_colour: bool) -> str:
    """The first examples to train on as the model sees them; what the loss is on is green, or between [[ and ]]."""
    begin, end = ("\x1b[32m", "\x1b[0m") if in_colour else ("[[", "]]")
    key = f"{begin}what the loss is on{end}"
    lines = []
    for number, example in enumerate(read.train[:SHOWN], 1):
        kind = "conversation" if isinstance(example, Conversation) else "text"
        row = corpus.encode_whole(example, tokenizer)
        pieces = "".join(
            f"{begin}{piece}{end}" if is_learned else piece
            for is_learned, piece in _pieces(row["input_ids"].tolist(), row["labels"].tolist(), tokenizer)
        )
        lines += ["", f"{kind} {number}, {len(row['input_ids']):,} tokens, {key}:", pieces]
    return "\n".join(lines)


def _pieces(
    ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[bool, str]]:
    """The text of a row in runs of what the loss is on and is not, its middle left out where it is long."""
    half = SHOWN_TOKENS // 2
    middle = range(half, len(ids) - half) if len(ids) > SHOWN_TOKENS else range(0)
    places = [place for place in range(len(ids)) if place not in middle or place == half]
    for (is_learned, is_gap), run in itertools.groupby(
        places, key=lambda place: (labels[place] != IGNORED, place in middle)
    ):
        if is_gap:
            yield False, f" [... {len(middle):,} tokens ...] "
        else:
            said = str(tokenizer.decode([ids[place] for place in run], skip_special_tokens=False))
            yield is_learned, "\n".join(one_line(line) for line in said.split("\n"))


def run(path: Path, how: corpus.How, model: str | None, progress: Any) -> tuple[Look, Corpus, Any]:
    """What there is to see in the corpus at `path`, it, and the model's tokenizer, None without one. Raises one of
    REFUSALS."""
    read = corpus.load(path, how, progress)
    tokenizer = assumed = None
    if model is not None:
        progress(f"loading the tokenizer of {model}")
        tokenizer, assumed = _tokenizer(models.named(model))
        progress("counting tokens")
    found = look(read, tokenizer, assumed, progress)
    progress("")
    return found, read, tokenizer


def read_if_named(path: Path | None, how: corpus.How, progress: Callable[[str], None]) -> Corpus | None:
    """The corpus at `path`, None where none was named. Raises CorpusError, also where it is said how to read it and
    none was named."""
    if path is not None:
        try:
            return corpus.load(path, how, progress)
        finally:
            progress("")
    if how != corpus.How():
        raise corpus.CorpusError(
            "--corpus-format, --skip-bad and --held-out say how a corpus is read, and none is named: give --corpus"
        )
    return None


def _tokenizer(model: models.Model) -> tuple[PreTrainedTokenizerBase, str | None]:
    """The tokenizer that `model` is trained with here, and why that is not its own, if it is not. Raises ModelError."""
    try:
        return models.find_tokenizer(model), None
    except models.NoTokenizerError as error:
        if model.architecture is None:
            raise
        problem = str(error).split("; ")[0]
        return models.drawn_tokenizer(model), f"{problem}; bytes are counted: its random weights are trained on bytes"


def written(found: Look) -> str:
    """`found` as JSON."""
    return json.dumps(found.as_json(), indent=1, ensure_ascii=False)


def command(options: argparse.Namespace) -> int:
    """Look at the corpus and print it; the exit status."""
    how = how_read(lambda name: getattr(options, name))
    try:
        if options.model is not None:
            leave_to_us()
        found, read, tokenizer = run(options.corpus, how, options.model, progress=show)
        if options.format == "json":
            print(written(found))
            return 0
        print(text(found))
        if tokenizer is not None:
            in_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
            print(shown(read, tokenizer, in_colour=in_colour))
    except REFUSALS as error:
        return refuse(error)
    return 0
