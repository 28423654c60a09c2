"""What a person reads: sentences first, then tables, from saved runs; out-of-memory cells are rows like any other.

Every table is made once, as text in rows and columns, and shown on a terminal, in markdown, or on a page (page.py).
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from tabulate import tabulate

from lightweight import record, targets
from lightweight.record import (
    BASELINE,
    BASELINE_SHARES,
    SAME_BUT_RANKS,
    SAME_TRIAL,
    Entry,
    ForecastRow,
    Run,
    one_line,
    times_as_fast,
)
from lightweight.targets import GiB, MiB
from lightweight.verdict import noninferiority

TextFormat = Literal["terminal", "markdown"]
Format = Literal["terminal", "markdown", "html"]

COLUMNS = (
    "model",
    "method",
    "card",
    "outcome",
    "total",
    "step",
    "speedup",
    "peak memory",
    "forecast",
    "of baseline",
    "held-out loss",
)

RANDOM, EMULATED, HOST = "[r]", "[e]", "[h]"
"""Marks in the table, each explained below it where it occurs."""

PRODUCTS_A_SECOND = {"H100": 735e12, "H200": 788e12}
"""FLOP/s of an 8192 x 8192 x 8192 bf16 product on random data, measured; by a word of the device's name."""

NO_WORSE_NOTE = (
    "Losses in nats a token, means over seeds. In brackets the two-sided 90 % t-interval over seeds, differences taken "
    f"from the baseline of the same seed; no worse: all of it below the margin of {noninferiority.MARGIN} nats. "
    "Elsewhere: plain English that is not from the corpus; forgotten: how much its loss rose in training."
)


class ReportError(ValueError):
    """A report that cannot be written. The message names the file and the mend, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A sentence of the answer: what it is about, and what was found of it, in parts."""

    about: str = ""
    parts: tuple[str, ...]

    def __str__(self) -> str:
        return one_line(f"{self.about}{': ' if self.about else ''}{'; '.join(self.parts)}.")


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table as text. `key` names it in a file's marks and a page's links, `entries` has what each row is of, None
    where it is of no single trial. `aligned` has one letter a column, `l` or `r`."""

    key: str
    title: str
    columns: Sequence[str]
    aligned: str
    rows: Sequence[Sequence[str]]
    entries: Sequence[Entry | None]
    notes: Sequence[str] = ()

    def text(self, style: TextFormat) -> str:
        """The table with the notes it needs, without its title."""
        rows = [[one_line(cell) for cell in row] for row in self.rows]
        columns = [one_line(column) for column in self.columns]
        if style == "markdown":
            rows = [[_markdown(cell) for cell in row] for row in rows]
            columns = [_markdown(column) for column in columns]
        shown = tabulate(
            rows,
            headers=columns,
            tablefmt="github" if style == "markdown" else "simple",
            disable_numparse=True,
            colalign=["right" if letter == "r" else "left" for letter in self.aligned] if rows else None,
        )
        return ("\n\n" if style == "markdown" else "\n").join([shown, *map(one_line, self.notes)])


def table(entries: Sequence[Entry], style: TextFormat) -> str:
    """All entries as one table, with the notes its marks need. Speedups are per token, over that model's baseline."""
    return results(entries).text(style)


def text(runs: Sequence[Run], style: TextFormat) -> str:
    """The whole report: what was found, then every table. Runs are in any order; of a cell's trials the newest is told
    and older ones are its history."""
    heading = "### {}" if style == "markdown" else "{}:"
    found = [str(finding) for finding in findings(runs)]
    bullet = [f"- {_markdown(line) if style == 'markdown' else line}" for line in found]
    parts = ["\n".join(bullet)]
    parts += [f"{heading.format(one_line(table.title))}\n\n{table.text(style)}" for table in tables(runs)]
    return "\n\n".join(parts)


def tables(runs: Sequence[Run]) -> list[Table]:
    """Every table that has rows, results first."""
    entries = newest(runs)
    told = main_cells(entries)
    elsewhere = [*told, *(rung for ladder in ladders(entries) for rung in ladder), *_peers(entries)]
    others = [entry for entry in entries if not any(entry is cell for cell in elsewhere)]
    made = [
        results(told, among=entries, runs=runs),
        losses(told),
        qualities(entries),
        speedups(told, entries),
        memory_by_cause(told, forecasts(runs)),
        *(ladder(rungs, number) for number, rungs in enumerate(ladders(entries))),
        peers(entries),
        ranks(entries),
        frontier(runs),
        history(runs),
        results(others, key="others", title="Shorter trials, other shapes, and budgets made for a check"),
    ]
    return [table for table in made if table.rows]


# Which trials are told


def newest(runs: Sequence[Run]) -> list[Entry]:
    """The entries of all runs, less those of trials that a newer run has again, in the order in which trials came."""
    by_age = sorted(runs, key=_ended)
    namesakes: dict[tuple[Any, ...], list[tuple[int, Entry]]] = {}
    for age, run in enumerate(by_age):
        for entry in run.entries:
            namesakes.setdefault(_names(entry), []).append((age, entry))
    return [
        entry
        for of in namesakes.values()
        for age, entry in of
        if not any(newer > age and _is_same_trial(entry, other) for newer, other in of)
    ]


def main_cells(entries: Sequence[Entry]) -> list[Entry]:
    """Those of `entries` that say how a method does on a card: of a cell's trials the longest; where its model has been
    trained for an epoch, at least as long or the control of a cell that does not complete; no rung of a ladder, no
    budget made for a check."""
    whole = _on_cards(entries)
    longest: dict[tuple[Any, ...], int] = {}
    for entry in whole:
        longest[_cell(entry)] = max(longest.get(_cell(entry), 0), _planned(entry))
    ended = {(entry["model"], entry["method"]) for entry in whole if entry["outcome"] != "completed"}
    whole_jobs = {entry["model"] for entry in whole if _is_an_epoch(entry)}
    return [
        entry
        for entry in whole
        if _planned(entry) == longest[_cell(entry)]
        and (_is_an_epoch(entry) or entry["model"] not in whole_jobs or (entry["model"], entry["method"]) in ended)
    ]


def _peers(entries: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry.get("shown_as") == "peers"]


def ladders(entries: Sequence[Entry]) -> list[list[Entry]]:
    """The rungs of every ladder, each from its bottom up: entries of one test, model, target and device, in order."""

    def of(entry: Entry) -> tuple[Any, ...]:
        return (
            str(entry.get("test")).partition("[")[0],
            *(entry[key] for key in ("model", "target", "world_size", "device")),
        )

    rungs = [entry for entry in entries if entry.get("shown_as") == "ladder"]
    found = [[entry for entry in rungs if of(entry) == key] for key in dict.fromkeys(map(of, rungs))]
    return [ladder for ladder in found if len(ladder) > 1]


