"""The command line: `lightweight plan MODEL`, `lightweight train --model MODEL --output DIR`, `lightweight chat DIR`,
`lightweight data FILE`, `lightweight sweep --model MODEL --method A --method B`, `lightweight report RECORD.json`,
`lightweight gate NEW.json`."""

from __future__ import annotations

from lightweight.imports import for_good, interrupted_silently

with interrupted_silently():
    import argparse
    import dataclasses
    import json
    import os
    import select
    import shlex
    import signal
    import sys
    import traceback
    import warnings
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from typing import Any, NoReturn

    from lightweight import __version__, models, names, record, targets
    from lightweight.cli import checkpoints
    from lightweight.cli.output import Output
    from lightweight.report import comparison, publish, write
    from lightweight.settings import OF_CORPUS, SETTINGS, Settings, how_read
    from lightweight.verdict.limits import LIMITS, Limits


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 1 for a gate that fails or a training that did not complete, 2 for
    input that cannot be used, 130 for an interruption, 141 where nobody reads what it prints."""
    try:
        options = parser().parse_args(arguments)
        options.given = sys.argv[1:] if arguments is None else arguments
        run: Callable[[argparse.Namespace], int] = options.run
        status = run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        _tell("lightweight: interrupted")
        return 128 + signal.SIGINT
    return status


def _nobody_reads() -> bool:
    """Whether who reads the output, `head` say, has read enough; what Python flushes as it ends then goes nowhere."""
    output = select.poll()
    output.register(sys.stdout.fileno(), select.POLLOUT)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


class _Parser(argparse.ArgumentParser):
    """Repeats what it was given as it is shown on a terminal, in one line."""

    def error(self, message: str) -> NoReturn:
        super().error(names.one_line(message))


def parser() -> argparse.ArgumentParser:
    """What the command line is read with."""
    parser = _Parser(prog="lightweight", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_plan(commands.add_parser("plan", help="forecast which methods fit which cards, without a GPU or the weights"))
    _add_train(commands.add_parser("train", help="fine-tune a model and save it, with checkpoints on the way"))
    _add_calibrate(commands.add_parser("calibrate", help="time this GPU's kernels, for forecasts of time: two minutes"))
    _add_sweep(commands.add_parser("sweep", help="search for each method's learning rate, each with the same budget"))
    _add_data(commands.add_parser("data", help="look at a corpus before training: lengths, and what the loss is on"))
    _add_chat(commands.add_parser("chat", help="let a model that was trained answer prompts"))
    _add_report(commands.add_parser("report", help="what saved records say: a page, markdown, or tables"))
    _add_gate(commands.add_parser("gate", help="hold a saved record against older ones; status 1 where it got worse"))
    return parser


def _refuse(error: Exception) -> int:
    _tell(f"lightweight: {error}")
    return 2


def _tell(text: str) -> None:
    if _speaks():
        print(names.one_line(text), file=sys.stderr, flush=True)


def _speaks() -> bool:
    """Whether this process tells what it has in common with all that torchrun started on this host."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_report)
    parser.add_argument(
        "records",
        nargs="+",
        type=Path,
        metavar="RUN.json",
        help="what `pytest experiments --benchmark-json` or `lightweight plan --format json` stored; several runs of "
        "a cell are its history",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="PATH", help="write it there: a page, or markdown for .md")
    parser.add_argument(
        "--format",
        choices=("terminal", "markdown", "html", "latex", "csv"),
        help="(default: what PATH is called, else terminal); latex and csv are one table, a row a cell",
    )
    parser.add_argument(
        "--columns",
        metavar="NAME,...",
        help=f"one table for a paper, a row a cell with all its seeds, in these columns: {', '.join(publish.COLUMNS)}",
    )
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="DIR|FILE.zip",
        help="write what repeats the run of RUN.json with one command: records, tests, methods, corpus and versions; "
        "call it where pytest was called",
    )
    parser.add_argument(
        "--into", type=Path, metavar="README.md", help="write the tables whose marks this file has between them"
    )
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="also write every picture there, as an SVG file")


def _report(options: argparse.Namespace) -> int:
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
        return _refuse(error)
    return _bundle(options.bundle, runs) if options.bundle else 0


