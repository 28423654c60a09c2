"""Where did the memory go, and what fits which card? Bars by cause under a limit, and the frontier's grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lightweight.record import Entry, ForecastRow, Run
from lightweight.report import drawing, frontier, select, words
from lightweight.report.drawing import CAUSES, LIGHT, WIDTH, Canvas, Picture
from lightweight.report.frontier import Place
from lightweight.targets import GiB, MiB, size


def memory(key: str, group: Sequence[Entry], entries: Sequence[Entry]) -> Picture:
    """The forecast peak by cause above the measured one, a pair a method, and the target's limit as a line."""
    rows = [
        _Bar(
            name=words.name_among(entry, group),
            by_cause=entry.forecast_bytes_by_cause or {},
            measured=entry.peak_allocated_bytes,
            label=_memory_words(entry),
            failed=entry.outcome != "completed",
            entry=entry,
        )
        for entry in group
    ]
    first = group[0]
    title = f"{first.model} on {words.timed_on(first)}"
    return _bars(key, title, rows, first.budget_bytes, entries)


def _memory_words(entry: Entry) -> str:
    measured, forecast = entry.peak_allocated_bytes, entry.forecast_allocated_bytes
    if entry.outcome != "completed":
        return words.outcome(entry) + (f" at {size(measured)}" if measured else "")
    parts = [size(measured)] if measured else []
    parts += [f"forecast {size(forecast)}"] if forecast is not None else []
    return ", ".join(parts) or "no forecast"


def forecasts(runs: Sequence[Run], cells: Sequence[Entry]) -> list[Picture]:
    """The same for models that were forecast and not trained, on the smallest card: the frontier has the others."""
    trained = {entry.model for entry in cells}
    rows = [row for row in select.forecasts(runs) if select.is_card(row.target) and row.model not in trained]
    drawn = []
    for number, model in enumerate(dict.fromkeys(row.model for row in rows)):
        limit = min((row.budget_bytes for row in rows if row.model == model), key=lambda room: room or math.inf)
        of = [row for row in rows if (row.model, row.budget_bytes) == (model, limit)]
        bars = [_forecast_bar(row) for row in of]
        title = f"{model} on {select.target_of(of[0])}, forecast"
        drawn.append(_bars(f"memory-forecast-{number}", title, bars, limit, [], model))
    return drawn


def _forecast_bar(row: ForecastRow) -> _Bar:
    return _Bar(
        name=row.method,
        by_cause=row.bytes_by_cause,
        measured=None,
        label=f"{words.ending(row.verdict)}: {size(row.forecast_allocated_bytes)}",
        failed=row.verdict == "does_not_fit",
        entry=None,
    )


@dataclass(frozen=True, kw_only=True)
class _Bar:
    """A method's peak: forecast bytes by cause, bytes measured, and in words."""

    name: str
    by_cause: Mapping[str, float]
    measured: float | None
    label: str
    failed: bool
    entry: Entry | None


