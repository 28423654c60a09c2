"""A session's trials: what its options say, what has been trained, and what is told of it.

`plugin` opens the laboratory when a test or an option asks for it; until then none of this has been imported.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property, partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, TypedDict

import pytest

from lightweight import corpus, methods, models, names, record, targets
from lightweight.child import failure, forkserver, handle, helper, owner, reaper, worker
from lightweight.forecast import replay, tracer
from lightweight.forecast.replay import Forecast
from lightweight.forecast.tracer import ForecastError
from lightweight.internals import pytest_benchmark
from lightweight.methods import Method
from lightweight.models import Model
from lightweight.record import BASELINE, Speedup
from lightweight.report import report
from lightweight.session import options, xdist_bridge
from lightweight.session.alternation import alternate, trial_of_rounds
from lightweight.session.fixtures import FIXTURES, NOT_RUN, TRAINING_FIXTURES, uses
from lightweight.session.gatekeeper import limits
from lightweight.session.options import CPU_EPOCHS, CUDA_EPOCHS, TRUE_SIZES, TWINS
from lightweight.targets import CPU, NATIVE, T4, Device, GiB, Target
from lightweight.trial import Completed, Crashed, Measurements, Outcome, TimedOut, Trial
from lightweight.verdict import gate, ratio
from lightweight.verdict.limits import FAIL

CUDA_STEPS = 4  # of a round that is paired: some 100 ms and more on a fast GPU
CPU_STEPS = 1
PRECISION = 0.005
"""Half the width, as a share, of the interval that is wanted of a speedup which later runs are held against."""
CPU_PARAMETERS = 20_000_000
"""Of the largest model whose cells a CPU trains unless told how long: two epochs of it take a minute or two."""
PAIRS_SECONDS = 120.0
"""After which no more pairs of rounds are added to a speedup, whatever its precision."""
LOOKS_ONLY = ("collectonly", "showfixtures", "show_fixtures_per_test", "setupplan")
"""pytest's options by which tests are shown and none is run."""
GRACE_SECONDS = 10.0
"""How long a test whose time is up may take to end, its children having been killed."""