def groups(entries: Sequence[Entry]) -> list[list[Entry]]:
    """The cells of each model on each target of a device, which is what is compared."""
    return record.grouped(entries, BASELINE_SHARES)


def method_among(entry: Entry, group: Sequence[Entry]) -> str:
    """The method, with the beginning of its digest where the group has several methods of that name."""
    digests = {other.get("method_digest") for other in group if other["method"] == entry["method"]} - {None}
    mark = f" #{entry['method_digest'][:6]}" if len(digests) > 1 and entry.get("method_digest") else ""
    return f"{entry['method']}{mark}"


def name_among(entry: Entry, group: Sequence[Entry]) -> str:
    """The method as `method_among` has it, with the seed where the group has several of it."""
    seeds = {other["seed"] for other in group if _method(other) == _method(entry)}
    return method_among(entry, group) + (f", seed {entry['seed']}" if len(seeds) > 1 else "")


def is_card(target: str) -> bool:
    """Whether `target` is a card, an amount of memory or the CPU, not a budget that a test made up."""
    try:
        return target == targets.CPU.name or bool(targets.named(target))
    except ValueError:
        return False


def card(cell: Entry | ForecastRow) -> str:
    """The target of a trial or of a forecast, and how many of it, where that is more than one: `2 x t4`."""
    return _times(cell, str(cell["target"]))


def timed_on(entry: Entry) -> str:
    """The card that ran the trial and gave it its times, and the one whose memory it was given where that is another:
    `NVIDIA H200 as t4`."""
    return _times(entry, str(entry["device"])) + (f" as {entry['target']}" if entry["emulated"] else "")


def _times(cell: Entry | ForecastRow, name: str) -> str:
    count = cell.get("world_size") or cell.get("gpus") or 1
    return name if count == 1 else f"{count} x {name}"


def baseline_of(entry: Entry, entries: Sequence[Entry]) -> Entry | None:
    """The baseline of `entry`'s model on the same target and device; where there are several, the one most alike."""
    found = [e for e in entries if e["method"] == BASELINE and record.are_alike(e, entry, BASELINE_SHARES)]
    alike = ("max_length", "tokens_per_step", "planned_steps", "seed")
    return max(found, key=lambda e: [e.get(key) == entry.get(key) for key in alike], default=None)


def pace_of(entry: Entry, entries: Sequence[Entry]) -> Entry | None:
    """The baseline whose step `entry`'s is held against: the one of its own run where that has one, however short,
    since the same card steps at another pace on another host."""
    own = baseline_of(entry, [other for other in entries if other.get("run") == entry.get("run")])
    return own or baseline_of(entry, entries)


def one_seed(group: Sequence[Entry]) -> list[Entry]:
    """Those of a model's cells on a target that stand for all: a method's first seed, and every cell that failed."""
    first: dict[tuple[Any, ...], Entry] = {}
    for entry in group:
        first.setdefault(_method(entry), entry)
    return [entry for entry in group if entry is first[_method(entry)] or entry["outcome"] != "completed"]


def seeds_of(entry: Entry, group: Sequence[Entry]) -> list[Entry]:
    """Those of `group` that completed with `entry`'s method, a seed each."""
    return [other for other in group if _method(other) == _method(entry) and other["outcome"] == "completed"]


def _ended(run: Run) -> str:
    return run.ended


def _names(entry: Entry) -> tuple[Any, ...]:
    return tuple(entry.get(key) for key in SAME_TRIAL if key != "method_digest")


def _is_same_trial(one: Entry, other: Entry) -> bool:
    return record.are_alike(one, other, SAME_TRIAL)


def _method(entry: Entry) -> tuple[Any, ...]:
    return entry["method"], entry.get("method_digest")


def _cell(entry: Entry) -> tuple[Any, ...]:
    return (*(entry.get(key) for key in (*BASELINE_SHARES, "seed")), *_method(entry))


def _planned(entry: Entry) -> int:
    return entry.get("planned_steps") or 0


def _is_an_epoch(entry: Entry) -> bool:
    return _planned(entry) >= (entry.get("steps_per_epoch") or 1)


def _on_cards(entries: Sequence[Entry]) -> list[Entry]:
    """Those of `entries` that are no rung and no peer and ran on a card, not under a budget that a test made up."""
    rungs = [*(rung for ladder in ladders(entries) for rung in ladder), *_peers(entries)]
    return [entry for entry in entries if not any(entry is rung for rung in rungs) and is_card(entry["target"])]


def forecasts(runs: Sequence[Run]) -> list[ForecastRow]:
    """What was forecast and not trained, once for each model, method and target: of the newest run that has it the
    largest rows."""
    found: dict[tuple[Any, ...], ForecastRow] = {}
    for run in sorted(runs, key=_ended):
        for row in sorted(run.forecasts, key=lambda row: row["max_length"] or 0):
            found[(row["model"], row["method"], card(row))] = row
    return list(found.values())


# What was found, in sentences


def findings(runs: Sequence[Run]) -> list[Finding]:
    """The answer: what fits, what runs out of memory, how many times as fast, and what became of the loss."""
    everything = newest(runs)
    entries = main_cells(everything)
    found = [*_in_all(entries, everything), *_climbed(everything), *_picked(everything), *_no_worse(everything)]
    found += [_about(group, everything) for group in groups(entries)]
    found += [*_agreement(entries), *_forecast_only(runs)]
    if any(entry["weights"] == "random" for entry in entries):
        words = "Weights are random: speed and memory are as with trained ones, and the loss says nothing of quality"
        found.append(Finding(parts=(words,)))
    return found or [Finding(parts=("No trial and no forecast is in these records",))]


