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
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import ParamSpec, Self, TypeVar

from lightweight import peer, ranks, worker
from lightweight.process import log_of, redirect_output
from lightweight.stock import Request
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

PRELOAD = [
    "lightweight.preload",  # first: it keeps the imports after it off the GPU
    "lightweight.worker",
    "lightweight.forecast",
    # transformers imports these lazily, in every child anew, unless the forkserver has them already
    "transformers.integrations.bitsandbytes",
    "transformers.models.byt5.tokenization_byt5",
    "transformers.models.gpt_neo.modeling_gpt_neo",
    "transformers.models.llama.modeling_llama",
    "transformers.models.opt.modeling_opt",
    "triton.experimental.gluon",  # Triton's own lazy import, where there is Triton
]

LAST_WORDS = 2_000
"""Characters of a dead child's log that go into its outcome."""

PEER_SECONDS = 3.0
"""How long a rank that failed with an exception is given the benefit of the doubt: another may have died before."""

ANSWER_SECONDS = 1.0
"""How long a silent rank may take to say where it is."""

# Which physical pages a process gets decides what collides in its caches for as long as it lives; of like children some
# were 2 and 3 % slower than others. A huge page is laid out alike in all of them. glibc reads this when the forkserver
# starts (GNU C Library manual, Memory Allocation Tunables), and asks the kernel for them.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(PRELOAD)


def call(function: Callable[P, T], folder: Path, *args: P.args, **kwargs: P.kwargs) -> T:
    """`function(*args)` in a child of its own, its output going to a log in `folder`. Exceptions come through."""
    with ProcessPoolExecutor(
        1, mp_context=_forkserver, initializer=redirect_output, initargs=(folder / "log",)
    ) as executor:
        with _without_main():
            future = executor.submit(function, *args, **kwargs)
        return future.result()


class Child:
    """A trial in its child process, one for each rank, as a context: entering builds it, leaving leaves no process
    behind.

    Ask for rounds, then `finish`. `outcome` is set as soon as the trial has ended, however it did; `rounds_done` counts
    rounds that were trained whole. `on_step(trial, step, loss)` is told of every optimizer step, `loss` being the
    newest known, and `on_round(trial, measured)` of every round's end. A child that reports nothing for
    `silence_seconds` has timed out and is killed; one without `on_step` reports no steps, which beside short rounds
    would take their time. What ends one rank ends the trial, and all of its ranks.
    """

    def __init__(
        self,
        trial: Trial,
        folder: Path,
        silence_seconds: float = 600.0,
        on_step: Callable[[Trial, int, float | None], None] | None = None,
        on_round: Callable[[Trial, Measurements], None] = lambda trial, measured: None,
    ) -> None:
        self.trial = trial
        self.outcome: Outcome | None = None
        self.rounds_done = 0
        self._ranks: list[_Rank] = []
        self._folder = folder
        self.silence_seconds = silence_seconds
        self._on_step = on_step
        self._on_round = on_round

    def __enter__(self) -> Self:
        world_size = self.trial.world_size
        self._store = ranks.store() if world_size > 1 else None  # listens while it lives
        port = None if self._store is None else self._store.port
        try:
            for number in range(world_size):
                environment = ranks.environment(number, world_size, port)
                tells_steps = number == 0 and self._on_step is not None
                self._ranks.append(_Rank(number, self.trial, self._folder, environment, tells_steps))
            self._await(worker.Ready)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @property
    def pids(self) -> list[int]:
        """The process ids of the child's ranks, in their order."""
        return [rank.process.pid for rank in self._ranks if rank.process.pid is not None]

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
        return self._measured if self.outcome is None else self.outcome.measured

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
            rank.process.join(timeout=5 if isinstance(self.outcome, Completed) else 0)
            rank.kill()

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
                        pass
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
        """Kill all ranks, having asked each where it is: the one that others wait for does not wait itself."""
        said = {rank: rank.whereabouts() for rank in self._ranks}
        culprit = next((rank for rank in silent if not _waits_for_others(said[rank])), silent[0])
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


class _Rank:
    """One process of a trial, started, the owner's end of its pipe, and what it has told."""

    def __init__(
        self, number: int, trial: Trial, folder: Path, environment: Mapping[str, str], tells_steps: bool
    ) -> None:
        self.number = number
        self.measured = Measurements()
        self.phase: Phase = "start"
        self.is_dead = False
        self._log = log_of(number, folder)
        self.connection, childs_end = _forkserver.Pipe()
        self.process = _process_for(trial, childs_end, folder, environment, tells_steps)
        with _without_main():
            self.process.start()
        childs_end.close()

    def receive(self) -> worker.Report:
        """The next report; of a rank that has died, how."""
        try:
            report: worker.Report = self.connection.recv()
        except (EOFError, OSError):
            self.is_dead = True
            return self._death()
        match report:
            case worker.Entered(phase):
                self.phase = phase
            case worker.Ready(measured) | worker.RoundEnded(measured):
                self.measured = measured
            case Completed():
                self.measured = report.measured
        return report

    def kill(self) -> None:
        """Leave no process behind."""
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def last_words(self) -> str:
        """The end of what its libraries have written."""
        return self._log.read_text(errors="replace")[-LAST_WORDS:] if self._log.exists() else ""

    def whereabouts(self) -> str:
        """The Python calls it is in, the innermost first; empty where it does not answer."""
        if not self.process.is_alive() or self.process.pid is None or not self._log.exists():
            return ""
        before = self._log.stat().st_size
        os.kill(self.process.pid, signal.SIGUSR1)
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline:
            said = self._log.read_bytes()[before:].decode(errors="replace")
            if said.endswith("\n") and said.count("\n") > 1:
                return said
            time.sleep(ANSWER_SECONDS / 20)
        return ""

    def _death(self) -> Crashed:
        self.process.join()
        code = self.process.exitcode
        if code is not None and code < 0:
            reason = f"killed by {signal.Signals(-code).name}"
            if code == -signal.SIGKILL:
                reason += " (what the kernel's out-of-memory killer sends, too)"
        else:
            reason = f"the child exited with status {code} before its trial had ended"
        return Crashed(phase=self.phase, reason=reason, details=self.last_words(), measured=self.measured)


def _waits_for_others(whereabouts: str) -> bool:
    """Whether a rank that is there is in torch's hands: in a message to another rank, in a backward pass whose hooks
    send some, or waiting for a device that does."""
    innermost = next((line for line in whereabouts.splitlines() if line.lstrip().startswith("File ")), "")
    return any(part in innermost for part in ("torch/distributed/", "torch/autograd/", "torch/cuda/"))


def _process_for(
    trial: Trial, connection: Connection, folder: Path, environment: Mapping[str, str], tells_steps: bool
) -> BaseProcess:
    """The process that runs `trial`, not started yet: a fork of the forkserver, or a fresh one for a library that must
    come before what the forkserver has imported."""
    if trial.method.library == "peft":
        arguments = connection, trial, folder, time.monotonic(), environment, tells_steps
        return _forkserver.Process(target=worker.run, args=arguments, daemon=True)
    pickled = pickle.dumps(trial)
    return multiprocessing.get_context("spawn").Process(
        target=peer.run, args=(connection, pickled, folder, time.monotonic(), trial.device_index), daemon=True
    )


@contextmanager
def _without_main() -> Iterator[None]:
    """Start children that do not import this process's main script, which is pytest's: a child imports no pytest."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
