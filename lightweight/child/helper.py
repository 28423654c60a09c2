"""One call in a child process of its own, for what must not happen in this one: CUDA, or a great deal of memory."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from lightweight.child import forkserver, process
from lightweight.child.forkserver import STATUS_SECONDS
from lightweight.child.handle import ChildError, Handle
from lightweight.child.process import log_of, redirect_output
from lightweight.internals.multiprocessing import forkserver_pid
from lightweight.trial import Measurements, TimedOut

P = ParamSpec("P")
T = TypeVar("T")

SILENCE_SECONDS = 600.0
"""How long a child may report nothing where nobody says another time."""

_culprit: tuple[int | None, str | None] = (None, None)


def call(function: Callable[P, T], folder: Path, *args: P.args, **kwargs: P.kwargs) -> T:
    """`function(*args)` in a child of its own, its output going to a log in `folder`. Exceptions come through. Raises
    ChildError where the child dies, or answers nothing within `SILENCE_SECONDS`."""
    return call_within(SILENCE_SECONDS, function, folder, *args, **kwargs)


def call_within(seconds: float, function: Callable[P, T], folder: Path, *args: P.args, **kwargs: P.kwargs) -> T:
    """`call`, for at most `seconds`. Raises ChildError, and what `function` raises."""
    helper = Handle(
        log_of(0, folder), lambda end: process_of(_answer, end, folder / "log", function, args, kwargs), seconds
    )
    try:
        if not helper.connection.poll(seconds):
            raise ChildError(_silent(helper, seconds))
        try:
            value, error = helper.connection.recv()
        except (EOFError, OSError):
            raise ChildError(helper.death()) from None
        helper.end(STATUS_SECONDS)
    finally:
        helper.end()
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]


def _answer(connection: Connection, log: Path, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """In the child: send what `function` returns or raises."""
    process.lead_a_group()
    value: Any = None
    raised: Exception | None = None
    try:
        redirect_output(log)
        value = function(*args, **kwargs)
        pickled = ForkingPickler.dumps((value, None))
    except Exception as error:  # noqa: BLE001  it is raised in the owner
        error.add_note(f"in a helper process:\n{traceback.format_exc()}")
        raised = error
        try:
            pickled = ForkingPickler.dumps((None, raised))
            pickle.loads(pickled)  # noqa: S301  ours; an exception with arguments of its own may not come to life again
        except Exception:  # noqa: BLE001  pickling runs code of the exception
            pickled = ForkingPickler.dumps((None, RuntimeError(f"{type(raised).__name__}: {raised}")))
    with suppress(OSError):  # nobody waits any more
        connection.send_bytes(pickled)


def _silent(helper: Handle, seconds: float) -> TimedOut:
    return TimedOut(
        phase="start",
        silent_seconds=seconds,
        reason=f"a helper process answered nothing for {seconds:g} s and was killed",
        details=helper.last_words(),
        measured=Measurements(),
    )


def culprit(seconds: float = SILENCE_SECONDS) -> str | None:
    """The module that initialised CUDA in the forkserver while it was imported there, so that children need fresh
    interpreters; None where they are forked. Starts the forkserver."""
    global _culprit
    if _culprit[0] is None or _culprit[0] != forkserver_pid():
        asked = Handle(
            Path(os.devnull), lambda end: forkserver.context.Process(target=process.tell_culprit, args=(end,)), seconds
        )
        try:
            name = asked.connection.recv() if asked.connection.poll(seconds) else None
        except (EOFError, OSError):
            name = None  # what is wrong with it shows in what is asked of it next
        finally:
            asked.end()
        _culprit = forkserver_pid(), name
    return _culprit[1]


def process_of(
    function: Callable[..., None], connection: Connection, *args: Any, gpus: tuple[int, int] | None = None
) -> BaseProcess:
    """The process that calls `function(connection, *args)`: a fork of the forkserver, or a fresh interpreter where that
    could not use the GPU. They come pickled, since unpickling imports a method's own module: what that does to CUDA, it
    does to the `gpus`, the first one and how many."""
    context: SpawnContext | ForkServerContext = forkserver.context if culprit() is None else fresh()
    pickled = pickle.dumps((function, args))
    return context.Process(target=process.run_pickled, args=(connection, pickled, gpus), daemon=True)


def fresh() -> SpawnContext:
    """What makes processes that begin as fresh interpreters."""
    return multiprocessing.get_context("spawn")
