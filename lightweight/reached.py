"""What does an author's function depend on? All of its code that is not installed, and the values that it reads.

From a function or class it goes on to whatever its source names: functions and classes in their modules, what a closure
or a partial holds, modules, whether imported in a module or in a function, and with a module all that this imports. A
value counts as a text that every process has alike. What is looked up by a name that is made while it runs, and what is
read from a file or the environment, nobody sees. Imports nothing that takes long.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import json
import re
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from importlib.machinery import PathFinder
from numbers import Number
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

ROOT = __name__.partition(".")[0]

WRITTEN_ALIKE = str | bytes | Number | range | slice | None
"""Values whose repr says all of them, in every process."""


def digest(value: Any) -> str:
    """SHA-256 over the source of `value`, a function or class that is not installed, and of all that it reaches. Raises
    ValueError where there is no source."""
    found = _Reached()
    found.code(value)
    return hashlib.sha256(json.dumps(found.texts, sort_keys=True).encode()).hexdigest()


def text(value: Any) -> str:
    """`value` as a text that every process has alike, with a digest of the author's code in it. Raises ValueError where
    there is no source of that."""
    found = _Reached()
    told = found.text(value)
    if not found.texts:
        return told
    return f"{told} {hashlib.sha256(json.dumps(found.texts, sort_keys=True).encode()).hexdigest()}"


def packages(value: Any) -> set[str]:
    """The top-level names of what `value` is of, and of what those of the author's modules import in which the code is
    that it reaches. Raises ValueError where there is no source."""
    found = _Reached()
    found.text(value)
    files = [Path(file) for file in found.modules.values() if file and file.endswith(".py")]
    names = {name for file in files for name in imported(ast.parse(file.read_bytes()), [])}
    return found.installed | {name.partition(".")[0] for name in names}


def imported(tree: ast.Module, package: Sequence[str]) -> Iterator[str]:
    """The modules that `tree`, of a module in `package`, may import, with their packages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = list(package[: len(package) - node.level + 1]) if node.level else []
            of = ".".join([*above, *([node.module] if node.module else [])])
            yield of
            yield from (f"{of}.{name.name}" for name in node.names)


@functools.cache
def is_package_folder(folder: Path) -> bool:
    """Whether packages are installed in `folder`, Python's own included."""
    own = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return folder in own or any(folder.glob("*.dist-info"))


def is_installed(module: ModuleType) -> bool:
    """Whether `module` is of a package whose version tells what it is: an installed one, Python's own, or this."""
    package = sys.modules.get(module.__name__.partition(".")[0], module)
    file = getattr(package, "__file__", None)
    return file is None or package.__name__ == ROOT or _is_installed_file(file)


def _is_installed_file(file: str) -> bool:
    path = Path(file).absolute()
    return is_package_folder(path.parent.parent if path.stem == "__init__" else path.parent)


