"""`pytest tests/faults` injects a sample of every class of faults, `--faults` all of them. Both print how many were
tried and survived; `--faults-into docs/faults.md` also writes that between the marks of a file. `--faults-draw N` makes
other mutants."""

import datetime
import json
import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tabulate import tabulate

from conftest import turns

TRIED: Counter[str] = Counter()
SURVIVED: Counter[str] = Counter()


@pytest.fixture
def whole(request: pytest.FixtureRequest) -> bool:
    """Whether every fault of a class is asked for."""
    return bool(request.config.getoption("--faults"))


@pytest.fixture
def seeds(request: pytest.FixtureRequest, whole: bool) -> Callable[[int, int], range]:
    """The seeds of so many mutants of a class, which has its own `first`; of a sample, of one in twelve."""

    def drawn(first: int, count: int) -> range:
        first += 1_000_000 * int(request.config.getoption("--faults-draw"))
        return range(first, first + (count if whole else max(6, count // 12)))

    return drawn


@pytest.fixture
def tried(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Counts one fault of the class that the test's module or function is called by."""

    def count(name: str, *, survived: bool = True) -> None:
        request.node.user_properties.append(("fault", (name, survived)))

    return count


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        faults: list[Any] = [value for key, value in report.user_properties if key == "fault"]
        for name, survived in faults:
            TRIED[name] += 1
            SURVIVED[name] += survived


COLUMNS = ("what", "tried", "survived", "commit", "date")
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not TRIED:
        return
    rows: dict[str, tuple[str, ...]] = {
        name: (name, str(TRIED[name]), str(SURVIVED[name]), *_version(config.rootpath)) for name in TRIED
    }
    terminalreporter.section("faults")
    terminalreporter.write_line(_table(rows))
    if (file := config.getoption("--faults-into")) is not None:
        file.write_text(with_rows(file.read_text("utf-8"), rows), "utf-8")


def with_rows(text: str, rows: dict[str, tuple[str, ...]]) -> str:
    """`text` with `rows` in the table between its marks, in the places of those of the same names."""
    before, begin, rest = text.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not (begin and end):
        raise pytest.UsageError(f"--faults-into: the file has no {BEGIN} and {END}: add a line of each")
    lines = [line.strip().strip("|").split("|") for line in inside.splitlines() if re.match(r"\|(?! what|-)", line)]
    kept = {cells[0].strip(): tuple(cell.strip() for cell in cells) for cells in lines}
    return f"{before}{begin}\n\n{_table(kept | rows)}\n\n{end}{after}"


def _table(rows: dict[str, tuple[str, ...]]) -> str:
    cells = [rows[name] for name in sorted(rows)]
    return tabulate(cells, COLUMNS, tablefmt="github", disable_numparse=True, colalign=("left", "right", "right"))


def _version(root: Path) -> tuple[str, str]:
    """The commit that the faults were injected into, with a `+` where the tree had changes, and today's date."""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        commit = done.stdout.strip()
    except OSError:  # no git here
        commit = ""
    return commit or "?", datetime.date.today().isoformat()


METHODS = """
from dataclasses import replace
from lightweight import methods

def constant(name):
    method = methods.METHODS[name]
    arguments = {**method.training_arguments, "lr_scheduler_type": "constant"}
    return replace(method, name=f"constant-{name}", training_arguments=arguments)

STOCK, CAPTURED = constant("baseline"), constant("lora-captured")
"""
"""With a constant rate a step too many is seen in the weights."""


@pytest.fixture(scope="session")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 pairs to train on, four steps an epoch at two a step."""
    path = tmp_path_factory.mktemp("dialogues") / "corpus.json"
    path.write_text(json.dumps(turns(10)), "utf-8")
    return path


@pytest.fixture
def given(
    without_gpu: None, base: Path, dialogues: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """The command of a job of seven steps, which ends within an epoch and has checkpoints after 3, 6 and 7."""
    (tmp_path / "constant.py").write_text(METHODS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")

    def arguments(output: Path, *more: str, method: str = "constant:STOCK") -> list[str]:
        job = f"train --model {base} --corpus {dialogues} --output {output} --method {method}"
        return [*f"{job} --max-steps 7 --save-steps 3 --batch-size 2 --max-length 32".split(), *more]

    return arguments
