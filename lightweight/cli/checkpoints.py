"""When is a checkpoint saved, which one is whole, and where does a job continue? The manifest is written and checked
here.

A checkpoint is whole when its manifest lists every file with its size and digest, and the files agree. The manifest has
a digest of itself, and is written last; everything is synced before the folder gets its name (`output` moves it), so
that neither a kill nor a power cut leaves one that only looks whole. Digests read every file once at saving and once
more at resuming. What `--resume` goes on with is `output.Output.interrupted`. Imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

MANIFEST_NAME = "manifest.json"
TRAINER_STATE = "trainer_state.json"
"""What the Trainer, and the captured step like it, keeps of its own state."""

KEPT = 2
"""Whole checkpoints that stay: should the newest one be damaged on the disk, there is another."""

SECONDS = 300.0
"""Between two checkpoints where none is asked for by steps: what a killed job loses at most."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What asks a job to stop."""


# Whole or not


class Manifest(NamedTuple):
    """What a folder holds: `files` by name, each `(bytes, sha256)`, and the settings of the `job` that wrote it."""

    job: dict[str, Any]
    files: dict[str, tuple[int, str]]


def seal(folder: Path, job: Mapping[str, Any]) -> None:
    """Sync every file of `folder`, and write the manifest that makes it whole."""
    files = {str(path.relative_to(folder)): _measured(path) for path in _files(folder)}
    sync_all(folder)
    content = {"job": job, "files": files}
    with (folder / MANIFEST_NAME).open("x", encoding="utf-8") as file:
        json.dump(content | {"sha256": _digest(content)}, file, indent=1)
    for path in (folder / MANIFEST_NAME, folder):
        sync(path)


UNREADABLE = "cannot be read"
"""Of a file that may be whole: what keeps it from being read may go."""


def problem(folder: Path) -> str | None:
    """Why `folder` is not what was sealed there, naming the first file that differs; None where it is whole."""
    manifest = read(folder)
    if manifest is None:
        return _why_unreadable(folder / MANIFEST_NAME) or f"its {MANIFEST_NAME} is missing or damaged"
    there = {str(path.relative_to(folder)): path for path in _files(folder)}
    for name, (size, digest) in manifest.files.items():
        if name not in there or not there[name].is_file():  # what waits for a writer, or a link to nothing, is none
            return f"{name} is missing"
        try:
            if there[name].stat().st_size != size:
                return f"{name} has {there[name].stat().st_size} bytes of {size}"
            if _measured(there[name])[1] != digest:
                return f"{name} has changed since it was saved"
        except OSError as error:
            return f"{name} {UNREADABLE} ({error.strerror})"
    added = sorted(name for name in there if name not in manifest.files and not Path(name).name.startswith("."))
    return f"{added[0]} was not saved with it" if added else None


def _why_unreadable(path: Path) -> str | None:
    try:
        if path.is_file():
            path.read_bytes()
    except OSError as error:
        return f"{path.name} {UNREADABLE} ({error.strerror})"
    return None


def read(folder: Path) -> Manifest | None:
    """The manifest of `folder`, where it can be read and says what was written."""
    if not (folder / MANIFEST_NAME).is_file():
        return None
    try:
        content = json.loads((folder / MANIFEST_NAME).read_text("utf-8"))
        if content.pop("sha256") != _digest(content):
            return None
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in content["files"].items()}
        return Manifest(dict(content["job"]), files) if files else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _digest(content: Mapping[str, Any]) -> str:
    """Of what a manifest says, so that a byte that has changed in it is not taken for another job's settings."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def sync_all(folder: Path) -> None:
    """Have `folder` and all that is in it on the disk; what a link names is another's, and a pipe has nothing."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            sync(path)


