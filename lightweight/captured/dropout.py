"""Dropout as a layer of our own draws it, and off while a network stays in training mode.

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


def is_off() -> bool:
    """Whether nothing is to be dropped now."""
    return _is_off


def probability(module: torch.nn.Module, p: float) -> float:
    """The share that `module`, whose share is `p`, drops now, for kernels of our own.

    Where dropout is off it is the smallest number above 0: nothing falls then, and the kernel is the one that trains.
    """
    if not module.training or p == 0:
        return 0.0
    return sys.float_info.min if _is_off else p


def drop(x: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`x` with its share `p` dropped and the rest scaled up, and the mask of what was kept; None where `p` is 0."""
    return torch.native_dropout(x, p, True) if p else (x, None)


def drop_backward(x: torch.Tensor, mask: torch.Tensor | None, p: float) -> torch.Tensor:
    """`x` with what `drop` dropped by this mask dropped, and the rest scaled up."""
    if mask is None:
        return x
    kept: torch.Tensor = torch.ops.aten.native_dropout_backward(x, mask, 1 / (1 - p))
    return kept
