"""What has this session found? What each test found travels on its report, and is kept in the process that has all.

Under pytest-xdist reports cross from a worker to the controller, and carry plain JSON alone: `Shipment.as_json` and
`Shipment.of_json` are the border.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from lightweight import record
from lightweight.internals import pytest_benchmark
from lightweight.record import SAME_TRIAL, Entry, ForecastRow, Speedup
from lightweight.session import xdist_bridge
from lightweight.session.fixtures import NOT_RUN
from lightweight.session.journal import Journal


@dataclass
class Shipment:
    """What a test found: entries, forecasts, and speedups each with the trial that it is of."""

    entries: list[Entry] = field(default_factory=list)
    forecasts: list[ForecastRow] = field(default_factory=list)
    speedups: list[tuple[Entry, Speedup]] = field(default_factory=list)

    def and_also(self, more: Shipment) -> Shipment:
        """This, and `more` after it."""
        return Shipment(
            [*self.entries, *more.entries], [*self.forecasts, *more.forecasts], [*self.speedups, *more.speedups]
        )

    def as_json(self) -> dict[str, Any]:
        """As pytest-xdist carries it; empty where nothing was found."""
        lists = {
            "entries": [record.as_json(entry) for entry in self.entries],
            "forecasts": [record.as_json(row) for row in self.forecasts],
            "speedups": [record.as_json(replace(entry, speedup=speedup)) for entry, speedup in self.speedups],
        }
        return {key: each for key, each in lists.items() if each}

    @classmethod
    def of_json(cls, shipped: dict[str, Any]) -> Shipment:
        """What `as_json` said."""
        measured = [record.entry_of(entry) for entry in shipped.get("speedups", ())]
        return cls(
            entries=[record.entry_of(entry) for entry in shipped.get("entries", ())],
            forecasts=[record.forecast_of(row) for row in shipped.get("forecasts", ())],
            speedups=[(entry, entry.speedup) for entry in measured if entry.speedup],
        )


_SHIPMENT = pytest.StashKey[Shipment]()


def shipment(item: pytest.Item) -> Shipment:
    """What `item` has found so far."""
    return item.stash.setdefault(_SHIPMENT, Shipment())


class Ledger:
    """All that was found in this session, in the order in which tests reported it."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.entries: list[Entry] = []
        self.forecasts: list[ForecastRow] = []
        self.not_run: Counter[str] = Counter()
        self.is_used = False  # by a test of this session
        self.journal = Journal(config)
        self._begun: dict[str, Shipment] = {}

    def tell_begun(self, item: pytest.Item, begun: Shipment | None = None) -> None:
        """What this test has found so far, and what it is about to find, as it stands if this process, or the test,
        ends before it could report."""
        so_far = shipment(item).and_also(begun or Shipment())
        self._begun[item.nodeid] = so_far
        xdist_bridge.tell_begun(item, so_far.as_json())
        self._keep()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """What was found travels on the test's report, which is what pytest-xdist carries from a worker to the
        controller."""
        made = yield
        vars(made)["lightweight"] = shipment(item).as_json()
        del item.stash[_SHIPMENT]
        return made

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if begun := getattr(report, "lightweight_begun", None):
            self._begun[report.nodeid] = Shipment.of_json(begun)
            self._keep()
        elif (shipped := getattr(report, "lightweight", None)) is not None:
            if report.when == "setup":  # of a test that is run again, the last time counts
                self.entries = [entry for entry in self.entries if entry.test != report.nodeid]
            self._begun.pop(report.nodeid, None)
            self._take(Shipment.of_json(shipped))
        if report.skipped and isinstance(report.longrepr, tuple) and NOT_RUN in report.longrepr[2]:
            reason = report.longrepr[2].removeprefix("Skipped: ")
            self.not_run[f"{reason}: {report.nodeid.partition('[')[0]}"] += 1

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str) -> None:
        """A worker of pytest-xdist died in a test: what it had begun is recorded as crashed."""
        if begun := self._begun.pop(crashitem, None):
            self._take(begun)

    def take_unreported(self) -> None:
        """Record also what was found or cut short in a test that could not report it."""
        while self._begun:
            self._take(self._begun.popitem()[1])
        if self.entries or self.forecasts:
            pytest_benchmark.save_without_rows(self.config)
        if self.is_used:
            self.journal.take_over()

    def _keep(self) -> None:
        """Have on the disk all that was found, and what has begun as it stands if this process is killed now."""
        if self.journal.is_kept:
            found = Shipment(self.entries, self.forecasts)
            for begun in self._begun.values():
                found = _with(found, begun)
            self.journal.write(found.entries, found.forecasts)

    def _take(self, shipped: Shipment) -> None:
        found = _with(Shipment(self.entries, self.forecasts), shipped)
        self.entries, self.forecasts = found.entries, found.forecasts
        if shipped != Shipment():
            self._keep()


def _with(found: Shipment, shipped: Shipment) -> Shipment:
    """`found` and `shipped` after it, whose speedups are put into the trials that they are of."""
    entries = [*found.entries, *shipped.entries]
    for trial, speedup in shipped.speedups:
        index = next((i for i, entry in enumerate(entries) if SAME_TRIAL.holds(entry, trial)), None)
        if index is not None:
            entries[index] = replace(entries[index], speedup=speedup)
    return Shipment(entries, [*found.forecasts, *shipped.forecasts])
