"""Rows of tables: CSV by Python's own module, Parquet and Arrow by pyarrow, the hub's data sets by `datasets`.

A file is read some rows at a time. `datasets` holds a group of rows of a Parquet file whole, which often is all of it.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from lightweight.corpus.conversation import CorpusError, Defect
from lightweight.corpus.files import CHUNK_BYTES, Item, ReadSoFar, fail, opened
from lightweight.models import reason

HUB = "hub:"
"""What the name of a data set on the hub begins with, where a corpus is said."""

COLUMNS = (".parquet", ".arrow")
"""Endings of the files that pyarrow reads, which comes with `datasets`."""

BATCH = 1000
"""Rows of a file that are read at once."""

SEPARATED = re.compile(r"\.(csv|tsv)(\.gz)?$", re.IGNORECASE)

LONGEST_CELL = 2**31 - 1
"""Characters; the csv module refuses more than 131,072 unless it is told so."""


def holds(path: Path | str) -> bool:
    """Whether the corpus at `path` is a table."""
    name = str(path)
    return name.startswith(HUB) or bool(SEPARATED.search(name)) or Path(name).suffix.lower() in COLUMNS


def items(path: Path | str, progress: Callable[[str], None]) -> Iterator[Item]:
    """The rows of the table at `path`, a file or `hub:NAME[:SPLIT]`. Raises CorpusError."""
    name = str(path)
    if SEPARATED.search(name):
        return _separated(Path(path), progress)
    return _of_hub(name, progress) if name.startswith(HUB) else _of_columns(Path(path), progress)


def _separated(path: Path, progress: Callable[[str], None]) -> Iterator[Item]:
    """The rows of a file of values separated by commas, or by tabs; every value is a text, of an empty cell too."""
    csv.field_size_limit(LONGEST_CELL)
    with opened(path, progress) as (stream, told):
        reader = csv.reader(_decoded(stream, path), delimiter="\t" if ".tsv" in path.name.lower() else ",", strict=True)
        try:
            header = next(reader, [])
            first = reader.line_num + 1
            for cells in reader:
                told.look()
                if cells and (len(cells) > 1 or len(header) == 1 or cells[0].strip()):  # an empty line is no row
                    yield Item(("line", first), _row(header, cells))
                first = reader.line_num + 1
        except csv.Error as error:
            fail(path, f"line {reader.line_num}: is not CSV ({error}): correct its quotes")


def _decoded(lines: Iterable[bytes], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            if (zero := line.find(0)) >= 0:  # UTF-16 has them, and blocks that were never written
                fail(
                    path, f"holds a zero byte, which text never has, at byte {zero} of line {number}: save it as UTF-8"
                )
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            fail(path, f"is not UTF-8 at byte {error.start} of line {number}: save it as UTF-8")


def _row(header: list[str], cells: list[str]) -> dict[str, str] | Defect:
    if len(cells) != len(header):
        return Defect(f"has {len(cells)} cells, and the first line {len(header)}: quote what has commas or line breaks")
    return dict(zip(header, cells, strict=True))


def _of_columns(path: Path, progress: Callable[[str], None]) -> Iterator[Item]:
    """The rows of a Parquet or Arrow file."""
    with opened(path, progress) as (stream, told):
        try:
            import pyarrow  # noqa: F401  it and datasets are an extra
        except ImportError:
            _missing(path)
        read = _parquet if path.suffix.lower() == ".parquet" else _arrow
        try:
            index = 0
            for batch in read(stream, told):
                batch.validate(full=True)  # pyarrow trusts offsets, also where they lead out of a damaged file
                for row in batch.to_pylist():
                    yield Item(("row", index), row)
                    index += 1
        except Exception as error:  # of pyarrow, in its own ways
            raise CorpusError(f"corpus {path}: pyarrow cannot read it ({reason(error)}): write it again") from error


def _parquet(stream: BinaryIO, told: ReadSoFar) -> Iterator[Any]:
    from pyarrow import parquet

    file = parquet.ParquetFile(stream, buffer_size=CHUNK_BYTES, pre_buffer=False)
    done = 0
    for batch in file.iter_batches(BATCH):
        yield batch
        done += batch.num_rows
        told.at(done, file.metadata.num_rows)


def _arrow(stream: BinaryIO, told: ReadSoFar) -> Iterator[Any]:
    """Batches of either of Arrow's two kinds of files."""
    from pyarrow import ipc

    try:
        batches: Iterable[Any] = ipc.open_stream(stream)
    except ValueError:
        stream.seek(0)
        file = ipc.open_file(stream)
        batches = map(file.get_batch, range(file.num_record_batches))
    for batch in batches:
        yield batch
        told.look()


def _of_hub(name: str, progress: Callable[[str], None]) -> Iterator[Item]:
    """The rows of a data set, which `datasets` maps from its cache into memory."""
    try:
        import datasets
    except ImportError:
        _missing(name)
    progress(f"loading {name}")
    datasets.disable_progress_bars()
    of_hub, _, split = name.removeprefix(HUB).partition(":")
    try:
        found = datasets.load_dataset(of_hub, split=split or "train")
        told = ReadSoFar(of_hub, progress)
        for index, row in enumerate(found):
            yield Item(("row", index), row)
            told.at(index, len(found))
    except Exception as error:  # of the hub or the network, each in its own way
        mend = "give hub:NAME:SPLIT of one that exists"
        raise CorpusError(f"corpus {name}: datasets cannot read it ({reason(error)}): {mend}") from error


def _missing(path: Path | str) -> NoReturn:
    fail(path, "needs the package datasets to be read: pip install 'lightweight-llm[data]'")
