"""How much memory may this process have, and has it run out? The host's, which weights on a CPU and all loading take.

A container's cgroup often grants far less than the machine has, and `ulimit -v` less again: what is in force is the
smallest of them. Exceeding it shows in two ways: an allocation fails, or the kernel kills a process and counts that.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lightweight.targets import GiB

if TYPE_CHECKING:  # torch takes seconds, and memory
    from lightweight.trial import Measurements, OutOfMemory, Phase

PROC = Path("/proc")

UNLIMITED = 2**60
"""Bytes from which on a limit is none: cgroup v1 writes the largest number of pages there is."""

SIGNS = ("DefaultCPUAllocator", "Cannot allocate memory", "std::bad_alloc")
"""In the message of an error that has no type of its own: torch's allocator, the C library, C++."""

LOADERS_SIGN = "failed to map segment from shared object"
"""What the dynamic loader says where `ulimit -v` has no room for a library, and on a disk that is mounted noexec."""

RLIMITS = ((resource.RLIMIT_AS, "ulimit -v"), (resource.RLIMIT_DATA, "ulimit -d"))
"""Each with the command that sets it."""

HOST = "the host's memory: "
"""In the reason of an outcome, what is in force comes after it."""


class MemoryLimit(NamedTuple):
    """`bytes` of memory, and `what` grants no more than that, as a person would look for it."""

    bytes: int
    what: str


def limit() -> MemoryLimit:
    """The smallest limit in force on this process."""
    limits = [MemoryLimit(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine's memory")]
    limits += [MemoryLimit(soft, f"the limit of {what}") for soft, what in _rlimits()]
    for folder in _cgroups():
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name).strip()
            if text.isdigit() and int(text) < UNLIMITED:
                limits.append(MemoryLimit(int(text), "the memory limit of its cgroup"))
    return min(limits, key=lambda each: each.bytes)


def ran_out(error: BaseException) -> bool:
    """Whether `error`, or what caused it, is that the host's memory did not suffice. torch has no exception of its own
    for that."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if any(sign in str(error) for sign in SIGNS) or (LOADERS_SIGN in str(error) and _rlimits()):
        return True
    return error.__cause__ is not None and ran_out(error.__cause__)


def outcome(phase: Phase, reason: str, measured: Measurements) -> OutOfMemory:
    """How a trial ended for which the host's memory did not suffice; `reason` is completed by the limit in force."""
    from lightweight.trial import OutOfMemory

    least = limit()
    return OutOfMemory(
        phase=phase,
        requested_bytes=None,
        budget_bytes=least.bytes,
        reason=f"{reason}; {HOST}{least.what} is {least.bytes / GiB:.2f} GiB",
        measured=measured,
    )


def kills() -> int:
    """How many processes of this process's cgroup the kernel has killed for memory so far; of the whole machine where
    it has no cgroup that counts."""
    for folder in _cgroups():
        for name in ("memory.events", "memory.oom_control"):
            if (count := _counted(folder / name)) is not None:
                return count
    return _counted(PROC / "vmstat") or 0


def _rlimits() -> list[tuple[int, str]]:
    """The limits that are set on this process, each in bytes and with the command that sets it."""
    limits = [(resource.getrlimit(number)[0], what) for number, what in RLIMITS]
    return [(soft, what) for soft, what in limits if soft != resource.RLIM_INFINITY]


def _cgroups() -> Iterator[Path]:
    """The folders of the cgroups that limit this process's memory, from its own up to the root: cgroup v1 and v2
    (https://docs.kernel.org/admin-guide/cgroup-v2.html). None on a system without."""
    mounts = [line.split() for line in _read(PROC / "self" / "mountinfo").splitlines()]
    for line in _read(PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        for mount in mounts:
            # mountinfo: id, parent, device, root, mount point, options ..., "-", type, source, options
            kind, options = mount[mount.index("-") + 1], mount[-1].split(",")
            if kind != ("cgroup" if controllers else "cgroup2") or (controllers and "memory" not in options):
                continue
            root, top = Path(mount[3]), Path(mount[4])
            # In a container the path may be the host's, of which only the end, or nothing, is mounted.
            inside = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path(path.lstrip("/"))
            folder = top / inside
            yield from (each for each in (folder, *folder.parents) if each.is_relative_to(top) and each.is_dir())


def _counted(file: Path) -> int | None:
    """The number beside `oom_kill` in `file`, which has a name and a number a line."""
    for line in _read(file).splitlines():
        name, _, count = line.partition(" ")
        if name == "oom_kill" and count.isdigit():
            return int(count)
    return None


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # no such file on this system, or a controller that is switched off
        return ""
