"""What is private to pytest-xdist: what a worker sends back, which machine it is on, and who gets which test. Read in
pytest-xdist 3.8.0."""

from __future__ import annotations

from typing import Any

import pytest


def tell_controller(config: pytest.Config, name: str, value: Any) -> bool:
    """Send `value` with what a worker sends when it has ended; whether this is a worker. What a worker is started with
    is documented, what it sends back is not."""
    output = getattr(config, "workeroutput", None)
    if output is not None:
        output[name] = value
    return output is not None


def told_by_worker(node: Any, name: str) -> Any:
    """What the worker of `node` has sent as `name`; None where it has sent nothing, or died."""
    return getattr(node, "workeroutput", {}).get(name)


def keep_groups(config: pytest.Config, keep: bool) -> None:
    """Have a worker write a test's group behind its id, from which `group_scheduler` reads it."""
    config.option.loadgroup = keep


def keeps_groups(config: pytest.Config) -> bool:
    """Whether a worker does so."""
    return bool(config.option.loadgroup)


def machine_of(node: Any) -> str:
    """Which machine the worker of `node` runs on, by how execnet reaches it."""
    spec = node.gateway.spec
    return "this one" if spec.popen else str(spec.ssh or spec.socket or spec)


def group_scheduler(config: pytest.Config, log: Any) -> Any:
    """The scheduler of `--dist loadgroup`, which keeps tests of a group on one worker, with two faults mended that
    pytest-xdist has open (its issues 1323, 1327, 1378): it gives the test that a worker died in to the next worker
    again, and waits for ever where a dead worker's tests were done or a new one has a single test to do."""
    from xdist.scheduler import LoadGroupScheduling

    class GroupScheduler(LoadGroupScheduling):  # type: ignore[misc]
        def remove_node(self, node: Any) -> str | None:
            units = self.assigned_work.pop(node)
            waiting = [(group, test) for group, unit in units.items() for test, is_done in unit.items() if not is_done]
            for group, test in waiting[1:]:
                self.workqueue.setdefault(group, {})[test] = False
            for other in self.nodes:
                self._reschedule(other)
            return waiting[0][1] if waiting else None

        def schedule(self) -> None:
            super().schedule()
            for node in self.nodes:  # a second time: gives a worker with one test another one, or says it is the last
                self._reschedule(node)

    return GroupScheduler(config, log)
