"""The one place that touches pytest: options, fixtures, the progress line, the table and the JSON.

Load it from a conftest.py: `pytest_plugins = ["lightweight.plugin"]`. Tests then ask for

- `train(model, method, **changes)`: train a cell in a child process, its rounds timed by pytest-benchmark, and get the
  Outcome;
- `outcome_of(model, method, **changes)`: the Outcome of a cell that has been trained in this session, or else train it
  now, untimed by pytest-benchmark;
- `forecast_of(model, method, **changes)`: the Forecast of a cell, which needs no GPU and no weights;
- `speedup(model, method, **changes)`: how many times as fast as its baseline a cell is, from alternating rounds.

A test that takes `model` and `method` arguments beside any of them is parametrised over `--model` x `--method`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

import pytest

from lightweight import (
    corpus,
    forecast,
    gate,
    isolation,
    methods,
    models,
    ratio,
    record,
    report,
    targets,
    worker,
    xdist_bridge,
)
from lightweight.alternate import alternate, trial_of_rounds
from lightweight.forecast import Forecast, ForecastError
from lightweight.methods import Method
from lightweight.models import Model
from lightweight.record import BASELINE, Speedup
from lightweight.targets import CPU, NATIVE, T4, Device, GiB, Target
from lightweight.trial import Completed, Crashed, Measurements, Outcome, Trial

# pytest finds these hooks here
from lightweight.xdist_bridge import pytest_cmdline_main, pytest_xdist_auto_num_workers  # noqa: F401

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

TRAINING_FIXTURES = ("train", "outcome_of", "speedup")
FIXTURES = (*TRAINING_FIXTURES, "forecast_of")
TRUE_SIZES = ("opt-350m", "gpt-neo-1.3b")
TWINS = ("opt-tiny", "gpt-neo-tiny")
CUDA_EPOCHS = 10  # the original job
CPU_EPOCHS = 2  # enough for the loss of a twin to fall, and for the suite to end within minutes on two cores
CUDA_STEPS = 4  # of a round that is paired: some 100 ms and more on a fast GPU
CPU_STEPS = 1
PRECISION = 0.005
"""Half the width, as a share, of the interval that is wanted of a speedup which later runs are held against."""
CPU_PARAMETERS = 20_000_000
"""Of the largest model whose cells a CPU trains unless told how long: two epochs of it take a minute or two."""
NOT_RUN = "not run: "


class Train(Protocol):
    """Train one cell and return how it ended. `changes` replace fields of its Trial: target, epochs, max_steps,
    max_length, seed, world_size."""

    def __call__(self, model: str | Model, method: str | Method, **changes: Any) -> Outcome: ...


class ForecastOf(Protocol):
    """Forecast one cell. `changes` replace fields of its Trial."""

    def __call__(self, model: str | Model, method: str | Method, **changes: Any) -> Forecast: ...


class MeasureSpeedup(Protocol):
    """Measure how many times as fast as its model's baseline a cell is, per token. `changes` replace fields of both
    trials: target, epochs, max_steps, seed."""

    def __call__(self, model: str | Model, method: str | Method, **changes: Any) -> Speedup: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lightweight", "fine-tuning experiments")
    group.addoption(
        "--model",
        action="append",
        metavar="NAME",
        help="a model to train, repeatable: a known name, a hub id or a local folder; what is of others is left out "
        f"(default: {', '.join(TRUE_SIZES)}; without CUDA: {', '.join(TWINS)})",
    )
    group.addoption(
        "--method",
        action="append",
        metavar="NAME",
        help=f"a method to train with, repeatable: {', '.join(methods.METHODS)} or package.module:NAME (default: all)",
    )
    group.addoption(
        "--target",
        metavar="NAME",
        help=f"the card whose memory trials get: {', '.join(targets.TARGETS)} or an amount such as 16GiB "
        "(default: t4 where the GPU has at least as much, else native)",
    )
    group.addoption(
        "--gpus-per-trial",
        type=int,
        default=1,
        metavar="N",
        help="train every trial on N ranks, one on each of N GPUs, or N processes on a CPU (default: 1)",
    )
    group.addoption("--corpus", type=Path, metavar="PATH", help="the dialogues to train on (default: corpus.json)")
    group.addoption(
        "--weights",
        choices=("pretrained", "random"),
        help="where weights come from (default: pretrained where they can be had, else random)",
    )
    group.addoption("--seed", type=int, default=0, metavar="N", help="seed of every trial (default: 0)")
    group.addoption(
        "--epochs",
        type=int,
        metavar="N",
        help=f"passes over the training pairs (default: {CUDA_EPOCHS}; without CUDA: {CPU_EPOCHS})",
    )
    group.addoption(
        "--pairs",
        type=int,
        default=ratio.CAP,
        metavar="N",
        help="at most N pairs of rounds for a speedup, a multiple of 4; fewer as soon as its verdict is clear "
        f"(default: {ratio.CAP})",
    )
    for option in gate.OPTIONS:
        number = {} if option.default is None else {"nargs": "?", "const": option.default}
        said = "" if option.default is None else f" ({option.default} if nothing is said)"
        words = f"with --benchmark-compare: fail where {option.of}{said}"
        group.addoption(option.flag, metavar=option.metavar, help=words.replace("%", "%%"), **number)
    group.addoption(
        "--missing",
        choices=("pass", "fail"),
        default="fail",
        help="with a limit: what becomes of a stored cell that this run was asked for and has not (default: fail)",
    )
    group.addoption(
        "--require-match",
        action="store_true",
        help="with --benchmark-compare: fail where no stored run has a cell of this one under the same conditions",
    )
    group.addoption(
        "--undecided",
        choices=("pass", "fail"),
        default="pass",
        help="what becomes of a speedup that noise leaves open after --pairs (default: pass)",
    )
    group.addoption(
        "--report",
        type=Path,
        metavar="PATH",
        help="write what was found as one page of pictures and tables, or as markdown where PATH ends in .md; with "
        "--benchmark-compare beside the stored runs",
    )
    group.addoption(
        "--false-alarms",
        nargs="?",
        type=int,
        const=200,
        metavar="N",
        help="also count the gate's false alarms on N gates (200 if nothing is said) and its misses on half as many; "
        "takes an hour on a CPU",
    )
    group.addoption(
        "--trial-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="a trial that reports nothing, not even a step, for this long has timed out (default: 600)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_cuda: skipped, as not run, on a machine without CUDA")
    config.addinivalue_line("markers", "needs_gpus(n): skipped, as not run, where fewer than n GPUs are seen")
    config.addinivalue_line("markers", "shown_as(table): 'ladder' or 'peers', the report's table for a test's cells")
    config.addinivalue_line("markers", "model(name): of which model a test is that takes none: see --model")
    laboratory = Laboratory(config)
    config.pluginmanager.register(laboratory, "lightweight-laboratory")
    _ = laboratory.methods  # a name that does not exist is told now
    try:
        ratio.looks(config.getoption("pairs"))
    except ValueError as error:
        raise pytest.UsageError(f"--pairs: {error}") from None
    for option in ("epochs", "trial_timeout", "gpus_per_trial"):
        value = config.getoption(option)
        if value is not None and value <= 0:
            raise pytest.UsageError(f"--{option.replace('_', '-')} {value:g}: give more than 0")
    if (path := config.getoption("report")) and not path.absolute().parent.is_dir():
        raise pytest.UsageError(f"--report {path}: there is no folder {path.absolute().parent}")
    seed = config.getoption("seed")
    if not 0 <= seed < 2**32:
        raise pytest.UsageError(f"--seed {seed}: give a number from 0 to {2**32 - 1}, which is what numpy takes")
    xdist_bridge.connect(config)
    config.pluginmanager.register(Gatekeeper(laboratory), "lightweight-gatekeeper")


class Laboratory:
    """The session's trials: what its options say, what has been trained, and what is told of it."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.entries: list[record.Entry] = []
        self.forecasts: list[record.ForecastRow] = []
        self.not_run: Counter[str] = Counter()
        self.runs: list[record.Run] = []  # what this one is compared with, newest first
        self.limits = _limits(config)
        self._told_of_report = ""
        stores = ("benchmark_json", "benchmark_save", "benchmark_autosave")
        self._is_stored = any(config.getoption(option, None) for option in stores)
        self._begun: dict[str, Shipped] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._traces: dict[str, forecast.Trace] = {}
        self._models: dict[str, Model] = {}

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
        return isolation.call(worker.describe_device, self.folder, 0)

    @cached_property
    def target(self) -> Target:
        """Whose memory trials get: `--target`'s, else a T4's where the GPU has as much."""
        name = self.config.getoption("target")
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
            return T4 if card_bytes >= T4.total_bytes or not T4.emulated_on(self.device.name) else NATIVE
        try:
            target = targets.named(name)
        except ValueError as error:
            raise pytest.UsageError(f"--target: {error}") from None
        if target.emulated_on(self.device.name) and (target.total_bytes or 0) > card_bytes:
            raise pytest.UsageError(
                f"--target {name}: needs {(target.total_bytes or 0) / GiB:.1f} GiB and {self.device.name} has "
                f"{card_bytes / GiB:.1f} GiB; choose a smaller target or native"
            )
        return target

    @cached_property
    def gpus(self) -> int:
        """How many GPUs this session sees."""
        import torch

        return torch.cuda.device_count()

    @cached_property
    def world_size(self) -> int:
        """Ranks of a trial, one GPU each, or processes on a CPU."""
        wanted: int = self.config.getoption("gpus_per_trial")
        if self.has_cuda and wanted > self.gpus:
            raise pytest.UsageError(f"--gpus-per-trial {wanted}: CUDA finds {self.gpus} here; give no more than that")
        return wanted

    @cached_property
    def corpus(self) -> corpus.Corpus:
        """The dialogues of `--corpus`, else of `corpus.json` in pytest's root."""
        path = self.config.getoption("corpus") or self.config.rootpath / "corpus.json"
        try:
            return corpus.load(path)
        except corpus.CorpusError as error:
            raise pytest.UsageError(str(error)) from None

    @cached_property
    def models(self) -> list[str]:
        """The names of `--model`, else the original's two, or their twins without CUDA."""
        names = self.config.getoption("model") or (TRUE_SIZES if self.has_cuda else TWINS)
        return list(dict.fromkeys(names))

    @cached_property
    def methods(self) -> list[str]:
        """The names of `--method`, else all."""
        names = list(dict.fromkeys(self.config.getoption("method") or methods.METHODS))
        for name in names:
            _method(name)
        return names

    @cached_property
    def folder(self) -> Path:
        """The session's scratch folder; removed when it ends."""
        return Path(tempfile.mkdtemp(prefix="lightweight-"))

    def takes_long(self, model: str) -> bool:
        """Whether a model's cells take many minutes each here: a CPU and a model of true size, and nobody has said by
        `--epochs` how long to train."""
        if self.has_cuda or self.config.getoption("epochs"):
            return False
        import torch

        found = self._find(_model(model))
        try:
            config = models.configuration(found)
        except models.ModelError as error:
            raise pytest.UsageError(str(error)) from None
        return models.count_parameters(models.skeleton(config, torch.float32, None)) > CPU_PARAMETERS

    # Collecting

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if not any(name in metafunc.fixturenames for name in FIXTURES):
            return
        marked: set[str] = set()
        for mark in metafunc.definition.iter_markers("parametrize"):
            names = mark.kwargs.get("argnames", mark.args[0] if mark.args else ())
            marked |= {name.strip() for name in (names.split(",") if isinstance(names, str) else names)}
        cells = {"model": self.models, "method": self.methods}
        if "speedup" in metafunc.fixturenames:
            cells["method"] = [name for name in self.methods if name != BASELINE]
            if not (self.has_cuda or self.config.getoption("model") or self.config.getoption("method")):
                # On a CPU a ratio says nothing of a GPU: one of them shows how it is measured.
                cells = {argument: values[:1] for argument, values in cells.items()}
        for argument, values in cells.items():
            if argument in metafunc.fixturenames and argument not in marked:
                metafunc.parametrize(argument, values)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Cells are trained, and timed, before the tests that only look at how they ended, and a model's are kept
        together where workers share the tests. What is of another model than those named is left out."""
        items.sort(key=lambda item: not {"outcome_of", "speedup"}.isdisjoint(getattr(item, "fixturenames", ())))
        named = {_model(name).name for name in self.models} if self.config.getoption("model") else None
        others = []
        for item in items:
            if any(name in getattr(item, "fixturenames", ()) for name in FIXTURES):
                model = _model_of(item)
                xdist_bridge.group_by_model(item, model)
                if named is not None and model is not None and model not in named:
                    others.append(item)
        if others:
            items[:] = [item for item in items if item not in others]
            self.config.hook.pytest_deselected(items=others)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Check everything a trial needs, before any model is built."""
        if self.config.getoption("collectonly"):
            return
        for item in session.items:
            if any(name in getattr(item, "fixturenames", ()) for name in TRAINING_FIXTURES):
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
                        Trial(model=found, method=_method(method), **settings)
                    except ValueError as error:
                        raise pytest.UsageError(str(error)) from None

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if item.get_closest_marker("needs_cuda") and not self.has_cuda:
            pytest.skip(f"{NOT_RUN}needs CUDA")
        for mark in item.iter_markers("needs_gpus"):
            if self.gpus < mark.args[0]:
                pytest.skip(f"{NOT_RUN}needs {mark.args[0]} GPUs")

    # Training

    def trial(self, model: str | Model, method: str | Method, *, written: bool = True, **changes: Any) -> Trial:
        """The trial of a cell under the session's options; its weights need not be there unless `written`."""
        settings: dict[str, Any] = {
            "target": self.target,
            "corpus": self.corpus,
            "seed": self.config.getoption("seed"),
            "epochs": self.config.getoption("epochs") or (CUDA_EPOCHS if self.has_cuda else CPU_EPOCHS),
            "device_index": 0 if self.has_cuda else None,
            "world_size": self.world_size,
        }
        model = _model(model)
        found = self._locate(model) if written else self._models.get(model.name, model)
        return Trial(model=found, method=_method(method), **settings | changes)

    def forecast(self, trial: Trial) -> Forecast:
        """The forecast of `trial` on the session's device; its trace is made once for all targets. Raises
        ForecastError."""
        # Kernels are the device's own; without one they are those of the target aimed at.
        target = NATIVE if self.device.capability else trial.target
        key = repr(dataclasses.replace(trial, target=target, seed=0))  # a peak is every seed's
        if key not in self._traces:
            self._show(f"{trial.name}: forecasting its memory")
            self._traces[key] = isolation.call(forecast.trace_on, self.folder, trial, self.device)
        return forecast.of_trial(self._traces[key], trial, self.device)

    def outcome_of(self, trial: Trial) -> Outcome | None:
        """How `trial` ended, if it has been run in this session."""
        return self._outcomes.get(repr(trial))

    def run(self, item: pytest.Item, trial: Trial, rounds: Callable[[isolation.Child], None] | None = None) -> Outcome:
        """Run `trial` in a child of its own, letting `rounds` time its rounds, and record it with `item`."""
        died = Crashed(phase="start", reason="the worker that ran it died", details="", measured=Measurements())
        mark = item.get_closest_marker("shown_as")
        by = {"test": item.nodeid, "shown_as": mark and str(mark.args[0])}
        self._tell_begun(item, entries=[self._entry(trial, died) | by])
        with self._child(trial, self._show_step, self._show_round) as child:
            if rounds is not None:
                rounds(child)
            outcome = child.finish()
        self._show(f"{trial.name}: {outcome.kind.replace('_', ' ')}", " ", " ")
        self._outcomes[repr(trial)] = outcome
        _shipped(item)["entries"].append(self._entry(trial, outcome, self.try_to_forecast(trial)) | by)
        return outcome

    def try_to_forecast(self, trial: Trial) -> Forecast | None:
        """The forecast of `trial`, or None, said in a line, where it cannot be made."""
        try:
            return self.forecast(trial)
        except ForecastError as error:
            self._show(f"no forecast: {error}", "\n", "\n")
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
        steps, cap = CUDA_STEPS if self.has_cuda else CPU_STEPS, self.config.getoption("pairs")
        found = Speedup(baseline=baseline.method.name, cap=cap, steps_per_round=steps, reason=ended)
        if ended is None:
            died = dataclasses.replace(found, reason="the worker that measured it died")
            self._tell_begun(item, speedups=[(of, dataclasses.asdict(died))])
            found = self._alternate(trial, baseline, entry, found)
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

        def is_enough(log_ratios: Sequence[float]) -> bool:
            so_far = ratio.interval(log_ratios)
            self._show(f"{trial.name}: {len(log_ratios)} pairs of rounds, {so_far} times as fast", in_a_log="\n")
            held_against_later = self._is_stored or (pairs_then and floor is None)
            return verdict(log_ratios) != "undecided" and (not held_against_later or so_far.half_width <= PRECISION)

        baseline, trial = (trial_of_rounds(part, found.cap, found.steps_per_round) for part in (baseline, trial))
        pairs = alternate(baseline, trial, self._child, is_enough, found.cap)
        ended = pairs.ended and f"{pairs.ended[0].name} {pairs.ended[1].kind.replace('_', ' ')} between rounds"
        found = dataclasses.replace(found, log_ratios=pairs.log_ratios, pairing=pairs.pairing, reason=ended)
        if not pairs.log_ratios:
            return found
        is_in_turn = int(pairs.pairing == record.ONE_AFTER_THE_OTHER)
        now = ratio.interval(pairs.log_ratios, in_turn=is_in_turn)
        found = dataclasses.replace(found, ratio=now.ratio, low=now.low, high=now.high, floor=floor)
        return dataclasses.replace(found, verdict=verdict(pairs.log_ratios, is_in_turn))

    def _tell_begun(self, item: pytest.Item, **begun: Sequence[Any]) -> None:
        """What this test has found so far, and what it is about to find, as it stands if its worker dies."""
        found: dict[str, Any] = dict(_shipped(item))
        xdist_bridge.tell_begun(item, {key: [*had, *begun.get(key, ())] for key, had in found.items()})

    @contextmanager
    def _child(self, trial: Trial, *callbacks: Callable[..., None]) -> Iterator[isolation.Child]:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            with isolation.Child(trial, folder, self.config.getoption("trial_timeout"), *callbacks) as child:
                yield child
        finally:
            shutil.rmtree(folder)

    def _entry(self, trial: Trial, outcome: Outcome, forecast: Forecast | None = None) -> record.Entry:
        return record.entry(trial, outcome, self.device, forecast) | xdist_bridge.where(self.config)

    def _find(self, model: Model) -> Model:
        """The model with where its weights come from, looked for once a session."""
        if model.name not in self._models:
            try:
                self._models[model.name], note = models.find(model, self.config.getoption("weights"))
            except models.ModelError as error:
                raise pytest.UsageError(str(error)) from None
            if note:
                self._show(note, "\n", "\n")
        return self._models[model.name]

    def _locate(self, model: Model) -> Model:
        """The model with its weights in a folder, written once a session where there is none."""
        found = self._find(model)
        if not found.is_written:
            self._show(f"{model.name}: writing its weights")
            folder = self.folder / model.name.replace("/", "--")
            found = isolation.call(models.write, self.folder, found, folder, self.config.getoption("seed"))
            self._models[model.name] = found
        return found

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
        vars(made)["lightweight"] = _shipped(item)
        del item.stash[_SHIPPED]
        return made

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if begun := getattr(report, "lightweight_begun", None):
            self._begun[report.nodeid] = begun
        elif shipped := getattr(report, "lightweight", None):
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
        for line, count in self.not_run.items():
            terminalreporter.write_line(line if count == 1 else f"{line} ({count} cells)")
        if self._told_of_report:
            terminalreporter.write_line(self._told_of_report)

    def pytest_benchmark_update_machine_info(self, machine_info: dict[str, Any]) -> None:
        machine_info.pop("node", None)  # records are committed and shared; whose machine it was is nobody's business
        machine_info["gpu"] = dataclasses.asdict(self.device) if self.has_cuda else None

    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        output_json["outcomes"] = self.entries
        output_json["forecasts"] = self.forecasts

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the report, in the process that has everybody's cells."""
        path = self.config.getoption("report")
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
        if "folder" in vars(self):
            shutil.rmtree(self.folder)


