"""Did it get worse? The cells of a new run beside the newest stored run of the same conditions, and a verdict on each.

Absolute times of a stock step move with the host that launches it: the same cell on cards of one kind took up to 1.37
times as long from one host to the next (experiments/records). Ratios that were measured within one run do not, so
ratios are compared: how many times as fast as its baseline a cell is, and how much of its baseline's memory it holds.
What slows a cell and its baseline alike no ratio shows. A captured step waits for the card alone, so its own time is
compared as well; that of any other step on a GPU is under a limit that allows for hosts. Losses of the same trial are
the same in every run but for rounding, and are compared as they are.

Everything here is a pure function of saved records, so a verdict can be taken again without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from operator import attrgetter
from pathlib import Path

from tabulate import tabulate

from lightweight import record
from lightweight.record import SAME_CELL, SAME_TRIAL, Entry, Run, one_line
from lightweight.report import report
from lightweight.verdict import ratio
from lightweight.verdict.limits import Limits
from lightweight.verdict.ratio import Interval, Verdict

COLUMNS = (
    *("model", "method", "speedup now", "stored", "now / stored", "step now", "stored"),
    *("memory now", "stored", "held-out loss now", "stored", "verdict"),
)

SAME_SETTING = ("device", "target", "world_size", "weights", "corpus_digest")
"""What a whole run was made under: where one cell of a stored run shares it with the new run, the others belong to the
comparison as well."""


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
    """Every cell of a new run, what is wrong with the run as a whole, and what to know beside them."""

    cells: Sequence[Cell]
    of_run: Sequence[str] = field(default=())
    notes: Sequence[str] = field(default=())

    @property
    def failures(self) -> list[str]:
        """Why the gate fails, one line a reason; empty where it passes."""
        return [*(failure for cell in self.cells for failure in cell.failures), *self.of_run]


def load(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The runs stored at `paths`, newest first, and a line for each file that is none."""
    runs, problems = [], []
    for path in paths:
        try:
            run = record.run(path)
        except record.RecordError as error:
            problems.append(f"left out: {error}")
            continue
        if run.entries:
            runs.append(run)
        else:
            problems.append(one_line(f"left out: record {path}: holds no trial, so nothing can be held against it"))
    return sorted(runs, key=attrgetter("ended"), reverse=True), problems


def stored(now: Entry, runs: Sequence[Run]) -> tuple[Run, Entry] | None:
    """The same cell under the same conditions in the newest of `runs` that has it."""
    for run in runs:
        same = [then for then in run.entries if record.are_alike(now, then, SAME_CELL)]
        if same:  # of several, the one of the same length, and of the same seed
            keys = ("planned_steps", "seed")
            return run, max(same, key=lambda then: [then.get(key) == now.get(key) for key in keys])
    return None


def compare(
    entries: Sequence[Entry], runs: Sequence[Run], limits: Limits, is_due: Callable[[Entry], bool] = lambda then: True
) -> Comparison:
    """Hold every one of `entries` against `runs`, newest first. `is_due` says of a stored entry whether the new run was
    meant to have it too: not so, for instance, where somebody named one model of several."""
    cells = [_cell(entry, entries, stored(entry, runs), limits) for entry in entries]
    notes = _not_compared(cells, runs)
    of_run = []
    missing = [(run, then) for run, then in _missing(cells, entries, runs) if is_due(then)]
    if missing and not entries and limits.ask:
        of_run.append("the new run holds no trial")
    fails = limits.ask and limits.missing == "fail"
    (of_run if fails else notes).extend(_missing_line(run, then, entries) for run, then in missing)
    if any(cell.then for cell in cells):
        notes += [f"appeared: {_name(cell.now)}" for cell in cells if cell.then is None]
        notes += _not_known(cells, limits)
    else:
        nothing = "NOTHING WAS COMPARED: no stored run has a cell of this one under the same conditions"
        (of_run if limits.require_match else notes).append(
            f"{nothing}: store this run with --benchmark-autosave, or keep the file of --benchmark-json"
        )
    return Comparison(cells=cells, of_run=of_run, notes=notes)


def text(comparison: Comparison) -> str:
    """The comparison as a person reads it."""
    rows = [_row(cell, [cell.now for cell in comparison.cells]) for cell in comparison.cells]
    aligned = ("left",) * 2 + ("right",) * 9 + ("left",)
    shown = [[one_line(word) for word in row] for row in rows]
    lines = [tabulate(shown, headers=COLUMNS, disable_numparse=True, colalign=aligned)] if rows else []
    runs = {cell.run.path: cell.run for cell in comparison.cells if cell.run}.values()
    if runs:
        names = ", ".join(f"{run.name}{' (of code with uncommitted changes)' * bool(run.is_dirty)}" for run in runs)
        lines.append(one_line(f"Stored: {names}. Now / stored allows for having been looked at after every few pairs."))
    failed = [f"FAILED {failure}" for failure in comparison.failures]
    return "\n".join([*lines, *map(one_line, [*comparison.notes, *failed])])