class _Reached:
    """By their names the `texts` of what is reached: sources, and values; and of which `installed` packages something
    is."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.modules: dict[str, str | None] = {}  # in which those sources are, with their files
        self.installed: set[str] = set()
        self._keys: dict[int, tuple[str, Any]] = {}  # with what has the id, so that it stays its own
        self._open: set[int] = set()

    def code(self, value: Any) -> str:
        """Add the source of `value`, a function or class, and what it names; by which key."""
        if id(value) in self._keys:
            return self._keys[id(value)][0]
        module = sys.modules[value.__module__]
        name = f"{value.__module__}:{value.__qualname__}"
        others = sum(key.partition("#")[0] == name for key, _ in self._keys.values())
        key = f"{name}#{others}" if others else name  # closures of one function, and lambdas, share a name
        self._keys[id(value)] = key, value
        try:
            source = textwrap.dedent(inspect.getsource(value))
        except (OSError, TypeError) as error:
            if not (isinstance(value, type) and getattr(module, "__file__", None)):
                raise ValueError(f"is {name}, whose source cannot be read ({error}): keep it in a file") from error
            self._module(module.__name__, module.__file__)  # a class that a call has made, such as namedtuple's
            return key
        self._source(key, source, module)
        self._held(value, key)
        return key

    def _source(self, key: str, source: str, module: ModuleType) -> None:
        """Add `source`, of `module`, and what it names."""
        self.texts[key] = source
        self.modules[module.__name__] = module.__file__
        try:
            tree = ast.parse(source)
        except SyntaxError:  # a lambda in the middle of an expression: all of its module counts
            self._module(module.__name__, module.__file__)
        else:
            self._named_in(tree, module)
            self._imports(tree, module.__package__ or "")

    def text(self, value: Any) -> str:
        """`value` as every process has it; the author's code in it is added."""
        if isinstance(value, WRITTEN_ALIKE):
            return repr(value)
        if id(value) in self._open:
            return "..."
        self._open.add(id(value))
        try:
            return self._text(value)
        finally:
            self._open.remove(id(value))

    def _text(self, value: Any) -> str:
        match value:
            case ModuleType():
                if not is_installed(value):
                    self._module(value.__name__, value.__file__)
                return value.__name__
            case functools.partial():
                return f"partial({self.text(value.func)}, {self.text(value.args)}, {self.text(value.keywords)})"
            case MethodType():
                return f"{self.text(value.__self__)}.{value.__name__}"
            case type() | FunctionType() | BuiltinFunctionType():
                return self._name_of(value)
            case Enum():
                return f"{self._name_of(type(value))}.{value.name}"
            case re.Pattern():
                return f"re({value.pattern!r}, {value.flags})"
            case dict():
                return self._called(value, dict, "{%s}", [f"{self.text(k)}: {self.text(v)}" for k, v in value.items()])
            case list():
                return self._called(value, list, "[%s]", [self.text(item) for item in value])
            case tuple():
                items = [self.text(item) for item in value]
                return self._called(value, tuple, "(%s,)" if len(items) == 1 else "(%s)", items)
            case set() | frozenset():
                return self._called(value, set, "{%s}", sorted(self.text(item) for item in value))
        if isinstance(getattr(value, "__wrapped__", None), FunctionType):  # such as functools.cache's
            return self._name_of(value.__wrapped__)
        return self._object(value)

    def _called(self, value: Any, kind: type, form: str, items: Sequence[str]) -> str:
        told = form % ", ".join(items)
        return told if type(value) is kind else f"{self._name_of(type(value))}({told})"

    def _name_of(self, value: Any) -> str:
        """The name of a function or class, whose source is added if it is not installed."""
        if _is_of_package(value):
            self.installed.add((value.__module__ or "").partition(".")[0])
            return f"{value.__module__}:{value.__qualname__}"
        return self.code(value)

    def _object(self, value: Any) -> str:
        """An object by its class, and by its values where these are known to say what it is: numbers, dataclasses, what
        the author's classes have, and modules of a network."""
        of = self._name_of(type(value))
        if (numbers := _numbers(value)) is not None:
            return f"{of}({numbers})"
        if dataclasses.is_dataclass(value):
            said = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
            defaults = {field.name: _default(field) for field in dataclasses.fields(value)}
            said = {name: item for name, item in said.items() if not _is_same(item, defaults[name])}
        elif _is_of_torch(value, "nn", "Module") or not _is_of_package(type(value)):
            said = {name: item for name, item in getattr(value, "__dict__", {}).items() if not _is_idle(name, item)}
        else:
            return str(value) if _is_of_torch(value, "dtype") or _is_of_torch(value, "device") else of
        return f"{of}({self.text(said)})"

    def _named_in(self, tree: ast.AST, module: ModuleType) -> None:
        """Add what the names in `tree` stand for in `module`."""
        folder = str(Path(module.__file__ or "").parent)
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        for name in sorted(names & vars(module).keys()):
            value = vars(module)[name]
            told = self.text(value)
            if getattr(value, "__name__", None) == name:
                continue  # which the source says
            self.texts[f"{module.__name__}:{name}"] = told.replace(folder, "") if len(folder) > 1 else told
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(value := _attribute(node, module), ModuleType):
                self.text(value)

    def _held(self, value: Any, key: str) -> None:
        """Add what a function holds that its source does not say: what it encloses, and if it was made in another one
        its defaults."""
        layer = value
        while isinstance(layer, FunctionType):
            within = getattr(layer, "__wrapped__", None)
            if not _is_installed_file(layer.__code__.co_filename):
                for name, cell in zip(layer.__code__.co_freevars, layer.__closure__ or (), strict=True):
                    if (held := _content(cell)) is not value and held is not within:
                        self.texts[f"{key}({name})"] = self.text(held)
                if "<" in layer.__code__.co_qualname and layer.__defaults__:
                    self.texts[f"{key}()"] = self.text(layer.__defaults__)
                if within is not None:  # a decorator's
                    wrapper = textwrap.dedent(inspect.getsource(layer.__code__))
                    self._source(
                        f"{key}@{layer.__code__.co_qualname}", wrapper, sys.modules[layer.__globals__["__name__"]]
                    )
            layer = within

    def _imports(self, tree: ast.Module, package: str) -> None:
        """Add the modules that `tree`, in `package`, imports, in functions as well."""
        for name in imported(tree, package.split(".") if package else []):
            for module, file in _files_of(name):
                if _is_installed_file(file) or module == ROOT:
                    break
                self._module(module, file)

    def _module(self, name: str, file: str | None) -> None:
        """Add a whole module, and what it imports."""
        if name in self.texts or file is None:
            return
        try:
            self.texts[name] = source = Path(file).read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")
        except OSError as error:
            raise ValueError(f"needs module {name}, whose source cannot be read ({error.strerror})") from error
        self.modules[name] = file
        if file.endswith(".py"):
            package = name if Path(file).stem == "__init__" else name.rpartition(".")[0]
            self._imports(ast.parse(source), package)