def _in_all(entries: Sequence[Entry], everything: Sequence[Entry]) -> list[Finding]:
    """The answer in a sentence, and how many cells ended how."""
    if not entries:
        return []
    outcomes = [entry["outcome"].replace("_", " ") for entry in entries]
    counts = ", ".join(f"{outcomes.count(name)} {name}" for name in sorted(dict.fromkeys(outcomes), key=_badness))
    found = [Finding(about=f"{len(entries)} cell{'s' * (len(entries) > 1)}", parts=(counts,))]
    answer = [*_fastest(entries, everything), *_rescued(entries)]
    return [Finding(parts=tuple(answer)), *found] if answer else found


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How many times as fast as its baseline a method is, over its seeds: the geometric mean, and the least and the
    most of them."""

    entries: Sequence[Entry]
    ratio: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """In words, with the spread where there are several seeds."""
        seeds = len(self.entries)
        spread = f" ({self.low:.1f} to {self.high:.1f} over {seeds} seeds)" if seeds > 1 else ""
        return f"{self.ratio:.1f} times as fast as baseline{spread}"


def pace(of_method: Sequence[Entry], everything: Sequence[Entry]) -> Pace | None:
    """The pace of a method's trials, one a seed; None where none of them has a ratio."""
    known = [(found.ratio, entry) for entry in of_method if (found := faster(entry, pace_of(entry, everything)))]
    if not known:
        return None
    ratios = [ratio for ratio, _ in known]
    return Pace(
        entries=[entry for _, entry in known],
        ratio=math.exp(fmean(map(math.log, ratios))),
        low=min(ratios),
        high=max(ratios),
    )


def _fastest(entries: Sequence[Entry], everything: Sequence[Entry]) -> list[str]:
    """The method that gained most on its baseline, if any did, and whether it was shown to be no worse. Where some were
    shown, the fastest of those: a method that costs quality is no answer."""
    cells = record.grouped(
        (e for e in entries if e["method"] != BASELINE), (*BASELINE_SHARES, "method", "method_digest")
    )
    paces = [found for cell in cells if (found := pace(cell, everything)) and found.ratio > 1]
    verdicts = {id(e): found.verdict for found in noninferiority.compare(everything) for e in found.entries}
    shown = [found for found in paces if verdicts.get(id(found.entries[0])) == "no worse"]
    fastest = max(shown or paces, key=lambda found: found.ratio, default=None)
    if fastest is None:
        return []
    first = fastest.entries[0]
    verdict = verdicts.get(id(first))
    words = {"no worse": ", and is no worse", "worse": ", and is worse", "not shown": ", and no worse is not shown"}
    return [
        f"{method_among(first, entries)} trains {first['model']} {fastest.text} on {timed_on(first)}"
        + (words[verdict] if verdict else "")
    ]


def _climbed(entries: Sequence[Entry]) -> list[Finding]:
    """What each ladder comes to, from its bottom to its fastest rung."""
    found = []
    for first, *rungs in ladders(entries):
        gains = [(gain, rung) for rung in rungs if (gain := step_ratio(first, rung))]
        if gains:
            gain, best = max(gains, key=lambda pair: pair[0])
            words = f"{best['method']} takes a step of {first['model']} {gain:.1f} times as fast as {first['method']}"
            found.append(Finding(parts=(f"Change by change, {words} on {timed_on(first)}",)))
    return found


def _picked(entries: Sequence[Entry]) -> list[Finding]:
    """The fastest of what a user could pick for a model, beside the others."""
    found = []
    for alike in groups(_peers(entries)):
        steps = [entry for entry in alike if entry["outcome"] == "completed" and entry["steady_step_seconds"]]
        fastest = min(steps, key=lambda entry: entry["steady_step_seconds"] / entry["tokens_per_step"], default=None)
        ratios = [(step_ratio(other, fastest), other) for other in steps if other is not fastest and fastest]
        if fastest and ratios:
            words = " and ".join(f"{ratio:.1f} times as fast as {other['method']}" for ratio, other in ratios)
            place = f"{fastest['model']} on {timed_on(fastest)}"
            found.append(Finding(parts=(f"{fastest['method']} trains {place} {words}",)))
    return found


def _rescued(entries: Sequence[Entry]) -> list[str]:
    """Where baseline runs out of memory, and what trains instead."""
    told = []
    for group in groups(entries):
        ended = {entry["method"]: entry["outcome"] for entry in group}
        instead = [method for method, outcome in ended.items() if outcome == "completed"]
        if ended.get(BASELINE) == "out_of_memory" and instead:
            first = group[0]
            told.append(
                f"{' and '.join(instead)} train{'s' * (len(instead) == 1)} {first['model']} on {timed_on(first)}, "
                "where baseline runs out of memory"
            )
    return told


def _no_worse(entries: Sequence[Entry]) -> list[Finding]:
    """Which methods were shown to be no worse than baseline on real weights, which worse, and which neither."""
    compared = [found for found in noninferiority.compare(entries) if found.verdict]
    return [
        Finding(
            about=f"Over baseline's held-out loss on {model}, means of seeds",
            parts=tuple(
                f"{method_among(found.entries[0], entries)} {found.verdict}"
                + (f", {found.difference} nats" if found.difference else "")
                for found in compared
                if found.model == model
            ),
        )
        for model in dict.fromkeys(found.model for found in compared)
    ]


def _place(entry: Entry) -> str:
    """What the trial had to fit: the target, or the card itself."""
    return card(entry) if entry["target"] != "native" else _times(entry, str(entry["device"]))


def _badness(told: str) -> int:
    return ["completed", "out of memory"].index(told) if told in ("completed", "out of memory") else 2


def headline(entry: Entry) -> str:
    """One cell in a few words."""
    ended = outcome(entry)
    if entry["outcome"] == "completed":
        told = [step(entry), memory(entry), loss(entry)]
        ended = ", ".join([ended, *(word for word in told if word != "-")])
    return f"{entry['model']} x {entry['method']} on {timed_on(entry)}: {ended}"


def _about(group: Sequence[Entry], everything: Sequence[Entry]) -> Finding:
    parts = []
    for entry in one_seed(group):
        is_failed = entry["outcome"] != "completed"
        alike = seeds_of(entry, group)
        name = name_among(entry, group) if is_failed else method_among(entry, group)
        parts.append(f"{name} {_fate(entry, [entry] if is_failed else alike, group, everything)}")
    return Finding(about=f"{group[0]['model']} on {timed_on(group[0])}", parts=tuple(parts))


