"""Who ends what a session has started when the session itself cannot, since it was killed?

A process of a few megabytes that does nothing but wait. Its standard input is a pipe whose other end the session alone
holds, so it closes whatever ends the session. Over it the session has said which processes and folders are its own:
those that are left are then killed, also where they are stopped and could not end themselves, and removed. The reaper
leads a session of its own and ignores what asks it to end, so what is sent to the session's group does not reach it.

A machine that stops takes the reaper along. So the next session removes folders whose owner is gone: an owner holds a
lock on its folder's `OWNER` for as long as it lives.

This file runs as a script, in an interpreter that imports nothing but a part of the standard library.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "lightweight-"
OWNER = ".owner"

GONE_SECONDS = 5.0
"""How long what was killed may take to be gone, before its folder is removed all the same."""


class Reaper:
    """The session's end of the pipe. Starts the reaper with the first thing that is said, and anew if it has died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self._pids: dict[int, str | None] = {}  # each with when it started, which tells it from a later one
        self._folders: dict[Path, int | None] = {}  # each with the descriptor of its lock, None once that is closed
        self._telling = threading.RLock()  # which a signal's handler may ask for again

    def adopt(self, pid: int) -> None:
        """End `pid`, and the group it leads, when this process ends."""
        if self._pids.get(pid) != (since := started(pid)) or pid not in self._pids:
            self._pids[pid] = since
            self._tell()

    def since(self, pid: int) -> str | None:
        """When `pid` started, which was adopted; None where the system does not tell."""
        return self._pids.get(pid)

    def release(self, pid: int) -> None:
        """`pid` has ended."""
        if pid in self._pids:
            del self._pids[pid]
            self._tell()

    def make_folder(self, inside: Path | None = None) -> Path:
        """A new folder for this session `inside` another, or where temporary files go; removed when this process
        ends."""
        inside = inside or Path(tempfile.gettempdir())
        remove_left_behind(inside)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=inside))
        # Locked before it has its name, so that no other session takes it for one that was left behind.
        unnamed = folder / f"{OWNER}.new"
        try:
            lock = os.open(unnamed, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # no descriptor left, or no room
            folder.rmdir()
            raise
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
            unnamed.rename(folder / OWNER)
        self._folders[folder] = lock
        self._tell()
        return folder

    def remove_folder(self, folder: Path) -> None:
        """Remove `folder`, or what is left of it, now; what cannot be removed now, when this process ends: one that has
        no descriptors left cannot even look into a folder, and the reaper has its own."""
        if (lock := self._folders.get(folder)) is not None:
            self._folders[folder] = None
            os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)
        if folder in self._folders and not folder.exists():
            del self._folders[folder]
            self._tell()

    @contextmanager
    def temporary_folder(self, inside: Path | None = None) -> Iterator[Path]:
        """`make_folder`, removed afterwards, also where this process is killed inside."""
        folder = self.make_folder(inside)
        try:
            yield folder
        finally:
            self.remove_folder(folder)

    @property
    def pid(self) -> int | None:
        """The reaper's process id, once there is one."""
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """End what is left, and wait until it has ended."""
        if self._process is not None and os.getpid() == self._owner:
            with suppress(OSError):
                self._process.stdin.close()  # type: ignore[union-attr]
            try:
                self._process.wait(2 * GONE_SECONDS)
            except subprocess.TimeoutExpired:  # it was stopped
                self._let_go()
                end(list(self._pids.items()), list(self._folders))
            self._process = None

    def _tell(self) -> None:
        with self._telling:  # two threads would start two reapers, and the first, let go of, would end everything
            self._tell_one_at_a_time()

    def _tell_one_at_a_time(self) -> None:
        folders = [str(folder) for folder in list(self._folders)]
        line = json.dumps([list(self._pids.items()), folders]).encode() + b"\n"
        for _ in range(2):
            try:
                if self._process is None:
                    self._process, self._owner = _start(), os.getpid()
                    atexit.register(self.close)
                assert self._process.stdin is not None
                if self._process.stdin.write(line) == len(line):
                    return
            except OSError:  # it has died, or cannot be started now
                pass
            self._let_go()

    def _let_go(self) -> None:
        """Be without the reaper, which has died or is stopped: one that goes on later would end what is in use."""
        if self._process is not None:
            self._process.kill()
            with suppress(OSError):
                self._process.stdin.close()  # type: ignore[union-attr]
            self._process.wait()
            self._process = None


own = Reaper()
"""Ends what this process has started, and removes its folders, if it cannot do so itself."""


class _Unwaited(subprocess.Popen):  # type: ignore[type-arg]
    """A process that ends by itself once its pipe is closed, so that losing sight of it is nothing to warn of."""

    def __del__(self) -> None:
        if self.stdin is not None:
            with suppress(OSError):
                self.stdin.close()
        super().__del__(_warn=lambda *_, **__: None)  # type: ignore[call-arg]


def _start() -> subprocess.Popen[bytes]:
    """A reaper. To write to one that does not read, since it is stopped, is not to wait for it."""
    process = _Unwaited(
        [sys.executable, "-I", "-S", __file__],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdin is not None
    os.set_blocking(process.stdin.fileno(), False)
    return process


def remove_left_behind(inside: Path) -> None:
    """Remove the folders of sessions that are gone, and that nobody could remove."""
    for file in inside.glob(f"{PREFIX}*/{OWNER}"):
        with suppress(OSError):  # another user's, or one that somebody else removes now
            lock = os.open(file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(file.parent, ignore_errors=True)
            finally:
                os.close(lock)


def started(pid: int) -> str | None:
    """When `pid` started, in the kernel's ticks; None where it is gone or the system does not tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def kill(pid: int, since: str | None = None) -> None:
    """Kill `pid` and the group it leads, unless `pid` is now another process than the one that started at `since`."""
    if since is not None and started(pid) not in (since, None):
        return
    for end in (os.killpg, os.kill):
        with suppress(ProcessLookupError, PermissionError):
            end(pid, signal.SIGKILL)


def main() -> None:
    """Wait until the session is gone; then end what it has left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    left: tuple[list[tuple[int, str | None]], list[str]] = ([], [])
    for line in sys.stdin.buffer:
        if line.endswith(b"\n"):
            left = json.loads(line)
    pids, folders = left
    end(pids, [Path(folder) for folder in folders])


def end(pids: Sequence[tuple[int, str | None]], folders: Sequence[Path]) -> None:
    """Kill the processes, each with when it started, wait until they are gone, and remove the folders."""
    for pid, since in pids:
        kill(pid, since)
    deadline = time.monotonic() + GONE_SECONDS
    while any(is_running(pid, since) for pid, since in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def is_running(pid: int, since: str | None) -> bool:
    """Whether the process `pid` that started at `since` has not ended."""
    with suppress(OSError, IndexError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in ("Z", "X") and started(pid) == since
    with suppress(OSError):
        if since is None:  # a system without /proc
            os.kill(pid, 0)
            return True
    return False


if __name__ == "__main__":
    main()
