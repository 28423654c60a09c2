"""One trial, one process: the child's owner, which turns its death into an Outcome.

Children are forked from a forkserver that has imported what they need and has never touched CUDA, so a start takes
milliseconds, peaks are a trial's own, and an out-of-memory or a broken CUDA context cannot reach the next trial.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar

from lightweight.child import host_memory, process, unsloth, worker
from lightweight.child.process import log_of, redirect_output
from lightweight.child.reaper import Reaper, is_running, kill, started
from lightweight.training import ranks
from lightweight.training.stock import Request
from lightweight.trial import (
    Completed,
    Crashed,
    Diverged,
    Measurements,
    Outcome,
    OutOfMemory,
    Phase,
    TimedOut,
    Trial,
    of_all_ranks,
)

P = ParamSpec("P")
T = TypeVar("T")

LAST_WORDS = 2_000
"""Characters of a dead child's log that go into its outcome."""

SILENCE_SECONDS = 600.0
"""How long a child may report nothing where nobody says another time."""

PEER_SECONDS = 3.0
"""How long a rank that failed with an exception is given the benefit of the doubt: another may have died before."""

ANSWER_SECONDS = 1.0
"""How long a silent rank may take to say where it is."""

STATUS_SECONDS = 3.0
"""How long the forkserver, which alone is told how a child ended, may take to pass that on."""

IMPORT_SECONDS = 300.0
"""How long a new forkserver may take to import what children are born with: a cold disk, a busy machine."""

SOCKET_FOLDER_CHARACTERS = 60
"""Of the path of a temporary folder in which there is room for a socket, /pymp-12345678/listener-12345678."""

# Which physical pages a process gets decides what collides in its caches for as long as it lives; of like children some
# were 2 and 3 % slower than others. A huge page is laid out alike in all of them. glibc reads this when a program
# starts (GNU C Library manual, Memory Allocation Tunables), and asks the kernel for them. No number that is computed
# depends on it.
TUNABLES = ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(["lightweight.child.nursery"])

reaper = Reaper()
"""Ends what this process has started, and removes its folders, if it cannot do so itself."""

_living: set[_Process] = set()
_answered: int | None = None
_culprit: tuple[int | None, str | None] = (None, None)


class HelperError(RuntimeError):
    """A helper that did not answer, or a child that could not be started; `outcome` is how it ended."""

    def __init__(self, outcome: Crashed | TimedOut | OutOfMemory) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


def call(function: Callable[P, T], folder: Path, *args: P.args, **kwargs: P.kwargs) -> T:
    """`function(*args)` in a child of its own, its output going to a log in `folder`. Exceptions come through. Raises
    HelperError where the child dies, or answers nothing within `SILENCE_SECONDS`."""
    return call_within(SILENCE_SECONDS, function, folder, *args, **kwargs)


def call_within(seconds: float, function: Callable[P, T], folder: Path, *args: P.args, **kwargs: P.kwargs) -> T:
    """`call`, for at most `seconds`. Raises HelperError, and what `function` raises."""
    helper = _Process(
        log_of(0, folder), lambda end: _job(_answer, end, folder / "log", function, args, kwargs), seconds
    )
    try:
        if not helper.connection.poll(seconds):
            raise HelperError(_silent(helper, seconds))
        try:
            value, error = helper.connection.recv()
        except (EOFError, OSError):
            raise HelperError(helper.death()) from None
        helper.end(STATUS_SECONDS)
    finally:
        helper.end()
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]


