"""Whoever dies, stops or is asked to end, in whichever phase: the cell before has its row, the one at hand has its
phase and reason, the one after runs where the session goes on, and no process and no folder stays."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from session.test_session_faults import left, outcomes, project, wait_for  # noqa: F401  # a fixture among them

from conftest import MICRO

CELLS = f"""
import json, os
from dataclasses import replace
from functools import partial
from pathlib import Path
import pytest
import waiting
from lightweight.child import handle, helper, owner, worker
from lightweight.internals.multiprocessing import forkserver_pid
from lightweight.models import Model

MODEL = Model(name="micro", architecture={MICRO.architecture!r})

def test_before(train):
    assert train(MODEL, "baseline").kind == "completed"

@pytest.mark.parametrize(("name", "what", "number", "at", "is_late"), json.loads(Path("faults.json").read_text()))
def test_at_hand(train, monkeypatch, name, what, number, at, is_late):
    done = Path("done " + name).absolute()
    until = done if what == "forkserver" else None

    def act(process):
        if not done.exists():
            monkeypatch.setattr(helper, "_answer", answer)
            others = dict(forkserver=forkserver_pid())
            others["xdist worker"] = os.getpid()
            os.kill(others.get(what, process.pid), number)
            done.touch()

    def entering(child, *arguments, enter=owner.Child.__init__, **options):
        enter(child, *arguments, **options)
        told = child._on_phase

        def on_phase(child):
            told(child)
            if child.phase == at:
                act(child._ranks[0])
                child.silence_seconds = 1 if is_late else child.silence_seconds

        child._on_phase = on_phase

    def beginning(process, *arguments, begin=handle.Handle.__init__):
        begin(process, *arguments)
        if at == "helper" and type(process) is handle.Handle and not done.exists():
            act(process)
            if is_late:
                process.connection.poll = lambda _, poll=process.connection.poll: poll(1)

    answer = helper._answer
    monkeypatch.setattr(owner.Child, "__init__", entering)
    monkeypatch.setattr(handle.Handle, "__init__", beginning)
    monkeypatch.setattr(worker, "run", partial(waiting.run, at, until))
    if at == "helper":
        monkeypatch.setattr(helper, "_answer", partial(waiting.answer, until))
    assert train(replace(MODEL, name=name), "lora").kind == "completed"

def test_after(train):
    assert train(MODEL, "lora").kind == "completed"
"""

WAITING = """
import time
from lightweight.child import helper, worker

def wait(until):
    while until is None or not until.exists():
        time.sleep(0.01)

def run(phase, until, *arguments):
    enter = worker._OwnersEnd.enter

    def enter_and_wait(owner, entered):
        enter(owner, entered)
        if entered == phase:
            wait(until)

    worker._OwnersEnd.enter = enter_and_wait
    worker.run(*arguments)

def answer(until, *arguments):
    wait(until)
    helper._answer(*arguments)
"""
"""What the child of the cell at hand does: it waits in its phase, so that no signal comes too late, and goes on only
where somebody else is hit."""

PHASES = ("build", "evaluate", "save")


@dataclass(frozen=True)
class Fault:
    """`number` is sent to `what` when the trial at hand enters `phase`, or when its helper has begun; then `then` to
    pytest itself."""

    what: str
    number: signal.Signals
    phase: str
    then: signal.Signals | None = None

    def __str__(self) -> str:
        then = "" if self.then is None else f" {self.then.name}"
        return f"{self.what} {self.number.name}{then} {self.phase}"

    @property
    def is_late(self) -> bool:
        """Whether what is stopped is ended by its owner's patience alone, which then need not be long."""
        return self.number == signal.SIGSTOP and self.what in ("child", "helper")

    def given(self) -> tuple[Any, ...]:
        """What the cell at hand is told."""
        return str(self), self.what, int(self.number), self.phase, self.is_late

    @property
    def row(self) -> tuple[str, str, str | None]:
        """Method, outcome and phase of the cell at hand."""
        if self.what == "forkserver":
            return "lora", "completed", None
        return "lora", "timed_out" if self.is_late else "crashed", "start" if self.what == "helper" else self.phase

    @property
    def reason(self) -> str:
        """What its row's reason says."""
        match self.what:
            case "forkserver":
                return ""
            case "child" | "helper":
                ended = "and was killed" if self.is_late else f"killed by {self.number.name}"
                return f"writing the weights: {ended}" if self.what == "helper" and not self.is_late else ended
            case _ if self.then in (None, signal.SIGKILL):
                return "the process that ran it died"
            case _:
                by = "KeyboardInterrupt" if self.then == signal.SIGINT else self.then and self.then.name
                return f"interrupted by {by}"


