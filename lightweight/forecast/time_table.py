"""A plan's times as a person reads them: steps, tokens a second, share of the card's peak, jobs and what they cost."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from lightweight.forecast.plan_row import PlanRow
from lightweight.forecast.step_time import StepTime, span


def table(rows: Sequence[PlanRow], passes: str) -> str | None:
    """The times of one model's rows; None where none are known. `passes` heads the column of passes x rows."""
    timed = [(row, row.step) for row in rows if row.step is not None and row.verdict != "does_not_fit"]
    if not timed:
        return None
    has_jobs = any(row.job for row, _ in timed)
    costs = any(row.job and row.job.cost is not None for row, _ in timed)
    headers = ["target", "method", passes, "step", "tokens a second", "of the peak"]
    limited = any(row.job and row.job.too_much for row, _ in timed)
    headers += ["steps", "job"] * has_jobs + ["cost"] * costs + ["limits"] * limited + ["how known"]
    lines = [
        [*_step(row, step), *_job(row, has_jobs, costs), *[_limits(row)] * limited, _known(step)] for row, step in timed
    ]
    aligned = ["left", "left", *["right"] * (len(headers) - 3 - limited), *["left"] * limited, "left"]
    drawn = tabulate(lines, headers, tablefmt="simple", disable_numparse=True, colalign=aligned)
    return "\n\n".join([drawn, *_notes(timed, has_jobs)])


def _step(row: PlanRow, step: StepTime) -> list[str]:
    return [
        row.target.name,
        row.method.name,
        f"{row.passes} x {row.batch_size}",
        _between(step.low, step.high),
        f"{step.tokens_per_second:,.0f}" if step.low == step.high else _from_to(step),
        "-" if step.share_of_peak is None else f"{step.share_of_peak:.1%}",
    ]


def _from_to(step: StepTime) -> str:
    return f"{step.tokens / step.high:,.0f} to {step.tokens / step.low:,.0f}"


def _between(low: float, high: float) -> str:
    return span(low) if low == high else f"{span(low)} to {span(high)}"


def _job(row: PlanRow, has_jobs: bool, costs: bool) -> list[str]:
    job = row.job
    if job is None:
        return ["-"] * (2 * has_jobs + costs)
    seconds = span(job.seconds) if job.seconds == job.high else f"{span(job.seconds)}, at most {span(job.high)}"
    cost = ["-" if job.cost is None else f"{job.cost:,.2f}"] * costs
    return [f"{job.steps:,}", seconds, *cost]


def _limits(row: PlanRow) -> str:
    return "-" if row.job is None else row.job.too_much or "kept"


def _known(step: StepTime) -> str:
    return f"calibrated on {step.measured}" if step.is_calibrated else "not calibrated"


def _notes(timed: Sequence[tuple[PlanRow, StepTime]], has_jobs: bool) -> list[str]:
    notes = [
        "The share of the peak is model FLOP utilization (MFU): the FLOP that training needs over the card's dense "
        "rate."
    ]
    if any(step.low != step.high for _, step in timed):
        notes.append("A stock step also waits for Python, whose speed depends on the host: its time is a range.")
    others = {row.target.name: step.measured for row, step in timed if not step.is_calibrated}
    notes += [f"{target}: from its data sheet and what was measured on {card}." for target, card in others.items()]
    if has_jobs:
        notes.append("A job's time is that of its steps, without loading the model, preparing and saving.")
    return notes