def _bundle(path: Path, runs: Sequence[record.Run]) -> int:
    from lightweight.cli import bundle  # torch takes seconds

    try:
        _tell(f"lightweight: {bundle.write(path, runs)}")
    except bundle.BundleError as error:
        return _refuse(error)
    return 0


OF_NAME: dict[str, publish.Form] = {".tex": "latex", ".csv": "csv", ".md": "markdown"}
"""What a file is written as where nobody says."""


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


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_plan)
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
        help="what would be trained on, a file or hub:NAME[:SPLIT]: forecasts then hold for the longest batch that it "
        "can make (default: for rows of --max-length tokens)",
    )
    _add_how_read(parser)
    _add_settings(parser)
    parser.add_argument("--max-batch", action="store_true", help="also find the largest batch that fits")
    parser.add_argument(
        "--max-length-that-fits",
        action="store_true",
        help="also find the longest rows that fit, of as few in a pass as there can be",
    )
    parser.add_argument(
        "--gpus",
        metavar="N",
        help="GPUs that share a trial by FSDP2, at most one for each sequence of a step: forecast one of them, and "
        "find the fewest that suffice (default: one GPU, not sharded)",
    )
    parser.add_argument(
        "--record",
        action="append",
        default=[],
        type=Path,
        metavar="RECORD.json",
        help="repeatable: records whose step times say which method is the fastest",
    )
    _add_job(parser)
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument(
        "--traceback", action="store_true", help="also show where in which library a method could not be forecast"
    )


def _add_job(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("time", "of the whole job, and what it may take; forecast for cards only")
    group.add_argument("--tokens", type=int, metavar="N", help="tokens of the corpus")
    group.add_argument("--epochs", type=int, default=10, metavar="N", help="passes over the corpus (default: 10)")
    group.add_argument("--price", type=float, metavar="AMOUNT", help="what an hour of the card costs")
    group.add_argument("--max-hours", type=float, metavar="HOURS", help="mark, and do not choose, what takes longer")
    group.add_argument("--max-price", type=float, metavar="AMOUNT", help="mark, and do not choose, what costs more")
    group.add_argument(
        "--calibration",
        action="append",
        default=[],
        type=Path,
        metavar="CARD.json",
        help="repeatable: what `lightweight calibrate` wrote, before those that come with the package",
    )


def _job(options: argparse.Namespace) -> dict[str, Any]:
    """What the job is held to. Raises ValueError."""
    for name in ("tokens", "epochs"):
        _at_least(options, name, 1)
    for name in ("price", "max_hours", "max_price"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {value:g}: give a number above 0")
    if options.max_price is not None and options.price is None:
        raise ValueError("--max-price: give the --price of an hour as well")
    if (options.max_hours is not None or options.max_price is not None) and options.tokens is None:
        raise ValueError("--max-hours and --max-price are of a job: give its --tokens")
    return {name: getattr(options, name) for name in ("tokens", "epochs", "price", "max_hours", "max_price")}


def _plan(options: argparse.Namespace) -> int:
    try:
        if options.gpus is not None:
            options.gpus = _whole_number("--gpus", options.gpus)
        _at_least(options, "gpus", 1)
        settings, job = _settings(options), _job(options)
        wanted_models = [models.named(name) for name in dict.fromkeys(options.models)]
        for name in options.method or ():
            names.check_method(name)
        cards = options.target or [target.name for target in targets.TARGETS.values() if target.total_bytes]
        wanted_targets = [targets.named(name) for name in dict.fromkeys(cards)]
        for target in wanted_targets:
            if target.total_bytes is None:
                raise ValueError(f"target {target.name!r} has no amount of memory to plan for: name a card, or 16GiB")
        measured = [entry for path in options.record for entry in record.load(path).entries]

        with for_good():  # torch takes seconds, and names have been checked
            from lightweight import corpus, methods
            from lightweight.cli import data
            from lightweight.forecast import calibration, plan, plan_table, step_time, tracer

        named = [methods.named(name) for name in dict.fromkeys(options.method or ())] or methods.PLANNED
        wanted_methods = settings.applied(named)
        names.refuse_namesakes("method", wanted_methods)
        how = how_read(lambda name: getattr(options, name))
        read = data.read_if_named(options.corpus, how, _show)
        calibrations = [*map(calibration.load, options.calibration), *calibration.stored()]
    except ValueError as error:
        return _refuse(error)
    try:
        question = plan.Question(
            keeps_passes=settings.keeps_passes,
            gpus=options.gpus or 1,
            corpus=read,
            max_batch=options.max_batch,
            longest_row=options.max_length_that_fits,
            fewest_gpus=options.gpus is not None,
            job=step_time.Job(**job),
            **settings.rows,
        )
        rows = plan.plan(
            wanted_models,
            wanted_methods,
            wanted_targets,
            question,
            measured=measured,
            calibrations=calibrations,
            progress=_show,
            failed=_show_traceback if options.traceback else lambda error: None,
        )
    except (tracer.ForecastError, models.ModelError, corpus.CorpusError) as error:
        return _refuse(error)
    finally:
        _show("")
    is_json = options.format == "json"
    print(json.dumps([row.as_json() for row in rows], indent=1) if is_json else plan_table.table(rows))
    if options.target:
        return 0 if plan.each_target_has_a_method(rows) else 1
    return 0 if any(row.chosen for row in rows) else 1


def _show_traceback(error: Exception) -> None:
    _show("")
    traceback.print_exception(error)


def _show(text: str) -> None:
    """A line of progress that the next one overwrites; none where nobody watches."""
    if sys.stderr.isatty() and _speaks():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_train)
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
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there already")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of an interrupted job")
    parser.add_argument(
        "--target", metavar="NAME", help="the card whose memory it gets, or an amount such as 16GiB (default: all)"
    )
    parser.add_argument(
        "--weights",
        choices=("pretrained", "random"),
        help="where weights come from (default: pretrained; random only for a model that has no others)",
    )
    parser.add_argument("--epochs", type=int, default=10, metavar="N", help="passes over the corpus (default: 10)")
    parser.add_argument("--max-steps", type=int, metavar="N", help="optimizer steps, instead of epochs")
    _add_settings(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--report-to", choices=("tensorboard", "wandb", "trackio", "mlflow", "none"), default="none", help="a tracker"
    )
    parser.add_argument(
        "--save-steps", type=int, metavar="N", help="optimizer steps between checkpoints (default: every five minutes)"
    )


