"""What fits which card? For each model and method, from trials where there are some, else from forecasts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightweight import targets
from lightweight.record import Entry, Run
from lightweight.report import select
from lightweight.report.select import is_card, several, target_of
from lightweight.report.words import ending


@dataclass(frozen=True, kw_only=True)
class Place:
    """Whether one model x method fits one card: `fits`, `does_not_fit`, `too_close_to_call`, or how else it ended; from
    a measured outcome, whose entry that is, or from a forecast."""

    verdict: str
    entry: Entry | None = None

    @property
    def text(self) -> str:
        """As a cell of the table."""
        words = "out of memory" if self.entry and self.verdict == "does_not_fit" else ending(self.verdict)
        return words if self.entry else f"{words} (forecast)"


def places(runs: Sequence[Run]) -> dict[tuple[str, str], dict[str, Place]]:
    """By model and method, by card: fits or not. An outcome stands before a forecast; the CPU is no card."""
    by_method: dict[tuple[str, str], dict[str, Place]] = {}
    for row in select.forecasts(runs):
        if is_card(row.target) and row.budget_bytes:
            by_method.setdefault((row.model, row.method), {})[target_of(row)] = Place(verdict=row.verdict)
    entries = select.newest(runs)
    for entry in [*select.on_cards(entries), *select.main_cells(entries)]:  # the longest trial says it last
        if entry.peak_allocated_bytes or entry.outcome == "out_of_memory":
            verdicts = {"completed": "fits", "out_of_memory": "does_not_fit"}
            place = Place(verdict=verdicts.get(entry.outcome, entry.outcome), entry=entry)
            by_method.setdefault((entry.model, entry.method), {})[_had_to_fit(entry)] = place
    order = {model: number for number, (model, _) in reversed(list(enumerate(by_method)))}
    return dict(sorted(by_method.items(), key=lambda item: order[item[0][0]]))


def _had_to_fit(entry: Entry) -> str:
    """What the trial had to fit: the target, or the card itself."""
    return target_of(entry) if entry.target != "native" else several(entry.world_size, entry.device)


def cards(by_method: Mapping[tuple[str, str], Mapping[str, Place]]) -> list[str]:
    """The cards of a frontier, the smallest first."""
    named = dict.fromkeys(card for of in by_method.values() for card in of)
    return sorted(named, key=lambda card: card_bytes(card) or float("inf"))


def card_bytes(card: str) -> int | None:
    """The bytes that a card of this name, or several, have; None for one that no target is called by."""
    count, _, name = card.rpartition(" x ")
    try:
        total_bytes = targets.named(name).total_bytes
    except ValueError:
        return None
    return total_bytes and total_bytes * int(count or 1)