def sync(path: Path) -> None:
    """Have a file's bytes, or the names in a folder, on the disk. Raises OSError, which names it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # the kernel knows no name of it
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove what lies at `path`, where something does: a folder with all that is in it, of a link only itself. What
    cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if not path.is_dir() and path != folder / MANIFEST_NAME]


def _measured(path: Path) -> tuple[int, str]:
    """Its size and its digest. Raises OSError, which names it."""
    try:
        with path.open("rb") as file:
            return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # reading, the kernel knows no name of it


# Which one


def all_in(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, whole or not, the newest first."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]{1,15}", path.name)]
    return sorted(checkpoints, key=step_of, reverse=True)


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in `folder`, and a line for each newer one, which is not whole."""
    passed_over: list[str] = []
    for checkpoint in all_in(folder):
        wrong = problem(checkpoint) or _wrong_step(checkpoint)
        if wrong is None:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint} is not whole: {wrong}")
    return None, passed_over


def step_of(checkpoint: Path) -> int:
    """The optimizer steps done when `checkpoint` was saved."""
    return int(checkpoint.name.split("-")[1])


def _wrong_step(checkpoint: Path) -> str | None:
    """A whole checkpoint under another one's name is not where that one would go on."""
    try:
        step = json.loads((checkpoint / TRAINER_STATE).read_text("utf-8"))["global_step"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return f"its {TRAINER_STATE} does not say after which step it was saved"
    return None if step == step_of(checkpoint) else f"it was saved after step {step}"


class Shelf:
    """The checkpoints of a running job in `folder`: `KEPT` whole ones, which it has written or begun with."""

    def __init__(self, folder: Path, begun_with: Path | None) -> None:
        self._folder = folder
        self._whole = [] if begun_with is None else [begun_with]

    def add(self, written: Path) -> None:
        """Move a sealed checkpoint here, then remove what is neither of the newest whole ones."""
        place = self._folder / written.name
        remove(place)  # one that is not whole, which a resumed job passed over
        written.rename(place)
        sync(self._folder)
        self._whole = [*self._whole, place][-KEPT:]
        for other in all_in(self._folder):
            if other not in self._whole:
                remove(other)


# When


@contextlib.contextmanager
def signals_to(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Inside, SIGNALS come to `handler`, in the first thread alone. What the parent has had ignored, such as SIGHUP
    under nohup, stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    taken = {number: former for number, former in before.items() if former not in (signal.SIG_IGN, None)}
    for number in taken:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in taken.items():
            signal.signal(number, former)


class StopRequest:
    """What a signal does to a job. Before training it ends the job at once, by KeyboardInterrupt. In training the step
    at hand ends first and a checkpoint is saved; after it the result still is. The second signal ends the job at once,
    unless `repeats`: torchrun sends each of them again."""

    def __init__(self, *, repeats: bool) -> None:
        self.came = False
        self._repeats = repeats
        self._stage: Literal["before", "training", "after"] = "before"

    def training_begins(self) -> None:
        """From now on there is something to save."""
        self._stage = "training"

    def training_ended(self, *, stopped: bool) -> None:
        """Nothing is left to train; where `stopped`, because a signal said so."""
        self._stage = "after"
        if self.came and not stopped:  # in the last step, after it had been asked
            _write("training had ended: the result is saved")

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler of SIGNALS. Raises KeyboardInterrupt where the job ends at once."""
        if self._stage == "before" or (self.came and not self._repeats):
            raise KeyboardInterrupt
        if not self.came:
            does = "the step at hand, then a checkpoint" if self._stage == "training" else "the result is saved first"
            _write(f"\n{signal.Signals(number).name}: {does}" + ("" if self._repeats else "; once more stops at once"))
        self.came = True


def _write(line: str) -> None:
    os.write(2, f"{line}\n".encode())  # print() may be what the signal has interrupted


class Clock:
    """Says when `seconds` have gone by since the last checkpoint; `None` never."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds, self._since = seconds, time.monotonic()

    def restart(self) -> None:
        """A checkpoint was saved, or training begins."""
        self._since = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether it is time for one."""
        return self._seconds is not None and time.monotonic() - self._since >= self._seconds
