"""A child process in its owner's hands: the owner's end of its pipe, and how it died."""

from __future__ import annotations

import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from lightweight.child import forkserver, host_memory, reaper
from lightweight.child.forkserver import STATUS_SECONDS, wait_until
from lightweight.internals.multiprocessing import forkserver_pid
from lightweight.trial import Crashed, Measurements, OutOfMemory, Phase, TimedOut

LAST_WORDS = 2_000
"""Characters of a dead child's log that go into its outcome."""

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
            return self._log.read_text(errors="replace")[-LAST_WORDS:]
        except OSError:  # it has written nothing, or its folder is gone
            return ""

    def death(self, phase: Phase = "start", measured: Measurements | None = None) -> Crashed | OutOfMemory:
        """How it ended, which has ended without saying."""
        measured = measured or Measurements()
        self._join()
        code = self.process.exitcode
        if code == -signal.SIGKILL and host_memory.kills() > self._kills:
            return host_memory.outcome(phase, "killed by the kernel", measured)
        return Crashed(phase=phase, reason=self._reason(code), details=self.last_words(), measured=measured)

    def _reason(self, code: int | None) -> str:
        if code == -signal.SIGKILL:
            return "killed by SIGKILL (what the kernel's out-of-memory killer sends, too)"
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        server = self._server
        since = None if server is None else reaper.own.since(server)
        if code == 255 and server is not None:  # what multiprocessing says where the forkserver says nothing
            wait_until(lambda: not reaper.is_running(server, since), STATUS_SECONDS)
            code = code if reaper.is_running(server, since) else None
        if code is None:
            return "died, and the forkserver, which alone knows how, had died or was stopped"
        return f"the child exited with status {code} before its trial had ended"

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
