"""What runs now? A line of progress, on a terminal in the place of the one before it."""

from __future__ import annotations

import pytest


class Progress:
    """The line of progress of one session; nobody sees it where pytest is quiet."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def show(self, text: str, in_a_log: str = "", on_a_terminal: str = "") -> None:
        """A line of progress. On a terminal the next one overwrites it unless it is ended with `on_a_terminal`; in a
        log, where nothing is overwritten, it is left out unless it is ended with `in_a_log`."""
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        capture = self._config.pluginmanager.get_plugin("capturemanager")
        if reporter is None or capture is None or self._config.get_verbosity() < 0:
            return
        with capture.global_and_fixture_disabled():
            if reporter.isatty:
                reporter.ensure_newline()
                reporter.write(f"\r\x1b[K{text}{on_a_terminal}", flush=True)
            elif in_a_log:
                reporter.ensure_newline()
                reporter.write(text + in_a_log, flush=True)

    def note(self, text: str) -> None:
        """A line that stays, on a terminal and in a log."""
        self.show(text, "\n", "\n")
