"""`pytest tests/faults` injects a sample of every class of faults; `--faults` all of them. Both print how many were
tried and survived."""

import json
from collections import Counter
from pathlib import Path

import pytest
from tabulate import tabulate

from conftest import turns
from lightweight import models

TRIED, SURVIVED = Counter(), Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", action="store_true", help="inject every fault, not a sample of each class")


@pytest.fixture
def whole(request) -> bool:
    """Whether every fault of a class is asked for."""
    return bool(request.config.getoption("--faults", default=False))


@pytest.fixture
def tried(request):
    """Counts one fault of the class that the test's module or function is called by."""

    def count(name: str, *, survived: bool = True) -> None:
        request.node.user_properties.append(("fault", (name, survived)))

    return count


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        for key, value in report.user_properties:
            if key == "fault":
                TRIED[value[0]] += 1
                SURVIVED[value[0]] += bool(value[1])


def pytest_terminal_summary(terminalreporter) -> None:
    if TRIED:
        rows = [(name, TRIED[name], SURVIVED[name]) for name in sorted(TRIED)]
        terminalreporter.section("faults")
        terminalreporter.write_line(tabulate(rows, ("what", "tried", "survived"), tablefmt="github"))


METHODS = """
from dataclasses import replace
from lightweight import methods

def constant(name):
    method = methods.METHODS[name]
    return replace(method, training_arguments={**method.training_arguments, "lr_scheduler_type": "constant"})

STOCK, CAPTURED = constant("baseline"), constant("lora-captured")
"""
"""With a constant rate a step too many is seen in the weights."""


@pytest.fixture(scope="session")
def dialogues(tmp_path_factory) -> Path:
    """8 pairs to train on, four steps an epoch at two a step."""
    path = tmp_path_factory.mktemp("dialogues") / "corpus.json"
    path.write_text(json.dumps(turns(10)), "utf-8")
    return path


@pytest.fixture
def given(without_gpu, base, dialogues, tmp_path, monkeypatch):
    """The command of a job of seven steps, which ends within an epoch and has checkpoints after 3, 6 and 7."""
    (tmp_path / "constant.py").write_text(METHODS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(models.__file__).parents[1]}")

    def arguments(output: Path, *more: str, method: str = "constant:STOCK") -> list[str]:
        job = f"train --model {base} --corpus {dialogues} --output {output} --method {method}"
        return [*f"{job} --max-steps 7 --save-steps 3 --batch-size 2 --max-length 32".split(), *more]

    return arguments
