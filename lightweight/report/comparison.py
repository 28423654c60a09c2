"""How is the gate's verdict shown? The cells of a new run beside the stored ones, as a table and lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lightweight import record
from lightweight.record import BASELINE, SAME_BASELINE, Entry, baseline_of, one_line
from lightweight.report import forecast_comparison, words
from lightweight.report.tables import shares
from lightweight.report.text_table import Column, table
from lightweight.verdict import forecasts, gate
from lightweight.verdict.gate import Cell, Comparison
from lightweight.verdict.limits import Limits


def of_files(new: Path, old: Sequence[Path], limits: Limits) -> tuple[str, list[str]]:
    """What is told of the record at `new`, held against those at `old`, trials against trials, or a plan's forecasts
    against forecasts; and why it fails. Raises ValueError."""
    run = record.load(new)
    is_plan = forecasts.holds_forecasts_alone(run)
    runs, problems = (forecasts if is_plan else gate).load(old)
    if not runs:  # a gate without anything to hold against would pass for ever
        what = f"record {new}: holds forecasts alone, and there are none to hold them against: " if is_plan else ""
        raise ValueError(what + "; ".join(problems))
    if is_plan:
        of_forecasts = forecasts.compare(run, runs, limits)
        return "\n".join([*problems, forecast_comparison.text(of_forecasts)]), of_forecasts.failures
    compared = gate.compare(run.entries, runs, limits)
    return "\n".join([*problems, text(compared)]), compared.failures


def text(comparison: Comparison) -> str:
    """The comparison as a person reads it."""
    cells = comparison.cells
    entries = [cell.now for cell in cells]

    def now_and_stored(heading: str, of: Callable[[Entry, Sequence[Entry]], str]) -> list[Column[Cell]]:
        """What `of` says of a trial among those of its run: of the new one, and of the stored one."""
        return [
            (f"{heading} now", "r", lambda cell: of(cell.now, entries)),
            ("stored", "r", lambda cell: of(cell.then, cell.run.entries) if cell.then and cell.run else "-"),
        ]

    columns: list[Column[Cell]] = [
        ("model", "l", lambda cell: cell.now.model),
        ("method", "l", lambda cell: _method(cell.now, entries)),
        *now_and_stored("speedup", lambda entry, among: words.speedup(entry, baseline_of(entry, among))),
        ("now / stored", "r", lambda cell: str(cell.against_stored or "-")),
        *now_and_stored("step", lambda entry, _: words.step(entry)),
        *((heading, side, lambda cell, share=share: share(cell.now)) for heading, side, share in shares(entries)),
        *now_and_stored("memory", _memory),
        *now_and_stored("held-out loss", lambda entry, _: words.loss(entry)),
        ("verdict", "l", _verdict),
    ]
    lines = [table("gate", "Did it get worse?", columns, cells, entries).text("terminal")] if cells else []
    runs = {cell.run.path: cell.run for cell in cells if cell.run}.values()
    if runs:
        names = ", ".join(f"{run.name}{' (of code with uncommitted changes)' * bool(run.is_dirty)}" for run in runs)
        lines.append(
            one_line(f"Stored: {names}. The interval of now / stored is corrected for repeated looks at the data.")
        )
    failed = [f"FAILED {failure}" for failure in comparison.failures]
    return "\n".join([*lines, *map(one_line, [*comparison.notes, *failed])])


def _method(entry: Entry, among: Sequence[Entry]) -> str:
    name = words.name_among(entry, [other for other in among if SAME_BASELINE.holds(other, entry)])
    return name if entry.world_size == 1 else f"{name}, {entry.world_size} GPUs"


def _memory(entry: Entry, among: Sequence[Entry]) -> str:
    """The memory ratio where there is one, else the peak."""
    share = entry.memory_share(baseline_of(entry, among))
    return words.memory(entry) if share is None or entry.method == BASELINE else f"{share:.2f}"


def _verdict(cell: Cell) -> str:
    return "FAIL" if cell.failures else cell.verdict or ("no stored run" if cell.then is None else "-")
