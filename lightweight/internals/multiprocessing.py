"""What is private to multiprocessing: its forkserver's process, and where its sockets lie. Read in CPython 3.11.7.

Both are read so that another Python without these names loses what they are for, and nothing else.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver
from pathlib import Path


def forkserver_pid() -> int | None:
    """The process id of the forkserver, which it tells nobody; None where there is none, or no such name."""
    pid: int | None = getattr(getattr(forkserver, "_forkserver", None), "_forkserver_pid", None)
    return pid


def has_folder() -> bool:
    """Whether the folder for sockets of this process has been chosen, or cannot be."""
    settings = getattr(multiprocessing.current_process(), "_config", None)
    return settings is None or "tempdir" in settings


def choose_folder(folder: Path) -> None:
    """Have sockets lie in `folder`, where `has_folder` says no; else multiprocessing makes one where TMPDIR says."""
    multiprocessing.current_process()._config["tempdir"] = str(folder)  # type: ignore[attr-defined]
