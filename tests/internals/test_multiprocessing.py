"""What is private to multiprocessing is still there. In fresh interpreters: this one's forkserver is the tests'."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, signal
from multiprocessing import forkserver, util
from pathlib import Path
from lightweight.internals import multiprocessing as internals
"""


@pytest.fixture
def run(tmp_path):
    def run(program: str) -> str:
        command = [sys.executable, "-c", PROGRAM + program]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    return run


def test_the_forkserver_has_a_process_id_once_it_runs(run):
    assert run(
        "print(internals.forkserver_pid())\n"
        "forkserver.ensure_running()\n"
        "os.kill(internals.forkserver_pid(), signal.SIGKILL)\n"
        "print(os.waitpid(-1, 0)[0] == internals.forkserver_pid())\n"
    ).splitlines() == ["None", "True"]


def test_sockets_lie_where_they_are_told_to(run, tmp_path):
    assert run(
        "print(internals.has_folder())\n"
        "internals.choose_folder(Path.cwd())\n"
        "print(internals.has_folder(), util.get_temp_dir())\n"
    ).splitlines() == ["False", f"True {tmp_path}"]


def test_a_python_without_these_names_has_none(monkeypatch):
    import multiprocessing
    import types

    from lightweight.internals import multiprocessing as internals

    monkeypatch.setattr(internals, "forkserver", types.SimpleNamespace())
    monkeypatch.setattr(multiprocessing, "current_process", types.SimpleNamespace)
    assert internals.forkserver_pid() is None
    assert internals.has_folder()
