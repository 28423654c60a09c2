"""What loss has a network on rows that it was not trained on? The same measure for every method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer

from lightweight.corpus import IGNORED, Row
from lightweight.methods import MethodError
from lightweight.training.stock import MeasuredTrainer


def heldout_loss(trainer: Trainer, rows: Sequence[Row]) -> float:
    """Mean cross-entropy (nats a token) of each next token over the answers of `rows`, under the trainer's own
    autocast.

    From the logits alone, in fp32: the network's own loss may hold more (a router's balance, an adapter's penalty), and
    is of the same token instead of the next one where the architecture shifts no labels (BART as a decoder). Weighted
    by tokens, unlike `Trainer.evaluate`, which averages batches and so depends on the batch size. What code a method
    brings along changes none of that; where it could have the network see what it is to predict, that is looked for.
    Raises TypeError for a network that gives no logits, and MethodError for one that sees the tokens it predicts.
    """
    measured = cast("MeasuredTrainer", trainer)
    model = trainer.model
    assert model is not None
    model.eval()
    optimizer: Any = trainer.optimizer
    if callable(getattr(optimizer, "eval", None)):
        optimizer.eval()  # one without a schedule has other weights to evaluate than to train; its next step goes back
    collate = measured.collate
    batch_size = trainer.args.per_device_train_batch_size
    total, tokens = 0.0, 0
    with torch.no_grad(), measured.evaluating():
        if set(measured.method.own_code) - {"optimizer"}:
            _check_causal(measured, collate([max(rows, key=lambda row: len(row["input_ids"]))]))
        for start in range(0, len(rows), batch_size):
            batch = collate(rows[start : start + batch_size])
            ids, mask, labels = (
                batch[name].to(trainer.args.device) for name in ("input_ids", "attention_mask", "labels")
            )
            # Without labels, where a peer would give a loss in the place of logits.
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            if not isinstance(logits, torch.Tensor):
                raise TypeError(f"{type(model).__name__} gives no logits, which a held-out loss is computed from")
            summed, predicted = _next_token_losses(logits, labels)
            total += summed
            tokens += predicted
    return total / tokens


FP32_TOKENS = 1024
"""Tokens whose logits are copied to fp32 at one time: 0.6 GB for a vocabulary of 151 936, and that twice."""


LEAK = 0.05
"""How far later tokens may move the logits of earlier ones, of what those vary by: by rounding, where experts compute
what is routed to them together."""


def _check_causal(trainer: MeasuredTrainer, batch: dict[str, Any]) -> None:
    """Raise MethodError where the logits of the first half of a row, the one of `batch`, depend on its second half: the
    last of them, where it is long."""
    model: Any = trainer.model
    ids, mask = (batch[name].to(trainer.args.device) for name in ("input_ids", "attention_mask"))
    end = int(mask.sum()) // 2

    def first_half(ids: torch.Tensor) -> torch.Tensor | None:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        if not isinstance(logits, torch.Tensor):
            return None
        return logits[0, -ids.shape[1] :][max(0, end - FP32_TOKENS) : end].float()

    logits = first_half(ids)
    if logits is None or end == 0 or not logits.isfinite().all():
        return
    others = ids.clone()
    others[0, end:] = (others[0, end:] + 1) % logits.shape[-1]
    moved_logits = first_half(others)
    assert moved_logits is not None
    moved = (moved_logits - logits).norm() / (logits - logits.mean()).norm().clamp_min(1e-12)
    if not moved <= LEAK:
        raise MethodError(
            f"method {trainer.method.name}: its network sees the tokens that it must predict: later tokens change the "
            f"logits of earlier ones by {float(moved):.0%}, and no held-out loss of it could be compared"
        )


def _next_token_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
    """The sum of the cross-entropies of what `labels`, [rows, time], predict, and of how many tokens that is. `logits`,
    [rows, at least time, vocabulary], begin earlier where an adapter puts virtual tokens before the row."""
    logits, targets = logits[:, -labels.shape[1] :][:, :-1], labels[:, 1:]
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for row, targets_of_row in zip(logits, targets, strict=True):
        answered = (targets_of_row != IGNORED).nonzero().squeeze(1)
        for part in answered.split(FP32_TOKENS):
            total += cross_entropy(row[part].float(), targets_of_row[part], reduction="sum")
    return float(total), int((targets != IGNORED).sum())
