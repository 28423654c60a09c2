"""Did it get worse? The cells of a new run beside the newest stored run of the same conditions, and a verdict on each.

Absolute times move with the machine; ratios that were measured within one run do not, so ratios are compared: how many
times as fast as its baseline a cell is, and how much of its baseline's memory it holds. Everything here is a pure
function of saved records, so a verdict can be taken again without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from operator import attrgetter
from pathlib import Path
from typing import Literal

from tabulate import tabulate

from lightweight import ratio, record, report
from lightweight.ratio import Interval, Verdict
from lightweight.record import Entry, Run

CONDITIONS = (
    *("device", "target", "world_size", "corpus_digest", "precision", "weights", "max_length", "tokens_per_step"),
)
"""What two runs of a cell must have in common to be compared."""

FAIL = 0.05
"""The share a ratio may lose where no other is said."""

COLUMNS = (
    *("model", "method", "speedup now", "stored", "now / stored"),
    *("memory now", "stored", "held-out loss now", "stored", "verdict"),
)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Shares of a stored ratio: how much of the speedup may be lost and how much memory may be gained. `None` asks for
    no verdict. `undecided` says what becomes of a speedup that noise leaves open."""

    speedup_fail: float | None = None
    memory_fail: float | None = None
    undecided: Literal["pass", "fail"] = "pass"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of the new run, what it is compared with, and what was found. `failures` has one line a reason."""

    now: Entry
    then: Entry | None = None
    run: Run | None = None
    against_stored: Interval | None = None
    verdict: Verdict | None = None
    memory_now: str = "-"
    memory_then: str = "-"
    failures: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Every cell of a new run, and what has to be told beside them."""

    cells: Sequence[Cell]
    notes: Sequence[str] = field(default=())

    @property
    def failures(self) -> list[str]:
        """Why the gate fails, one line a reason; empty where it passes."""
        return [failure for cell in self.cells for failure in cell.failures]


def share(text: str) -> float:
    """`10%` as 0.1. Raises ValueError."""
    try:
        found = float(text.removesuffix("%")) / 100
    except ValueError:
        found = -1.0
    if not (text.endswith("%") and 0 < found < 1):
        raise ValueError(f"{text!r}: give a percentage between 0% and 100%, such as 10%")
    return found