class Laboratory:
    """The session's trials: what its options say, what has been trained, and what is told of it."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.entries: list[record.Entry] = []
        self.forecasts: list[record.ForecastRow] = []
        self.not_run: Counter[str] = Counter()
        self.runs: list[record.Run] = []  # what this one is compared with, newest first
        self.limits = limits(config)
        self.is_used = False  # by a test of this session
        self._told_of_report = ""
        stores = ("benchmark_json", "benchmark_save", "benchmark_autosave")
        self._is_stored = any(config.getoption(option, None) for option in stores)
        self._begun: dict[str, Shipped] = {}
        self._outcomes: dict[str, tuple[str, Outcome]] = {}  # each with the test that found it
        self._traces: dict[str, replay.Trace] = {}
        self._models: dict[str, Model] = {}
        self._written: dict[str, Model] = {}
        self._folder: Path | None = None
        self._ended_by: signal.Signals | None = None
        self._seconds = 0.0  # that pytest-timeout gives the test at hand, and whether they are over
        self._is_expired = False
        self._told_of_culprit = False

    def check(self) -> None:
        """Whether the options make sense. Raises pytest.UsageError."""
        _ = self.methods
        try:
            ratio.looks(self.option("pairs"))
        except ValueError as error:
            raise pytest.UsageError(f"--pairs: {error}") from None
        for key in ("epochs", "trial_timeout", "gpus_per_trial"):
            value = self.option(key)
            if value is not None and value <= 0:
                raise pytest.UsageError(f"--{key.replace('_', '-')} {value:g}: give more than 0")
        if (path := self.option("report")) and not path.absolute().parent.is_dir():
            raise pytest.UsageError(f"--report {path}: there is no folder {path.absolute().parent}")
        seed = self.option("seed")
        if not 0 <= seed < 2**32:
            raise pytest.UsageError(f"--seed {seed}: give a number from 0 to {2**32 - 1}, which is what numpy takes")

    def option(self, key: str) -> Any:
        """What the command line says for one of lightweight's options."""
        return options.value(self.config, key)

    # What the options say; each is read when first needed, and raises pytest.UsageError.

    @cached_property
    def has_cuda(self) -> bool:
        """Whether trials run on a GPU."""
        import torch

        return torch.cuda.is_available()

    @cached_property
    def device(self) -> Device:
        """What trials run on, described by a child of its own."""
        if not self.has_cuda:
            machine = self.config.hook.pytest_benchmark_generate_machine_info(config=self.config)
            return Device(name=machine["cpu"].get("brand_raw") or machine["machine"])
        try:
            return helper.call_within(self.option("trial_timeout"), worker.describe_device, self.folder, 0)
        except handle.ChildError as error:
            raise pytest.UsageError(f"the GPU cannot be described: {error}") from None

    @cached_property
    def target(self) -> Target:
        """Whose memory trials get: `--target`'s, else a T4's where the GPU has as much."""
        name = self.option("target")
        if not self.has_cuda:
            if name is not None:
                raise pytest.UsageError(
                    f"--target {name}: a target caps a GPU's memory, and CUDA finds no GPU here; "
                    "leave the option out to train on the CPU"
                )
            return CPU
        card_bytes = self.device.total_bytes
        assert card_bytes is not None and T4.total_bytes is not None
        if name is None:
            suffices = card_bytes >= T4.total_bytes or not T4.emulated_on(self.device.name)
            return T4 if suffices else NATIVE.on(self.device)
        try:
            target = targets.named(name)
        except ValueError as error:
            raise pytest.UsageError(f"--target: {error}") from None
        if target.emulated_on(self.device.name) and (target.total_bytes or 0) > card_bytes:
            raise pytest.UsageError(
                f"--target {name}: needs {(target.total_bytes or 0) / GiB:.1f} GiB and {self.device.name} has "
                f"{card_bytes / GiB:.1f} GiB; choose a smaller target or native"
            )
        return target.on(self.device)

    @cached_property
    def gpus(self) -> int:
        """How many GPUs this session sees."""
        import torch

        return torch.cuda.device_count()

    @cached_property
    def world_size(self) -> int:
        """Ranks of a trial, one GPU each, or processes on a CPU."""
        wanted: int = self.option("gpus_per_trial")
        if self.has_cuda and wanted > self.gpus:
            raise pytest.UsageError(f"--gpus-per-trial {wanted}: CUDA finds {self.gpus} here; give no more than that")
        return wanted

    @cached_property
    def corpus(self) -> corpus.Corpus:
        """The dialogues of `--corpus`, else of `corpus.json` in pytest's root."""
        path = self.option("corpus") or self.config.rootpath / "corpus.json"
        try:
            return corpus.load(path)
        except corpus.CorpusError as error:
            raise pytest.UsageError(str(error)) from None

    @cached_property
    def models(self) -> list[str]:
        """The names of `--model`, else the original's two, or their twins without CUDA."""
        names = self.option("model") or (TRUE_SIZES if self.has_cuda else TWINS)
        return list(dict.fromkeys(names))

    @cached_property
    def methods(self) -> list[str]:
        """The names of `--method`, else all."""
        names = list(dict.fromkeys(self.option("method") or methods.METHODS))
        for name in names:
            _method(name)
        return names

    @property
    def folder(self) -> Path:
        """The session's scratch folder; removed when the session ends, and made anew where somebody has removed it."""
        if self._folder is None or not self._folder.is_dir():
            if self._folder is not None:
                reaper.own.remove_folder(self._folder)
            self._folder = reaper.own.make_folder()
        return self._folder

    def takes_long(self, model: str) -> bool:
        """Whether a model's cells take many minutes each here: a CPU and a model of true size, and nobody has said by
        `--epochs` how long to train."""
        if self.has_cuda or self.option("epochs"):
            return False
        import torch

        found = self._find(_model(model))
        try:
            network = models.skeleton(models.configuration(found), torch.float32, None)
        except models.ModelError as error:
            raise pytest.UsageError(str(error)) from None
        return models.count_parameters(network) > CPU_PARAMETERS

    # Collecting

    def parametrize(self, metafunc: pytest.Metafunc) -> None:
        """Give a test that takes `model` and `method`, and a fixture of lightweight's, the session's own."""
        marked: set[str] = set()
        for mark in metafunc.definition.iter_markers("parametrize"):
            names = mark.kwargs.get("argnames", mark.args[0] if mark.args else ())
            marked |= {name.strip() for name in (names.split(",") if isinstance(names, str) else names)}
        cells = {"model": self.models, "method": self.methods}
        if "speedup" in metafunc.fixturenames:
            cells["method"] = [name for name in self.methods if name != BASELINE]
            if not (self.has_cuda or self.option("model") or self.option("method")):
                # On a CPU a ratio says nothing of a GPU: one of them shows how it is measured.
                cells = {argument: values[:1] for argument, values in cells.items()}
        for argument, values in cells.items():
            if argument in metafunc.fixturenames and argument not in marked:
                metafunc.parametrize(argument, values)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Cells are trained, and timed, before the tests that only look at how they ended, and a model's are kept
        together where workers share the tests. What is of another model than those named is left out."""
        items.sort(key=lambda item: uses(item, ("outcome_of", "speedup")))
        named = {_model(name).name for name in self.models} if self.option("model") else None
        others = []
        for item in items:
            if uses(item, FIXTURES):
                self.is_used = True
                model = _model_of(item)
                xdist_bridge.group_by_model(item, model)
                if named is not None and model is not None and model not in named:
                    others.append(item)
        if others:
            items[:] = [item for item in items if item not in others]
            self.config.hook.pytest_deselected(items=others)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Check everything a trial needs, before any model is built."""
        if any(self.config.getoption(only, False) for only in LOOKS_ONLY):
            return
        items = [item for item in session.items if uses(item, TRAINING_FIXTURES)]
        if self.is_used and not self.config.pluginmanager.has_plugin("benchmark"):
            raise pytest.UsageError("lightweight's tests are timed by pytest-benchmark: leave out -p no:benchmark")
        _refuse_namesakes(items)
        for item in items:
            settings: dict[str, Any] = {
                "target": self.target,
                "corpus": self.corpus,
                "world_size": self.world_size,
            }
            # Only cells that are going to run: looking for a model may download it.
            cell = _arguments(item)
            model, method = cell.get("model"), cell.get("method")
            found = self._find(_model(model)) if isinstance(model, str | Model) else Model(name="any")
            if isinstance(method, str | Method):
                try:
                    _check_crossing(Trial(model=found, method=_method(method), **settings))
                except ValueError as error:
                    raise pytest.UsageError(str(error)) from None

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if item.get_closest_marker("needs_cuda") and not self.has_cuda:
            pytest.skip(f"{NOT_RUN}needs CUDA")
        for mark in item.iter_markers("needs_gpus"):
            if self.gpus < mark.args[0]:
                pytest.skip(f"{NOT_RUN}needs {mark.args[0]} GPUs")
        # A test that is run again finds anew what it has found before.
        pytest_benchmark.forget_row(self.config, item.nodeid)
        self._outcomes = {key: found for key, found in self._outcomes.items() if found[0] != item.nodeid}

    # Training

    def trial(self, model: str | Model, method: str | Method, **changes: Any) -> Trial:
        """The trial of a cell under the session's options. Its weights are written when it is run: `located`."""
        settings: dict[str, Any] = {
            "target": self.target,
            "corpus": self.corpus,
            "seed": self.option("seed"),
            "epochs": self.option("epochs") or (CUDA_EPOCHS if self.has_cuda else CPU_EPOCHS),
            "device_index": 0 if self.has_cuda else None,
            "world_size": self.world_size,
        }
        return Trial(model=self._find(_model(model)), method=_method(method), **settings | changes)

    def located(self, trial: Trial) -> Trial:
        """`trial` with its model's weights in a folder, written once a session where there is none. Raises ChildError
        where that fails."""
        model = trial.model
        if model.is_loadable:
            return trial
        written = self._written.get(model.name)
        if written is None or not Path(written.location or "").is_dir():
            self._show(f"{model.name}: writing its weights")
            folder = self.folder / model.name.replace("/", "--")
            shutil.rmtree(folder, ignore_errors=True)  # what a helper that was killed has left
            seconds, seed = self.option("trial_timeout"), self.option("seed")
            try:
                written = helper.call_within(seconds, models.write, self.folder, model, folder, seed)
            except handle.ChildError as error:
                reason = f"writing the weights: {error.outcome.reason}"
                raise handle.ChildError(dataclasses.replace(error.outcome, reason=reason)) from None
            self._written[model.name] = written
        return dataclasses.replace(trial, model=written)

    def forecast(self, trial: Trial) -> Forecast:
        """The forecast of `trial` on the session's device; its trace is made once for all targets. Raises
        ForecastError."""
        # Kernels are the device's own; without one they are those of the target aimed at.
        target = NATIVE if self.device.capability else trial.target
        key = repr(dataclasses.replace(trial, target=target, seed=0))  # a peak is every seed's
        if key not in self._traces:
            self._show(f"{trial.name}: forecasting its memory")
            seconds = self.option("trial_timeout")
            self._traces[key] = helper.call_within(seconds, tracer.trace_on, self.folder, trial, self.device)
        return replay.of_trial(self._traces[key], trial, self.device)

    def record_forecast(self, item: pytest.Item, trial: Trial) -> Forecast:
        """The forecast of `trial`, recorded with `item`. Raises ForecastError."""
        found = self.forecast(trial)
        _shipped(item)["forecasts"].append(record.forecast_row(trial, found))
        return found

    def outcome_of(self, trial: Trial) -> Outcome | None:
        """How `trial` ended, if it has been run in this session."""
        return self._outcomes.get(repr(trial), ("", None))[1]

    def run(self, item: pytest.Item, trial: Trial, rounds: Callable[[owner.Child], None] | None = None) -> Outcome:
        """Run `trial` in a child of its own, letting `rounds` time its rounds, and record it with `item`: as it ended,
        or as it was cut short."""
        self.is_used = True
        child: owner.Child | None = None

        def begin(running: owner.Child | None) -> None:
            nonlocal child
            child = running
            died = Crashed(**_so_far(child), reason="the worker that ran it died", details="")
            self._tell_begun(item, entries=[self._entry(trial, died) | _place(item)])

        begin(None)
        try:
            with self._child(trial, self._show_step, self._show_round, begin) as child:
                if rounds is not None:
                    rounds(child)
                outcome = child.finish()
        except handle.ChildError as error:
            outcome = error.outcome
        except BaseException as error:
            self._record(item, trial, self._cut_short(error, child))
            raise
        if self._is_expired:
            self._record(item, trial, self._cut_short(None, child))
            pytest.fail(_expiry(self._seconds), pytrace=False)
        self._record(item, trial, outcome)
        self._with_forecast(item, trial)
        return outcome

    def _record(self, item: pytest.Item, trial: Trial, outcome: Outcome) -> None:
        """Keep how `trial` ended, before anything else can fail."""
        self._show(f"{trial.name}: {outcome.kind.replace('_', ' ')}", " ", " ")
        self._outcomes[repr(trial)] = item.nodeid, outcome
        _shipped(item)["entries"].append(self._entry(trial, outcome) | _place(item))
        self._tell_begun(item)

    def _with_forecast(self, item: pytest.Item, trial: Trial) -> None:
        """Complete the newest entry by the forecast of `trial`, where that can be made."""
        entries, outcome = _shipped(item)["entries"], self.outcome_of(trial)
        assert outcome is not None
        if (found := self.try_to_forecast(trial)) is not None:
            entries[-1] = self._entry(trial, outcome, found) | _place(item)

    def _cut_short(self, error: BaseException | None, child: owner.Child | None) -> Outcome:
        """How a trial ended that `error`, or this session's own end, or pytest-timeout has interrupted."""
        if not self._is_expired and child is not None and child.outcome is not None:
            return child.outcome
        if self._is_expired or "pytest-timeout" in str(error):
            reason, seconds = _expiry(self._seconds), self._seconds
            return TimedOut(**_so_far(child), silent_seconds=seconds, reason=reason, details="")
        by = self._ended_by.name if self._ended_by else type(error).__name__
        return Crashed(**_so_far(child), reason=f"interrupted by {by}", details="")

    def try_to_forecast(self, trial: Trial) -> Forecast | None:
        """The forecast of `trial`, or None, said in a line, where it cannot be made, whatever the reason."""
        try:
            return self.forecast(trial)
        except ForecastError as error:
            self._show(f"no forecast: {error}", "\n", "\n")
        except Exception as error:  # noqa: BLE001  a row is never lost to a failed forecast
            said = str(error).splitlines()[0] if str(error) else "no message"
            self._show(f"no forecast: {trial.name}: {type(error).__name__}: {said}", "\n", "\n")
        return None

    def speedup(self, item: pytest.Item, trial: Trial, baseline: Trial) -> Speedup:
        """Measure how many times as fast as `baseline` a trial is, and record it with the trial's own outcome. Both are
        run now where this session has not yet, since neither a failed cell nor a failed baseline has a speedup."""
        entry, ended = self._entry(trial, self.outcome_of(trial) or self.run(item, trial)), None
        of = {key: entry[key] for key in record.SAME_TRIAL}
        for part in (trial, baseline):
            outcome = self.outcome_of(part) or self.run(item, part)
            if not isinstance(outcome, Completed):
                ended = f"{'baseline ' if part is baseline else ''}{outcome.kind.replace('_', ' ')}"
        steps, cap = CUDA_STEPS if self.has_cuda else CPU_STEPS, self.option("pairs")
        found = Speedup(baseline=baseline.method.name, cap=cap, steps_per_round=steps, reason=ended)
        if ended is None:
            died = dataclasses.replace(found, reason="the worker that measured it died")
            self._tell_begun(item, speedups=[(of, dataclasses.asdict(died))])
            try:
                found = self._alternate(trial, baseline, entry, found)
            except handle.ChildError as error:
                found = dataclasses.replace(found, reason=str(error))
            except BaseException as error:
                found = dataclasses.replace(found, reason=self._cut_short(error, None).reason)  # type: ignore[union-attr]
                raise
            finally:
                _shipped(item)["speedups"].append((of, dataclasses.asdict(found)))
                self._tell_begun(item)
        else:
            _shipped(item)["speedups"].append((of, dataclasses.asdict(found)))
        return found

    def _alternate(self, trial: Trial, baseline: Trial, entry: record.Entry, found: Speedup) -> Speedup:
        stored = gate.stored(entry, self.runs)
        pairs_then = gate.log_ratios(stored[1] if stored else None)
        floor = 1 - self.limits.speedup_fail if pairs_then and self.limits.speedup_fail else None

        def verdict(log_ratios: Sequence[float], is_in_turn: int = 0) -> ratio.Verdict | None:
            if floor is None:
                return None
            in_turn = gate.in_turn(stored and stored[1]) + is_in_turn
            return ratio.verdict(ratio.repeated_interval(log_ratios, found.cap, pairs_then, in_turn), floor)

        started = time.monotonic()
        time_is_up = False

        def is_enough(log_ratios: Sequence[float]) -> bool:
            nonlocal time_is_up
            so_far, seconds = ratio.interval(log_ratios), time.monotonic() - started
            held_against_later = self._is_stored or (pairs_then and floor is None)
            wanted = precision_wanted(so_far.ratio) if held_against_later else math.inf
            known = f"known to {so_far.half_width:.1%}"
            if held_against_later:
                known += f", {wanted:.1%} wanted within {PAIRS_SECONDS:.0f} s"
            self._show(f"{trial.name}: {len(log_ratios)} pairs of rounds, {so_far} times as fast, {known}", "\n")
            is_clear = verdict(log_ratios) != "undecided" and so_far.half_width <= wanted
            time_is_up = not is_clear and seconds > PAIRS_SECONDS
            return is_clear or time_is_up

        baseline, trial = (trial_of_rounds(part, found.cap, found.steps_per_round) for part in (baseline, trial))
        pairs = alternate(baseline, trial, self._child, is_enough, found.cap)
        ended = pairs.ended and f"{pairs.ended[0].name} {pairs.ended[1].kind.replace('_', ' ')} between rounds"
        found = dataclasses.replace(found, log_ratios=pairs.log_ratios, pairing=pairs.pairing, reason=ended)
        if time_is_up and len(pairs.log_ratios) < found.cap:
            found = dataclasses.replace(found, ended_after_seconds=PAIRS_SECONDS)
        if not pairs.log_ratios:
            return found
        is_in_turn = int(pairs.pairing == record.ONE_AFTER_THE_OTHER)
        now = ratio.interval(pairs.log_ratios, in_turn=is_in_turn)
        found = dataclasses.replace(found, ratio=now.ratio, low=now.low, high=now.high, floor=floor)
        return dataclasses.replace(found, verdict=verdict(pairs.log_ratios, is_in_turn))

    def _tell_begun(self, item: pytest.Item, **begun: Sequence[Any]) -> None:
        """What this test has found so far, and what it is about to find, as it stands if this process, or the test,
        ends before it could report."""
        found: dict[str, Any] = dict(_shipped(item))
        so_far: Any = {key: [*had, *begun.get(key, ())] for key, had in found.items()}
        self._begun[item.nodeid] = so_far
        xdist_bridge.tell_begun(item, so_far)

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
        if culprit is not None and not self._told_of_culprit:
            self._told_of_culprit = True
            told = f"{culprit} initialises CUDA when it is imported: children start in fresh interpreters"
            self._show(told, "\n", "\n")
        try:
            with owner.Child(located, folder, self.option("trial_timeout"), *callbacks) as child:
                yield child
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _entry(self, trial: Trial, outcome: Outcome, forecast: Forecast | None = None) -> record.Entry:
        return record.entry(trial, outcome, self.device, forecast) | xdist_bridge.where(self.config)

    def _find(self, model: Model) -> Model:
        """The model with where its weights come from, looked for once a session."""
        if model.name not in self._models:
            try:
                self._models[model.name], note = models.find(model, self.option("weights"))
            except models.ModelError as error:
                raise pytest.UsageError(str(error)) from None
            if note:
                self._show(note, "\n", "\n")
        return self._models[model.name]

    # Telling

    def _show_step(self, trial: Trial, step: int, loss: float | None) -> None:
        self._show(f"{trial.name}: step {step} of {trial.steps}" + ("" if loss is None else f", loss {loss:.3f}"))

    def _show_round(self, trial: Trial, measured: Measurements) -> None:
        step, loss = len(measured.train_loss), measured.train_loss[-1]
        self._show(f"{trial.name}: step {step} of {trial.steps}, loss {loss:.3f}", in_a_log="\n")

    def _show(self, text: str, in_a_log: str = "", on_a_terminal: str = "") -> None:
        """A line of progress. On a terminal the next one overwrites it unless it is ended with `on_a_terminal`; in a
        log, where nothing is overwritten, it is left out unless it is ended with `in_a_log`."""
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        capture = self.config.pluginmanager.get_plugin("capturemanager")
        if reporter is None or capture is None or self.config.get_verbosity() < 0:
            return
        with capture.global_and_fixture_disabled():
            if reporter.isatty:
                reporter.ensure_newline()
                reporter.write(f"\r\x1b[K{text}{on_a_terminal}", flush=True)
            elif in_a_log:
                reporter.ensure_newline()
                reporter.write(text + in_a_log, flush=True)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """What was found travels on the test's report, which is what pytest-xdist carries from a worker to the
        controller."""
        made = yield
        if self._is_expired and made.when == "call" and made.passed:
            made.outcome, made.longrepr = "failed", _expiry(self._seconds)
        vars(made)["lightweight"] = _shipped(item)
        del item.stash[_SHIPPED]
        return made

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if begun := getattr(report, "lightweight_begun", None):
            self._begun[report.nodeid] = begun
        elif shipped := getattr(report, "lightweight", None):
            if report.when == "setup":  # of a test that is run again, the last time counts
                self.entries = [entry for entry in self.entries if entry.get("test") != report.nodeid]
            self._begun.pop(report.nodeid, None)
            self._take(shipped)
        if report.skipped and isinstance(report.longrepr, tuple) and NOT_RUN in report.longrepr[2]:
            reason = report.longrepr[2].removeprefix("Skipped: ")
            self.not_run[f"{reason}: {report.nodeid.partition('[')[0]}"] += 1

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str) -> None:
        """A worker of pytest-xdist died in a test: what it had begun is recorded as crashed."""
        if begun := self._begun.pop(crashitem, None):
            self._take(begun)

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_timeout_set_timer(self, item: pytest.Item, settings: Any) -> bool | None:
        """pytest-timeout's thread would end this process and lose its record: here it kills the children, whose trial
        has then timed out. It has its own way where the test does not end at that."""
        self._seconds, self._is_expired = settings.timeout, False
        if settings.method != "thread" or not uses(item, FIXTURES):
            return None

        def expire() -> None:
            self._is_expired = True
            handle.kill_all()
            timers.append(threading.Timer(GRACE_SECONDS, _end_process, (item, settings)))
            timers[-1].daemon = True
            timers[-1].start()

        timers = [threading.Timer(settings.timeout, expire)]
        timers[0].daemon = True
        timers[0].start()

        def cancel() -> None:
            for timer in timers:
                timer.cancel()

        item.cancel_timeout = cancel  # type: ignore[attr-defined]
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self) -> Generator[None, object, object]:
        if self.is_used or xdist_bridge.hands_out(self.config):
            self.heed_signals()
        return (yield)

    def heed_signals(self) -> None:
        """From here to the end of the session, what ends it has it end as Ctrl-C does, so that its record is written;
        what somebody else handles or ignores stays theirs."""
        for number in (signal.SIGTERM, signal.SIGHUP):
            if threading.current_thread() is threading.main_thread() and signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, self._interrupt)
                self.config.add_cleanup(partial(_restore, number))

    def _interrupt(self, number: int, _: object) -> None:
        if self._ended_by is None:  # a second one would interrupt the writing of the record
            self._ended_by = signal.Signals(number)
            raise KeyboardInterrupt

    def _take(self, shipped: Shipped) -> None:
        self.entries += shipped["entries"]
        self.forecasts += shipped["forecasts"]
        for of, found in shipped["speedups"]:
            record.add_speedup(self.entries, of, Speedup(**found))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.entries or self.not_run:
            terminalreporter.section("lightweight: does it fit, how fast is it, what does it do to the loss")
        if self.entries:
            terminalreporter.write_line(report.table(self.entries, "terminal"))
            for further in (report.ranks(self.entries), report.qualities(self.entries)):
                if further.rows:
                    terminalreporter.write_line("\n" + further.text("terminal"))
        if self._ended_by:
            terminalreporter.write_line(f"ended by {self._ended_by.name}: what was found until then is recorded")
        for line, count in self.not_run.items():
            terminalreporter.write_line(line if count == 1 else f"{line} ({count} cells)")
        if self._told_of_report:
            terminalreporter.write_line(self._told_of_report)

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_update_machine_info(self, machine_info: dict[str, Any]) -> None:
        if self.is_used:
            machine_info.pop(
                "node", None
            )  # records are committed and shared; whose machine it was is nobody's business
            machine_info["gpu"] = dataclasses.asdict(self.device) if self.has_cuda else None
            machine_info["glibc_tunables"] = forkserver.tunables()

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        if self.is_used:
            output_json["outcomes"] = self.entries
            output_json["forecasts"] = self.forecasts

    def take_unreported(self) -> None:
        """Record also what was found or cut short in a test that could not report it."""
        while self._begun:
            self._take(self._begun.popitem()[1])
        if self.entries or self.forecasts:
            pytest_benchmark.save_without_rows(self.config)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the report, in the process that has everybody's cells."""
        if self._ended_by:
            session.exitstatus = 128 + self._ended_by
        path = self.option("report")
        if path is None or hasattr(self.config, "workerinput") or not (self.entries or self.forecasts):
            return
        now = datetime.now(UTC).isoformat()
        run = record.Run(path=Path("this run"), ended=now, entries=self.entries, forecasts=self.forecasts)
        try:
            report.save(path, [run, *self.runs])
            self._told_of_report = f"report: {path}"
        except report.ReportError as error:
            self._told_of_report = str(error)
            if session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.USAGE_ERROR

    def pytest_unconfigure(self) -> None:
        if self._folder is not None:
            reaper.own.remove_folder(self._folder)


