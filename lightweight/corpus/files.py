"""A file's JSON, item by item: a list, or one value a line, plain or gzipped. Never the whole file at once.

A list is decoded from a buffer that holds a few of its items; lines are decoded one by one. What is in memory beside
what has been made of it is one item, or some, and of a damaged list at most the whole text, once.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, cast

from lightweight.corpus.conversation import CorpusError, Defect

CHUNK_BYTES = 1 << 20
"""Read at once: rows are rarely longer."""

LINES = re.compile(r"\.(jsonl|ndjson)(\.gz)?$", re.IGNORECASE)
"""The names of files that hold one JSON value a line. In others a list is looked for first."""

DECODER = json.JSONDecoder()
SPACE = re.compile(r"[ \t\n\r]*")

TOO_DEEP = "is nested too deeply: write a flat list of turns"
TOO_LONG = "holds a number of thousands of digits, which JSON readers refuse: write it as text"
"""Python reads no number of over 4300 digits."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that Git has left where it keeps a large one elsewhere."""

AFTER_AN_ITEM = (",", "]", " ", "\t", "\n", "\r")

LONGEST_WORD = 16
"""Characters before the end of a text that was cut off in which a decoder may tell of it: -Infinity has 9, an escaped
character outside the basic plane 12."""


class Item(NamedTuple):
    """A value of a file, or the Defect for which it could not be read; `place` is its line, counted from 1, or the
    index in its list, from 0."""

    place: tuple[str, int]
    value: Any


def fail(path: Path | str, problem: str) -> NoReturn:
    """Refuse the corpus at `path`: raises CorpusError."""
    raise CorpusError(f"corpus {path}: {problem}") from None


def items(path: Path, progress: Callable[[str], None]) -> Iterator[Item]:
    """What the JSON file at `path` holds, telling `progress` on the way how much of it has been read. Raises
    CorpusError."""
    with opened(path, progress) as (stream, told):
        yield from _lines(stream, told) if LINES.search(path.name) else _list_or_lines(stream, path, told)


@contextlib.contextmanager
def opened(path: Path, progress: Callable[[str], None]) -> Iterator[tuple[io.BufferedReader, ReadSoFar]]:
    """The bytes of the file at `path`, decompressed, and what tells `progress` how much of it has been read. Raises
    CorpusError, also for what fails while they are read."""
    try:
        with path.open("rb") as raw:
            if raw.peek(len(LFS_POINTER)).startswith(LFS_POINTER):
                fail(path, "is a Git LFS pointer, not the data: fetch them with git lfs pull")
            yield _unzipped(raw), ReadSoFar(path.name, progress, raw)
    except FileNotFoundError:
        fail(path, "does not exist: give the path of a file")
    except IsADirectoryError:
        fail(path, "is a directory: give the path of a file")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        fail(path, f"is damaged or cut off ({error}): compress it again")
    except OSError as error:
        fail(path, f"cannot be read ({error.strerror}): make it a readable file")


def _unzipped(raw: io.BufferedReader) -> io.BufferedReader:
    """`raw`, or what is compressed in it: a gzip file begins with two bytes that no text has."""
    if raw.peek(2)[:2] != b"\x1f\x8b":
        return raw
    return io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=raw)), CHUNK_BYTES)


class ReadSoFar:
    """How much of what is called `name` has been read, told whenever it is another hundredth. `file` is what it is read
    from, None where that does not say it."""

    def __init__(self, name: str, progress: Callable[[str], None], file: BinaryIO | None = None) -> None:
        self._name, self._progress, self._file = name, progress, file
        self._bytes = 0 if file is None else os.fstat(file.fileno()).st_size
        self._share = 0

    def look(self) -> None:
        """Tell what is new of the file, unless it is read at once, or a pipe."""
        if self._file is not None and self._bytes > CHUNK_BYTES:
            self.at(self._file.tell(), self._bytes)

    def at(self, done: int, whole: int) -> None:
        """Tell that so much of `whole` has been read, if that is new."""
        share = 100 * done // whole
        if share > self._share:
            self._share = share
            self._progress(f"reading {self._name}: {share} %")


def _lines(lines: Iterable[bytes], told: ReadSoFar) -> Iterator[Item]:
    """One value a line. Empty lines are none."""
    for number, line in enumerate(lines, 1):
        told.look()
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield Item(("line", number), _value(line))


