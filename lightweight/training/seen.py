"""Which rows reached the network, and with which labels, where a method's own code may have changed them?

Every other method trains on the corpus's rows in the seed's order. What a Trainer, a collator or a callback of somebody
makes of that is counted where it arrives: by what identifies a row, computed on the device without waiting for it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from lightweight.corpus import IGNORED, Rows

LONGEST = 2**16
"""Places of a row that have a factor of their own; a longer row begins with the first again."""


class _SeenBatch(NamedTuple):
    """One call of the network, not yet read from the device: at which step, the rows, the labels that it got with each
    or None, and the tokens, real ones and all."""

    step: int
    rows: torch.Tensor
    labels: torch.Tensor | None
    real: torch.Tensor | int
    padded: int


class Seen:
    """What reaches `network` while it is trained on `rows`. `step` is to be kept at the number of optimizer steps that
    have been taken. `is_compiled` says that a compiler would take what looks for a part of the network.

    Training is what computes gradients, through the network or its decoder alone. A pass of the Trainer in which
    nothing does, as where gradients are estimated from losses, is training all the same.
    """

    def __init__(self, network: torch.nn.Module, rows: Rows, *, is_compiled: bool) -> None:
        self._factors = np.random.default_rng(0).integers(-(2**62), 2**62, LONGEST, dtype=np.int64)
        self._on_device: dict[torch.device, torch.Tensor] = {}
        self._began, self.step = 0, 0
        self._steps: list[list[int]] = []
        self._labels: list[int] = []  # what the labels of a step's batches add up to
        self._relabelled: set[int] = set()  # steps in which the network itself got other labels
        self._batches: list[tuple[int, torch.Tensor]] = []  # the labels of each, not yet read from the device
        self._reached: list[_SeenBatch] = []
        self._of_pass: list[_SeenBatch] = []
        self._without_gradients: list[_SeenBatch] | None = None  # of the Trainer's pass, inside one
        self._looks, self._depth = True, 0
        self._own = [self._identity(row["input_ids"]) for row in rows]
        self._answers = [self._identity(row["labels"], row["labels"] != IGNORED) for row in rows]
        if is_compiled:
            network.register_forward_pre_hook(torch.compiler.disable(self._see), with_kwargs=True)
            return
        for part in _entrances(network):
            part.register_forward_pre_hook(self._enter, with_kwargs=True)
            part.register_forward_hook(self._leave, always_call=True)

    def go_on_from(self, step: int) -> None:
        """Expect the steps after `step`: what came before was seen by another process."""
        self._began = self.step = step

    @contextlib.contextmanager
    def looking_away(self) -> Iterator[None]:
        """Inside, nothing counts: the suite evaluates."""
        before, self._looks = self._looks, False
        try:
            yield
        finally:
            self._looks = before

    @contextlib.contextmanager
    def in_pass(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Inside is a pass of the Trainer, over `batch` as a collator made it."""
        self._of_pass, self._without_gradients = [], []
        labels, mask = batch.get("labels"), batch.get("attention_mask")
        if isinstance(labels, torch.Tensor) and labels.dim() == 2:
            mask = torch.ones_like(labels) if mask is None or mask.shape != labels.shape else mask
            answers = self._identities(labels, mask * (labels != IGNORED), self._places(mask)).sum()
            self._batches.append((self.step, answers))
        yield
        if not self._of_pass:
            for reached in self._without_gradients:
                self._take(reached)
        self._without_gradients = None

    @property
    def tokens(self) -> tuple[Any, int]:
        """Tokens of the newest pass: those of its rows, each counted once however often the network computes it, and
        all that it computed."""
        return sum(reached.real for reached in self._of_pass), sum(reached.padded for reached in self._of_pass)

    def read(self) -> None:
        """Take what was seen from the device; waits for it."""
        pending = [reached.step for reached in self._reached] + [step for step, _ in self._batches]
        newest = max(pending, default=self._began - 1)
        more = newest - self._began + 1 - len(self._steps)
        self._steps += [[] for _ in range(more)]
        self._labels += [0] * more
        for step, of_batch in self._batches:
            self._labels[step - self._began] += int(of_batch)
        answers = dict(zip(self._own, self._answers, strict=True))
        for reached in self._reached:
            rows = reached.rows.tolist()
            self._steps[reached.step - self._began] += rows
            labels = [] if reached.labels is None else reached.labels.tolist()
            if any(answers.get(row, own) != own for row, own in zip(rows, labels, strict=False)):
                self._relabelled.add(reached.step - self._began)
        self._reached, self._batches = [], []

    def told(self, steps: Sequence[Sequence[int]]) -> list[str]:
        """How what was seen differs from what every other method trains on. `steps` are the numbers of the rows that
        these take in each optimizer step. Waits for the device."""
        self.read()
        told = []
        if self.step < len(steps):
            told.append(f"it ended after {self.step} of {len(steps)} optimizer steps")
        planned = [Counter(self._own[number] for number in numbers) for numbers in steps[self._began : self.step]]
        seen = [Counter(step) for step in self._steps]
        planned += [Counter() for _ in range(len(seen) - len(planned))]
        seen += [Counter() for _ in range(len(planned) - len(seen))]
        known = set(self._own)
        strange = sum(count for step in seen for row, count in step.items() if row not in known)
        wanted, found = (sum(counts, Counter()) for counts in (planned, seen))
        of_corpus = Counter({row: count for row, count in found.items() if row in known})
        if strange:
            told.append(f"{strange:,} rows reached the network that are none of the corpus's as they stand there")
        if lacking := (wanted - of_corpus).total():
            told.append(f"{lacking:,} of {wanted.total():,} rows did not reach it")
        if more := (of_corpus - wanted).total():
            told.append(f"{more:,} rows reached it more often than once a pass over the corpus")
        if not (strange or lacking or more):
            other = next((step for step, (a, b) in enumerate(zip(planned, seen, strict=True), 1) if a != b), None)
            if other is not None:
                told.append(f"the rows came in another order from step {self._began + other} on")
            expected = [sum(self._answers[number] for number in numbers) for numbers in steps[self._began : self.step]]
            pairs = enumerate(zip(expected, self._labels, planned, seen, strict=False))
            others = {step for step, (one, its, a, b) in pairs if a == b and (one - its) % 2**64 != 0}
            if others := others | self._relabelled:
                of_all = f"{len(others):,} of {len(expected):,} steps"
                told.append(f"the loss was on other labels than the corpus's in {of_all}")
        return told

    def _identity(self, ids: np.ndarray, counted: np.ndarray | None = None) -> int:
        """What tells a row of `ids`, [time], of which those that are `counted`, from others."""
        with np.errstate(over="ignore"):
            places = self._factors[np.arange(len(ids)) % LONGEST]
            return int(((ids.astype(np.int64) + 1) * places * (1 if counted is None else counted)).sum())

    def _identities(self, ids: torch.Tensor, counted: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """The same of each row of `ids`, [rows, time], on its device."""
        if ids.device not in self._on_device:
            self._on_device[ids.device] = torch.from_numpy(self._factors).to(ids.device)
        return ((ids + 1) * self._on_device[ids.device][places] * counted).sum(1)

    @staticmethod
    def _places(mask: torch.Tensor) -> torch.Tensor:
        """Which token of its row each is, whatever side is padded."""
        return (mask.to(torch.int64).cumsum(1) - 1).clamp_(min=0) % LONGEST

    def _enter(self, network: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth == 1:
            self._see(network, arguments, options)

    def _leave(self, *_: Any) -> None:
        self._depth -= 1

    def _see(self, network: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        trains = torch.is_grad_enabled()
        if not self._looks or not (trains or (network.training and self._without_gradients is not None)):
            return
        ids = options.get("input_ids", arguments[0] if arguments else None)
        mask, labels = options.get("attention_mask"), options.get("labels")
        if ids is None:  # embeddings in their place, which are no rows of anybody's
            embeddings = options.get("inputs_embeds")
            ids = torch.zeros((1, 1) if embeddings is None else embeddings.shape[:2], dtype=torch.int64)
        mask = torch.ones_like(ids) if mask is None or mask.shape != ids.shape else mask.to(torch.int64)
        places = self._places(mask)
        rows = self._identities(ids, mask, places)
        answers = None
        if isinstance(labels, torch.Tensor) and labels.shape == ids.shape:
            answers = self._identities(labels, mask * (labels != IGNORED), places)
        reached = _SeenBatch(self.step, rows, answers, mask.sum(1), ids.numel())
        if trains:
            self._take(reached)
        elif self._without_gradients is not None:
            self._without_gradients.append(reached)

    def _take(self, reached: _SeenBatch) -> None:
        again = torch.zeros_like(reached.rows, dtype=torch.bool)
        for before in self._of_pass:
            again |= (reached.rows[:, None] == before.rows[None]).any(1)  # `isin` may wait for the device
        reached = reached._replace(real=(reached.real * ~again).sum())
        self._of_pass.append(reached)
        self._reached.append(reached)


def _entrances(network: Any) -> list[torch.nn.Module]:
    """Where rows enter: `network`, what an adapter is around, and its decoder, which may be called by themselves."""
    inside = network.get_base_model() if hasattr(network, "get_base_model") else network
    decoder = inside.get_decoder() if hasattr(inside, "get_decoder") else inside
    parts = [part for part in (network, inside, decoder) if isinstance(part, torch.nn.Module)]
    return list(dict.fromkeys(parts))
