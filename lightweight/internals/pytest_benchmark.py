"""What is private to pytest-benchmark: its session, and the rows in it. Read in pytest-benchmark 5.3.1.

Its hooks let a plugin read what is saved and shown; none of them lets one switch it on, or add, drop or name a row.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

ATTRIBUTES = ("benchmarks", "compare", "disabled", "json", "logger", "only", "save_json")
"""What is read and set of its session."""


def has_session(config: pytest.Config) -> bool:
    """Whether its session has been made, which happens in its `pytest_configure`."""
    return hasattr(config, "_benchmarksession")


def session(config: pytest.Config) -> Any:
    """Its session, with ATTRIBUTES. Raises pytest.UsageError where a version has it otherwise."""
    private = getattr(config, "_benchmarksession", None)
    missing = [name for name in ATTRIBUTES if not hasattr(private, name)]
    if missing:
        raise pytest.UsageError(
            f"pytest-benchmark {version('pytest-benchmark')}: its session has no {missing[0]!r}, through which it is "
            "kept on under pytest-xdist; install pytest-benchmark==5.3.1, or run without -n and --tx"
        )
    return private


def json_path(config: pytest.Config) -> Path | None:
    """Where its JSON goes. Raises pytest.UsageError where it has opened that file already, and so emptied it."""
    path = config.getoption("benchmark_json", None)
    if path is not None and not isinstance(path, Path):
        raise pytest.UsageError(
            f"pytest-benchmark {version('pytest-benchmark')} empties the file of --benchmark-json before anything is "
            "checked: pip install 'pytest-benchmark>=5.3.1'"
        )
    return path


def switch_on(config: pytest.Config) -> None:
    """Have it time although pytest-xdist is there, unless the command line says no."""
    private = session(config)
    private.disabled = config.getoption("benchmark_disable") and not config.getoption("benchmark_enable")
    private.xdist_warning = False  # it would tell that benchmarks are off


def compare_with(config: pytest.Config, path: str | None) -> None:
    """Have it compare with the stored run at `path`, or none, whether or not its session is there yet."""
    config.option.benchmark_compare = path
    if has_session(config):
        session(config).compare = path


def run_only_benchmarks(config: pytest.Config) -> None:
    """`--benchmark-only`, which its session refuses while it is being made under pytest-xdist."""
    config.option.benchmark_only = session(config).only = True


def forget_row(config: pytest.Config, nodeid: str) -> None:
    """Drop the row of a test, which is run again."""
    if has_session(config):
        rows = session(config).benchmarks
        rows[:] = [row for row in rows if row.fullname != nodeid]


def save_without_rows(config: pytest.Config) -> None:
    """Have it write its JSON also where nothing was timed, as where the first cell was interrupted."""
    if has_session(config):
        private = session(config)
        private.benchmarks = _Rows(private.benchmarks)


def save_by(config: pytest.Config, write: Callable[[str], bool]) -> None:
    """Have `write(text)` store its JSON, and say whether it could, in place of its own opening of the file, which
    empties that first."""
    private = session(config)

    def save_json(content: dict[str, Any]) -> None:
        if write(to_json(content, indent=4)):
            private.logger.info(f"Wrote benchmark data in: {private.json}", purple=True)

    private.save_json = save_json


class _Rows(list[Any]):
    """Rows that are worth saving, even if there are none."""

    def __bool__(self) -> bool:
        return True


def timed(item: pytest.Item) -> dict[str, Any] | None:
    """The row of a test that its fixture has timed to the end, with the rounds' seconds as `data`; None where there is
    none."""
    fixture = getattr(item, "funcargs", {}).get("benchmark")
    if fixture is None or not fixture.stats or fixture.has_error:
        return None
    row: dict[str, Any] = fixture.stats.as_dict(include_data=False, stats=False)
    return row | {"data": fixture.stats.stats.data, "iterations": fixture.stats.iterations}


def to_json(content: dict[str, Any], **layout: Any) -> str:
    """`content`, a row say, as JSON text, in its own words for what JSON has none for."""
    from pytest_benchmark.utils import safe_dumps

    return str(safe_dumps(content, ensure_ascii=True, **layout))


def add_row(config: pytest.Config, row: dict[str, Any]) -> None:
    """Add what `timed` gave in another process, in the place of an older row of that test."""
    from pytest_benchmark.stats import Metadata

    row = dict(row)
    data, iterations, options = row.pop("data"), row.pop("iterations"), row.pop("options")
    fixture = SimpleNamespace(**row | {"cprofile_stats": None, "has_error": False})
    stats = Metadata(fixture, iterations=iterations, options=options)
    stats.stats.data += data
    forget_row(config, stats.fullname)
    session(config).benchmarks.append(stats)


def leave_out(benchmark: BenchmarkFixture) -> None:
    """Leave the test's row out of what is shown and saved, as it does where what it timed has failed; an interruption
    is none to it, and a row without data it cannot save."""
    benchmark.has_error = True


def keep_rounds(benchmark: BenchmarkFixture, count: int) -> None:
    """Drop the rounds after the first `count`, where it has timed any."""
    if benchmark.stats is not None:
        del benchmark.stats.stats.data[count:]


def add_to_name(benchmark: BenchmarkFixture, words: str) -> None:
    """Put `words` behind the row's name, where there is a row."""
    if benchmark.stats is not None:
        benchmark.stats.name += words


def stored_files(folder: str, name: str | None) -> list[str]:
    """Paths of the runs that it has stored in `folder`, of `name` as --benchmark-compare takes it; the numbered ones
    where that is None. Raises ValueError where there is none."""
    from pytest_benchmark.storage.file import FileStorage

    files = FileStorage(folder, logger=None)
    return [str(path) for path in files.query("*/[0-9][0-9][0-9][0-9]_" if name is None else name)]