class Gatekeeper:
    """`--benchmark-compare`: this run beside the newest stored one of the same conditions, and whether it got worse."""

    def __init__(self, laboratory: Laboratory) -> None:
        self.laboratory, self.config = laboratory, laboratory.config
        self.problems: list[str] = []
        self.selected: set[str] = set()
        self.deselected: set[str] = set()
        self.compares = bool(self.config.getoption("benchmark_compare"))
        if hasattr(self.config, "workerinput"):
            sent = json.loads(self.config.workerinput["lightweight_runs"])
            laboratory.runs = [record.Run(**run | {"path": Path(run["path"])}) for run in sent]
        elif self.compares:
            laboratory.runs, self.problems = gate.load(self._stored_files())
            # pytest-benchmark takes a path: times are compared with the run that ratios are compared with, or not
            self.config.option.benchmark_compare = self._newest_alike()
        elif laboratory.limits.ask or laboratory.limits.require_match:
            given = [option.flag for option in gate.OPTIONS if getattr(laboratory.limits, option.name) is not None]
            given += ["--require-match"] * laboratory.limits.require_match
            raise pytest.UsageError(
                f"{', '.join(given)}: there is no stored run to hold against: add --benchmark-compare"
            )

    def _stored_files(self) -> list[Path]:
        from pytest_benchmark.storage.file import FileStorage

        storage = self.config.getoption("benchmark_storage")
        named = self.config.getoption("benchmark_compare")
        if "://" in storage and not storage.startswith("file://"):
            raise pytest.UsageError(f"--benchmark-storage {storage}: --benchmark-compare reads stored files only")
        files = FileStorage(storage.removeprefix("file://"), logger=None)
        try:
            found = files.query("*/[0-9][0-9][0-9][0-9]_" if named is True else named)
        except ValueError as error:
            raise pytest.UsageError(f"--benchmark-compare: {error}") from None
        return [Path(path) for path in found]

    def _newest_alike(self) -> str | None:
        """The newest run on this device and target; what else tells two runs apart shows only in their cells."""
        here = self.laboratory
        for run in here.runs:
            if any(e["device"] == here.device.name and e["target"] == here.target.name for e in run.entries):
                return str(run.path)
        return None

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Workers, which may be on other machines, get what they need to know when a speedup's verdict is clear."""
        sent = [dataclasses.asdict(run) | {"path": str(run.path)} for run in self.laboratory.runs]
        for run in sent:
            run["entries"] = [entry | {"step_seconds": [], "train_loss": []} for entry in run["entries"]]
        node.workerinput["lightweight_runs"] = json.dumps(sent)

    @cached_property
    def comparison(self) -> gate.Comparison:
        """This session's cells beside the stored ones, made once it has ended."""
        return gate.compare(self.laboratory.entries, self.laboratory.runs, self.laboratory.limits, self._was_asked_for)

    # What this session was asked for, so that a stored cell is not missed that nobody wanted now

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        self.deselected |= {_without_group(item.nodeid) for item in items}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.selected |= {_without_group(item.nodeid) for item in session.items}

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        self.selected |= set(map(_without_group, ids))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.deselected |= set(getattr(node, "workeroutput", {}).get("lightweight_deselected", ()))

    def _was_asked_for(self, then: record.Entry) -> bool:
        """Whether options, paths and selections of tests leave `then` in; what was cut short had been asked for."""
        option, here = self.config.getoption, self.laboratory
        named = {
            "model": {_model(name).name for name in here.models} if option("model") else None,
            "method": set(here.methods) if option("method") else None,
            "target": {here.target.name} if option("target") else None,
            "weights": {option("weights")} if option("weights") else None,
            "world_size": {here.world_size} if option("gpus_per_trial") > 1 else None,
        }
        if any(values is not None and then[key] not in values for key, values in named.items()):
            return False
        test = _without_group(then.get("test") or "")
        if not test:  # of a record that does not say: nobody wanted it where anything was left out
            return not self.deselected and all((self._root / argument).is_dir() for argument in self.config.args)
        is_named = any(self._covers(argument, test) for argument in self.config.args)
        return test in self.selected or (is_named and test not in self.deselected)

    @property
    def _root(self) -> Path:
        return self.config.invocation_params.dir

    def _covers(self, argument: str, test: str) -> bool:
        """Whether a path, or a test, of the command line has `test` in it."""
        (place, _, name), (file, _, own) = argument.partition("::"), test.partition("::")
        wanted, path = (self._root / place).resolve(), (self.config.rootpath / file).resolve()
        return (wanted == path or wanted in path.parents) and own.startswith(name)

    @pytest.hookimpl(wrapper=True)
    def pytest_benchmark_group_stats(self, benchmarks: list[dict[str, Any]]) -> Generator[None, list[Any], list[Any]]:
        """Leave stored rows out of the table whose cells ran under other conditions, and put what did not complete
        into tables of one row, where nothing is ranked by how soon it ended."""
        benchmarks[:] = [row for row in benchmarks if row["path"] is None or self._is_alike(row)]
        groups: list[Any] = []
        ended: list[Any] = []
        for name, rows in (yield):
            whole = [row for row in rows if not _did_not_complete(row)]
            groups += [(name, whole)] if whole else []
            ended += [
                (f"{name}: {row['extra_info']['outcome'].replace('_', ' ')}, timed until then", [row])
                for row in rows
                if _did_not_complete(row)
            ]
        return groups + ended

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_benchmark_scale_unit(self, benchmarks: list[dict[str, Any]]) -> tuple[str, float] | None:
        """Seconds for what did not complete, however soon."""
        return ("", 1.0) if any(map(_did_not_complete, benchmarks)) else None

    def _is_alike(self, row: dict[str, Any]) -> bool:
        told = row["extra_info"]
        cells = [
            entry
            for entry in self.laboratory.entries
            if all(entry[key] == told.get(key) for key in ("model", "method", "target"))
        ]
        runs = [run for run in self.laboratory.runs if str(run.path).endswith(row["path"])]
        return "outcome" not in told or any(gate.stored(cell, runs) for cell in cells)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["lightweight_deselected"] = sorted(self.deselected)
            return
        if self.compares and self.comparison.failures and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(wrapper=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> Generator[None, None, None]:
        try:
            yield
        finally:
            if self.compares and (self.laboratory.entries or self.problems or self.comparison.failures):
                terminalreporter.section("lightweight: did it get worse")
                for line in [*self.problems, *gate.text(self.comparison).splitlines()]:
                    terminalreporter.write_line(line, red=line.startswith("FAILED"))


class Shipped(TypedDict):
    """What a test found: entries, forecasts, and speedups each with the entry that it belongs to."""

    entries: list[record.Entry]
    forecasts: list[record.ForecastRow]
    speedups: list[tuple[record.Entry, dict[str, Any]]]


_SHIPPED = pytest.StashKey[Shipped]()


def _shipped(item: pytest.Item) -> Shipped:
    return item.stash.setdefault(_SHIPPED, Shipped(entries=[], forecasts=[], speedups=[]))


@pytest.fixture
def laboratory(request: pytest.FixtureRequest) -> Laboratory:
    """The session's trials: its target, its models, and what has been trained so far."""
    found = request.config.pluginmanager.get_plugin("lightweight-laboratory")
    assert isinstance(found, Laboratory)
    return found


@pytest.fixture
def train(request: pytest.FixtureRequest, laboratory: Laboratory, benchmark: BenchmarkFixture) -> Train:
    """Train a cell, an epoch a round of pytest-benchmark, and return its Outcome."""

    def run(model: str | Model, method: str | Method, **changes: Any) -> Outcome:
        trial = laboratory.trial(model, method, **changes)
        benchmark.group = f"{trial.model.name} on {report.card(record.settings(trial))}"
        outcome = laboratory.run(request.node, trial, lambda child: _time_rounds(benchmark, child))
        benchmark.extra_info |= {
            "model": trial.model.name,
            "method": trial.method.name,
            "target": trial.target.name,
            "outcome": outcome.kind,
            "steps_per_round": trial.steps_per_epoch,
            "device_seconds": _by_round(outcome.measured.step_seconds, trial.steps_per_epoch),
        }
        if benchmark.stats is not None and outcome.kind != "completed":
            benchmark.stats.name += f" [{outcome.kind.replace('_', ' ')}]"
        return outcome

    return run


@pytest.fixture
def outcome_of(request: pytest.FixtureRequest, laboratory: Laboratory) -> Train:
    """The Outcome of a cell, trained now only if this session has not yet."""

    def find(model: str | Model, method: str | Method, **changes: Any) -> Outcome:
        trial = laboratory.trial(model, method, **changes)
        return laboratory.outcome_of(trial) or laboratory.run(request.node, trial)

    return find


@pytest.fixture
def forecast_of(request: pytest.FixtureRequest, laboratory: Laboratory) -> ForecastOf:
    """The Forecast of a cell, on the session's device or, where there is none, on the cell's target."""

    def find(model: str | Model, method: str | Method, **changes: Any) -> Forecast:
        trial = laboratory.trial(model, method, written=False, **changes)
        found = laboratory.forecast(trial)
        _shipped(request.node)["forecasts"].append(record.forecast_row(trial, found))
        return found

    return find


@pytest.fixture
def speedup(request: pytest.FixtureRequest, laboratory: Laboratory) -> MeasureSpeedup:
    """How many times as fast as its model's baseline a cell is, from rounds of both in alternation."""

    def measure(model: str | Model, method: str | Method, **changes: Any) -> Speedup:
        trials = [laboratory.trial(model, name, **changes) for name in (method, BASELINE)]
        return laboratory.speedup(request.node, *trials)

    return measure


def _model_of(item: pytest.Item) -> str | None:
    """The name of the model that a test is of: its mark's, else its argument's."""
    if (mark := item.get_closest_marker("model")) is not None:
        return str(mark.args[0])
    model = _arguments(item).get("model")
    return _model(model).name if isinstance(model, str | Model) else None


def _arguments(item: pytest.Item) -> Mapping[str, object]:
    """What a test is parametrized with."""
    return item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}


