"""Whoever carries this on finds at every public name what it is."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

MODULES = sorted((Path(__file__).parents[1] / "lightweight").rglob("*.py"))

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


def raised(function: ast.FunctionDef) -> set[str]:
    """Names of the exceptions that `function` raises itself, but for private ones and `pytest.UsageError`, which pytest
    shows to whoever typed the option."""
    found = set()
    for line in ast.walk(function):
        if isinstance(line, ast.Raise) and line.exc:
            name = ast.unparse(line.exc.func if isinstance(line.exc, ast.Call) else line.exc)
            if name[:1].isupper() or "." in name:  # else a variable, which was raised elsewhere before
                found.add(name.rpartition(".")[2])
    return {name for name in found if not name.startswith("_")} - {"UsageError"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_what_a_function_raises_is_named_there(path):
    unnamed = {
        name: missing
        for name, node in public(ast.parse(path.read_text("utf-8")).body)
        if isinstance(node, ast.FunctionDef)
        and (missing := {error for error in raised(node) if error not in (ast.get_docstring(node) or "")})
    }
    assert unnamed == {}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_list_of_attributes_has_every_field_in_order(path):
    classes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ClassDef)]
    for node in classes:
        doc = ast.get_docstring(node)
        if doc and (listed := re.search(r"^Attributes:\n((?:    .*\n?|\n)+)", doc, re.MULTILINE)):
            fields = [
                ast.unparse(line.target)
                for line in node.body
                if isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.unparse(line.annotation)
            ]
            assert re.findall(r"^    (\w+): ", listed[1], re.MULTILINE) == fields, node.name


def test_no_two_classes_have_one_name():
    """One noun for one thing, in the whole package."""
    places: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(path.stem)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
