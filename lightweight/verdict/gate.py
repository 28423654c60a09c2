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

from lightweight import record
from lightweight.record import (
    BASELINE,
    OF_METHOD,
    SAME_BASELINE,
    SAME_CELL,
    SAME_TRIAL,
    SAME_WEIGHTS,
    Entry,
    Likeness,
    Run,
    Speedup,
    baseline_of,
    differing_settings,
    one_line,
)
from lightweight.schema import GateVerdict
from lightweight.settings import MAX_LENGTH
from lightweight.targets import size
from lightweight.verdict import ratio, unlike
from lightweight.verdict.limits import Limits
from lightweight.verdict.ratio import Interval

SAME_SETTING = SAME_BASELINE.but("model")
"""What a whole run was made under: where one cell of a stored run shares it with the new run, the others belong to the
comparison as well."""

SAME_MACHINE = Likeness(("device", "corpus_digest"))
"""What a stored cell shares with one of the new run where another cell of its run was compared."""

SAME_LENGTH = Likeness(("seed", "planned_steps"))
"""What two runs of a cell share besides, if their losses and steps can be compared as well."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of the new run, what it is compared with, and what was found. `failures` has one line a reason."""

    now: Entry
    then: Entry | None = None
    run: Run | None = None
    against_stored: Interval | None = None
    verdict: GateVerdict | None = None
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
    runs, problems = load_holding("trial", paths, lambda run: bool(run.entries))
    return sorted(runs, key=attrgetter("ended"), reverse=True), problems


def load_holding(what: str, paths: Iterable[Path], holds: Callable[[Run], bool]) -> tuple[list[Run], list[str]]:
    """Those runs stored at `paths` which have `what` is compared, and a line for each other file."""
    runs, problems = [], []
    for path in paths:
        try:
            run = record.load(path)
        except record.RecordError as error:
            problems.append(f"left out: {error}")
            continue
        if holds(run):
            runs.append(run)
        else:
            problems.append(one_line(f"left out: record {path}: holds no {what}, so nothing can be compared with it"))
    return runs, problems


def stored(now: Entry, runs: Sequence[Run]) -> tuple[Run, Entry] | None:
    """The same cell under the same conditions in the newest of `runs` that has it."""
    for run in runs:
        same = [then for then in run.entries if SAME_CELL.holds(now, then)]
        if same:  # of several, the one of the same length, and of the same seed
            return run, max(same, key=lambda then: [then.planned_steps == now.planned_steps, then.seed == now.seed])
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
        notes += [f"appeared: {_name(cell.now)}{_seed(cell.now, entries)}" for cell in cells if cell.then is None]
        notes += _not_known(cells, limits)
    else:
        nothing = "NOTHING WAS COMPARED: no stored run has a cell of this one under the same conditions"
        (of_run if limits.require_match else notes).append(
            f"{nothing}: store this run with --benchmark-autosave, or keep the file of --benchmark-json"
        )
    return Comparison(cells=cells, of_run=of_run, notes=notes)


def log_ratios(entry: Entry | None) -> tuple[float, ...]:
    """The pairs an entry's speedup was measured with; none where it was not."""
    return entry.speedup.log_ratios if entry and entry.speedup else ()


def in_turn(*entries: Entry | None) -> int:
    """In how many of `entries` the two sides of a pair were measured one after the other."""
    return sum(entry.speedup.is_in_turn for entry in entries if entry and entry.speedup)


# One cell


def _cell(now: Entry, entries: Sequence[Entry], counterpart: tuple[Run, Entry] | None, limits: Limits) -> Cell:
    if counterpart is None:
        return Cell(now=now)
    run, then = counterpart
    against, verdict, failures = None, None, []
    if _ended_worse(now, then):
        if limits.ask:
            failures.append(f"{_name(now)}: {_words(then.outcome)} in {run.name}, {_words(now.outcome)} now")
    else:
        against, verdict, failures = _speedup(now, then, run, limits)
        failures += _memory_failures(now, then, entries, run, limits)
        if now.outcome == then.outcome == "completed":
            failures += [
                *_training_failures(now, then, run, limits),
                *_loss_failures(now, then, run, limits),
                *_step_failures(now, then, run, limits),
            ]
    changed = _changed(now, then)
    return Cell(
        now=now,
        then=then,
        run=run,
        against_stored=against,
        verdict="fail" if failures else verdict,
        failures=tuple(
            f"{_name(now)}{_seed(now, entries)}{failure.removeprefix(_name(now))}. {changed}" for failure in failures
        ),
    )


