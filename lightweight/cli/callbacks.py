"""What does `lightweight train` add to the Trainer while it trains? Checkpoints in time, and a line of progress."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lightweight.cli import checkpoints
from lightweight.cli.checkpoints import StopRequest
from lightweight.internals.transformers import bar_of, begin_bar_at
from lightweight.training import ranks

PROGRESS_SECONDS = 10.0
"""Between two lines of progress where nobody watches."""


class Checkpoints(TrainerCallback):
    """Has a checkpoint saved when `clock` or a signal says so, and made whole when the Trainer has written it; after
    a signal training stops, and `stopped` says so. `settings`, of the job, go into its manifest."""

    def __init__(
        self,
        stop_request: StopRequest,
        clock: checkpoints.Clock,
        shelf: checkpoints.Shelf,
        settings: Mapping[str, Any],
    ) -> None:
        self.stopped = False
        self._stop_request, self._clock, self._shelf, self._settings = stop_request, clock, shelf, settings

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._clock.restart()
        self._stop_request.training_begins()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        came, is_due = ranks.any_says(self._stop_request.came, self._clock.is_due, device=args.device)
        if came:
            self.stopped = control.should_save = control.should_training_stop = True
        elif is_due:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        written = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
        ranks.wait_for_all()  # each has its own random numbers' state to write
        ranks.of_first(lambda: self._keep(written))
        self._clock.restart()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._stop_request.training_ended(stopped=self.stopped)

    def _keep(self, written: Path) -> None:
        checkpoints.seal(written, self._settings)
        self._shelf.add(written)


class ProgressBar(ProgressCallback):
    """transformers' own bar with the loss in it, in one line; in a log a line every few seconds."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        super().on_train_begin(args, state, control)  # type: ignore[no-untyped-call]
        if (bar := bar_of(self)) is not None:
            begin_bar_at(self, state.global_step)
            if not sys.stderr.isatty():
                bar.mininterval = PROGRESS_SECONDS

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if (bar := bar_of(self)) is not None and logs and "loss" in logs:
            bar.set_postfix_str(f"loss {logs['loss']:.4f}", refresh=False)

    def close(self) -> None:
        """End the line of a training that did not get to its end."""
        if (bar := bar_of(self)) is not None:
            bar.close()
