"""Dropout off while a network stays in training mode.

Two ways of computing one step draw other masks, so they can be compared without dropout alone. `eval()` would turn off
too much: gradient checkpointing, and whatever else a network does in training only.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.nn import functional

_DROPOUTS = (
    *((functional, name) for name in ("dropout", "dropout1d", "dropout2d", "dropout3d")),
    *((functional, name) for name in ("alpha_dropout", "feature_alpha_dropout")),
    *((torch, name) for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")),
)
"""Where networks find them, each call anew. A mode of torch's dispatcher would be suspended in backward passes, in
which checkpointed layers are computed once more."""

_attention = functional.scaled_dot_product_attention
_is_off = False


def _let_through(input: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return input


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001  named as torch names it
    *arguments: Any,
    **options: Any,
) -> torch.Tensor:
    return _attention(query, key, value, attn_mask, 0.0, *arguments, **options)


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Inside, no dropout drops anything, in forward passes and in those that a backward pass computes again."""
    global _is_off
    with contextlib.ExitStack() as stack:
        for module, name in _DROPOUTS:
            stack.enter_context(mock.patch.object(module, name, _let_through))
        stack.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", _attend))
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
