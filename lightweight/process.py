"""What a child does to itself before it imports what it will run."""

from __future__ import annotations

import os
from pathlib import Path


def see_gpus(first: int, count: int) -> None:
    """Leave this process only the `count` GPUs from number `first` on among the visible ones, before CUDA is
    initialised: one rank, one GPU, where the Trainer would spread over every GPU it sees, and none on the CPU."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    chosen = [visible[index] if visible else str(index) for index in range(first, first + count)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)


def log_of(rank: int, folder: Path) -> Path:
    """Where what the libraries of `rank` write goes."""
    return folder / (f"log-{rank}" if rank else "log")


def redirect_output(path: Path) -> None:
    """Send this process's stdout and stderr, file descriptors included, to `path`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
