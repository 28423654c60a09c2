"""Calls in children of their own."""

import fnmatch
import os
import signal
import sys

import pytest

from lightweight.child import handle, helper
from lightweight.trial import Crashed, TimedOut


def fail() -> None:
    raise ZeroDivisionError("in the child")


def shout() -> int:
    os.write(1, b"a library's noise")
    return os.getpid()


def test_a_call_runs_elsewhere_and_its_noise_goes_to_a_log(folder, capfd):
    assert helper.call(shout, folder) != os.getpid()
    assert (folder / "log").read_text() == "a library's noise"
    assert capfd.readouterr().out == ""


def test_a_calls_exception_comes_through(folder):
    with pytest.raises(ZeroDivisionError, match="in the child"):
        helper.call(fail, folder)


@pytest.mark.parametrize("module", ["pytest", "lightweight.plugin", "lightweight.report.report"])
def test_a_child_has_imported_no(module, folder):
    assert module in sys.modules or module == "lightweight.report.report"
    assert not helper.call(eval, folder, f"{module!r} in __import__('sys').modules")


@pytest.mark.parametrize("module", ["bitsandbytes", "transformers.trainer", "transformers.models.opt.modeling_opt"])
def test_a_child_is_born_with(module, folder):
    assert helper.call(eval, folder, f"{module!r} in __import__('sys').modules")


def pause(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "kind", "reason"),
    [
        (signal.SIGKILL, Crashed, "killed by SIGKILL *"),
        (signal.SIGSTOP, TimedOut, "a helper process answered nothing for 3 s and was killed"),
    ],
)
def test_a_helper_that_is_killed_or_stopped_has_an_outcome(folder, number, kind, reason):
    helper.call(int, folder)  # the forkserver is there
    with pytest.raises(handle.ChildError) as raised:
        helper.call_within(3.0, pause, folder, int(number))
    assert isinstance(raised.value.outcome, kind)
    assert fnmatch.fnmatch(str(raised.value), reason)
    assert helper.call(int, folder) == 0


class OddError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__("odd")


def raise_oddly() -> None:
    raise OddError(1, 2)


def test_an_exception_that_cannot_be_sent_is_told_by_its_name(folder):
    with pytest.raises(RuntimeError, match="OddError: odd"):
        helper.call(raise_oddly, folder)
