"""What repeats a published table with one command? A folder, or a zip file of it, with all that its runs were made of.

The records; the tests that ran, and the modules that they and the methods are from; the corpus; lightweight itself; the
versions that were installed; and a script that makes an environment of them, runs the same cells and holds them against
the records. What is put in is first shown to be what the records are of: a method by its digest, the corpus by its.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shlex
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import packages_distributions, version
from pathlib import Path

import lightweight
from lightweight import corpus, files, methods, record
from lightweight.child import reaper
from lightweight.methods import Method
from lightweight.reached import imported
from lightweight.record import Entry, Run
from lightweight.settings import OF_CORPUS, Settings, how_read, with_changed

LOADED_IF_ASKED = {"unsloth", "unsloth_zoo"}
"""Packages that the suite imports for a method of theirs alone, whose version the record then has."""

PYTORCH = "https://download.pytorch.org/whl"
"""Where torch's own builds are, one index a CUDA: `2.11.0+cu130` is in `PYTORCH/cu130`."""


class BundleError(ValueError):
    """A bundle that cannot be made, or that would repeat something else. The message names the thing and the mend."""


@dataclass(frozen=True)
class _Places:
    """Where the files lie that a command names: in pytest's `root`, and what lay elsewhere, which a command names
    without its folder, in one of `others`."""

    root: Path
    others: Sequence[Path]

    def find(self, name: str) -> Path | None:
        """The file or folder of that name, None where there is none. It has that name in the bundle, too, and one that
        leads out of a folder is none."""
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return None
        for folder in (self.root, *self.others):
            path = (folder / name).resolve()
            if path.exists() and path.is_relative_to(folder.resolve()):
                return path
        return None

    def the(self, what: str, name: str) -> Path:
        """The file or folder of that name, which is `what`. Raises BundleError."""
        if (found := self.find(name)) is None:
            raise BundleError(
                f"--bundle: {what} {name} is not here: run this in the folder in which pytest ran, and "
                "give the folder of a file that was elsewhere with --files"
            )
        return found


def write(path: Path, runs: Sequence[Run], others: Sequence[Path] = ()) -> str:
    """Write the bundle of `runs`, which pytest ran here, to the folder or the zip file `path`; what is to be known of
    it, in a line. What lay elsewhere is looked for in `others`, folders. Raises BundleError."""
    places = _Places(Path.cwd().resolve(), others)
    for run in runs:
        if not run.command or not run.entries:
            raise BundleError(
                f"--bundle: record {run.path} does not say by which command it was made: run it again with this version"
            )
    try:
        is_free = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
        if os.path.lexists(path) and not is_free:
            raise BundleError(f"--bundle {path}: already exists: give another name")
        files.check(path / "in it" if is_free else path)
        with reaper.own.temporary_folder(path.absolute().parent) as scratch:
            folder = scratch / (path.stem if path.suffix == ".zip" else path.name)
            folder.mkdir()
            notes = _fill(folder, runs, places)
            made = _zip(folder) if path.suffix == ".zip" else folder
            made.rename(path)  # in the place of an empty folder, but of nothing that has come there since
    except OSError as error:
        what = f"{error.filename} cannot be read or written" if error.filename else "cannot be written"
        raise BundleError(f"--bundle {path}: {what} ({error.strerror})") from error
    return f"{path}: sh {'' if path.suffix == '.zip' else f'{path}/'}repeat.sh repeats it" + "".join(
        f"; {note}" for note in notes
    )


def _fill(folder: Path, runs: Sequence[Run], places: _Places) -> list[str]:
    """Put everything into `folder`; what is not in it, and must be had otherwise."""
    notes: list[str] = []
    (folder / "records").mkdir()
    names = _file_names(runs)
    for run, name in zip(runs, names, strict=True):
        shutil.copy(run.path, folder / "records" / name)
    needed: dict[str, Path] = {}  # by their place in the bundle
    named: set[str] = set()
    for run in runs:
        sources = _sources(run, places)
        named |= {name for name in sources if not name.endswith(".py")}
        needed |= sources
        needed |= _data(run, places, notes)
        _check_methods(run, places)
        notes += [note for note in _models(run) if note not in notes]
    if named:
        notes.append(
            f"{', '.join(sorted(named))}: as now, since a record does not say what was in files that the code names"
        )
    for name, source in needed.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, place)
        else:
            shutil.copy(source, place)
    shutil.copytree(
        Path(lightweight.__file__).parent, folder / "lightweight", ignore=shutil.ignore_patterns("__pycache__")
    )
    (folder / "pytest.ini").write_text("[pytest]\n", "utf-8")
    (folder / "requirements.txt").write_text(_requirements(runs, folder.rglob("*.py")), "utf-8")
    (folder / "repeat.sh").write_text(_script(runs, names), "utf-8")
    (folder / "repeat.sh").chmod(0o755)
    (folder / "README.md").write_text(_readme(runs, notes), "utf-8")
    return notes


