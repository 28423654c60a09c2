"""What a person looks at: each table of the report as small pictures.

Only two colours carry meaning in a line or a mark, blue and vermilion, which the colour-blind tell apart, and each goes
with a shape: a cell that did not complete is a cross in every picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from textwrap import wrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from lightweight.record import BASELINE, Entry, ForecastRow, Run
from lightweight.report import drawing, report
from lightweight.report.drawing import CAUSES, LIGHT, WIDTH, Canvas, Picture
from lightweight.report.report import Place
from lightweight.targets import GiB, MiB
from lightweight.verdict import noninferiority
from lightweight.verdict.noninferiority import Comparison, Estimate

POINTS = 400
"""Points a curve is drawn with at most; a longer one is averaged into as many."""

SHORTEST = 5
"""Steps; fewer are no curve."""


def pictures(runs: Sequence[Run]) -> list[Picture]:
    """Every picture there is something to draw for: loss, quality, memory, speedup, ladder, frontier, history."""
    entries = report.newest(runs)
    told = report.main_cells(entries)
    found: list[Picture] = []
    with drawing.style():
        for number, group in enumerate(report.groups(told)):
            shown = report.one_seed(group)
            methods = [entry for entry in shown if entry["method"] != BASELINE] or shown
            curved = [entry for entry in methods if entry["train_loss"] or entry["outcome"] != "completed"]
            if max(len(entry["train_loss"] or ()) for entry in group) >= SHORTEST:
                found += [_loss(f"loss-{number}-{index}", e, group, entries) for index, e in enumerate(curved)]
            if any(entry["peak_allocated_bytes"] or entry.get("forecast_bytes_by_cause") for entry in group):
                found.append(_memory(f"memory-{number}", shown, entries))
            if len(shown) > 1 and any(_is_compared(entry, entries) for entry in shown):
                found.append(_speedups(f"speedup-{number}", shown, group, entries))
        found += _forecast_memory(runs, told)
        found += _qualities(entries)
        for number, rungs in enumerate(report.ladders(entries)):
            found.append(_ladder(number, rungs, entries))
        found += _frontiers(runs, entries)
        found += _histories(runs, entries)
    order = ("loss", "no-worse", "speedup", "memory", "ladder", "frontier", "history")
    return sorted(found, key=lambda picture: order.index(picture.kind))


def _is_compared(entry: Entry, entries: Sequence[Entry]) -> bool:
    """Whether a picture of speedups has something to show of a cell: a ratio, or that it failed."""
    has_ratio = entry["method"] != BASELINE and report.faster(entry, report.pace_of(entry, entries)) is not None
    return has_ratio or entry["outcome"] != "completed"


# Loss


def _loss(key: str, entry: Entry, group: Sequence[Entry], entries: Sequence[Entry]) -> Picture:
    """Training loss of a method over its baseline's: against steps above, against seconds below."""
    baseline = report.baseline_of(entry, group)
    shown = [entry] if baseline is None or baseline is entry else [baseline, entry]
    name = report.name_among(entry, group)
    title = f"{entry['model']} on {report.timed_on(entry)}: {name}" + " over baseline" * (len(shown) > 1)
    summary = f"Loss against step and seconds. {'; '.join(report.headline(e) for e in shown)}"
    ended = [e for e in shown if e["outcome"] != "completed"]
    if not any(e["train_loss"] for e in shown):
        canvas = Canvas(key, 10 + 18 * len(ended), shown, entries)
        paper = canvas.paper()
        for line, e in enumerate(ended):
            canvas.of(e, *_crossed(paper, 14, 14 + 18 * line, e))
        return canvas.picture("loss", title, summary)
    canvas = Canvas(key, 350, shown, entries)
    above, below = (canvas.axes(30, top, 236, 118) for top in (20, 200))
    paper = canvas.paper()
    curves = {id(e): _curve(e) for e in shown}
    drawn = [e for e in shown if curves[id(e)][1]]
    heights = [value for e in drawn for value in [*curves[id(e)][1], *_heldout(e)] if math.isfinite(value)]
    for axes, in_seconds in ((above, False), (below, True)):
        labels = []
        ends = [0.0]
        for e in drawn:
            colour, dash = ("blue", "-") if e is entry else ("muted", (0, (3, 1.6)))
            steps, losses, seconds = curves[id(e)]
            x = seconds if in_seconds else steps
            epoch = e.get("steps_per_epoch") or 1
            raw = axes.plot(*_thinned(x, losses), color=LIGHT[colour], linewidth=0.7, alpha=0.4)
            mean = axes.plot(
                *_thinned(x, _smooth(losses, epoch)),
                color=LIGHT[colour],
                linewidth=1.9,
                linestyle=dash,
                zorder=3 if e is entry else 4,  # dashes leave what is under them to be seen
            )
            canvas.of(e, *raw, *mean)
            ends.append(x[-1])
            before, after = e["heldout_loss_before"], e["heldout_loss_after"]
            points = [(at, value) for at, value in ((0.0, before), (x[-1], after)) if value is not None]
            if points:
                dots = axes.plot(
                    *zip(*points, strict=True),
                    linestyle="none",
                    marker="o",
                    markersize=4.5,
                    markerfacecolor=LIGHT["paper"],
                    markeredgecolor=LIGHT[colour],
                    clip_on=False,
                    zorder=5,
                )
                canvas.of(e, *dots)
            last = after if after is not None else _last(losses)
            told = f"{x[-1]:.1f} s" if in_seconds else f"{last:.2f}"
            labels.append((last, e, f"{drawing.short(e['method'], 17)}\n{told}", colour))
        axes.set_xlim(0, max(ends) or 1)
        if heights:
            room = (max(heights) - min(heights)) * 0.06 or 0.1
            above_curves = (max(heights) - min(heights) + 2 * room) * 0.15 * len(ended)  # where crosses stand
            axes.set_ylim(min(heights) - room, max(heights) + room + above_curves)
        drawing.plain(axes)
        for e, place, told, colour in drawing.apart(axes, labels, gap=25):
            canvas.of(e, drawing.text(axes, 1.04, place, told, colour, 9.5, transform=axes.transAxes, va="center"))
        for line, e in enumerate(ended):
            canvas.of(e, *_crossed(paper, 40, (27 if axes is above else 207) + 15 * line, e))
    above.set_xlabel("optimizer step", loc="left")
    below.set_xlabel("seconds of training", loc="left")
    for axes, told in ((above, "loss against step"), (below, "loss against seconds")):
        drawing.text(axes, 0, 1.07, told, "ink", 10, transform=axes.transAxes, weight="bold")
    if any(_heldout(e) for e in shown):
        paper.plot([277], [342], "o", markersize=4.5, markerfacecolor="none", markeredgecolor=LIGHT["muted"])
        drawing.text(paper, 284, 345.5, "held-out loss", "muted", 9.5)
    return canvas.picture("loss", title, summary)