def _answer(connection: Connection, log: Path, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """In the child: send what `function` returns or raises."""
    process.lead_a_group()
    value: Any = None
    raised: Exception | None = None
    try:
        redirect_output(log)
        value = function(*args, **kwargs)
        pickled = ForkingPickler.dumps((value, None))
    except Exception as error:
        error.add_note(f"in a helper process:\n{traceback.format_exc()}")
        raised = error
        try:
            pickled = ForkingPickler.dumps((None, raised))
            pickle.loads(pickled)  # an exception with arguments of its own may not come to life again
        except Exception:
            pickled = ForkingPickler.dumps((None, RuntimeError(f"{type(raised).__name__}: {raised}")))
    with suppress(OSError):  # nobody waits any more
        connection.send_bytes(pickled)


def kill_all() -> None:
    """Kill every child of this process, from whichever thread; who waits for one is told that it died."""
    for each in list(_living):
        each.kill()


def culprit(seconds: float = SILENCE_SECONDS) -> str | None:
    """The module that initialised CUDA in the forkserver while it was imported there, so that children need fresh
    interpreters; None where they are forked. Starts the forkserver."""
    global _culprit
    if _culprit[0] is None or _culprit[0] != _server_pid():
        asked = _Process(
            Path(os.devnull), lambda end: _forkserver.Process(target=process.tell_culprit, args=(end,)), seconds
        )
        try:
            found = asked.connection.recv() if asked.connection.poll(seconds) else None
        except (EOFError, OSError):
            found = None  # what is wrong with it shows in what is asked of it next
        finally:
            asked.end()
        _culprit = _server_pid(), found
    return _culprit[1]


class Child:
    """A trial in its child process, one for each rank, as a context: entering builds it, leaving leaves no process
    behind.

    Ask for rounds, then `finish`. `outcome` is set as soon as the trial has ended, however it did; `rounds_done` counts
    rounds that were trained whole. `on_step(trial, step, loss)` is told of every optimizer step, `loss` being the
    newest known, `on_round(trial, measured)` of every round's end, and `on_phase(child)` of every phase that the first
    rank enters. A child that reports nothing for `silence_seconds` has timed out and is killed; one without `on_step`
    reports no steps, which beside short rounds would take their time. What ends one rank ends the trial, and all of its
    ranks.
    """

    def __init__(
        self,
        trial: Trial,
        folder: Path,
        silence_seconds: float = SILENCE_SECONDS,
        on_step: Callable[[Trial, int, float | None], None] | None = None,
        on_round: Callable[[Trial, Measurements], None] = lambda trial, measured: None,
        on_phase: Callable[[Child], None] = lambda child: None,
    ) -> None:
        self.trial = trial
        self.outcome: Outcome | None = None
        self.rounds_done = 0
        self._ranks: list[_Rank] = []
        self._folder = folder
        self.silence_seconds = silence_seconds
        self._on_step = on_step
        self._on_round = on_round
        self._on_phase = on_phase

    def __enter__(self) -> Self:
        world_size = self.trial.world_size
        try:
            store = ranks.make_store(self._folder) if world_size > 1 else None
            for number in range(world_size):
                environment = ranks.environment(number, world_size, store)
                tells_steps = number == 0 and self._on_step is not None
                self._ranks.append(
                    _Rank(number, self.trial, self._folder, environment, tells_steps, self.silence_seconds)
                )
            self._await(worker.Ready)
        except HelperError as error:
            self.outcome = error.outcome
        except OSError as error:  # its folder is gone, its disk is full, or the system has no process left
            self.outcome = worker.failure(error, self.trial, None, self._folder)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @property
    def pids(self) -> list[int]:
        """The process ids of the child's ranks, in their order."""
        return [rank.pid for rank in self._ranks]

    @property
    def phase(self) -> Phase:
        """Where in the trial its first rank is."""
        return self._ranks[0].phase if self._ranks else "start"

    @property
    def connections(self) -> list[Connection]:
        """The owner's ends of its ranks' pipes, to wait for."""
        return [rank.connection for rank in self._ranks]

    @property
    def has_answered(self) -> bool:
        """Whether every rank has said something that has not been read, or the trial has ended."""
        return self.outcome is not None or all(rank.connection.poll() for rank in self._ranks)

    @property
    def measured(self) -> Measurements:
        """The newest of what the trial has measured: as of its start, of its last whole round, or of its end."""
        if self.outcome is not None:
            return self.outcome.measured
        return self._measured if self._ranks else Measurements()

    def round(self) -> None:
        """Train one round; returns at once where the trial has already ended."""
        self.ask_for_round()
        self.await_round()

    def ask_for_round(self) -> None:
        """Have the child begin a round, and do not wait for it."""
        self._ask("round")

    def await_round(self) -> None:
        """Wait until the round that was asked for, or the trial, has ended."""
        self._await(worker.RoundEnded)
        if self.outcome is None:
            self.rounds_done += 1
            self._on_round(self.trial, self._measured)

    def finish(self) -> Outcome:
        """Train what is left of the job, evaluate, save, and end the trial."""
        while self.outcome is None and self.rounds_done < self.trial.rounds:
            self.round()
        self._ask("finish")
        self._await(Completed)
        if self.outcome is None:
            self.outcome = Completed(measured=self._measured)
        return self.outcome

    @property
    def _measured(self) -> Measurements:
        return of_all_ranks([rank.measured for rank in self._ranks])

    def _stop(self) -> None:
        for rank in self._ranks:
            rank.connection.close()  # a child that waits for a request ends by itself
        for rank in self._ranks:
            rank.end(STATUS_SECONDS if isinstance(self.outcome, Completed) else 0)

    def _ask(self, request: Request) -> None:
        if self.outcome is None:
            for rank in self._ranks:
                with suppress(OSError):  # it has died, which is what is read from it next
                    rank.connection.send(request)

    def _await(self, answer: type) -> None:
        """Read every rank's reports until one of type `answer`, or until the first that ends the trial."""
        asked = list(self._ranks) if self.outcome is None else []
        while asked:
            ready = wait([rank.connection for rank in asked], self.silence_seconds)
            if not ready:
                self.outcome = self._timed_out(asked)
                return
            for rank in [rank for rank in asked if rank.connection in ready]:
                match report := rank.receive():
                    case worker.Step(step, loss):
                        if self._on_step is not None:
                            self._on_step(self.trial, step, loss)
                    case worker.Entered():
                        if rank.number == 0:
                            self._on_phase(self)
                    case worker.Ready() | worker.RoundEnded() | Completed():
                        assert isinstance(report, answer)
                        asked.remove(rank)
                    case _:
                        self.outcome = self._ended(rank, report)
                        return

    def _ended(self, rank: _Rank, outcome: Ended) -> Outcome:
        """How the trial ended in which `rank` ended so. A rank whose peer is gone fails in talking to it, and may be
        heard first: an exception yields to whatever else another rank ends by."""
        others = [other for other in self._ranks if other is not rank]
        deadline = time.monotonic() + PEER_SECONDS
        while isinstance(outcome, Crashed) and not rank.is_dead and others:
            ready = wait([other.connection for other in others], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for other in [other for other in others if other.connection in ready]:
                report = other.receive()
                if isinstance(report, Ended):
                    others.remove(other)
                    if other.is_dead or not isinstance(report, Crashed):
                        rank, outcome = other, report
                        break
        return self._of_the_trial(rank, outcome)

    def _of_the_trial(self, rank: _Rank, outcome: Ended) -> Outcome:
        """`outcome` of one rank as that of all."""
        if len(self._ranks) == 1:
            return outcome
        rank.measured = outcome.measured
        outcome = replace(outcome, measured=self._measured)
        if isinstance(outcome, Diverged):  # all of them saw the same loss
            return outcome
        return replace(outcome, rank=rank.number, reason=f"rank {rank.number}: {outcome.reason}")

    def _timed_out(self, silent: Sequence[_Rank]) -> Outcome:
        """Kill all ranks, having asked each where it is: the one that others wait for cannot answer, or else does not
        wait itself."""
        said = {rank: rank.whereabouts() for rank in self._ranks}
        culprit = min(silent, key=lambda rank: (bool(said[rank]), _waits_for_others(said[rank])))
        details = culprit.last_words()
        if len(self._ranks) > 1:
            places = (f"rank {rank.number}: {said[rank].strip() or 'does not answer'}" for rank in self._ranks)
            details = "\n".join([details, *places])
        for rank in self._ranks:
            rank.kill()
        outcome = TimedOut(
            phase=culprit.phase,
            silent_seconds=self.silence_seconds,
            reason=f"reported nothing for {self.silence_seconds:g} s and was killed",
            details=details,
            measured=self._measured,
        )
        return self._of_the_trial(culprit, outcome)


Ended = OutOfMemory | Diverged | Crashed | TimedOut
"""What ends a trial before its time."""


class _Process:
    """A child, started, and the owner's end of its pipe. `make` gives the process for the child's end. Raises
    HelperError where it cannot be started within `seconds`."""

    def __init__(self, log: Path, make: Callable[[Connection], BaseProcess], seconds: float) -> None:
        self._log = log
        self._kills = host_memory.kills()
        self.connection, childs_end = _forkserver.Pipe()
        try:
            self.process = make(childs_end)
            _start(self.process, seconds)
        except BaseException:
            self.connection.close()
            raise
        finally:
            childs_end.close()
        assert self.process.pid is not None
        self.pid = self.process.pid
        self._server = _server_pid()
        _living.add(self)
        reaper.adopt(self.pid)

    def end(self, seconds: float = 0.0) -> None:
        """Leave no process behind, having waited `seconds` for it to end by itself."""
        if self not in _living:
            return
        self.connection.close()
        _wait_until(lambda: not self._is_running(), seconds)
        self.kill()
        _wait_until(lambda: not self._is_running(), STATUS_SECONDS)
        self._join()
        _living.discard(self)
        reaper.release(self.pid)

    def kill(self) -> None:
        """Kill it and all that it has started."""
        kill(self.pid, reaper.since(self.pid))

    def last_words(self) -> str:
        """The end of what its libraries have written."""
        try:
            return self._log.read_text(errors="replace")[-LAST_WORDS:]
        except OSError:  # it has written nothing, or its folder is gone
            return ""

    def death(self, phase: Phase = "start", measured: Measurements | None = None) -> Crashed | OutOfMemory:
        """How it ended, which has ended without saying."""
        measured = measured or Measurements()
        self._join()
        code = self.process.exitcode
        if code == -signal.SIGKILL and host_memory.kills() > self._kills:
            return host_memory.outcome(phase, "killed by the kernel", measured)
        return Crashed(phase=phase, reason=self._reason(code), details=self.last_words(), measured=measured)

    def _reason(self, code: int | None) -> str:
        if code == -signal.SIGKILL:
            return "killed by SIGKILL (what the kernel's out-of-memory killer sends, too)"
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        server = self._server
        since = None if server is None else reaper.since(server)
        if code == 255 and server is not None:  # what multiprocessing says where the forkserver says nothing
            _wait_until(lambda: not is_running(server, since), STATUS_SECONDS)
            code = code if is_running(server, since) else None
        if code is None:
            return "died, and the forkserver, which alone knows how, had died or was stopped"
        return f"the child exited with status {code} before its trial had ended"

    def _is_running(self) -> bool:
        """By the kernel, since where the forkserver is stopped or dead multiprocessing does not know."""
        return is_running(self.pid, reaper.since(self.pid))

    def _join(self) -> None:
        """Wait until it is known how it ended, which is for the forkserver to say; one that does not is stopped."""
        self.process.join(STATUS_SECONDS)
        if self.process.exitcode is None:
            self.kill()
            _kill_server()
            self.process.join(STATUS_SECONDS)


class _Rank(_Process):
    """One process of a trial, and what it has told."""

    def __init__(
        self,
        number: int,
        trial: Trial,
        folder: Path,
        environment: Mapping[str, str],
        tells_steps: bool,
        seconds: float,
    ) -> None:
        self.number = number
        self.measured = Measurements()
        self.phase: Phase = "start"
        self.is_dead = False
        super().__init__(
            log_of(number, folder), lambda end: _process_for(trial, end, folder, environment, tells_steps), seconds
        )

    def receive(self) -> worker.Report:
        """The next report; of a rank that has died, how."""
        try:
            report: worker.Report = self.connection.recv()
        except (EOFError, OSError):
            self.is_dead = True
            return self.death(self.phase, self.measured)
        match report:
            case worker.Entered(phase):
                self.phase = phase
            case worker.Ready(measured) | worker.RoundEnded(measured):
                self.measured = measured
            case Completed():
                self.measured = report.measured
        return report

    def whereabouts(self) -> str:
        """The Python calls it is in, the innermost first; empty where it does not answer."""
        try:
            before = self._log.stat().st_size
            os.kill(self.pid, signal.SIGUSR1)
        except OSError:  # it is gone, or its log
            return ""
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline:
            said = self._log.read_bytes()[before:].decode(errors="replace")
            if said.endswith("\n") and said.count("\n") > 1:
                return said
            time.sleep(ANSWER_SECONDS / 20)
        return ""


def _waits_for_others(whereabouts: str) -> bool:
    """Whether a rank that is there is in torch's hands: in a message to another rank, in a backward pass whose hooks
    send some, or waiting for a device that does."""
    innermost = next((line for line in whereabouts.splitlines() if line.lstrip().startswith("File ")), "")
    return any(part in innermost for part in ("torch/distributed/", "torch/autograd/", "torch/cuda/"))


def _silent(helper: _Process, seconds: float) -> TimedOut:
    return TimedOut(
        phase="start",
        silent_seconds=seconds,
        reason=f"a helper process answered nothing for {seconds:g} s and was killed",
        details=helper.last_words(),
        measured=Measurements(),
    )


def _process_for(
    trial: Trial, connection: Connection, folder: Path, environment: Mapping[str, str], tells_steps: bool
) -> BaseProcess:
    """The process that runs `trial`, not started yet; always a fresh interpreter for a library that must come before
    what the forkserver has imported."""
    if trial.method.library == "peft":
        gpus = None if trial.device_index is None else (trial.device_index, trial.world_size)
        return _job(worker.run, connection, trial, folder, time.monotonic(), environment, tells_steps, gpus=gpus)
    pickled = pickle.dumps(trial)
    return _fresh().Process(
        target=unsloth.run, args=(connection, pickled, folder, time.monotonic(), trial.device_index), daemon=True
    )


def _job(
    function: Callable[..., None], connection: Connection, *args: Any, gpus: tuple[int, int] | None = None
) -> BaseProcess:
    """The process that calls `function(connection, *args)`: a fork of the forkserver, or a fresh interpreter where that
    could not use the GPU."""
    if culprit() is None:
        return _forkserver.Process(target=function, args=(connection, *args), daemon=True)
    pickled = pickle.dumps((function, args))
    return _fresh().Process(target=process.run_fresh, args=(connection, pickled, gpus), daemon=True)


def _fresh() -> SpawnContext:
    return multiprocessing.get_context("spawn")


def _start(process: BaseProcess, seconds: float) -> None:
    """Start `process`. The forkserver is killed where it has not done so within `seconds`, since it is stopped then;
    the next start finds a new one. One that has not answered before is given the time that its imports take."""
    global _answered
    expired = threading.Event()
    if _answered is None or not is_running(_answered, reaper.since(_answered)):
        seconds = max(seconds, IMPORT_SECONDS)

    def expire() -> None:
        expired.set()
        _kill_server()

    _shorten_sockets_path()
    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        with _without_main(), _with_tunables():
            try:
                process.start()
            except (EOFError, ConnectionError):  # the forkserver has died since it was last asked
                if expired.is_set():
                    raise
                _kill_server()  # one that is still dying would be asked again
                process.start()
        _answered = _server_pid()
    except (EOFError, ConnectionError) as error:
        raise HelperError(_not_started(expired.is_set(), seconds)) from error
    finally:
        timer.cancel()
        if (server := _server_pid()) is not None:
            reaper.adopt(server)


def _not_started(expired: bool, seconds: float) -> Crashed | TimedOut:
    """How a child ended that could not be started, the forkserver having been killed for its silence, or not."""
    if not expired:
        return Crashed(phase="start", reason="the forkserver died", details="", measured=Measurements())
    reason = f"the forkserver answered nothing for {seconds:g} s and was killed"
    return TimedOut(phase="start", silent_seconds=seconds, reason=reason, details="", measured=Measurements())


def _shorten_sockets_path() -> None:
    """The forkserver listens on a socket in multiprocessing's own temporary folder, whose path may have some hundred
    characters (unix(7)); TMPDIR may have more, and multiprocessing can be given another by no public name."""
    settings = getattr(multiprocessing.current_process(), "_config", None)
    if settings is not None and "tempdir" not in settings and len(tempfile.gettempdir()) > SOCKET_FOLDER_CHARACTERS:
        settings["tempdir"] = str(reaper.make_folder(Path("/tmp")))


def _server_pid() -> int | None:
    """The forkserver's process id, which multiprocessing keeps to itself; None where there is none, or no such name."""
    pid: int | None = getattr(getattr(forkserver, "_forkserver", None), "_forkserver_pid", None)
    return pid


def _kill_server() -> None:
    if (server := _server_pid()) is not None:
        since = reaper.since(server) or started(server)  # it may have died before it was adopted
        kill(server, since)
        _wait_until(lambda: not is_running(server, since), STATUS_SECONDS)


def _wait_until(is_true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_true() and time.monotonic() < deadline:
        time.sleep(0.005)


def tunables() -> str:
    """What children have in GLIBC_TUNABLES: the user's, else `TUNABLES`."""
    name, value = TUNABLES
    return os.environ.get(name, value)


@contextmanager
def _with_tunables() -> Iterator[None]:
    """Have what is started inside read `tunables`."""
    name, value = TUNABLES
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


@contextmanager
def _without_main() -> Iterator[None]:
    """Start children that do not import this process's main script, which is pytest's: a child imports no pytest."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
