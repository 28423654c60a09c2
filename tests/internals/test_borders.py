"""What is private or patched in a library is reached through `lightweight.internals` alone.

Read from the source where that tells: imports of private names, attributes of others' that begin with an underscore,
and library objects that are assigned to. Which methods are overridden, the classes themselves tell.
"""

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightweight import preload  # isort: skip  # noqa: F401  # before what imports peft

PACKAGE = Path(__file__).parents[2] / "lightweight"
INTERNALS = PACKAGE / "internals"
CONSTRAINTS = PACKAGE.parent / "constraints.txt"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != INTERNALS)
LIBRARIES = {"torch", "transformers", "accelerate", "peft", "bitsandbytes", "triton"}
PYTESTS = {"pytest", "_pytest", "pytest_benchmark", "xdist"}

DOCUMENTED = {"_replace", "_asdict", "_exit"}
"""Python's own that begin with an underscore and are no less public: of named tuples, and of `os`."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in DOCUMENTED


def library_names(module: ast.Module) -> set[str]:
    """What a module's imports call parts of the libraries."""
    names = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names |= {(name.asname or name.name).split(".")[0] for name in node.names if of_library(name.name)}
        elif isinstance(node, ast.ImportFrom) and of_library(node.module or ""):
            names |= {name.asname or name.name for name in node.names}
    return names


def of_library(module: str) -> bool:
    return module.split(".")[0] in LIBRARIES | PYTESTS or module == "lightweight.preload"  # which has peft


def defined(module: ast.Module) -> set[str]:
    """The private names that a module has or gives its own objects."""
    names = set()
    for node in ast.walk(module):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                names.add(name)
    return names


def offered(module: ast.Module) -> set[str]:
    """The names that a module has at its top, without those that it imports."""
    names = set()
    for node in module.body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case ast.Assign(targets=targets):
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def root(node: ast.expr) -> str:
    """The name that a chain of attributes, calls and items begins with."""
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def reached_into(module: ast.Module) -> Iterator[str]:
    """Where a module imports, reads or replaces what a library keeps to itself."""
    names, own = library_names(module), defined(module)
    for node in ast.walk(module):
        match node:
            case ast.ImportFrom(module=source) if of_library(source or ""):
                parts = [*(source or "").split("."), *(name.name for name in node.names)]
                if any(is_private(part) for part in parts if part != "_pytest") or parts[0] == "_pytest":
                    yield f"{node.lineno}: {ast.unparse(node)}"
            case ast.Import(names=modules):
                parts = [part for name in modules if of_library(name.name) for part in name.name.split(".")]
                if any(is_private(part) for part in parts):
                    yield f"{node.lineno}: {ast.unparse(node)}"
            case ast.Attribute(value=value, attr=name) if is_private(name):
                if ast.unparse(value) not in ("self", "cls") and (name not in own or root(value) in names):
                    yield f"{node.lineno}: {ast.unparse(node)}"
            case ast.Subscript(value=ast.Call(func=ast.Name(id="vars")), slice=ast.Constant(value=str(key))):
                if is_private(key):
                    yield f"{node.lineno}: {ast.unparse(node)}"
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[_, ast.Constant(value=str(key)), *_]):
                if is_private(key):
                    yield f"{node.lineno}: {ast.unparse(node)}"
            case ast.Assign(targets=targets) | ast.Delete(targets=targets):
                for target in targets:
                    if isinstance(target, ast.Attribute) and root(target) in names:
                        yield f"{node.lineno}: {ast.unparse(node)}"
            case ast.Call(func=function, args=[patched, *_]) if ast.unparse(function) in (
                "setattr",
                "mock.patch.object",
                "mock.patch.dict",
            ):
                if root(patched) in names:
                    yield f"{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_room_reaches_into_a_library(path):
    assert list(reached_into(ast.parse(path.read_text("utf-8")))) == []


@pytest.mark.parametrize("path", sorted(INTERNALS.glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_each_name_of_the_internals_is_in_its_librarys_test(path):
    """There it is seen that the library still has what is behind it."""
    public = {name for name in offered(ast.parse(path.read_text("utf-8"))) if not name.startswith("_")}
    tested = (Path(__file__).parent / f"test_{path.stem}.py").read_text("utf-8")
    assert public and {name for name in public if not re.search(rf"\b{name}\b", tested)} == set()


@pytest.mark.parametrize("path", sorted(INTERNALS.glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_each_library_was_read_in_the_version_that_is_tested(path):
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    read = re.findall(r"\d+(?:\.\d+)+", re.split("read in", docstring, flags=re.IGNORECASE)[-1])
    name = {"xdist": "pytest-xdist"}.get(path.stem, path.stem.replace("_", "-"))
    tested = re.search(rf"^{name}==(\S+)", CONSTRAINTS.read_text("utf-8"), re.MULTILINE)
    if tested is None:
        assert path.stem in sys.stdlib_module_names and read
    else:
        assert [version for version in read if f"{tested[1]}.".startswith(f"{version}.")]


@pytest.mark.parametrize(
    "line",
    [
        "from torch._subclasses import fake_tensor",
        "import torch._dynamo",
        "from peft.tuners.tuners_utils import _maybe_include_all_linear_layers",
        "import torch\ntorch._foreach_copy_(a, b)",
        "import torch\ntorch.ops.aten._softmax(x)",
        "model.config._attn_implementation = name",
        "import torch\ntorch.compile = later",
        "import torch\nmock.patch.object(torch.cuda, 'current_device', answer)",
        "vars(module)['_modules'] = {}",
        "getattr(module, '_parameters')",
        "from lightweight.preload import peft\ndel peft.get_peft_model",
    ],
)
def test_reaching_into_a_library_is_seen(line):
    assert len(list(reached_into(ast.parse(line)))) == 1


def test_no_class_overrides_a_private_method_of_a_librarys():
    """The Trainer's hooks have public names in `internals.transformers`, a dispatch mode's switch is in
    `internals.torch`."""
    overridden = []
    for path in FILES:
        if path.parent.name not in ("training", "captured", "forecast") or path.stem == "__init__":
            continue
        module = importlib.import_module(f"lightweight.{path.parent.name}.{path.stem}")
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if kind.__module__ == module.__name__:
                overridden += [f"{module.__name__}.{kind.__name__}.{name}" for name in private_overrides(kind)]
    assert overridden == []


def private_overrides(kind: type) -> list[str]:
    """The private methods of libraries that a class has its own of."""
    theirs = [base for base in kind.__mro__ if base.__module__.split(".")[0] in LIBRARIES]
    methods = [name for name, value in vars(kind).items() if is_private(name) and inspect.isroutine(value)]
    return [name for name in methods if any(name in vars(base) for base in theirs)]


def test_an_override_is_seen():
    class Mine(torch.nn.Module):
        def _apply(self, function):  # type: ignore[override]
            return self

    assert private_overrides(Mine) == ["_apply"]


def test_what_preload_imports_first_is_imported_where_it_is_asked_for():
    """bitsandbytes asks the GPU what it is while it is imported; peft and the Trainer import it."""
    for path in INTERNALS.glob("*.py"):
        module = ast.parse(path.read_text("utf-8"))
        first = [node for node in module.body if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = {name.name for node in first for name in node.names} | {getattr(node, "module", "") for node in first}
        assert not {module.split(".")[0] for module in modules} & {"peft", "bitsandbytes", "transformers"}, path.name
