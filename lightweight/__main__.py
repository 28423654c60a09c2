"""The command line: `lightweight plan MODEL`, `lightweight report RECORD.json`, `lightweight gate NEW.json`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from lightweight import __version__, gate, record, report


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 1 for a gate that fails, 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="lightweight", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_plan(commands.add_parser("plan", help="forecast which methods fit which cards, without a GPU or the weights"))
    _add_report(commands.add_parser("report", help="print saved records as one table"))
    _add_gate(commands.add_parser("gate", help="hold a saved record against older ones; status 1 where it got worse"))
    options = parser.parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    return run(options)


def _refuse(error: Exception) -> int:
    print(f"lightweight: {error}", file=sys.stderr)
    return 2


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_report)
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORD.json")
    parser.add_argument("--format", choices=("terminal", "markdown"), default="terminal")
    parser.add_argument(
        "--into", type=Path, metavar="README.md", help="write the markdown table between the result marks of this file"
    )


def _report(options: argparse.Namespace) -> int:
    try:
        entries = record.load(options.records)
        if options.into:
            report.into(options.into, report.table(entries, "markdown"))
        else:
            tables = (report.table(entries, options.format), report.no_worse_table(entries, options.format))
            print("\n\n".join(filter(None, tables)))
    except (record.RecordError, report.ReportError) as error:
        return _refuse(error)
    return 0


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_plan)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a known name, a hub id or a local folder")
    parser.add_argument(
        "--method", action="append", metavar="NAME", help="repeatable: a known name or package.module:NAME"
    )
    parser.add_argument(
        "--target", action="append", metavar="NAME", help="repeatable: a card, or an amount such as 16GiB"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="sequences a forward pass (default: the method's)")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens a row (default: 256)")
    parser.add_argument("--max-batch", action="store_true", help="also find the largest batch that fits")
    parser.add_argument(
        "--record",
        action="append",
        default=[],
        type=Path,
        metavar="RECORD.json",
        help="repeatable: records whose step times say which method is the fastest",
    )
    parser.add_argument("--format", choices=("table", "json"), default="table")


def _plan(options: argparse.Namespace) -> int:
    from lightweight import forecast, methods, models, plan, targets  # torch takes seconds, and a report needs none
    from lightweight.trial import MAX_LENGTH

    try:
        for option in ("batch_size", "max_length"):
            value = getattr(options, option)
            if value is not None and value < 1:
                raise ValueError(f"--{option.replace('_', '-')} {value}: give at least 1")
        stock = [method.name for method in methods.METHODS.values() if method.captured_step is None]
        wanted_methods = [methods.named(name) for name in dict.fromkeys(options.method or stock)]
        names = options.target or [target.name for target in targets.TARGETS.values() if target.total_bytes]
        wanted_targets = [targets.named(name) for name in dict.fromkeys(names)]
        for target in wanted_targets:
            if target.total_bytes is None:
                raise ValueError(f"target {target.name!r} has no amount of memory to plan for: name a card, or 16GiB")
        measured = record.load(options.record)
    except ValueError as error:
        return _refuse(error)
    try:
        rows = plan.plan(
            [models.named(name) for name in dict.fromkeys(options.models)],
            wanted_methods,
            wanted_targets,
            batch_size=options.batch_size,
            max_length=options.max_length or MAX_LENGTH,
            max_batch=options.max_batch,
            measured=measured,
            progress=_show,
        )
    except (forecast.ForecastError, models.ModelError) as error:
        return _refuse(error)
    finally:
        _show("")
    print(json.dumps(rows, indent=1) if options.format == "json" else plan.table(rows))
    if options.target:
        return 0 if plan.each_target_has_a_method(rows) else 1
    return 0 if any(row["chosen"] for row in rows) else 1


def _show(text: str) -> None:
    """A line of progress that the next one overwrites; none where nobody watches."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _add_gate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_gate)
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument("--against", nargs="+", type=Path, required=True, metavar="OLD.json")
    for what in ("speedup", "memory"):
        parser.add_argument(
            f"--{what}-fail", default=f"{gate.FAIL:.0%}", metavar="PERCENT", help="of the stored ratio (default: 5%%)"
        )
    parser.add_argument("--undecided", choices=("pass", "fail"), default="pass")


def _gate(options: argparse.Namespace) -> int:
    shares = {}
    for what in ("speedup_fail", "memory_fail"):
        try:
            shares[what] = gate.share(getattr(options, what))
        except ValueError as error:
            return _refuse(ValueError(f"--{what.replace('_', '-')} {error}"))
    try:
        entries = record.load([options.new])
        runs, problems = gate.load(options.against)
    except record.RecordError as error:
        return _refuse(error)
    comparison = gate.compare(entries, runs, gate.Limits(**shares, undecided=options.undecided))
    print("\n".join([*problems, gate.text(comparison)]))
    return 1 if comparison.failures else 0


if __name__ == "__main__":
    sys.exit(main())
