"""Which trials are shown, and which belong together? The newest of several runs, and the longest of a cell's trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightweight import targets
from lightweight.record import (
    SAME_BASELINE,
    SAME_METHOD,
    SAME_TRIAL,
    Entry,
    ForecastRow,
    Likeness,
    Run,
    baseline_of,
)

SAME_PLACE = SAME_METHOD.also("seed")
"""What the trials of a cell have in common, however long they are."""

SAME_DATA = Likeness(("model", "corpus_digest", "max_length"))
"""What trials have in common whose examples have the same lengths."""

SAME_CLIMB = Likeness(("model", "target", "world_size", "device"))
"""What the rungs of a ladder have in common beside their test."""


def by_age(runs: Sequence[Run]) -> list[Run]:
    """`runs`, the oldest first."""
    return sorted(runs, key=lambda run: run.ended)


def newest(runs: Sequence[Run]) -> list[Entry]:
    """The entries of all runs, less those of trials that a newer run has again, in the order in which trials came."""
    namesakes: dict[tuple[Any, ...], list[tuple[int, Entry]]] = {}
    for age, run in enumerate(by_age(runs)):
        for entry in run.entries:
            namesakes.setdefault(SAME_TRIAL.but("method_digest").of(entry), []).append((age, entry))
    return [
        entry
        for of in namesakes.values()
        for age, entry in of
        if not any(newer > age and SAME_TRIAL.holds(entry, other) for newer, other in of)
    ]


def trend(entry: Entry, runs: Sequence[Run]) -> list[tuple[Run, Entry]]:
    """A trial in every run that has it, the oldest first."""
    same = [(run, [then for then in run.entries if SAME_TRIAL.holds(then, entry)]) for run in by_age(runs)]
    return [(run, of_run[-1]) for run, of_run in same if of_run]


def of_data(entries: Sequence[Entry]) -> list[Entry]:
    """Of the entries that know how long their examples are, the first of each model, corpus and length of rows."""
    known = [entry for entry in entries if lengths_of(entry)]
    return [group[0] for group in SAME_DATA.groups(known)]


def lengths_of(entry: Entry) -> list[tuple[int, int]]:
    """How many examples have up to how many tokens, and more than the bound before it."""
    written = entry.example_tokens or {}
    return sorted((int(bound), count) for bound, count in written.items() if bound.isascii() and bound.isdigit())


def main_cells(entries: Sequence[Entry]) -> list[Entry]:
    """Those of `entries` that say how a method does on a card: of a cell's trials the longest; where its model has been
    trained for an epoch, at least as long or the control of a cell that does not complete; no rung of a ladder, no
    budget made for a check."""
    whole = on_cards(entries)
    longest: dict[tuple[Any, ...], int] = {}
    for entry in whole:
        cell = SAME_PLACE.of(entry)
        longest[cell] = max(longest.get(cell, 0), planned(entry))
    ended = {(entry.model, entry.method) for entry in whole if entry.outcome != "completed"}
    whole_jobs = {entry.model for entry in whole if _is_an_epoch(entry)}
    return [
        entry
        for entry in whole
        if planned(entry) == longest[SAME_PLACE.of(entry)]
        and (_is_an_epoch(entry) or entry.model not in whole_jobs or (entry.model, entry.method) in ended)
    ]


def others(entries: Sequence[Entry]) -> list[Entry]:
    """Those of `entries` that are no main cell, no rung and no peer."""
    elsewhere = [*main_cells(entries), *_rungs_and_peers(entries)]
    return [entry for entry in entries if not any(entry is cell for cell in elsewhere)]


def on_cards(entries: Sequence[Entry]) -> list[Entry]:
    """Those of `entries` that are no rung and no peer and ran on a card, not under a budget that a test made up."""
    apart = _rungs_and_peers(entries)
    return [entry for entry in entries if not any(entry is other for other in apart) and is_card(entry.target)]


def peers(entries: Sequence[Entry]) -> list[Entry]:
    """Those of `entries` that a user could pick from."""
    return [entry for entry in entries if entry.shown_as == "peers"]


def ladders(entries: Sequence[Entry]) -> list[list[Entry]]:
    """The rungs of every ladder, each from its bottom up: entries of one test, model, target and device, in order."""

    def of(entry: Entry) -> tuple[Any, ...]:
        return str(entry.test).partition("[")[0], *SAME_CLIMB.of(entry)

    rungs = [entry for entry in entries if entry.shown_as == "ladder"]
    climbs = [[entry for entry in rungs if of(entry) == key] for key in dict.fromkeys(map(of, rungs))]
    return [ladder for ladder in climbs if len(ladder) > 1]


def _rungs_and_peers(entries: Sequence[Entry]) -> list[Entry]:
    return [*(rung for ladder in ladders(entries) for rung in ladder), *peers(entries)]


def groups(entries: Sequence[Entry]) -> list[list[Entry]]:
    """The cells of each model on each target of a device, which is what is compared."""
    return SAME_BASELINE.groups(entries)


def pace_of(entry: Entry, entries: Sequence[Entry]) -> Entry | None:
    """The baseline whose step `entry`'s is held against: the one of its own run where that has one, however short,
    since the same card steps at another pace on another host."""
    own = baseline_of(entry, [other for other in entries if other.run == entry.run])
    return own or baseline_of(entry, entries)


def one_seed(group: Sequence[Entry]) -> list[Entry]:
    """Those of a model's cells on a target that stand for all: a method's first seed, and every cell that failed."""
    first: dict[tuple[Any, ...], Entry] = {}
    for entry in group:
        first.setdefault(method_of(entry), entry)
    return [entry for entry in group if entry is first[method_of(entry)] or entry.outcome != "completed"]


def seeds_of(entry: Entry, group: Sequence[Entry]) -> list[Entry]:
    """Those of `group` that completed with `entry`'s method, a seed each."""
    return [other for other in group if method_of(other) == method_of(entry) and other.outcome == "completed"]


def method_of(entry: Entry) -> tuple[str, str | None]:
    """What tells methods of a group apart."""
    return entry.method, entry.method_digest


def planned(entry: Entry) -> int:
    """Optimizer steps of the whole trial, 0 where the record does not say."""
    return entry.planned_steps or 0


def _is_an_epoch(entry: Entry) -> bool:
    return planned(entry) >= (entry.steps_per_epoch or 1)


def is_card(target: str) -> bool:
    """Whether `target` is a card, an amount of memory or the CPU, not a budget that a test made up."""
    try:
        return target == targets.CPU.name or bool(targets.named(target))
    except ValueError:
        return False


def forecasts(runs: Sequence[Run]) -> list[ForecastRow]:
    """What was forecast and not trained, once for each model, method and target: of the newest run that has it the
    largest rows."""
    largest: dict[tuple[Any, ...], ForecastRow] = {}
    for run in by_age(runs):
        for row in sorted(run.forecasts, key=lambda row: row.max_length or 0):
            largest[cell_of(row)] = row
    return list(largest.values())


def cell_of(one: Entry | ForecastRow) -> tuple[str, str, str]:
    """Model, method and how many of which target: where a forecast and a trial are of the same."""
    return one.model, one.method, target_of(one)


def target_of(one: Entry | ForecastRow) -> str:
    """The target of a trial or of a forecast, and how many of it, where that is more than one: `2 x t4`."""
    gpus = None if isinstance(one, Entry) else one.gpus
    return several(one.world_size or gpus or 1, one.target)


def several(count: int, name: str) -> str:
    """How many of what is called `name`, where that is more than one."""
    return name if count == 1 else f"{count} x {name}"
