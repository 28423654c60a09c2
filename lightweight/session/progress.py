"""What runs now, and what came of it? A line of progress, on a terminal in the place of the one before it."""

from __future__ import annotations

import pytest

_UNTOLD = pytest.StashKey[list[str]]()


class Progress:
    """The line of progress of one session; nobody sees it where pytest is quiet, but what is told."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def show(self, text: str, in_a_log: str = "", on_a_terminal: str = "", verbosity: int = 0) -> None:
        """A line of progress. On a terminal the next one overwrites it unless it is ended with `on_a_terminal`; in a
        log, where nothing is overwritten, it is left out unless it is ended with `in_a_log`. With a lower verbosity of
        pytest it is left out in both."""
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        capture = self._config.pluginmanager.get_plugin("capturemanager")
        if reporter is None or capture is None or self._config.get_verbosity() < verbosity:
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

    def tell(self, text: str) -> None:
        """A line that stays, and that `-q` leaves in. From a worker of pytest-xdist, which has no terminal, it travels
        to the controller (`take_untold`)."""
        if hasattr(self._config, "workerinput"):
            self._config.stash.setdefault(_UNTOLD, []).append(text)
        else:
            self.show(text, "\n", "\n", verbosity=-1)


def take_untold(config: pytest.Config) -> list[str]:
    """The lines that this worker has for the controller to tell, once."""
    untold = config.stash.get(_UNTOLD, [])
    config.stash[_UNTOLD] = []
    return untold
