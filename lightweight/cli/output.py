"""Where a job's result goes: under its own name it is whole, or not there.

Until it is, everything lies in the sibling `DIR.partial`, which is one job's alone: it holds a lock on the file MARK
there. What is being written lies in `DIR.partial/unfinished`. Once it is whole and synced, a rename makes it a
checkpoint, the base weights or the result, and another rename puts the result in its place. So the next job finds
either the whole or nothing, whatever ended this one. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightweight import files, record
from lightweight.cli import checkpoints
from lightweight.cli.checkpoints import step_of
from lightweight.cli.terminal import tell
from lightweight.targets import MiB, size

RECORD_NAME = "record.json"
"""What every result has: its trial as `lightweight report` reads it."""

MARK = "lightweight.lock"
"""Says that `DIR.partial` is of `lightweight train`; locked while a training writes there, and naming its process."""

LONGEST_NAMES = ("f" * 32, "f" * 96)
"""Of a folder below `unfinished` and a file in it, with room: a tracker's names are the longest."""


class OutputError(ValueError):
    """An output folder that cannot be used. The message names it and the mend."""


@dataclass(frozen=True, kw_only=True)
class Interrupted:
    """What an interrupted job has left in `place`: a whole `checkpoint`, or its result where it `is_finished`.

    `settings` are its JSON as `record.settings` gives it, after which a finished one has all of its entry.
    `passed_over`: a line for each newer checkpoint, none of them whole.
    """

    place: Path
    settings: Mapping[str, Any]
    checkpoint: Path | None = None
    is_finished: bool = False
    passed_over: Sequence[str] = ()

    @property
    def method(self) -> str | None:
        """The name of the job's method, where its settings say it."""
        return self.settings.get("method")

    @property
    def training_arguments(self) -> Mapping[str, Any]:
        """What each of the job's ranks told the Trainer."""
        return self.settings.get("training_arguments") or {}


