"""How did a trial end whose child died without saying? Its exit status, and what the kernel counts, become an Outcome.

`owner` asks where a rank's pipe has ended. What a child can still say of an error itself is in `failure`.
"""

from __future__ import annotations

import signal

from lightweight.child import host_memory, reaper
from lightweight.child.forkserver import STATUS_SECONDS, wait_until
from lightweight.trial import Crashed, Measurements, OutOfMemory, Phase


def outcome_of_death(
    status: int | None, phase: Phase, measured: Measurements, details: str, *, kernel_killed: bool, server: int | None
) -> Crashed | OutOfMemory:
    """How a trial ended in `phase` whose child has the exit `status`, as multiprocessing says it: the number of a
    signal is negative, and None is not known. `kernel_killed` says that the kernel has meanwhile killed a process for
    its memory; `server` is the forkserver's process id."""
    if status == -signal.SIGKILL and kernel_killed:
        return host_memory.outcome(phase, "killed by the kernel", measured)
    return Crashed(phase=phase, reason=_reason(status, server), details=details, measured=measured)


def _reason(status: int | None, server: int | None) -> str:
    if status == -signal.SIGKILL:
        return "killed by SIGKILL (which the kernel's out-of-memory killer also sends)"
    if status is not None and status < 0:
        return f"killed by {_name(-status)}"
    since = None if server is None else reaper.own.since(server)
    if status == 255 and server is not None:  # what multiprocessing says where the forkserver says nothing
        wait_until(lambda: not reaper.is_running(server, since), STATUS_SECONDS)
        status = status if reaper.is_running(server, since) else None
    if status is None:
        return "died; how is not known, because the forkserver had died or was stopped"
    return f"the child exited with status {status} before its trial had ended"


def _name(number: int) -> str:
    """What a signal is called; of those in real time only the first and the last have a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