def _file_names(runs: Sequence[Run]) -> list[str]:
    """What the records are called in the bundle: as they are, numbered where two have one name."""
    names = [run.path.name for run in runs]
    return [f"{number}-{name}" if names.count(name) > 1 else name for number, name in enumerate(names)]


# What the runs were made of


def _said(run: Run, option: str) -> list[str]:
    """What the command of `run` says for an option."""
    start = f"--{option}="
    return [argument.removeprefix(start) for argument in run.command if argument.startswith(start)]


def _sources(run: Run, places: _Places) -> dict[str, Path]:
    """The tests of `run`, what configures them, and all modules beside them that they and its methods import, by their
    place in the bundle. Raises BundleError for a test that is not there."""
    root = places.root
    tests = list(dict.fromkeys(entry.test.partition("::")[0] for entry in run.entries if entry.test))
    if not tests:
        raise BundleError(f"--bundle: record {run.path} does not say which tests made it")
    found: list[Path] = []
    for test in tests:
        file = (root / test).resolve()
        if not file.is_file() or not file.is_relative_to(root):
            raise BundleError(
                f"--bundle: record {run.path}: {test} is not here: run this in the folder in which pytest ran"
            )
        above = [folder for folder in (file.parent, *file.parent.parents) if folder.is_relative_to(root)]
        found += [file, *(conftest for folder in above if (conftest := folder / "conftest.py").is_file())]
    elsewhere: list[Path] = []
    for name in _said(run, "method"):
        where = name.rpartition(":")[0]
        if name in methods.METHODS:
            continue
        if where.endswith(".py"):
            file = places.the(f"method {name}: its file", where)
            (found if file.is_relative_to(root) else elsewhere).append(file)
        elif files := _of_module(where, root):
            found += files
        else:
            raise BundleError(
                f"--bundle: method {name}: its module is not here: run this in the folder in which pytest ran"
            )
    sources = {file.relative_to(root).as_posix(): file for file in _with_imports(found, root)}
    for method in elsewhere:
        beside = method.parent
        sources |= {file.relative_to(beside).as_posix(): file for file in _with_imports([method], beside)}
    return sources


def _named_beside(tree: ast.Module, folder: Path) -> Iterator[Path]:
    """Files beside a module that it names, such as a text that it reads: in its folder, or in one that is in that."""
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    for text in sorted(text for text in texts if re.match(r"[\w-]", text) and len(text.encode()) < 200):
        file = folder / text
        is_hidden = any(part.startswith(".") for part in Path(text).parts)  # such as .. and .env
        if "\0" not in text and not is_hidden and file.is_file() and file.resolve().is_relative_to(folder.resolve()):
            yield file


def _of_module(name: str, root: Path) -> list[Path]:
    """The file of a module under `root`, and those of the packages that it is in; none where it is elsewhere."""
    files = []
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:count])
        files += [file for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file()]
    whole = root.joinpath(*parts)
    return files if whole.is_dir() or whole.with_suffix(".py").is_file() else []


def _with_imports(files: Iterable[Path], root: Path) -> Iterator[Path]:
    """`files`, what they name beside them, and every module under `root` that they import, lightweight's own left
    out."""
    ours = Path(lightweight.__file__).parent
    waiting, seen = list(files), set()
    while waiting:
        file = waiting.pop()
        if file in seen or file.is_relative_to(ours):
            continue
        seen.add(file)
        yield file
        if file.suffix != ".py":
            continue
        tree = _parsed(file)
        waiting += _named_beside(tree, file.parent)
        package = list(file.parent.relative_to(root).parts)
        for name in imported(tree, package):
            waiting += _of_module(name, root)
            waiting += _of_module(".".join([*package, name]), root)  # pytest has a test's folder on its path


