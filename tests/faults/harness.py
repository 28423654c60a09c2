"""Faults, and jobs to have them: `lightweight train` in a process of its own that is killed where it changes a file."""

import errno
import json
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from conftest import torchruns, torchruns_store
from lightweight import record
from lightweight.__main__ import main
from lightweight.child import forkserver
from lightweight.child.process import redirect_output

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink")
"""Audit events of what changes names, besides `open` for writing: https://docs.python.org/3/library/audit_events.html"""


@dataclass
class AtChange:
    """What happens at change number `at` (from 1) below `folder`; without `at` they are only counted, into `tally`."""

    folder: Path
    tally: Path
    at: int | None = None
    count: int = field(default=0, init=False)

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Inside, it happens in this process."""
        hooks = HOOKS or [sys.addaudithook(_hook)]  # one for all, as none can be taken away
        HOOKS[:] = hooks
        ARMED.append(self)
        try:
            with patch.object(os, "fsync", partial(_audited, os.fsync)):
                yield
        finally:
            ARMED.remove(self)

    def heed(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Count the change of which Python tells, and have happen what is to."""
        if self._changes(event, arguments):
            self.count += 1
            if self.at is None:
                self._tally(self.count)
            elif self.count >= self.at:
                self.happen(event, arguments)

    def happen(self, event: str, arguments: tuple[Any, ...]) -> None:
        """At change number `at`, and at every later one."""
        raise NotImplementedError

    def _changes(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            return bool(writes) and isinstance(path, str) and Path(path).is_relative_to(self.folder)
        if event not in CHANGES:
            return False
        path = os.fspath(arguments[0]) if isinstance(arguments[0], str | os.PathLike) else ""
        # shutil.rmtree names what it removes by its folder's descriptor
        return Path(path).is_relative_to(self.folder) or (event in ("os.remove", "os.rmdir") and arguments[-1] != -1)

    def _tally(self, count: int) -> None:
        descriptor = os.open(self.tally, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(descriptor, str(count).encode())
        os.close(descriptor)


@dataclass
class Kill(AtChange):
    """SIGKILL. `torn`: the files being written lose their second halves, as in a power cut."""

    torn: bool = False

    def happen(self, event: str, arguments: tuple[Any, ...]) -> None:
        os.write(2, f"killed at change {self.count}: {event} {arguments}\n".encode())
        ARMED.clear()  # what follows is no change of the job's
        if self.torn:
            for path in self.folder.rglob("unfinished/**/*"):
                if path.is_file():
                    os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Fail(AtChange):
    """The change fails with `error`; where that is `lasting`, so does every later one. To have a file's bytes on the
    disk is a change as well."""

    error: int = errno.EIO
    lasting: bool = False
    failed: str = field(default="", init=False)

    def happen(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.count == self.at or self.lasting:
            self.failed = self.failed or f"{event} {arguments}"
            named = () if event == SYNC else (str(arguments[0]),)
            raise OSError(self.error, os.strerror(self.error), *named)

    def _changes(self, event: str, arguments: tuple[Any, ...]) -> bool:
        return super()._changes(event, arguments) or (event == SYNC and Path(arguments[0]).is_relative_to(self.folder))


SYNC = "faults.fsync"
"""The event of an os.fsync(), of which Python itself tells nothing."""

ARMED: list[AtChange] = []
HOOKS: list[None] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for each in ARMED:
        each.heed(event, arguments)


def _audited(fsync: Callable[[int], None], descriptor: int) -> None:
    sys.audit(SYNC, str(Path(f"/proc/self/fd/{descriptor}").readlink()))
    fsync(descriptor)


def run_here(given: list[str], log: Path, environment: dict[str, str], kill: AtChange | None) -> None:
    """The command in this process, which ends with it; what it says goes into `log`."""
    os.environ.update(environment)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the forkserver may have been started where GPUs were visible
    redirect_output(log)
    with nullcontext() if kill is None else kill.armed():
        sys.exit(main(given))


def run(given: list[str], folder: Path, kill: AtChange | None = None, *, world_size: int = 1) -> tuple[int, str]:
    """The command's exit status, that of its first rank, and what it said; `kill` is for the last rank, whose death
    the others do not survive, as under torchrun."""
    store = torchruns_store() if world_size > 1 else None
    processes, logs = [], [folder / f"log-{rank}" for rank in range(world_size)]
    for rank, log in enumerate(logs):
        log.unlink(missing_ok=True)
        environment = {} if store is None else torchruns(rank, world_size, store.port)
        killed = kill if rank == (world_size - 1 if kill and kill.at is not None and kill.at % 2 else 0) else None
        processes.append(forkserver.context.Process(target=run_here, args=(given, log, environment, killed)))
    for process in processes:
        assert forkserver.start(process, 60) is None
    while any(process.is_alive() for process in processes):
        for process in processes:
            process.join(0.05)
            if process.exitcode not in (None, 0):
                for other in processes:
                    other.join(0 if process.exitcode == -signal.SIGKILL else 20)
                    other.kill()
    statuses = [process.exitcode for process in processes]
    status = next((status for status in statuses if status), 0)
    if kill is not None and -signal.SIGKILL in statuses:  # a rank may have noticed first, and have failed in talking
        status = -signal.SIGKILL
    return status, "".join(log.read_text() for log in logs)


def starter(
    given: Callable[..., list[str]], old: Path, method: str, more: tuple[str, ...]
) -> Callable[[Path], list[str]]:
    """What gives the command line of a job for a folder. One that overwrites finds there what is in `old`."""
    if "--overwrite" in more:
        assert run(given(old, "--seed", "1"), old.parent)[0] == 0

    def start(folder: Path) -> list[str]:
        if old.exists():
            shutil.copytree(old, folder)
        return given(folder, *more, method=method)

    return start


def points(changes: int, few: int, *, whole: bool) -> Iterable[int]:
    """At which of a job's changes there is a fault: at every one, or at a `few` that are spread over them and the last
    but one."""
    return range(1, changes + 1) if whole else {round(changes * (i + 0.5) / few) for i in range(few)} | {changes - 1}


def result(folder: Path) -> tuple[bytes, Any]:
    """The bits of the weights, and the losses, that a job has left in `folder`."""
    (weights,) = folder.glob("*.safetensors")
    (entry,) = record.load(folder / "record.json").entries
    losses = entry.train_loss, entry.heldout_loss_before, entry.heldout_loss_after
    return weights.read_bytes(), json.dumps([*losses, entry.steps, entry.planned_steps])


def steers(text: str) -> bool:
    """Whether `text` has anything that a terminal would obey, or that turns text around."""
    return bool(re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text))


class Found(NamedTuple):
    """How a command ended in this process: its status, -1 with an exception as `err`, and what it said."""

    status: int
    out: str
    err: str

    @property
    def is_a_line(self) -> bool:
        """Whether it refused its input in one line."""
        return (
            self.status == 2
            and self.err.startswith("lightweight: ")
            and self.err.count("\n") == 1
            and not steers(self.err)
        )


def outcome_of(given: list[str], capfd: Any) -> Found:
    """The command `given`, and what it said but for bars of progress."""
    capfd.readouterr()
    try:
        status = main(given)
    except SystemExit as ended:
        status = int(ended.code or 0)
    except Exception as error:  # noqa: BLE001  a traceback of any kind is what is looked for
        capfd.readouterr()
        return Found(-1, "", "".join(traceback.format_exception(error))[-1500:])
    out, err = capfd.readouterr()
    lines = [line.rpartition("\r")[2] for line in err.split("\n")]
    return Found(status, out, "\n".join(line for line in lines if not re.match(r".*\d+%\|", line)).lstrip("\n"))
