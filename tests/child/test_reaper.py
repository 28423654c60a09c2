"""What ends with a process, whatever ends it."""

import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lightweight.child import forkserver, reaper


@pytest.fixture
def started(monkeypatch):
    """One for each reaper that is started, which takes its time."""
    start, found = reaper._start, []

    def slowly():
        found.append(threading.get_ident())
        time.sleep(0.2)
        return start()

    monkeypatch.setattr(reaper, "_start", slowly)
    return found


def test_threads_that_begin_together_have_one_reaper(started, tmp_path):
    """Two would each know of some folders, and the one that is let go of would remove its own at once."""
    own = reaper.Reaper()
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(own.make_folder, [tmp_path] * 4))
    assert len(started) == 1 and all(folder.is_dir() for folder in folders)
    own.close()
    assert not any(folder.is_dir() for folder in folders)


def test_threads_that_begin_together_have_one_folder_of_sockets(monkeypatch, tmp_path):
    chosen: list[Path] = []

    def make_folder(inside):
        time.sleep(0.1)
        return tmp_path

    monkeypatch.setattr(reaper.own, "make_folder", make_folder)
    monkeypatch.setattr(forkserver, "has_folder", lambda: bool(chosen))
    monkeypatch.setattr(forkserver, "choose_folder", chosen.append)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: forkserver._own_sockets_folder(), range(4)))
    assert chosen == [tmp_path]


def test_a_reaper_that_is_stopped_is_not_waited_for_and_does_not_stay(monkeypatch, tmp_path):
    """Its pipe takes 64 KiB; another takes its place, and what a last one cannot end, its owner does."""
    monkeypatch.setattr(reaper, "GONE_SECONDS", 0.2)
    own = reaper.Reaper()
    folder = own.make_folder(tmp_path)
    first = own.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    for _ in range(70_000 // (len(str(folder)) + 8)):
        own._tell()
    second = own.pid
    assert second not in (first, None) and not reaper.is_running(first, reaper.started(first))
    os.kill(second, signal.SIGSTOP)
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    own.adopt(child.pid)
    own.close()
    assert child.wait(10) == -signal.SIGKILL and not folder.exists()
    assert not reaper.is_running(second, reaper.started(second))


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path):
    folder = tmp_path / f"{reaper.PREFIX}planted"
    folder.mkdir()
    (tmp_path / "somebodys").touch()
    (folder / reaper.OWNER).symlink_to(tmp_path / "somebodys")
    reaper.remove_left_behind(tmp_path)
    assert folder.is_dir()
