"""What starts children is there, or is started anew."""

import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from lightweight.child import forkserver, handle, helper, reaper
from lightweight.child.owner import Child
from lightweight.internals import multiprocessing as internals
from lightweight.internals.multiprocessing import forkserver_pid
from lightweight.trial import Completed, Crashed, TimedOut


def server_pid() -> int:
    pid = forkserver_pid()
    assert pid is not None
    return pid


def test_a_child_does_not_run_the_main_script_again(trial, tmp_path, monkeypatch):
    """Which is pytest's, and multiprocessing would: it imports the script that `__main__` was started from."""
    script = tmp_path / "script.py"
    script.write_text("from pathlib import Path; Path(__file__).with_name('ran').touch()")
    main = types.ModuleType("__main__")
    main.__file__ = str(script)
    monkeypatch.setitem(sys.modules, "__main__", main)
    for name in ("call", "trial"):
        (tmp_path / name).mkdir()
    assert helper.call(os.getpid, tmp_path / "call") != os.getpid()
    with Child(trial, tmp_path / "trial") as child:
        assert child.outcome is None
    assert sys.modules["__main__"] is main
    assert not (tmp_path / "ran").exists()


def test_children_have_huge_pages_where_the_kernel_gives_them(folder):
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("the kernel gives huge pages to nobody, or to everybody")
    told = helper.call(eval, folder, "(b'x' * 2**26, open('/proc/self/smaps_rollup').read())[1]")
    huge = next(line for line in told.splitlines() if line.startswith("AnonHugePages"))
    assert int(huge.split()[1]) * 1024 > 2**25


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP], ids=lambda number: number.name)
def test_a_forkserver_that_is_gone_or_stopped_costs_no_trial_and_leaves_no_process(trial, tmp_path, number):
    for name in "abc":
        (tmp_path / name).mkdir()
    with (
        Child(trial, tmp_path / "a", silence_seconds=30) as child,
        Child(trial, tmp_path / "b", silence_seconds=30) as other,
    ):
        os.kill(server_pid(), number)
        assert isinstance(child.finish(), Completed)
        os.kill(other.pids[0], signal.SIGKILL)
        outcome = other.finish()
    assert not reaper.is_running(child.pids[0], reaper.started(child.pids[0]))  # whoever is to wait for its end now
    assert isinstance(outcome, Crashed)
    assert "forkserver" in outcome.reason or outcome.reason.startswith("killed by SIGKILL")
    with Child(trial, tmp_path / "c") as child:
        assert isinstance(child.finish(), Completed)


def test_a_forkserver_that_is_dead_and_not_given_up_by_the_kernel_is_replaced(folder, monkeypatch):
    """As one is of which a thread still lives: `waitpid` tells multiprocessing nothing of it yet."""
    helper.call(int, folder)
    server = server_pid()
    given_up = time.monotonic() + 0.5

    def waitpid(pid: int, options: int, waitpid=os.waitpid) -> tuple[int, int]:
        return (0, 0) if pid == server and time.monotonic() < given_up else waitpid(pid, options)

    monkeypatch.setattr(os, "waitpid", waitpid)
    os.kill(server, signal.SIGKILL)
    assert helper.call(int, folder) == 0
    assert forkserver_pid() != server


def test_a_forkserver_that_does_not_start_a_child_in_time_is_replaced(trial, tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
    with Child(trial, tmp_path / "a") as child:
        assert child.outcome is None
    os.kill(server_pid(), signal.SIGSTOP)
    with Child(trial, tmp_path / "b", silence_seconds=2) as child:
        outcome = child.finish()
    assert isinstance(outcome, TimedOut)
    assert outcome.reason == "the forkserver answered nothing for 2 s and was killed"
    with Child(trial, tmp_path / "c") as child:
        assert isinstance(child.finish(), Completed)


def test_a_child_that_is_being_started_is_given_up_with_all_others(trial, tmp_path):
    """pytest-timeout's thread does so, and must not wait for what a forkserver still imports."""
    for name in "ab":
        (tmp_path / name).mkdir()
    helper.call(int, tmp_path / "a")
    os.kill(server_pid(), signal.SIGSTOP)
    threading.Timer(0.5, handle.kill_all).start()
    began = time.monotonic()
    with Child(trial, tmp_path / "a", silence_seconds=120) as child:
        assert isinstance(child.outcome, TimedOut) and child.outcome.phase == "start"
    assert time.monotonic() - began < 100
    with Child(trial, tmp_path / "b") as child:
        assert isinstance(child.finish(), Completed)


def test_a_forkserver_that_dies_before_it_was_adopted_is_waited_for(monkeypatch):
    """Else multiprocessing takes it for one that lives, and asks it for the next child."""
    server = subprocess.Popen(
        [sys.executable, "-c", "held = bytearray(2**28); print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdout is not None
    server.stdout.readline()
    monkeypatch.setattr(forkserver, "forkserver_pid", lambda: server.pid)
    forkserver.kill()
    with server:
        assert server.poll() == -signal.SIGKILL


def test_where_multiprocessing_names_no_server_nothing_is_done_about_it(monkeypatch, folder):
    monkeypatch.setattr(internals, "forkserver", types.SimpleNamespace())
    forkserver.kill()
    assert forkserver_pid() is None
    assert helper.call(int, folder) == 0


def test_a_long_path_of_temporary_files_is_no_hindrance(tmp_path):
    program = (
        "from lightweight.child import forkserver\n"
        "if __name__ == '__main__':\n"
        "    forkserver.context.set_forkserver_preload([])\n"
        "    process = forkserver.context.Process(target=int)\n"
        "    assert forkserver.start(process, 60) is None\n"
        "    process.join()\n"
        "    print(process.exitcode)"
    )
    (tmp_path / "program.py").write_text(program)
    long = tmp_path / ("x" * 100)
    long.mkdir()
    environment = {**os.environ, "TMPDIR": str(long)}
    done = subprocess.run([sys.executable, tmp_path / "program.py"], env=environment, capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr
