"""What does a session leave? Its tables on the terminal, its entries in pytest-benchmark's JSON, and the report."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from lightweight import record
from lightweight.child import forkserver
from lightweight.report import tables, write
from lightweight.session import options
from lightweight.session.command import command
from lightweight.session.laboratory import Laboratory


class Summary:
    """What is told and written at a session's end, in the process that has everybody's cells."""

    def __init__(self, laboratory: Laboratory) -> None:
        self.laboratory, self.config = laboratory, laboratory.config
        self.ledger, self.interruption = laboratory.ledger, laboratory.interruption
        self._of_report = ""

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        entries, not_run = self.ledger.entries, self.ledger.not_run
        if entries or not_run:
            terminalreporter.section("lightweight: does it fit, how fast is it, what does it do to the loss")
        if entries:
            terminalreporter.write_line(tables.results(entries).text("terminal"))
            for further in (
                tables.over_seeds(entries),
                tables.ranks(entries),
                tables.answered(entries),
                tables.qualities(entries, self.laboratory.option("margin")),
            ):
                if further.rows:
                    terminalreporter.write_line("\n" + further.text("terminal"))
        if by := self.interruption.ended_by:
            terminalreporter.write_line(f"ended by {by.name}: what was found until then is recorded")
        for line, count in not_run.items():
            terminalreporter.write_line(line if count == 1 else f"{line} ({count} cells)")
        for told in (self.ledger.journal.problem, self._of_report):
            if told:
                terminalreporter.write_line(told)

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_update_machine_info(self, machine_info: dict[str, Any]) -> None:
        if self.ledger.is_used:
            # records are committed and shared; whose machine it was is nobody's business
            machine_info.pop("node", None)
            machine_info["gpu"] = dataclasses.asdict(self.laboratory.device) if self.laboratory.has_cuda else None
            machine_info["glibc_tunables"] = forkserver.tunables()

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        if self.ledger.is_used:
            output_json |= record.document(self.ledger.entries, self.ledger.forecasts)
            output_json["command"] = command(self.config)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the report; a record or a report that cannot be written is no success."""
        if self.interruption.ended_by:
            session.exitstatus = 128 + self.interruption.ended_by
        if self.ledger.journal.problem and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.USAGE_ERROR
        path, entries, forecasts = self.laboratory.option("report"), self.ledger.entries, self.ledger.forecasts
        if path is None or hasattr(self.config, "workerinput") or not (entries or forecasts):
            return
        now = datetime.now(UTC).isoformat()
        run = record.Run(path=Path("this run"), ended=now, entries=entries, forecasts=forecasts)
        try:
            write.save(options.place(self.config, path), [run, *self.laboratory.runs])
            self._of_report = f"report: {path}"
        except write.ReportError as error:
            self._of_report = str(error)
            if session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.USAGE_ERROR
