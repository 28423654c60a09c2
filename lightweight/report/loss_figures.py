"""What became of the loss? Curves over steps and seconds, and what several seeds say of a method's quality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lightweight.record import Entry, baseline_of
from lightweight.report import drawing, words
from lightweight.report.drawing import LIGHT, WIDTH, Canvas, Picture
from lightweight.report.studies import SAME_BUT_SEED
from lightweight.verdict import noninferiority
from lightweight.verdict.noninferiority import SAME_JOB, Estimate, Quality
from lightweight.verdict.seeds import over_seeds

POINTS = 400
"""Points a curve is drawn with at most; a longer one is averaged into as many."""


def loss(key: str, entry: Entry, group: Sequence[Entry], entries: Sequence[Entry]) -> Picture:
    """Training loss of a method over its baseline's: against steps above, against seconds below."""
    baseline = baseline_of(entry, group)
    shown = [entry] if baseline is None or baseline is entry else [baseline, entry]
    seeds = {id(e): _seeds(e, group) for e in shown}
    several = len(seeds[id(entry)]) > 1
    name = words.method_among(entry, group) if several else words.name_among(entry, group)
    title = f"{entry.model} on {words.timed_on(entry)}: {name}" + " over baseline" * (len(shown) > 1)
    summary = f"Loss against step and seconds. {'; '.join(words.headline(e) for e in shown)}"
    if several:
        of_seeds = f"Mean of {len(seeds[id(entry)])} seeds with its 95 % t-interval as a band; of the first seed"
        summary = f"Loss against step and seconds. {of_seeds}: {'; '.join(words.headline(e) for e in shown)}"
    ended = [e for e in shown if e.outcome != "completed"]
    if not any(e.train_loss for e in shown):
        canvas = Canvas(key, 10 + 18 * len(ended), shown, entries)
        paper = canvas.paper()
        for line, e in enumerate(ended):
            canvas.of(e, *_crossed(paper, 14, 14 + 18 * line, e))
        return canvas.picture("loss", title, summary)
    canvas = Canvas(key, 350, shown, entries)
    above, below = (canvas.axes(30, top, 236, 118) for top in (20, 200))
    paper = canvas.paper()
    curves = [_Curve.of(e, "blue" if e is entry else "muted", seeds[id(e)]) for e in shown]
    curves = [curve for curve in curves if curve.losses]
    ends = [value for curve in curves for value in (*curve.losses, *curve.low, *curve.high, *curve.heldout)]
    heights = [value for value in ends if value is not None and math.isfinite(value)]
    for axes, in_seconds in ((above, False), (below, True)):
        labels = [_drawn_curve(canvas, axes, curve, in_seconds=in_seconds) for curve in curves]
        axes.set_xlim(0, max([0.0, *(curve.over(in_seconds)[-1] for curve in curves)]) or 1)
        if heights:
            room = (max(heights) - min(heights)) * 0.06 or 0.1
            above_curves = (max(heights) - min(heights) + 2 * room) * 0.15 * len(ended)  # where crosses stand
            axes.set_ylim(min(heights) - room, max(heights) + room + above_curves)
        drawing.plain(axes)
        for e, place, label, colour in drawing.apart(axes, labels, gap=25):
            canvas.of(e, drawing.text(axes, 1.04, place, label, colour, 9.5, transform=axes.transAxes, va="center"))
        for line, e in enumerate(ended):
            canvas.of(e, *_crossed(paper, 40, (27 if axes is above else 207) + 15 * line, e))
    above.set_xlabel("optimizer step", loc="left")
    below.set_xlabel("seconds of training", loc="left")
    for axes, label in ((above, "loss against step"), (below, "loss against seconds")):
        drawing.text(axes, 0, 1.07, label, "ink", 10, transform=axes.transAxes, weight="bold")
    if any(_heldout(e) for e in shown):
        paper.plot([277], [342], "o", markersize=4.5, markerfacecolor="none", markeredgecolor=LIGHT["muted"])
        drawing.text(paper, 284, 345.5, "held-out loss", "muted", 9.5)
    return canvas.picture("loss", title, summary)


