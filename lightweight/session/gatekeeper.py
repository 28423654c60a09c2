"""`--benchmark-compare` in a session: the stored runs it is compared with, the verdict at its end and its exit status.

How the verdict is reached is in `verdict/gate`; the command `lightweight gate` is `cli/gate`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Generator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lightweight import models, record
from lightweight.internals import pytest_benchmark, xdist
from lightweight.report import comparison
from lightweight.verdict import gate
from lightweight.verdict.limits import LIMITS

if TYPE_CHECKING:
    from lightweight.session.laboratory import Laboratory


class Gatekeeper:
    """`--benchmark-compare`: this run beside the newest stored one of the same conditions, and whether it got worse."""

    def __init__(self, laboratory: Laboratory) -> None:
        self.laboratory, self.config = laboratory, laboratory.config
        limits = laboratory.limits  # refused now, if they make no sense
        self.problems: list[str] = []
        self.selected: set[str] = set()
        self.deselected: set[str] = set()
        self.compares = bool(self.config.getoption("benchmark_compare", None))
        if hasattr(self.config, "workerinput"):
            sent = json.loads(self.config.workerinput.get("lightweight_runs", "[]"))
            laboratory.runs = [record.run(run, Path(path)) for path, run in sent]
        elif self.compares:
            laboratory.runs, self.problems = gate.load(self._stored_files())
            # pytest-benchmark takes a path: times are compared with the run that ratios are compared with, or not
            pytest_benchmark.compare_with(self.config, self._newest_alike())
        elif limits.ask or limits.require_match:
            given = [limit.flag for limit in LIMITS if getattr(limits, limit.name) is not None]
            given += ["--require-match"] * limits.require_match
            raise pytest.UsageError(
                f"{', '.join(given)}: there is no stored run to compare with: add --benchmark-compare"
            )

    def _stored_files(self) -> list[Path]:
        storage = self.config.getoption("benchmark_storage")
        named = self.config.getoption("benchmark_compare")
        if "://" in storage and not storage.startswith("file://"):
            raise pytest.UsageError(f"--benchmark-storage {storage}: --benchmark-compare reads stored files only")
        folder = storage.removeprefix("file://")
        try:
            return list(map(Path, pytest_benchmark.stored_files(folder, None if named is True else named)))
        except ValueError as error:
            raise pytest.UsageError(f"--benchmark-compare: {error}") from None

    def _newest_alike(self) -> str | None:
        """The newest run on this device and target; what else tells two runs apart shows only in their cells."""
        here = self.laboratory
        for run in here.runs:
            if any((e.device, e.target) == (here.device.name, here.target.name) for e in run.entries):
                return str(run.path)
        return None

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Workers, which may be on other machines, get what they need to know when a speedup's verdict is clear."""
        sent = []
        for run in self.laboratory.runs:
            entries = [dataclasses.replace(entry, step_seconds=(), train_loss=()) for entry in run.entries]
            sent.append((str(run.path), record.document(entries) | {"datetime": run.ended}))
        node.workerinput["lightweight_runs"] = json.dumps(sent)

    @cached_property
    def comparison(self) -> gate.Comparison:
        """This session's cells beside the stored ones, made once it has ended."""
        return gate.compare(
            self.laboratory.ledger.entries, self.laboratory.runs, self.laboratory.limits, self._was_asked_for
        )

    # What this session was asked for, so that a stored cell is not missed that nobody wanted now

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        self.deselected |= {_without_group(item.nodeid) for item in items}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.selected |= {_without_group(item.nodeid) for item in session.items}

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        self.selected |= set(map(_without_group, ids))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.deselected |= set(xdist.told_by_worker(node, "lightweight_deselected") or ())

    def _was_asked_for(self, then: record.Entry) -> bool:
        """Whether options, paths and selections of tests leave `then` in; what was cut short had been asked for."""
        option, here = self.laboratory.option, self.laboratory
        is_named = (
            not option("model") or then.model in {models.named(name).name for name in here.models},
            not option("method") or then.method in here.methods,
            not option("target") or then.target == here.target.name,
            not option("weights") or then.weights == option("weights"),
            option("gpus_per_trial") == 1 or then.world_size == here.world_size,
            then.seed in here.seeds or not (then.test or "").endswith(f"seed{then.seed}]"),
        )
        if not all(is_named):
            return False
        test = _without_group(then.test or "")
        if not test:  # of a record that does not say: nobody wanted it where anything was left out
            return not self.deselected and all((self._root / argument).is_dir() for argument in self.config.args)
        is_covered = any(self._covers(argument, test) for argument in self.config.args)
        return test in self.selected or (is_covered and test not in self.deselected)

    @property
    def _root(self) -> Path:
        return self.config.invocation_params.dir

    def _covers(self, argument: str, test: str) -> bool:
        """Whether a path, or a test, of the command line has `test` in it."""
        (place, _, name), (file, _, own) = argument.partition("::"), test.partition("::")
        wanted, path = (self._root / place).resolve(), (self.config.rootpath / file).resolve()
        return (wanted == path or wanted in path.parents) and own.startswith(name)

    @pytest.hookimpl(wrapper=True, optionalhook=True)
    def pytest_benchmark_group_stats(self, benchmarks: list[dict[str, Any]]) -> Generator[None, list[Any], list[Any]]:
        """Leave stored rows out of the table whose cells ran under other conditions, and put what did not complete
        into tables of one row, where nothing is ranked by how soon it ended."""
        benchmarks[:] = [row for row in benchmarks if row["path"] is None or self._is_alike(row)]
        groups: list[Any] = []
        ended: list[Any] = []
        for name, rows in (yield):
            whole = [row for row in rows if not _did_not_complete(row)]
            groups += [(name, whole)] if whole else []
            ended += [
                (f"{name}: {row['extra_info']['outcome'].replace('_', ' ')}, timed until then", [row])
                for row in rows
                if _did_not_complete(row)
            ]
        return groups + ended

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_benchmark_scale_unit(self, benchmarks: list[dict[str, Any]]) -> tuple[str, float] | None:
        """Seconds for what did not complete, however soon."""
        return ("", 1.0) if any(map(_did_not_complete, benchmarks)) else None

    def _is_alike(self, row: dict[str, Any]) -> bool:
        extra = row["extra_info"]
        cell_of_row = tuple(extra.get(key) for key in ("model", "method", "target"))
        cells = [e for e in self.laboratory.ledger.entries if (e.model, e.method, e.target) == cell_of_row]
        runs = [run for run in self.laboratory.runs if str(run.path).endswith(row["path"])]
        return "outcome" not in extra or any(gate.stored(cell, runs) for cell in cells)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if xdist.tell_controller(self.config, "lightweight_deselected", sorted(self.deselected)):
            return
        if self.compares and self.comparison.failures and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(wrapper=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> Generator[None, None, None]:
        try:
            yield
        finally:
            if self.compares and (self.laboratory.ledger.entries or self.problems or self.comparison.failures):
                terminalreporter.section("lightweight: did it get worse")
                for line in [*self.problems, *comparison.text(self.comparison).splitlines()]:
                    terminalreporter.write_line(line, red=line.startswith("FAILED"))


def _without_group(nodeid: str) -> str:
    """A test's id without what pytest-xdist adds to it."""
    return nodeid.partition("]@")[0] + "]" if "]@" in nodeid else nodeid


def _did_not_complete(row: Mapping[str, Any]) -> bool:
    return bool(row["extra_info"].get("outcome", "completed") != "completed")
