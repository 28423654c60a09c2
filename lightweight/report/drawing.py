"""How a picture is drawn: matplotlib's figure becomes an `<svg>` element that a page can take in.

A picture is as wide as a phone (360 units) and a page lays several side by side. It needs no script: text stays text,
colours are names that the page gives a value in light and dark, and whatever belongs to a cell is a link to its record.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from lightweight.record import Entry, one_line
from lightweight.report.words import headline

WIDTH = 360
"""Of every picture, in the units in which its text is 9 to 11 high."""

COLOURS = {
    "paper": ("#ffffff", "#16191d"),
    "ink": ("#1c2127", "#e8eaed"),
    "muted": ("#59636e", "#a3adb8"),
    "rule": ("#d5dae0", "#3a424b"),
    "blue": ("#0067a8", "#5ab4f0"),
    "fail": ("#c23b00", "#ff8f57"),
}
"""By role, in light and in dark. Text and marks have a contrast of at least 4.5 to 1 with the paper of their theme."""

CAUSES = {
    "weights": ("#0072b2", "#2f8fd0"),
    "quantization state": ("#7cc4ee", "#9ad4f7"),
    "gradients": ("#cc79a7", "#d98fb8"),
    "optimizer": ("#882255", "#a98be0"),
    "activations": ("#009e73", "#1fb48a"),
    "logits": ("#e69f00", "#f2b530"),
    "gathered": ("#f0e442", "#f5ec6e"),
    "workspace": ("#8b949e", "#7d8691"),
}
"""Okabe and Ito's colours, which the colour-blind tell apart, but for their vermilion, which is what failed: a wine of
Paul Tol's instead, and in dark a violet. Each segment also has an edge."""

LIGHT = {role: light for role, (light, _) in (COLOURS | CAUSES).items()}

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"

