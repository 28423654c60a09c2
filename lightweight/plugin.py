"""What does a user get in pytest? Fixtures that train, forecast and compare; the hooks behind them are in
`lightweight.session`.

Load it from a conftest.py: `pytest_plugins = ["lightweight.plugin"]`. Tests can then use

- `train(model, method, **changes)`: trains a cell in a child process, with pytest-benchmark timing its rounds, and
  returns the Outcome;
- `outcome_of(model, method, **changes)`: the Outcome of a cell that was already trained in this session; otherwise it
  is trained now, and pytest-benchmark does not time it;
- `forecast_of(model, method, **changes)`: the Forecast of a cell, without a GPU or weights;
- `speedup(model, method, **changes)`: how many times as fast as its baseline a cell is, from alternating rounds.

A test with the arguments `model` and `method` beside one of these is parametrised over `--model` x `--method`. A test
that trains is also parametrised over the seeds of `--seeds`.

In a suite that does not use these fixtures or options, the plugin imports nothing slow, such as torch, and looks for
nothing.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from lightweight.imports import without_collecting
from lightweight.internals import pytest_benchmark
from lightweight.session import options, xdist_bridge
from lightweight.session.fixtures import FIXTURES, uses
from lightweight.session.fixtures import NOT_RUN as NOT_RUN

# pytest finds these hooks here
from lightweight.session.xdist_bridge import pytest_cmdline_main, pytest_xdist_auto_num_workers  # noqa: F401

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from lightweight.child import owner
    from lightweight.methods import Method
    from lightweight.models import Model
    from lightweight.record import Speedup
    from lightweight.session.laboratory import Laboratory as Laboratory
    from lightweight.session.speedups import CPU_STEPS as CPU_STEPS
    from lightweight.session.speedups import CUDA_STEPS as CUDA_STEPS
    from lightweight.session.speedups import PRECISION as PRECISION
    from lightweight.trial import Forecast, Outcome


def __getattr__(name: str) -> Any:
    """Names that tests import from here, from modules that take long to import."""
    if name in ("CPU_STEPS", "CUDA_STEPS", "PRECISION", "Laboratory"):
        from lightweight.session import laboratory, speedups

        return getattr(laboratory if name == "Laboratory" else speedups, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    options.register(parser)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_cuda: skipped, as not run, on a machine without CUDA")
    config.addinivalue_line("markers", "needs_gpus(n): skipped, as not run, where fewer than n GPUs are seen")
    config.addinivalue_line("markers", "model(name): of which model a test is that takes none: see --model")
    config.addinivalue_line("markers", "shown_as(table): 'ladder' or 'peers', the report's table for a test's cells")
    if not config.pluginmanager.has_plugin("xdist"):  # whose own it is
        config.addinivalue_line("markers", "xdist_group(name): tests of which one worker runs all")
    xdist_bridge.connect(config)
    door = Door(config)
    config.pluginmanager.register(door, "lightweight-door")
    if options.are_given(config) or (xdist_bridge.hands_out(config) and config.getoption("benchmark_compare", None)):
        options.check_names(config)
        door.open().check()  # what is wrong with them is told now


class Door:
    """Opens the session's laboratory when a test, a mark or an option first asks for it."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self._laboratory: Laboratory | None = None
        self._problem: pytest.UsageError | None = None

    def open(self) -> Laboratory:
        """The session's laboratory, whose hooks are called from now on."""
        if self._laboratory is None:
            with without_collecting():
                from lightweight.session.gatekeeper import Gatekeeper
                from lightweight.session.laboratory import Laboratory
                from lightweight.session.summary import Summary

            xdist_bridge.take_place(self.config)
            self._laboratory = opened = Laboratory(self.config)
            parts = (opened.ledger, opened.interruption, opened.collection, Summary(opened), Gatekeeper(opened))
            for part in (opened, *parts):
                self.config.pluginmanager.register(part, f"lightweight-{type(part).__name__.lower()}")
        return self._laboratory

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if uses(metafunc.definition, FIXTURES):
            xdist_bridge.switch_on(self.config)
            try:
                self.open().collection.parametrize(metafunc)
            except pytest.UsageError as error:  # here it would be an error of the test
                self._problem = self._problem or error

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self) -> None:
        if self._problem is not None:
            raise self._problem

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self._laboratory is None and any(map(item.get_closest_marker, ("needs_cuda", "needs_gpus"))):
            self.open().collection.pytest_runtest_setup(item)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Under pytest-xdist the controller, which collects nothing, is told by the workers' reports."""
        if xdist_bridge.is_shipped(report):
            xdist_bridge.switch_on(self.config)
            if self._laboratory is None:
                self.open().interruption.heed_signals()
                self.open().ledger.pytest_runtest_logreport(report)
            self.open().ledger.is_used = True

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self) -> Generator[None, None, None]:
        if self._laboratory is not None:
            self._laboratory.ledger.take_unreported()  # before pytest-benchmark writes the record
        yield