def _limits(config: pytest.Config) -> gate.Limits:
    try:
        limits = {option.name: option.value(config.getoption(option.name)) for option in gate.OPTIONS}
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    words = {name: config.getoption(name) for name in ("undecided", "missing", "require_match")}
    return gate.Limits(**limits, **words)


def _without_group(nodeid: str) -> str:
    """A test's id without what pytest-xdist adds to it."""
    return nodeid.partition("]@")[0] + "]" if "]@" in nodeid else nodeid


def _did_not_complete(row: Mapping[str, Any]) -> bool:
    return row["extra_info"].get("outcome", "completed") != "completed"


def _time_rounds(benchmark: BenchmarkFixture, child: isolation.Child) -> None:
    """Let pytest-benchmark time the rounds. Those after an early end take no time and are no rounds: they are dropped;
    the one in which the trial ended stays, so that the row is there."""
    try:
        benchmark.pedantic(child.round, rounds=child.trial.rounds, iterations=1)
    except BaseException:
        # It leaves out rows of what failed, but does not count an interruption, and cannot save a row without data.
        benchmark.has_error = True
        raise
    if benchmark.stats is not None:
        del benchmark.stats.stats.data[max(1, child.rounds_done) :]


def _by_round(step_seconds: tuple[float, ...], steps_per_round: int) -> list[float]:
    return [sum(step_seconds[i : i + steps_per_round]) for i in range(0, len(step_seconds), steps_per_round)]


def _model(model: str | Model) -> Model:
    return models.named(model) if isinstance(model, str) else model


def _method(method: str | Method) -> Method:
    try:
        return methods.named(method) if isinstance(method, str) else method
    except ValueError as error:
        raise pytest.UsageError(f"--method: {error}") from None
