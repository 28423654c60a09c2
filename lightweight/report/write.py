"""Where does a report go? Onto a terminal, into Markdown, a page or pictures: each file whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightweight import files
from lightweight.record import Run, one_line
from lightweight.report import publish, tables
from lightweight.report.findings import findings
from lightweight.report.text_table import TextFormat, markdown

Format = Literal["terminal", "markdown", "html"]


class ReportError(ValueError):
    """A report that cannot be written. The message names the file and the mend, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def text(runs: Sequence[Run], style: TextFormat) -> str:
    """The whole report: what was found, then every table. Runs are in any order; of a cell's trials the newest is told
    and older ones are its history."""
    heading = "### {}" if style == "markdown" else "{}:"
    lines = [str(finding) for finding in findings(runs)]
    parts = ["\n".join(f"- {markdown(line) if style == 'markdown' else line}" for line in lines)]
    parts += [f"{heading.format(one_line(of.title))}\n\n{of.text(style)}" for of in tables.tables(runs)]
    return "\n\n".join(parts)


def rendered(runs: Sequence[Run], form: Format) -> str:
    """The report of `runs` in one of its forms."""
    if form == "html":
        from lightweight.report import page  # matplotlib takes a second, and a table needs none

        return page.html(runs)
    return text(runs, form) + "\n"


def save(path: Path, runs: Sequence[Run], form: Format | None = None) -> None:
    """Write the report of `runs` to `path`: as `form` says, else as markdown where the name ends in .md, else as a
    page. Raises ReportError."""
    write(path, rendered(runs, form or ("markdown" if path.suffix == ".md" else "html")))


def marks(key: str) -> tuple[str, str]:
    """The lines in a file between which the table of that key stands."""
    return f"<!-- {key}: begin -->", f"<!-- {key}: end -->"


def into(readme: Path, runs: Sequence[Run]) -> None:
    """Put every table whose marks `readme` has between them, such as `<!-- results: begin -->` and `<!-- results: end
    -->`; the marks' names are the tables' keys. Raises ReportError."""
    try:
        content = readme.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ReportError(f"report {readme}: cannot be read ({said})") from error
    made = (*tables.tables(runs), tables.brief(runs), publish.tabled(runs))
    every = {table.key: table for table in made if table.rows}
    keys = [key for key in re.findall(r"<!-- ([\w-]+): (?:begin|end) -->", content) if key == "results" or key in every]
    for key in dict.fromkeys(keys or ["results"]):
        begin, end = marks(key)
        if content.count(begin) != 1 or content.count(end) != 1 or content.index(begin) > content.index(end):
            raise ReportError(f"report {readme}: needs the lines '{begin}' and '{end}' once each")
        if key not in every:
            raise ReportError(f"report {readme}: the records hold nothing for '{begin}'")
        before, rest = content.split(begin)
        content = f"{before}{begin}\n\n{every[key].text('markdown')}\n\n{end}{rest.split(end)[1]}"
    write(readme, content)


def draw(folder: Path, runs: Sequence[Run]) -> None:
    """Write every picture of `runs` into `folder` as an SVG file, called by its key. Raises ReportError."""
    from lightweight.report import drawing, figures

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"report {folder}: is not a folder that can be written ({error.strerror})") from error
    for picture in figures.pictures(runs):
        write(folder / f"{picture.key}.svg", drawing.standalone(picture))


def write(path: Path, content: str) -> None:
    """Put `content` into the file at `path`, all of it or nothing. Raises ReportError."""
    try:
        files.write(path, content)
    except OSError as error:
        raise ReportError(f"report {path}: cannot be written ({error.strerror})") from error
