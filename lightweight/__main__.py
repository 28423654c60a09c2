"""Which way of fine-tuning fits this GPU, and how fast is it? `lightweight COMMAND --help` says what a command takes.
Experiments are run by pytest: `pytest experiments`."""

from __future__ import annotations

from lightweight.imports import for_good, interrupted_silently

with interrupted_silently(), for_good():
    import argparse
    import errno
    import os
    import select
    import signal
    import sys
    from collections.abc import Callable, Iterator
    from contextlib import contextmanager, suppress
    from pathlib import Path
    from typing import Any, NoReturn

    from lightweight import __version__
    from lightweight.child import host_memory
    from lightweight.cli import checks
    from lightweight.cli.checkpoints import signals_to
    from lightweight.cli.streams import make_usable
    from lightweight.cli.terminal import FULL, end_output, refuse, tell
    from lightweight.settings import OF_CORPUS, SETTINGS
    from lightweight.targets import size


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 1 for a gate that fails or a training that did not complete, 2 for
    input that cannot be used, 130 for an interruption, 141 where nobody reads what it prints."""
    make_usable()
    try:
        with signals_to(signal.default_int_handler):  # what asks a command to end has it leave as Ctrl-C does
            options = parser().parse_args(arguments)
            options.given = sys.argv[1:] if arguments is None else arguments
            status = _run(options)
            end_output()
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        tell("interrupted")
        return 128 + signal.SIGINT
    except Exception as error:
        if host_memory.ran_out(error):
            least = host_memory.limit()
            tell(f"the host is out of memory: {least.what} is {size(least.bytes)}: raise it, or ask for less")
            return 1
        if isinstance(error, OSError) and error.filename is not None:  # such as a name that is too long
            tell(f"{error.filename}: cannot be read or written ({error.strerror})")
        elif isinstance(error, OSError) and error.errno in FULL:
            _print_nowhere()
            tell(f"the output cannot be written ({error.strerror}): free some space, or print it elsewhere")
        elif isinstance(error, OSError) and error.errno == errno.EMFILE:
            tell("this process has opened all the files it may by the limit of ulimit -n: raise it")
        elif isinstance(error, FileNotFoundError):  # getcwd(3)
            tell("the current folder no longer exists: change to another one")
        else:
            raise
        return 2
    return status


def _run(options: argparse.Namespace) -> int:
    """Run the command, where what it was given can be used as far as that is known without torch."""
    check: Callable[[argparse.Namespace], None] = options.check
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        check(options)
    except ValueError as error:
        return refuse(error)
    return run(options)


@contextmanager
def _importing() -> Iterator[None]:
    """Inside, torch is imported, which takes seconds: what asks this process to end ends it at once, since what is
    imported may swallow a KeyboardInterrupt."""
    with signals_to(_leave), for_good():
        yield


def _leave(*_: object) -> NoReturn:
    tell("interrupted")
    os._exit(128 + signal.SIGINT)


def _nobody_reads() -> bool:
    """Whether who reads the output, `head` say, has read enough; what Python flushes as it ends then goes nowhere."""
    output = select.poll()
    output.register(sys.stdout.fileno(), select.POLLOUT)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    _print_nowhere()
    return True


def _print_nowhere() -> None:
    """Python flushes what is left as it ends, and would fail once more."""
    with suppress(OSError, ValueError):  # of an output that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """Of the command line, or of a command, whose arguments `add` adds once it is the one that is called: what they
    name need not be imported for another. What it refuses is told in one line, as all else is."""

    def __init__(self, add: Callable[[argparse.ArgumentParser], None] | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self._add = add

    def parse_known_args(self, *given: Any, **settings: Any) -> Any:
        add, self._add = self._add, None
        if add is not None:
            with for_good():
                add(self)
        options, others = super().parse_known_args(*given, **settings)
        if others:  # which the command line would refuse in its own name, with its own help
            self.error(f"unrecognized arguments: {' '.join(others)}")
        return options, others

    def error(self, message: str) -> NoReturn:
        problem = message.removeprefix("argument ").replace("ignored explicit argument", "takes no value, not")
        tell(f"{problem}; see `{self.prog} --help`")
        self.exit(2)


def parser() -> argparse.ArgumentParser:
    """What the command line is read with."""
    parser = _Parser(prog="lightweight", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "plan", add=_add_plan, help="forecast which methods fit which cards, without a GPU or the weights"
    )
    commands.add_parser("train", add=_add_train, help="fine-tune a model and save it, with checkpoints on the way")
    commands.add_parser(
        "calibrate", add=_add_calibrate, help="time this GPU's kernels, for forecasts of time; takes two minutes"
    )
    commands.add_parser(
        "sweep", add=_add_sweep, help="search for each method's learning rate, each with the same budget"
    )
    commands.add_parser(
        "data",
        add=_add_data,
        help="look at a corpus before training: lengths in tokens, and which tokens the loss is on",
    )
    commands.add_parser("chat", add=_add_chat, help="have a trained model answer prompts")
    commands.add_parser("report", add=_add_report, help="show saved records as a page, Markdown or tables")
    commands.add_parser("gate", add=_add_gate, help="compare a saved record with older ones; status 1 if it got worse")
    return parser


def _add_report(parser: argparse.ArgumentParser) -> None:
    from lightweight.report import publish

    parser.set_defaults(run=_report, check=checks.nothing)
    parser.add_argument(
        "records",
        nargs="+",
        type=Path,
        metavar="RUN.json",
        help="what `pytest experiments --benchmark-json` or `lightweight plan --format json` stored; several "
        "runs of one model and method are shown as its history",
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="PATH", help="write to this file: HTML, or by its suffix .md, .tex or .csv"
    )
    parser.add_argument(
        "--format",
        choices=("terminal", "markdown", "html", "latex", "csv"),
        help="latex and csv give one table, with one row per model and method (default: by the suffix of PATH, else "
        "terminal)",
    )
    parser.add_argument(
        "--columns",
        metavar="NAME,...",
        help="one table for a paper with these columns, and one row per model and method, over all its seeds: "
        f"{', '.join(publish.COLUMNS)}",
    )
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="DIR|FILE.zip",
        help="write what is needed to repeat the run with one command: records, tests, methods, corpus and versions; "
        "run this in the folder in which pytest ran",
    )
    parser.add_argument(
        "--files",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="repeatable, for --bundle: another folder with a file that the run used: its corpus, or a method",
    )
    parser.add_argument(
        "--into",
        type=Path,
        metavar="README.md",
        help="replace the tables between marks in this file: <!-- KEY: begin --> and <!-- KEY: end -->",
    )
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="also write every picture there, as an SVG file")


def _report(options: argparse.Namespace) -> int:
    with for_good():
        from lightweight.cli import report
    return report.command(options)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_plan, check=checks.plan)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a known name, a hub id or a local folder")
    parser.add_argument(
        "--method",
        action="append",
        metavar="NAME",
        help="repeatable: a known name, package.module:NAME or FILE.py:NAME",
    )
    parser.add_argument(
        "--target", action="append", metavar="NAME", help="repeatable: a card, or an amount such as 16GiB"
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        metavar="PATH",
        help="a file, or hub:NAME[:SPLIT]: forecast the longest batch of this corpus (default: rows of --max-length "
        "tokens)",
    )
    _add_how_read(parser)
    _add_settings(parser)
    parser.add_argument("--max-batch", action="store_true", help="also find the largest batch that fits")
    parser.add_argument(
        "--max-length-that-fits",
        action="store_true",
        help="also find the longest rows that fit, with as few rows per pass as possible",
    )
    parser.add_argument(
        "--gpus",
        metavar="N",
        help="forecast one of N GPUs that share a trial, at most one for each row of a step; also find the fewest GPUs "
        "that suffice (default: 1)",
    )
    parser.add_argument(
        "--record",
        action="append",
        default=[],
        type=Path,
        metavar="RECORD.json",
        help="repeatable: a record, whose step times decide which method is the fastest",
    )
    _add_job(parser)
    parser.add_argument("--format", choices=("table", "json"), default="table", help="(default: table)")
    parser.add_argument(
        "--traceback", action="store_true", help="also show the traceback of each method that cannot be forecast"
    )


def _add_job(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "time",
        "how long the whole job takes and what it costs; forecast only for cards with a calibration or data sheet",
    )
    group.add_argument("--tokens", type=int, metavar="N", help="tokens of the corpus")
    group.add_argument("--epochs", type=int, default=10, metavar="N", help="passes over the corpus (default: 10)")
    group.add_argument("--price", type=float, metavar="AMOUNT", help="price of one hour of the card")
    group.add_argument(
        "--max-hours", type=float, metavar="HOURS", help="choose no method that takes longer, and mark those that do"
    )
    group.add_argument(
        "--max-price", type=float, metavar="AMOUNT", help="choose no method that costs more, and mark those that do"
    )
    group.add_argument(
        "--calibration",
        action="append",
        default=[],
        type=Path,
        metavar="CARD.json",
        help="repeatable: what `lightweight calibrate` wrote; takes precedence over the calibrations in the package",
    )


def _plan(options: argparse.Namespace) -> int:
    with _importing():
        from lightweight.cli import plan
    return plan.command(options)


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_train, check=checks.train)
    parser.add_argument("--model", required=True, metavar="NAME", help="a known name, a hub id or a local folder")
    parser.add_argument(
        "--method",
        metavar="NAME",
        help="a known name, package.module:NAME or FILE.py:NAME (default: the fastest forecast to fit)",
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        default=Path("corpus.json"),
        metavar="PATH",
        help="what to train on: a file, or hub:NAME[:SPLIT] (default: corpus.json)",
    )
    _add_how_read(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the trained model goes")
    parser.add_argument("--overwrite", action="store_true", help="replace the model that is already there")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted job from its last checkpoint")
    parser.add_argument(
        "--target",
        metavar="NAME",
        help="train within the memory of this card, or an amount such as 16GiB (default: all there is)",
    )
    parser.add_argument(
        "--weights",
        choices=("pretrained", "random"),
        help="where weights come from (default: pretrained, except for models that exist only with random weights)",
    )
    parser.add_argument("--epochs", type=int, default=10, metavar="N", help="passes over the corpus (default: 10)")
    parser.add_argument("--max-steps", type=int, metavar="N", help="optimizer steps, instead of epochs")
    _add_settings(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all random numbers (default: 0)")
    parser.add_argument(
        "--report-to",
        choices=("tensorboard", "wandb", "trackio", "mlflow", "none"),
        default="none",
        help="send losses to a tracker (default: none)",
    )
    parser.add_argument(
        "--save-steps", type=int, metavar="N", help="optimizer steps between checkpoints (default: every five minutes)"
    )


def _train(options: argparse.Namespace) -> int:
    from lightweight.cli import train_command

    return train_command.command(options)


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_sweep, check=checks.sweep)
    parser.add_argument("--model", required=True, metavar="NAME", help="a known name, a hub id or a local folder")
    parser.add_argument(
        "--method",
        action="append",
        required=True,
        metavar="NAME",
        help="repeatable: a known name, package.module:NAME or FILE.py:NAME",
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        default=Path("corpus.json"),
        metavar="PATH",
        help="what to train on: a file, or hub:NAME[:SPLIT]; rates are chosen without its held-out part "
        "(default: corpus.json)",
    )
    _add_how_read(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="where the record goes")
    parser.add_argument("--budget", type=int, default=8, metavar="N", help="trials of each method (default: 8)")
    parser.add_argument("--target", metavar="NAME", help="train within the memory of this card (default: all there is)")
    parser.add_argument(
        "--weights",
        choices=("pretrained", "random"),
        help="where weights come from (default: pretrained if they are available, else random)",
    )
    parser.add_argument("--epochs", type=int, default=10, metavar="N", help="passes over the corpus (default: 10)")
    parser.add_argument("--max-steps", type=int, metavar="N", help="optimizer steps, instead of epochs")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all random numbers (default: 0)")
    _add_settings(parser, learning_rate="the range that is searched (default: 1e-5..1e-2)")
    parser.set_defaults(learning_rate="1e-5..1e-2")


def _sweep(options: argparse.Namespace) -> int:
    with _importing():
        from lightweight.cli import sweep
    return sweep.command(options)


def _add_how_read(parser: argparse.ArgumentParser) -> None:
    for one in OF_CORPUS:
        parser.add_argument(f"--{one.name}", help=one.help.replace("%", "%%"), **one.settings)


def _add_settings(parser: argparse.ArgumentParser, **others: str) -> None:
    """The settings; `others` are the words of those that mean something else here."""
    group = parser.add_argument_group("settings", "of the method and of its rows")
    for setting in SETTINGS:
        words = others.get(setting.name, setting.help)
        group.add_argument(setting.flag, metavar=setting.metavar, help=words.replace("%", "%%"))


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_chat, check=checks.chat)
    parser.add_argument("folder", type=Path, metavar="DIR", help="what `lightweight train` wrote")
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="answer this prompt; if TEXT is a file, answer each of its lines and print JSON lines (default: read "
        "standard input, line by line)",
    )
    parser.add_argument("--system", metavar="TEXT", help="the system prompt, for a model trained on conversations")
    parser.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="longest answer, in tokens (default: 256)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="sampling temperature (default: 0, which always takes the most likely token)",
    )


def _chat(options: argparse.Namespace) -> int:
    with _importing():
        from lightweight.cli import chat
    return chat.command(options)


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_calibrate, check=checks.calibrate)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="CARD.json", help="where the record goes")


def _calibrate(options: argparse.Namespace) -> int:
    with _importing():
        from lightweight.cli import calibrate
    return calibrate.command(options)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_data, check=checks.of_names)
    parser.add_argument("corpus", type=Path, metavar="FILE", help="a corpus: a file, or hub:NAME[:SPLIT]")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="count tokens with the tokenizer of this model: a known name, a hub id or a folder",
    )
    _add_how_read(parser)
    parser.add_argument("--format", choices=("text", "json"), default="text", help="(default: text)")


def _data(options: argparse.Namespace) -> int:
    from lightweight.cli import data

    return data.command(options)


def _add_gate(parser: argparse.ArgumentParser) -> None:
    from lightweight.verdict.limits import LIMITS

    parser.set_defaults(run=_gate, check=checks.nothing)
    parser.add_argument(
        "records",
        nargs="+",
        type=Path,
        metavar="RECORD.json",
        help="with --against, the new record; else an older record and the new one. Records are written by `pytest "
        "experiments --benchmark-json`, or by `lightweight plan --format json`, which has forecasts",
    )
    parser.add_argument("--against", nargs="+", type=Path, metavar="OLD.json", help="older records to compare with")
    for option in LIMITS:
        words = f"fail if {option.of} (default: {option.default}; none: no verdict)"
        parser.add_argument(option.flag, default=option.default, metavar=option.metavar, help=words.replace("%", "%%"))
    parser.add_argument(
        "--undecided",
        choices=("pass", "fail"),
        default="pass",
        help="verdict on a speedup that noise leaves open (default: pass)",
    )
    parser.add_argument(
        "--missing",
        choices=("pass", "fail"),
        default="fail",
        help="verdict on a model and method that only the older records have (default: fail)",
    )
    parser.add_argument(
        "--require-match",
        action="store_true",
        help="fail if nothing in the older records was measured under the same conditions",
    )


def _gate(options: argparse.Namespace) -> int:
    with for_good():
        from lightweight.cli import gate
    return gate.command(options)


if __name__ == "__main__":
    sys.exit(main())
