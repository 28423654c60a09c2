"""What is at the peak, in which phase, and does it fit? A trace's allocations, replayed under a budget."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightweight.forecast.allocator import CachingAllocator, OutOfBudgetError
from lightweight.forecast.work import NOTHING, Work
from lightweight.targets import CONTEXT_BYTES, Device
from lightweight.trial import CAUSES, Cause, Forecast, ForecastVerdict, Phase, Trial

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


Event = tuple[int, int]
"""A name allocated with its bytes, or released with 0."""


@dataclass(kw_only=True)
class Trace:
    """Every allocation and release of building a network and training it for a few optimizer steps.

    `events` are in order. `causes` says by name what each was for, `phases` where in `events` each phase began,
    `streams` in which stream it was allocated, where that is another than the first, 0. What `kept` streams have
    reserved stays reserved: a CUDA graph's own pool. `emptied` is where the cache was emptied, and `training_from`
    where peaks began to count. `paged_bytes` are of no event: optimizer state in managed memory, which the driver moves
    between card and host; nor are `host_bytes`, pinned there. `work` is what an optimizer step has the device do, and
    `flop_per_token` what training needs, as models/flop.py counts it.
    """

    parameters: int
    trainable_parameters: int
    events: list[Event] = field(default_factory=list)
    causes: dict[int, Cause] = field(default_factory=dict)
    phases: list[tuple[int, Phase]] = field(default_factory=list)
    streams: dict[int, int] = field(default_factory=dict)
    kept: frozenset[int] = frozenset()
    emptied: list[int] = field(default_factory=list)
    training_from: int = 0
    paged_bytes: int = 0
    host_bytes: int = 0
    work: Work = NOTHING
    flop_per_token: float | None = None

    def replay(self, budget_bytes: float | None = None) -> Peak:
        """The peak of training, on a card whose allocator may reserve `budget_bytes`."""
        replaying = _Replay(self, budget_bytes)
        for index, (name, size) in enumerate(self.events):
            if not replaying.take(index, name, size):
                break
        return replaying.peak()


class _Replay:
    """A trace's events going through the allocator, one after the other."""

    def __init__(self, trace: Trace, budget_bytes: float | None) -> None:
        self._trace = trace
        self._allocator = CachingAllocator(budget_bytes, kept=trace.kept)
        self._begins, self._emptied = dict(trace.phases), set(trace.emptied)
        self._sizes: dict[int, int] = {}
        self._held, self._at_peak = dict.fromkeys(CAUSES, 0), dict.fromkeys(CAUSES, 0)
        self._phase: Phase = "build"
        self._peak_phase: Phase = self._phase
        self._stopped_in: Phase | None = None
        self._peak_bytes = 0

    def take(self, index: int, name: int, size: int) -> bool:
        """Replay event `index`. Whether there was room for it."""
        self._phase = self._begins.get(index, self._phase)
        if index in self._emptied:
            self._allocator.empty_cache()
        if index == self._trace.training_from:
            self._allocator.reset_peaks()
            self._peak_bytes = 0
        if size == 0:
            self._release(name)
            return True
        try:
            self._allocate(name, size)
        except OutOfBudgetError:
            self._stopped_in = self._phase
            return False
        return True

    def _allocate(self, name: int, size: int) -> None:
        before = self._allocator.allocated_bytes
        self._allocator.allocate(name, size, self._trace.streams.get(name, 0))
        held = self._allocator.allocated_bytes
        self._sizes[name] = held - before
        self._held[self._trace.causes[name]] += held - before
        if held > self._peak_bytes:
            self._peak_bytes, self._peak_phase, self._at_peak = held, self._phase, dict(self._held)

    def _release(self, name: int) -> None:
        self._allocator.release(name)
        self._held[self._trace.causes[name]] -= self._sizes.pop(name)

    def peak(self) -> Peak:
        """What was found so far."""
        return Peak(
            allocated_bytes=self._allocator.peak_allocated_bytes,
            reserved_bytes=self._allocator.peak_reserved_bytes,
            phase=self._peak_phase,
            by_cause=self._at_peak,
            out_of_memory_in=self._stopped_in,
        )


def within(traced: Trace, budget_bytes: int | None) -> Forecast:
    """The forecast of a trace on a card whose allocator may reserve `budget_bytes`; `None` is no limit."""
    free = capped = traced.replay()
    verdict: ForecastVerdict = "fits"
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
        host_bytes=traced.host_bytes,
    )


def of_trial(traced: Trace, trial: Trial, device: Device) -> Forecast:
    """The forecast of a trial on `device`, under the budget of its target or else that of the device itself."""
    budget_bytes = trial.target.budget_bytes
    if budget_bytes is None and device.total_bytes is not None:
        budget_bytes = device.total_bytes - CONTEXT_BYTES
    return within(traced, budget_bytes)
