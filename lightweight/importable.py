"""Which function is this, and is it still the same? A method's own code by its import path and its source.

A trial goes into another process, which finds a function by the name of its module; and a record tells a method whose
function was changed since from what it was. Imports nothing that takes long.
"""

from __future__ import annotations

import functools
import importlib
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

from lightweight import reached
from lightweight.reached import ROOT, is_installed, is_package_folder


def import_path(value: Any) -> str:
    """Where another process finds `value`, a function or a class: `package.module:NAME`. Raises ValueError, with what
    keeps it from being found, in words that come after its name."""
    if isinstance(value, functools.partial):
        return import_path(value.func)
    if not isinstance(value, type | FunctionType | BuiltinFunctionType):
        kind = type(value).__name__
        raise ValueError(f"is a {kind}: give a function or a class of a module, or functools.partial of one")
    module, name = value.__module__, value.__qualname__
    if "<" in name:
        raise ValueError(f"is {name}, which no other process can import: define it at the top level of a module")
    if module == "__main__" or not _is_found(module.partition(".")[0]):
        raise ValueError(f"is in {module}, which no other process can import: put it into a module that can be")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not value:
        raise ValueError(f"is {module}:{name} no longer: that name now means something else: give it another name")
    return f"{module}:{name}"


def described(value: Any) -> Any:
    """What tells `value` from others, as plain JSON: a function or class by its import path and the SHA-256 of its
    source, a partial also by what it has been given. Raises ValueError for one that cannot be imported."""
    match value:
        case tuple() | list():
            return [described(item) for item in value]
        case Mapping():
            return {str(key): described(item) for key, item in value.items()}
        case functools.partial():
            own = described(value.func)
            return own | {"args": described(value.args), "keywords": described(value.keywords)}
    if not callable(value):
        return value if isinstance(value, str | int | float | bool | None) else reached.text(value)
    path, digest = import_path(value), source_digest(value)
    return {"import_path": path} | ({} if digest is None else {"source_sha256": digest})


def source_digest(value: Any) -> str | None:
    """SHA-256 over the source of `value`, a function or class, and of what it names in modules that are not installed;
    None for one of an installed package, which its version tells. Raises ValueError where there is no source."""
    if is_installed(sys.modules[value.__module__]):
        return None
    return reached.digest(value)


def module_of(file: Path) -> str:
    """The name by which `file`, a Python file, is imported, also by the processes that this one starts. Raises
    ValueError."""
    file = file.absolute()
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    root, parts = file.parent, [file.stem]
    while (root / "__init__.py").is_file():
        root, parts = root.parent, [root.name, *parts]
    if not all(part.isidentifier() for part in parts):
        raise ValueError(f"{file.name} has no name that Python can import: name it with letters, digits and _")
    if str(root) not in sys.path:
        sys.path.append(str(root))
        importlib.invalidate_caches()
    name = ".".join(parts)
    found = getattr(importlib.import_module(name), "__file__", None)
    if found is None or not file.samefile(found):
        raise ValueError(f"{name} is already the name of {found or 'a built-in module'}: give the file another name")
    return name


def place_of(error: BaseException) -> str | None:
    """Where in code that is not installed `error` was raised, or what raised it was called: `function in file.py, line
    3`; None where no such code was running. By its file: of a module that could not be imported nothing else is
    left."""
    place = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename)
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if file.is_file() and package != ROOT and not any(map(is_package_folder, file.parents)):
            function = "" if frame.f_code.co_name == "<module>" else f"{frame.f_code.co_name} in "
            place = f"{function}{file.name}, line {line}"
    return place


def _is_found(package: str) -> bool:
    """Whether a new process with the same path finds `package`."""
    finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
    return any(find is not None and find(package, None) is not None for find in finders)