def _fate(entry: Entry, alike: Sequence[Entry], group: Sequence[Entry], everything: Sequence[Entry]) -> str:
    """How a cell ended, and how it compares; of completed ones over the seeds in `alike`."""
    if entry["outcome"] != "completed":
        verbs = {"out_of_memory": "runs out of memory", "timed_out": "times out"}
        verb = verbs.get(entry["outcome"]) or str(entry["outcome"])
        return f"{verb} in {entry['phase']}" if entry["phase"] else verb
    told = []
    baseline, seeds = baseline_of(entry, group), len(alike)
    found = pace(alike, everything)
    if baseline is not None and entry["method"] != BASELINE and found:
        share = memory_share(entry, baseline)
        held = f" with {share:.2f} of the memory" if share is not None and entry["peak_allocated_bytes"] else ""
        spread = f" ({found.low:.2f} to {found.high:.2f} over {seeds} seeds)" if seeds > 1 else ""
        told.append(f"is {found.ratio:.2f}x as fast{spread}{held}")
    else:
        total = "" if not entry["cold_seconds"] else f" in {_duration(entry['cold_seconds'])}"
        peak = f" within {size(entry['peak_allocated_bytes'])}" if entry["peak_allocated_bytes"] else ""
        told.append(f"completes{total}{peak}")
    losses = [(e["heldout_loss_before"], e["heldout_loss_after"]) for e in alike]
    if all(before is not None and after is not None for before, after in losses):
        shorter = baseline is not None and _planned(entry) != _planned(baseline)
        before, after = (fmean(of) for of in zip(*losses, strict=True))
        mean = "mean " * (seeds > 1)
        told.append(f"{mean}held-out loss {before:.2f} to {after:.2f}" + f" after {_planned(entry)} steps" * shorter)
    return ", ".join(told)


def _agreement(entries: Sequence[Entry]) -> list[Finding]:
    """Whether the forecasts were right, where there was memory to run out of."""
    said = {"fits": "completed", "does_not_fit": "out_of_memory"}
    limited = [e for e in entries if e.get("budget_bytes") and e["forecast_verdict"] in said]
    if not limited:
        return []
    wrong = [e for e in limited if said[e["forecast_verdict"]] != e["outcome"] and e["outcome"] in said.values()]
    off = [abs(e["forecast_allocated_bytes"] / e["peak_allocated_bytes"] - 1) for e in entries if _has_error(e)]
    within = f"; their peaks are within {max(off):.1%}" if off else ""
    if wrong:
        names = ", ".join(f"{entry['model']} x {entry['method']} on {card(entry)}" for entry in wrong)
        return [Finding(parts=(f"The forecast was wrong about {names}{within}",))]
    return [Finding(parts=(f"Fits or not was forecast rightly for all {len(limited)} cells under a budget{within}",))]


def _forecast_only(runs: Sequence[Run]) -> list[Finding]:
    """What was forecast and not trained: for each model and method, the cards it fits and those it does not."""
    trained = {(entry["model"], entry["method"], card(entry)) for entry in newest(runs)}
    rows = [row for row in forecasts(runs) if is_card(row["target"])]
    rows = [row for row in rows if (row["model"], row["method"], card(row)) not in trained]
    words = {"fits": "fits", "does_not_fit": "does not fit", "too_close_to_call": "is too close to call on"}
    return [
        Finding(
            about=f"{model}, forecast",
            parts=tuple(
                f"{method} {words.get(verdict, verdict)} {', '.join(card(row) for row in of_verdict)}"
                for method, of_method in _by(of_model, "method").items()
                for verdict, of_verdict in _by(of_method, "verdict").items()
            ),
        )
        for model, of_model in _by(rows, "model").items()
    ]


def _by(rows: Iterable[ForecastRow], key: str) -> dict[str, list[ForecastRow]]:
    found: dict[str, list[ForecastRow]] = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found


# The tables


def results(
    entries: Sequence[Entry],
    key: str = "results",
    title: str = "Every cell",
    among: Sequence[Entry] | None = None,
    runs: Sequence[Run] = (),
) -> Table:
    """One row a trial: how it ended, its time, memory and loss, and how they compare with its baseline; steps with the
    baseline's of its own run where one is `among` those. `runs` are what the entries come from, where that is known."""
    rows = [_row(entry, entries, among or entries) for entry in entries]
    columns, aligned = list(COLUMNS), "llllrrrrrrl"
    if key == "others":
        columns, aligned = [*columns, "steps", "tokens a row"], aligned + "rr"
        rows = [
            [*row, *(str(entry.get(k) or "-") for k in ("planned_steps", "max_length"))]
            for row, entry in zip(rows, entries, strict=True)
        ]
    if len({entry.get("seed") for entry in entries}) > 1:
        columns, aligned = [*columns, "seed"], aligned + "r"
        rows = [[*row, str(entry.get("seed"))] for row, entry in zip(rows, entries, strict=True)]
    if any("worker" in entry for entry in entries):
        columns, aligned = [*columns, "worker"], aligned + "l"
        rows = [[*row, _worker(entry)] for row, entry in zip(rows, entries, strict=True)]
    told = notes(entries, runs) if key == "results" else []
    return Table(key=key, title=title, columns=columns, aligned=aligned, rows=rows, entries=entries, notes=told)


def brief(runs: Sequence[Run]) -> Table:
    """The cells of `results` in the columns that a README of 120 characters a line has room for. Only `into` writes it:
    a whole report has `results`."""
    entries = newest(runs)
    cells = main_cells(entries)
    rows = []
    for cell in cells:
        gain = faster(cell, pace_of(cell, entries))
        ratio = f"{gain.ratio:.2f}x" if gain else "-"
        rows.append([*_name(cell, cells), cell["outcome"].replace("_", " "), step(cell), ratio, memory(cell)])
    return Table(
        key="brief",
        title="Every cell in brief",
        columns=["model", "method", "card", "outcome", "step", "speedup", "peak memory"],
        aligned="llllrrr",
        rows=rows,
        entries=cells,
        notes=[note for note in notes(cells, runs) if not note.startswith(RANDOM)],
    )


def losses(entries: Sequence[Entry]) -> Table:
    """Training and held-out loss of every cell that has taken steps or was meant to."""
    rows, of = [], []
    for entry in entries:
        train, seconds = entry["train_loss"] or [], entry["step_seconds"] or []
        if not train and entry["outcome"] == "completed":
            continue
        epoch = entry.get("steps_per_epoch") or len(train) or 1
        baseline = baseline_of(entry, entries)
        after, than = entry["heldout_loss_after"], baseline and baseline["heldout_loss_after"]
        if baseline is not None and _planned(baseline) != _planned(entry):
            than = None  # after another number of steps
        rows.append(
            [
                *_name(entry, entries),
                outcome(entry),
                str(len(train)),
                f"{sum(filter(None, seconds)):.1f} s" if seconds else "-",
                _mean(train[:epoch]),
                _mean(train[-epoch:]),
                _loss(entry["heldout_loss_before"]),
                _loss(after),
                "-" if after is None or than is None or entry is baseline else f"{after - than:+.3f}",
            ]
        )
        of.append(entry)
    columns = ["model", "method", "card", "outcome", "steps", "training", "first epoch", "last epoch"]
    columns += ["held out before", "after", "over baseline"]
    return Table(
        key="loss",
        title="Loss",
        columns=columns,
        aligned="llllrrrrrrr",
        rows=rows,
        entries=of,
        notes=["Training loss is the mean of an epoch's steps; training is device time, without start and saving."],
    )


