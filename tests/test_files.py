"""A file is whole, or what it was before; where none can be written is known before anything is made for it."""

import errno
import os
import resource
import threading

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
