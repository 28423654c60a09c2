"""Whoever dies, stops or is asked to end, in whichever phase: the cell before has its row, the one at hand has its
phase and reason, the one after runs where the session goes on, and no process and no folder stays."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from session.test_session_faults import left, outcomes, project, wait_for  # noqa: F401  # a fixture among them

from conftest import MICRO

CELLS = f"""
import os
import hurt
import pytest
from lightweight.child import handle, helper, owner, worker
from lightweight.internals.multiprocessing import forkserver_pid
from lightweight.models import Model

MODELS = {{name: Model(name=name, architecture={MICRO.architecture!r}) for name in ("first", "second")}}

@pytest.fixture(autouse=True)
def fault(monkeypatch, request):
    if request.node.name != "test_at_hand":
        return
    enter, begin, done = owner.Child.__init__, handle.Handle.__init__, []

    def act(process):
        if not done:
            done.append(1)
            monkeypatch.setattr(helper, "_answer", hurt.answer_one)
            whom = WHOM
            os.kill(whom, NUMBER)
            open("done", "w").close()

    def entering(child, *arguments, **options):
        enter(child, *arguments, **options)
        told = child._on_phase

        def on_phase(child):
            told(child)
            if child.phase == "PHASE":
                act(child._ranks[0])
                if STOPS:
                    child.silence_seconds = 1

        child._on_phase = on_phase

    def beginning(process, *arguments):
        begin(process, *arguments)
        if "PHASE" == "helper" and type(process) is handle.Handle:
            act(process)
            if STOPS:
                process.connection.poll = lambda _, poll=process.connection.poll: poll(1)

    monkeypatch.setattr(owner.Child, "__init__", entering)
    monkeypatch.setattr(handle.Handle, "__init__", beginning)
    monkeypatch.setattr(worker, "run", hurt.run)
    monkeypatch.setattr(helper, "_answer", hurt.answer)

def test_before(train):
    assert train(MODELS["first"], "baseline").kind == "completed"

def test_at_hand(train):
    assert train(MODELS["second"], "lora").kind == "completed"

def test_after(train):
    assert train(MODELS["first"], "lora").kind == "completed"
"""
"""STOPS where the one that is hit is stopped and nobody else ends its trial: its owner then need not wait long."""

HURT = """
import os, time
from lightweight.child import helper, worker

run_one, answer_one = worker.run, helper._answer

def wait(phase):
    while phase == "PHASE" and not (GOES_ON and os.path.exists("DONE")):
        time.sleep(0.01)

def run(*arguments):
    enter = worker._OwnersEnd.enter

    def enter_and_wait(owner, phase):
        enter(owner, phase)
        wait(phase)

    worker._OwnersEnd.enter = enter_and_wait
    run_one(*arguments)

def answer(*arguments):
    wait("helper")
    answer_one(*arguments)
"""
"""What the child of the trial at hand runs: it waits in its phase to be hit, and GOES_ON after DONE where somebody else
is."""

PHASES = ("build", "evaluate", "save")


@dataclass(frozen=True)
class Fault:
    """`number` is sent to `whom`, an expression for a process id, when the trial at hand enters `phase`, or when its
    helper has begun; then `then` to pytest itself, once the first has been done."""

    what: str
    whom: str
    number: signal.Signals
    phase: str
    then: signal.Signals | None = None

    def __str__(self) -> str:
        then = "" if self.then is None else f" {self.then.name}"
        return f"{self.what} {self.number.name}{then} {self.phase}"


ENDS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
CHILD, SERVER, ITSELF = "process.pid", "forkserver_pid()", "os.getpid()"
FAULTS = [
    *(Fault("child", CHILD, number, phase) for number in (signal.SIGKILL, signal.SIGSTOP) for phase in PHASES),
    *(
        Fault("forkserver", SERVER, number, phase)
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
        for phase in PHASES
    ),
    *(Fault("helper", CHILD, number, "helper") for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)),
    *(Fault("pytest", CHILD, signal.SIGSTOP, phase, then) for then in ENDS for phase in PHASES),
    *(Fault("xdist worker", ITSELF, signal.SIGKILL, phase) for phase in PHASES),
]
SAMPLE = (FAULTS[2], FAULTS[15])
"""Of pytest and of workers session/test_session_faults.py has one each, in another phase."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = FAULTS if metafunc.config.getoption("--faults") else SAMPLE
    metafunc.parametrize("fault", chosen, ids=str)


def test_nothing_is_lost(project, fault, tried):  # noqa: F811
    for name, text in (("test_cells.py", CELLS), ("hurt.py", HURT)):
        (project / name).write_text(injected(text, fault, project / "done"))
    output = hurt_session(project, fault)
    rows = outcomes(project)
    survived = [row[:3] for row in rows] == expected(fault) and wait_for(lambda: not left(project), 15)
    tried(f"{fault.what} killed, stopped or asked to end", survived=survived)
    assert survived, (rows, left(project), output)
    if fault.then is not None:
        by = "KeyboardInterrupt" if fault.then == signal.SIGINT else fault.then.name
        killed = fault.then == signal.SIGKILL
        assert rows[1][3] == ("the process that ran it died" if killed else f"interrupted by {by}")


def injected(text: str, fault: Fault, done: Path) -> str:
    """`text` of a module with `fault` in the places of what is in capitals."""
    values = {
        "WHOM": fault.whom,
        "NUMBER": str(int(fault.number)),
        "PHASE": fault.phase,
        "STOPS": str(fault.number == signal.SIGSTOP and fault.what in ("child", "helper")),
        "GOES_ON": str(fault.what == "forkserver"),
        "DONE": str(done),
    }
    return re.sub("|".join(values), lambda found: values[found[0]], text)


def hurt_session(folder: Path, fault: Fault) -> str:
    """What a session of the cells says, into which `fault` is injected."""
    environment = {**os.environ, "TMPDIR": str(folder / "scratch"), "MARK": str(folder)}
    command = [sys.executable, "-m", "pytest", "-p", "no:randomly", "-p", "no:cacheprovider", "--epochs=2"]
    command += [
        "--benchmark-json=out.json",
        "--trial-timeout=120",
        *(["-n", "1"] if fault.what == "xdist worker" else []),
    ]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    session = subprocess.Popen(
        command, cwd=folder, env=environment, start_new_session=True, preexec_fn=hear_all, **pipes
    )
    try:
        if fault.then is not None:
            assert wait_for((folder / "done").exists)
            session.send_signal(fault.then)
        output, _ = session.communicate(timeout=240)
    finally:
        session.kill()
    return output


def hear_all() -> None:
    """A shell has what it starts in the background ignore SIGINT, and nohup SIGHUP: so would the session."""
    for number in ENDS[:-1]:
        signal.signal(number, signal.SIG_DFL)


def expected(fault: Fault) -> list[tuple[str, str, str | None]]:
    """Method, outcome and phase of each row."""
    before, after = ("baseline", "completed", None), ("lora", "completed", None)
    match fault.what:
        case "child" | "helper":
            phase = "start" if fault.what == "helper" else fault.phase
            kind = "timed_out" if fault.number == signal.SIGSTOP else "crashed"
            return [before, ("lora", kind, phase), after]
        case "forkserver":
            return [before, after, after]
        case "xdist worker":
            return [before, ("lora", "crashed", fault.phase), after]
        case _:
            return [before, ("lora", "crashed", fault.phase)]