def qualities(entries: Sequence[Entry]) -> Table:
    """Whether a method that several seeds have trained on real weights does worse than its baseline, and what it
    forgot."""
    compared = noninferiority.compare(entries)
    return Table(
        key="no-worse",
        title="No worse?",
        columns=["model", "method", "seeds", "held-out loss", "over baseline", "no worse?", "elsewhere", "forgotten"],
        aligned="llrrrlrr",
        rows=[
            [
                found.model,
                method_among(found.entries[0], entries),
                f"{len(found.entries)}" + (f", {found.failed} failed" if found.failed else ""),
                _before_and_after(found.heldout),
                "-" if found.difference is None else str(found.difference),
                found.verdict or "-",
                _before_and_after(found.elsewhere),
                "-" if found.forgotten is None else str(found.forgotten),
            ]
            for found in compared
        ],
        entries=[None] * len(compared),
        notes=[NO_WORSE_NOTE],
    )


def speedups(entries: Sequence[Entry], among: Sequence[Entry] = ()) -> Table:
    """How many times as fast as its baseline every cell is, and how that is known."""
    rows, of = [], []
    for entry in entries:
        baseline = pace_of(entry, among or entries)
        if entry["method"] == BASELINE or (baseline is None and not entry.get("speedup")):
            continue
        paired = entry.get("speedup") or {}
        found = faster(entry, baseline)
        known = "steady steps of both" if found else paired.get("reason") or "no ratio"
        low = high = "-"
        if found and found.interval:
            known = f"{len(paired['log_ratios'])} pairs of rounds, {paired['pairing']}"
            low, high = (f"{end:.2f}" for end in found.interval)
        told = f"{found.ratio:.2f}x" if found else speedup(entry, baseline)
        rows.append([*_name(entry, entries), outcome(entry), told, low, high, known])
        of.append(entry)
    return Table(
        key="speedup",
        title="Speedup over the baseline, per token",
        columns=["model", "method", "card", "outcome", "speedup", "low", "high", "from"],
        aligned="llllrrrl",
        rows=rows,
        entries=of,
        notes=["Low and high end the 95 % interval of a ratio measured in pairs of alternating rounds."]
        if rows
        else [],
    )


def memory_by_cause(entries: Sequence[Entry], untrained: Sequence[ForecastRow] = ()) -> Table:
    """Peak memory measured beside the forecast of it, by what it is for, under the target's limit."""
    causes = list(dict.fromkeys(cause for e in entries for cause in e.get("forecast_bytes_by_cause") or {}))
    causes = causes or list(dict.fromkeys(cause for row in untrained for cause in row["bytes_by_cause"]))
    rows: list[list[str]] = []
    of: list[Entry | None] = []
    for entry in entries:
        by_cause = entry.get("forecast_bytes_by_cause") or {}
        if not by_cause and not entry["peak_allocated_bytes"]:
            continue
        sizes = [size(by_cause[cause]) if by_cause.get(cause) else "-" for cause in causes]
        limit = size(entry["budget_bytes"]) if entry.get("budget_bytes") else "-"
        rows.append([*_name(entry, entries), outcome(entry), limit, memory(entry), _forecast(entry), *sizes])
        of.append(entry)
    measured = {(entry["model"], entry["method"], card(entry)) for entry in entries}
    for row in untrained:
        if (row["model"], row["method"], card(row)) not in measured and is_card(row["target"]):
            sizes = [size(row["bytes_by_cause"][c]) if row["bytes_by_cause"].get(c) else "-" for c in causes]
            limit = size(row["budget_bytes"]) if row["budget_bytes"] else "-"
            told = f"forecast: {row['verdict'].replace('_', ' ')}"
            names = [row["model"], row["method"], card(row)]
            rows.append([*names, told, limit, "-", size(row["forecast_allocated_bytes"]), *sizes])
            of.append(None)
    return Table(
        key="memory",
        title="Peak memory by cause",
        columns=["model", "method", "card", "outcome", "limit", "measured", "forecast", *causes],
        aligned="llll" + "r" * (3 + len(causes)),
        rows=rows,
        entries=of,
        notes=["What a cell held when memory ran out is no peak. Causes are the forecast's."] if rows else [],
    )


def ladder(rungs: Sequence[Entry], number: int = 0) -> Table:
    """Where the speed came from: one change after the other, and what each bought."""
    first = rungs[0]
    rows = []
    for below, rung in zip([None, *rungs], rungs, strict=False):
        gained = step_ratio(below, rung) if below else None
        whole = step_ratio(first, rung)
        rows.append(
            [
                rung["method"],
                change(below, rung) if below else "the bottom",
                outcome(rung),
                step(rung),
                "-" if gained is None else f"{gained:.2f}x",
                "-" if whole is None else f"{whole:.2f}x",
                memory(rung),
            ]
        )
    climbed = f"{first['method']} to {rungs[-1]['method']}"
    title = f"Where the speed comes from: {first['model']} on {timed_on(first)}, {climbed}"
    return Table(
        key=f"ladder-{number}",
        title=title,
        columns=["rung", "what changed", "outcome", "step", "bought", "in all", "peak memory"],
        aligned="lllrrrr",
        rows=rows,
        entries=rungs,
        notes=["Steps are medians after the first epoch, compared per token."],
    )


def peers(entries: Sequence[Entry]) -> Table:
    """What a user could pick: the same rows, weights and adapter through each library and the captured step."""
    of = _peers(entries)
    rows = []
    for entry in of:
        alike = [other for other in of if record.are_alike(other, entry, BASELINE_SHARES)]
        slowest = max(alike, key=lambda other: other["steady_step_seconds"] or 0.0)
        ratio = step_ratio(slowest, entry)
        library = (
            f"{entry.get('library') or 'peft'} {(entry['versions'] or {}).get(entry.get('library') or 'peft') or ''}"
        )
        bound = _products_seconds(entry)
        rows.append(
            [
                *_name(entry, of),
                "the captured step" if entry.get("captured_step") else library.strip(),
                outcome(entry),
                step(entry),
                "-" if ratio is None else f"{ratio:.2f}x",
                "-" if bound is None else _milliseconds(bound),
                memory(entry),
                _duration(entry["cold_seconds"]) if entry["cold_seconds"] else "-",
            ]
        )
    columns = ["model", "method", "card", "by", "outcome", "step", "as fast", "products alone", "peak memory", "total"]
    return Table(
        key="peers",
        title="What a user could pick instead",
        columns=columns,
        aligned="lllllrrrrr",
        rows=rows,
        entries=of,
        notes=[
            "As fast: against the slowest of a model. Products alone: 4 x parameters x tokens FLOP at the rate of a "
            "large product on the same kind of card. Total: from the child's start to the saved adapter, with its "
            "imports where a library needs a fresh interpreter."
        ],
    )


