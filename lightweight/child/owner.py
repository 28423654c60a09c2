"""One trial, one process: the child's owner, which asks it for rounds and hears how it ended.

So peaks are a trial's own, and an out-of-memory or a broken CUDA context cannot reach the next trial.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Self

from lightweight.child import failure, helper, unsloth, worker
from lightweight.child.forkserver import STATUS_SECONDS
from lightweight.child.handle import ChildError, Handle
from lightweight.child.helper import SILENCE_SECONDS
from lightweight.child.process import log_of
from lightweight.training import ranks
from lightweight.training.rounds import Request
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

PEER_SECONDS = 3.0
"""How long a rank that failed with an exception is given the benefit of the doubt: another may have died before."""

ANSWER_SECONDS = 1.0
"""How long a silent rank may take to say where it is."""


class Child:
    """A trial in its child process, one for each rank, as a context: entering builds it, leaving leaves no process
    behind.

    Ask for rounds, then `finish`. `outcome` is set as soon as the trial has ended, however it did; `rounds_done` counts
    rounds that were trained whole. `on_step(trial, step, loss)` is told of every optimizer step, `loss` being the
    newest known, `on_round(trial, measured)` of every round's end, `on_phase(child)` of every phase that the first rank
    enters, and `on_told(trial, text)` of how far the encoding of a long corpus is. A child that reports nothing for
    `silence_seconds` has timed out and is killed; one without `on_step` reports no steps, which beside short rounds
    would take their time. What ends one rank ends the trial, and all of its ranks.
    """

    def __init__(
        self,
        trial: Trial,
        folder: Path,
        silence_seconds: float = SILENCE_SECONDS,
        on_step: Callable[[Trial, int, float | None], None] | None = None,
        on_round: Callable[[Trial, Measurements], None] = lambda trial, measured: None,
        on_phase: Callable[[Child], None] = lambda child: None,
        *,
        on_told: Callable[[Trial, str], None] = lambda trial, text: None,
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
        self._on_told = on_told

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
            self.trial = self.trial.with_rows(self.measured.training_rows)
        except ChildError as error:
            self.outcome = error.outcome
        except OSError as error:  # its folder is gone, its disk is full, or the system has no process left
            self.outcome = failure.outcome_of(error, self.trial, None, self._folder)
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
                    case worker.StepEnded(step, loss):
                        if self._on_step is not None:
                            self._on_step(self.trial, step, loss)
                    case worker.Preparing(text):
                        self._on_told(self.trial, text)
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
        places = {rank: rank.whereabouts() for rank in self._ranks}
        stuck = min(silent, key=lambda rank: (bool(places[rank]), _waits_for_others(places[rank])))
        details = stuck.last_words()
        if len(self._ranks) > 1:
            answers = (f"rank {rank.number}: {places[rank].strip() or 'does not answer'}" for rank in self._ranks)
            details = "\n".join([details, *answers])
        for rank in self._ranks:
            rank.kill()
        outcome = TimedOut(
            phase=stuck.phase,
            silent_seconds=self.silence_seconds,
            reason=f"reported nothing for {self.silence_seconds:g} s and was killed",
            details=details,
            measured=self._measured,
        )
        return self._of_the_trial(stuck, outcome)


Ended = OutOfMemory | Diverged | Crashed | TimedOut
"""What ends a trial before its time."""


class _Rank(Handle):
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
            with self._log.open("rb") as log:
                log.seek(before)
                calls = log.read().decode(errors="replace")
            if calls.endswith("\n") and calls.count("\n") > 1:
                return calls
            time.sleep(ANSWER_SECONDS / 20)
        return ""


def _waits_for_others(whereabouts: str) -> bool:
    """Whether a rank that is there is in torch's hands: in a message to another rank, in a backward pass whose hooks
    send some, or waiting for a device that does."""
    innermost = next((line for line in whereabouts.splitlines() if line.lstrip().startswith("File ")), "")
    return any(part in innermost for part in ("torch/distributed/", "torch/autograd/", "torch/cuda/"))


def _process_for(
    trial: Trial, connection: Connection, folder: Path, environment: Mapping[str, str], tells_steps: bool
) -> BaseProcess:
    """The process that runs `trial`, not started yet; always a fresh interpreter for a library that must come before
    what the forkserver has imported."""
    if trial.method.library == "peft":
        gpus = (0, 0) if trial.device_index is None else (trial.device_index, trial.world_size)
        return helper.process_of(
            worker.run, connection, trial, folder, time.monotonic(), environment, tells_steps, gpus=gpus
        )
    pickled = pickle.dumps(trial)
    return helper.fresh().Process(
        target=unsloth.run, args=(connection, pickled, folder, time.monotonic(), trial.device_index), daemon=True
    )