def log_ratios(entry: Entry | None) -> list[float]:
    """The pairs an entry's speedup was measured with; none where it was not."""
    paired = entry.get("speedup") if entry else None
    return list(paired["log_ratios"]) if paired else []


def in_turn(*entries: Entry | None) -> int:
    """In how many of `entries` the two sides of a pair were measured one after the other."""
    paired = [entry.get("speedup") or {} for entry in entries if entry]
    return sum(speedup.get("pairing") == record.ONE_AFTER_THE_OTHER for speedup in paired)


# One cell


def _cell(now: Entry, entries: Sequence[Entry], found: tuple[Run, Entry] | None, limits: Limits) -> Cell:
    if found is None:
        return Cell(now=now, memory_now=_memory(now, entries))
    run, then = found
    against, verdict, failures = None, None, []
    if _ended_worse(now, then):
        if limits.ask:
            failures.append(f"{_name(now)}: {_words(then['outcome'])} in {run.name}, {_words(now['outcome'])} now")
    else:
        against, verdict, failures = _speedup(now, then, run, limits)
        failures += _memory_failures(now, then, entries, run, limits)
        if now["outcome"] == then["outcome"] == "completed":
            failures += [*_loss_failures(now, then, run, limits), *_step_failures(now, then, run, limits)]
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


def _ended_worse(now: Entry, then: Entry) -> bool:
    """Completing is better than running out of memory, which still is an answer, and any other end is none."""
    order = ("completed", "out_of_memory")
    of_now, of_then = (
        order.index(entry["outcome"]) if entry["outcome"] in order else len(order) for entry in (now, then)
    )
    return of_now > of_then


def _speedup(now: Entry, then: Entry, run: Run, limits: Limits) -> tuple[Interval | None, Verdict | None, list[str]]:
    """How many times the stored speedup this one is, the verdict on it, and why it fails."""
    pairs_now, pairs_then = log_ratios(now), log_ratios(then)
    if not pairs_then:
        return None, None, []
    if not pairs_now:
        why = (now.get("speedup") or {}).get("reason") or "no pairs of rounds were measured: run test_speedup as well"
        was = f"{_name(now)}: speedup {_interval_of(then)} in {run.name}, none now: {why}"
        return None, None, [was] if limits.speedup_fail else []
    against = ratio.repeated_interval(pairs_now, now["speedup"]["cap"], pairs_then, in_turn(now, then))
    if limits.speedup_fail is None:
        return against, None, []
    floor = 1 - limits.speedup_fail
    verdict = ratio.verdict(against, floor)
    if verdict == "pass" or (verdict == "undecided" and limits.undecided == "pass"):
        return against, verdict, []
    is_or_may = "is" if verdict == "fail" else f"is undecided after {_pairs_of(now)}:"
    return (
        against,
        verdict,
        [
            f"{_name(now)}: speedup {_interval_of(now)} now, {_interval_of(then)} in {run.name}; "
            f"now / stored {is_or_may} {against}, the floor {floor:.3f}"
        ],
    )


def _pairs_of(entry: Entry) -> str:
    """How many pairs of rounds there were, and what ended them where it was the time for them."""
    ended = entry["speedup"].get("ended_after_seconds")
    over = "" if ended is None else f", since the {ended:.0f} s for them were over"
    return f"{len(log_ratios(entry))} pairs{over}"


def _interval_of(entry: Entry) -> Interval:
    return ratio.interval(log_ratios(entry), in_turn=in_turn(entry))


def _memory_failures(now: Entry, then: Entry, entries: Sequence[Entry], run: Run, limits: Limits) -> list[str]:
    """Allocated memory is the same in every run of a cell, so a single byte over the limit is one too many."""
    if limits.memory_fail is None or now["outcome"] != "completed" or then["outcome"] != "completed":
        return []
    if not then["peak_allocated_bytes"]:
        return []  # a whole process's memory on the host is not exact
    if not now["peak_allocated_bytes"]:
        was = report.size(then["peak_allocated_bytes"])
        return [f"{_name(now)}: peak memory {was} in {run.name}, none now: it was not measured"]
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


LOSSES = {"held-out loss": "heldout_loss_after", "loss elsewhere": "elsewhere_loss_after"}


