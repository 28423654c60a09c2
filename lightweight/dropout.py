"""Dropout off while a network stays in training mode.

Two ways of computing one step draw other masks, so they can be compared without dropout alone. `eval()` would turn off
too much: gradient checkpointing, and whatever else a network does in training only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_DROPOUTS = (
    *(functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d),
    *(functional.alpha_dropout, functional.feature_alpha_dropout),
    *(torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout),
)

_is_off = False


class _Without(TorchFunctionMode):
    """Every dropout of torch's own lets all of its input through."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        if function in _DROPOUTS:
            return arguments[0] if arguments else options["input"]
        if function is functional.scaled_dot_product_attention:
            # its fifth argument is the probability
            arguments, options = arguments[:4] + (0.0,) * (len(arguments) > 4) + arguments[5:], dict(options)
            options.pop("dropout_p", None)
        return function(*arguments, **options)


@contextmanager
def off() -> Iterator[None]:
    """Inside, no dropout drops anything, in forward passes and in those that a backward pass computes again."""
    global _is_off
    before, _is_off = _is_off, True
    try:
        with _Without():
            yield
    finally:
        _is_off = before


def probability(module: torch.nn.Module, p: float) -> float:
    """The share that `module`, whose share is `p`, drops now, for kernels of our own.

    Where dropout is off it is the smallest number above 0: nothing falls then, and the kernel is the one that trains.
    """
    if not module.training or p == 0:
        return 0.0
    return sys.float_info.min if _is_off else p