def _train(options: argparse.Namespace) -> int:
    try:
        for option in ("epochs", "max_steps", "save_steps"):
            _at_least(options, option, 1)
        options.settings = _settings(options)
        options.reading = how_read(lambda name: getattr(options, name))
        if not 0 <= options.seed < 2**32:
            raise ValueError(f"--seed {options.seed}: give a number from 0 to {2**32 - 1}, which is what numpy takes")
        models.named(options.model)
        if options.method is not None:
            names.check_method(options.method)
        if options.target is not None:
            targets.named(options.target)
    except ValueError as error:
        return _refuse(error)
    try:
        with checkpoints.signals_to(signal.default_int_handler):  # also while torch is imported, which takes seconds
            return _train_job(options)
    except KeyboardInterrupt:
        return _interrupted(options)


def _leave(options: argparse.Namespace) -> NoReturn:
    """End this process, which has begun nothing."""
    status = _interrupted(options)
    sys.stdout.flush()
    os._exit(status)


def _interrupted(options: argparse.Namespace) -> int:
    _tell(f"lightweight: interrupted{_how_to_go_on(Output(options.output.absolute()), options)}")
    return 128 + signal.SIGINT


def _how_to_go_on(output: Output, options: argparse.Namespace) -> str:
    if output.rescued.exists():
        return f": the trained weights lie in {output.rescued}"
    if not output.can_resume:
        return " before the first checkpoint: nothing is left to resume"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return ": go on with the same command and --resume"  # how it began is torchrun's
    again = options.given if options.resume else [*options.given, "--resume"]
    return f": go on with: lightweight {shlex.join(again)}"


def _train_job(options: argparse.Namespace) -> int:
    # torch takes seconds, and what is imported may swallow a KeyboardInterrupt
    with checkpoints.signals_to(lambda *_: _leave(options)), for_good():
        from lightweight.cli import train
        from lightweight.cli.job import Job, NothingFitsError

    _quiet()
    names = [field.name for field in dataclasses.fields(Job)]
    try:
        outcome = train.run(Job(**{name: getattr(options, name) for name in names}), progress=_show)
    except NothingFitsError as error:
        _refuse(error)
        return 1
    except train.REFUSALS as error:
        return _refuse(error)
    return 0 if outcome.kind == "completed" else 1


