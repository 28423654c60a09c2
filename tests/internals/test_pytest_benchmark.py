"""What is private to pytest-benchmark is still there."""

import inspect
import json
from types import SimpleNamespace

import pytest

from lightweight.internals import pytest_benchmark as internals


@pytest.fixture
def config(pytester):
    """A configuration of pytest with pytest-benchmark's session, as in a worker that pytest-xdist has started."""
    return pytester.parseconfigure("--benchmark-disable")


@pytest.fixture
def row(pytester):
    """What was timed in three rounds, the last one dropped, under a name with a note, as it comes from a worker."""
    pytester.makeconftest(
        """
        import pytest
        from lightweight.internals import pytest_benchmark as internals

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_makereport(item, call):
            if call.when == "call" and (row := internals.timed(item)) is not None:
                item.config.rootpath.joinpath(f"{item.name}.json").write_text(internals.to_json(row))
            return (yield)
        """
    )
    pytester.makepyfile(
        test_it="""
        from lightweight.internals import pytest_benchmark as internals

        def test_timed(benchmark):
            benchmark.pedantic(int, rounds=3, iterations=1)
            internals.keep_rounds(benchmark, 2)
            internals.add_to_name(benchmark, " [note]")

        def test_left_out(benchmark):
            benchmark.pedantic(int, rounds=3, iterations=1)
            internals.leave_out(benchmark)

        def test_untimed():
            pass
        """
    )
    pytester.runpytest_inprocess("-p", "no:xdist").assert_outcomes(passed=3)
    (file,) = pytester.path.glob("*.json")
    return json.loads(file.read_text())


def test_its_session_has_what_is_read_and_set(config):
    assert internals.has_session(config)
    session = internals.session(config)
    assert all(hasattr(session, name) for name in internals.ATTRIBUTES)
    assert session.disabled
    config.option.benchmark_disable = False
    internals.switch_on(config)
    internals.run_only_benchmarks(config)
    internals.compare_with(config, "0001")
    assert (session.disabled, session.only, session.compare) == (False, True, "0001")
    assert config.getoption("benchmark_compare") == "0001"


def test_what_one_process_has_timed_another_adds_to_its_rows_in_the_place_of_an_older_one(config, row):
    assert (row["fullname"], row["name"]) == ("test_it.py::test_timed", "test_timed [note]")
    for _ in range(2):
        internals.add_row(config, row)
    (added,) = internals.session(config).benchmarks
    assert added.name == "test_timed [note]"
    assert added.stats.data == row["data"]
    assert added.stats.rounds == 2
    internals.forget_row(config, row["fullname"])
    assert not internals.session(config).benchmarks


def test_its_json_is_stored_by_whoever_is_to(config):
    stored = []
    internals.save_by(config, lambda text: stored.append(json.loads(text)) or True)
    internals.session(config).save_json({"benchmarks": []})
    assert stored == [{"benchmarks": []}]
    assert "self.save_json(" in inspect.getsource(type(internals.session(config)))


def test_a_session_without_rows_is_worth_saving(config):
    assert not internals.session(config).benchmarks
    internals.save_without_rows(config)
    assert list(internals.session(config).benchmarks) == []
    assert internals.session(config).benchmarks


def test_stored_runs_are_found_by_number_and_by_name(tmp_path):
    folder = tmp_path / "Linux-CPython"
    folder.mkdir()
    for name in ("0001_first", "0002_second", "other"):
        (folder / f"{name}.json").write_text("{}")
    names = [path.rpartition("/")[2] for path in internals.stored_files(str(tmp_path), None)]
    assert names == ["0001_first.json", "0002_second.json"]
    (second,) = internals.stored_files(str(tmp_path), "0002")
    assert second.endswith("0002_second.json")


def test_another_pytest_benchmark_is_told_in_one_line():
    config = SimpleNamespace(_benchmarksession=SimpleNamespace(benchmarks=[], compare=None, only=False))
    with pytest.raises(pytest.UsageError, match=r"has no 'disabled'.*install pytest-benchmark==5\.3\.1") as raised:
        internals.session(config)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_a_version_that_has_emptied_the_file_already_is_refused_in_a_line(pytester, tmp_path):
    config = pytester.parseconfigure(f"--benchmark-json={tmp_path / 'run.json'}")
    assert internals.json_path(config) == tmp_path / "run.json"
    with (tmp_path / "run.json").open("wb") as file:
        config.option.benchmark_json = file  # what it is before 5.3
        with pytest.raises(pytest.UsageError, match=r"pip install 'pytest-benchmark>=5\.3\.1'"):
            internals.json_path(config)