def ranks(entries: Sequence[Entry]) -> Table:
    """Trials over several GPUs beside the same ones on one: tokens a second, and what each GPU held."""
    rows: list[list[str]] = []
    of: list[Entry] = []
    for entry in [entry for entry in entries if entry["world_size"] > 1]:
        alike = [other for other in entries if record.are_alike(other, entry, SAME_BUT_RANKS)]
        for told in (*(other for other in alike if other["world_size"] == 1), entry):
            if any(told is other for other in of):
                continue
            rate = told.get("tokens_per_second") if told["outcome"] == "completed" else None
            one = next((other for other in alike if other["world_size"] == 1), None)
            gained = times_as_fast(told, one) if rate and one else None
            peaks = told.get("rank_peak_allocated_bytes") or [told["peak_allocated_bytes"]]
            rows.append(
                [
                    *_name(told, entries),
                    outcome(told) + ("" if told.get("failed_rank") is None else f", rank {told['failed_rank']}"),
                    f"{rate:,.0f}" if rate else "-",
                    f"{told['rank_tokens_per_second']:,.0f}" if rate else "-",
                    f"{gained:.2f}x" if gained else "-",
                    ", ".join("-" if peak is None else size(peak) for peak in peaks),
                    _forecast(told),
                    loss(told),
                ]
            )
            of.append(told)
    return Table(
        key="ranks",
        title="Several GPUs for one trial",
        columns=[
            *("model", "method", "card", "outcome", "tokens/s", "a GPU", "of one GPU"),
            *("peak of each", "forecast", "held-out loss"),
        ],
        aligned="llllrrrrrl",
        rows=rows,
        entries=of,
        notes=[
            "Batches are those of one GPU; the Trainer's methods are sharded by FSDP2, captured steps share batches."
        ],
    )


def _products_seconds(entry: Entry) -> float | None:
    """What the products of a LoRA step would take alone: forward, and backward to the inputs."""
    rate = next((rate for word, rate in PRODUCTS_A_SECOND.items() if word in entry["device"]), None)
    if rate is None or not entry.get("parameters") or not entry["tokens_per_step"]:
        return None
    return float(4 * entry["parameters"] * entry["tokens_per_step"] / rate)


def step_ratio(below: Entry, rung: Entry) -> float | None:
    """How many times as fast a step of `rung` is per token, None where one of both has none."""
    completed = all(entry["outcome"] == "completed" for entry in (below, rung))
    return times_as_fast(rung, below) if completed else None


def change(below: Entry, rung: Entry) -> str:
    """What one rung does differently from the one below it, in the record's own words."""
    told = []
    for key in ("weights_dtype", "quantization", "adapter"):
        was, now = below.get(key), rung.get(key)
        if was != now:
            told.append(f"{key.replace('_', ' ')} {_word(was)} -> {_word(now)}")
    for key in ("training_arguments", "captured_step"):
        was, now = below.get(key), rung.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            for name in dict.fromkeys([*was, *now]):
                if was.get(name) != now.get(name):
                    told.append(f"{name.replace('_', ' ')} {_word(was.get(name))} -> {_word(now.get(name))}")
        elif was != now:
            told.append("the Trainer's step -> a loop of its own" if was is None else f"{key} {_word(now)}")
    return ", ".join(told) or "nothing"


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Mapping):
        return str(value.get("peft_type") or value.get("quant_method") or "set").lower()
    return "none" if value is None else "set" if isinstance(value, list) else str(value)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Whether one model x method fits one card: `fits`, `does_not_fit`, `too_close_to_call`, or how else it ended; from
    a measured outcome, whose entry that is, or from a forecast."""

    verdict: str
    entry: Entry | None = None

    @property
    def text(self) -> str:
        """As a cell of the table."""
        words = "out of memory" if self.entry and self.verdict == "does_not_fit" else self.verdict.replace("_", " ")
        return words if self.entry else f"{words} (forecast)"


def places(runs: Sequence[Run]) -> dict[tuple[str, str], dict[str, Place]]:
    """By model and method, by card: fits or not. An outcome stands before a forecast; the CPU is no card."""
    found: dict[tuple[str, str], dict[str, Place]] = {}
    for row in forecasts(runs):
        if is_card(row["target"]) and row["budget_bytes"]:
            found.setdefault((row["model"], row["method"]), {})[card(row)] = Place(verdict=row["verdict"])
    entries = newest(runs)
    for entry in [*_on_cards(entries), *main_cells(entries)]:  # the longest trial says it last
        if entry["peak_allocated_bytes"] or entry["outcome"] == "out_of_memory":
            verdicts = {"completed": "fits", "out_of_memory": "does_not_fit"}
            verdict = verdicts.get(entry["outcome"], entry["outcome"])
            where = _place(entry)
            found.setdefault((entry["model"], entry["method"]), {})[where] = Place(verdict=verdict, entry=entry)
    order = {model: number for number, (model, _) in reversed(list(enumerate(found)))}
    return dict(sorted(found.items(), key=lambda item: order[item[0][0]]))


def cards(found: Mapping[tuple[str, str], Mapping[str, Place]]) -> list[str]:
    """The cards of a frontier, the smallest first."""

    def order(card: str) -> float:
        return room(card) or float("inf")

    return sorted(dict.fromkeys(card for of in found.values() for card in of), key=order)


def room(card: str) -> int | None:
    """The bytes that a card of this name, or several, have; None for one that no target is called by."""
    count, _, name = card.rpartition(" x ")
    try:
        total_bytes = targets.named(name).total_bytes
    except ValueError:
        return None
    return total_bytes and total_bytes * int(count or 1)


def frontier(runs: Sequence[Run]) -> Table:
    """Model x method x card: fits or not."""
    found = places(runs)
    columns = cards(found)
    rows = [[*cell, *(of[card].text if card in of else "-" for card in columns)] for cell, of in found.items()]
    entries = [next((place.entry for place in of.values() if place.entry), None) for of in found.values()]
    return Table(
        key="frontier",
        title="The frontier: what fits which card",
        columns=["model", "method", *columns],
        aligned="ll" + "l" * len(columns),
        rows=rows,
        entries=entries,
    )


def trend(entry: Entry, runs: Sequence[Run]) -> list[tuple[Run, Entry]]:
    """A trial in every run that has it, the oldest first."""
    found = []
    for run in sorted(runs, key=_ended):
        same = [then for then in run.entries if _is_same_trial(then, entry)]
        found += [(run, same[-1])] if same else []
    return found


def history(runs: Sequence[Run]) -> Table:
    """Every cell that more than one run has, run beside run."""
    ordered = sorted((run for run in runs if run.entries), key=_ended)
    rows, of = [], []
    entries = newest(runs)
    for entry in entries:
        found = trend(entry, runs)
        if len(found) < 2 or not is_card(entry["target"]):
            continue
        by_run = {id(run): then for run, then in found}
        cells = [summary(by_run[id(run)], run) if id(run) in by_run else "-" for run in ordered]
        rows.append([*_name(entry, entries), *cells])
        of.append(entry)
    return Table(
        key="history",
        title="History",
        columns=["model", "method", "card", *(run_label(run) for run in ordered)],
        aligned="lll" + "l" * len(ordered),
        rows=rows,
        entries=of,
    )


def run_label(run: Run) -> str:
    """A run's name and when it ended, to the minute."""
    return f"{run.path.stem} {run.ended[:16].replace('T', ' ')}".strip()


