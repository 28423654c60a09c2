"""A corpus, read and checked: from a file or a data set to examples to train on and examples held out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightweight.corpus import files, formats, tables, turns
from lightweight.corpus.conversation import Conversation, Corpus, Defect, Example, Origin
from lightweight.corpus.files import Item, fail
from lightweight.corpus.split import share_of, split, split_from

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class How:
    """How a corpus is read.

    Attributes:
        format: The name of its format; None recognises it by its keys.
        skip_bad: Whether rows that cannot be used are left out.
        held_out: Another corpus, or a share of this one, to evaluate on; None is a sixth.
    """

    format: str | None = None
    skip_bad: bool = False
    held_out: str | None = None


AS_IT_IS = How()


def load(path: Path | str, how: How = AS_IT_IS, progress: Progress = lambda text: None) -> Corpus:
    """Read, check and split the corpus at `path`, a file or `hub:NAME[:SPLIT]`, telling `progress` how far it is.
    Raises CorpusError."""
    share = share_of(how.held_out)
    examples, origin = _examples(path, how, progress)
    least = 1 if how.held_out is not None and share is None else 2
    if len(examples) < least:
        kind = "pair(s)" if origin.format == formats.TURNS else "example(s)"
        what = "turns" if origin.format == formats.TURNS else "rows"
        _refuse_all_skipped(path, len(examples), origin)
        fail(
            path, f"has {len(examples)} {kind}: add {what} until there are at least 2, one to train on and one held out"
        )
    if how.held_out is None or share is not None:
        return split(examples, origin, path, share)
    heldout, of_heldout = _examples(how.held_out, how, progress)
    if not heldout:
        _refuse_all_skipped(how.held_out, 0, of_heldout)
        fail(how.held_out, "has nothing to hold out: add rows")
    return split_from(examples, heldout, replace(origin, skipped=origin.skipped + of_heldout.skipped), path)


def _refuse_all_skipped(path: Path | str, left: int, origin: Origin) -> None:
    """Raise CorpusError where rows were skipped, and so too few are left."""
    if origin.skipped:
        fail(
            path,
            f"has {left} example(s) left, and {origin.skipped:,} row(s) skipped: leave out --skip-bad to see what "
            "is wrong with the first",
        )


def _examples(path: Path | str, how: How, progress: Progress) -> tuple[list[Example], Origin]:
    """What the corpus at `path` says."""
    source = _Source(path, how.skip_bad)
    items = tables.items(path, progress) if tables.holds(path) else files.items(Path(path), progress)
    first, items = _first_sound(items, source, how.format)
    name = how.format or first
    if name == formats.TURNS:
        examples: list[Example] = list(turns.pairs(items, source.bad_turn))
    else:
        one = formats.FORMATS[name]
        examples = list(_of_rows(items, source, one, is_forced=how.format is not None))
    progress("")
    talks = [example for example in examples if isinstance(example, Conversation)]
    said = sum(message.role != "system" for talk in talks for message in talk.messages)
    texts = len(examples) - len(talks)
    return examples, Origin(
        format=name, conversations=len(talks), messages=said, texts=texts, skipped=len(source.skipped)
    )


@dataclass
class _Source:
    """A corpus that is being read: what becomes of what cannot be used."""

    path: Path | str
    skip_bad: bool
    skipped: set[tuple[str, int]] = field(default_factory=set)

    def bad(self, item: Item, defect: Defect) -> None:
        """Raise CorpusError for an item, in one line, or count it among the skipped ones."""
        self._refuse(f"{item.place[0]} {item.place[1]}", defect)
        self.skipped.add(item.place)

    def bad_turn(self, item: Item, defect: Defect, *skipped: Item) -> None:
        """The same for a turn, which an item of a list is called there, for which others are skipped, too."""
        self._refuse(f"{item.place[0].replace('row', 'turn')} {item.place[1]}", defect)
        self.skipped.update(one.place for one in skipped)

    def _refuse(self, place: str, defect: Defect) -> None:
        if not self.skip_bad:
            fail(self.path, f"{place}: {defect}")


def _first_sound(items: Iterator[Item], source: _Source, forced: str | None) -> tuple[str, Iterator[Item]]:
    """The format of the first row that has one, and all items again; turns where none is an object."""
    seen: list[Item] = []
    if forced is not None:
        return forced, items
    for item in items:
        seen.append(item)
        if name := formats.recognised(item.value):
            return name, itertools.chain(seen, items)
        if isinstance(item.value, dict):
            source.bad(item, formats.unknown(item.value))
        elif isinstance(item.value, Defect) and item.place[0] == "line":
            source.bad(item, item.value)
    return formats.TURNS, iter(seen)


def _of_rows(items: Iterator[Item], source: _Source, one: formats.Format, is_forced: bool) -> Iterator[Example]:
    for item in items:
        other = None if is_forced else formats.recognised(item.value)
        if other is not None and (not one.has_any_key(item.value) or formats.goes_before(other, one.name)):
            kind, number = item.place
            fail(
                source.path,
                f"{kind} {number}: has the keys of the format {other}, and rows before it those of {one.name}: "
                "make a file of each, or say which with --corpus-format",
            )
        try:
            yield one.read(_sound(item.value))
        except Defect as defect:
            source.bad(item, defect)


def _sound(value: Any) -> Any:
    if isinstance(value, Defect):
        raise value
    return value
