"""Which rows reached the network, and at which rates, where a method's own code may have changed them?

Every other method trains on the corpus's rows in the seed's order. What a Trainer, a collator or a callback of somebody
makes of that is counted where it arrives: by what identifies a row, computed on the device without waiting for it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lightweight.corpus import IGNORED, Rows

LONGEST = 2**16
"""Places of a row that have a factor of their own; a longer row begins with the first again."""


class Seen:
    """What reaches `network` while it is trained on `rows`. `step` is to be kept at the number of optimizer steps that
    have been taken. `is_compiled` says that a compiler would take what looks for a part of the network."""

    def __init__(self, network: torch.nn.Module, rows: Rows, *, is_compiled: bool) -> None:
        self._rows = rows
        self._factors = np.random.default_rng(0).integers(-(2**62), 2**62, LONGEST, dtype=np.int64)
        self._on_device: dict[torch.device, torch.Tensor] = {}
        self._began, self.step = 0, 0
        self._steps: list[list[int]] = []
        self._labels: list[int] = []  # what the labels of a step add up to
        self._pending: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # by step, not yet read from the device
        self._pass: list[torch.Tensor] = []
        self._counts: list[tuple[torch.Tensor | int, int]] = []
        self._looks = True
        self._rates: set[int] = set()  # steps at other learning rates than the schedule's
        see = torch.compiler.disable(self._see) if is_compiled else self._see
        network.register_forward_pre_hook(see, with_kwargs=True)

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

    def begin_pass(self, batch: Mapping[str, Any]) -> None:
        """What comes now is of one forward pass of the Trainer, over `batch` as a collator made it."""
        self._pass, self._counts = [], []
        labels, mask = batch.get("labels"), batch.get("attention_mask")
        if not isinstance(labels, torch.Tensor) or labels.dim() != 2:
            return
        mask = torch.ones_like(labels) if mask is None or mask.shape != labels.shape else mask
        answers = self._identities(labels, mask * (labels != IGNORED), self._places(mask)).sum()
        self._pending.append((self.step, labels.new_empty(0), answers))

    def see_rates(self, rates: Sequence[float], scheduled: Sequence[float]) -> None:
        """The learning rates of the step that is about to be taken, and those that the schedule has for it."""
        if list(rates) != list(scheduled):
            self._rates.add(self.step)

    @property
    def tokens(self) -> tuple[Any, int]:
        """Tokens of the newest pass: those of its rows, each counted once however often the network computes it, and
        all that it computed."""
        return sum(real for real, _ in self._counts), sum(padded for _, padded in self._counts)

    def read(self) -> None:
        """Take what was seen from the device; waits for it."""
        for step, rows, answers in self._pending:
            more = step - self._began + 1 - len(self._steps)
            self._steps += [[] for _ in range(more)]
            self._labels += [0] * more
            self._steps[step - self._began] += rows.tolist()
            self._labels[step - self._began] += int(answers)
        self._pending = []

    def note(self, steps: Sequence[Sequence[int]]) -> str | None:
        """How what was seen differs from what every other method trains on, in a line; None where it does not. `steps`
        are the numbers of the rows that these take in each optimizer step. Waits for the device."""
        self.read()
        told = []
        if self.step < len(steps):
            told.append(f"it ended after {self.step} of {len(steps)} optimizer steps")
        if self._rates:
            of_all = f"{len(self._rates):,} of its {self.step:,} steps"
            told.append(f"its learning rate was another than its schedule's in {of_all}")
        own = [self._identity(row["input_ids"]) for row in self._rows]
        answers = [self._identity(row["labels"], row["labels"] != IGNORED) for row in self._rows]
        planned = [Counter(own[number] for number in numbers) for numbers in steps[self._began : self.step]]
        seen = [Counter(step) for step in self._steps]
        planned += [Counter() for _ in range(len(seen) - len(planned))]
        seen += [Counter() for _ in range(len(planned) - len(seen))]
        known = set(own)
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
            expected = [sum(answers[number] for number in numbers) for numbers in steps[self._began : self.step]]
            pairs = zip(expected, self._labels, planned, seen, strict=False)
            if others := sum(a == b and (one - other_) % 2**64 != 0 for one, other_, a, b in pairs):
                told.append(f"the loss was on other labels than the corpus's in {others:,} of {len(expected):,} steps")
        return "; ".join(told) or None

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

    def _see(self, network: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if not self._looks or not (network.training or torch.is_grad_enabled()):
            return
        ids = options.get("input_ids", arguments[0] if arguments else None)
        mask = options.get("attention_mask")
        if ids is None:  # embeddings in their place, which are no rows of anybody's
            ids = torch.zeros(options["inputs_embeds"].shape[:2], dtype=torch.int64)
        mask = torch.ones_like(ids) if mask is None or mask.shape != ids.shape else mask.to(torch.int64)
        rows = self._identities(ids, mask, self._places(mask))
        again = torch.zeros_like(rows, dtype=torch.bool)
        for before in self._pass:
            again |= (rows[:, None] == before[None]).any(1)  # `isin` may wait for the device
        self._counts.append(((mask.sum(1) * ~again).sum(), ids.numel()))
        self._pass.append(rows)
        self._pending.append((self.step, rows, rows.new_zeros(())))


class SeesRates(TrainerCallback):
    """Has `seen` compare the rates of a step with the schedule's, after all other callbacks."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **told: Any
    ) -> None:
        rates = [group["lr"] for group in told["optimizer"].param_groups]
        self.seen.see_rates(rates, told["lr_scheduler"].get_last_lr())
