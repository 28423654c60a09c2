"""The record is in its file from the first trial on, and is never worse than it was."""

import json

import pytest

from conftest import MICRO
from lightweight import record

CELL = f"""
import os, resource
from pathlib import Path
import pytest
from lightweight.models import Model

MODEL = Model(name="micro", architecture={MICRO.architecture!r})

@pytest.fixture(autouse=True)
def fault():
    yield
    FAULT

def test_cell(train):
    assert train(MODEL, "lora").kind == "completed"
"""

NO_ROOM = """
    size = Path("out.json").stat().st_size + 64  # what pytest-benchmark adds is more
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
"""


def session(pytester, corpus, fault, *options):
    pytester.makeconftest('pytest_plugins = ["lightweight.plugin"]')
    pytester.makepyfile(test_cells=CELL.replace("    FAULT", fault))
    return pytester.runpytest_subprocess(f"--corpus={corpus}", "--epochs=2", "-p", "no:cacheprovider", *options)


@pytest.fixture
def corpus(tmp_path):
    from conftest import turns

    path = tmp_path / "corpus.json"
    path.write_text(json.dumps(turns(10)), "utf-8")
    return path


def test_a_record_that_has_no_room_at_the_end_is_what_was_found_before(pytester, corpus):
    done = session(pytester, corpus, NO_ROOM, "--benchmark-json=out.json")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stdout.fnmatch_lines(["record out.json: cannot be written (File too large): what is in it was written before"])
    run = record.load(pytester.path / "out.json")
    assert [(entry.method, entry.outcome) for entry in run.entries] == [("lora", "completed")]
    assert not list(pytester.path.glob(".writing-*"))


def test_at_the_end_it_is_pytest_benchmarks_whole(pytester, corpus):
    done = session(pytester, corpus, "    pass", "--benchmark-json=out.json")
    assert done.ret == 0
    stored = json.loads((pytester.path / "out.json").read_text("utf-8"))
    assert len(stored["benchmarks"]) == 1 and stored["machine_info"] and stored["outcomes"][0]["steps"] > 0
    done.stderr.fnmatch_lines(["*Wrote benchmark data in: out.json*"])


@pytest.mark.parametrize("place", ["nowhere/out.json", "."])
@pytest.mark.parametrize("option", ["--benchmark-json", "--report"])
def test_a_place_where_nothing_can_be_written_is_refused_before_anything_is_trained(pytester, corpus, option, place):
    done = session(pytester, corpus, "    pass", f"{option}={place}")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in done.stderr.lines if "ERROR" in line]
    assert f"{option} {place}: cannot be written (" in line


def test_a_lock_that_cannot_be_had_is_named_before_anything_is_trained(pytester, corpus):
    (pytester.path / ".out.json.lock").mkdir()
    done = session(pytester, corpus, "    pass", "--benchmark-json=out.json")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in done.stderr.lines if "ERROR" in line]
    assert "--benchmark-json out.json: cannot be locked (Is a directory: " in line and ".out.json.lock)" in line
    assert not (pytester.path / "out.json").exists()


def test_a_device_is_written_by_pytest_benchmark(pytester, corpus):
    assert session(pytester, corpus, "    pass", "--benchmark-json=/dev/null").ret == 0


def test_a_session_whose_tests_go_elsewhere_writes_where_it_was_told(pytester, corpus, tmp_path):
    """Also before it ends, so that what is killed there has its record; nobody's file of that name is replaced."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "out.json").write_text("somebody's")
    (elsewhere / "out.md").write_text("somebody's")
    fault = f"    os.chdir({str(elsewhere)!r})"
    done = session(pytester, corpus, fault, "--benchmark-json=out.json", "--report=out.md")
    assert done.ret == 0
    stored = json.loads((pytester.path / "out.json").read_text("utf-8"))
    assert len(stored["benchmarks"]) == 1 and (pytester.path / "out.md").is_file()
    assert [path.read_text() for path in elsewhere.iterdir()] == ["somebody's"] * 2