@dataclass(frozen=True)
class _Curve:
    """A cell's losses, one an optimizer step, nan for one that is not finite; the steps and the seconds since training
    began at which they were; and the role whose colour it is drawn in, `muted` for a baseline below another. Of several
    seeds losses and seconds are means, and `low` and `high` the ends of their interval at every step, of losses that
    are themselves means of an epoch; of one seed they are empty."""

    entry: Entry
    seeds: Sequence[Entry]
    colour: str
    losses: Sequence[float]
    steps: Sequence[float]
    seconds: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()

    @classmethod
    def of(cls, entry: Entry, colour: str, seeds: Sequence[Entry]) -> _Curve:
        """The curve of `entry`, or where there are several of its `seeds`, theirs."""
        every = [cls._of_one(one, colour) for one in (seeds if len(seeds) > 1 else [entry])]
        first = every[0]
        if len(every) == 1:
            return first
        smooth = [_smooth(curve.losses, entry.steps_per_epoch or 1) for curve in every]
        band = [over_seeds(at_step) for at_step in zip(*smooth, strict=True)]
        losses, seconds = (
            [fmean(at_step) for at_step in zip(*of, strict=True)]
            for of in ([curve.losses for curve in every], [curve.seconds for curve in every])
        )
        low, high = [of_step.low for of_step in band], [of_step.high for of_step in band]
        return cls(entry, seeds, colour, losses, first.steps, seconds, low, high)

    @classmethod
    def _of_one(cls, entry: Entry, colour: str) -> _Curve:
        losses = [math.nan if value is None else float(value) for value in entry.train_loss or ()]
        seconds = list(accumulate(value or 0.0 for value in entry.step_seconds or ()))
        count = min(len(losses), len(seconds)) if seconds else len(losses)
        steps = [float(step) for step in range(1, count + 1)]
        return cls(entry, [entry], colour, losses[:count], steps, seconds[:count] or [0.0] * count)

    @property
    def heldout(self) -> tuple[float | None, float | None]:
        """Held-out loss before and after training, the mean of the seeds where there are several."""
        before, after = (
            [getattr(seed, key) for seed in self.seeds] for key in ("heldout_loss_before", "heldout_loss_after")
        )
        return _mean(before), _mean(after)

    def over(self, in_seconds: bool) -> Sequence[float]:
        """Where its losses are."""
        return self.seconds if in_seconds else self.steps


def _drawn_curve(canvas: Canvas, axes: Axes, curve: _Curve, *, in_seconds: bool) -> tuple[float, Entry, str, str]:
    """Draw the losses as they are, their mean over an epoch, and what is held out; the label for `drawing.apart`."""
    e, x, colour = curve.entry, curve.over(in_seconds), LIGHT[curve.colour]
    is_baseline = curve.colour == "muted"
    if curve.low:
        at, low = _thinned(x, curve.low)
        raw: list[Any] = [axes.fill_between(at, low, _thinned(x, curve.high)[1], color=colour, alpha=0.2, linewidth=0)]
    else:
        raw = axes.plot(*_thinned(x, curve.losses), color=colour, linewidth=0.7, alpha=0.4)
    mean = axes.plot(
        *_thinned(x, _smooth(curve.losses, e.steps_per_epoch or 1)),
        color=colour,
        linewidth=1.9,
        linestyle=(0, (3, 1.6)) if is_baseline else "-",
        zorder=4 if is_baseline else 3,  # dashes leave what is under them to be seen
    )
    canvas.of(e, *raw, *mean)
    before, after = curve.heldout
    points = [(at, value) for at, value in ((0.0, before), (x[-1], after)) if value is not None]
    if points:
        dots = axes.plot(
            *zip(*points, strict=True),
            linestyle="none",
            marker="o",
            markersize=4.5,
            markerfacecolor=LIGHT["paper"],
            markeredgecolor=colour,
            clip_on=False,
            zorder=5,
        )
        canvas.of(e, *dots)
    last = after if after is not None else _last(curve.losses)
    label = f"{x[-1]:.1f} s" if in_seconds else f"{last:.2f}"
    return last, e, f"{drawing.short(e.method, 17)}\n{label}", curve.colour