STYLE: dict[Any, Any] = {
    "axes.edgecolor": LIGHT["muted"],
    "axes.facecolor": "none",
    "axes.labelcolor": LIGHT["muted"],
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 72,
    "font.size": 10.5,
    "lines.solid_capstyle": "round",
    "path.simplify_threshold": 0.2,
    "svg.fonttype": "none",
    "text.color": LIGHT["ink"],
    "text.parse_math": False,  # a model's name may have dollar signs
    "xtick.color": LIGHT["muted"],
    "xtick.labelsize": 9.5,
    "xtick.major.size": 3,
    "ytick.color": LIGHT["muted"],
    "ytick.labelsize": 9.5,
    "ytick.major.size": 0,
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One drawing. `key` is its id, `table` the key of the table that says the same, `model` whose it is, `title` and
    `summary` what it shows, `svg` an `<svg>` element, `entries` the trials in it."""

    key: str
    table: str
    model: str
    title: str
    summary: str
    svg: str
    entries: Sequence[Entry]

    @property
    def kind(self) -> str:
        """What it is one of several of: the table's key without the number that a ladder has."""
        return kind(self.table)


def kind(table: str) -> str:
    """The key of a table without its number."""
    return re.sub(r"-\d+$", "", table)


class Canvas:
    """A figure in units from the top left, and the cells that things drawn on it belong to."""

    def __init__(self, key: str, height: float, entries: Sequence[Entry], all_entries: Sequence[Entry]) -> None:
        self.key, self.height, self.entries = key, height, entries
        self.figure = Figure(figsize=(WIDTH / 72, height / 72), facecolor="none")
        self._number = {id(entry): number for number, entry in enumerate(all_entries)}

    def axes(self, left: float, top: float, width: float, height: float, **more: Any) -> Axes:
        """Axes whose frame is there; distances from the left and the top."""
        bottom = self.height - top - height
        rectangle = (left / WIDTH, bottom / self.height, width / WIDTH, height / self.height)
        return self.figure.add_axes(rectangle, **more)

    def paper(self) -> Axes:
        """Axes over everything in the figure's own units, y downwards, without a frame."""
        axes = self.axes(0, 0, WIDTH, self.height)
        axes.set_xlim(0, WIDTH)
        axes.set_ylim(self.height, 0)
        axes.set_axis_off()
        return axes

    def of(self, entry: Entry | None, *artists: Any) -> None:
        """Say that `artists` belong to a cell."""
        if entry is not None:
            for artist in artists:
                artist.set_gid(f"cell:{self._number[id(entry)]}")

    def picture(self, table: str, title: str, summary: str, model: str | None = None) -> Picture:
        """The finished drawing; its model is that of its entries where it has any."""
        labels = {f"cell:{self._number[id(entry)]}": headline(entry) for entry in self.entries}
        summary = f"{title}. {summary}"
        return Picture(
            key=self.key,
            table=table,
            model=model or self.entries[0].model,
            title=title,
            summary=summary,
            svg=_svg(self.figure, self.key, summary, labels),
            entries=self.entries,
        )


@contextmanager
def style() -> Iterator[None]:
    """matplotlib as every picture is drawn with it, while this lasts."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # the browser has the glyphs that matplotlib's own font, with which it only measures, lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support", category=UserWarning)
        yield


def short(label: str, length: int) -> str:
    """`label`, its end cut where it is longer than there is room for."""
    label = one_line(label)
    return label if len(label) <= length else label[: length - 1] + "…"


def text(axes: Axes, x: float, y: float, label: str, colour: str, size: float, **more: Any) -> Any:
    """`label` at a point of `axes`, in a role's colour, `size` of the picture's units high; the artist."""
    cleaned = "\n".join(one_line(line) for line in label.split("\n"))
    return axes.text(x, y, cleaned, color=LIGHT[colour], fontsize=size, linespacing=1.15, **more)


def cross(axes: Axes, x: float, y: float, **more: Any) -> list[Any]:
    """The mark of what did not complete."""
    return list(axes.plot(x, y, "x", color=LIGHT["fail"], markersize=8, markeredgewidth=2.2, **more))


def without_heights(axes: Axes) -> None:
    """Nothing on the left: rows have names instead."""
    axes.yaxis.set_major_locator(NullLocator())
    axes.spines["left"].set_visible(False)


def plain(axes: Axes) -> None:
    """Few ticks, and lines across at them."""
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    if len(axes.get_yticks()):
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y", color=LIGHT["rule"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)


def apart(
    axes: Axes, labels: Iterable[tuple[float, Entry, str, str]], gap: float
) -> Iterator[tuple[Entry, float, str, str]]:
    """Labels at the heights of what they name, in shares of the axes, and at least `gap` units from each other."""
    low, high = axes.get_ylim()
    tall = axes.bbox.height
    wanted = sorted(labels, key=lambda label: label[0])
    places = [(height - low) / (high - low) * tall for height, *_ in wanted]
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + gap)
    over = max(0.0, places[-1] - tall) if places else 0.0
    for place, (_, entry, label, colour) in zip(places, wanted, strict=True):
        yield entry, (place - over) / tall, label, colour


def _svg(figure: Figure, key: str, summary: str, labels: Mapping[str, str]) -> str:
    """The figure as an `<svg>` element that can stand in a page beside others. `labels` has the words for each cell."""
    written = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": key}):
        FigureCanvasSVG(figure).print_svg(written, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    ElementTree.register_namespace("", SVG)
    root = ElementTree.fromstring(written.getvalue())  # noqa: S314  matplotlib wrote it
    linked = {value for node in root.iter() for name, value in node.attrib.items() if name == f"{{{XLINK}}}href"}
    linked |= {f"#{name}" for node in root.iter() for name in re.findall(r"url\(#(.+?)\)", node.get("clip-path", ""))}
    for parent in root.iter():
        for node in [node for node in parent if node.tag.rpartition("}")[2] in ("metadata", "title", "style")]:
            parent.remove(node)
    for node in root.iter():
        name = node.attrib.pop("id", None)
        if name is not None and name in labels:
            node.tag = f"{{{SVG}}}a"
            number = name.partition(":")[2]
            node.attrib |= {"class": "mark", "data-cell": number, "href": f"#record-{number}", "tabindex": "-1"}
            title = ElementTree.Element(f"{{{SVG}}}title")
            title.text = one_line(labels[name])
            node.insert(0, title)
        elif f"#{name}" in linked:
            node.set("id", f"{key}-{name}")
        for attribute in (f"{{{XLINK}}}href", "clip-path"):
            if attribute in node.attrib and "#" in node.attrib[attribute] and "data-cell" not in node.attrib:
                node.set(attribute.rpartition("}")[2], node.attrib.pop(attribute).replace("#", f"#{key}-"))
        if style := node.get("style"):
            node.set("style", _themed(style))
    for node in root.iter():  # smaller by a third without line breaks and digits that nobody sees
        node.text, node.tail = (None if text is None or not text.strip() else text for text in (node.text, node.tail))
        node.attrib |= {k: _rounded(v) for k, v in node.attrib.items() if k in ("d", "x", "y", "transform")}
        if node.get("transform", "").startswith("rotate(-0"):
            del node.attrib["transform"]
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": one_line(summary)}
    return ElementTree.tostring(root, encoding="unicode")


ROLES = {light: role.replace(" ", "-") for role, light in LIGHT.items()}


def _rounded(numbers: str) -> str:
    short = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.1f}".removesuffix(".0"), numbers)
    return re.sub(r"\s+", " ", short).strip()


def _themed(style: str) -> str:
    """`style` with the colours of the light theme as the names that stand for them in either, and the page's font."""
    style = re.sub(r"#[0-9a-f]{6}", lambda match: f"var(--{ROLES[match[0]]})" if match[0] in ROLES else match[0], style)
    style = re.sub(
        r"font: (?:(\w+) )?([\d.]+px) [^;]+", lambda f: f"font-size: {f[2]}; font-weight: {f[1] or 400}", style
    )
    return re.sub(r"font-family: [^;]+;?", "", style)


def standalone(picture: Picture) -> str:
    """The picture as a file of its own, in the viewer's theme."""
    light, dark = (
        "; ".join(f"--{role.replace(' ', '-')}: {pair[theme]}" for role, pair in (COLOURS | CAUSES).items())
        for theme in (0, 1)
    )
    rules = (
        f":root {{ {light}; font-family: system-ui, sans-serif; stroke-linejoin: round; }} "
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    )
    high = re.search(r'viewBox="0 0 \d+ (\d+)', picture.svg)
    size = f' width="{WIDTH}" height="{high[1]}"' if high else ""
    start = picture.svg.index(">")
    ground = '<rect width="100%" height="100%" style="fill: var(--paper)"/>'
    return f"{picture.svg[:start]}{size}><style>{rules}</style>{ground}{picture.svg[start + 1 :]}\n"