def _value(line: bytes) -> Any:
    """The value of a line; the Defect of one that has none, which is raised where it is not skipped."""
    try:
        return DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        return Defect(f"is not UTF-8 at byte {error.start} of the line: save it as UTF-8")
    except json.JSONDecodeError as error:
        return Defect(f"is not JSON at column {error.colno} ({error.msg}): write one JSON object per line")
    except RecursionError:
        return Defect(TOO_DEEP)
    except ValueError:
        return Defect(TOO_LONG)


def _list_or_lines(stream: io.BufferedReader, path: Path, told: ReadSoFar) -> Iterator[Item]:
    """The items of a list. A file whose first line is a whole JSON object, and not all there is, holds one a line."""
    head = [] if _begins_a_list(stream) else list(_up_to_second(stream))
    written = [line for line in head if line.strip()]
    if len(written) == 2 and isinstance(_value(written[0].removeprefix(codecs.BOM_UTF8)), dict):
        yield from _lines(itertools.chain(head, stream), told)
    else:
        yield from _Listed(b"".join(head), stream, path, told)


def _begins_a_list(stream: io.BufferedReader) -> bool:
    return stream.peek(CHUNK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _up_to_second(stream: io.BufferedReader) -> Iterator[bytes]:
    """The lines up to the second one that is not empty."""
    written = 0
    while written < 2 and (line := stream.readline()):
        yield line
        written += bool(line.strip())


class _Listed:
    """The items of a JSON list, decoded from a buffer: the text from where the last item ended to where has been read.

    The buffer grows by as much as it has until it holds an item whole, so that a long one is not looked at over and
    over.
    """

    def __init__(self, head: bytes, stream: BinaryIO, path: Path, told: ReadSoFar) -> None:
        self._stream, self._path, self._told = stream, path, told
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._bytes = 0
        self._text, self._at, self._is_whole = "", 0, False
        self._line, self._column = 1, 1  # of the buffer's first character
        self._append(head.removeprefix(codecs.BOM_UTF8))

    def __iter__(self) -> Iterator[Item]:
        if self._next() != "[":
            self._refuse_no_list()
        self._at += 1
        if self._next() == "]":
            self._at += 1
        else:
            for index in itertools.count():
                yield Item(("row", index), self._item())
                separator = self._next()
                if separator not in (",", "]"):
                    self._not_json("Expecting ',' delimiter", self._at)
                self._at += 1
                if separator == "]":
                    break
        if self._next():
            self._not_json("Extra data", self._at)

    def _refuse_no_list(self) -> NoReturn:
        kind = json_kind(self._item())
        if self._next():
            self._not_json("Extra data", self._at)
        fail(self._path, f"holds a JSON {kind}: write a list of rows")

    def _item(self) -> Any:
        """The value that begins next."""
        self._next()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
                if self._is_whole or self._text[end : end + 1] in AFTER_AN_ITEM:  # a number could go on
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - LONGEST_WORD
                if self._is_whole or not cut_off:
                    self._not_json(error.msg, error.pos)
            except RecursionError:
                fail(self._path, TOO_DEEP)
            except ValueError:
                fail(self._path, TOO_LONG)
            self._read(len(self._text) - self._at)

    def _next(self) -> str:
        """The next character that is no space, where the buffer then stands; none at the end."""
        while True:
            match = SPACE.match(self._text, self._at)
            assert match
            self._at = match.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if self._is_whole:
                return ""
            self._read(0)

    def _read(self, more: int) -> None:
        """Drop what has been used from the buffer and add a chunk to it, or `more` bytes."""
        lines = self._text.count("\n", 0, self._at)
        start = self._text.rfind("\n", 0, self._at)
        self._column = self._at - start if lines else self._column + self._at
        self._line += lines
        self._text, self._at = self._text[self._at :], 0
        chunk = self._stream.read(max(more, CHUNK_BYTES))
        self._is_whole = not chunk
        self._append(chunk)
        self._told.look()

    def _append(self, chunk: bytes) -> None:
        pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(chunk, final=self._is_whole)
        except UnicodeDecodeError as error:
            fail(self._path, f"is not UTF-8 at byte {self._bytes - pending + error.start}: save it as UTF-8")
        if not self._bytes:
            text = text.removeprefix("\ufeff")
        self._bytes += len(chunk)
        self._text += text

    def _not_json(self, message: str, at: int) -> NoReturn:
        lines = self._text.count("\n", 0, at)
        column = at - self._text.rfind("\n", 0, at) if lines else self._column + at
        fail(self._path, f"is not JSON at line {self._line + lines}, column {column} ({message}): correct it there")


def json_kind(value: Any) -> str:
    """What JSON calls the kind of `value`."""
    kinds = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), "null")
