"""Does an upgrade take more memory? The forecasts of a plan beside those of an older one, and a verdict on each.

A forecast needs no GPU and is the same each time, so that one byte over a limit is one too many. What it consists of at
the peak says what grew. Where a plan takes smaller passes than before, its peak is of another step: that is told
instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from lightweight.record import ForecastRow, NoForecast, Run, differing_settings, one_line
from lightweight.targets import MiB, size
from lightweight.verdict import unlike
from lightweight.verdict.gate import load_holding
from lightweight.verdict.limits import Limits

SAME_FORECAST = (
    *("gpus", "max_length", "corpus_digest", "loss_on", "long", "padding", "method_digest", "budget_bytes"),
)
"""What forecasts of one model, method and target share, where both say it, if they can be compared."""

NETWORK = ("parameters", "trainable_parameters", "longest_row")
"""What may also have changed, and then explains more than bytes do."""

VERDICTS = ("fits", "too_close_to_call", "does_not_fit")
"""From the best to the worst."""

LEAST_SHARE = 0.05
"""Of the whole growth, from which on a cause is named."""


@dataclass(frozen=True, kw_only=True)
class ForecastCell:
    """A forecast of the new plan, what it is compared with, and what was found. `failures` has one line a reason."""

    now: ForecastRow
    then: ForecastRow | None = None
    run: Run | None = None
    failures: tuple[str, ...] = ()

    @property
    def is_of_same_step(self) -> bool:
        """Whether both divide a step into the same passes, so that their peaks compare."""
        now, then = self.now, self.then
        if then is None or now.batch_size != then.batch_size:
            return False
        return now.passes == then.passes or None in (now.passes, then.passes)


@dataclass(frozen=True, kw_only=True)
class ForecastComparison:
    """Every forecast of a new plan, what is wrong with the plan as a whole, and what to know beside them."""

    cells: Sequence[ForecastCell]
    of_run: Sequence[str] = field(default=())
    notes: Sequence[str] = field(default=())

    @property
    def failures(self) -> list[str]:
        """Why the gate fails, one line a reason; empty where it passes."""
        return [*(failure for cell in self.cells for failure in cell.failures), *self.of_run]


def holds_forecasts_alone(run: Run) -> bool:
    """Whether `run` is a plan: forecasts, and no trial."""
    return not run.entries and bool(run.forecasts or run.unforecast)


def load(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The plans stored at `paths`, and a line for each file that is none."""
    return load_holding("forecast", paths, lambda run: bool(run.forecasts))


def compare(new: Run, runs: Sequence[Run], limits: Limits) -> ForecastComparison:
    """Hold every forecast of `new` against the first of `runs` that has its like. Raises ValueError for a plan that has
    two forecasts of one cell."""
    for run in (new, *runs):
        _refuse_twice(run)
    cells = [_cell(row, runs, limits) for row in new.forecasts]
    compared = [cell for cell in cells if cell.then is not None]
    missing = [
        _missing_line(run, then, new)
        for run in runs
        for then in run.forecasts
        if not any(_is_like(now, then) for now in new.forecasts)
    ]
    fails = limits.memory_fail is not None and limits.missing == "fail"
    of_run, notes = (missing, []) if fails else ([], missing)
    if compared:
        notes += [f"appeared: {_name(cell.now)}" for cell in cells if cell.then is None]
    else:
        nothing = "NOTHING WAS COMPARED: no stored plan has a forecast of this one under the same conditions"
        (of_run if limits.require_match else notes).append(nothing)
    notes += [
        f"{_name(cell.now)}: {_step(cell.now)} rows a step fit now, {_step(cell.then)} did in {cell.run.name}: peaks "
        "of other passes are not compared"
        for cell in compared
        if cell.then and cell.run and not cell.is_of_same_step
    ]
    undigested = {cell.run.name for cell in compared if cell.run and cell.then and cell.then.method_digest is None}
    notes += [
        f"{name} does not say its methods' settings: whether methods of one name are the same is not known"
        for name in sorted(undigested)
    ]
    return ForecastComparison(cells=cells, of_run=of_run, notes=notes)


def grown(now: ForecastRow, then: ForecastRow) -> list[tuple[str, int, int]]:
    """The causes that take more at the peak than they did, as bytes then and now, what grew most first; what takes a
    small share of the whole growth is left out."""
    if not (now.bytes_by_cause and then.bytes_by_cause):
        return []
    pairs = [(cause, then.bytes_by_cause.get(cause, 0), bytes_now) for cause, bytes_now in now.bytes_by_cause.items()]
    more = sorted((pair for pair in pairs if pair[2] > pair[1]), key=lambda pair: pair[1] - pair[2])
    whole = sum(is_now - was for _, was, is_now in more)
    return [pair for pair in more if pair[2] - pair[1] >= LEAST_SHARE * whole]


# One forecast


def _cell(now: ForecastRow, runs: Sequence[Run], limits: Limits) -> ForecastCell:
    for run in runs:
        then = next((then for then in run.forecasts if _is_like(now, then)), None)
        if then is not None:
            cell = ForecastCell(now=now, then=then, run=run)
            failures = [] if limits.memory_fail is None else _failures(cell, now, then, run, limits.memory_fail)
            changed = _changed(now, then)
            return ForecastCell(
                now=now, then=then, run=run, failures=tuple(f"{failure}. {changed}" for failure in failures)
            )
    return ForecastCell(now=now)


