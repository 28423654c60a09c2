"""What do saved records say? `lightweight report RECORD.json`: a page, markdown, one table for a paper, or a bundle."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightweight import record
from lightweight.cli.terminal import refuse, tell
from lightweight.report import publish, write

OF_NAME: dict[str, publish.Form] = {".tex": "latex", ".csv": "csv", ".md": "markdown"}
"""What a file is written as where nobody says."""


def command(options: argparse.Namespace) -> int:
    """Write what is asked for; the exit status."""
    try:
        runs = [record.load(path) for path in options.records]
        if options.figures:
            write.draw(options.figures, runs)
        if options.into:
            write.into(options.into, runs)
        if options.output:
            write.write(options.output, _content(options, runs))
        elif options.format or options.columns or not (options.into or options.figures or options.bundle):
            print(_content(options, runs), end="")
    except (record.RecordError, write.ReportError, publish.ColumnError) as error:
        return refuse(error)
    return _bundle(options.bundle, runs, options.files) if options.bundle else 0


def _bundle(path: Path, runs: Sequence[record.Run], files: Sequence[Path]) -> int:
    from lightweight.cli import bundle  # torch takes seconds

    try:
        tell(bundle.write(path, runs, files))
    except bundle.BundleError as error:
        return refuse(error)
    return 0


def _content(options: argparse.Namespace, runs: Sequence[record.Run]) -> str:
    """The report, or the one table for a paper. Raises ColumnError and ReportError."""
    suffix = options.output.suffix if options.output else ""
    form: publish.Form | write.Format = (
        options.format or OF_NAME.get(suffix) or ("html" if options.output else "terminal")
    )
    if options.columns is None and form != "latex" and form != "csv":
        return write.rendered(runs, form)
    if form == "html":
        raise write.ReportError("--columns: a page has every column: take --format latex, csv, markdown or terminal")
    return publish.published(runs, form, publish.chosen(options.columns))
