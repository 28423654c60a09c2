"""One HTML file from saved runs: the answer in sentences, then pictures, tables, and every cell's whole record.

It opens from disk and asks the network for nothing, which its own content security policy also forbids. What comes from
a record is text wherever it stands: jinja2 escapes it, and only the pictures and the page's own style and script, which
hold no such text unescaped, are let through.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from lightweight import __version__
from lightweight.record import Entry, Run, as_json, readable
from lightweight.report import drawing, figures, select, tables, words
from lightweight.report.drawing import Picture
from lightweight.report.findings import findings
from lightweight.report.text_table import Table

SECTIONS = {
    "loss": "Each method over its baseline. Thin: every step; thick: the mean of an epoch around it.",
    "data": "Examples by their tokens, before anything is cut. Filled: they fit into a row. Hollow: not all do.",
    "no-worse": "Means over seeds and their 90 % intervals: held-out loss over the baseline's of the same seed, and "
    "how much the loss on plain English from elsewhere rose in training.",
    "memory": "Upper bar: the forecast, by cause. Lower bar: what was measured. Upright line: what the target has.",
    "speedup": "Per token, against the same model's baseline on the same device.",
    "ladder": "One change after the other. Grey is the rung before.",
    "frontier": "Filled: it was trained there. Hollow: a forecast.",
    "history": "The same cell from run to run, the oldest first. A cross is a run in which it did not complete.",
}
"""What to know before looking at the pictures of a table."""

NAMES = {
    "results": "Cells",
    "seeds": "Over seeds",
    "data": "Data",
    "no-worse": "No worse?",
    "task": "Task",
    "others": "Other trials",
}
"""What a table is called in the page's list of parts, where not as its key."""


def html(runs: Sequence[Run]) -> str:
    """The report of `runs` as one HTML document."""
    entries = select.newest(runs)
    number = {id(entry): index for index, entry in enumerate(entries)}
    pictures = figures.pictures(runs)
    style, script = (_own(name) for name in ("page.css", "page.js"))
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else readable(str(value)),
    )
    return environment.from_string(_own("page.html")).render(
        answer=findings(runs),
        runs=sorted(runs, key=lambda run: run.ended),
        run_label=words.run_label,
        conditions=words.notes(entries, runs),
        sections=[_section(table, pictures, number) for table in tables.tables(runs)],
        records=[_record(index, entry, pictures) for index, entry in enumerate(entries)],
        choices={
            key: list(dict.fromkeys(getattr(entry, key) for entry in entries)) for key in ("model", "method", "outcome")
        },
        colours={role.replace(" ", "-"): pair for role, pair in (drawing.COLOURS | drawing.CAUSES).items()},
        style=Markup(style),  # noqa: S704  a file of ours
        script=Markup(script),  # noqa: S704  a file of ours
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=__version__,
    )


def _own(name: str) -> str:
    return files("lightweight.report").joinpath(name).read_text("utf-8")


def _section(table: Table, pictures: Sequence[Picture], number: dict[int, int]) -> dict[str, Any]:
    """A table and the pictures that say the same, the rows with the number of the cell they are of."""
    rows = []
    for row, entry in zip(table.rows, table.entries, strict=True):
        cell = None if entry is None or table.key == "frontier" else number[id(entry)]
        of_entry = [picture for picture in pictures if entry is not None and any(e is entry for e in picture.entries)]
        shown = list({picture.table: picture for picture in reversed(of_entry)}.values())[
            ::-1
        ]  # of each kind the first
        rows.append({"texts": row, "cell": cell, "failed": cell is not None and _failed(entry), "pictures": shown})
    return {
        "key": table.key,
        "title": table.title,
        "name": NAMES.get(table.key)
        or re.sub(r"-(\d+)", lambda match: f" {int(match[1]) + 1}", table.key).capitalize(),
        "about": SECTIONS.get(drawing.kind(table.key)),
        "columns": table.columns,
        "aligned": table.aligned,
        "rows": rows,
        "notes": table.notes if table.key != "results" else [],
        "pictures": [
            {"it": picture, "svg": Markup(picture.svg), "cells": [number[id(entry)] for entry in picture.entries]}  # noqa: S704  ours
            for picture in pictures
            if picture.table == table.key
        ],
    }


def _failed(entry: Entry | None) -> bool:
    return entry is not None and entry.outcome != "completed"


def _record(index: int, entry: Entry, pictures: Sequence[Picture]) -> dict[str, Any]:
    """Everything that was stored of one trial."""
    return {
        "index": index,
        "entry": entry,
        "headline": words.headline(entry),
        "failed": _failed(entry),
        "pictures": [picture for picture in pictures if any(e is entry for e in picture.entries)],
        "values": {key: _value(value) for key, value in (entry.stored or as_json(entry)).items()},
    }


def _value(value: Any) -> str:
    """A value of the record as text: numbers in a list on lines of their own would be a page long."""
    if isinstance(value, str):
        return value
    flat = isinstance(value, list) or value is None or not isinstance(value, dict)
    return json.dumps(value, ensure_ascii=False, indent=None if flat else 1)
