"""More than one GPU, more than one machine: pytest-xdist is the engine, and pytest-benchmark stays on in its workers.

One worker a visible GPU, a model's cells together on one of them, so that what is compared shares a card. Under
pytest-xdist, pytest-benchmark switches itself off; here it is kept on in the workers, each test's row travels to the
controller on the test's report, and the controller saves and shows all rows as if it had timed them. So a worker that
dies loses the test it ran and nothing else.

What is private to either is reached through `lightweight.internals`.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Generator
from functools import cached_property
from typing import Any

import pytest

from lightweight.child.process import CAN_PIN
from lightweight.internals import pytest_benchmark, xdist
from lightweight.internals.pytest import rename
from lightweight.session import options
from lightweight.session.claim import claim
from lightweight.session.progress import Progress, take_untold


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """`-n auto` is one worker a GPU, or for each of a trial's GPUs together. Workers on a CPU would share its cores and
    time each other, so there it is one, unless asked in the ways pytest-xdist has."""
    if config.getoption("numprocesses") == "logical" or os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):
        return None
    import torch

    each: int = options.value(config, "gpus_per_trial")
    return max(1, torch.cuda.device_count() // max(1, each))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """A model's cells stay together, unless another way to distribute was named."""
    workers = config.getoption("numprocesses", None) or config.getoption("tx", None)
    if hasattr(config, "workerinput"):  # a worker has its controller's --tx, too
        return
    if workers and config.getoption("dist", "") == "no" and not config.getoption("distload", False):
        config.option.dist = "loadgroup"


def connect(config: pytest.Config) -> None:
    """In `pytest_configure`, before pytest-benchmark's own: prepare to keep it on here, and to gather rows."""
    if hasattr(config, "workerinput"):
        xdist.keep_groups(config, config.workerinput["lightweight_loadgroup"])
        config.pluginmanager.register(_Worker(config), "lightweight-xdist-side")
    elif hands_out(config):
        config.pluginmanager.register(_Controller(config), "lightweight-xdist-side")


def hands_out(config: pytest.Config) -> bool:
    """Whether this process leaves its tests to workers."""
    return not hasattr(config, "workerinput") and config.getoption("dist", "no") != "no" and bool(config.option.tx)


def switch_on(config: pytest.Config) -> None:
    """Have pytest-benchmark time, under pytest-xdist too: a test of lightweight's is there."""
    side = config.pluginmanager.get_plugin("lightweight-xdist-side")
    if isinstance(side, _Side):
        side.switch_on()


def take_place(config: pytest.Config) -> None:
    """Before anything in a worker touches CUDA: have it see its own GPUs alone."""
    if hasattr(config, "workerinput"):
        _take_place(config.workerinput["lightweight_slot"], options.value(config, "gpus_per_trial"))


def unclaimed(config: pytest.Config) -> str | None:
    """In a line why this session cannot have the file of --benchmark-json for itself; None where it has, or needs none.
    It is claimed when this is first asked, by the process that writes it: a worker knows it from its controller."""
    if hasattr(config, "workerinput"):
        told: str | None = config.workerinput["lightweight_unclaimed"]
        return told
    return claim(config)


def is_shipped(report: pytest.TestReport) -> bool:
    """Whether a test of lightweight's, in a worker or here, has something to tell."""
    return hasattr(report, "lightweight_begun") or any(getattr(report, "lightweight", {}).values())


def where(config: pytest.Config) -> dict[str, str | None]:
    """Which worker this is, and the number of the GPU it sees, or several with commas, `None` on a CPU; empty where
    there are no workers."""
    if not hasattr(config, "workerinput"):
        return {}
    import torch

    gpu = os.environ["CUDA_VISIBLE_DEVICES"] if torch.cuda.device_count() else None
    return {"worker": config.workerinput["workerid"], "visible_gpu": gpu}


def group_by_model(item: pytest.Item, model: str | None) -> None:
    """Keep `item` on one worker with all others of `model`, or where it names none, with those of its file. Without
    pytest-xdist nobody knows the mark, and pytest would warn of it."""
    if item.config.pluginmanager.has_plugin("xdist") and item.get_closest_marker("xdist_group") is None:
        item.add_marker(pytest.mark.xdist_group(model or item.path.name))


def tell_begun(item: pytest.Item, begun: dict[str, Any]) -> None:
    """From a worker: what is to be recorded if this worker dies before `item` has ended. It travels on a report of the
    set-up, which pytest-xdist passes on at once and which no reporter shows."""
    if hasattr(item.config, "workerinput"):
        report = pytest.TestReport(
            nodeid=item.nodeid,
            location=item.location,
            keywords={},
            outcome="passed",
            longrepr=None,
            when="setup",
            lightweight_begun=begun,
        )
        item.ihook.pytest_runtest_logreport(report=report)