def _ended_worse(now: Entry, then: Entry) -> bool:
    """Completing is better than running out of memory, which still is an answer, and any other end is none."""
    order = ("completed", "out_of_memory")
    of_now, of_then = (order.index(entry.outcome) if entry.outcome in order else len(order) for entry in (now, then))
    return of_now > of_then


def _speedup(
    now: Entry, then: Entry, run: Run, limits: Limits
) -> tuple[Interval | None, GateVerdict | None, list[str]]:
    """How many times the stored speedup this one is, the verdict on it, and why it fails."""
    pairs_now, pairs_then = log_ratios(now), log_ratios(then)
    if not pairs_then:
        return None, None, []
    if not pairs_now or now.speedup is None:
        why = (now.speedup and now.speedup.reason) or "no pairs of rounds were measured: run test_speedup as well"
        was = f"{_name(now)}: speedup {_interval_of(then)} in {run.name}, none now: {why}"
        return None, None, [was] if limits.speedup_fail else []
    against = ratio.repeated_interval(pairs_now, now.speedup.cap, pairs_then, in_turn(now, then))
    if limits.speedup_fail is None:
        return against, None, []
    floor = 1 - limits.speedup_fail
    verdict = ratio.verdict(against, floor)
    if verdict == "pass" or (verdict == "undecided" and limits.undecided == "pass"):
        return against, verdict, []
    is_or_may = "is" if verdict == "fail" else f"is undecided after {_pairs(now.speedup)}:"
    return (
        against,
        verdict,
        [
            f"{_name(now)}: speedup {_interval_of(now)} now, {_interval_of(then)} in {run.name}; "
            f"now / stored {is_or_may} {against}, the floor {floor:.3f}"
        ],
    )


def _pairs(speedup: Speedup) -> str:
    """How many pairs of rounds there were, and what ended them where it was the time for them."""
    ended = speedup.ended_after_seconds
    over = "" if ended is None else f", since the {ended:.0f} s for them were over"
    return f"{len(speedup.log_ratios)} pairs{over}"


def _interval_of(entry: Entry) -> Interval:
    return ratio.interval(log_ratios(entry), in_turn=in_turn(entry))


def _memory_failures(now: Entry, then: Entry, entries: Sequence[Entry], run: Run, limits: Limits) -> list[str]:
    """Allocated memory is the same in every run of a cell, so a single byte over the limit is one too many."""
    if limits.memory_fail is None or now.outcome != "completed" or then.outcome != "completed":
        return []
    if not then.peak_allocated_bytes:
        return []  # a whole process's memory on the host is not exact
    if not now.peak_allocated_bytes:
        was = size(then.peak_allocated_bytes)
        return [f"{_name(now)}: peak memory {was} in {run.name}, none now: it was not measured"]
    held_now, held_then = Fraction(now.peak_allocated_bytes), Fraction(then.peak_allocated_bytes)
    of_now, of_then = _baseline_bytes(now, entries), _baseline_bytes(then, run.entries)
    what, unit = "peak memory", " bytes"
    if of_now and of_then and now.method != BASELINE:
        held_now, held_then = held_now / of_now, held_then / of_then
        what, unit = "memory ratio", " of the baseline's"
    if held_now <= held_then * (1 + Fraction(limits.memory_fail)):
        return []
    exact = "{:.4f}" if unit != " bytes" else "{:.0f}"
    return [
        f"{_name(now)}: {what} {exact.format(float(held_now))}{unit} now, {exact.format(float(held_then))} in "
        f"{run.name}: {float(held_now / held_then - 1):+.1%}, more than {limits.memory_fail:+.1%}; both are exact"
    ]


def _training_failures(now: Entry, then: Entry, run: Run, limits: Limits) -> list[str]:
    """Why the training of a trial fails, of the same seed and as many planned steps: a loss and a step's time say
    nothing where it ended earlier, or had other rows or rates."""
    if not limits.ask or not SAME_TRIAL.holds(now, then):
        return []
    failures = []
    if now.steps < then.steps:
        failures.append(f"{_name(now)}: {now.steps} of {now.planned_steps} steps now, {then.steps} in {run.name}")
    for what, seen_now, seen_then in (
        ("tokens", sum(now.step_tokens or ()), sum(then.step_tokens or ())),
        ("rows", now.training_rows or 0, then.training_rows or 0),
    ):
        if seen_then and seen_now != seen_then and now.steps == then.steps:
            failures.append(f"{_name(now)}: trained on {seen_now:,} {what} now, {seen_then:,} in {run.name}")
    if now.data_note and now.data_note != then.data_note:
        was = then.data_note or "no such note"
        failures.append(one_line(f"{_name(now)}: trained otherwise now: {now.data_note}; {was} in {run.name}"))
    return failures


