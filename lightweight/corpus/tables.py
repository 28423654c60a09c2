"""Rows of tables: CSV by Python's own module, and Parquet, Arrow and the hub's data sets through `datasets`."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lightweight.corpus.conversation import CorpusError, Defect
from lightweight.corpus.files import Item, fail, opened
from lightweight.models import reason

HUB = "hub:"
"""What the name of a data set on the hub begins with, where a corpus is said."""

OF_DATASETS = {".parquet": "parquet", ".arrow": "arrow"}
"""Endings of files that `datasets` reads, and what it calls them."""

SEPARATED = re.compile(r"\.(csv|tsv)(\.gz)?$", re.IGNORECASE)

LONGEST_CELL = 2**31 - 1
"""Characters; the csv module refuses more than 131,072 unless it is told so."""


def holds(path: Path | str) -> bool:
    """Whether the corpus at `path` is a table."""
    name = str(path)
    return name.startswith(HUB) or bool(SEPARATED.search(name)) or Path(name).suffix.lower() in OF_DATASETS


def items(path: Path | str, progress: Callable[[str], None]) -> Iterator[Item]:
    """The rows of the table at `path`, a file or `hub:NAME[:SPLIT]`. Raises CorpusError."""
    name = str(path)
    if SEPARATED.search(name):
        return _separated(Path(path), progress)
    if not name.startswith(HUB):
        with opened(Path(path), progress):
            pass  # it is there
    return _of_datasets(path, progress)


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
            fail(path, f"line {reader.line_num}: is no CSV ({error}): mend its quotes")


def _decoded(lines: Iterable[bytes], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            fail(path, f"is not UTF-8 at byte {error.start} of line {number}: save it as UTF-8")


def _row(header: list[str], cells: list[str]) -> dict[str, str] | Defect:
    if len(cells) != len(header):
        return Defect(f"has {len(cells)} cells, and the first line {len(header)}: quote what has commas or line breaks")
    return dict(zip(header, cells, strict=True))


def _of_datasets(path: Path | str, progress: Callable[[str], None]) -> Iterator[Item]:
    try:
        import datasets  # a second, and an extra
    except ImportError:
        fail(path, "needs the package datasets to be read: pip install 'lightweight-llm[data]'")
    progress(f"loading {path}")
    datasets.disable_progress_bars()
    try:
        for index, row in enumerate(_rows(datasets, str(path))):
            yield Item(("row", index), row)
    except CorpusError:
        raise
    except Exception as error:  # of pyarrow, the hub or the network, each in its own way
        mend = "give hub:NAME:SPLIT of one that exists" if str(path).startswith(HUB) else "write it once more"
        raise CorpusError(f"corpus {path}: datasets cannot read it ({reason(error)}): {mend}") from error


def _rows(datasets: Any, path: str) -> Iterable[dict[str, Any]]:
    """What `datasets` reads; a file row by row, without a copy in its cache, the hub's through its cache."""
    if path.startswith(HUB):
        name, _, split = path.removeprefix(HUB).partition(":")
        return datasets.load_dataset(name, split=split or "train")  # type: ignore[no-any-return]
    kind = OF_DATASETS[Path(path).suffix.lower()]
    return datasets.load_dataset(kind, data_files=path, split="train", streaming=True)  # type: ignore[no-any-return]
