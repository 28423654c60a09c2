"""The one place that touches pytest: options, fixtures, the progress line, the table and the JSON.

Load it from a conftest.py: `pytest_plugins = ["lightweight.plugin"]`. Tests then ask for

- `train(model, method, **changes)`: train a cell in a child process, its rounds timed by pytest-benchmark, and get the
  Outcome;
- `outcome_of(model, method, **changes)`: the Outcome of a cell that has been trained in this session, or else train it
  now, untimed by pytest-benchmark.

A test that takes `model` and `method` arguments beside either of them is parametrised over `--model` x `--method`.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Generator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from lightweight import corpus, isolation, methods, models, record, report, targets, worker
from lightweight.methods import Method
from lightweight.models import Model
from lightweight.targets import CPU, NATIVE, T4, Device, GiB, Target
from lightweight.trial import Measurements, Outcome, Trial

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

FIXTURES = ("train", "outcome_of")
TRUE_SIZES = ("opt-350m", "gpt-neo-1.3b")
TWINS = ("opt-tiny", "gpt-neo-tiny")
CUDA_EPOCHS = 10  # the original job
CPU_EPOCHS = 3  # enough for a twin's loss to fall, and for the whole suite to end within three minutes on two cores
NOT_RUN = "not run: "


class Train(Protocol):
    """Train one cell and return how it ended. `changes` replace fields of its Trial: target, epochs, max_steps,
    seed."""

    def __call__(self, model: str | Model, method: str | Method, **changes: Any) -> Outcome: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lightweight", "fine-tuning experiments")
    group.addoption(
        "--model",
        action="append",
        metavar="NAME",
        help="a model to train, repeatable: a known name, a hub id or a local folder "
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
        "--false-alarms",
        action="store_true",
        help="also count the gate's false alarms and misses, on hundreds of gates; takes an hour",
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
    laboratory = Laboratory(config)
    config.pluginmanager.register(laboratory, "lightweight-laboratory")
    _ = laboratory.methods  # a name that does not exist is told now
    for option in ("epochs", "trial_timeout"):
        value = config.getoption(option)
        if value is not None and value <= 0:
            raise pytest.UsageError(f"--{option.replace('_', '-')} {value:g}: give more than 0")
    seed = config.getoption("seed")
    if not 0 <= seed < 2**32:
        raise pytest.UsageError(f"--seed {seed}: give a number from 0 to {2**32 - 1}, which is what numpy takes")


class Laboratory:
    """The session's trials: what its options say, what has been trained, and what is told of it."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.entries: list[record.Entry] = []
        self.not_run: list[str] = []
        self._outcomes: dict[str, Outcome] = {}
        self._models: dict[str, Model] = {}

    # What the options say; each is read when first needed, and raises pytest.UsageError.

    @cached_property
    def has_cuda(self) -> bool:
        import torch

        return torch.cuda.is_available()

    @cached_property
    def device(self) -> Device:
        if not self.has_cuda:
            machine = self.config.hook.pytest_benchmark_generate_machine_info(config=self.config)
            return Device(name=machine["cpu"].get("brand_raw") or machine["machine"])
        return isolation.call(worker.describe_device, self.folder, 0)

    @cached_property
    def target(self) -> Target:
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
    def corpus(self) -> corpus.Corpus:
        path = self.config.getoption("corpus") or self.config.rootpath / "corpus.json"
        try:
            return corpus.load(path)
        except corpus.CorpusError as error:
            raise pytest.UsageError(str(error)) from None

    @cached_property
    def models(self) -> list[str]:
        names = self.config.getoption("model") or (TRUE_SIZES if self.has_cuda else TWINS)
        return list(dict.fromkeys(names))

    @cached_property
    def methods(self) -> list[str]:
        names = list(dict.fromkeys(self.config.getoption("method") or methods.METHODS))
        for name in names:
            _method(name)
        return names

    @cached_property
    def folder(self) -> Path:
        """The session's scratch folder; removed when it ends."""
        return Path(tempfile.mkdtemp(prefix="lightweight-"))

    # Collecting

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if not any(name in metafunc.fixturenames for name in FIXTURES):
            return
        marked: set[str] = set()
        for mark in metafunc.definition.iter_markers("parametrize"):
            names = mark.kwargs.get("argnames", mark.args[0] if mark.args else ())
            marked |= {name.strip() for name in (names.split(",") if isinstance(names, str) else names)}
        for argument, values in {"model": self.models, "method": self.methods}.items():
            if argument in metafunc.fixturenames and argument not in marked:
                metafunc.parametrize(argument, values)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Cells are trained, and timed, before the tests that only look at how they ended."""
        items.sort(key=lambda item: "outcome_of" in getattr(item, "fixturenames", ()))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Check everything a trial needs, before any model is built."""
        if self.config.getoption("collectonly"):
            return
        for item in session.items:
            if any(name in getattr(item, "fixturenames", ()) for name in FIXTURES):
                settings: dict[str, Any] = {"target": self.target, "corpus": self.corpus}
                # Only cells that are going to run: looking for a model may download it.
                cell = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
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

    # Training

    def trial(self, model: str | Model, method: str | Method, **changes: Any) -> Trial:
        """The trial of a cell under the session's options."""
        settings: dict[str, Any] = {
            "target": self.target,
            "corpus": self.corpus,
            "seed": self.config.getoption("seed"),
            "epochs": self.config.getoption("epochs") or (CUDA_EPOCHS if self.has_cuda else CPU_EPOCHS),
            "device_index": 0 if self.has_cuda else None,
        }
        return Trial(
            model=self._locate(_model(model)),
            method=_method(method),
            **settings | changes,
        )

    def outcome_of(self, trial: Trial) -> Outcome | None:
        """How `trial` ended, if it has been run in this session."""
        return self._outcomes.get(repr(trial))

    def run(self, item: pytest.Item, trial: Trial, rounds: Callable[[isolation.Child], None] | None = None) -> Outcome:
        """Run `trial` in a child of its own, letting `rounds` time its rounds, and record it with `item`."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            silence_seconds = self.config.getoption("trial_timeout")
            with isolation.Child(trial, folder, silence_seconds, self._show_step, self._show_round) as child:
                if rounds is not None:
                    rounds(child)
                outcome = child.finish()
        finally:
            shutil.rmtree(folder)
        self._show(f"{trial.name}: {outcome.kind.replace('_', ' ')}", " ", " ")
        self._outcomes[repr(trial)] = outcome
        item.stash.setdefault(_ENTRIES, []).append(record.entry(trial, outcome, self.device))
        return outcome

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
        """Entries travel on the test's report, which is what pytest-xdist carries from a worker to the controller."""
        made = yield
        vars(made)["lightweight_entries"] = item.stash.get(_ENTRIES, [])
        item.stash[_ENTRIES] = []
        return made

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.entries += getattr(report, "lightweight_entries", [])
        if report.skipped and isinstance(report.longrepr, tuple) and NOT_RUN in report.longrepr[2]:
            reason = report.longrepr[2].removeprefix("Skipped: ")
            self.not_run.append(f"{reason}: {report.nodeid}")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.entries or self.not_run:
            terminalreporter.section("lightweight: does it fit, how fast is it, what does it do to the loss")
        if self.entries:
            terminalreporter.write_line(report.table(self.entries, "terminal"))
        for line in self.not_run:
            terminalreporter.write_line(line)

    def pytest_benchmark_update_machine_info(self, machine_info: dict[str, Any]) -> None:
        machine_info.pop("node", None)  # records are committed and shared; whose machine it was is nobody's business
        machine_info["gpu"] = dataclasses.asdict(self.device) if self.has_cuda else None

    def pytest_benchmark_compare_machine_info(
        self, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
    ) -> None:
        """Times of different GPUs are never compared: pytest-benchmark would only warn."""
        now, stored = (_gpu_name(info) for info in (machine_info, compared_benchmark["machine_info"]))
        if now != stored:
            raise pytest.UsageError(
                f"--benchmark-compare: the stored run was measured on {stored} and this one is on {now}; "
                "name a run of the same GPU, or leave the option out and store one with --benchmark-autosave"
            )

    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        output_json["outcomes"] = self.entries

    def pytest_unconfigure(self) -> None:
        if "folder" in vars(self):
            shutil.rmtree(self.folder)


_ENTRIES = pytest.StashKey[list[record.Entry]]()


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
        benchmark.group = f"{trial.model.name} on {trial.target.name}"
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


def _time_rounds(benchmark: BenchmarkFixture, child: isolation.Child) -> None:
    """Let pytest-benchmark time the rounds. Those after an early end take no time and are no rounds: they are dropped;
    the one in which the trial ended stays, so that the row is there."""
    benchmark.pedantic(child.round, rounds=child.trial.rounds, iterations=1)
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


def _gpu_name(machine_info: dict[str, Any]) -> str:
    gpu = machine_info.get("gpu")
    return str(gpu["name"]) if gpu else "a machine without a GPU"