def _loss_failures(now: Entry, then: Entry, run: Run, limits: Limits) -> list[str]:
    """Why the losses of a trial fail, of the same seed and as many steps."""
    if limits.loss_fail is None or not SAME_WEIGHTS.holds(now, then):
        return []
    losses = [("held-out loss", then.heldout_loss_after, now.heldout_loss_after)]
    if now.elsewhere_digest == then.elsewhere_digest:
        losses.append(("loss elsewhere", then.elsewhere_loss_after, now.elsewhere_loss_after))
    failures = []
    for what, was, is_ in losses:
        if was is not None and is_ is None:
            failures.append(f"{_name(now)}: {what} {was:.4f} in {run.name}, none now")
        elif was is not None and is_ is not None and is_ - was > limits.loss_fail:
            failures.append(
                f"{_name(now)}: {what} {is_:.4f} nats a token now, {was:.4f} in {run.name}: {is_ - was:+.4f}, "
                f"more than {limits.loss_fail:+g}"
            )
    return failures


def _step_failures(now: Entry, then: Entry, run: Run, limits: Limits) -> list[str]:
    """Why a step's own time fails, on the same card, of the same seed and as many steps."""
    if not SAME_TRIAL.holds(now, then) or not then.steady_step_seconds:
        return []
    limit = limits.step_fail if then.captured else limits.stock_step_fail
    if limit is None or not _is_timed_alone(now, then):
        return []
    was = f"{then.steady_step_seconds * 1000:.2f} ms in {run.name}"
    if then.captured and not now.captured:
        why = now.capture_note or "no note says why"
        return [f"{_name(now)}: a captured step of {was}, not captured now: {why}"]
    if not now.steady_step_seconds:
        return [f"{_name(now)}: a step of {was}, none now: it was not measured"]
    rise = now.steady_step_seconds / then.steady_step_seconds - 1
    if rise <= limit:
        return []
    kind = "captured step" if then.captured else "step"
    return [
        f"{_name(now)}: {kind} {now.steady_step_seconds * 1000:.2f} ms now on {now.device}, {was}: {rise:+.1%}, "
        f"more than {limit:+.1%}"
    ]


def _is_timed_alone(now: Entry, then: Entry) -> bool:
    """Whether a step's own time means something in another run: not so on a CPU, whose cores others use as well."""
    return bool(then.captured) or now.device_bytes is not None


def _baseline_bytes(entry: Entry, entries: Sequence[Entry]) -> int | None:
    baseline = baseline_of(entry, entries)
    return baseline.peak_allocated_bytes if baseline and baseline.outcome == "completed" else None


# The run as a whole


def _missing(cells: Sequence[Cell], entries: Sequence[Entry], runs: Sequence[Run]) -> Iterator[tuple[Run, Entry]]:
    """Stored entries that the new run has no counterpart of, each with its run: of the runs that cells were compared
    with, on the same device and corpus; where no cell found its like, of the newest run of the same setting."""
    here = [run for run in runs if any(cell.run is run for cell in cells)]
    like = SAME_MACHINE
    if not here:
        like = SAME_SETTING
        here = [run for run in runs if any(like.holds(then, now) for then in run.entries for now in entries)]
        here = here[:1] if entries else list(runs[:1])
    missing: list[Entry] = []
    for run in here:
        left = list(entries)
        for then in sorted(run.entries, key=lambda then: not any(SAME_TRIAL.holds(then, e) for e in left)):
            same = [now for now in left if SAME_CELL.holds(then, now)]
            if same:
                taken = max(same, key=lambda now: SAME_TRIAL.holds(then, now))
                left = [now for now in left if now is not taken]
                continue
            is_of_here = not entries or any(like.holds(then, now) for now in entries)
            if is_of_here and not any(SAME_TRIAL.holds(then, other) for other in missing):
                missing.append(then)
                yield run, then


def _missing_line(run: Run, then: Entry, entries: Sequence[Entry]) -> str:
    which = {"seed": then.seed, "steps": then.planned_steps}
    trial = ", ".join(f"{what} {number}" for what, number in which.items() if number is not None)
    line = f"{_name(then)}: missing now, {_words(then.outcome)} in {run.name}" + f" ({trial})" * bool(trial)
    namesakes = [now for now in entries if _is_namesake(now, then)]
    differing = [(keys, now) for now in namesakes if (keys := SAME_CELL.differing(now, then))]
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
            differing = [(SAME_CELL.differing(cell.now, then), then) for then in namesakes]
            if differing:
                keys, then = min(differing, key=lambda pair: len(pair[0]))
                lines[f"not compared with {run.name}: {_said(keys, then, cell.now)}"] = None
    return list(lines)


