"""How long is what was trained on? Examples by their tokens, and what a row holds of them."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.ticker import NullLocator

from lightweight.record import Entry
from lightweight.report import drawing, select
from lightweight.report.drawing import LIGHT, WIDTH, Canvas, Picture


def lengths(key: str, entry: Entry, entries: Sequence[Entry]) -> Picture:
    """Examples of a corpus by their tokens: filled where they fit into a row, hollow where they do not."""
    counted = select.lengths_of(entry)
    row = entry.max_length
    top, high, left = 24, 110, 30
    canvas = Canvas(key, top + high + 34, [entry], entries)
    axes = canvas.axes(left, top, WIDTH - left - 10, high)
    for place, (bound, count) in enumerate(counted):
        fits = row is None or bound <= row
        bars = axes.bar(
            place, count, width=0.84, facecolor=LIGHT["blue"] if fits else "none", edgecolor=LIGHT["blue"], linewidth=1
        )
        canvas.of(entry, *bars)
    axes.set_xlim(-0.6, len(counted) - 0.4)
    drawing.plain(axes)
    axes.xaxis.set_major_locator(NullLocator())
    every = -(-len(counted) // 8)
    for place, (bound, _) in enumerate(counted[::every]):
        at = place * every
        label = f"{bound:,}"
        drawing.text(axes, at, -0.1, label, "muted", 9, transform=axes.get_xaxis_transform(), ha="center", va="top")
    paper = canvas.paper()
    of = "" if row is None else f", rows of {row:,}"
    drawing.text(paper, 8, 13, f"examples by tokens, up to{of}", "ink", 10, weight="bold")
    total = sum(count for _, count in counted)
    longer = sum(count for bound, count in counted if row is not None and bound > row)
    summary = f"{total:,} examples, {longer:,} of them in bars that reach beyond a row"
    return canvas.picture("data", f"{entry.model}: how long examples are", summary)