def _failures(cell: ForecastCell, now: ForecastRow, then: ForecastRow, run: Run, limit: float) -> list[str]:
    failures = []
    because = _because(now, then, is_of_same_step=cell.is_of_same_step)
    if VERDICTS.index(now.verdict) > VERDICTS.index(then.verdict):
        was, is_now = (row.verdict.replace("_", " ") for row in (then, now))
        failures.append(
            f"{_name(now)}: {was} in {run.name}, {is_now} now: {_size(now.forecast_reserved_bytes)} reserved of "
            f"{_size(now.budget_bytes)}{because}"
        )
    if not cell.is_of_same_step:
        if (now.passes or 1) > (then.passes or 1):
            failures.append(
                f"{_name(now)}: {_step(then)} rows a step fitted in {run.name}, and {_step(now)} do now{because}"
            )
        return failures
    for what, key in PEAKS.items():
        held_now, held_then = getattr(now, key), getattr(then, key)
        if held_now is None or held_then is None or held_now <= held_then * (1 + Fraction(limit)):
            continue
        rise = f"{held_now / held_then - 1:+.2%}" if held_then else "where there was none"
        failures.append(
            f"{_name(now)}: {what} {_size(held_now)} now, {_size(held_then)} in {run.name}: {rise}, more than "
            f"{limit:+.2%}{because}"
        )
        break  # what is allocated is reserved as well
    return failures


PEAKS = {
    "peak allocated": "forecast_allocated_bytes",
    "peak reserved": "forecast_reserved_bytes",
    "paged optimizer state": "paged_bytes",
}
"""What is compared, in this order."""


def _because(now: ForecastRow, then: ForecastRow, *, is_of_same_step: bool) -> str:
    """What of the peak grew, and what else is not as it was; begins where a sentence goes on."""
    said = []
    if causes := [f"{cause} by {_size(is_now - was)} to {_size(is_now)}" for cause, was, is_now in grown(now, then)]:
        said += [f"what grew is {', '.join(causes)}"] if is_of_same_step else []
    elif now.bytes_by_cause and then.bytes_by_cause and is_of_same_step:
        said.append("nothing grew that is held at the peak of allocated memory: the allocator reserves more for it")
    if now.phase != then.phase:
        said.append(f"the peak is in {now.phase}, and was in {then.phase}")
    for key in NETWORK:
        was, is_now = getattr(then, key), getattr(now, key)
        if None not in (was, is_now) and was != is_now:
            said.append(f"{key.replace('_', ' ')} {was:,} to {is_now:,}")
    return f": {'; '.join(said)}" if said else ""


# What is alike


def _is_namesake(now: ForecastRow | NoForecast, then: ForecastRow) -> bool:
    return (now.model, now.method, now.target) == (then.model, then.method, then.target)


def _differing(now: ForecastRow, then: ForecastRow) -> list[str]:
    pairs = [(key, getattr(now, key), getattr(then, key)) for key in SAME_FORECAST]
    return [key for key, a, b in pairs if a != b and (None not in (a, b) or key == "corpus_digest")]


def _is_like(now: ForecastRow, then: ForecastRow) -> bool:
    return _is_namesake(now, then) and not _differing(now, then)


# The plan as a whole


def _refuse_twice(run: Run) -> None:
    """Raise ValueError for two forecasts of one cell: their order would say which of them is compared."""
    for index, row in enumerate(run.forecasts):
        if any(_is_like(row, other) for other in run.forecasts[:index]):
            raise ValueError(f"record {run.path}: has {_name(row)} twice, under the same conditions: keep one of them")


def _missing_line(run: Run, then: ForecastRow, new: Run) -> str:
    line = f"{_name(then)}: missing now, {_size(then.forecast_allocated_bytes)} in {run.name}"
    for row in new.unforecast:
        if _is_namesake(row, then):
            return f"{_name(then)}: {_size(then.forecast_allocated_bytes)} in {run.name}, cannot be forecast now: " + (
                row.reason or "no reason is given"
            )
    namesakes = [now for now in new.forecasts if _is_namesake(now, then)]
    if not namesakes:
        return line
    now = min(namesakes, key=lambda now: len(_differing(now, then)))
    return f"{line}; unlike: {_unlike(now, then)}"


def _unlike(now: ForecastRow, then: ForecastRow) -> str:
    """The conditions that two forecasts of one name do not share."""
    pairs: dict[str, tuple[object, object]] = {
        key: (getattr(then, key), getattr(now, key)) for key in _differing(now, then)
    }
    if "method_digest" in pairs and now.settings and then.settings:  # what it is of says more
        found = differing_settings(then.settings, now.settings)
        pairs = {**{key: pair for key, pair in pairs.items() if key != "method_digest"}, **found} if found else pairs
    return unlike.said(pairs)


def _changed(now: ForecastRow, then: ForecastRow) -> str:
    """What is installed in another version."""
    if now.versions is None or then.versions is None:
        return "Which versions changed is not known"
    changed = [
        f"{package} {then.versions.get(package)} -> {now.versions.get(package)}"
        for package in then.versions
        if then.versions.get(package) != now.versions.get(package)
    ]
    return f"Changed since: {', '.join(changed)}" if changed else "No version has changed since"


def _name(row: ForecastRow) -> str:
    gpus = row.gpus or 1
    return one_line(f"{row.model} x {row.method} on {f'{gpus} x ' * (gpus > 1)}{row.target}")


def _step(row: ForecastRow) -> str:
    return f"{row.passes or 1} x {row.batch_size}"


def _size(count: int | None) -> str:
    if count is None:
        return "no limit"
    return size(count) if count >= MiB else f"{count:,} bytes"
