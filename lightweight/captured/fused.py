"""Which kernels of our own are there? Those of `kernels` where there is Triton, and none, which is None here, else."""

from __future__ import annotations

import contextlib

try:
    from lightweight.captured import kernels
except ImportError:  # no Triton
    kernels = None  # type: ignore[assignment]

__all__ = ["compiling", "kernels", "warm_up"]


def warm_up() -> None:
    """`kernels.warm_up`, where there are kernels."""
    if kernels is not None:
        kernels.warm_up()


def compiling() -> contextlib.AbstractContextManager[None]:
    """`kernels.compiling` where there are kernels; else what is inside is run like anything."""
    return contextlib.nullcontext() if kernels is None else kernels.compiling()