def _parsed(file: Path) -> ast.Module:
    """Raises BundleError."""
    try:
        return ast.parse(file.read_text("utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise BundleError(f"--bundle: {file} cannot be read ({error})") from error


def _check_methods(run: Run, places: _Places) -> None:
    """Whether the methods that the command names are those of the record. Raises BundleError where one has changed."""

    def said(setting: str) -> str | None:
        given = next(iter(_said(run, setting.replace("_", "-"))), None)
        is_file = setting == "learning_rate" and given is not None and given.endswith(".json")
        return str(places.the("the rates", given)) if is_file and given else given

    def as_here(name: str) -> str:
        where, _, of = name.rpartition(":")
        return f"{places.the('method', where)}:{of}" if where.endswith(".py") else name

    sys.path.insert(0, str(places.root))
    try:
        settings = Settings.read(said)
        named = settings.applied(methods.named(as_here(name)) for name in _said(run, "method"))
        _check_unchanged(run, named)  # while modules are found here
    except BundleError:
        raise
    except ValueError as error:
        raise BundleError(f"--bundle: {error}") from error
    finally:
        sys.path.remove(str(places.root))


def _check_unchanged(run: Run, named: Sequence[Method]) -> None:
    """Raise BundleError for one of `named` that is not what `run` has of its name."""
    for method in named:
        for entry in (entry for entry in run.entries if entry.method == method.name):
            by_the_test = {name: value for name, value in (entry.changed or {}).items() if name not in method.changed}
            here = with_changed(method, by_the_test, entry.world_size)
            if record.method_digest(here) != entry.method_digest:
                differing = record.arguments_told(entry.training_arguments, here.training_arguments)
                raise BundleError(
                    f"--bundle: method {method.name} has changed since record {run.path}: "
                    f"{differing or 'its digest differs'}; run it again, or undo the change"
                )


def _data(run: Run, places: _Places, notes: list[str]) -> dict[str, Path]:
    """What `run` was trained on, asked, and given rates from, by its place in the bundle. Raises BundleError where it
    is another corpus or task than the record's."""
    flags = {one.name.replace("-", "_"): f"--{one.name}" in run.command for one in OF_CORPUS}
    how = how_read(lambda name: flags[name] or next(iter(_said(run, name.replace("_", "-"))), None))
    rates = [name for name in _said(run, "learning-rate") if name.endswith(".json")]
    found = {name: places.the("the rates", name) for name in rates}
    if how.held_out is not None and corpus.share_of(how.held_out) is None:
        found[how.held_out] = places.the("what is held out,", how.held_out)
        how = replace(how, held_out=str(found[how.held_out]))
    (given,) = _said(run, "corpus") or ["corpus.json"]
    if given.startswith("hub:"):
        notes.append(f"the corpus {given} is read from the hub")
        return found | {name: places.the("task", name) for name in _said(run, "task")}
    found[given] = places.the("corpus", given)
    try:
        read = corpus.load(found[given], how)
        digests = {read.digest}
        with contextlib.suppress(corpus.CorpusError):  # none is in Latin letters
            digests.add(corpus.in_latin_letters(read).digest)
        if not digests & {entry.corpus_digest for entry in run.entries}:
            raise BundleError(f"--bundle: corpus {given} has changed since record {run.path}: its digest differs")
        for name in _said(run, "task"):
            found[name] = places.the("task", name)
            if corpus.load_task(found[name], read).digest not in {entry.task_digest for entry in run.entries}:
                raise BundleError(f"--bundle: task {name} has changed since record {run.path}")
    except corpus.CorpusError as error:
        raise BundleError(f"--bundle: {error}") from error
    return found


def _models(run: Run) -> Iterator[str]:
    """What is said of weights that are not in the bundle."""
    for entry in {(entry.model, entry.weights): entry for entry in run.entries}.values():
        if entry.weights == "pretrained":
            at = f" at commit {entry.weights_revision}" if entry.weights_revision else ""
            yield f"the weights of {entry.model}{at} are not in it"


# What repeats them


def _recorded(runs: Sequence[Run]) -> dict[str, str]:
    """The versions of the records, the first where two differ. A package is only with the methods that need it."""
    every = [(entry.versions or {}).items() for run in runs for entry in run.entries]
    return {name: number for versions in reversed(every) for name, number in versions if number}


def _build_of_torch(runs: Sequence[Run]) -> tuple[str, str | None]:
    """torch as pip is asked for it, and the index of torch's own that has it, None where PyPI does."""
    number = _recorded(runs).get("torch", "")
    build = re.search(r"\+((?:cu|rocm|xpu|cpu)[\w.]*)$", number)
    return f"torch=={number}", f"{PYTORCH}/{build[1]}" if build else None


def _requirements(runs: Sequence[Run], files: Iterable[Path]) -> str:
    """The exact versions: those that the records name, then what else is installed here that `files` import."""
    recorded = _recorded(runs)
    for name, number in recorded.items():
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*==[\w.!+-]+", f"{name}=={number}", re.ASCII):
            raise BundleError(f"--bundle: the record's version of {name!r}, {number!r}, cannot be installed")
    build, index = _build_of_torch(runs)
    lines = ["# as the record has them"]
    if index:
        lines.append(f"# install this first: pip install --no-deps --extra-index-url {index} {build}")
    pinned = {name: number for name, number in recorded.items() if name not in ("lightweight", "cuda")}
    lines += [f"{name}=={number}" for name, number in pinned.items()]
    others = {name: number for name, number in _installed(files).items() if name.lower() not in pinned}
    lines += ["# what else is imported, as installed where the bundle was made"]
    return "\n".join([*lines, *(f"{name}=={number}" for name, number in sorted(others.items()))]) + "\n"


def _installed(files: Iterable[Path]) -> dict[str, str]:
    """What of the packages that `files` import is installed here, by distribution."""
    tops = {name.partition(".")[0] for file in files for name in imported(_parsed(file), [])}
    owners = packages_distributions()
    names = {owner for top in tops - LOADED_IF_ASKED for owner in owners.get(top, ())}
    return {name: version(name) for name in names if name.lower() != record.DISTRIBUTION}


SCRIPT = """\
#!/bin/sh
# Trains the same cells again and holds them against the records: status 0 where they are no worse.
# `sh repeat.sh` makes an environment in .venv with the versions of requirements.txt; `sh repeat.sh --here` takes the
# `python` that is there.
set -eu
cd "$(dirname "$0")"
PYTHON="${{PYTHON:-python3}}"
if [ "${{1:-}}" != --here ]; then
    "$PYTHON" -m venv .venv
    PYTHON="$PWD/.venv/bin/python"
    {torch}"$PYTHON" -m pip install -r requirements.txt
fi
export PYTHONPATH="$PWD"
status=0
{runs}
exit $status
"""


def _script(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Of torch's own index nothing but torch is asked: everything else is the ordinary one's."""
    build, index = _build_of_torch(runs)
    first = f'"$PYTHON" -m pip install --no-deps --extra-index-url {index} {build}\n    ' if index else ""
    lines = []
    for run, name in zip(runs, names, strict=True):
        arguments = shlex.join([*run.command, f"--benchmark-json=repeated-{name}"])
        # a test that failed then may fail again: whether anything got worse is the gate's to say
        lines.append(f'"$PYTHON" -m pytest {arguments} || echo "pytest: status $?"')
        against = shlex.join([f"repeated-{name}", "--against", f"records/{name}", "--require-match"])
        lines.append(f'"$PYTHON" -m lightweight gate {against} || status=$?')
    return SCRIPT.format(torch=first, runs="\n".join(lines))


README = """\
# Repeat it

    sh repeat.sh

makes a virtual environment of the exact versions in `requirements.txt`, trains the same cells and holds them against
`records/` with `lightweight gate`. With `--here` it takes the environment that is there.

| in here | what it is |
|---|---|
| `records/` | what was measured |
| `lightweight/` | the suite, version {version} |
| `requirements.txt` | what was installed |
| methods, corpus, task | shown to be those of the records by their digests |
| the other files | tests, modules and the files that these name beside them, as they were when this was made |

What the code reads from elsewhere is not in here, and nobody can know of it: other files, the environment, the network.

{facts}
"""


def _readme(runs: Sequence[Run], notes: Sequence[str]) -> str:
    cells: dict[str, None] = {}
    for entry in (entry for run in runs for entry in run.entries):
        cells[_cell(entry)] = None
    facts = [f"- {cell}" for cell in cells] + [f"- {note[0].upper()}{note[1:]}." for note in notes]
    return README.format(version=lightweight.__version__, facts="\n".join(facts))


def _cell(entry: Entry) -> str:
    said = json.dumps(entry.training_arguments or {}, sort_keys=True)
    return record.one_line(f"{entry.model} x {entry.method}, seed {entry.seed}, on {entry.device}: `{said}`")


def _zip(folder: Path) -> Path:
    """`folder` as a zip file beside it."""
    beside = folder.with_name("bundle.zip")
    with zipfile.ZipFile(beside, "x", zipfile.ZIP_DEFLATED) as file:
        for one in sorted(folder.rglob("*")):
            file.write(one, Path(folder.name) / one.relative_to(folder))
    return beside
