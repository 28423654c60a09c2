"""A child process in its owner's hands: the owner's end of its pipe, and how it is ended."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from lightweight.child import forkserver, host_memory, reaper
from lightweight.child.death import outcome_of_death
from lightweight.child.forkserver import STATUS_SECONDS, wait_until
from lightweight.internals.multiprocessing import forkserver_pid
from lightweight.trial import Crashed, Measurements, OutOfMemory, Phase, TimedOut

LAST_WORDS = 2_000
"""Characters of a dead child's log that go into its outcome."""

LAST_BYTES = 4 * LAST_WORDS
"""In which they are, in UTF-8."""

_living: set[Handle] = set()


class ChildError(RuntimeError):
    """A child that could not be started, or did not answer; `outcome` is how it ended."""

    def __init__(self, outcome: Crashed | TimedOut | OutOfMemory) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


def kill_all() -> None:
    """Kill every child of this process, from whichever thread; who waits for one is told that it died, and who waits
    for one to be started, that it was not."""
    forkserver.give_up()
    for each in list(_living):
        each.kill()


class Handle:
    """A child, started, and the owner's end of its pipe. `make` gives the process for the child's end. Raises
    ChildError where it cannot be started within `seconds`."""

    def __init__(self, log: Path, make: Callable[[Connection], BaseProcess], seconds: float) -> None:
        self._log = log
        self._kills = host_memory.kills()
        self.connection, childs_end = forkserver.context.Pipe()
        try:
            self.process = make(childs_end)
            if (ended := forkserver.start(self.process, seconds)) is not None:
                raise ChildError(ended)
        except BaseException:
            self.connection.close()
            raise
        finally:
            childs_end.close()
        assert self.process.pid is not None
        self.pid = self.process.pid
        self._server = forkserver_pid()
        _living.add(self)
        reaper.own.adopt(self.pid)

    def end(self, seconds: float = 0.0) -> None:
        """Leave no process behind, having waited `seconds` for it to end by itself."""
        if self not in _living:
            return
        self.connection.close()
        wait_until(lambda: not self._is_running(), seconds)
        self.kill()
        wait_until(lambda: not self._is_running(), STATUS_SECONDS)
        self._join()
        _living.discard(self)
        reaper.own.release(self.pid)

    def kill(self) -> None:
        """Kill it and all that it has started."""
        reaper.kill(self.pid, reaper.own.since(self.pid))

    def last_words(self) -> str:
        """The end of what its libraries have written."""
        try:
            with self._log.open("rb") as log:  # which may be larger than memory
                log.seek(-min(LAST_BYTES, log.seek(0, os.SEEK_END)), os.SEEK_END)
                return log.read(LAST_BYTES).decode(errors="replace")[-LAST_WORDS:]
        except OSError:  # it has written nothing, or its folder is gone
            return ""

    def death(self, phase: Phase = "start", measured: Measurements | None = None) -> Crashed | OutOfMemory:
        """How it ended, which has ended without saying."""
        self._join()
        return outcome_of_death(
            self.process.exitcode,
            phase,
            measured or Measurements(),
            self.last_words(),
            kernel_killed=host_memory.kills() > self._kills,
            server=self._server,
        )

    def _is_running(self) -> bool:
        """By the kernel, since where the forkserver is stopped or dead multiprocessing does not know."""
        return reaper.is_running(self.pid, reaper.own.since(self.pid))

    def _join(self) -> None:
        """Wait until it is known how it ended, which is for the forkserver to say; one that does not is stopped."""
        self.process.join(STATUS_SECONDS)
        if self.process.exitcode is None:
            self.kill()
            forkserver.kill()
            self.process.join(STATUS_SECONDS)
