"""How is the verdict on a plan told? Its forecasts beside those of the older one, as a table and lines."""

from __future__ import annotations

from lightweight.record import one_line
from lightweight.report.select import several
from lightweight.report.text_table import Column, table
from lightweight.targets import size
from lightweight.verdict.forecasts import ForecastCell, ForecastComparison, grown


def text(comparison: ForecastComparison) -> str:
    """The comparison as a person reads it."""
    cells = comparison.cells
    columns: list[Column[ForecastCell]] = [
        ("model", "l", lambda cell: cell.now.model),
        ("method", "l", lambda cell: cell.now.method),
        ("target", "l", lambda cell: several(cell.now.gpus or 1, cell.now.target)),
        ("passes x rows", "r", lambda cell: f"{cell.now.passes or 1} x {cell.now.batch_size or '-'}"),
        ("allocated now", "r", lambda cell: size(cell.now.forecast_allocated_bytes)),
        ("stored", "r", lambda cell: size(cell.then.forecast_allocated_bytes) if cell.then else "-"),
        ("change", "r", lambda cell: _change(cell, "forecast_allocated_bytes")),
        ("reserved change", "r", lambda cell: _change(cell, "forecast_reserved_bytes")),
        ("what grew most", "l", _grew),
        ("verdict", "l", _verdict),
    ]
    lines = [table("gate", "Does it take more?", columns, cells, [None] * len(cells)).text("terminal")] if cells else []
    if stored := {cell.run.path: cell.run.name for cell in cells if cell.run}.values():
        lines.append(one_line(f"Stored: {', '.join(stored)}. Forecasts are exact: the same versions give the same."))
    failed = [f"FAILED {failure}" for failure in comparison.failures]
    return "\n".join([*lines, *map(one_line, [*comparison.notes, *failed])])


def _change(cell: ForecastCell, key: str) -> str:
    if not cell.is_of_same_step:
        return "-"
    now, then = getattr(cell.now, key), getattr(cell.then, key)
    return "0" if now == then else f"{now / then - 1:+.2%}" if then else "-"


def _grew(cell: ForecastCell) -> str:
    causes = grown(cell.now, cell.then) if cell.then and cell.is_of_same_step else []
    return causes[0][0] if causes else "-"


def _verdict(cell: ForecastCell) -> str:
    return "FAIL" if cell.failures else "no stored plan" if cell.then is None else "pass"