def _quiet() -> None:
    """Leave the terminal to what this program says itself."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # It is of models that add to what FSDP2 gave them in place, which transformers' own do not.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    # transformers and peft call activation checkpointing by its older name
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_sweep)
    parser.add_argument("--model", required=True, metavar="NAME", help="a known name, a hub id or a local folder")
    parser.add_argument(
        "--method",
        action="append",
        required=True,
        metavar="NAME",
        help="repeatable: a known name or package.module:NAME",
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        default=Path("corpus.json"),
        metavar="PATH",
        help="on what: a file, or hub:NAME[:SPLIT]; what it holds out is not used (default: corpus.json)",
    )
    _add_how_read(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="where the record goes")
    parser.add_argument("--budget", type=int, default=8, metavar="N", help="trials of each method (default: 8)")
    parser.add_argument("--target", metavar="NAME", help="the card whose memory trials get (default: all)")
    parser.add_argument("--weights", choices=("pretrained", "random"), help="where weights come from (default: either)")
    parser.add_argument("--epochs", type=int, default=10, metavar="N", help="passes over the corpus (default: 10)")
    parser.add_argument("--max-steps", type=int, metavar="N", help="optimizer steps, instead of epochs")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    _add_settings(parser, learning_rate="the range that is searched (default: 1e-5..1e-2)")
    parser.set_defaults(learning_rate="1e-5..1e-2")


def _sweep(options: argparse.Namespace) -> int:
    try:
        for option in ("epochs", "max_steps"):
            _at_least(options, option, 1)
        low, _, high = options.learning_rate.partition("..")
        try:
            ends: dict[str, Any] = {"low": float(low), "high": float(high)}
        except ValueError:
            raise ValueError(f"--learning-rate {options.learning_rate}: give a range, such as 1e-5..1e-2") from None
        settings = Settings.read(lambda name: None if name == "learning_rate" else getattr(options, name))
        models.named(options.model)
        for name in options.method:
            names.check_method(name)
        if options.target is not None:
            targets.named(options.target)
        if not options.output.absolute().parent.is_dir():
            raise ValueError(f"--output {options.output}: there is no folder {options.output.absolute().parent}")
    except ValueError as error:
        return _refuse(error)
    from lightweight.cli import sweep  # torch takes seconds

    _quiet()
    same = ("model", "corpus", "output", "budget", "target", "weights", "epochs", "max_steps", "seed")
    given = {name: getattr(options, name) for name in same}
    reading = how_read(lambda name: getattr(options, name))
    try:
        asked = sweep.Sweep(**given, **ends, methods=options.method, reading=reading, settings=settings)
        for line in sweep.run(asked, progress=_show):
            _show("")
            print(line, flush=True)
    except sweep.REFUSALS as error:
        return _refuse(error)
    except KeyboardInterrupt:
        _tell(f"lightweight: interrupted: what was tried until then is in {options.output}")
        return 130
    print(f"{options.output}: take the rates with --learning-rate {shlex.quote(str(options.output))}")
    return 0


def _add_how_read(parser: argparse.ArgumentParser) -> None:
    for one in OF_CORPUS:
        parser.add_argument(f"--{one.name}", help=one.help.replace("%", "%%"), **one.settings)


def _add_settings(parser: argparse.ArgumentParser, **others: str) -> None:
    """The settings; `others` are the words of those that mean something else here."""
    group = parser.add_argument_group("settings", "of the method, and of the rows that it trains on")
    for setting in SETTINGS:
        words = others.get(setting.name, setting.help)
        group.add_argument(setting.flag, metavar=setting.metavar, help=words.replace("%", "%%"))


def _settings(options: argparse.Namespace) -> Settings:
    """What is set. Raises ValueError."""
    return Settings.read(lambda name: getattr(options, name))


def _whole_number(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{option} {text}: give a whole number") from None


def _at_least(options: argparse.Namespace, option: str, least: int) -> None:
    value = getattr(options, option)
    if value is not None and value < least:
        raise ValueError(f"--{option.replace('_', '-')} {value}: give at least {least}")


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_chat)
    parser.add_argument("folder", type=Path, metavar="DIR", help="what `lightweight train` wrote")
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="answer this one, or each in the file of this name, as JSON lines (default: standard input, line by line)",
    )
    parser.add_argument(
        "--system", metavar="TEXT", help="what stands before the dialogue, for a model trained on conversations"
    )
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="of an answer (default: 256)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0, the default, takes the likeliest token each time",
    )


def _chat(options: argparse.Namespace) -> int:
    try:
        _at_least(options, "max_tokens", 1)
        _at_least(options, "temperature", 0)
    except ValueError as error:
        return _refuse(error)

    with for_good():  # torch takes seconds
        from lightweight.cli import chat

    _quiet()
    try:
        model = chat.load(options.folder, progress=_show)
        _show("")
        how = {"max_tokens": options.max_tokens, "temperature": options.temperature}
        if options.prompt is not None and _is_file(options.prompt):
            chat.answer_file(model, Path(options.prompt), options.system, **how)
        elif options.prompt is not None:
            chat.Dialogue(model, options.system).say(options.prompt, show=True, **how)
        else:
            chat.talk(chat.Dialogue(model, options.system), **how)
    except chat.REFUSALS as error:
        return _refuse(error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_calibrate)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="CARD.json", help="where the record goes")


def _calibrate(options: argparse.Namespace) -> int:
    from lightweight.cli import calibrate  # torch takes seconds
    from lightweight.forecast import calibration

    try:
        if not options.output.absolute().parent.is_dir():  # before two minutes of measuring
            raise calibration.CalibrationError(f"{options.output}: its folder does not exist: make it first")
        found = calibrate.run(progress=_show)
        options.output.write_text(calibration.written(found), "utf-8")
    except calibration.CalibrationError as error:
        return _refuse(error)
    finally:
        _show("")
    print(f"{found.device}: {len(found.samples):,} kernels timed; stored in {options.output}")
    return 0


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_data)
    parser.add_argument("corpus", type=Path, metavar="FILE", help="a corpus: a file, or hub:NAME[:SPLIT]")
    parser.add_argument("--model", metavar="NAME", help="whose tokens are counted: a known name, a hub id or a folder")
    _add_how_read(parser)
    parser.add_argument("--format", choices=("text", "json"), default="text")


def _data(options: argparse.Namespace) -> int:
    from lightweight.cli import data

    how = how_read(lambda name: getattr(options, name))
    try:
        if options.model is not None:
            models.named(options.model)
            _quiet()
        found, read, tokenizer = data.run(options.corpus, how, options.model, progress=_show)
        if options.format == "json":
            print(data.written(found))
            return 0
        print(data.text(found))
        if tokenizer is not None:
            in_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
            print(data.shown(read, tokenizer, in_colour=in_colour))
    except data.REFUSALS as error:
        return _refuse(error)
    return 0


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a path, or with a null in it
        return False


def _add_gate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_gate)
    parser.add_argument(
        "records",
        nargs="+",
        type=Path,
        metavar="RECORD.json",
        help="the new one, with --against; else an older one and the new one: of `pytest experiments "
        "--benchmark-json`, or plans of `lightweight plan --format json`, whose forecasts are compared",
    )
    parser.add_argument(
        "--against", nargs="+", type=Path, metavar="OLD.json", help="what the new record is held against"
    )
    for option in LIMITS:
        words = f"fail where {option.of} (default: {option.default}; none: no verdict)"
        parser.add_argument(option.flag, default=option.default, metavar=option.metavar, help=words.replace("%", "%%"))
    parser.add_argument(
        "--undecided",
        choices=("pass", "fail"),
        default="pass",
        help="what becomes of a speedup that noise leaves open (default: pass)",
    )
    parser.add_argument(
        "--missing",
        choices=("pass", "fail"),
        default="fail",
        help="what becomes of a stored cell that the new record has not (default: fail)",
    )
    parser.add_argument(
        "--require-match",
        action="store_true",
        help="fail where no stored run has a cell of the new one under the same conditions",
    )


def _gate(options: argparse.Namespace) -> int:
    try:
        limits: dict[str, Any] = {limit.name: limit.value(getattr(options, limit.name)) for limit in LIMITS}
        limits |= {name: getattr(options, name) for name in ("undecided", "missing", "require_match")}
        *older, new = options.records
        if len(older) != (options.against is None):
            raise ValueError("gate: give the new record and --against older ones, or an older one and the new one")
        told, failures = comparison.of_files(new, options.against or older, Limits(**limits))
    except ValueError as error:
        return _refuse(error)
    print(told)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