ENDS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
WHAT_ENDS_OTHERS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
SURVIVED = {
    "child": [Fault("child", number, phase) for number in (signal.SIGKILL, signal.SIGSTOP) for phase in PHASES],
    "forkserver": [Fault("forkserver", number, phase) for number in WHAT_ENDS_OTHERS for phase in PHASES],
    "helper": [Fault("helper", number, "helper") for number in WHAT_ENDS_OTHERS],
    "xdist worker": [Fault("xdist worker", signal.SIGKILL, phase) for phase in PHASES],
}
"""What costs one session a cell each."""

ENDED = [Fault("pytest", signal.SIGSTOP, phase, then) for then in ENDS for phase in PHASES]
"""What ends a session."""

SAMPLE = [SURVIVED["child"][2], SURVIVED["helper"][0]]
"""session/test_session_faults.py has pytest and the forkserver, session/test_xdist_bridge.py a worker, elsewhere."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sessions = {"sample": SAMPLE}
    if metafunc.config.getoption("--faults"):
        sessions = SURVIVED | {str(fault): [fault] for fault in ENDED}
    metafunc.parametrize("faults", sessions.values(), ids=sessions)


def test_nothing_is_lost(project, faults, tried):  # noqa: F811
    output = hurt_session(project, faults)
    rows, remains = outcomes(project), remaining(project)
    before, after = ("baseline", "completed", None), ("lora", "completed", None)
    expected = [before, *(fault.row for fault in faults), *([after] if faults[0].then is None else [])]
    for fault, (*row, reason) in zip(faults, rows[1:], strict=False):
        is_told = tuple(row) == fault.row and fault.reason in (reason or "")
        tried(f"{fault.what} killed, stopped or asked to end", survived=is_told and not remains)
        assert is_told, (fault, row, reason, output)
    assert [row[:3] for row in rows] == expected, output
    assert not remains


def remaining(folder: Path) -> list[str]:
    """What is left of the sessions in `folder` when they have had the time to go."""
    wait_for(lambda: not left(folder), 15)
    return left(folder)


def hurt_session(folder: Path, faults: Sequence[Fault]) -> str:
    """What a session of the cells says, into which `faults` are injected."""
    (folder / "test_cells.py").write_text(CELLS)
    (folder / "waiting.py").write_text(WAITING)
    (folder / "faults.json").write_text(json.dumps([fault.given() for fault in faults]))
    environment = {**os.environ, "TMPDIR": str(folder / "scratch"), "MARK": str(folder)}
    command = [sys.executable, "-m", "pytest", "-p", "no:randomly", "-p", "no:cacheprovider", "--epochs=2"]
    command += ["--benchmark-json=out.json", *(["-n", "1"] if faults[0].what == "xdist worker" else [])]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    session = subprocess.Popen(
        command, cwd=folder, env=environment, start_new_session=True, preexec_fn=hear_all, **pipes
    )
    try:
        if (then := faults[0].then) is not None:
            assert wait_for(lambda: list(folder.glob("done *")))
            session.send_signal(then)
        output, _ = session.communicate(timeout=400)
    finally:
        session.kill()
    return output


def hear_all() -> None:
    """A shell has what it starts in the background ignore SIGINT, and nohup SIGHUP: so would the session."""
    for number in ENDS[:-1]:
        signal.signal(number, signal.SIG_DFL)
