"""Whoever dies, stops or is asked to end, in whichever phase: the cell before has its row, the one at hand has its
phase and reason, the one after runs where the session goes on, and no process and no folder stays."""

import os
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
import os, signal
import pytest
from lightweight.child import handle, owner
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

        child._on_phase = on_phase

    def beginning(process, *arguments):
        begin(process, *arguments)
        if "PHASE" == "helper" and type(process) is handle.Handle:
            act(process)

    monkeypatch.setattr(owner.Child, "__init__", entering)
    monkeypatch.setattr(handle.Handle, "__init__", beginning)

def test_before(train):
    assert train(MODELS["first"], "baseline").kind == "completed"

def test_at_hand(train):
    assert train(MODELS["second"], "lora").kind == "completed"

def test_after(train):
    assert train(MODELS["first"], "lora").kind == "completed"
"""

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
    cells = CELLS.replace("WHOM", fault.whom).replace("NUMBER", str(int(fault.number))).replace("PHASE", fault.phase)
    (project / "test_cells.py").write_text(cells)
    for _ in range(3):
        output = hurt_session(project, fault)
        rows = outcomes(project)
        if not was_late(fault, rows):
            break
        for name in ("done", "out.json"):
            (project / name).unlink()
    survived = [row[:3] for row in rows] == expected(fault) and wait_for(lambda: not left(project), 15)
    tried(f"{fault.what} killed, stopped or asked to end", survived=survived)
    assert survived, (rows, left(project), output)
    if fault.then is not None:
        by = "KeyboardInterrupt" if fault.then == signal.SIGINT else fault.then.name
        killed = fault.then == signal.SIGKILL
        assert rows[1][3] == ("the process that ran it died" if killed else f"interrupted by {by}")


def hurt_session(folder: Path, fault: Fault) -> str:
    """What a session of the cells says, into which `fault` is injected."""
    environment = {**os.environ, "TMPDIR": str(folder / "scratch"), "MARK": str(folder)}
    command = [sys.executable, "-m", "pytest", "-p", "no:randomly", "-p", "no:cacheprovider", "--epochs=2"]
    command += [
        "--benchmark-json=out.json",
        "--trial-timeout=15",
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


AFTER = {"build": {"evaluate", "train", "save"}, "evaluate": {"train", "save"}, "save": set[str]()}
"""The phases that follow each of PHASES."""


def was_late(fault: Fault, rows: list[Any]) -> bool:
    """Whether the child was past the phase, or done, before the signal reached it: nobody waits there for one."""
    if fault.what not in ("child", "pytest") or len(rows) < 2:
        return False
    _, kind, phase, *_ = rows[1]
    return kind == "completed" or phase in AFTER[fault.phase]


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
