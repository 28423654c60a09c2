"""How does `lightweight train` begin, and what is said where it is refused or interrupted?"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import traceback
from dataclasses import fields
from typing import NoReturn

from lightweight.child.process import end_with_parent
from lightweight.cli import checkpoints
from lightweight.cli.job import Job, NothingFitsError
from lightweight.cli.output import Output
from lightweight.cli.terminal import leave_to_us, refuse, show, tell
from lightweight.imports import for_good
from lightweight.settings import how_read

TORCHRUNS_JOB = "TORCHELASTIC_RUN_ID"
"""Environment variable of a process that torchrun, or accelerate by it, has started."""


def command(options: argparse.Namespace) -> int:
    """Train what `options` ask for; the exit status. Whatever ends it is told in one line."""
    if TORCHRUNS_JOB in os.environ:
        end_with_parent()
    options.reading = how_read(lambda name: getattr(options, name))
    try:
        return _train(options)
    except KeyboardInterrupt:
        return _interrupted(options)


def _train(options: argparse.Namespace) -> int:
    # torch takes seconds, and what is imported may swallow a KeyboardInterrupt
    with checkpoints.signals_to(lambda *_: _leave(options)), for_good():
        from lightweight.cli import train

    leave_to_us()
    asked = Job(**{part.name: getattr(options, part.name) for part in fields(Job)})
    try:
        outcome = train.run(asked, progress=show)
    except NothingFitsError as error:
        refuse(error)
        return 1
    except train.REFUSALS as error:
        return refuse(error)
    except SystemExit as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        tell(f"{where.filename}:{where.lineno}: ended the training by sys.exit({error.code!r}): nothing was saved")
        return 1
    return 0 if outcome.kind == "completed" else 1


def _leave(options: argparse.Namespace) -> NoReturn:
    """End this process, which has begun nothing."""
    status = _interrupted(options)
    sys.stdout.flush()
    os._exit(status)


def _interrupted(options: argparse.Namespace) -> int:
    tell(f"interrupted{_how_to_go_on(Output(options.output.absolute()), options)}")
    return 128 + signal.SIGINT


def _how_to_go_on(output: Output, options: argparse.Namespace) -> str:
    if output.rescued.exists():
        return f": the trained weights lie in {output.rescued}"
    if not output.can_resume:
        return " before the first checkpoint: nothing is left to resume"
    if TORCHRUNS_JOB in os.environ:
        return ": go on with the same command and --resume"  # how it began is torchrun's
    again = options.given if options.resume else [*options.given, "--resume"]
    return f": go on with: lightweight {shlex.join(again)}"
