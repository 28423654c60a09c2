"""The command line: `lightweight report RECORD.json ...` and `lightweight gate NEW.json --against OLD.json`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightweight import __version__, gate, record, report


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 1 for a gate that fails, 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="lightweight", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("report", help="print saved records as one table")
    command.add_argument("records", nargs="+", type=Path, metavar="RECORD.json")
    command.add_argument("--format", choices=("terminal", "markdown"), default="terminal")
    command.add_argument(
        "--into", type=Path, metavar="README.md", help="write the markdown table between the result marks of this file"
    )
    command = commands.add_parser("gate", help="hold a saved record against older ones; status 1 where it got worse")
    command.add_argument("new", type=Path, metavar="NEW.json")
    command.add_argument("--against", nargs="+", type=Path, required=True, metavar="OLD.json")
    for what in ("speedup", "memory"):
        command.add_argument(
            f"--{what}-fail", default=f"{gate.FAIL:.0%}", metavar="PERCENT", help="of the stored ratio (default: 5%%)"
        )
    command.add_argument("--undecided", choices=("pass", "fail"), default="pass")
    options = parser.parse_args(arguments)
    try:
        if options.command == "gate":
            return _gate(options)
        entries = record.load(options.records)
        if options.into:
            report.into(options.into, report.table(entries, "markdown"))
        else:
            print(report.table(entries, options.format))
    except (record.RecordError, report.ReportError, _OptionError) as error:
        print(f"lightweight: {error}", file=sys.stderr)
        return 2
    return 0


class _OptionError(ValueError):
    """An option that cannot be used. The message names it and the mend."""


def _gate(options: argparse.Namespace) -> int:
    shares = {}
    for what in ("speedup_fail", "memory_fail"):
        try:
            shares[what] = gate.share(getattr(options, what))
        except ValueError as error:
            raise _OptionError(f"--{what.replace('_', '-')} {error}") from None
    entries = record.load([options.new])
    runs, problems = gate.load(options.against)
    comparison = gate.compare(entries, runs, gate.Limits(**shares, undecided=options.undecided))
    print("\n".join([*problems, gate.text(comparison)]))
    return 1 if comparison.failures else 0


if __name__ == "__main__":
    sys.exit(main())
