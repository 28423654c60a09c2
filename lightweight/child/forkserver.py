"""How is a process started that has imported torch, transformers and peft, and has never touched CUDA?

It is forked from multiprocessing's forkserver, which has: so a start takes milliseconds. The forkserver may die or be
stopped like any other process; then the next start finds a new one.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

from lightweight.child import reaper
from lightweight.internals.multiprocessing import choose_folder, forkserver_pid, has_folder
from lightweight.trial import Crashed, Measurements, TimedOut

IMPORT_SECONDS = 300.0
"""How long a new forkserver may take to import what children are born with: a cold disk, a busy machine."""

STATUS_SECONDS = 3.0
"""How long the forkserver, which alone is told how a child ended, may take to pass that on."""

SOCKET_FOLDER_CHARACTERS = 60
"""Of the path of a temporary folder in which there is room for a socket, /lightweight-12345678/listener-12345678."""

# Which physical pages a process gets decides what collides in its caches for as long as it lives; of like children some
# were 2 and 3 % slower than others. A huge page is laid out alike in all of them. glibc reads this when a program
# starts (GNU C Library manual, Memory Allocation Tunables), and asks the kernel for them. No number that is computed
# depends on it.
TUNABLES = ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["lightweight.child.nursery"])

_answered: int | None = None
_choosing = threading.Lock()
_starting: set[Callable[[], None]] = set()
"""What gives up a start that is under way."""


def start(process: BaseProcess, seconds: float) -> Crashed | TimedOut | None:
    """Start `process`, made with `context` or another; how it ended that could not be started, else None.

    The forkserver is killed where it has not done so within `seconds`, since it is stopped then; the next start finds a
    new one. One that has not answered before is given the time that its imports take.
    """
    global _answered
    expired = threading.Event()
    if _answered is None or not reaper.is_running(_answered, reaper.own.since(_answered)):
        seconds = max(seconds, IMPORT_SECONDS)

    def expire() -> None:
        expired.set()
        kill()

    _own_sockets_folder()
    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    _starting.add(expire)
    try:
        with _without_main(), _with_tunables():
            try:
                process.start()
            except (EOFError, ConnectionError):  # the forkserver has died since it was last asked
                if expired.is_set():
                    raise
                _replace(seconds)
                process.start()
        _answered = forkserver_pid()
    except (EOFError, ConnectionError):
        return _not_started(expired.is_set(), seconds)
    finally:
        timer.cancel()
        _starting.discard(expire)
        if (server := forkserver_pid()) is not None:
            reaper.own.adopt(server)
    return None


def _not_started(expired: bool, seconds: float) -> Crashed | TimedOut:
    """How a child ended that could not be started, the forkserver having been killed for its silence, or not."""
    if not expired:
        return Crashed(phase="start", reason="the forkserver died", details="", measured=Measurements())
    reason = f"the forkserver answered nothing for {seconds:g} s and was killed"
    return TimedOut(phase="start", silent_seconds=seconds, reason=reason, details="", measured=Measurements())


def _own_sockets_folder() -> None:
    """The forkserver listens on a socket in a temporary folder, which multiprocessing would leave behind where this
    process is killed. The path of a socket may have some hundred characters (unix(7)); TMPDIR may have more."""
    with _choosing:
        if not has_folder():
            is_long = len(tempfile.gettempdir()) > SOCKET_FOLDER_CHARACTERS
            choose_folder(reaper.own.make_folder(Path("/tmp") if is_long else None))  # noqa: S108  made for us alone


def give_up() -> None:
    """End every start that is under way, in whichever thread, as if its time were over."""
    for expire in list(_starting):
        expire()


def kill() -> None:
    """Kill the forkserver, if there is one."""
    if (server := forkserver_pid()) is not None:
        since = reaper.own.since(server) or reaper.started(server)  # it may have died before it was adopted
        reaper.kill(server, since)
        wait_until(lambda: not reaper.is_running(server, since), STATUS_SECONDS)


def _replace(seconds: float) -> None:
    """Kill the forkserver and start another, within `seconds`. multiprocessing does so once the kernel gives up the
    dead one, which it holds until the last of its threads is gone; until then the dead one would be asked again."""
    if (dead := forkserver_pid()) is None:
        return
    kill()

    def is_replaced() -> bool:
        forkserver.ensure_running()
        return forkserver_pid() != dead

    wait_until(is_replaced, seconds)


def wait_until(is_true: Callable[[], bool], seconds: float) -> None:
    """Wait until `is_true`, or for `seconds`."""
    deadline = time.monotonic() + seconds
    while not is_true() and time.monotonic() < deadline:
        time.sleep(0.005)


def tunables() -> str:
    """What children have in GLIBC_TUNABLES: the user's, else `TUNABLES`."""
    name, value = TUNABLES
    return os.environ.get(name, value)


@contextmanager
def _with_tunables() -> Iterator[None]:
    """Have what is started inside read `tunables`."""
    name, value = TUNABLES
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


@contextmanager
def _without_main() -> Iterator[None]:
    """Start children that do not import this process's main script, which is pytest's: a child imports no pytest."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