class Shipped(TypedDict):
    """What a test found: entries, forecasts, and speedups each with the entry that it belongs to."""

    entries: list[record.Entry]
    forecasts: list[record.ForecastRow]
    speedups: list[tuple[record.Entry, dict[str, Any]]]


_SHIPPED = pytest.StashKey[Shipped]()


def _shipped(item: pytest.Item) -> Shipped:
    return item.stash.setdefault(_SHIPPED, Shipped(entries=[], forecasts=[], speedups=[]))


def _model_of(item: pytest.Item) -> str | None:
    """The name of the model that a test is of: its mark's, else its argument's."""
    if (mark := item.get_closest_marker("model")) is not None:
        return str(mark.args[0])
    model = _arguments(item).get("model")
    return _model(model).name if isinstance(model, str | Model) else None


def _place(item: pytest.Item) -> dict[str, str | None]:
    """What a record says of the test that trained a cell: its id, and the table that it belongs to."""
    mark = item.get_closest_marker("shown_as")
    return {"test": item.nodeid, "shown_as": None if mark is None else str(mark.args[0])}


def _arguments(item: pytest.Item) -> Mapping[str, object]:
    """What a test is parametrized with."""
    return item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}


def _model(model: str | Model) -> Model:
    try:
        return models.named(model) if isinstance(model, str) else model
    except models.ModelError as error:
        raise pytest.UsageError(str(error)) from None