def _not_known(cells: Sequence[Cell], limits: Limits) -> list[str]:
    """What a pass does not say."""
    pairs = [(cell.now, cell.then, cell.run) for cell in cells if cell.then and cell.run]
    entries = [cell.now for cell in cells]
    notes = [
        f"{run.name} does not say its methods' settings: whether methods of one name are the same is not known"
        for run in {run.path: run for _, then, run in pairs if then.method_digest is None}.values()
    ]
    notes += [
        f"{_name(cell.now)}{_seed(cell.now, entries)}: the speedup is undecided after {_pairs(cell.now.speedup)}"
        for cell in cells
        if cell.verdict == "undecided" and cell.now.speedup
    ]
    unlike = [keys for now, then, _ in pairs if (keys := SAME_LENGTH.differing(now, then))]
    if unlike and (limits.loss_fail is not None or limits.step_fail is not None):
        names = " and ".join(dict.fromkeys(key.replace("_", " ") for keys in unlike for key in keys))
        notes.append(f"losses and steps of {len(unlike)} cells are not compared: their {names} differ")
    redrawn = [now for now, then, _ in pairs if SAME_TRIAL.holds(now, then) and not SAME_WEIGHTS.holds(now, then)]
    if redrawn and limits.loss_fail is not None:
        notes.append(f"losses of {len(redrawn)} cells are not compared: their weights revision differs")
    unpaired = [now for now, then, _ in pairs if then.method != BASELINE and not log_ratios(then)]
    unpaired = [now for now in unpaired if now.outcome == "completed"]
    if unpaired and limits.speedup_fail is not None:
        names = ", ".join(dict.fromkeys(map(_name, unpaired)))
        notes.append(f"no verdict on the speedup of {names}: the stored run has no pairs of rounds")
    if limits.step_fail is None and limits.stock_step_fail is None:
        return notes
    alike = [(now, then) for now, then, _ in pairs if SAME_TRIAL.holds(now, then)]
    limit_of = {True: limits.step_fail, False: limits.stock_step_fail}
    if not any(_is_timed_alone(*pair) and limit_of[bool(pair[1].captured)] is not None for pair in alike):
        notes.append(
            "not known: a slowdown that a cell shares with its baseline. A step's own time shows it, and none was "
            "compared: a captured step's is under --step-fail, any other's on a GPU under --stock-step-fail, and on a "
            "CPU it depends on what else runs there"
        )
    return notes


def _is_namesake(now: Entry, then: Entry) -> bool:
    return (then.model, then.method) == (now.model, now.method)


def _said(keys: Sequence[str], then: Entry, now: Entry) -> str:
    differing = {key: (getattr(then, key), getattr(now, key)) for key in keys}
    if "method_digest" in differing:  # what it is of says more
        of_then, of_now = ({key: getattr(entry, key) for key in OF_METHOD} for entry in (then, now))
        found = differing_settings(of_then, of_now) or {"method_digest": differing["method_digest"]}
        differing = {**{key: pair for key, pair in differing.items() if key != "method_digest"}, **found}
    return unlike.said(differing)


def _changed(now: Entry, then: Entry) -> str:
    """What is installed in another version, the GPU's driver included."""
    installed_now = {**(now.versions or {}), "driver": now.device_driver}
    installed_then = {**(then.versions or {}), "driver": then.device_driver}
    changed = [
        f"{package} {installed_then.get(package)} -> {installed_now.get(package)}"
        for package in {**installed_then, **installed_now}
        if installed_then.get(package) != installed_now.get(package) and package in installed_then
    ]
    return f"Changed since: {', '.join(changed)}" if changed else "No version has changed since"


def _name(entry: Entry) -> str:
    on = f" on {entry.world_size} GPUs" if entry.world_size > 1 else ""
    rows = f" in rows of {entry.max_length}" if entry.max_length not in (None, MAX_LENGTH) else ""
    return one_line(f"{entry.model} x {entry.method}{rows}{on}")


def _seed(entry: Entry, entries: Sequence[Entry]) -> str:
    """Which seed it is, where `entries` have the cell with several."""
    seeds = {other.seed for other in entries if SAME_CELL.holds(other, entry)}
    return f" (seed {entry.seed})" if len(seeds) > 1 else ""


def _words(outcome: str) -> str:
    return outcome.replace("_", " ")
