"""How fast, since which change, and is it still? Speedups with their intervals, ladders, and runs over time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from lightweight.record import BASELINE, Entry, Run, baseline_of
from lightweight.report import drawing, select, speed, speed_tables, words
from lightweight.report.drawing import LIGHT, WIDTH, Canvas, Picture
from lightweight.targets import GiB


def speedups(key: str, shown: Sequence[Entry], group: Sequence[Entry], entries: Sequence[Entry]) -> Picture:
    """Times as fast as the baseline: with the interval where it was measured in pairs of rounds, and of several seeds
    the mean with the least and the most."""
    top, of_row, left, right = 6, 36, 8, WIDTH - 8
    bottom = top + of_row * len(shown)
    canvas = Canvas(key, bottom + 46, shown, entries)
    axes = canvas.axes(left + 6, top, right - left - 12, bottom - top)
    paper = canvas.paper()
    reach = [1.0]
    parts: list[str] = []
    for number, entry in enumerate(shown):
        y = of_row * number
        failed = entry.outcome != "completed"
        named = words.name_among(entry, group) if failed else words.method_among(entry, group)
        row = _Faster.of(entry, group, entries)
        parts.append(f"{named} {row.text.removeprefix('✕ ')}")
        name = drawing.text(paper, left, top + y + 13, drawing.short(named, 24), "ink", 10.5, weight="bold")
        said = drawing.text(paper, right, top + y + 13, row.text, "fail" if failed else "ink", 9.5, ha="right")
        canvas.of(entry, name, said, *_ratio_marks(axes, y + 25, row, failed=failed))
        reach += [*(row.ends or ()), *([] if row.ratio is None else [row.ratio])]
        axes.plot([1, 1], [y + 18, y + 32], color=LIGHT["muted"], linewidth=1.1, solid_capstyle="butt", zorder=0)
    axes.set_xscale("log")
    axes.set_xlim(min(reach) / 1.15, max(reach) * 1.15)
    axes.set_ylim(bottom - top, 0)
    ticks = _ratios(min(reach) / 1.15, max(reach) * 1.15) if len(reach) > 1 else [1.0]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    drawing.without_heights(axes)
    for x, filled, label in ((left, True, "with 95 % interval"), (left + 130, False, "from steady steps")):
        paper.plot(
            x + 5,
            bottom + 36,
            "o",
            markersize=6,
            color=LIGHT["blue"],
            markerfacecolor=LIGHT["blue"] if filled else "none",
        )
        drawing.text(paper, x + 14, bottom + 39.5, label, "muted", 9.5)
    title = f"{group[0].model} on {words.timed_on(group[0])}"
    return canvas.picture("speedup", title, f"Times as fast as the baseline, per token. {'; '.join(parts)}.")


def _ratio_marks(axes: Axes, y: float, row: _Faster, *, failed: bool) -> list[Any]:
    """The interval as a bar and the ratio on it, or what stands in the place of a ratio."""
    marks: list[Any] = []
    if row.ends:
        marks += axes.plot(row.ends, [y, y], color=LIGHT["blue"], linewidth=4, alpha=0.45)
    if row.ratio is not None:
        face = LIGHT["blue"] if row.is_paired else "none"
        marks += axes.plot(
            *(row.ratio, y, "o"),
            markersize=6.8,
            markeredgewidth=1.8,
            markerfacecolor=face,
            markeredgecolor=LIGHT["blue"],
        )
    elif failed:
        marks += drawing.cross(axes, 0.01, y, transform=axes.get_yaxis_transform())
    else:
        inside = axes.get_yaxis_transform()
        marks += axes.plot(0.01, y, "_", color=LIGHT["muted"], markersize=8, markeredgewidth=2.2, transform=inside)
    return marks


@dataclass(frozen=True, kw_only=True)
class _Faster:
    """What a row of the picture shows: how many times as fast, None where there is no ratio; the ends of its interval,
    or of several seeds, where both are numbers; whether it was measured in pairs of rounds."""

    text: str
    ratio: float | None = None
    ends: tuple[float, float] | None = None
    is_paired: bool = False

    @classmethod
    def of(cls, entry: Entry, group: Sequence[Entry], entries: Sequence[Entry]) -> _Faster:
        """The row of a cell, whose other seeds are in `group`."""
        if entry.outcome != "completed":
            return cls(text=f"✕ {words.outcome(entry)}")
        baseline = select.pace_of(entry, entries)
        gain = speed.pace(select.seeds_of(entry, group), entries)
        if gain is None:
            label = words.speedup(entry, baseline)
            return cls(text="completes" if label == "-" else f"completes; {label}")
        if len(gain.entries) > 1:
            several = f"{gain.ratio:.2f}x, {len(gain.entries)} seeds {gain.low:.2f} to {gain.high:.2f}"
            return cls(text=several, ratio=gain.ratio, ends=(gain.low, gain.high))
        one = speed.faster(entry, baseline)
        ends = one.interval if one and one.interval else None
        drawn = ends if ends and ends[0] > 0 and math.isfinite(ends[1]) else None
        return cls(text=words.speedup(entry, baseline), ratio=gain.ratio, ends=drawn, is_paired=ends is not None)


def _ratios(low: float, high: float) -> list[float]:
    """Round ratios between two others, as many as have room beside each other on a logarithmic axis."""
    gain: list[float] = []
    ends = [0.1**power for power in range(-4, 5)]
    for value in (*ends, *(5 * e for e in ends), *(2 * e for e in ends), *(1 + tenth / 10 for tenth in range(-9, 10))):
        apart = all(abs(math.log(value / other)) > 0.11 * math.log(high / low) for other in gain)
        if low <= value <= high and apart:
            gain.append(value)
    return sorted(gain)


def ladder(number: int, rungs: Sequence[Entry], entries: Sequence[Entry]) -> Picture:
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
        gained = speed.step_ratio(below, rung) if below else None
        label = "" if step is None else f"{step:.1f} ms" + ("" if gained is None else f", {gained:.2f}x")
        failed = rung.outcome != "completed"
        if failed:
            label = f"✕ {words.outcome(rung)}"
        changed = speed_tables.change(below, rung) if below else "the bottom of the ladder"
        drawn = [
            drawing.text(paper, left, top + y + 13, drawing.short(rung.method, 26), "ink", 10.5, weight="bold"),
            drawing.text(paper, right, top + y + 13, label or "no steps", "fail" if failed else "ink", 9.5, ha="right"),
            drawing.text(paper, left, top + y + 25.5, drawing.short(changed, 62), "muted", 9),
        ]
        if index and steps[index - 1]:
            drawn += axes.barh(y + 35, steps[index - 1] or 0, 8, color=LIGHT["rule"])
        if step and not failed:
            drawn += axes.barh(y + 35, step, 8, color=LIGHT["blue"])
        else:
            drawn += drawing.cross(axes, 0.012, y + 35, transform=axes.get_yaxis_transform())
        canvas.of(rung, *drawn)
    drawing.without_heights(axes)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    drawing.text(paper, right, bottom + 25, "ms a step", "muted", 9.5, ha="right")
    table = speed_tables.ladder(rungs, number)
    caption = "; ".join(" ".join(row[:1]) + f" {row[3]}, {row[2]}" for row in table.rows)
    title = f"{rungs[0].model} on {words.timed_on(rungs[0])}: {rungs[0].method} to {rungs[-1].method}"
    return canvas.picture(table.key, title, f"Milliseconds a step, one change after the other. {caption}.")


def _step_ms(rung: Entry) -> float | None:
    return None if rung.steady_step_seconds is None else rung.steady_step_seconds * 1000


def histories(runs: Sequence[Run], entries: Sequence[Entry]) -> list[Picture]:
    """A picture for each cell that more than one run has: step, speedup, memory and loss from run to run."""
    shown = [e for e in entries if select.is_card(e.target) and len(select.trend(e, runs)) > 1]
    return [_history(f"history-{number}", entry, runs, entries) for number, entry in enumerate(shown)]


def _history(key: str, entry: Entry, runs: Sequence[Run], entries: Sequence[Entry]) -> Picture:
    trend = select.trend(entry, runs)
    lines = _lines(trend)
    of_row, top = 62, 8
    canvas = Canvas(key, top + of_row * len(lines) + 26, [entry], entries)
    failed = [index for index, (_, then) in enumerate(trend) if then.outcome != "completed"]
    for row, line in enumerate(lines):
        axes = canvas.axes(86, top + of_row * row + 10, 214, of_row - 22)
        canvas.of(entry, *_drawn_line(axes, line))
        for index in failed:
            canvas.of(entry, *drawing.cross(axes, index, 0.5, transform=axes.get_xaxis_transform(), clip_on=False))
        axes.set_xlim(-0.15, len(trend) - 0.85)
        axes.xaxis.set_major_locator(FixedLocator(range(len(trend))))
        axes.set_xticklabels([])
        drawing.without_heights(axes)
        drawing.text(axes, -0.04, 0.55, line.name, "ink", 9.5, transform=axes.transAxes, ha="right")
    paper = canvas.paper()
    for x, align, (run, _) in ((86, "left", trend[0]), (300, "right", trend[-1])):
        label = drawing.short(run.ended[:16].replace("T", " ") or run.path.stem, 18)
        drawing.text(paper, x, canvas.height - 8, label, "muted", 9, ha=align)
    title = f"{entry.model} x {entry.method} on {words.timed_on(entry)}"
    caption = "; ".join(f"{words.run_label(run)}: {words.summary(then, run)}" for run, then in trend)
    return canvas.picture("history", title, f"From run to run. {caption}.")


@dataclass(frozen=True)
class _Line:
    """Something measured in every run, None where a run did not complete or has no such value; `form` writes it."""

    name: str
    form: str
    values: Sequence[float | None]


def _lines(trend: Sequence[tuple[Run, Entry]]) -> list[_Line]:
    """What any of the runs has a value of; where there is none, one line of nothing for the crosses."""
    completed = [(run, then) if then.outcome == "completed" else None for run, then in trend]
    measures: list[tuple[str, str, Callable[[Run, Entry], float | None]]] = [
        ("ms a step", "{:.1f}", lambda _, then: _step_ms(then)),
        ("times as fast", "{:.2f}", _speedup_of),
        ("peak GiB", "{:.2f}", lambda _, then: (then.peak_allocated_bytes or 0) / GiB or None),
        ("held-out loss", "{:.3f}", lambda _, then: then.heldout_loss_after),
    ]
    lines = [_Line(name, form, [of and measure(*of) for of in completed]) for name, form, measure in measures]
    known = [line for line in lines if any(value is not None for value in line.values)]
    return known or [_Line("outcome", "", [None] * len(trend))]


def _drawn_line(axes: Axes, line: _Line) -> list[Any]:
    """The line, which breaks where a run has no value, with its last value and the change since the first."""
    known = [value for value in line.values if value is not None]
    if not known:
        return []
    drawn = axes.plot(
        range(len(line.values)),
        [math.nan if value is None else value for value in line.values],
        color=LIGHT["blue"],
        marker="o",
        markersize=4,
        linewidth=1.6,
        clip_on=False,
    )
    first, last = known[0], known[-1]
    room = max((max(known) - min(known)) * 0.15, abs(max(known)) * 0.02, 1e-9)
    axes.set_ylim(min(known) - room, max(known) + room)
    y = (last - axes.get_ylim()[0]) / (axes.get_ylim()[1] - axes.get_ylim()[0])
    inside: dict[str, Any] = {"transform": axes.transAxes}
    drawing.text(axes, 1.05, y, line.form.format(last), "blue", 9.5, va="center", weight="bold", **inside)
    if len(known) > 1 and first:
        drawing.text(axes, -0.04, 0.1, f"{last / first - 1:+.1%}", "muted", 9.5, ha="right", **inside)
    return list(drawn)


def _speedup_of(run: Run, then: Entry) -> float | None:
    gain = speed.faster(then, baseline_of(then, run.entries))
    return gain.ratio if gain and then.method != BASELINE else None
