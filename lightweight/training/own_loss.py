"""Is what a method's own loss returns something to train on?

The Trainer passes on whatever it is given; what is no loss fails deep in torch, or not at all, and no line names the
method.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from lightweight import importable
from lightweight.methods import Method, MethodError

AS_THE_TRAINERS = "have it take (outputs, labels, num_items_in_batch)"


class OwnLoss:
    """The `compute_loss` of `method`, whose results are looked at before they are used; waits for no device. Raises
    MethodError."""

    def __init__(self, method: Method) -> None:
        assert method.compute_loss is not None
        self._loss = method.compute_loss
        self._whose = f"method {method.name}: its compute_loss {importable.import_path(method.compute_loss)}"
        try:
            inspect.signature(self._loss).bind(None, None, num_items_in_batch=None)
        except TypeError as error:
            raise MethodError(f"{self._whose} cannot be called ({error}): {AS_THE_TRAINERS}") from None

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """A scalar with a gradient."""
        loss = self._loss(outputs, labels, num_items_in_batch=num_items_in_batch)
        if not isinstance(loss, torch.Tensor):
            raise MethodError(f"{self._whose} returns a {type(loss).__name__}: return a tensor")
        if loss.numel() != 1:
            raise MethodError(
                f"{self._whose} returns a tensor of {' x '.join(map(str, loss.shape))}: return one number, the sum "
                "over tokens / num_items_in_batch"
            )
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise MethodError(
                f"{self._whose} returns a loss without a gradient: compute it from the outputs, undetached"
            )
        return loss