def _loss_failures(now: Entry, then: Entry, run: Run, limits: Limits) -> list[str]:
    """Why the losses of a trial fail, of the same seed and as many steps."""
    if limits.loss_fail is None or record.differing(now, then, SAME_TRIAL):
        return []
    found = []
    for what, key in LOSSES.items():
        was, is_ = then.get(key), now.get(key)
        if key.startswith("elsewhere") and now.get("elsewhere_digest") != then.get("elsewhere_digest"):
            continue
        if was is not None and is_ is None:
            found.append(f"{_name(now)}: {what} {was:.4f} in {run.name}, none now")
        elif was is not None and is_ - was > limits.loss_fail:
            found.append(
                f"{_name(now)}: {what} {is_:.4f} nats a token now, {was:.4f} in {run.name}: {is_ - was:+.4f}, "
                f"more than {limits.loss_fail:+g}"
            )
    return found


def _step_failures(now: Entry, then: Entry, run: Run, limits: Limits) -> list[str]:
    """Why a step's own time fails, on the same card, of the same seed and as many steps."""
    if record.differing(now, then, SAME_TRIAL) or not then["steady_step_seconds"]:
        return []
    limit = limits.step_fail if then.get("captured") else limits.stock_step_fail
    if limit is None or not _is_timed_alone(now, then):
        return []
    was = f"{then['steady_step_seconds'] * 1000:.2f} ms in {run.name}"
    if then.get("captured") and not now.get("captured"):
        why = now.get("capture_note") or "no note says why"
        return [f"{_name(now)}: a captured step of {was}, not captured now: {why}"]
    if not now["steady_step_seconds"]:
        return [f"{_name(now)}: a step of {was}, none now: it was not measured"]
    rise = now["steady_step_seconds"] / then["steady_step_seconds"] - 1
    if rise <= limit:
        return []
    kind = "captured step" if then.get("captured") else "step"
    return [
        f"{_name(now)}: {kind} {now['steady_step_seconds'] * 1000:.2f} ms now on {now['device']}, {was}: {rise:+.1%}, "
        f"more than {limit:+.1%}"
    ]


def _is_timed_alone(now: Entry, then: Entry) -> bool:
    """Whether a step's own time means something in another run: not so on a CPU, whose cores others use as well."""
    return bool(then.get("captured")) or now.get("device_bytes") is not None


def _baseline_bytes(entry: Entry, entries: Sequence[Entry]) -> int | None:
    baseline = report.baseline_of(entry, entries)
    return baseline["peak_allocated_bytes"] if baseline and baseline["outcome"] == "completed" else None


def _memory(entry: Entry, entries: Sequence[Entry]) -> str:
    """The memory ratio where there is one, else the peak."""
    share = report.memory_share(entry, report.baseline_of(entry, entries))
    return report.memory(entry) if share is None or entry["method"] == record.BASELINE else f"{share:.2f}"


def _row(cell: Cell, entries: Sequence[Entry]) -> list[str]:
    now, then = cell.now, cell.then
    return [
        now["model"],
        now["method"] if now["world_size"] == 1 else f"{now['method']}, {now['world_size']} GPUs",
        report.speedup(now, report.baseline_of(now, entries)),
        report.speedup(then, report.baseline_of(then, cell.run.entries)) if then and cell.run else "-",
        str(cell.against_stored or "-"),
        report.step(now),
        report.step(then) if then else "-",
        cell.memory_now,
        cell.memory_then,
        report.loss(now),
        report.loss(then) if then else "-",
        "FAIL" if cell.failures else cell.verdict or ("no stored run" if then is None else "-"),
    ]


# The run as a whole


def _missing(cells: Sequence[Cell], entries: Sequence[Entry], runs: Sequence[Run]) -> Iterator[tuple[Run, Entry]]:
    """Stored entries that the new run has no counterpart of, each with its run: of the runs that cells were compared
    with, on the same device and corpus; where no cell found its like, of the newest run of the same setting."""
    here = [run for run in runs if any(cell.run is run for cell in cells)]
    keys: tuple[str, ...] = ("device", "corpus_digest")
    if not here:
        keys = SAME_SETTING
        here = [
            run for run in runs if any(record.are_alike(then, now, keys) for then in run.entries for now in entries)
        ]
        here = here[:1] if entries else list(runs[:1])
    told: list[Entry] = []
    for run in here:
        left = list(entries)
        for then in sorted(run.entries, key=lambda then: not any(record.are_alike(then, e, SAME_TRIAL) for e in left)):
            same = [now for now in left if record.are_alike(then, now, SAME_CELL)]
            if same:
                taken = max(same, key=lambda now: record.are_alike(then, now, SAME_TRIAL))
                left = [now for now in left if now is not taken]
                continue
            is_of_here = not entries or any(record.are_alike(then, now, keys) for now in entries)
            if is_of_here and not any(record.are_alike(then, other, SAME_TRIAL) for other in told):
                told.append(then)
                yield run, then


