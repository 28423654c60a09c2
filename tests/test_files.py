"""A file is whole, or what it was before; where none can be written is known before anything is made for it."""

import errno
import os
import resource
import threading
from pathlib import Path

import pytest

from lightweight import files


@pytest.fixture
def small_files():
    """No file may have over 4096 bytes."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_what_does_not_fit_leaves_what_was_there_and_nothing_else(tmp_path, small_files):
    files.write(tmp_path / "a", "before")
    with pytest.raises(OSError, match="File too large"):
        files.write(tmp_path / "a", "x" * 5000)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "before"}


def test_a_reader_finds_the_one_or_the_other_whole(tmp_path):
    contents = {"a" * 100_000, "b" * 100_000}
    files.write(tmp_path / "a", "a" * 100_000)
    done = threading.Event()

    def alternate():
        for index in range(100):
            files.write(tmp_path / "a", "ab"[index % 2] * 100_000)
        done.set()

    writer = threading.Thread(target=alternate)
    writer.start()
    found = set()
    while not done.is_set():
        found.add((tmp_path / "a").read_text())
    writer.join()
    assert found <= contents


def test_a_link_in_its_place_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "a").symlink_to("precious")
    files.write(tmp_path / "a", "new")
    assert (tmp_path / "precious").read_text() == "precious" and not (tmp_path / "a").is_symlink()


def test_what_is_written_beside_is_a_new_file_and_no_link_that_waits_there(tmp_path, monkeypatch):
    opened = []

    def spy(path, flags, *mode, open=os.open, **folder) -> int:
        opened.append(flags)
        return open(path, flags, *mode, **folder)

    monkeypatch.setattr(os, "open", spy)
    files.write(tmp_path / "a", "new")
    assert opened and all(flags & os.O_EXCL for flags in opened)


@pytest.mark.parametrize(
    ("make", "number"),
    [
        (os.mkdir, errno.EISDIR),
        (os.mkfifo, errno.EEXIST),
        (lambda path: None, errno.ENOENT),
        (lambda path: None, errno.ENAMETOOLONG),
    ],
)
@pytest.mark.parametrize("act", [files.check, lambda path: files.write(path, "x")], ids=["check", "write"])
def test_a_place_where_none_can_be_written_is_told_and_left_alone(tmp_path, act, make, number):
    path = tmp_path / {errno.ENOENT: "nowhere/a", errno.ENAMETOOLONG: "x" * 300}.get(number, "a")
    make(path)
    before = list(tmp_path.iterdir())
    with pytest.raises(OSError, match=r"\w") as raised:
        act(path)
    assert raised.value.errno == number
    assert list(tmp_path.iterdir()) == before


def test_checking_leaves_nothing_and_touches_nothing(tmp_path):
    (tmp_path / "a").write_text("before")
    for name in ("a", "b"):
        files.check(tmp_path / name)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "before")]


@pytest.mark.parametrize("name", ["한" * 83 + ".json", "a" * 250 + ".json"])
def test_a_file_can_be_held_whatever_length_its_name_has(tmp_path, name):
    (tmp_path / name).touch()
    with files.alone(tmp_path / name):
        with pytest.raises(files.LockedError, match=str(os.getpid())), files.alone(tmp_path / name):
            pass
        with files.alone(tmp_path / f"{name[:-6]}_.json"):  # another one of the same beginning
            pass
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("call", ["truncate", "write", "fstat"])
def test_a_lock_that_fails_names_its_file_and_holds_nothing(tmp_path, monkeypatch, call):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space left") as raised, files.alone(tmp_path / "a"):
            pass
    assert raised.value.filename == str(tmp_path / ".a.lock")
    with files.alone(tmp_path / "a"):
        pass


def test_a_lock_that_cannot_be_removed_takes_nothing_from_what_was_done(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    with files.alone(tmp_path / "a"):
        monkeypatch.setattr(Path, "unlink", fail)
    monkeypatch.undo()
    with files.alone(tmp_path / "a"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_taken_from_under_its_holder_is_not_removed_by_it(tmp_path):
    with files.alone(tmp_path / "a"):
        (tmp_path / ".a.lock").unlink()
        (tmp_path / ".a.lock").write_text("another's")
    assert (tmp_path / ".a.lock").read_text() == "another's"
