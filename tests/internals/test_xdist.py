"""What is private to pytest-xdist is still there."""

from types import SimpleNamespace

import pytest

from lightweight.internals import xdist


def test_a_worker_tells_its_controller_something_and_which_machine_it_is_on(pytester):
    pytester.makeconftest(
        """
        import pytest
        from lightweight.internals import xdist

        def pytest_sessionfinish(session):
            is_worker = xdist.tell_controller(session.config, "word", [7])
            assert is_worker == hasattr(session.config, "workerinput")
            if is_worker:
                assert not xdist.keeps_groups(session.config)
                xdist.keep_groups(session.config, True)
                assert xdist.keeps_groups(session.config)

        @pytest.hookimpl(optionalhook=True)
        def pytest_testnodedown(node):
            print("told", xdist.told_by_worker(node, "word"), xdist.told_by_worker(node, "other"))
            print("on", xdist.machine_of(node))
        """
    )
    pytester.makepyfile("def test_it(): pass")
    done = pytester.runpytest_inprocess("-n1", "-s")
    done.assert_outcomes(passed=1)
    done.stdout.fnmatch_lines(["*told [[]7] None", "on this one"])


@pytest.mark.parametrize(
    ("how", "machine"), [({"ssh": "far"}, "far"), ({"socket": "far:8888"}, "far:8888"), ({"popen": True}, "this one")]
)
def test_a_machine_has_the_name_by_which_it_is_reached(how, machine):
    spec = SimpleNamespace(**{"popen": None, "ssh": None, "socket": None} | how)
    assert xdist.machine_of(SimpleNamespace(gateway=SimpleNamespace(spec=spec))) == machine


class Node:
    """A worker as its scheduler sees it."""

    def __init__(self) -> None:
        self.shutting_down = False
        self.gateway = SimpleNamespace(id="gw")
        self.asked: list[int] = []

    def send_runtest_some(self, numbers: list[int]) -> None:
        self.asked += numbers

    def shutdown(self) -> None:
        self.shutting_down = True


def scheduler_of(pytester, nodes, tests):
    config = pytester.parseconfig("--dist=loadgroup", f"--tx={len(nodes)}*popen")
    scheduler = xdist.group_scheduler(config, None)
    for node in nodes:
        scheduler.add_node(node)
        scheduler.add_node_collection(node, tests)
    scheduler.schedule()
    return scheduler


def test_the_test_that_a_worker_died_in_is_not_given_to_another(pytester):
    dead, other, replacement = Node(), Node(), Node()
    tests = ["t.py::one@a", "t.py::two@a", "t.py::three@b", "t.py::four@b", "t.py::five@c"]
    scheduler = scheduler_of(pytester, [dead, other], tests)
    first, second, *_ = dead.asked
    assert scheduler.remove_node(dead) == tests[first]
    scheduler.add_node(replacement)
    scheduler.add_node_collection(replacement, tests)
    scheduler.schedule()
    given = other.asked + replacement.asked
    assert second in given
    assert first not in given


def test_a_worker_that_gets_a_single_test_is_told_that_it_is_the_last(pytester):
    """Else it would wait for the next one before it runs that."""
    dead, other, replacement = Node(), Node(), Node()
    tests = ["t.py::one@a", "t.py::two@a", "t.py::three@b", "t.py::four@b"]
    scheduler = scheduler_of(pytester, [dead, other], tests)
    scheduler.remove_node(dead)
    scheduler.add_node(replacement)
    scheduler.add_node_collection(replacement, tests)
    scheduler.schedule()
    assert replacement.asked == [1]
    assert replacement.shutting_down