def _is_of_package(value: Any) -> bool:
    module = sys.modules.get(value.__module__ or "")
    return module is None or is_installed(module)


def _attribute(node: ast.AST, module: ModuleType) -> Any:
    """What `a.b.c` stands for in `module` as far as it leads through modules, None for anything else."""
    if isinstance(node, ast.Name):
        return vars(module).get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(of := _attribute(node.value, module), ModuleType):
        return vars(of).get(node.attr)
    return None


def _files_of(module: str) -> Iterator[tuple[str, str]]:
    """The packages that `module` is in, from the outermost, and itself, each with its file. Nothing is imported."""
    parts = module.split(".")
    try:
        spec = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError):
        return
    for count in range(1, len(parts) + 1):
        if spec is None:
            return
        if spec.has_location and spec.origin:
            yield ".".join(parts[:count]), spec.origin
        if spec.submodule_search_locations is None or count == len(parts):
            return
        spec = PathFinder.find_spec(".".join(parts[: count + 1]), spec.submodule_search_locations)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None


def _is_of_torch(value: Any, *path: str) -> bool:
    """Whether `value` is of a class of torch's, which is not imported to say so."""
    kind: Any = sys.modules.get("torch")
    for part in path:
        kind = getattr(kind, part, None)
    return isinstance(kind, type) and isinstance(value, kind)


def _numbers(value: Any) -> str | None:
    """A tensor's or array's format, shape and digest; None for anything else."""
    if _is_of_torch(value, "Tensor"):
        torch: Any = sys.modules["torch"]
        try:
            whole = value.detach().cpu().contiguous()
            raw = whole.reshape(-1).view(torch.uint8).numpy().tobytes()
        except (RuntimeError, NotImplementedError, TypeError):  # no values, as on meta, or none in a row
            raw = b""
    elif type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
        raw = value.tobytes()
    else:
        return None
    return f"{value.dtype}, {tuple(value.shape)}, {hashlib.sha256(raw).hexdigest()}"


def _default(field: dataclasses.Field[Any]) -> Any:
    make: Callable[[], Any] | Any = field.default_factory
    return field.default if make is dataclasses.MISSING else make()


def _is_same(value: Any, default: Any) -> bool:
    try:
        return type(value) is type(default) and bool(value == default)
    except (RuntimeError, TypeError, ValueError):  # of tensors there is no one answer
        return False


def _is_idle(name: str, value: Any) -> bool:
    """Whether an attribute is a private one with nothing in it."""
    return name.startswith("_") and (value is None or value is False or (hasattr(value, "__len__") and not len(value)))