def summary(entry: Entry, run: Run) -> str:
    """A trial of one run in a few words."""
    baseline = baseline_of(entry, run.entries)
    if entry["outcome"] != "completed":
        return outcome(entry)
    told = [step(entry), speedup(entry, baseline), memory(entry)]
    if entry["heldout_loss_after"] is not None:
        told.append(f"loss {entry['heldout_loss_after']:.3f}")
    return ", ".join(word for word in told if word != "-")


# Around and inside a table


def notes(entries: Sequence[Entry], runs: Sequence[Run] = ()) -> list[str]:
    """What a reader must know beside the table: on what it was measured, and what random weights cannot say."""
    lines = []
    unclean = [run for run in runs if run.is_dirty and run.entries]
    if unclean:
        names = ", ".join(f"{run.name} (after commit {(run.commit or 'unknown')[:7]})" for run in unclean)
        lines.append(f"Measured with changes to the code that were not committed: {names}.")
    for device in dict.fromkeys(entry["device"] for entry in entries):
        of_device = [entry for entry in entries if entry["device"] == device]
        installed = of_device[0]["versions"] or {}
        packages = ", ".join(
            f"{name} {installed.get(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes")
        )
        lines.append(f"Measured on {device}; {packages}.")
        if any(entry["emulated"] for entry in of_device):
            lines.append(
                f"{EMULATED} Emulated: times are those of {device}; "
                "torch's allocator is capped at the bytes the target has."
            )
        if all(entry["peak_allocated_bytes"] is None for entry in of_device):
            lines.append(
                f"{HOST} No GPU: the whole process's memory on the host, libraries included. "
                "The forecast is what torch would allocate on a GPU."
            )
    if any(entry["weights"] == "random" for entry in entries):
        lines.append(
            f"{RANDOM} Random weights: speed and memory are as with trained ones; the loss says nothing of quality."
        )
    return lines


def marks(key: str) -> tuple[str, str]:
    """The lines in a file between which the table of that key stands."""
    return f"<!-- {key}: begin -->", f"<!-- {key}: end -->"


def into(readme: Path, runs: Sequence[Run]) -> None:
    """Put every table whose marks `readme` has between them, such as `<!-- results: begin -->` and `<!-- results: end
    -->`; the marks' names are the tables' keys. Raises ReportError."""
    try:
        found = readme.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ReportError(f"report {readme}: cannot be read ({said})") from error
    made = {table.key: table for table in (*tables(runs), brief(runs))}
    keys = [key for key in re.findall(r"<!-- ([\w-]+): (?:begin|end) -->", found) if key == "results" or key in made]
    for key in dict.fromkeys(keys or ["results"]):
        begin, end = marks(key)
        if found.count(begin) != 1 or found.count(end) != 1 or found.index(begin) > found.index(end):
            raise ReportError(f"report {readme}: needs the lines '{begin}' and '{end}' once each")
        if key not in made:
            raise ReportError(f"report {readme}: the records hold nothing for '{begin}'")
        before, rest = found.split(begin)
        found = f"{before}{begin}\n\n{made[key].text('markdown')}\n\n{end}{rest.split(end)[1]}"
    write(readme, found)


def save(path: Path, runs: Sequence[Run], form: Format | None = None) -> None:
    """Write the report of `runs` to `path`: as `form` says, else as markdown where the name ends in .md, else as a
    page. Raises ReportError."""
    write(path, rendered(runs, form or ("markdown" if path.suffix == ".md" else "html")))


def rendered(runs: Sequence[Run], form: Format) -> str:
    """The report of `runs` in one of its forms."""
    if form == "html":
        from lightweight.report import page  # matplotlib takes a second, and a table needs none

        return page.html(runs)
    return text(runs, form) + "\n"


def draw(folder: Path, runs: Sequence[Run]) -> None:
    """Write every picture of `runs` into `folder` as an SVG file, called by its key. Raises ReportError."""
    from lightweight.report import drawing, figures

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"report {folder}: is no folder to write to ({error.strerror})") from error
    for picture in figures.pictures(runs):
        write(folder / f"{picture.key}.svg", drawing.standalone(picture))


def write(path: Path, content: str) -> None:
    """Put `content` into the file at `path`, all of it or nothing. Raises ReportError.

    It is written beside it first, into a file with a name of its own that nobody can have put there before."""
    beside = None
    try:
        if path.is_dir():
            raise ReportError(f"report {path}: is a folder: name a file in it, such as {path / 'report.html'}")
        if path.exists() and not path.is_file():
            raise ReportError(f"report {path}: is no file that can be replaced: give another name")
        handle, name = tempfile.mkstemp(prefix=".report-", dir=path.absolute().parent)
        beside = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(content)
        beside.chmod(_mode(path))
        beside.replace(path)
    except OSError as error:
        raise ReportError(f"report {path}: cannot be written ({error.strerror})") from error
    finally:
        if beside is not None:
            beside.unlink(missing_ok=True)


