"""What is a table? Text in rows and columns, shown on a terminal, in Markdown or on a page. Which columns the report's
tables have is in `tables` and `speed_tables`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from tabulate import tabulate

from lightweight.record import Entry, one_line

TextFormat = Literal["terminal", "markdown"]

Row = TypeVar("Row")

Column = tuple[str, Literal["l", "r"], Callable[[Row], str]]
"""A column's heading, the side that it is aligned to, and what a row has in it."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table as text. `key` names it in a file's marks and a page's links, `entries` has what each row is of, None
    where it is of no single trial. `aligned` has one letter a column, `l` or `r`."""

    key: str
    title: str
    columns: Sequence[str]
    aligned: str
    rows: Sequence[Sequence[str]]
    entries: Sequence[Entry | None]
    notes: Sequence[str] = ()

    def text(self, style: TextFormat) -> str:
        """The table with the notes it needs, without its title."""
        rows = [[one_line(cell) for cell in row] for row in self.rows]
        columns = [one_line(column) for column in self.columns]
        if style == "markdown":
            rows = [[markdown(cell) for cell in row] for row in rows]
            columns = [markdown(column) for column in columns]
        shown = tabulate(
            rows,
            headers=columns,
            tablefmt="github" if style == "markdown" else "simple",
            disable_numparse=True,
            colalign=["right" if letter == "r" else "left" for letter in self.aligned] if rows else None,
        )
        return ("\n\n" if style == "markdown" else "\n").join([shown, *map(one_line, self.notes)])


def table(
    key: str,
    title: str,
    columns: Sequence[Column[Row]],
    rows: Sequence[Row],
    entries: Sequence[Entry | None],
    notes: Sequence[str] = (),
) -> Table:
    """The table of `rows` in `columns`; `entries` has the trial that each row is of."""
    return Table(
        key=key,
        title=title,
        columns=[heading for heading, _, _ in columns],
        aligned="".join(side for _, side, _ in columns),
        rows=[[cell(row) for _, _, cell in columns] for row in rows],
        entries=entries,
        notes=notes,
    )


def markdown(text: str) -> str:
    """`text` as text, whatever stands in it: no cell's end, no tag, no link."""
    escaped = one_line(text).replace("\\", r"\\").replace("|", r"\|").replace("`", r"\`").replace("](", r"]\(")
    return escaped.replace("&", "&amp;").replace("<", "&lt;")
