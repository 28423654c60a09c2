"""How does a session train its trials? Each in a child of its own, recorded as it ended or as it was cut short.

`plugin` opens the laboratory when a test or an option asks for it; until then none of this has been imported.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lightweight import models, record
from lightweight.child import failure, handle, helper, owner
from lightweight.corpus import Corpus
from lightweight.forecast import calibration, placing, replay, step_time, tracer
from lightweight.forecast.tracer import ForecastError
from lightweight.internals import pytest_benchmark
from lightweight.methods import Method, MethodError, check_layers
from lightweight.models import Model
from lightweight.record import Entry, Speedup
from lightweight.session import choices, speedups, xdist_bridge
from lightweight.session.choices import Choices
from lightweight.session.collection import Collection
from lightweight.session.fixtures import NOT_RUN
from lightweight.session.interruption import Interruption, so_far
from lightweight.session.ledger import Ledger, Shipment, shipment
from lightweight.session.options import CPU_EPOCHS, CUDA_EPOCHS
from lightweight.settings import Placement
from lightweight.targets import NATIVE
from lightweight.trial import Completed, Crashed, Forecast, Measurements, Outcome, Trial
from lightweight.verdict import gate

_Key = tuple[str, Corpus]


def _key(trial: Trial) -> _Key:
    """What only an equal trial has. A method has parts that cannot be hashed, and a corpus may be too long to write."""
    return repr(trial), trial.corpus


class Laboratory(Choices):
    """The session's trials, under what its options say: what has been trained, and training what has not."""

    def __init__(self, config: pytest.Config) -> None:
        super().__init__(config)
        self.runs: list[record.Run] = []  # what this one is compared with, newest first
        self.ledger = Ledger(config)
        self.interruption = Interruption(config, self.ledger)
        self.collection = Collection(self, self.ledger)
        stores = ("benchmark_json", "benchmark_save", "benchmark_autosave")
        self._is_stored = any(config.getoption(option, None) for option in stores)
        self._outcomes: dict[_Key, tuple[str, Outcome]] = {}  # each with the test that found it
        self._traces: dict[_Key, replay.Trace] = {}
        self._written: dict[tuple[str, int], Model] = {}  # by name and seed
        self._has_named_culprit = False

    def trial(self, model: str | Model, method: str | Method, **changes: Any) -> Trial:
        """The trial of a cell under the session's options. Its weights are written when it is run: `located`."""
        settings: dict[str, Any] = {
            "target": self.target,
            "corpus": self.corpus,
            "seed": self.option("seed"),
            "epochs": self.option("epochs") or (CUDA_EPOCHS if self.has_cuda else CPU_EPOCHS),
            "device_index": 0 if self.has_cuda else None,
            "world_size": self.world_size,
            **self.settings.rows,
        } | changes
        wanted = choices.model(model)
        try:
            chosen = self.method(method, settings["world_size"])
            record.check_searched(self.settings.learning_rate, wanted.name, chosen)
        except ValueError as error:  # the test's own says otherwise
            pytest.skip(f"{NOT_RUN}{error}")
        found = self.find(wanted)
        try:
            check_layers(chosen, found)
        except (MethodError, models.ModelError) as error:
            pytest.fail(str(error), pytrace=False)
        return self._placed(Trial(model=found, method=chosen, **settings), changes.get("placement"))

    def _placed(self, trial: Trial, said: Placement | None) -> Trial:
        """`trial` with its network where it is said to be; else sharded over its ranks where that is forecast to fit
        and a replica is not."""
        if trial.world_size == 1:
            return trial
        said = said or self.settings.placement
        if said is not None or trial.target.budget_bytes is None:
            return dataclasses.replace(trial, placement=said or "replicated")
        try:
            return placing.placed(trial, self.forecast)
        except ForecastError:  # which is told where the trial runs
            return trial

    def located(self, trial: Trial) -> Trial:
        """`trial` with its model's weights in a folder, written once a session where there is none; with `--seeds` once
        a seed, so that a trial is the one of a session that has its seed alone. Raises ChildError where that fails."""
        model = trial.model
        if model.is_loadable:
            return trial
        seed = trial.seed if trial.seed in self.seeds else self.option("seed")
        written = self._written.get((model.name, seed))
        if written is None or not Path(written.location or "").is_dir():
            self.progress.show(f"{model.name}: writing its weights")
            folder = self.folder / f"{model.name.replace('/', '--')}-{seed}"
            shutil.rmtree(folder, ignore_errors=True)  # what a helper that was killed has left
            seconds = self.option("trial_timeout")
            try:
                written = helper.call_within(seconds, models.write, self.folder, model, folder, seed)
            except handle.ChildError as error:
                reason = f"writing the weights: {error.outcome.reason}"
                raise handle.ChildError(dataclasses.replace(error.outcome, reason=reason)) from None
            self._written[model.name, seed] = written
        return dataclasses.replace(trial, model=written)

    def forecast(self, trial: Trial) -> Forecast:
        """The forecast of `trial` on the session's device; its trace is made once for all targets. Raises
        ForecastError."""
        # Kernels are the device's own; without one they are those of the target aimed at.
        target = NATIVE if self.device.capability else trial.target
        key = _key(dataclasses.replace(trial, target=target, seed=0))  # a peak is every seed's
        if key not in self._traces:
            self.progress.show(f"{trial.name}: forecasting its memory")
            seconds = self.option("trial_timeout")
            self._traces[key] = helper.call_within(seconds, tracer.trace_on, self.folder, trial, self.device)
        forecast = replay.of_trial(self._traces[key], trial, self.device)
        step = step_time.forecast(self._traces[key], trial, self.device.name, calibration.stored())
        if step is None:
            return forecast
        return dataclasses.replace(forecast, step_seconds=step.seconds, is_calibrated=step.is_calibrated)

    def try_to_forecast(self, trial: Trial) -> Forecast | None:
        """The forecast of `trial`, or None, said in a line, where it cannot be made, whatever the reason."""
        try:
            return self.forecast(trial)
        except ForecastError as error:
            self.progress.note(f"no forecast: {error}")
        except Exception as error:  # noqa: BLE001  a row is never lost to a failed forecast
            self.progress.note(f"no forecast: {trial.name}: {type(error).__name__}: {models.first_line(error)}")
        return None

    def record_forecast(self, item: pytest.Item, trial: Trial) -> Forecast:
        """The forecast of `trial`, recorded with `item`. Raises ForecastError."""
        forecast = self.forecast(trial)
        shipment(item).forecasts.append(record.forecast_row(trial, forecast))
        return forecast

    def outcome_of(self, trial: Trial) -> Outcome | None:
        """How `trial` ended, if it has been run in this session."""
        return self._outcomes.get(_key(trial), ("", None))[1]

    def run(self, item: pytest.Item, trial: Trial, rounds: Callable[[owner.Child], None] | None = None) -> Outcome:
        """Run `trial` in a child of its own, letting `rounds` time its rounds, and record it with `item`: as it ended,
        or as it was cut short."""
        self.ledger.is_used = True
        child: owner.Child | None = None

        def begin(running: owner.Child | None) -> None:
            nonlocal child
            child = running
            died = Crashed(**so_far(child), reason="the process that ran it died", details="")
            self.ledger.tell_begun(item, Shipment(entries=[self._entry(item, trial, died)]))

        begin(None)
        try:
            with self._child(trial, self._show_step, self._show_round, begin) as child:
                if rounds is not None:
                    rounds(child)
                outcome = child.finish()
        except handle.ChildError as error:
            outcome = error.outcome
        except BaseException as error:
            self._record(item, trial, self.interruption.cut_short(error, child))
            raise
        if self.interruption.is_expired:
            self._record(item, trial, self.interruption.cut_short(None, child))
            pytest.fail(self.interruption.expiry, pytrace=False)
        self._record(item, trial, outcome)
        if (forecast := self.try_to_forecast(trial)) is not None:
            shipment(item).entries[-1] = self._entry(item, trial, outcome, forecast)
        return outcome

    def _record(self, item: pytest.Item, trial: Trial, outcome: Outcome) -> None:
        """Keep how `trial` ended, before anything else can fail."""
        self.progress.show(f"{trial.name}: {outcome.kind.replace('_', ' ')}", " ", " ")
        self._outcomes[_key(trial)] = item.nodeid, outcome
        shipment(item).entries.append(self._entry(item, trial, outcome))
        self.ledger.tell_begun(item)

    def _entry(self, item: pytest.Item, trial: Trial, outcome: Outcome, forecast: Forecast | None = None) -> Entry:
        """The entry of `trial`, with the test that ran it and the worker that ran the test."""
        mark = item.get_closest_marker("shown_as")
        where: dict[str, Any] = {"shown_as": None if mark is None else str(mark.args[0])}
        where |= xdist_bridge.where(self.config)
        return dataclasses.replace(record.entry(trial, outcome, self.device, forecast), test=item.nodeid, **where)

    def speedup(self, item: pytest.Item, trial: Trial, baseline: Trial) -> Speedup:
        """Measure how many times as fast as `baseline` a trial is, and record it with the trial's own outcome. Both are
        run now where this session has not yet, since neither a failed cell nor a failed baseline has a speedup."""
        entry = self._entry(item, trial, self.outcome_of(trial) or self.run(item, trial))
        ended = None
        for part in (trial, baseline):
            outcome = self.outcome_of(part) or self.run(item, part)
            if not isinstance(outcome, Completed):
                ended = f"{'baseline ' if part is baseline else ''}{outcome.kind.replace('_', ' ')}"
        steps = speedups.CUDA_STEPS if self.has_cuda else speedups.CPU_STEPS
        speedup = Speedup(baseline=baseline.method.name, cap=self.option("pairs"), steps_per_round=steps, reason=ended)
        if ended is not None:
            shipment(item).speedups.append((entry, speedup))
            return speedup
        died = dataclasses.replace(speedup, reason="the worker that measured it died")
        self.ledger.tell_begun(item, Shipment(speedups=[(entry, died)]))
        stored = gate.stored(entry, self.runs)
        try:
            speedup = speedups.measure(
                trial,
                baseline,
                speedup,
                start=self._child,
                stored=stored and stored[1],
                fail=self.limits.speedup_fail,
                is_kept=self._is_stored,
                progress=self.progress,
            )
        except handle.ChildError as error:
            speedup = dataclasses.replace(speedup, reason=str(error))
        except BaseException as error:
            speedup = dataclasses.replace(speedup, reason=self.interruption.reason(error))
            raise
        finally:
            shipment(item).speedups.append((entry, speedup))
            self.ledger.tell_begun(item)
        return speedup

    @contextmanager
    def _child(self, trial: Trial, *callbacks: Callable[..., None]) -> Iterator[owner.Child]:
        """The child of `trial`. Raises ChildError where what it needs cannot be made."""
        try:
            located = self.located(trial)
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            culprit = helper.culprit()
        except handle.ChildError:
            raise
        except Exception as error:
            raise handle.ChildError(failure.outcome_of(error, trial, None, self.folder)) from error  # type: ignore[arg-type]
        if culprit is not None and not self._has_named_culprit:
            self._has_named_culprit = True
            self.progress.note(f"{culprit} initialises CUDA when it is imported: children start in fresh interpreters")
        try:
            seconds = self.option("trial_timeout")
            with owner.Child(located, folder, seconds, *callbacks, on_told=self._show_told) as child:
                yield child
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _show_told(self, trial: Trial, text: str) -> None:
        self.progress.show(f"{trial.name}: {text}")

    def _show_step(self, trial: Trial, step: int, loss: float | None) -> None:
        of_loss = "" if loss is None else f", loss {loss:.3f}"
        self.progress.show(f"{trial.name}: step {step} of {trial.steps}{of_loss}")

    def _show_round(self, trial: Trial, measured: Measurements) -> None:
        step, loss = len(measured.train_loss), measured.train_loss[-1]
        self.progress.show(f"{trial.name}: step {step} of {trial.steps}, loss {loss:.3f}", in_a_log="\n")

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """A test that is run again finds anew what it has found before."""
        pytest_benchmark.forget_row(self.config, item.nodeid)
        self._outcomes = {key: known for key, known in self._outcomes.items() if known[0] != item.nodeid}

    def pytest_unconfigure(self) -> None:
        self.remove_folder()
