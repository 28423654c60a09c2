"""What the READMEs tell people to type is understood, and their Python runs."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from conftest import turns
from lightweight import __main__, methods
from lightweight.methods import Method

READMES = [Path(__file__).parents[1] / name for name in ("README.md", "README.ko.md")]
each_readme = pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)


def commands(readme: Path, program: str) -> list[list[str]]:
    """The arguments of every command line of `program` in `readme`, without redirections."""
    lines = re.findall(rf"^    (?:.* && |python -m )?{program} (.*)$", readme.read_text("utf-8"), re.MULTILINE)
    return [shlex.split(line.partition(" >")[0], comments=True) for line in lines]


def blocks(readme: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", readme.read_text("utf-8"), re.MULTILINE | re.DOTALL)


@each_readme
def test_every_command_of_ours_is_one(readme):
    lines = commands(readme, "lightweight")
    assert {line[0] for line in lines} >= {"plan", "train", "chat", "report"}
    for line in lines:
        __main__.parser().parse_args(line)  # exits where it does not understand


@each_readme
def test_every_option_of_pytest_is_one(readme, request):
    lines = commands(readme, "pytest")
    assert any("experiments" in line for line in lines) and any("-n" in line for line in lines)
    for line in lines:
        _, unknown = request.config._parser.parse_known_and_unknown_args(line)
        assert not unknown, f"pytest {shlex.join(line)}"


@each_readme
def test_the_method_can_be_named(readme, tmp_path, monkeypatch):
    (code,) = (block for block in blocks(readme) if "MINE" in block)
    (tmp_path / "mine.py").write_text(code, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert isinstance(methods.named("mine:MINE"), Method)


@each_readme
def test_the_experiment_of_ones_own_runs(readme, pytester, without_gpu):
    (code,) = (block for block in blocks(readme) if "def test_" in block)
    pytester.makeconftest('pytest_plugins = ["lightweight.plugin"]')
    # a twin learns by all its parameters alone, and in seconds
    pytester.makepyfile(code.replace('"smollm2-135m", "lora"', '"opt-tiny", "baseline"'))
    (pytester.path / "corpus.json").write_text(json.dumps(turns(24)), "utf-8")
    pytester.runpytest("-p", "no:cacheprovider").assert_outcomes(passed=1)