def _method(method: str | Method) -> Method:
    try:
        return methods.named(method) if isinstance(method, str) else method
    except ValueError as error:
        raise pytest.UsageError(f"--method: {error}") from None


def precision_wanted(ratio: float) -> float:
    """Half the width, as a share, of the interval that is wanted of a `ratio` which later runs are held against:
    `PRECISION` near 1, where a verdict hangs on it, and a twentieth of the way from there, up to half of what a gate
    lets a cell lose, for one that is far from it."""
    return max(PRECISION, min(FAIL / 2, abs(math.log(ratio)) / 20)) if ratio > 0 else PRECISION


def _restore(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_DFL)


def _so_far(child: owner.Child | None) -> dict[str, Any]:
    """How far a trial has come; its child is None where it has not been started."""
    if child is None:
        return {"phase": "start", "measured": Measurements()}
    return {"phase": child.phase, "measured": child.measured}


def _expiry(seconds: float) -> str:
    return f"Timeout (>{seconds}s) from pytest-timeout."


def _end_process(item: pytest.Item, settings: Any) -> None:
    import pytest_timeout

    pytest_timeout.timeout_timer(item, settings)


def _refuse_namesakes(items: Sequence[pytest.Item]) -> None:
    """Two different methods, or models, of one name could not be told apart afterwards. Raises pytest.UsageError."""
    used: dict[str, list[Method | Model]] = {"method": [], "model": []}
    for item in items:
        arguments = _arguments(item)
        things = [value for value in arguments.values() if isinstance(value, Method | Model)]
        things += [_method(name) for name in [arguments.get("method")] if isinstance(name, str)]
        things += [_model(name) for name in [arguments.get("model")] if isinstance(name, str)]
        for thing in things:
            used["method" if isinstance(thing, Method) else "model"].append(thing)
    for kind, things in used.items():
        try:
            names.refuse_namesakes(kind, things)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None


def _check_crossing(trial: Trial) -> None:
    """Whether `trial` can be sent to a child. Raises ValueError, which names the field that cannot."""
    try:
        ForkingPickler.dumps(trial)
    except Exception as error:  # noqa: BLE001  pickling runs code of what is pickled
        field = next((path for path, value in _parts(trial.method) if not _can_cross(value)), "it")
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"method {trial.method.name}: its {field} cannot be sent to a child process ({said}): give what can be "
            "pickled, such as a function of a module"
        ) from None


def _parts(method: Method) -> Iterator[tuple[str, Any]]:
    """The settings of `method` by name, the smallest first."""
    for name, value in method.training_arguments.items():
        yield f"training_arguments[{name!r}]", value
    for name in ("adapter", "quantization"):
        config = getattr(method, name)
        for key, value in vars(config).items() if config is not None else ():
            yield f"{name}.{key}", value
    for field in dataclasses.fields(method):
        yield field.name, getattr(method, field.name)


def _can_cross(value: Any) -> bool:
    try:
        ForkingPickler.dumps(value)
    except Exception:  # noqa: BLE001  pickling runs code of what is pickled
        return False
    return True
