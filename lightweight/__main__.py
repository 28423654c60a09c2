"""The command line: `lightweight report RECORD.json ...`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightweight import __version__, record, report


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status, 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="lightweight", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("report", help="print saved records as one table")
    command.add_argument("records", nargs="+", type=Path, metavar="RECORD.json")
    command.add_argument("--format", choices=("terminal", "markdown"), default="terminal")
    command.add_argument(
        "--into", type=Path, metavar="README.md", help="write the markdown table between the result marks of this file"
    )
    options = parser.parse_args(arguments)
    try:
        entries = record.load(options.records)
        if options.into:
            report.into(options.into, report.table(entries, "markdown"))
        else:
            print(report.table(entries, options.format))
    except (record.RecordError, report.ReportError) as error:
        print(f"lightweight: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
