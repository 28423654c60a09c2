"""How is a file written so that it is whole, or what it was before, and by one process at a time?

It is written beside its place first, into a file with a name of its own that nobody can have put there before, and
renamed once it is on the disk. A link in its place is replaced, not followed. A lock is held on a file of its own, and
ends with the process that holds it, whatever ends that.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNLOCKABLE = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""What a file system answers that has no locks, such as Lustre without its option `flock`."""


LONGEST_NAME = 255
"""Of a file, in bytes: NAME_MAX of Linux's file systems."""


class LockedError(Exception):
    """A place that another process writes to; `process` says which."""

    def __init__(self, process: str) -> None:
        super().__init__(f"process {process} holds it")
        self.process = process


def lock(mark: Path) -> int | None:
    """A descriptor that holds the lock on the file `mark` until it is closed, with this process's id in it; None where
    whoever held it has just removed `mark`: ask again. Raises LockedError, FileExistsError where `mark` is no
    file, and OSError."""
    descriptor = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    is_held = False
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileExistsError(errno.EEXIST, "it is no file: remove it", str(mark))
        _lock(descriptor)
        if _is_at(mark, descriptor):
            os.truncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
            is_held = True
    except OSError as error:
        error.filename = str(mark)  # of a descriptor the kernel knows no name
        raise
    finally:
        if not is_held:
            os.close(descriptor)
    return descriptor if is_held else None


def _lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LockedError(os.read(descriptor, 20).decode(errors="replace").strip() or "another one") from None
    except OSError as error:
        if error.errno not in UNLOCKABLE:
            raise


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the file of `descriptor` is the one at `path` now."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    return False


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Inside, no other process that asks for it writes to `path`. Raises LockedError, and OSError."""
    name = os.fsencode(path.name)
    is_long = len(name) > LONGEST_NAME - len("..lock")
    mark = path.with_name(f".{hashlib.sha256(name).hexdigest() if is_long else path.name}.lock")
    while (descriptor := lock(mark)) is None:
        pass
    try:
        yield
    finally:
        with suppress(OSError):  # where it stays, the next one takes it
            if _is_at(mark, descriptor):
                mark.unlink()
        os.close(descriptor)


def write(path: Path, content: str) -> None:
    """Put `content` into the file at `path`, all of it or nothing. Raises OSError, whose `strerror` says why."""
    with _beside(path) as (handle, beside):
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.chmod(_mode(path))
        beside.replace(path)


def check(path: Path) -> None:
    """Whether `write` can put a file at `path`, before what is to be in it is made. Raises OSError where it cannot."""
    with _beside(path) as (handle, _):
        os.close(handle)


@contextmanager
def _beside(path: Path) -> Iterator[tuple[int, Path]]:
    """A new file, opened, in the folder of `path`; removed afterwards if it is still there."""
    with suppress(FileNotFoundError, NotADirectoryError):
        path.lstat()  # a name too long, a closed folder: from Python 3.14 on, `is_dir` answers False there
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"it is a folder: name a file in it, such as {path / 'name'}")
    if os.path.lexists(path) and not (path.is_symlink() or path.is_file()):
        raise FileExistsError(errno.EEXIST, "it is not a file that can be replaced: give another name")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"there is no folder {folder}: make it first")
    handle, name = tempfile.mkstemp(prefix=".writing-", dir=folder)
    try:
        yield handle, Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _mode(path: Path) -> int:
    """The permissions of what stands at `path`, else of a new file; `mkstemp` gives its owner's only."""
    if path.exists():
        return path.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
