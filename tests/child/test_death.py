"""How a trial ended whose child died."""

import functools
import os
import signal
import subprocess
import time

import pytest

from lightweight.child import death
from lightweight.child.owner import Child
from lightweight.trial import Completed, Crashed, Measurements, OutOfMemory, Trial


def test_a_child_killed_in_the_middle_of_a_round_costs_its_own_trial(trial, tmp_path):
    (tmp_path / "killed").mkdir()
    (tmp_path / "next").mkdir()

    def kill(_: Trial, step: int, __: float | None) -> None:
        if step == 5:
            os.kill(child.pids[0], signal.SIGKILL)

    with Child(trial, tmp_path / "killed", on_step=kill) as child:
        child.round()
        child.round()
        assert isinstance(child.outcome, Crashed)
        assert child.outcome.reason.startswith("killed by SIGKILL")
        assert child.outcome.phase == "train"
        assert child.rounds_done == 1
        assert len(child.outcome.measured.train_loss) == 3  # the round before it is not lost
        started = time.perf_counter()
        child.round()  # returns at once
        assert child.finish() is child.outcome
        assert time.perf_counter() - started < 0.1
    with Child(trial, tmp_path / "next") as child:
        assert isinstance(child.finish(), Completed)


def test_a_child_killed_between_two_rounds_is_noticed(trial, folder):
    with Child(trial, folder) as child:
        child.round()
        os.kill(child.pids[0], signal.SIGTERM)
        outcome = child.finish()
    assert isinstance(outcome, Crashed)
    assert outcome.reason == "killed by SIGTERM"


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (-signal.SIGKILL, "killed by SIGKILL (which the kernel's out-of-memory killer also sends)"),
        (-signal.SIGSEGV, "killed by SIGSEGV"),
        (-(signal.SIGRTMIN + 6), f"killed by signal {signal.SIGRTMIN + 6}"),
        (3, "the child exited with status 3 before its trial had ended"),
        (None, "died; how is not known, because the forkserver had died or was stopped"),
    ],
)
def test_an_exit_status_is_told_in_words(status, reason):
    found = death.outcome_of_death(status, "train", Measurements(), "last words", kernel_killed=False, server=None)
    assert isinstance(found, Crashed)
    assert (found.reason, found.phase, found.details) == (reason, "train", "last words")


def test_a_kill_is_out_of_memory_where_the_kernel_has_counted_one():
    died = functools.partial(death.outcome_of_death, phase="train", measured=Measurements(), details="", server=None)
    found = died(-signal.SIGKILL, kernel_killed=True)
    assert isinstance(found, OutOfMemory)
    assert found.reason.startswith("killed by the kernel") and found.phase == "train"
    assert isinstance(died(-signal.SIGTERM, kernel_killed=True), Crashed)


def test_the_status_that_stands_for_none_is_none_where_the_forkserver_is_gone():
    with subprocess.Popen(["sleep", "0"]) as gone:
        pass
    found = death.outcome_of_death(255, "train", Measurements(), "", kernel_killed=False, server=gone.pid)
    assert isinstance(found, Crashed) and found.reason.startswith("died; how is not known, because the forkserver")
