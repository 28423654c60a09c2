"""How long will a step take, a job, and what will it cost? From what the device does in a step and what a card can do.

A captured step waits for the card alone: it takes as long as its kernels, one after the other. A stock step also waits
for Python, which asks for every operator; how fast depends on the host, so its time is an interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightweight import targets
from lightweight.forecast import calibration
from lightweight.forecast.calibration import Calibration
from lightweight.forecast.replay import Trace
from lightweight.forecast.work import COPIES, DEQUANTIZATIONS, Work
from lightweight.methods import BASELINE, LORA, QLORA
from lightweight.targets import Rates
from lightweight.trial import Trial

HOSTS = 0.5, 1.5
"""How much faster and slower another host may be than the one whose pace was measured, and another step. opt-350m by
lora took 92 and 52 ms a step on two machines with the same card (experiments/records/h100-t4.json, h100-captured.json).
"""

DEVICE_ERROR = 0.1
"""How far the card's own time may be from its forecast."""

UNHIDDEN = 0.25
"""Of the card's time and Python's, the shorter one's share that may not be hidden behind the longer: the card goes on
while Python asks for more, but a forward pass may wait for the one, and the backward pass for the other."""

FORWARD = 0.4
"""The share of a step that is its forward pass, where some is computed again in the backward pass."""

PCIE_REACHED = 0.85
"""Of the data sheet's bytes a second."""

HOUR = 3600


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """An optimizer step of `tokens` tokens, whose training needs `flop` (models/flop.py).

    It takes `seconds`, or of one that waits for Python between `low` and `high`. `measured` is the card that the
    forecast was calibrated with; where that `is_calibrated` not, it is another than the one forecast, whose data sheet
    was used. `peak` is the dense rate of the card in the number format of the step's products.
    """

    low: float
    high: float
    tokens: int
    flop: float | None
    peak: float
    measured: str
    is_calibrated: bool

    @property
    def seconds(self) -> float:
        """The step, or the middle of what it may take."""
        return math.sqrt(self.low * self.high)

    @property
    def tokens_per_second(self) -> float:
        """Of all tokens that a step is given."""
        return self.tokens / self.seconds

    @property
    def share_of_peak(self) -> float | None:
        """The arithmetic that training needs, over what the card could do meanwhile; None where it is not known."""
        return None if self.flop is None else self.flop / self.seconds / self.peak


@dataclass(frozen=True, kw_only=True)
class JobLimits:
    """What a job is to be held to: `epochs` passes over `tokens` tokens, or over a corpus whose rows are known; `price`
    an hour in any currency; `max_hours` and `max_price` of the whole job."""

    tokens: int | None = None
    epochs: int = 10
    price: float | None = None
    max_hours: float | None = None
    max_price: float | None = None

    def steps(self, sequences_per_step: int, max_length: int, rows: int | None = None) -> int | None:
        """Optimizer steps of the job, over `rows` where they are known; None where nobody says how much there is."""
        if rows is None and self.tokens is not None:
            rows = -(-self.tokens // max_length)
        return None if rows is None else self.epochs * -(-rows // sequences_per_step)


@dataclass(frozen=True, kw_only=True)
class JobTime:
    """The training of a job, without loading, preparing and saving: its `steps`, `seconds`, and `cost`."""

    steps: int
    seconds: float
    high: float
    cost: float | None
    too_much: str | None = None

    @classmethod
    def of(cls, step: StepTime, steps: int, job: JobLimits) -> JobTime:
        """The time of `steps` such steps, and whether that is within what the job allows: at its longest."""
        seconds, high = steps * step.seconds, steps * step.high
        cost = None if job.price is None else seconds / HOUR * job.price
        too_much = None
        if job.max_hours is not None and high > job.max_hours * HOUR:
            too_much = f"takes {span(high)}, more than {job.max_hours:g} h"
        elif job.max_price is not None and job.price is not None and high / HOUR * job.price > job.max_price:
            too_much = f"costs {high / HOUR * job.price:,.2f}, more than {job.max_price:g}"
        return cls(steps=steps, seconds=seconds, high=high, cost=cost, too_much=too_much)


def forecast(trace: Trace, trial: Trial, card: str, known: Sequence[Calibration]) -> StepTime | None:
    """The step of a trial that was traced, on a card that CUDA calls so; None where no calibration and no data sheet
    says anything of it, or several GPUs share the trial: what they send each other is not forecast. Nor are products of
    8-bit integers, which no calibration has."""
    found, rates = calibration.of_card(card, known), targets.rates(card)
    if found is None or rates is None or trial.world_size > 1 or not trace.work.kernels:
        return None
    if any(kernel.dtype == "int8" for kernel in trace.work.kernels):
        return None
    measured, is_calibrated = found
    device = measured.seconds(trace.work.kernels, None if is_calibrated else rates)
    device += _unhidden_copies(trace.work, device, rates)
    low = high = device
    step = trial.method.captured_step
    if step is None or not step.graph:
        host = _pace(trial, trace.work, measured) * trace.work.operators
        low = max(device * (1 - DEVICE_ERROR), host * HOSTS[0])
        shorter, longer = sorted([device * (1 + DEVICE_ERROR), host * HOSTS[1]])
        high = longer + UNHIDDEN * shorter
    return StepTime(
        low=low,
        high=high,
        tokens=trial.tokens_per_step,
        flop=None if trace.flop_per_token is None else trace.flop_per_token * trial.tokens_per_step,
        peak=rates.of(trace.work.format),
        measured=measured.device,
        is_calibrated=is_calibrated,
    )


def _unhidden_copies(work: Work, seconds: float, rates: Rates) -> float:
    """What copies to the host and back take beyond the forward and the backward pass of a step of so many seconds,
    beside which they are made."""
    to_host, back = (work.copied(kind) / (PCIE_REACHED * rates.host_bytes_per_second) for kind in COPIES)
    return max(0.0, to_host - FORWARD * seconds) + max(0.0, back - (1 - FORWARD) * seconds)


def _pace(trial: Trial, work: Work, measured: Calibration) -> float:
    """The pace of a step like the trial's, else the slowest: peft does other things in Python for an operator than
    torch, and bitsandbytes more. Whether that has a part in it, its work says: a checkpoint may be stored in 4 bits,
    and a method's quantization may be undone as weights are loaded."""
    is_quantized = any(kernel.kind in DEQUANTIZATIONS for kernel in work.kernels)
    alike = QLORA if is_quantized else BASELINE if trial.method.adapter is None else LORA
    return measured.operator_seconds.get(alike.name) or max(measured.operator_seconds.values())


def span(seconds: float) -> str:
    """A length of time as a person says it."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 2 * 60:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 2 * HOUR else f"{seconds / HOUR:.3g} h"


def as_json(step: StepTime | None, job: JobTime | None) -> Mapping[str, Any]:
    """What `lightweight plan --format json` says of time: each None where nothing is forecast."""
    return {
        "step_seconds": step and step.seconds,
        "step_seconds_low": step and step.low,
        "step_seconds_high": step and step.high,
        "tokens_per_second": step and step.tokens_per_second,
        "share_of_peak": step and step.share_of_peak,
        "calibrated_on": step and step.measured,
        "is_calibrated": step and step.is_calibrated,
        "job_steps": job and job.steps,
        "job_seconds": job and job.seconds,
        "job_seconds_high": job and job.high,
        "job_cost": job and job.cost,
        "job_is_too_much": job and job.too_much,
    }
