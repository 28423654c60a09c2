"""What is left of a session that is killed, or whose disk is full at its end? The record so far, in the file of
--benchmark-json, whole each time.

pytest-benchmark writes that file once, at the end, over what was there. Here it is written whenever a trial enters a
phase or has ended, and at the end once more, with pytest-benchmark's rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime

import pytest

from lightweight import files, record
from lightweight.internals import pytest_benchmark
from lightweight.record import Entry, ForecastRow
from lightweight.session import options
from lightweight.session.claim import record_file
from lightweight.session.command import command


class Journal:
    """The record so far of a session, where it is to be stored in a file."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.problem: str | None = None  # why the newest of it is not in the file

    @property
    def is_kept(self) -> bool:
        """Whether there is a file for it; a pipe or a device is written once, by pytest-benchmark."""
        return record_file(self.config) is not None

    def write(self, entries: Iterable[Entry], forecasts: Iterable[ForecastRow]) -> None:
        """What was found so far; a session goes on where it cannot be written."""
        of_run = {"datetime": datetime.now(UTC).isoformat(), "command": command(self.config), "benchmarks": []}
        self._write(json.dumps(record.document(entries, forecasts) | of_run, indent=4))

    def take_over(self) -> None:
        """Have what pytest-benchmark stores at the end written whole, or what was written before kept."""
        if self.is_kept and pytest_benchmark.has_session(self.config):
            pytest_benchmark.save_by(self.config, self._write)

    def _write(self, text: str) -> bool:
        """Whether `text` is in the file now."""
        given = pytest_benchmark.json_path(self.config)
        assert given is not None
        try:
            files.write(options.place(self.config, given), text)
            self.problem = None
        except OSError as error:
            self.problem = f"record {given}: cannot be written ({error.strerror}): what is in it was written before"
        return self.problem is None
