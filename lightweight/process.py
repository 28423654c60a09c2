"""What a child does to itself before it imports what it will run."""

from __future__ import annotations

import os
from pathlib import Path


def see_one_gpu(index: int) -> None:
    """Leave this process only the GPU at `index` among the visible ones, before CUDA is initialised: one trial, one
    GPU, where the Trainer would spread over every GPU it sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)


def redirect_output(path: Path) -> None:
    """Send this process's stdout and stderr, file descriptors included, to `path`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