def _seeds(entry: Entry, group: Sequence[Entry]) -> list[Entry]:
    """The trials of `group` that are `entry` with another seed, and it, where all completed their steps; else none."""
    same = [other for other in group if SAME_BUT_SEED.holds(other, entry) and other.outcome == "completed"]
    whole = all(len(other.train_loss or ()) == len(entry.train_loss or ()) for other in same)
    timed = all(len(other.step_seconds or ()) == len(other.train_loss or ()) for other in same)
    return same if whole and timed and any(other is entry for other in same) else []


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _crossed(paper: Axes, x: float, y: float, entry: Entry) -> list[Any]:
    """A cross, and how the cell ended."""
    cross = paper.plot(x, y, "x", color=LIGHT["fail"], markersize=7, markeredgewidth=2)
    label = f"{drawing.short(entry.method, 18)}: {words.outcome(entry)}"
    return [*cross, drawing.text(paper, x + 9, y + 3.5, label, "fail", 9.5)]


def _heldout(entry: Entry) -> list[float]:
    return [loss for loss in (entry.heldout_loss_before, entry.heldout_loss_after) if loss is not None]


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


def qualities(entries: Sequence[Entry]) -> list[Picture]:
    """Two pictures of what several seeds gave: held-out loss over the baseline's with the margin, and what was
    forgotten."""
    jobs: dict[tuple[Any, ...], list[Quality]] = {}
    for quality in noninferiority.qualities(entries):
        jobs.setdefault(SAME_JOB.of(quality.entries[0]), []).append(quality)
    pictures = []
    for number, alike in enumerate(jobs.values()):
        place = f"{alike[0].model} on {words.timed_on(alike[0].entries[0])}"
        against = [quality for quality in alike if quality.conclusion is not None]
        if against:
            rows = [_Estimated(quality, quality.difference, quality.conclusion or "") for quality in against]
            title = f"{place}: held-out loss over baseline"
            pictures.append(_estimates(f"no-worse-{number}", title, rows, noninferiority.MARGIN, entries))
        if any(quality.forgotten for quality in alike):
            rows = [_Estimated(quality, quality.forgotten, "") for quality in alike]
            pictures.append(_estimates(f"forgotten-{number}", f"{place}: forgotten elsewhere", rows, None, entries))
    return pictures


@dataclass(frozen=True)
class _Estimated:
    """A method, what is shown of it in nats a token, and what is concluded, empty where that is nothing."""

    of: Quality
    estimate: Estimate | None
    conclusion: str

    @property
    def failed(self) -> bool:
        return bool(self.of.failed) or self.conclusion == "worse"

    @property
    def text(self) -> str:
        ended = [entry.outcome.replace("_", " ") for entry in self.of.entries if entry.outcome != "completed"]
        if ended:
            return f"{len(ended)} of {len(self.of.entries)} {ended[0]}"
        parts = [*([str(self.estimate)] if self.estimate else []), *([self.conclusion] if self.conclusion else [])]
        return ", ".join(parts) or "no losses"


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
        said = drawing.text(paper, right, top + y + 13, cross + row.text, colour, 9.5, ha="right")
        marks: list[Any] = []
        if row.estimate:
            of = LIGHT["fail" if row.failed else "blue"]
            shown = [min(max(end, min(ends) - room), max(ends) + room) for end in (row.estimate.low, row.estimate.high)]
            face = "none" if row.conclusion == "inconclusive" else of
            marks += axes.plot(shown, [y + 26] * 2, color=of, linewidth=4, alpha=0.45, solid_capstyle="butt")
            marks += axes.plot(
                *(row.estimate.mean, y + 26, "X" if row.failed else "o"),
                markersize=7,
                color=of,
                markerfacecolor=face,
                markeredgewidth=1.6,
            )
        else:
            marks += drawing.cross(axes, 0.01, y + 26, transform=axes.get_yaxis_transform())
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
    drawing.without_heights(axes)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.3g}" if value else "0"))
    drawing.text(paper, right, bottom + 28, "nats a token", "muted", 9.5, ha="right")
    caption = "; ".join(f"{row.of.method} {row.text}" for row in rows)
    limit = "" if margin is None else f" No worse where the whole interval is below {margin:+g}."
    return canvas.picture("no-worse", title, f"In nats a token, with 90 % intervals over seeds. {caption}.{limit}")
