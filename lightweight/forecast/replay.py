"""What is at the peak, in which phase, and does it fit? A trace's allocations, replayed under a budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from lightweight.forecast.allocator import CachingAllocator, OutOfBudgetError
from lightweight.targets import CONTEXT_BYTES, Device
from lightweight.trial import Phase, Trial

Cause = Literal[
    "weights", "quantization state", "gradients", "optimizer", "activations", "logits", "gathered", "workspace"
]
"""What memory is held for. `gathered` is what ranks gather from each other and reduce among them, a layer at a time:
its whole weights, and the buffers of both ways."""

CAUSES: tuple[Cause, ...] = get_args(Cause)

Verdict = Literal["fits", "does_not_fit", "too_close_to_call"]

MARGIN = 0.03
"""How far from a budget a forecast must be to decide: the committed matrix (experiments/records/h200-forecast.json)
is forecast within 1.2 % allocated and 1.8 % reserved, and what decides lies between the two."""


@dataclass(frozen=True, kw_only=True)
class Peak:
    """What a replay found. `by_cause` adds up to `allocated_bytes`; `phase` is where that peak was.

    `out_of_memory_in` is the phase in which the budget did not suffice; the rest then describes the time until that.
    """

    allocated_bytes: int
    reserved_bytes: int
    phase: Phase
    by_cause: dict[Cause, int]
    out_of_memory_in: Phase | None = None


@dataclass(kw_only=True)
class Trace:
    """Every allocation and release of building a network and training it for a few optimizer steps.

    `events` are (name, bytes) in order: a name allocated with its bytes, or released with 0. `causes` says by name what
    each was for, `phases` where in `events` each phase began, `streams` in which stream it was allocated, where that is
    another than the first, 0. `paged_bytes` are of no event: optimizer state in managed memory, which the driver moves
    between card and host.
    """

    parameters: int
    trainable_parameters: int
    events: list[tuple[int, int]] = field(default_factory=list)
    causes: dict[int, Cause] = field(default_factory=dict)
    phases: list[tuple[int, Phase]] = field(default_factory=list)
    streams: dict[int, int] = field(default_factory=dict)
    paged_bytes: int = 0

    def replay(self, budget_bytes: float | None = None) -> Peak:
        """The peak of training, on a card whose allocator may reserve `budget_bytes`."""
        allocator = CachingAllocator(budget_bytes)
        sizes: dict[int, int] = {}
        held, at_peak = dict.fromkeys(CAUSES, 0), dict.fromkeys(CAUSES, 0)
        begins = dict(self.phases)
        phase: Phase = "build"
        peak_phase, stopped_in, peak_bytes = phase, None, 0
        for index, (name, size) in enumerate(self.events):
            if index in begins:
                if phase == "build":
                    allocator.empty_cache()
                    allocator.reset_peaks()
                    peak_bytes = 0
                phase = begins[index]
            if size == 0:
                allocator.release(name)
                held[self.causes[name]] -= sizes.pop(name)
                continue
            before = allocator.allocated_bytes
            try:
                allocator.allocate(name, size, self.streams.get(name, 0))
            except OutOfBudgetError:
                stopped_in = phase
                break
            sizes[name] = allocator.allocated_bytes - before
            held[self.causes[name]] += sizes[name]
            if allocator.allocated_bytes > peak_bytes:
                peak_bytes, peak_phase, at_peak = allocator.allocated_bytes, phase, dict(held)
        return Peak(
            allocated_bytes=allocator.peak_allocated_bytes,
            reserved_bytes=allocator.peak_reserved_bytes,
            phase=peak_phase,
            by_cause=at_peak,
            out_of_memory_in=stopped_in,
        )


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What training takes, and whether a budget allows it.

    `allocated_bytes` is the peak of `torch.cuda.max_memory_allocated`, and `by_cause` what it consists of.
    `reserved_bytes` is that of `max_memory_reserved`: under the budget where it fits, without one where it does not.
    `phase` is where it runs out of memory, or else where the peak is. `paged_bytes` is what a paged optimizer keeps
    beside that in managed memory, on the card as far as there is room and else on the host; no verdict counts it.
    """

    allocated_bytes: int
    reserved_bytes: int
    phase: Phase
    by_cause: dict[Cause, int]
    verdict: Verdict
    budget_bytes: int | None
    parameters: int
    trainable_parameters: int
    paged_bytes: int = 0


def within(traced: Trace, budget_bytes: int | None) -> Forecast:
    """The forecast of a trace on a card whose allocator may reserve `budget_bytes`; `None` is no limit."""
    free = capped = traced.replay()
    verdict: Verdict = "fits"
    if budget_bytes is not None:
        capped = traced.replay(budget_bytes)
        if traced.replay(budget_bytes * (1 - MARGIN)).out_of_memory_in is not None:
            decided = traced.replay(budget_bytes * (1 + MARGIN)).out_of_memory_in is not None
            verdict = "does_not_fit" if decided else "too_close_to_call"
    return Forecast(
        allocated_bytes=free.allocated_bytes,
        reserved_bytes=(free if capped.out_of_memory_in else capped).reserved_bytes,
        phase=capped.out_of_memory_in or free.phase,
        by_cause=free.by_cause,
        verdict=verdict,
        budget_bytes=budget_bytes,
        parameters=traced.parameters,
        trainable_parameters=traced.trainable_parameters,
        paged_bytes=traced.paged_bytes,
    )


def of_trial(traced: Trace, trial: Trial, device: Device) -> Forecast:
    """The forecast of a trial on `device`, under the budget of its target or else that of the device itself."""
    budget_bytes = trial.target.budget_bytes
    if budget_bytes is None and device.total_bytes is not None:
        budget_bytes = device.total_bytes - CONTEXT_BYTES
    return within(traced, budget_bytes)
