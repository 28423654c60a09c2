"""What does a person look at? Each table of the report as small pictures.

Only two colours carry meaning in a line or a mark, blue and vermilion, which the colour-blind tell apart, and each goes
with a shape: a cell that did not complete is a cross in every picture.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightweight.record import BASELINE, Entry, Run
from lightweight.report import data_figures, drawing, loss_figures, memory_figures, select, speed, speed_figures
from lightweight.report.drawing import Picture

SHORTEST = 5
"""Steps; fewer are no curve."""


def pictures(runs: Sequence[Run]) -> list[Picture]:
    """Every picture there is something to draw for: loss, data, quality, memory, speedup, ladder, frontier, history."""
    entries = select.newest(runs)
    cells = select.main_cells(entries)
    drawn: list[Picture] = []
    with drawing.style():
        for number, group in enumerate(select.groups(cells)):
            shown = select.one_seed(group)
            methods = [entry for entry in shown if entry.method != BASELINE] or shown
            curved = [entry for entry in methods if entry.train_loss or entry.outcome != "completed"]
            if max(len(entry.train_loss or ()) for entry in group) >= SHORTEST:
                drawn += [
                    loss_figures.loss(f"loss-{number}-{index}", e, group, entries) for index, e in enumerate(curved)
                ]
            if any(entry.peak_allocated_bytes or entry.forecast_bytes_by_cause for entry in group):
                drawn.append(memory_figures.memory(f"memory-{number}", shown, entries))
            if len(shown) > 1 and any(_is_compared(entry, entries) for entry in shown):
                drawn.append(speed_figures.speedups(f"speedup-{number}", shown, group, entries))
        drawn += memory_figures.forecasts(runs, cells)
        drawn += [data_figures.lengths(f"data-{n}", e, entries) for n, e in enumerate(select.of_data(entries))]
        drawn += loss_figures.qualities(entries)
        for number, rungs in enumerate(select.ladders(entries)):
            drawn.append(speed_figures.ladder(number, rungs, entries))
        drawn += memory_figures.frontiers(runs, entries)
        drawn += speed_figures.histories(runs, entries)
    order = ("loss", "data", "no-worse", "speedup", "memory", "ladder", "frontier", "history")
    return sorted(drawn, key=lambda picture: order.index(picture.kind))


def _is_compared(entry: Entry, entries: Sequence[Entry]) -> bool:
    """Whether a picture of speedups has something to show of a cell: a ratio, or that it failed."""
    has_ratio = entry.method != BASELINE and speed.faster(entry, select.pace_of(entry, entries)) is not None
    return has_ratio or entry.outcome != "completed"
