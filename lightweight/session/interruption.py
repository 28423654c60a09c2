"""What ends a test or the session before its time? Signals and pytest-timeout: what they cut short is recorded all the
same."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from functools import partial
from typing import Any

import pytest

from lightweight.child import handle, owner
from lightweight.record import INTERRUPTED
from lightweight.session import xdist_bridge
from lightweight.session.fixtures import FIXTURES, uses
from lightweight.session.ledger import Ledger
from lightweight.trial import Crashed, Measurements, Outcome, TimedOut

GRACE_SECONDS = 10.0
"""How long a test whose time is up may take to end, its children having been killed."""


class Interruption:
    """What has ended the session, `ended_by`, or the time of the test at hand, `is_expired`."""

    def __init__(self, config: pytest.Config, ledger: Ledger) -> None:
        self.config, self.ledger = config, ledger
        self.ended_by: signal.Signals | None = None
        self.is_expired = False
        self._seconds = 0.0  # that pytest-timeout gives the test at hand

    @property
    def expiry(self) -> str:
        """What a test is told whose time is up, in pytest-timeout's words."""
        return f"Timeout (>{self._seconds}s) from pytest-timeout."

    def cut_short(self, error: BaseException | None, child: owner.Child | None) -> Outcome:
        """How a trial ended that `error`, or this session's own end, or pytest-timeout has interrupted."""
        if not self.is_expired and child is not None and child.outcome is not None:
            return child.outcome
        reason = self.reason(error)
        if reason == self.expiry:
            return TimedOut(**so_far(child), silent_seconds=self._seconds, reason=reason, details="")
        return Crashed(**so_far(child), reason=reason, details="")

    def reason(self, error: BaseException | None) -> str:
        """Why what `error` has interrupted has no result."""
        if self.is_expired or "pytest-timeout" in str(error):
            return self.expiry
        return f"{INTERRUPTED}{self.ended_by.name if self.ended_by else type(error).__name__}"

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        """A test is not late because the one before was: of one without a time limit pytest-timeout tells nobody."""
        self._seconds, self.is_expired = 0.0, False
        return (yield)

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_timeout_set_timer(self, item: pytest.Item, settings: Any) -> bool | None:
        """pytest-timeout's thread would end this process and lose its record: here it kills the children, whose trial
        has then timed out. It has its own way where the test does not end at that."""
        self._seconds, self.is_expired = settings.timeout, False
        if settings.method != "thread" or not uses(item, FIXTURES):
            return None

        def expire() -> None:
            self.is_expired = True
            handle.kill_all()
            timers.append(threading.Timer(GRACE_SECONDS, _end_process, (item, settings)))
            timers[-1].daemon = True
            timers[-1].start()

        timers = [threading.Timer(settings.timeout, expire)]
        timers[0].daemon = True
        timers[0].start()

        def cancel() -> None:
            for timer in timers:
                timer.cancel()

        item.cancel_timeout = cancel  # type: ignore[attr-defined]
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """A test whose time is up has failed, also where it noticed nothing of it."""
        made = yield
        if self.is_expired and made.when == "call" and made.passed:
            made.outcome, made.longrepr = "failed", self.expiry
        return made

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self) -> Generator[None, object, object]:
        if self.ledger.is_used or xdist_bridge.hands_out(self.config):
            self.heed_signals()
        return (yield)

    def heed_signals(self) -> None:
        """From here to the end of the session, what ends it has it end as Ctrl-C does, so that its record is written;
        what somebody else handles or ignores stays theirs."""
        for number in (signal.SIGTERM, signal.SIGHUP):
            if threading.current_thread() is threading.main_thread() and signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, self._interrupt)
                self.config.add_cleanup(partial(_restore, number))

    def _interrupt(self, number: int, _: object) -> None:
        if self.ended_by is None:  # a second one would interrupt the writing of the record
            self.ended_by = signal.Signals(number)
            raise KeyboardInterrupt


def so_far(child: owner.Child | None) -> dict[str, Any]:
    """How far a trial has come; its child is None where it has not been started."""
    if child is None:
        return {"phase": "start", "measured": Measurements()}
    return {"phase": child.phase, "measured": child.measured}


def _restore(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_DFL)


def _end_process(item: pytest.Item, settings: Any) -> None:
    import pytest_timeout

    pytest_timeout.timeout_timer(item, settings)