@pytest.fixture
def laboratory(request: pytest.FixtureRequest) -> Laboratory:
    """The session's trials: its target, its models, and what has been trained so far."""
    door = request.config.pluginmanager.get_plugin("lightweight-door")
    assert isinstance(door, Door)
    return door.open()


@pytest.fixture
def lightweight_seed(request: pytest.FixtureRequest, laboratory: Laboratory) -> int:
    """The seed that this test trains with: one of those of `--seeds`, else that of `--seed`."""
    seed: int = getattr(request, "param", laboratory.option("seed"))
    return seed


@pytest.fixture
def train(
    request: pytest.FixtureRequest, laboratory: Laboratory, benchmark: BenchmarkFixture, lightweight_seed: int
) -> Train:
    """Train a cell, an epoch a round of pytest-benchmark, and return its Outcome; once in a test, whose row it is."""
    is_used = False

    def run(model: str | Model, method: str | Method, **changes: Any) -> Outcome:
        from lightweight.report.select import several

        nonlocal is_used
        if is_used:
            pytest.fail("train: pytest-benchmark times one cell per test: use outcome_of for the others", pytrace=False)
        is_used = True
        trial = laboratory.trial(model, method, **{"seed": lightweight_seed} | changes)
        benchmark.group = f"{trial.model.name} on {several(trial.world_size, trial.target.name)}"
        try:
            outcome = laboratory.run(request.node, trial, lambda child: _time_rounds(benchmark, child))
        except BaseException:
            pytest_benchmark.leave_out(benchmark)  # a row without an outcome
            raise
        trial = trial.with_rows(outcome.measured.training_rows)
        benchmark.extra_info |= {
            "model": trial.model.name,
            "method": trial.method.name,
            "target": trial.target.name,
            "outcome": outcome.kind,
            "steps_per_round": trial.steps_per_epoch,
            "device_seconds": _by_round(outcome.measured.step_seconds, trial.steps_per_epoch),
        }
        if outcome.kind != "completed":
            pytest_benchmark.add_to_name(benchmark, f" [{outcome.kind.replace('_', ' ')}]")
        return outcome

    return run


@pytest.fixture
def outcome_of(request: pytest.FixtureRequest, laboratory: Laboratory, lightweight_seed: int) -> Train:
    """The Outcome of a cell, trained now only if this session has not yet."""

    def find(model: str | Model, method: str | Method, **changes: Any) -> Outcome:
        trial = laboratory.trial(model, method, **{"seed": lightweight_seed} | changes)
        return laboratory.outcome_of(trial) or laboratory.run(request.node, trial)

    return find


@pytest.fixture
def forecast_of(request: pytest.FixtureRequest, laboratory: Laboratory) -> ForecastOf:
    """The Forecast of a cell, on the session's device or, where there is none, on the cell's target."""

    def find(model: str | Model, method: str | Method, **changes: Any) -> Forecast:
        return laboratory.record_forecast(request.node, laboratory.trial(model, method, **changes))

    return find


@pytest.fixture
def speedup(request: pytest.FixtureRequest, laboratory: Laboratory, lightweight_seed: int) -> MeasureSpeedup:
    """How many times as fast as its model's baseline a cell is, from rounds of both in alternation."""

    def measure(model: str | Model, method: str | Method, **changes: Any) -> Speedup:
        from lightweight.record import BASELINE

        changes = {"seed": lightweight_seed} | changes
        trials = [laboratory.trial(model, name, **changes) for name in (method, BASELINE)]
        return laboratory.speedup(request.node, *trials)

    return measure


def _time_rounds(benchmark: BenchmarkFixture, child: owner.Child) -> None:
    """Let pytest-benchmark time the rounds. Those after an early end take no time and are no rounds: they are dropped;
    the one in which the trial ended stays, so that the row is there."""
    try:
        benchmark.pedantic(child.round, rounds=child.trial.rounds, iterations=1)
    except BaseException:
        pytest_benchmark.leave_out(benchmark)
        raise
    pytest_benchmark.keep_rounds(benchmark, max(1, child.rounds_done))


def _by_round(step_seconds: tuple[float, ...], steps_per_round: int) -> list[float]:
    return [sum(step_seconds[i : i + steps_per_round]) for i in range(0, len(step_seconds), steps_per_round)]