def _crossed(paper: Axes, x: float, y: float, entry: Entry) -> list[Any]:
    """A cross, and how the cell ended."""
    cross = paper.plot(x, y, "x", color=LIGHT["fail"], markersize=7, markeredgewidth=2)
    told = f"{drawing.short(entry['method'], 18)}: {report.outcome(entry)}"
    return [*cross, drawing.text(paper, x + 9, y + 3.5, told, "fail", 9.5)]


def _curve(entry: Entry) -> tuple[list[float], list[float], list[float]]:
    """Steps, losses and seconds since training began, one an optimizer step; nan for a loss that is not finite."""
    losses = [math.nan if value is None else float(value) for value in entry["train_loss"] or ()]
    taken, seconds = 0.0, []
    for value in entry["step_seconds"] or ():
        taken += value or 0.0
        seconds.append(taken)
    count = min(len(losses), len(seconds)) if seconds else len(losses)
    return [float(step) for step in range(1, count + 1)], losses[:count], seconds[:count] or [0.0] * count


def _heldout(entry: Entry) -> list[float]:
    return [entry[key] for key in ("heldout_loss_before", "heldout_loss_after") if entry[key] is not None]


def _last(losses: Sequence[float]) -> float:
    return next((value for value in reversed(losses) if math.isfinite(value)), 0.0)


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """At every step the mean of those around it: of `window` in all, of fewer at either end."""
    reach = [min(window // 2, index, len(values) - 1 - index) for index in range(len(values))]
    return [fmean(values[index - near : index + near + 1]) for index, near in enumerate(reach)]


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    size = -(-len(x) // POINTS)
    starts = range(0, len(x), size or 1)
    x_mean, y_mean = ([fmean(values[start : start + size]) for start in starts] for values in (x, y))
    return x_mean, y_mean


# No worse?


def _qualities(entries: Sequence[Entry]) -> list[Picture]:
    """Two pictures of what several seeds gave: held-out loss over the baseline's with the margin, and what was
    forgotten."""

    def job(found: Comparison) -> tuple[Any, ...]:
        return tuple(str(found.entries[0].get(key)) for key in noninferiority.SAME_JOB)

    compared = noninferiority.compare(entries)
    pictures = []
    for number, of in enumerate(dict.fromkeys(map(job, compared))):
        alike = [found for found in compared if job(found) == of]
        place = f"{alike[0].model} on {report.timed_on(alike[0].entries[0])}"
        against = [found for found in alike if found.verdict is not None]
        if against:
            rows = [_Estimated(f, f.difference, f.verdict or "") for f in against]
            title = f"{place}: held-out loss over baseline"
            pictures.append(_estimates(f"no-worse-{number}", title, rows, noninferiority.MARGIN, entries))
        if any(found.forgotten for found in alike):
            rows = [_Estimated(found, found.forgotten, "") for found in alike]
            pictures.append(_estimates(f"forgotten-{number}", f"{place}: forgotten elsewhere", rows, None, entries))
    return pictures


@dataclass(frozen=True)
class _Estimated:
    """A method, what is shown of it in nats a token, and the verdict on it, empty where there is none to give."""

    of: Comparison
    estimate: Estimate | None
    verdict: str

    @property
    def failed(self) -> bool:
        return bool(self.of.failed) or self.verdict == "worse"

    @property
    def words(self) -> str:
        ended = [entry["outcome"].replace("_", " ") for entry in self.of.entries if entry["outcome"] != "completed"]
        if ended:
            return f"{len(ended)} of {len(self.of.entries)} {ended[0]}"
        told = [*([str(self.estimate)] if self.estimate else []), *([self.verdict] if self.verdict else [])]
        return ", ".join(told) or "no losses"


def _estimates(
    key: str, title: str, rows: Sequence[_Estimated], margin: float | None, entries: Sequence[Entry]
) -> Picture:
    """Means with their intervals under each other, zero as a line, and the margin as another."""
    top, of_row, left, right = 22, 38, 8, WIDTH - 8
    bottom = top + of_row * len(rows)
    canvas = Canvas(key, bottom + 32, [entry for row in rows for entry in row.of.entries], entries)
    axes = canvas.axes(left + 6, top, right - left - 12, bottom - top)
    paper = canvas.paper()
    ends = [0.0, *([] if margin is None else [margin])]
    ends += [end for row in rows if (e := row.estimate) for end in (e.low, e.mean, e.high) if math.isfinite(end)]
    room = (max(ends) - min(ends)) * 0.06 or 0.01
    axes.set_xlim(min(ends) - room, max(ends) + room)
    axes.set_ylim(bottom - top, 0)
    for number, row in enumerate(rows):
        y = of_row * number
        colour = "fail" if row.failed else "ink"
        cross = "✕ " if row.failed else ""
        name = drawing.text(paper, left, top + y + 13, drawing.short(row.of.method, 22), "ink", 10.5, weight="bold")
        said = drawing.text(paper, right, top + y + 13, cross + row.words, colour, 9.5, ha="right")
        marks: list[Any] = []
        if row.estimate:
            of = LIGHT["fail" if row.failed else "blue"]
            shown = [min(max(end, min(ends) - room), max(ends) + room) for end in (row.estimate.low, row.estimate.high)]
            face = "none" if row.verdict == "not shown" else of
            marks += axes.plot(shown, [y + 26] * 2, color=of, linewidth=4, alpha=0.45, solid_capstyle="butt")
            marks += axes.plot(
                *(row.estimate.mean, y + 26, "X" if row.failed else "o"),
                markersize=7,
                color=of,
                markerfacecolor=face,
                markeredgewidth=1.6,
            )
        else:
            inside = axes.get_yaxis_transform()
            marks += axes.plot(
                0.01, y + 26, "x", color=LIGHT["fail"], markersize=8, markeredgewidth=2.2, transform=inside
            )
        canvas.of(row.of.entries[0], name, said, *marks)
        for x, of_line in ((0.0, "muted"), (margin, "ink")):
            if x is not None:  # not through the words between the rows
                axes.plot(
                    [x, x], [y + 18, y + 34], color=LIGHT[of_line], linewidth=1.2, solid_capstyle="butt", zorder=0
                )
    if margin is not None:
        at = left + 6 + (right - left - 12) * (margin - axes.get_xlim()[0]) / (axes.get_xlim()[1] - axes.get_xlim()[0])
        beyond = at > WIDTH * 0.5
        drawing.text(paper, at, top - 8, f"margin {margin:+g}", "ink", 9.5, ha="right" if beyond else "left")
    axes.yaxis.set_major_locator(NullLocator())
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.3g}" if value else "0"))
    drawing.text(paper, right, bottom + 28, "nats a token", "muted", 9.5, ha="right")
    words = "; ".join(f"{row.of.method} {row.words}" for row in rows)
    limit = "" if margin is None else f" No worse where the whole interval is below {margin:+g}."
    return canvas.picture("no-worse", title, f"In nats a token, with 90 % intervals over seeds. {words}.{limit}")


# Memory


def _memory(key: str, group: Sequence[Entry], entries: Sequence[Entry]) -> Picture:
    """The forecast peak by cause above the measured one, a pair a method, and the target's limit as a line."""
    rows = [
        _Bar(
            name=report.name_among(entry, group),
            by_cause=entry.get("forecast_bytes_by_cause") or {},
            measured=entry["peak_allocated_bytes"],
            told=_memory_words(entry),
            failed=entry["outcome"] != "completed",
            entry=entry,
        )
        for entry in group
    ]
    first = group[0]
    title = f"{first['model']} on {report.timed_on(first)}"
    return _bars(key, title, rows, first.get("budget_bytes"), entries)


def _memory_words(entry: Entry) -> str:
    measured, forecast = entry["peak_allocated_bytes"], entry["forecast_allocated_bytes"]
    if entry["outcome"] != "completed":
        return report.outcome(entry) + (f" at {report.size(measured)}" if measured else "")
    told = [report.size(measured)] if measured else []
    told += [f"forecast {report.size(forecast)}"] if forecast is not None else []
    return ", ".join(told) or "no forecast"


def _forecast_memory(runs: Sequence[Run], told: Sequence[Entry]) -> list[Picture]:
    """The same for models that were forecast and not trained, on the smallest card: the frontier has the others."""
    trained = {entry["model"] for entry in told}
    rows = [row for row in report.forecasts(runs) if report.is_card(row["target"]) and row["model"] not in trained]
    found = []
    for number, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        limit = min((row["budget_bytes"] for row in rows if row["model"] == model), key=lambda room: room or math.inf)
        of = [row for row in rows if (row["model"], row["budget_bytes"]) == (model, limit)]
        bars = [_forecast_bar(row) for row in of]
        title = f"{model} on {report.card(of[0])}, forecast"
        found.append(_bars(f"memory-forecast-{number}", title, bars, limit, [], model))
    return found


def _forecast_bar(row: ForecastRow) -> _Bar:
    words = row["verdict"].replace("_", " ")
    return _Bar(
        name=row["method"],
        by_cause=row["bytes_by_cause"],
        measured=None,
        told=f"{words}: {report.size(row['forecast_allocated_bytes'])}",
        failed=row["verdict"] == "does_not_fit",
        entry=None,
    )


@dataclass(frozen=True, kw_only=True)
class _Bar:
    """A method's peak: forecast bytes by cause, bytes measured, and in words."""

    name: str
    by_cause: Mapping[str, float]
    measured: float | None
    told: str
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
        said = drawing.text(paper, right, top + y + 13, cross + row.told, colour, 9.5, ha="right")
        parts: list[Any] = []
        start = 0.0
        for cause in causes:
            width = row.by_cause.get(cause, 0) / unit
            if width:
                parts += axes.barh(
                    y + 24,
                    width,
                    11,
                    start,
                    color=LIGHT.get(cause, LIGHT["muted"]),
                    edgecolor=LIGHT["paper"],
                    linewidth=0.7,
                )
            start += width
        if row.measured:
            below = y + (34 if row.by_cause else 27)
            parts += axes.barh(below, row.measured / unit, 4, color=LIGHT[colour])
            if row.failed:
                parts += axes.plot(
                    row.measured / unit, below, "x", color=LIGHT["fail"], markersize=8, markeredgewidth=2.2
                )
        canvas.of(row.entry, name, said, *parts)
    if limit:
        for number in range(len(rows)):  # not through the words between the bars
            y = of_row * number
            axes.plot([limit / unit] * 2, [y + 16.5, y + 40], color=LIGHT["ink"], linewidth=1.3, solid_capstyle="butt")
        at = left + (right - left) * (limit / unit) / axes.get_xlim()[1]
        beyond = at > WIDTH * 0.6
        drawing.text(paper, at, top - 8, f"limit {report.size(limit)}", "ink", 9.5, ha="right" if beyond else "left")
    axes.yaxis.set_major_locator(NullLocator())
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    drawing.text(paper, right, bottom + 26, unit_name, "muted", 9.5, ha="right")
    for number, name in enumerate(keys):
        x, y = left + (number % 3) * 118, bottom + 42 + 16 * (number // 3)
        thin = name == "measured"
        colour = LIGHT["ink"] if thin else LIGHT.get(name, LIGHT["muted"])
        paper.barh(y - 3.5, 10, 4 if thin else 10, x, color=colour)
        drawing.text(paper, x + 15, y, drawing.short(name, 18), "muted", 9.5)
    words = "; ".join(f"{row.name} {row.told}" for row in rows)
    under = f" Limit {report.size(limit)}." if limit else ""
    return canvas.picture("memory", title, f"Peak memory by cause. {words}.{under}", model)


# Speedup


def _speedups(key: str, shown: Sequence[Entry], group: Sequence[Entry], entries: Sequence[Entry]) -> Picture:
    """Times as fast as the baseline: with the interval where it was measured in pairs of rounds, and of several seeds
    the mean with the least and the most."""
    top, of_row, left, right = 6, 36, 8, WIDTH - 8
    bottom = top + of_row * len(shown)
    canvas = Canvas(key, bottom + 46, shown, entries)
    axes = canvas.axes(left + 6, top, right - left - 12, bottom - top)
    paper = canvas.paper()
    reach, words = [1.0], []
    for number, entry in enumerate(shown):
        y = of_row * number
        failed = entry["outcome"] != "completed"
        named = report.name_among(entry, group) if failed else report.method_among(entry, group)
        row = _Faster.of(entry, group, entries)
        words.append(f"{named} {row.words.removeprefix('✕ ')}")
        name = drawing.text(paper, left, top + y + 13, drawing.short(named, 24), "ink", 10.5, weight="bold")
        said = drawing.text(paper, right, top + y + 13, row.words, "fail" if failed else "ink", 9.5, ha="right")
        marks: list[Any] = []
        if row.ends:
            marks += axes.plot(row.ends, [y + 25, y + 25], color=LIGHT["blue"], linewidth=4, alpha=0.45)
            reach += row.ends
        if row.ratio is not None:
            face = LIGHT["blue"] if row.is_paired else "none"
            marks += axes.plot(
                *(row.ratio, y + 25, "o"),
                markersize=6.8,
                markeredgewidth=1.8,
                markerfacecolor=face,
                markeredgecolor=LIGHT["blue"],
            )
            reach.append(row.ratio)
        else:
            colour = "fail" if failed else "muted"
            marks += axes.plot(
                0.01,
                y + 25,
                "x" if failed else "_",
                color=LIGHT[colour],
                markersize=8,
                markeredgewidth=2.2,
                transform=axes.get_yaxis_transform(),
            )
        canvas.of(entry, name, said, *marks)
        axes.plot([1, 1], [y + 18, y + 32], color=LIGHT["muted"], linewidth=1.1, solid_capstyle="butt", zorder=0)
    axes.set_xscale("log")
    axes.set_xlim(min(reach) / 1.15, max(reach) * 1.15)
    axes.set_ylim(bottom - top, 0)
    ticks = _ratios(min(reach) / 1.15, max(reach) * 1.15) if len(reach) > 1 else [1.0]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.yaxis.set_major_locator(NullLocator())
    axes.spines["left"].set_visible(False)
    for x, filled, told in ((left, True, "with 95 % interval"), (left + 130, False, "from steady steps")):
        paper.plot(
            x + 5,
            bottom + 36,
            "o",
            markersize=6,
            color=LIGHT["blue"],
            markerfacecolor=LIGHT["blue"] if filled else "none",
        )
        drawing.text(paper, x + 14, bottom + 39.5, told, "muted", 9.5)
    title = f"{group[0]['model']} on {report.timed_on(group[0])}"
    return canvas.picture("speedup", title, f"Times as fast as the baseline, per token. {'; '.join(words)}.")


@dataclass(frozen=True, kw_only=True)
class _Faster:
    """What a row of the picture shows: how many times as fast, None where there is no ratio; the ends of its interval,
    or of several seeds, where both are numbers; whether it was measured in pairs of rounds."""

    words: str
    ratio: float | None = None
    ends: tuple[float, float] | None = None
    is_paired: bool = False

    @classmethod
    def of(cls, entry: Entry, group: Sequence[Entry], entries: Sequence[Entry]) -> _Faster:
        """The row of a cell, whose other seeds are in `group`."""
        if entry["outcome"] != "completed":
            return cls(words=f"✕ {report.outcome(entry)}")
        baseline = report.pace_of(entry, entries)
        found = report.pace(report.seeds_of(entry, group), entries)
        if found is None:
            told = report.speedup(entry, baseline)
            return cls(words="completes" if told == "-" else f"completes; {told}")
        if len(found.entries) > 1:
            words = f"{found.ratio:.2f}x, {len(found.entries)} seeds {found.low:.2f} to {found.high:.2f}"
            return cls(words=words, ratio=found.ratio, ends=(found.low, found.high))
        one = report.faster(entry, baseline)
        ends = one.interval if one and one.interval else None
        drawn = ends if ends and ends[0] > 0 and math.isfinite(ends[1]) else None
        return cls(words=report.speedup(entry, baseline), ratio=found.ratio, ends=drawn, is_paired=ends is not None)


def _ratios(low: float, high: float) -> list[float]:
    """Round ratios between two others, as many as have room beside each other on a logarithmic axis."""
    found: list[float] = []
    ends = [0.1**power for power in range(-4, 5)]
    for value in (*ends, *(5 * e for e in ends), *(2 * e for e in ends), *(1 + tenth / 10 for tenth in range(-9, 10))):
        apart = all(abs(math.log(value / other)) > 0.11 * math.log(high / low) for other in found)
        if low <= value <= high and apart:
            found.append(value)
    return sorted(found)


# Ladder


def _ladder(number: int, rungs: Sequence[Entry], entries: Sequence[Entry]) -> Picture:
    """A step's time on every rung, what changed there, and what that bought."""
    top, of_row, left, right = 6, 45, 8, WIDTH - 8
    bottom = top + of_row * len(rungs)
    canvas = Canvas(f"rungs-{number}", bottom + 28, rungs, entries)
    axes = canvas.axes(left, top, right - left, bottom - top)
    paper = canvas.paper()
    steps = [_step_ms(rung) for rung in rungs]
    axes.set_xlim(0, max([step for step in steps if step] or [1.0]) * 1.02)
    axes.set_ylim(bottom - top, 0)
    for index, (rung, step) in enumerate(zip(rungs, steps, strict=True)):
        y = of_row * index
        below = rungs[index - 1] if index else None
        gained = report.step_ratio(below, rung) if below else None
        told = "" if step is None else f"{step:.1f} ms" + ("" if gained is None else f", {gained:.2f}x")
        failed = rung["outcome"] != "completed"
        if failed:
            told = f"✕ {report.outcome(rung)}"
        changed = report.change(below, rung) if below else "the bottom of the ladder"
        drawn = [
            drawing.text(paper, left, top + y + 13, drawing.short(rung["method"], 26), "ink", 10.5, weight="bold"),
            drawing.text(paper, right, top + y + 13, told or "no steps", "fail" if failed else "ink", 9.5, ha="right"),
            drawing.text(paper, left, top + y + 25.5, drawing.short(changed, 62), "muted", 9),
        ]
        if index and steps[index - 1]:
            drawn += axes.barh(y + 35, steps[index - 1] or 0, 8, color=LIGHT["rule"])
        if step and not failed:
            drawn += axes.barh(y + 35, step, 8, color=LIGHT["blue"])
        else:
            drawn += axes.plot(
                0.012,
                y + 35,
                "x",
                color=LIGHT["fail"],
                markersize=8,
                markeredgewidth=2.2,
                transform=axes.get_yaxis_transform(),
            )
        canvas.of(rung, *drawn)
    axes.yaxis.set_major_locator(NullLocator())
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    drawing.text(paper, right, bottom + 25, "ms a step", "muted", 9.5, ha="right")
    table = report.ladder(rungs, number)
    words = "; ".join(" ".join(row[:1]) + f" {row[3]}, {row[2]}" for row in table.rows)
    title = f"{rungs[0]['model']} on {report.timed_on(rungs[0])}: {rungs[0]['method']} to {rungs[-1]['method']}"
    return canvas.picture(table.key, title, f"Milliseconds a step, one change after the other. {words}.")


def _step_ms(rung: Entry) -> float | None:
    return None if rung["steady_step_seconds"] is None else rung["steady_step_seconds"] * 1000


# Frontier


def _frontiers(runs: Sequence[Run], entries: Sequence[Entry]) -> list[Picture]:
    """A grid for each model: methods down, cards across; filled where measured, hollow where forecast."""
    found = report.places(runs)
    columns = report.cards(found)
    return [
        _frontier(number, model, {method: of for (m, method), of in found.items() if m == model}, columns, entries)
        for number, model in enumerate(dict.fromkeys(model for model, _ in found))
    ]


def _frontier(
    number: int, model: str, found: Mapping[str, Mapping[str, Place]], cards: Sequence[str], entries: Sequence[Entry]
) -> Picture:
    columns = [card for card in cards if any(card in of for of in found.values())]
    left, of_row, top = 98, 34, 40
    across = min(64.0, (WIDTH - 8 - left) / max(len(columns), 1))
    bottom = top + of_row * len(found)
    measured = [place.entry for of in found.values() for place in of.values() if place.entry]
    canvas = Canvas(f"frontier-{number}", bottom + 42, measured, entries)
    paper = canvas.paper()
    for index, card in enumerate(columns):
        x = left + across * (index + 0.5)
        lines = [*wrap(card, max(5, int(across / 4.6)))[:2]]
        if room := report.room(card):
            lines.append(f"{room / GiB:.0f} GiB")
        for line, told in enumerate(lines[-3:]):
            is_size = room is not None and line == len(lines[-3:]) - 1
            drawing.text(
                paper, x, 12 + 11 * line, told, "muted" if is_size else "ink", 8 if is_size else 8.5, ha="center"
            )
    words = []
    for row, (method, of) in enumerate(found.items()):
        y = top + of_row * (row + 0.5)
        paper.plot([8, left + across * len(columns)], [y - of_row / 2] * 2, color=LIGHT["rule"], linewidth=0.8)
        lines = wrap(drawing.short(method, 36).replace("-", "- "), 17)[:2]
        for line, told in enumerate(lines):
            drawing.text(
                paper, 8, y + 4 + 11 * (line - (len(lines) - 1) / 2), told.replace("- ", "-"), "ink", 10, weight="bold"
            )
        for index, card in enumerate(columns):
            if place := of.get(card):
                canvas.of(
                    place.entry, *_place(paper, left + across * (index + 0.5), y, place.verdict, bool(place.entry))
                )
        words.append(f"{method}: " + ", ".join(f"{of[card].text} on {card}" for card in columns if card in of))
    legend = [("fits", True, "fits"), ("does_not_fit", True, "out of memory")]
    legend += [("fits", False, "forecast to fit"), ("does_not_fit", False, "forecast not to fit")]
    for index, (verdict, filled, told) in enumerate(legend):
        x, y = 16 + (index % 2) * 130, bottom + 14 + 17 * (index // 2)
        _place(paper, x, y, verdict, filled, 5)
        drawing.text(paper, x + 12, y + 3.5, told, "muted", 9.5)
    return canvas.picture("frontier", model, f"What fits which card. {'. '.join(words)}.", model)


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


# History


def _histories(runs: Sequence[Run], entries: Sequence[Entry]) -> list[Picture]:
    """A picture for each cell that more than one run has: step, speedup, memory and loss from run to run."""
    shown = [e for e in entries if report.is_card(e["target"]) and len(report.trend(e, runs)) > 1]
    return [_history(f"history-{number}", entry, runs, entries) for number, entry in enumerate(shown)]


def _history(key: str, entry: Entry, runs: Sequence[Run], entries: Sequence[Entry]) -> Picture:
    found = report.trend(entry, runs)
    measures: list[tuple[str, str, Callable[[Run, Entry], float | None]]] = [
        ("ms a step", "{:.1f}", lambda _, then: _step_ms(then)),
        ("times as fast", "{:.2f}", _speedup_of),
        ("peak GiB", "{:.2f}", lambda _, then: (then["peak_allocated_bytes"] or 0) / GiB or None),
        ("held-out loss", "{:.3f}", lambda _, then: then["heldout_loss_after"]),
    ]
    told = []
    for name, form, measure in measures:
        values = [measure(run, then) if then["outcome"] == "completed" else None for run, then in found]
        if any(value is not None for value in values):
            told.append((name, form, values))
    told = told or [("outcome", "", [None] * len(found))]
    of_row, top = 62, 8
    canvas = Canvas(key, top + of_row * len(told) + 26, [entry], entries)
    failed = [index for index, (_, then) in enumerate(found) if then["outcome"] != "completed"]
    for row, (name, form, values) in enumerate(told):
        axes = canvas.axes(86, top + of_row * row + 10, 214, of_row - 22)
        known = [(index, value) for index, value in enumerate(values) if value is not None]
        if known:
            # the line breaks where a run did not complete
            line = axes.plot(
                range(len(values)),
                [math.nan if value is None else value for value in values],
                color=LIGHT["blue"],
                marker="o",
                markersize=4,
                linewidth=1.6,
                clip_on=False,
            )
            canvas.of(entry, *line)
            heights = [value for _, value in known]
            room = max((max(heights) - min(heights)) * 0.15, abs(max(heights)) * 0.02, 1e-9)
            axes.set_ylim(min(heights) - room, max(heights) + room)
            last = known[-1][1]
            y = (last - axes.get_ylim()[0]) / (axes.get_ylim()[1] - axes.get_ylim()[0])
            drawing.text(
                axes, 1.05, y, form.format(last), "blue", 9.5, transform=axes.transAxes, va="center", weight="bold"
            )
            first = known[0][1]
            if len(known) > 1 and first:
                drawing.text(
                    axes, -0.04, 0.1, f"{last / first - 1:+.1%}", "muted", 9.5, transform=axes.transAxes, ha="right"
                )
        for index in failed:
            cross = axes.plot(
                index,
                0.5,
                "x",
                color=LIGHT["fail"],
                markersize=8,
                markeredgewidth=2.2,
                transform=axes.get_xaxis_transform(),
                clip_on=False,
            )
            canvas.of(entry, *cross)
        axes.set_xlim(-0.15, len(found) - 0.85)
        axes.xaxis.set_major_locator(FixedLocator(range(len(found))))
        axes.set_xticklabels([])
        axes.yaxis.set_major_locator(NullLocator())
        axes.spines["left"].set_visible(False)
        drawing.text(axes, -0.04, 0.55, name, "ink", 9.5, transform=axes.transAxes, ha="right")
    paper = canvas.paper()
    for index, align in ((0, "left"), (-1, "right")):
        x = 86 if index == 0 else 300
        run = found[index][0]
        drawing.text(
            paper,
            x,
            canvas.height - 8,
            drawing.short(run.ended[:16].replace("T", " ") or run.path.stem, 18),
            "muted",
            9,
            ha=align,
        )
    title = f"{entry['model']} x {entry['method']} on {report.timed_on(entry)}"
    words = "; ".join(f"{report.run_label(run)}: {report.summary(then, run)}" for run, then in found)
    return canvas.picture("history", title, f"From run to run. {words}.")


def _speedup_of(run: Run, then: Entry) -> float | None:
    found = report.faster(then, report.baseline_of(then, run.entries))
    return found.ratio if found and then["method"] != BASELINE else None