def _bars(
    key: str, title: str, rows: Sequence[_Bar], limit: float | None, entries: Sequence[Entry], model: str | None = None
) -> Picture:
    causes = [cause for cause in CAUSES if any(row.by_cause.get(cause) for row in rows)]
    causes += sorted({cause for row in rows for cause in row.by_cause} - set(CAUSES))
    any_measured = any(row.measured for row in rows)
    keys = [*causes, "measured"] if any_measured else causes
    top, of_row, left, right = 22 if limit else 6, 44, 8, WIDTH - 8
    bottom = top + of_row * len(rows)
    height = bottom + 34 + 16 * -(-len(keys) // 3) + 2
    canvas = Canvas(key, height, [row.entry for row in rows if row.entry is not None], entries)
    largest = max([sum(row.by_cause.values()) for row in rows] + [row.measured or 0 for row in rows] + [limit or 0])
    axes = canvas.axes(left, top, right - left, bottom - top)
    unit, unit_name = (GiB, "GiB") if largest >= GiB else (MiB, "MiB")
    axes.set_xlim(0, largest / unit * 1.02 or 1)
    axes.set_ylim(bottom - top, 0)
    paper = canvas.paper()
    for number, row in enumerate(rows):
        y = of_row * number
        colour = "fail" if row.failed else "ink"
        name = drawing.text(paper, left, top + y + 13, drawing.short(row.name, 24), "ink", 10.5, weight="bold")
        cross = "✕ " if row.failed else ""
        said = drawing.text(paper, right, top + y + 13, cross + row.label, colour, 9.5, ha="right")
        canvas.of(row.entry, name, said, *_drawn_bar(axes, y, row, causes, unit))
    if limit:
        for number in range(len(rows)):  # not through the words between the bars
            y = of_row * number
            axes.plot([limit / unit] * 2, [y + 16.5, y + 40], color=LIGHT["ink"], linewidth=1.3, solid_capstyle="butt")
        at = left + (right - left) * (limit / unit) / axes.get_xlim()[1]
        beyond = at > WIDTH * 0.6
        drawing.text(paper, at, top - 8, f"limit {size(limit)}", "ink", 9.5, ha="right" if beyond else "left")
    drawing.without_heights(axes)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    drawing.text(paper, right, bottom + 26, unit_name, "muted", 9.5, ha="right")
    for number, name in enumerate(keys):
        x, y = left + (number % 3) * 118, bottom + 42 + 16 * (number // 3)
        thin = name == "measured"
        colour = LIGHT["ink"] if thin else LIGHT.get(name, LIGHT["muted"])
        paper.barh(y - 3.5, 10, 4 if thin else 10, x, color=colour)
        drawing.text(paper, x + 15, y, drawing.short(name, 18), "muted", 9.5)
    caption = "; ".join(f"{row.name} {row.label}" for row in rows)
    under = f" Limit {size(limit)}." if limit else ""
    return canvas.picture("memory", title, f"Peak memory by cause. {caption}.{under}", model)


def _drawn_bar(axes: Axes, y: float, row: _Bar, causes: Sequence[str], unit: int) -> list[Any]:
    """The forecast, a piece for each of the causes in order, above what was measured."""
    parts: list[Any] = []
    start = 0.0
    for cause in causes:
        width = row.by_cause.get(cause, 0) / unit
        if width:
            of: dict[str, Any] = {"color": LIGHT.get(cause, LIGHT["muted"]), "edgecolor": LIGHT["paper"]}
            parts += axes.barh(y + 24, width, 11, start, linewidth=0.7, **of)
        start += width
    if row.measured:
        below = y + (34 if row.by_cause else 27)
        parts += axes.barh(below, row.measured / unit, 4, color=LIGHT["fail" if row.failed else "ink"])
        if row.failed:
            parts += drawing.cross(axes, row.measured / unit, below)
    return parts


def frontiers(runs: Sequence[Run], entries: Sequence[Entry]) -> list[Picture]:
    """A grid for each model: methods down, cards across; filled where measured, hollow where forecast."""
    by_method = frontier.places(runs)
    columns = frontier.cards(by_method)
    return [
        _frontier(number, model, {method: of for (m, method), of in by_method.items() if m == model}, columns, entries)
        for number, model in enumerate(dict.fromkeys(model for model, _ in by_method))
    ]


def _frontier(
    number: int, model: str, of_model: Mapping[str, Mapping[str, Place]], cards: Sequence[str], entries: Sequence[Entry]
) -> Picture:
    columns = [card for card in cards if any(card in of for of in of_model.values())]
    left, of_row, top = 98, 34, 40
    across = min(64.0, (WIDTH - 8 - left) / max(len(columns), 1))
    bottom = top + of_row * len(of_model)
    measured = [place.entry for of in of_model.values() for place in of.values() if place.entry]
    canvas = Canvas(f"frontier-{number}", bottom + 42, measured, entries)
    paper = canvas.paper()
    for index, card in enumerate(columns):
        x = left + across * (index + 0.5)
        lines = [*wrap(card, max(5, int(across / 4.6)))[:2]]
        if room := frontier.card_bytes(card):
            lines.append(f"{room / GiB:.0f} GiB")
        for line, label in enumerate(lines[-3:]):
            is_size = room is not None and line == len(lines[-3:]) - 1
            drawing.text(
                paper, x, 12 + 11 * line, label, "muted" if is_size else "ink", 8 if is_size else 8.5, ha="center"
            )
    parts = []
    for row, (method, of) in enumerate(of_model.items()):
        y = top + of_row * (row + 0.5)
        paper.plot([8, left + across * len(columns)], [y - of_row / 2] * 2, color=LIGHT["rule"], linewidth=0.8)
        lines = wrap(drawing.short(method, 36).replace("-", "- "), 17)[:2]
        for line, label in enumerate(lines):
            drawing.text(
                paper, 8, y + 4 + 11 * (line - (len(lines) - 1) / 2), label.replace("- ", "-"), "ink", 10, weight="bold"
            )
        for index, card in enumerate(columns):
            if place := of.get(card):
                canvas.of(
                    place.entry, *_place(paper, left + across * (index + 0.5), y, place.verdict, bool(place.entry))
                )
        parts.append(f"{method}: " + ", ".join(f"{of[card].text} on {card}" for card in columns if card in of))
    legend = [("fits", True, "fits"), ("does_not_fit", True, "out of memory")]
    legend += [("fits", False, "forecast to fit"), ("does_not_fit", False, "forecast not to fit")]
    for index, (verdict, filled, label) in enumerate(legend):
        x, y = 16 + (index % 2) * 130, bottom + 14 + 17 * (index // 2)
        _place(paper, x, y, verdict, filled, 5)
        drawing.text(paper, x + 12, y + 3.5, label, "muted", 9.5)
    return canvas.picture("frontier", model, f"What fits which card. {'. '.join(parts)}.", model)


def _place(axes: Axes, x: float, y: float, verdict: str, is_measured: bool, size: float = 8) -> list[Any]:
    """A circle that fits, a square with a cross that does not, else a question mark; filled where measured."""
    if verdict == "fits":
        face = LIGHT["blue"] if is_measured else "none"
        colour = LIGHT["blue"]
        return list(
            axes.plot(x, y, "o", markersize=size * 1.6, color=colour, markerfacecolor=face, markeredgewidth=1.6)
        )
    if verdict != "does_not_fit":
        return [drawing.text(axes, x, y + size * 0.6, "?", "muted", size * 1.8, ha="center", weight="bold")]
    square = axes.plot(
        x,
        y,
        "s",
        markersize=size * 1.6,
        color=LIGHT["fail"],
        markerfacecolor=LIGHT["fail"] if is_measured else "none",
        markeredgewidth=1.6,
    )
    colour = LIGHT["paper"] if is_measured else LIGHT["fail"]
    return [*square, *axes.plot(x, y, "x", markersize=size * 0.85, color=colour, markeredgewidth=1.8)]