def load(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The runs stored at `paths`, newest first, and a line for each file that is none."""
    runs, problems = [], []
    for path in paths:
        try:
            runs.append(record.run(path))
        except record.RecordError as error:
            problems.append(f"left out: {error}")
    return sorted(runs, key=attrgetter("ended"), reverse=True), problems


def stored(now: Entry, runs: Sequence[Run]) -> tuple[Run, Entry] | None:
    """The same cell under the same conditions in the newest of `runs` that has it."""
    for run in runs:
        same = [then for then in _same_cell(now, run) if not _differing(now, then)]
        if same:  # of several lengths, the one of the same length
            return run, max(same, key=lambda then: then.get("planned_steps") == now.get("planned_steps"))
    return None


def compare(entries: Sequence[Entry], runs: Sequence[Run], limits: Limits) -> Comparison:
    """Hold every one of `entries` against `runs`, newest first."""
    cells = [_cell(entry, entries, stored(entry, runs), limits) for entry in entries]
    notes = _not_compared(cells, runs)
    if not any(cell.then for cell in cells):
        notes.append(
            "nothing stored matches this run, so there is nothing to hold it against: "
            "store it with --benchmark-autosave, or keep the file of --benchmark-json"
        )
    else:
        notes += [f"appeared: {_name(cell.now)}" for cell in cells if cell.then is None]
        notes += _disappeared(cells, entries)
    return Comparison(cells=cells, notes=notes)


def text(comparison: Comparison) -> str:
    """The comparison as a person reads it."""
    rows = [_row(cell, [cell.now for cell in comparison.cells]) for cell in comparison.cells]
    table = tabulate(rows, headers=COLUMNS, disable_numparse=True, colalign=("left",) * 2 + ("right",) * 7 + ("left",))
    runs = dict.fromkeys(cell.run.name for cell in comparison.cells if cell.run)
    lines = [table]
    if runs:
        lines.append(f"Stored: {', '.join(runs)}. Now / stored allows for having been looked at after every few pairs.")
    return "\n".join([*lines, *comparison.notes, *(f"FAILED {failure}" for failure in comparison.failures)])


def log_ratios(entry: Entry | None) -> list[float]:
    """The pairs an entry's speedup was measured with; none where it was not."""
    paired = entry.get("speedup") if entry else None
    return list(paired["log_ratios"]) if paired else []


def _cell(now: Entry, entries: Sequence[Entry], found: tuple[Run, Entry] | None, limits: Limits) -> Cell:
    if found is None:
        return Cell(now=now, memory_now=_memory(now, entries))
    run, then = found
    against, verdict, failures = None, None, []
    if then["outcome"] == "completed" and now["outcome"] != "completed":
        if limits.speedup_fail or limits.memory_fail:
            failures.append(f"{_name(now)}: completed in {run.name}, {_words(now['outcome'])} now")
    else:
        against, verdict, failures = _speedup(now, then, run, limits)
        failures += _memory_failures(now, then, entries, run, limits)
    changed = _changed(now, then)
    return Cell(
        now=now,
        then=then,
        run=run,
        against_stored=against,
        verdict="fail" if failures else verdict,
        memory_now=_memory(now, entries),
        memory_then=_memory(then, run.entries),
        failures=tuple(f"{failure}. {changed}" for failure in failures),
    )


def _speedup(now: Entry, then: Entry, run: Run, limits: Limits) -> tuple[Interval | None, Verdict | None, list[str]]:
    """How many times the stored speedup this one is, the verdict on it, and why it fails."""
    pairs_now, pairs_then = log_ratios(now), log_ratios(then)
    if not pairs_then:
        return None, None, []
    if not pairs_now:
        why = (now.get("speedup") or {}).get("reason") or "no pairs of rounds were measured: run test_speedup as well"
        was = f"{_name(now)}: speedup {ratio.interval(pairs_then)} in {run.name}, none now: {why}"
        return None, None, [was] if limits.speedup_fail else []
    against = ratio.repeated_interval(pairs_now, now["speedup"]["cap"], pairs_then)
    if limits.speedup_fail is None:
        return against, None, []
    floor = 1 - limits.speedup_fail
    verdict = ratio.verdict(against, floor)
    if verdict == "pass" or (verdict == "undecided" and limits.undecided == "pass"):
        return against, verdict, []
    is_or_may = "is" if verdict == "fail" else f"is undecided after {len(pairs_now)} pairs:"
    return (
        against,
        verdict,
        [
            f"{_name(now)}: speedup {ratio.interval(pairs_now)} now, {ratio.interval(pairs_then)} in {run.name}; "
            f"now / stored {is_or_may} {against}, the floor {floor:.3f}"
        ],
    )


def _memory_failures(now: Entry, then: Entry, entries: Sequence[Entry], run: Run, limits: Limits) -> list[str]:
    """Allocated memory is the same in every run of a cell, so a single byte over the limit is one too many."""
    if limits.memory_fail is None or now["outcome"] != "completed" or then["outcome"] != "completed":
        return []
    if not now["peak_allocated_bytes"] or not then["peak_allocated_bytes"]:
        return []  # a whole process's memory on the host is not exact
    held_now, held_then = Fraction(now["peak_allocated_bytes"]), Fraction(then["peak_allocated_bytes"])
    of_now, of_then = _baseline_bytes(now, entries), _baseline_bytes(then, run.entries)
    what, unit = "peak memory", " bytes"
    if of_now and of_then and now["method"] != record.BASELINE:
        held_now, held_then = held_now / of_now, held_then / of_then
        what, unit = "memory ratio", " of the baseline's"
    if held_now <= held_then * (1 + Fraction(limits.memory_fail)):
        return []
    exact = "{:.4f}" if unit != " bytes" else "{:.0f}"
    return [
        f"{_name(now)}: {what} {exact.format(float(held_now))}{unit} now, {exact.format(float(held_then))} in "
        f"{run.name}: {float(held_now / held_then - 1):+.1%}, more than {limits.memory_fail:+.1%}; both are exact"
    ]


def _baseline_bytes(entry: Entry, entries: Sequence[Entry]) -> int | None:
    baseline = report.baseline_of(entry, entries)
    return baseline["peak_allocated_bytes"] if baseline and baseline["outcome"] == "completed" else None


def _memory(entry: Entry, entries: Sequence[Entry]) -> str:
    """The memory ratio where there is one, else the peak."""
    found = report.memory_ratio(entry, report.baseline_of(entry, entries))
    is_ratio = entry["method"] != record.BASELINE and found.replace(".", "").isdigit()
    return found if is_ratio else report.memory(entry)


def _row(cell: Cell, entries: Sequence[Entry]) -> list[str]:
    now, then = cell.now, cell.then
    return [
        now["model"],
        now["method"] if now["world_size"] == 1 else f"{now['method']}, {now['world_size']} GPUs",
        report.speedup(now, report.baseline_of(now, entries)),
        report.speedup(then, report.baseline_of(then, cell.run.entries)) if then and cell.run else "-",
        str(cell.against_stored or "-"),
        cell.memory_now,
        cell.memory_then,
        report.loss(now),
        report.loss(then) if then else "-",
        "FAIL" if cell.failures else cell.verdict or ("no stored run" if then is None else "-"),
    ]


def _same_cell(now: Entry, run: Run) -> list[Entry]:
    return [then for then in run.entries if (then["model"], then["method"]) == (now["model"], now["method"])]


def _differing(now: Entry, then: Entry) -> list[str]:
    return [key for key in CONDITIONS if now.get(key) != then.get(key)]


def _not_compared(cells: Sequence[Cell], runs: Sequence[Run]) -> list[str]:
    """Which newer runs have a cell under other conditions, and which condition it is."""
    lines: dict[str, None] = {}
    for cell in cells:
        for run in runs:
            if run is cell.run:
                break
            differing = [(_differing(cell.now, then), then) for then in _same_cell(cell.now, run)]
            if differing:
                keys, then = min(differing, key=lambda pair: len(pair[0]))
                said = ", ".join(f"{key} is {_brief(then[key])} there and {_brief(cell.now[key])} here" for key in keys)
                lines[f"not compared with {run.name}: {said}"] = None
    return list(lines)


def _disappeared(cells: Sequence[Cell], entries: Sequence[Entry]) -> list[str]:
    """Cells of the newest run that was compared with which this run does not have."""
    newest = max((cell.run for cell in cells if cell.run), key=attrgetter("ended"))
    here = {(entry["model"], entry["method"], report.card(entry)) for entry in entries}
    gone = [then for then in newest.entries if (then["model"], then["method"], report.card(then)) not in here]
    return [f"disappeared: {_name(then)}, {_words(then['outcome'])} in {newest.name}" for then in gone]


def _changed(now: Entry, then: Entry) -> str:
    """What is installed in another version, the GPU's driver included."""
    installed_now = (now["versions"] or {}) | {"driver": now.get("device_driver")}
    installed_then = (then["versions"] or {}) | {"driver": then.get("device_driver")}
    changed = [
        f"{package} {installed_then.get(package)} -> {installed_now.get(package)}"
        for package in {**installed_then, **installed_now}
        if installed_then.get(package) != installed_now.get(package)
    ]
    return f"Changed since: {', '.join(changed)}" if changed else "No version has changed since"


def _name(entry: Entry) -> str:
    on = f" on {entry['world_size']} GPUs" if entry["world_size"] > 1 else ""
    return f"{entry['model']} x {entry['method']}{on}"


def _words(outcome: str) -> str:
    return outcome.replace("_", " ")


def _brief(value: object) -> str:
    return str(value)[:40] if len(str(value)) < 60 else f"{str(value)[:12]}..."