def _missing_line(run: Run, then: Entry, entries: Sequence[Entry]) -> str:
    trial = ", ".join(
        f"{words} {then[key]}"
        for key, words in (("seed", "seed"), ("planned_steps", "steps"))
        if then.get(key) is not None
    )
    line = f"{_name(then)}: missing now, {_words(then['outcome'])} in {run.name}" + f" ({trial})" * bool(trial)
    namesakes = [now for now in entries if _is_namesake(now, then)]
    differing = [(keys, now) for now in namesakes if (keys := record.differing(now, then, SAME_CELL))]
    if not differing:
        return line
    keys, now = min(differing, key=lambda pair: len(pair[0]))
    return f"{line}; {_said(keys, then, now)}"


def _not_compared(cells: Sequence[Cell], runs: Sequence[Run]) -> list[str]:
    """Which newer runs have a cell under other conditions, and which condition it is."""
    lines: dict[str, None] = {}
    for cell in cells:
        for run in runs:
            if run is cell.run:
                break
            namesakes = [then for then in run.entries if _is_namesake(cell.now, then)]
            differing = [(record.differing(cell.now, then, SAME_CELL), then) for then in namesakes]
            if differing:
                keys, then = min(differing, key=lambda pair: len(pair[0]))
                lines[f"not compared with {run.name}: {_said(keys, then, cell.now)}"] = None
    return list(lines)


def _not_known(cells: Sequence[Cell], limits: Limits) -> list[str]:
    """What a pass does not say."""
    pairs = [(cell.now, cell.then, cell.run) for cell in cells if cell.then and cell.run]
    notes = [
        f"{run.name} does not say its methods' settings: whether methods of one name are the same is not known"
        for run in {run.path: run for _, then, run in pairs if then.get("method_digest") is None}.values()
    ]
    notes += [
        f"{_name(cell.now)}: the speedup is undecided after {_pairs_of(cell.now)}"
        for cell in cells
        if cell.verdict == "undecided"
    ]
    unlike = [keys for now, then, _ in pairs if (keys := record.differing(now, then, ("seed", "planned_steps")))]
    if unlike and (limits.loss_fail is not None or limits.step_fail is not None):
        names = " and ".join(dict.fromkeys(key.replace("_", " ") for keys in unlike for key in keys))
        notes.append(f"losses and steps of {len(unlike)} cells are not compared: their {names} differ")
    unpaired = [now for now, then, _ in pairs if then["method"] != record.BASELINE and not log_ratios(then)]
    unpaired = [now for now in unpaired if now["outcome"] == "completed"]
    if unpaired and limits.speedup_fail is not None:
        notes.append(
            f"no verdict on the speedup of {', '.join(map(_name, unpaired))}: the stored run has no pairs of rounds"
        )
    if limits.step_fail is None and limits.stock_step_fail is None:
        return notes
    alike = [(now, then) for now, then, _ in pairs if not record.differing(now, then, SAME_TRIAL)]
    limit_of = {True: limits.step_fail, False: limits.stock_step_fail}
    if not any(_is_timed_alone(*pair) and limit_of[bool(pair[1].get("captured"))] is not None for pair in alike):
        notes.append(
            "not known: a slowdown that a cell shares with its baseline. A step's own time shows it, and none was "
            "compared: a captured step's is under --step-fail, any other's on a GPU under --stock-step-fail, and on a "
            "CPU it depends on what else runs there"
        )
    return notes


def _is_namesake(now: Entry, then: Entry) -> bool:
    return (then["model"], then["method"]) == (now["model"], now["method"])


def _said(keys: Sequence[str], then: Entry, now: Entry) -> str:
    return ", ".join(f"{key} is {_brief(then.get(key))} there and {_brief(now.get(key))} here" for key in keys)


def _changed(now: Entry, then: Entry) -> str:
    """What is installed in another version, the GPU's driver included."""
    installed_now = (now["versions"] or {}) | {"driver": now.get("device_driver")}
    installed_then = (then["versions"] or {}) | {"driver": then.get("device_driver")}
    changed = [
        f"{package} {installed_then.get(package)} -> {installed_now.get(package)}"
        for package in {**installed_then, **installed_now}
        if installed_then.get(package) != installed_now.get(package) and package in installed_then
    ]
    return f"Changed since: {', '.join(changed)}" if changed else "No version has changed since"


def _name(entry: Entry) -> str:
    on = f" on {entry['world_size']} GPUs" if entry["world_size"] > 1 else ""
    return one_line(f"{entry['model']} x {entry['method']}{on}")


def _words(outcome: str) -> str:
    return outcome.replace("_", " ")


def _brief(value: object) -> str:
    return str(value)[:40] if len(str(value)) < 60 else f"{str(value)[:12]}..."
