"""What a trial measures about itself while it runs: losses, device time, memory, and the seconds of each phase.

Nothing here waits for the device inside a round: losses stay on it and step boundaries are device events, read together
when the round has ended.
"""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise, zip_longest
from statistics import fmean
from typing import Any, Literal

import pynvml
import torch

from lightweight.trial import Measurements, Phase


class DivergedError(Exception):
    """A loss or a weight, `what`, that is not finite at optimizer step `step` (from 1), and `why` where that is
    known."""

    def __init__(self, step: int, what: str, why: str | None = None) -> None:
        super().__init__(f"{what} at step {step}" + (f": {why}" if why else ""))
        self.step = step


Tokens = tuple[int | torch.Tensor, int | torch.Tensor]
"""Real tokens, and all with padding; on the device where ranks have added theirs up there."""


class Meter:
    """The running measurements of one trial on one device. `phase` says where the trial is, also when it fails."""

    def __init__(self, device: torch.device, start_seconds: float) -> None:
        self.device = device
        self.phase: Phase = "start"
        self.heldout_losses: list[float] = []
        self.elsewhere_losses: list[float] = []
        self.task_matches: list[int] = []
        self.facts: dict[str, Any] = {}
        self._phase_seconds: dict[str, float] = {"start": start_seconds}
        self._waited_seconds = 0.0
        self._losses: list[float] = []
        self._step_seconds: list[float] = []
        self._cpu_seconds = self._cpu_began = 0.0
        self._step_loss: torch.Tensor | None = None
        self._tokens: list[Tokens] = []
        self._step_tokens: list[Tokens] = []
        self._pending_losses: list[torch.Tensor] = []
        self._labelled: dict[int, torch.Tensor] = {}  # by step, of those since the round began
        self._rates: list[float] | None = []  # None where they are not known
        self._marks: list[torch.cuda.Event | float] = []
        self._held: list[tuple[int, int]] = []
        self._peaks: tuple[int, int] | None = None
        self._process_bytes: int | None = None

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Count the time inside as `phase`, less what was spent waiting for requests."""
        self.phase = phase
        started, waited = time.monotonic(), self._waited_seconds
        try:
            yield
        finally:
            seconds = time.monotonic() - started - (self._waited_seconds - waited)
            self._phase_seconds[phase] = self._phase_seconds.get(phase, 0.0) + seconds

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Leave the time inside out of every phase."""
        started = time.monotonic()
        yield
        self._waited_seconds += time.monotonic() - started

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return len(self._losses) + len(self._pending_losses)

    @property
    def train_loss(self) -> list[float]:
        """The loss of every optimizer step so far; waits for the device."""
        pending = torch.stack(self._pending_losses).tolist() if self._pending_losses else []
        return self._losses + pending

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps for `resume`; waits for the device."""
        losses = self.train_loss
        seconds = self._step_seconds + [_seconds(start, end) for start, end in pairwise(self._marks)]
        return {
            "train_loss": losses,
            "step_seconds": seconds,
            "step_tokens": [[int(real), int(padded)] for real, padded in self._tokens],
            "heldout_losses": self.heldout_losses,
            "learning_rates": self._rates,
        }

    def resume(
        self,
        *,
        train_loss: list[float],
        step_seconds: list[float],
        heldout_losses: list[float],
        step_tokens: list[list[int]] | None = None,
        learning_rates: list[float] | None = None,
    ) -> None:
        """Go on from what another process had measured when it saved a checkpoint; tokens are 0, and learning rates
        not known, where it is of a version that did not count them."""
        self._losses, self._step_seconds, self.heldout_losses = train_loss, step_seconds, heldout_losses
        self._tokens = [(real, padded) for real, padded in step_tokens or [[0, 0]] * len(train_loss)]
        self._rates = learning_rates

    @property
    def latest_loss(self) -> float | None:
        """The newest loss that can be read without waiting for the device."""
        if self.device.type == "cpu" and self._pending_losses:
            return self._pending_losses[-1].item()
        return self._losses[-1] if self._losses else None

    def begin_training(self) -> None:
        """Forget the peaks of building and evaluating."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def begin_round(self) -> None:
        """Mark where the first step of a round begins."""
        self._cpu_began = time.process_time()
        self._marks = [self._mark()]

    def add_loss(self, loss: torch.Tensor) -> None:
        """Add one forward pass's share of the step's loss, a scalar on the device."""
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss

    def add_tokens(self, real: int | torch.Tensor, padded: int | torch.Tensor) -> None:
        """Add what one forward pass, or a whole step, trains on: `real` tokens of dialogues, and `padded` tokens that
        the device computes for them, on all ranks."""
        self._step_tokens.append((real, padded))

    def add_labels(self, labelled: torch.Tensor) -> None:
        """Add how many tokens of one forward pass have a label; to be told where a method's own code makes batches."""
        step = self.steps + 1
        self._labelled[step] = self._labelled.get(step, 0) + labelled

    def see_rates(self, rates: Sequence[float]) -> None:
        """Note the learning rates of the step that is about to be taken, one for each of the optimizer's groups."""
        if self._rates is not None:
            both = zip_longest(self._rates, map(float, rates), fillvalue=0.0)
            self._rates = [max(highest, rate) for highest, rate in both]

    def end_step(self) -> None:
        """Note that an optimizer step ended."""
        assert self._step_loss is not None
        self._pending_losses.append(self._step_loss)
        self._step_loss = None
        real, padded = (sum(counts) for counts in zip((0, 0), *self._step_tokens, strict=True))
        self._tokens.append((real, padded))
        self._step_tokens = []
        self._marks.append(self._mark())
        if self.device.type == "cuda":
            self._held.append(_memory("current"))

    def end_round(self) -> None:
        """Read what the round left on the device. Raises DivergedError."""
        self.read_device()
        self._cpu_seconds += time.process_time() - self._cpu_began
        self.check_losses()
        self._labelled.clear()

    def check_losses(self) -> None:
        """Raise DivergedError where a step's loss is not finite; waits for the device."""
        for step, loss in enumerate(self.train_loss, 1):
            if not math.isfinite(loss):
                has_none = step in self._labelled and not self._labelled[step].item()
                raise DivergedError(
                    step, f"training loss is {loss}", "none of its tokens has a label" if has_none else None
                )

    def read_device(self) -> None:
        """Wait for the device, and take its peaks and what it holds of losses and step boundaries."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self._peaks = _memory("peak")
        self._step_seconds += [_seconds(start, end) for start, end in pairwise(self._marks)]
        self._losses = self.train_loss
        self._tokens = [(int(real), int(padded)) for real, padded in self._tokens]
        self._marks, self._pending_losses = [], []

    def end_training(self) -> None:
        """Ask NVML once: what the allocator has reserved it keeps, so the end of training is the process's peak."""
        if self.device.type == "cuda":
            self._process_bytes = _process_bytes()

    def measurements(self) -> Measurements:
        """Everything measured so far."""
        before, after, *_ = [*self.heldout_losses, None, None]
        elsewhere_before, elsewhere_after, *_ = [*self.elsewhere_losses, None, None]
        matches_before, matches_after, *_ = [*self.task_matches, None, None]
        allocated, reserved = self._peaks or (None, None)
        averages: list[int | None] = [round(fmean(held)) for held in zip(*self._held, strict=True)] or [None, None]
        return Measurements(
            train_loss=tuple(self._losses),
            step_seconds=tuple(self._step_seconds),
            step_tokens=tuple(int(real) for real, _ in self._tokens[: len(self._losses)]),
            step_padded_tokens=tuple(int(padded) for _, padded in self._tokens[: len(self._losses)]),
            learning_rates=tuple(self._rates or ()),
            cpu_seconds=self._cpu_seconds,
            heldout_loss_before=before,
            heldout_loss_after=after,
            elsewhere_loss_before=elsewhere_before,
            elsewhere_loss_after=elsewhere_after,
            task_matches_before=matches_before,
            task_matches_after=matches_after,
            peak_allocated_bytes=allocated,
            peak_reserved_bytes=reserved,
            average_allocated_bytes=averages[0],
            average_reserved_bytes=averages[1],
            process_bytes=self._process_bytes,
            host_peak_bytes=_host_peak_bytes(),
            phase_seconds=dict(self._phase_seconds),
            **self.facts,
        )

    def _mark(self) -> torch.cuda.Event | float:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event)
    return float(start.elapsed_time(end)) / 1000


def _memory(when: Literal["current", "peak"]) -> tuple[int, int]:
    """Bytes that torch's allocator has handed out, and reserved. What `torch.cuda.memory_allocated` asks too, which
    sorts all there is to know into a list first, in every step."""
    statistics = torch.cuda.memory_stats_as_nested_dict()
    return statistics["allocated_bytes"]["all"][when], statistics["reserved_bytes"]["all"][when]


def _host_peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _process_bytes() -> int | None:
    """What NVML says this process holds on its GPU, context included; None where NVML does not say."""
    try:
        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
    return next((process.usedGpuMemory for process in processes if process.pid == os.getpid()), None)
