"""Whoever carries this on finds at every public name what it is."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

MODULES = sorted((Path(__file__).parents[1] / "lightweight").glob("*.py"))

THEIR_HOOKS = ("pytest_", "on_")
"""Names that pytest's and the Trainer's documentation explain."""


def public(body: list[ast.stmt], owner: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Classes, functions and methods with names of our own, without what only fulfils a protocol by doing nothing."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith(("_", *THEIR_HOOKS)):
            if [ast.unparse(line) for line in node.body] != ["..."]:
                yield owner + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{node.name}.")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_public_name_says_what_it_is(path):
    module = ast.parse(path.read_text("utf-8"))
    assert ast.get_docstring(module) or not module.body
    assert [name for name, node in public(module.body) if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_what_a_function_raises_is_said_there(path):
    """But for `pytest.UsageError`, which pytest shows to whoever typed the option."""
    silent = [
        name
        for name, node in public(ast.parse(path.read_text("utf-8")).body)
        if isinstance(node, ast.FunctionDef) and "aise" not in (ast.get_docstring(node) or "")
        for line in ast.walk(node)
        if isinstance(line, ast.Raise) and line.exc and not ast.unparse(line.exc).startswith(("_", "pytest.UsageError"))
    ]
    assert silent == []
