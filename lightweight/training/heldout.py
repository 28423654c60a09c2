"""What loss has a network on rows that it was not trained on? The same measure for every method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from unittest import mock

from lightweight.preload import peft  # isort: skip  # before Trainer, which imports peft

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
    total, tokens = torch.zeros((), dtype=torch.float64, device=trainer.args.device), 0
    with torch.no_grad(), measured.evaluating():
        if set(measured.method.own_code) - {"optimizer"}:
            _check_causal(measured, collate([max(rows, key=lambda row: len(row["input_ids"]))]))
        for start in range(0, len(rows), batch_size):
            batch = collate(rows[start : start + batch_size])
            ids, mask, labels = (
                batch[name].to(trainer.args.device) for name in ("input_ids", "attention_mask", "labels")
            )
            targets = labels[:, 1:]
            answered = (targets != IGNORED).any(0).nonzero().squeeze(1)
            with _logits_of(measured, ids, mask) as logits_at:
                for columns in answered.split(max(1, TOKENS_AT_ONCE // len(ids))):
                    logits, labelled = logits_at(columns).float().flatten(0, 1), targets[:, columns].flatten()
                    total += cross_entropy(logits, labelled, ignore_index=IGNORED, reduction="sum")
                    del logits
            tokens += int((targets != IGNORED).sum())
    return float(total) / tokens


TOKENS_AT_ONCE = 512
"""So many tokens' logits exist at one time, where the network can do that: 0.8 GB for a vocabulary of 151 936, in half
precision, in fp32 and as log-probabilities. A row of 32,768 tokens has 10 GB of them in half precision alone."""


LEAK = 0.05
"""How far later tokens may move the logits of earlier ones, of what those vary by: by rounding, where experts compute
what is routed to them together."""


def _check_causal(trainer: MeasuredTrainer, batch: dict[str, Any]) -> None:
    """Raise MethodError where the logits of the first half of a row, the one of `batch`, depend on its second half: the
    last of them, where it is long."""
    ids, mask = (batch[name].to(trainer.args.device) for name in ("input_ids", "attention_mask"))
    if (end := int(mask.sum()) // 2) == 0:
        return
    columns = torch.arange(max(0, end - TOKENS_AT_ONCE), end, device=ids.device)

    def first_half(ids: torch.Tensor) -> torch.Tensor:
        with _logits_of(trainer, ids, mask) as logits_at:
            return logits_at(columns)[0].float()

    logits = first_half(ids)
    if not logits.isfinite().all():
        return
    others = ids.clone()
    others[0, end:] = (others[0, end:] + 1) % logits.shape[-1]
    moved = (first_half(others) - logits).norm() / (logits - logits.mean()).norm().clamp_min(1e-12)
    if not moved <= LEAK:
        raise MethodError(
            f"method {trainer.method.name}: its network sees the tokens that it must predict: later tokens change the "
            f"logits of earlier ones by {float(moved):.0%}, and no held-out loss of it could be compared"
        )


@contextmanager
def _logits_of(
    trainer: MeasuredTrainer, ids: torch.Tensor, mask: torch.Tensor
) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Gives the logits of a batch, [rows, columns, vocabulary], at the columns asked for; `ids` and `mask` are
    [rows, time].

    The decoder is run once. Where the network takes `logits_to_keep`, only what it does after the decoder is computed
    for each question, else there are all logits at one time. Raises TypeError for a network that gives no logits.
    """
    network: Any = trainer.model
    time = ids.shape[1]
    inside: Any = network.get_base_model() if isinstance(network, peft.PeftModel) else network
    decoder = inside.get_decoder() if hasattr(inside, "get_decoder") else inside
    in_parts = (
        trainer.method.library == "peft"  # others replace what a network does
        and decoder is not inside
        and "logits_to_keep" in inspect.signature(inside.forward).parameters
    )
    results: list[Any] = []  # of the decoder, where a network calls it more than once all of one pass
    called = 0

    def compute_once(*arguments: Any, **options: Any) -> Any:
        nonlocal called
        called += 1
        if called > len(results):
            results.append(forward(*arguments, **options))
        return results[called - 1]

    def ask(**options: Any) -> torch.Tensor:
        nonlocal called
        called = 0
        # Without labels, where a peer would give a loss in the place of logits.
        logits = network(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
        if not isinstance(logits, torch.Tensor):
            raise TypeError(f"{type(network).__name__} gives no logits, which a held-out loss is computed from")
        return logits

    if in_parts:
        forward = decoder.forward
        with mock.patch.object(decoder, "forward", compute_once):
            # counted from the end: an adapter may put virtual tokens before the row
            yield lambda columns: ask(logits_to_keep=columns - time)
    else:
        logits = ask()[:, -time:]
        yield lambda columns: logits[:, columns]
