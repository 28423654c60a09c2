"""Imports go one way between the rooms of `lightweight`, and each room leaves alone what is not its own.

Read from the source, with the imports inside functions. Those for type checkers alone do not count.
"""

import ast
import importlib
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightweight"
ROOMS = sorted(file.parent.name for file in PACKAGE.glob("*/__init__.py"))

PYTEST = {"pytest", "_pytest", "pytest_benchmark", "xdist"}
NETWORKS = {"torch", "transformers", "peft", "accelerate", "bitsandbytes"}
TOPS = {file.stem for file in PACKAGE.glob("*.py")}
UNDER_THE_TOP = {"internals", "models", "methods", "corpus"}
ENTRANCES = {"plugin", "__main__"}
ABOVE = {"report", "session", "cli"} | ENTRANCES
TRAINING = {"training", "captured", "child", "forecast"}

FORBIDDEN = {
    "corpus": ABOVE | PYTEST | TRAINING | {"verdict", "record", "trial", "methods", "targets", "internals"},
    "models": ABOVE | PYTEST | TRAINING | {"verdict", "record", "trial", "corpus", "methods"},
    "methods": ABOVE | PYTEST | TRAINING | {"verdict", "record", "trial", "corpus", "targets", "settings"},
    "internals": (set(ROOMS) - {"internals"}) | TOPS,
    "training": ABOVE | PYTEST | {"verdict", "record", "child", "captured", "forecast"},
    "captured": ABOVE | PYTEST | {"verdict", "record", "child", "forecast"},
    "child": ABOVE | PYTEST | {"verdict", "record", "forecast"},
    "forecast": ABOVE | PYTEST | {"verdict", "child"},
    "record": ABOVE | NETWORKS | PYTEST | TRAINING | {"verdict", "internals"},
    "verdict": ENTRANCES | NETWORKS | PYTEST | TRAINING | {"session", "cli", "internals", "report"},
    "report": ENTRANCES | NETWORKS | PYTEST | TRAINING | {"session", "cli", "internals"},
    "session": ENTRANCES | {"cli"},
    "cli": ENTRANCES | PYTEST | {"session"},
}
"""What no module of a room imports: rooms and top modules of ours, and packages of others."""


def imports(node: ast.AST) -> Iterator[str]:
    """What `node` imports at run time: the room or top module for ours, the package for others'."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Import | ast.ImportFrom):
        of = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
        if of == ["lightweight"]:
            of = [name.name for name in node.names]
        yield from (name.removeprefix("lightweight.").partition(".")[0] for name in of)
    for part in ast.iter_child_nodes(node):
        yield from imports(part)


def imported_by(*files: Path) -> set[str]:
    """What any of `files` imports."""
    return {name for file in files for name in imports(ast.parse(file.read_text("utf-8")))}


def test_every_room_has_borders_and_names_its_question():
    assert sorted(FORBIDDEN) == ROOMS
    assert all("?" in (PACKAGE / room / "__init__.py").read_text("utf-8") for room in ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_no_import_crosses_a_border(room):
    assert not imported_by(*(PACKAGE / room).glob("*.py")) & FORBIDDEN[room]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_offers_what_it_has(room):
    face = importlib.import_module(f"lightweight.{room}")
    assert [name for name in getattr(face, "__all__", []) if not hasattr(face, name)] == []


def modules_imported(node: ast.AST, modules: set[str]) -> Iterator[str]:
    """Those of `modules`, by their names with dots, that `node` imports, if only for type checkers: what of a room is
    named, or the room's own module."""
    if isinstance(node, ast.Import):
        yield from (name.name for name in node.names if name.name in modules)
    if isinstance(node, ast.ImportFrom):
        for name in node.names:
            whole = f"{node.module}.{name.name}"
            yield from [each for each in (whole, node.module or "") if each in modules][:1]
    for part in ast.iter_child_nodes(node):
        yield from modules_imported(part, modules)


def test_imports_between_modules_have_no_circle():
    """Nor between rooms, but that a room's face imports its modules."""
    files = {
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): file
        for file in PACKAGE.rglob("*.py")
    }
    graph = {name: {*modules_imported(ast.parse(file.read_text("utf-8")), set(files))} for name, file in files.items()}
    list(TopologicalSorter(graph).static_order())
    graph = {room: (imported_by(*(PACKAGE / room).glob("*.py")) & set(ROOMS)) - {room} for room in ROOMS}
    list(TopologicalSorter(graph).static_order())


def test_the_rooms_are_listed_and_each_imports_what_is_below_it():
    """In the order of docs/design.md, from the top down; what shares a line may import each other."""
    lines = (PACKAGE.parent / "docs" / "design.md").read_text("utf-8").splitlines()
    listed = [re.findall(r"`(\w+)/?`", line.split("|")[1]) for line in lines if line.startswith("| ")]
    floor = {name: number for number, names in enumerate(listed) for name in names}
    assert set(floor) == (TOPS | set(ROOMS)) - {"__init__"}
    for name, number in floor.items():
        files = [*(PACKAGE / name).glob("*.py")] or [PACKAGE / f"{name}.py"]
        assert not {other for other in imported_by(*files) & set(floor) if floor[other] < number}, name


def test_of_the_top_modules_the_entrances_alone_import_rooms_and_the_plugin_alone_pytest():
    tops = {file.stem: imported_by(file) for file in PACKAGE.glob("*.py")}
    assert {name for name, of in tops.items() if of & (set(ROOMS) - UNDER_THE_TOP)} == ENTRANCES
    assert {name for name, of in tops.items() if of & PYTEST} == {"plugin"}


def test_what_is_private_to_pytest_is_reached_by_the_session_and_the_plugin_alone():
    """A child imports none of it, and a module of `internals` imports the library that it is named after."""
    users = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightweight.internals"):
                modules = {(node.module or "").rpartition(".")[2], *(name.name for name in node.names)}
                users |= {file.relative_to(PACKAGE).parts[0]} if modules & PYTEST else set()
    assert users == {"session", "plugin.py"}


def test_of_the_internals_those_of_pytests_plugins_alone_import_pytest():
    files = {file.stem for file in (PACKAGE / "internals").glob("*.py") if imported_by(file) & PYTEST}
    assert files <= {"pytest", "pytest_benchmark", "xdist"}
