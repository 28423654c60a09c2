"""One trial, one process: the child's owner, which turns its death into an Outcome.

Children are forked from a forkserver that has imported what they need and has never touched CUDA, so a start takes
milliseconds, peaks are a trial's own, and an out-of-memory or a broken CUDA context cannot reach the next trial.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, Self, TypeVar

from lightweight import worker
from lightweight.stock import Request
from lightweight.trial import Crashed, Measurements, Outcome, Phase, TimedOut, Trial

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
]

LAST_WORDS = 2_000
"""Characters of a dead child's log that go into its outcome."""

# Which physical pages a process gets decides what collides in its caches for as long as it lives; of like children some
# were 2 and 3 % slower than others. A huge page is laid out alike in all of them. glibc reads this when the forkserver
# starts (GNU C Library manual, Memory Allocation Tunables), and asks the kernel for them.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(PRELOAD)


def call(function: Callable[P, T], folder: Path, *args: P.args, **kwargs: P.kwargs) -> T:
    """`function(*args)` in a child of its own, its output going to a log in `folder`. Exceptions come through."""
    with ProcessPoolExecutor(
        1, mp_context=_forkserver, initializer=worker.redirect_output, initargs=(folder / "log",)
    ) as executor:
        with _without_main():
            future = executor.submit(function, *args, **kwargs)
        return future.result()


class Child:
    """A trial in its child process, as a context: entering builds it, leaving leaves no process behind.

    Ask for rounds, then `finish`. `outcome` is set as soon as the trial has ended, however it did; `rounds_done` counts
    rounds that were trained whole. `on_step(trial, step, loss)` is told of every optimizer step, `loss` being the
    newest known, and `on_round(trial, measured)` of every round's end. A child that reports nothing for
    `silence_seconds` has timed out and is killed.
    """

    def __init__(
        self,
        trial: Trial,
        folder: Path,
        silence_seconds: float = 600.0,
        on_step: Callable[[Trial, int, float | None], None] = lambda trial, step, loss: None,
        on_round: Callable[[Trial, Measurements], None] = lambda trial, measured: None,
    ) -> None:
        self.trial = trial
        self.outcome: Outcome | None = None
        self.rounds_done = 0
        self._measured = Measurements()
        self._phase: Phase = "start"
        self._folder = folder
        self._silence_seconds = silence_seconds
        self._on_step = on_step
        self._on_round = on_round

    def __enter__(self) -> Self:
        self._connection, childs_end = _forkserver.Pipe()
        self._process = _forkserver.Process(
            target=worker.run, args=(childs_end, self.trial, self._folder, time.monotonic()), daemon=True
        )
        with _without_main():
            self._process.start()
        childs_end.close()
        try:
            self._await(worker.Ready)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @property
    def pid(self) -> int | None:
        """The child's process id."""
        return self._process.pid

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

    def finish(self) -> Outcome:
        """Train what is left of the job, evaluate, save, and end the trial."""
        while self.outcome is None and self.rounds_done < self.trial.rounds:
            self.round()
        self._ask("finish")
        self._await(None)
        assert self.outcome is not None
        return self.outcome

    def _stop(self) -> None:
        self._connection.close()  # a child that waits for a request ends by itself
        self._process.join(timeout=5 if self.outcome is not None else 0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, request: Request) -> None:
        if self.outcome is None:
            try:
                self._connection.send(request)
            except OSError:
                self.outcome = self._death()

    def _await(self, answer: type | None) -> None:
        """Read reports until one of type `answer`, or the outcome."""
        while self.outcome is None:
            if not self._connection.poll(self._silence_seconds):
                self._process.kill()
                self.outcome = TimedOut(
                    phase=self._phase,
                    silent_seconds=self._silence_seconds,
                    reason=f"reported nothing for {self._silence_seconds:g} s and was killed",
                    measured=self._measured,
                )
                return
            try:
                report: worker.Report = self._connection.recv()
            except (EOFError, OSError):
                self.outcome = self._death()
                return
            match report:
                case worker.Step(step, loss):
                    self._on_step(self.trial, step, loss)
                case worker.Entered(phase):
                    self._phase = phase
                case worker.Ready(measured) | worker.RoundEnded(measured):
                    self._measured = measured
                    assert answer is not None and isinstance(report, answer)
                    if isinstance(report, worker.RoundEnded):
                        self.rounds_done += 1
                        self._on_round(self.trial, measured)
                    return
                case _:
                    self.outcome = report

    def _death(self) -> Crashed:
        self._process.join()
        code = self._process.exitcode
        if code is not None and code < 0:
            reason = f"killed by {signal.Signals(-code).name}"
            if code == -signal.SIGKILL:
                reason += " (what the kernel's out-of-memory killer sends, too)"
        else:
            reason = f"the child exited with status {code} before its trial had ended"
        return Crashed(phase=self._phase, reason=reason, details=self._last_words(), measured=self._measured)

    def _last_words(self) -> str:
        log = self._folder / "log"
        return log.read_text(errors="replace")[-LAST_WORDS:] if log.exists() else ""


@contextmanager
def _without_main() -> Iterator[None]:
    """Start children that do not import this process's main script, which is pytest's: a child imports no pytest."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
