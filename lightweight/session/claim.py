"""Whose is the file of --benchmark-json? One session's at a time: each would replace what the other has found.

It is claimed before anything is trained, and held until the session ends, by the process that writes it. Under
pytest-xdist that is the controller, which does not know yet whether a test of lightweight's is there: where it cannot
claim the file, its workers are told why, and refuse if they have collected one.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from lightweight import files
from lightweight.internals import pytest_benchmark
from lightweight.session import options


def record_file(config: pytest.Config) -> Path | None:
    """The file of --benchmark-json; None where there is none to write more than once, but a pipe or a device."""
    given = pytest_benchmark.json_path(config)
    path = None if given is None else options.place(config, given)
    return path if path is not None and (path.is_file() or not path.exists()) else None


def claim(config: pytest.Config) -> str | None:
    """Hold the session's file, where it has one, until the session ends; in a line why that cannot be, else None."""
    try:
        path = record_file(config)
    except pytest.UsageError as error:
        return str(error)
    if path is None:
        return None
    held, given = ExitStack(), pytest_benchmark.json_path(config)
    try:
        held.enter_context(files.alone(path))
    except files.LockedError as error:
        return f"--benchmark-json {given}: process {error.process} writes there: wait for it, or name another file"
    except OSError as error:
        return f"--benchmark-json {given}: cannot be locked ({error.strerror}: {error.filename})"
    config.add_cleanup(held.close)
    return None
