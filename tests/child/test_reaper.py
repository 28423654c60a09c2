"""What ends with a process, whatever ends it."""

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
