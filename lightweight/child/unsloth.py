"""How does a trial that Unsloth trains begin? In a fresh interpreter.

Unsloth rewrites transformers while both are imported, and must be imported first. So its trials are not forked from the
server, which has imported transformers already.
"""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from lightweight.child.process import log_of, redirect_output, see_gpus

if TYPE_CHECKING:  # transformers must not come before unsloth
    from lightweight.trial import Trial


def run(connection: Connection, pickled: bytes, folder: Path, started: float, device_index: int | None) -> None:
    """`worker.run` for a trial that Unsloth trains, in a process that has imported nothing yet. The trial comes
    `pickled`, since unpickling it imports transformers."""
    redirect_output(log_of(0, folder))
    if device_index is not None:
        see_gpus(device_index, 1)
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # it would ask the hub, and wait for it
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(folder / "unsloth")  # else in the current folder, for the next one
    import unsloth  # isort: skip  # noqa: F401

    from lightweight.child import worker

    trial: Trial = pickle.loads(pickled)  # noqa: S301  from the owner
    worker.run(connection, replace(trial, device_index=None if device_index is None else 0), folder, started)
