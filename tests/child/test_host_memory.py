import os
import subprocess
import sys

import pytest
import torch

from lightweight.child import host_memory
from lightweight.targets import GiB, MiB

V2 = "31 23 0:28 {root} {top} rw,nosuid - cgroup2 cgroup rw,nsdelegate\n"
V1 = "35 31 0:32 {root} {top} rw,relatime shared:3 - cgroup cgroup rw,memory\n"


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A system whose /proc says what a test writes: the line of /proc/self/cgroup and that of its mount."""

    def write(cgroup: str, mount: str, root: str = "/"):
        folder = tmp_path / "proc" / "self"
        folder.mkdir(parents=True)
        (folder / "cgroup").write_text(cgroup)
        (folder / "mountinfo").write_text(mount.format(root=root, top=tmp_path / "cgroup"))
        monkeypatch.setattr(host_memory, "PROC", tmp_path / "proc")
        return tmp_path / "cgroup"

    return write


def test_without_limits_the_machine_is_the_limit(system):
    system("", "")
    assert host_memory.limit() == (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine's memory")


def test_the_smallest_limit_of_a_cgroup_and_those_above_it_is_in_force(system):
    top = system("0::/slice/job\n", V2)
    (top / "slice" / "job").mkdir(parents=True)
    (top / "slice" / "memory.max").write_text(f"{64 * MiB}\n")
    (top / "slice" / "job" / "memory.max").write_text("max\n")
    (top / "slice" / "job" / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    assert host_memory.limit() == (64 * MiB, "the memory limit of its cgroup")
    assert host_memory.kills() == 2


@pytest.mark.parametrize("root", ["/", "/docker/1f"])
def test_a_container_of_cgroup_v1_sees_its_limit_under_the_hosts_path_or_at_the_top(system, root):
    top = system("5:devices:/docker/1f\n4:memory:/docker/1f\n0::/\n", V1, root)
    folder = top / "docker" / "1f" if root == "/" else top
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(str(48 * MiB))
    (folder / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n")
    assert host_memory.limit().bytes == 48 * MiB
    assert host_memory.kills() == 5


def test_the_largest_number_that_cgroup_v1_knows_is_no_limit(system):
    top = system("4:memory:/\n", V1)
    top.mkdir()
    (top / "memory.limit_in_bytes").write_text("9223372036854771712")
    assert host_memory.limit().what == "this machine's memory"


def test_a_limit_of_address_space_is_seen_and_what_exceeds_it_has_run_out():
    program = (
        "import resource, torch; from lightweight.child import host_memory\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({8 * GiB}, {8 * GiB}))\n"
        "print(host_memory.limit())\n"
        "import mmap\n"
        "for ask in (lambda: torch.empty(2**36), lambda: bytearray(2**36), lambda: mmap.mmap(-1, 2**36)):\n"
        "    try: ask()\n"
        "    except Exception as error: print(type(error).__name__, host_memory.ran_out(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        f"MemoryLimit(bytes={8 * GiB}, what='the limit of ulimit -v')",
        "RuntimeError True",
        "MemoryError True",
        "OSError True",
    ], done.stderr


def test_other_errors_are_not_for_want_of_memory_and_what_one_causes_is():
    assert not host_memory.ran_out(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 394.00 MiB"))
    assert not host_memory.ran_out(OSError(2, "No such file or directory"))
    caused = ValueError("cannot load")
    caused.__cause__ = MemoryError()
    assert host_memory.ran_out(caused)


def test_a_library_that_a_limit_of_address_space_keeps_out_is_for_want_of_memory_and_on_a_noexec_disk_is_not():
    """The dynamic loader says the same of both."""
    program = (
        "import resource, sys; from lightweight.child import host_memory\n"
        "error = ImportError('libtorch.so: failed to map segment from shared object')\n"
        "print(host_memory.ran_out(error))\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({8 * GiB}, {8 * GiB}))\n"
        "print(host_memory.ran_out(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_the_kernels_own_figures_are_read():
    assert 0 < host_memory.limit().bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert host_memory.kills() >= 0
