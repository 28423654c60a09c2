"""What a child does to itself before it imports what it will run."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from lightweight.imports import for_good

CAN_PIN = hasattr(os, "sched_setaffinity")
"""Whether this system keeps a process on a core when asked; macOS does not."""

OOM_SCORE = Path("/proc/self/oom_score_adj")
"""How gladly Linux kills this process for memory, up to 1000: any process may say so of itself."""

_gpus_are_chosen = False


def see_gpus(first: int, count: int) -> None:
    """Leave this process only the `count` GPUs from number `first` on among the visible ones, before CUDA is
    initialised: one rank, one GPU, where the Trainer would spread over every GPU it sees, and none on the CPU. Does so
    once a process."""
    global _gpus_are_chosen
    if _gpus_are_chosen:
        return
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    chosen = [visible[index] if visible else str(index) for index in range(first, first + count)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
    _gpus_are_chosen = True


def log_of(rank: int, folder: Path) -> Path:
    """Where what the libraries of `rank` write goes."""
    return folder / (f"log-{rank}" if rank else "log")


def lead_a_group() -> None:
    """Make this process the leader of a session and group of its own: whoever ends it ends what it started as well, and
    a terminal's Ctrl-C reaches its owner alone, which then ends it. Where the host's memory runs out, Linux kills it
    before its owner, which has the rows of the trials that are done."""
    with suppress(OSError):  # it leads one already
        os.setsid()
    with suppress(OSError):  # another system than Linux
        OOM_SCORE.write_text("1000")


PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""


def end_with_parent() -> None:
    """Have Linux kill this process when the one that started it ends, whatever ends that: a torchrun that is killed
    outright leaves its ranks, which train on, or wait for its store."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        signal.raise_signal(signal.SIGKILL)


def redirect_output(path: Path) -> None:
    """Send this process's stdout and stderr, file descriptors included, to `path`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def run_pickled(connection: Connection, pickled: bytes, gpus: tuple[int, int] | None) -> None:
    """In a child: `function(connection, *args)`, both `pickled`, since unpickling them imports what may touch CUDA.
    `gpus` are the first one and how many this process is to see, None where it keeps what it sees."""
    lead_a_group()
    if gpus is not None:
        see_gpus(*gpus)
    with for_good():
        from lightweight import preload  # noqa: F401  # before all else that a fresh interpreter imports

        function, args = pickle.loads(pickled)  # noqa: S301  from the owner
    function(connection, *args)


def tell_culprit(connection: Connection) -> None:
    """In a child of the forkserver: send the name of the module that has touched the GPU there, or None."""
    from lightweight.child import nursery

    connection.send(nursery.culprit)
