"""Dropout off while a network stays in training mode.

Two ways of computing one step draw other masks, so they can be compared without dropout alone. `eval()` would turn off
too much: gradient checkpointing, and whatever else a network does in training only.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch

from lightweight.internals import torch as torch_internals

_is_off = False


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Inside, no dropout drops anything, in forward passes and in those that a backward pass computes again."""
    global _is_off
    with torch_internals.without_dropout():
        _is_off = True
        try:
            yield
        finally:
            _is_off = False


def probability(module: torch.nn.Module, p: float) -> float:
    """The share that `module`, whose share is `p`, drops now, for kernels of our own.

    Where dropout is off it is the smallest number above 0: nothing falls then, and the kernel is the one that trains.
    """
    if not module.training or p == 0:
        return 0.0
    return sys.float_info.min if _is_off else p