class _Side:
    """What controller and workers share: their pytest-benchmark is on although pytest-xdist is."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self._is_on = False
        # Its session refuses --benchmark-only while it is being made under pytest-xdist; it is told afterwards.
        self._only = config.getoption("benchmark_only", False)
        if self._only:
            config.option.benchmark_only = False
            config.option.benchmark_skip = False  # as pytest-benchmark has it

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        if self._only:
            pytest_benchmark.run_only_benchmarks(self.config)

    def switch_on(self) -> None:
        """Time, from now on."""
        if not self._is_on and pytest_benchmark.has_session(self.config):
            self._is_on = True
            pytest_benchmark.switch_on(self.config)


class _Worker(_Side):
    """Ships rows; saves, compares and shows nothing itself."""

    def __init__(self, config: pytest.Config) -> None:
        super().__init__(config)
        for option in ("benchmark_json", "benchmark_save", "benchmark_autosave", "benchmark_compare"):
            setattr(config.option, option, None)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """pytest-xdist tells a test's group to its scheduler at the end of the node id, but pytest 9.2 has moved the id
        from where pytest-xdist 3.8 writes it."""
        for item in items:
            if (suffix := self._suffix(item)) and not item.nodeid.endswith(suffix):
                rename(item, item.nodeid + suffix)

    @pytest.hookimpl(wrapper=True)
    def pytest_collection_finish(self) -> Generator[None, None, None]:
        """What is wrong with the command line is told by the controller, in one line."""
        try:
            yield
        except pytest.UsageError as error:
            xdist.tell_controller(self.config, "lightweight_usage_error", str(error))
            raise

    def _suffix(self, item: pytest.Item) -> str:
        groups = {str(mark.args[0] if mark.args else mark.kwargs["name"]) for mark in item.iter_markers("xdist_group")}
        return f"@{'_'.join(sorted(groups))}" if groups and xdist.keeps_groups(self.config) else ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if call.when == "call" and (row := pytest_benchmark.timed(item)) is not None:
            row["extra_info"] = {**row["extra_info"], **where(self.config)}
            row["fullname"] = row["fullname"].removesuffix(self._suffix(item))  # which other runs do not have
            vars(report)["lightweight_row"] = pytest_benchmark.to_json(row)
        if untold := take_untold(self.config):
            vars(report)["lightweight_untold"] = untold
        return report


class _Controller(_Side):
    """Hands out GPUs, and gathers rows."""

    def __init__(self, config: pytest.Config) -> None:
        super().__init__(config)
        self._slots: defaultdict[str, dict[int, Any]] = defaultdict(dict)

    @cached_property
    def _unclaimed(self) -> str | None:
        """What workers are told, also those that replace another: claimed once."""
        return unclaimed(self.config)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """The lowest number on the node's machine that no living worker has: a replacement gets the dead one's."""
        taken = self._slots[xdist.machine_of(node)]
        slot = next(number for number in range(len(taken) + 1) if number not in taken)
        taken[slot] = node
        node.workerinput["lightweight_slot"] = slot
        node.workerinput["lightweight_unclaimed"] = self._unclaimed
        node.workerinput["lightweight_loadgroup"] = self.config.getoption("dist") == "loadgroup"

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        taken = self._slots[xdist.machine_of(node)]
        for slot in [slot for slot, owner in taken.items() if owner is node]:
            del taken[slot]
        if problem := xdist.told_by_worker(node, "lightweight_usage_error"):
            raise pytest.UsageError(problem)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        return xdist.group_scheduler(config, log) if config.getoption("dist") == "loadgroup" else None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for line in getattr(report, "lightweight_untold", ()):
            Progress(self.config).tell(line)
        text = getattr(report, "lightweight_row", None)
        if text is not None:
            pytest_benchmark.add_row(self.config, json.loads(text))

    @pytest.hookimpl(wrapper=True)
    def pytest_benchmark_group_stats(self) -> Generator[None, list[Any], list[Any]]:
        """In the table each row says where it was timed; in the JSON its `extra_info` does."""
        groups = yield
        for _, rows in groups:
            for row in rows:
                if (worker := row["extra_info"].get("worker")) and row["path"] is None:
                    gpu = row["extra_info"]["visible_gpu"]
                    row["name"] += f" [{worker}, {'CPU' if gpu is None else f'GPU {gpu}'}]"
        return groups


def _take_place(slot: int, count: int) -> None:
    """Let this worker see the `count` GPUs of its trials alone, before anything in it has touched CUDA, and keep it on
    as large a share of the cores: a step that waits for Python waits for whatever else is on its core."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
    if not torch.cuda.device_count():
        return
    places = max(1, len(visible) // count)
    place = slot % places
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[place * count : (place + 1) * count])
    if CAN_PIN:
        cores = sorted(os.sched_getaffinity(0))
        share = cores[place * len(cores) // places : (place + 1) * len(cores) // places]
        os.sched_setaffinity(0, share or cores)