def _mode(path: Path) -> int:
    """The permissions of what stands at `path`, else of a new file; `mkstemp` gives its owner's only."""
    if path.exists():
        return path.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _markdown(told: str) -> str:
    """`told` as text, whatever stands in it: no cell's end, no tag, no link."""
    escaped = one_line(told).replace("\\", r"\\").replace("|", r"\|").replace("`", r"\`").replace("](", r"]\(")
    return escaped.replace("&", "&amp;").replace("<", "&lt;")


def _name(entry: Entry, among: Sequence[Entry]) -> list[str]:
    """Model, method and the card that ran it."""
    marked = f"{timed_on(entry)} {EMULATED}" if entry["emulated"] else timed_on(entry)
    return [entry["model"], method_among(entry, among), marked]


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return _loss(fmean(known)) if known else "-"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _has_error(entry: Entry) -> bool:
    """Whether the forecast peak can be held against a measured one: a whole training's."""
    whole = entry["outcome"] == "completed" and entry["peak_allocated_bytes"]
    return bool(whole and entry["forecast_allocated_bytes"] is not None)


def _row(entry: Entry, entries: Sequence[Entry], among: Sequence[Entry]) -> list[str]:
    return [
        *_name(entry, entries),
        outcome(entry),
        _duration(entry["cold_seconds"]) if entry["outcome"] == "completed" else "-",
        step(entry),
        speedup(entry, pace_of(entry, among)),
        memory(entry),
        _forecast(entry),
        memory_ratio(entry, baseline_of(entry, entries)),
        loss(entry),
    ]


def _worker(entry: Entry) -> str:
    """The pytest-xdist worker that ran the trial, and the number of its GPU."""
    gpu = entry.get("visible_gpu")
    return f"{entry.get('worker', '-')}" + ("" if gpu is None else f", GPU {gpu}")


def outcome(entry: Entry) -> str:
    """How the trial ended, in words."""
    ended: str = entry["outcome"].replace("_", " ")
    return f"{ended} in {entry['phase']}" if entry["phase"] else ended


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.2f} min"


def step(entry: Entry) -> str:
    """The steady step of a trial that completed."""
    seconds = entry["steady_step_seconds"]
    return "-" if seconds is None or entry["outcome"] != "completed" else _milliseconds(seconds)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


@dataclass(frozen=True, kw_only=True)
class Faster:
    """How many times as fast as its baseline a cell is, per token; `interval` has the ends of the 95 % interval where
    it was measured in pairs of rounds, the upper one infinite after a single pair."""

    ratio: float
    interval: tuple[float, float] | None = None


def faster(entry: Entry, baseline: Entry | None) -> Faster | None:
    """From pairs of rounds where there are any, else from the steady steps of both cells; None where there is no ratio
    to give."""
    paired = entry.get("speedup")
    if paired and paired["ratio"] is not None:
        return Faster(ratio=paired["ratio"], interval=_interval(paired))
    if baseline is None or entry["outcome"] != "completed" or baseline["outcome"] != "completed":
        return None
    found = step_ratio(baseline, entry)
    return None if found is None else Faster(ratio=found)


def _interval(paired: Mapping[str, Any]) -> tuple[float, float]:
    """The stored one; that of rounds which were measured one after the other is wider than records used to say."""
    if paired["pairing"] == record.ONE_AFTER_THE_OTHER and paired["log_ratios"]:
        from lightweight.verdict import ratio  # numpy takes a while, and hardly a record has such pairs

        found = ratio.interval(paired["log_ratios"], in_turn=1)
        return found.low, found.high
    return paired["low"], math.inf if paired["high"] is None else paired["high"]


def speedup(entry: Entry, baseline: Entry | None) -> str:
    """The ratio in words, with its interval where it has one, or why there is none."""
    if found := faster(entry, baseline):
        ends = f" [{found.interval[0]:.2f}, {found.interval[1]:.2f}]" if found.interval else ""
        return f"{found.ratio:.2f}x{ends}"
    return _without_baseline(entry, baseline)


def _without_baseline(entry: Entry, baseline: Entry | None) -> str:
    if entry["outcome"] == "completed" and baseline is not None and baseline["outcome"] != "completed":
        return f"baseline {baseline['outcome'].replace('_', ' ')}"
    return "-"


def _peak_bytes(entry: Entry) -> int | None:
    peak: int | None = _peak_of_gpus(entry) or entry["host_peak_bytes"]
    return peak


def _peak_of_gpus(entry: Entry) -> int | None:
    """That of the fullest rank; what ended before it could tell has none."""
    peaks = [entry["peak_allocated_bytes"], *(entry.get("rank_peak_allocated_bytes") or ())]
    return max((peak for peak in peaks if peak), default=None)


def memory(entry: Entry) -> str:
    """The peak allocated on the GPU, else the host's, which is marked."""
    peak = _peak_bytes(entry)
    if peak is None:
        return "-"
    return size(peak) if _peak_of_gpus(entry) else f"{size(peak)} {HOST}"


def _forecast(entry: Entry) -> str:
    """The forecast peak, and how far it is from the measured one where that is a whole training's."""
    forecast, measured = entry["forecast_allocated_bytes"], entry["peak_allocated_bytes"]
    if forecast is None:
        return "-"
    if not _has_error(entry):
        return size(forecast)
    return f"{size(forecast)} ({forecast / measured - 1:+.1%})"


def size(count: float) -> str:
    """Bytes as a person says them."""
    return f"{count / GiB:.2f} GiB" if count >= GiB else f"{count / MiB:.0f} MiB"


def memory_share(entry: Entry, baseline: Entry | None) -> float | None:
    """The peak as a share of the baseline's; None unless both completed and have one."""
    if baseline is None or entry["outcome"] != "completed" or baseline["outcome"] != "completed":
        return None
    peak, of = _peak_bytes(entry), _peak_bytes(baseline)
    return peak / of if peak and of else None


def memory_ratio(entry: Entry, baseline: Entry | None) -> str:
    """The share in words, or why there is none."""
    share = memory_share(entry, baseline)
    return _without_baseline(entry, baseline) if share is None else f"{share:.2f}"


def _before_and_after(losses: tuple[float, float] | None) -> str:
    return "-" if losses is None else f"{losses[0]:.3f} -> {losses[1]:.3f}"


def loss(entry: Entry) -> str:
    """Held-out loss before and after training in nats a token, marked where weights are random."""
    before, after = entry["heldout_loss_before"], entry["heldout_loss_after"]
    if before is None or after is None:
        return "-"
    return f"{before:.3f} -> {after:.3f}" + (f" {RANDOM}" if entry["weights"] == "random" else "")
