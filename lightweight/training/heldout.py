"""What loss has a network on rows that it was not trained on? The same measure for every method."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from unittest import mock

from lightweight.preload import peft  # isort: skip  # before Trainer, which imports peft

import torch
from torch.nn.functional import cross_entropy, kl_div
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
        longest = max(rows, key=lambda row: len(row["input_ids"]))
        if set(measured.method.own_code) - {"optimizer"}:
            _check_causal(measured, collate([longest]), _cuts(len(longest["input_ids"])))
        elif not measured.has_stepped:  # an architecture's own, which has no blocks of tokens
            few: Row = {"input_ids": longest["input_ids"][:FEW_TOKENS], "labels": longest["labels"][:FEW_TOKENS]}
            _check_causal(measured, collate([few]), [1])
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
"""How far later tokens may move the logits of earlier ones: of what those vary by, and in nats of what they predict. By
rounding they do, where experts compute what is routed to them together."""

CUTS = (0.3, 0.55, 0.9)
"""Where a row is cut besides in its first tokens: near these parts of it, at primes, where blocks of any size go on."""

FEW_TOKENS = 128
"""So much of a row shows whether an architecture is causal, by the logits of its first token, which the others would
move most: some are causal only by a setting, such as BERT's `is_decoder`."""

BEFORE_CUT = 32
"""So many tokens before a cut are looked at: what sees into the future may see no further than its block."""


def _check_causal(trainer: MeasuredTrainer, batch: dict[str, Any], cuts: Sequence[int]) -> None:
    """Raise MethodError where the logits just before one of `cuts` of a row, the one of `batch`, depend on what comes
    after it."""
    ids, mask = (batch[name].to(trainer.args.device) for name in ("input_ids", "attention_mask"))
    cuts = [cut for cut in cuts if cut < int(mask.sum())]
    places = [torch.arange(max(0, cut - BEFORE_CUT), cut, device=ids.device) for cut in cuts]

    def logits_before(ids: torch.Tensor, places: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        with _logits_of(trainer, ids, mask) as logits_at:
            return [logits_at(columns)[0].float() for columns in places]

    for cut, columns, logits in zip(cuts, places, logits_before(ids, places), strict=True):
        if not logits.isfinite().all():
            return
        others = ids.clone()
        others[0, cut:] = (others[0, cut:] + 1) % logits.shape[-1]
        (moved,) = logits_before(others, [columns])
        of_all = (moved - logits).norm() / (logits - logits.mean()).norm().clamp_min(1e-12)
        nats = kl_div(moved.log_softmax(-1), logits.log_softmax(-1), reduction="batchmean", log_target=True)
        if not (of_all <= LEAK and nats <= LEAK):
            raise MethodError(
                f"method {trainer.method.name}: its network sees the tokens that it must predict: what follows token "
                f"{cut} of a row changes the logits up to it by {float(of_all):.0%}, and no held-out loss of it could "
                "be compared" + ("" if trainer.method.own_code else ": take a causal model")
            )


def _cuts(length: int) -> list[int]:
    """Where a row of `length` tokens is cut: after so many of them."""
    return sorted({1, 3, *(_prime_to(round(length * part)) for part in CUTS)})


def _prime_to(number: int) -> int:
    """The largest prime up to `number`, or 2."""
    return next((n for n in range(number, 2, -1) if all(n % d for d in range(2, math.isqrt(n) + 1))), 2)


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