class Output:
    """The place of a result, `folder`, and the work that leads to it, in `partial` beside it.

    `claim` comes first and `release` last, both in one process, which holds the lock in between.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: int | None = None
        self._overwrite = False
        self._is_published = False
        self._is_stuck = False
        """Whether trained weights lie in `unfinished`, since they could not be renamed."""

    @property
    def partial(self) -> Path:
        """What is not in its place yet."""
        return self.folder.with_name(f"{self.folder.name}.partial")

    @property
    def unfinished(self) -> Path:
        """What is being written, and is not whole yet."""
        return self.partial / "unfinished"

    @property
    def base(self) -> Path:
        """Base weights that had to be made."""
        return self.partial / "base"

    @property
    def result(self) -> Path:
        """The whole result, on its way to `folder`."""
        return self.partial / "result"

    @property
    def replaced(self) -> Path:
        """The model that lay in `folder` before, while the result takes its place."""
        return self.partial / "replaced"

    @property
    def runs(self) -> Path:
        """A tracker's curves, which a resumed job goes on with."""
        return self.partial / "runs"

    @property
    def rescued(self) -> Path:
        """Trained weights to which something that belongs beside them could not be written."""
        return self.partial / "rescued"

    @property
    def checkpoint(self) -> Path | None:
        """The newest checkpoint, by its name alone: `interrupted` knows which one is whole."""
        return next(iter(checkpoints.all_in(self.partial)), None)

    @property
    def can_resume(self) -> bool:
        """Whether there is something to go on with."""
        return self.checkpoint is not None or self.result.exists()

    # Before training

    def claim(self, *, resume: bool, overwrite: bool) -> None:
        """Lock `partial` and make it ready to be written into, empty unless there is something to `resume`, having
        tried that a result can be put into its place. Raises OutputError, having changed nothing but what a crash had
        left half done."""
        self._overwrite = overwrite
        try:
            try:
                self._check_place(resume)
            except OutputError:  # another process may just be making the place its own
                time.sleep(0.1)
                self._check_place(resume)
            try:
                self._take_lock()
                self._recover()
                self._check_place(resume)
                if not (resume or overwrite):
                    self._check_nothing_left()
                if resume and self.can_resume:
                    checkpoints.remove(self.unfinished)
                else:
                    self._remove_all_but()
                self._try_to_write()
                self._try_to_rename()
            except BaseException:
                self.release()
                raise
        except OSError as error:
            raise OutputError(
                f"--output {self.folder}: cannot be written ({error.strerror}): give a folder that can"
            ) from error

    def _check_place(self, resume: bool) -> None:
        """Raise OutputError where `folder` or `partial` is something that training must leave alone."""
        if self.folder.name in ("", ".."):
            raise OutputError(f"--output {self.folder}: is not a folder name: give one that does not exist yet")
        for path in (self.folder, self.partial):
            if path.is_symlink():
                raise OutputError(f"--output {self.folder}: {path} is a link: give the folder itself, or another one")
        ours = (self.partial / MARK).is_file()
        if os.path.lexists(self.partial) and not ours and not _is_empty(self.partial):
            raise OutputError(
                f"--output {self.folder}: {self.partial} is not of this version of `lightweight train`: move it away, "
                "or give another folder"
            )
        if ours:
            self._check_all_is_ours()
        if os.path.lexists(self.folder) and not _is_empty(self.folder):  # an empty one is nobody's, or a probe's
            self._check_taken(resume)

    def _working_files(self) -> list[Path]:
        """What a job has in `partial` by the names that it gives, whole or not, but for MARK."""
        named = (self.unfinished, self.base, self.result, self.replaced, self.rescued, self.runs)
        return [path for path in named if os.path.lexists(path)] + checkpoints.all_in(self.partial)

    def _check_all_is_ours(self) -> None:
        """Raise OutputError where somebody else has put something into `partial`, or a link in the place of what is
        read or written there. A link at a checkpoint is none that is whole. Hidden files, of a file browser or of NFS,
        are let be."""
        ours = self._working_files()
        without = (self.unfinished, *checkpoints.all_in(self.partial))  # of which a link is removed itself
        for path in sorted(self.partial.iterdir()):
            if path.name != MARK and path not in ours and not path.name.startswith("."):
                raise OutputError(
                    f"--output {self.folder}: {path} was not written by `lightweight train`: move it away, or "
                    "give another one"
                )
            if path.is_symlink() and path not in without:
                raise OutputError(
                    f"--output {self.folder}: {path} is a link, and links are not followed: remove it, or give "
                    "another one"
                )

    def _check_nothing_left(self) -> None:
        """Raise OutputError where another job has left something that was trained."""
        for path in (self.result, self.rescued):
            if path.exists():
                raise OutputError(
                    f"--output {self.folder}: {path} is trained, but has not been moved to its folder yet: "
                    "--resume goes on with it, --overwrite starts again"
                )
        if self.checkpoint is not None:
            raise OutputError(
                f"--output {self.folder}: an interrupted job reached step {step_of(self.checkpoint)} there: "
                "--resume goes on with it, --overwrite starts again"
            )

    def _check_taken(self, resume: bool) -> None:
        """Raise OutputError where what is in `folder` can be neither gone on with nor replaced."""
        is_model = entry_in(self.folder) is not None
        if not self._overwrite and not (resume and is_model):
            replaces = ", or --overwrite to replace it" if is_model else ""
            raise OutputError(f"--output {self.folder}: already exists: give another folder{replaces}")
        if not is_model:
            raise OutputError(
                f"--output {self.folder}: is not a trained model: --overwrite replaces only "
                f"a folder with {RECORD_NAME}; remove it yourself or give another"
            )

    def _check_owner(self) -> None:
        """Raise OutputError where somebody else could put links into `partial` while this trains. Whose a folder would
        be that is made here is asked of the file system, which may have users of its own."""
        status = self.partial.stat()
        with tempfile.TemporaryFile(dir=self.partial) as ours:
            is_ours = os.fstat(ours.fileno()).st_uid == status.st_uid
        if not is_ours or status.st_mode & stat.S_IWOTH:
            raise OutputError(
                f"--output {self.folder}: {self.partial} belongs to somebody else, or anybody can write there: move it "
                "away, or give another folder"
            )

    def _take_lock(self) -> None:
        self.partial.mkdir(0o775, parents=True, exist_ok=True)  # nobody else may write there, whatever the umask says
        self._check_owner()
        try:
            self._lock = files.lock(self.partial / MARK)
        except files.LockedError as error:
            raise OutputError(
                f"--output {self.folder}: process {error.process} is training there: wait for it, or give another "
                "folder"
            ) from None
        if self._lock is None:  # the one that held it has just ended, and has removed the folder as well
            self._take_lock()

    def _recover(self) -> None:
        """Put things right where another job was killed between the two renames of `publish`."""
        if not self.replaced.exists():
            return
        if not os.path.lexists(self.folder) or _is_empty(self.folder):
            self.replaced.rename(self.folder)
        elif not self.result.exists():  # it is in its place
            checkpoints.remove(self.replaced)
        else:
            raise OutputError(
                f"--output {self.folder}: {self.replaced} is the model that was there before: move one of them away"
            )

    def _remove_all_but(self, *kept: Path) -> None:
        """Remove a job's working files, and nothing of somebody else's."""
        for path in self._working_files():
            if path not in kept:
                checkpoints.remove(path)

    def _try_to_write(self) -> None:
        folder = self.unfinished / LONGEST_NAMES[0]
        folder.mkdir(parents=True)
        (folder / LONGEST_NAMES[1]).write_bytes(bytes(4096))
        shutil.rmtree(folder)

    def _try_to_rename(self) -> None:
        """Rename as `publish` will: a mount point, a lower layer of an overlay or a sticky folder does not let it."""
        try:
            if os.path.lexists(self.folder) and not _is_empty(self.folder):
                self.folder.rename(self.replaced)
                self.replaced.rename(self.folder)
                return
            was_there = self.folder.exists()
            probe = self.unfinished / "probe"
            probe.mkdir()
            probe.rename(self.folder)
            if not was_there:
                self.folder.rmdir()
        except OSError as error:
            raise OutputError(
                f"--output {self.folder}: no folder can be renamed to it ({error.strerror}), for example because a "
                "disk is mounted there: give a folder inside it"
            ) from error

    def interrupted(self) -> Interrupted | None:
        """What can be gone on with; None where nothing is left. Raises OutputError where nothing left is whole."""
        for place in (self.result, *(() if self._overwrite else (self.folder,))):
            if (entry := self._finished(place)) is not None:
                return Interrupted(place=place, settings=entry, is_finished=True)
        checkpoint, passed_over = checkpoints.newest(self.partial)
        if checkpoint is not None and (manifest := checkpoints.read(checkpoint)) is not None:
            return Interrupted(
                place=self.partial, settings=manifest.job, checkpoint=checkpoint, passed_over=passed_over
            )
        if passed_over:
            mend = "start again with --overwrite, without --resume"
            if any(checkpoints.UNREADABLE in each for each in passed_over):  # they may be whole
                mend = "see to what keeps them from being read, and give --resume again"
            raise OutputError(
                f"--output {self.folder}: {'; '.join(passed_over)}: no checkpoint is left to go on with: {mend}"
            )
        return None

    def _finished(self, place: Path) -> dict[str, Any] | None:
        """The record of the job that had finished in `place`; None where nothing is there. Raises OutputError where
        the record is not what was written: without it, what was trained would be trained again, and replaced."""
        if not place.is_dir() or _is_empty(place):
            return None
        entry = entry_in(place)
        try:
            record.load(place / RECORD_NAME)
            problem = "" if entry is not None else "it is of no finished training"
        except record.RecordError as error:
            problem = str(error).removeprefix(f"record {place / RECORD_NAME}: ").rpartition(": ")[0] or str(error)
        if problem:
            raise OutputError(
                f"--output {self.folder}: {place} is trained, but its {RECORD_NAME} cannot be used ({problem}): move "
                "it away, or start again with --overwrite, without --resume"
            )
        return entry

    def require(self, needed: int) -> None:
        """Raise OutputError where less than `needed` bytes are free."""
        free = shutil.disk_usage(self.partial).free
        if free < needed:
            raise OutputError(
                f"--output {self.folder}: {size(free)} free, and checkpoints and result need {size(needed)}: "
                "free some space or give a folder on another disk"
            )

    @property
    def is_full(self) -> bool:
        """Whether nothing more can be written."""
        return shutil.disk_usage(self.partial).free < MiB

    @property
    def is_at_limit(self) -> bool:
        """Whether a file has become as large as this process may make one, setrlimit(2)."""
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        files = [path for path in self.unfinished.rglob("*") if path.is_file()]
        return limit != resource.RLIM_INFINITY and any(path.stat().st_size >= limit for path in files)

    # While it trains, and afterwards

    def curves(self) -> Path:
        """`runs`, for a tracker to write into. Raises OutputError where a link has come there since the claim."""
        if self.runs.is_symlink():
            raise OutputError(f"--output {self.folder}: {self.runs} is a link, and links are not followed: remove it")
        return self.runs

    def keep_base(self, job: Mapping[str, Any]) -> None:
        """Make `unfinished/base`, which `job` needs, the base weights, whole."""
        checkpoints.seal(self.unfinished / "base", job)
        checkpoints.remove(self.base)
        (self.unfinished / "base").rename(self.base)

    @contextlib.contextmanager
    def completing(self) -> Iterator[Path]:
        """Inside, `unfinished/result` holds trained weights and gets what belongs beside them. Then it is the result,
        whole; where something fails it is `rescued`."""
        unfinished = self.unfinished / "result"
        try:
            yield unfinished
            checkpoints.sync_all(unfinished)
        except BaseException:
            self._is_stuck = True
            checkpoints.remove(self.rescued)
            unfinished.rename(self.rescued)
            self._is_stuck = False
            raise
        checkpoints.remove(self.result)
        unfinished.rename(self.result)

    def publish(self) -> None:
        """Put the result into its place, if it is not there. Raises OutputError where that fails: the result then
        stays where it is."""
        if not self.result.exists():
            self._is_published = True
            return
        self._remove_all_but(self.result)  # which is all that is still needed
        try:
            if os.path.lexists(self.folder) and not _is_empty(self.folder):
                self._check_taken(resume=False)  # it may have come while this trained
                self.folder.rename(self.replaced)
            self.result.rename(self.folder)
        except (OSError, OutputError) as error:
            reason = error.strerror if isinstance(error, OSError) else "something else has come there"
            raise OutputError(
                f"--output {self.folder}: cannot be put there ({reason}): the complete result is in "
                f"{self.result}: move it, or make room and go on with --resume"
            ) from error
        try:
            checkpoints.sync(self.folder.parent)
        except OSError as error:  # the model before stays until this one is on the disk
            before = f", and the model before is in {self.replaced}" if self.replaced.exists() else ""
            raise OutputError(
                f"--output {self.folder}: the result is there, but may not outlive a power cut ({error.strerror})"
                f"{before}: mend that disk, or copy it to another"
            ) from error
        self._is_published = True
        checkpoints.remove(self.replaced)

    def release(self) -> None:
        """Unlock `partial`, having removed it unless there is something in it to go on with: nothing where the result
        is in its place, even if something could not be removed at once."""
        if self._lock is None:
            with contextlib.suppress(OSError):  # another job's, or not empty
                self.partial.rmdir()
            return
        self._put_back()
        if not self._is_stuck:
            checkpoints.remove(self.unfinished)
        kept = self._is_stuck or self.can_resume or self.rescued.exists() or self.replaced.exists()
        if self._is_published or not kept:
            self._remove_all_but()
            with contextlib.suppress(OSError):  # a mount point, or what somebody else has put there
                (self.partial / MARK).unlink(missing_ok=True)
                self.partial.rmdir()
            if self._is_published and self.partial.exists():
                tell(f"{self.partial}: cannot be removed, and nothing in it is needed any more: remove it")
        os.close(self._lock)
        self._lock = None

    def _put_back(self) -> None:
        """Put the model that was there before back into its place, where no result has come."""
        if not self.replaced.exists() or os.path.lexists(self.folder):
            return
        try:
            self.replaced.rename(self.folder)
        except OSError as error:
            tell(f"{self.folder}: the previous model is complete in {self.replaced} ({error.strerror}): move it back")


def entry_in(folder: Path) -> dict[str, Any] | None:
    """The record of the model that `lightweight train` left in `folder`; None where it left none."""
    if not (folder / RECORD_NAME).is_file():  # a pipe would be waited for
        return None
    try:
        document = json.loads((folder / RECORD_NAME).read_text("utf-8"))
        (entry,) = document["outcomes"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and entry.get("outcome") == "completed" else None


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
