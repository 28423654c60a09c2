"""Where a job's result goes: under its own name it is whole, or not there.

Until it is whole, everything lies in the sibling `DIR.partial`: weights that had to be made, checkpoints, the tracker's
files, and the result on its way. A rename within one folder then puts the result in its place. Imports no torch.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightweight.targets import GiB, MiB

STATE_NAME = "trainer_state.json"
"""What the Trainer writes last into a checkpoint: one without it is not whole."""

RECORD_NAME = "record.json"
"""What every result has: its trial as `lightweight report` reads it."""


class OutputError(ValueError):
    """An output folder that cannot be used. The message names it and the mend."""


@dataclass(frozen=True)
class Output:
    """The place of a result, `folder`, and the work that leads to it, in `partial` beside it."""

    folder: Path

    @property
    def partial(self) -> Path:
        """What is not finished yet."""
        return self.folder.with_name(f"{self.folder.name}.partial")

    @property
    def checkpoint(self) -> Path | None:
        """The newest whole checkpoint."""
        found = [path for path in self.partial.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
        return max((path for path in found if _is_json(path / STATE_NAME)), key=step_of, default=None)

    def claim(self, *, resume: bool, overwrite: bool) -> None:
        """Make `partial` ready to be written into, empty unless `resume`. Raises OutputError, having changed
        nothing."""
        if self.folder.exists():
            if not overwrite:
                raise OutputError(
                    f"--output {self.folder}: already exists: give another folder, or --overwrite to replace it"
                )
            if not (self.folder / RECORD_NAME).is_file() and not _is_empty(self.folder):
                raise OutputError(
                    f"--output {self.folder}: holds something else than a trained model: --overwrite replaces only "
                    f"a folder with {RECORD_NAME}; remove it yourself or give another"
                )
        if self.checkpoint and not (resume or overwrite):
            raise OutputError(
                f"--output {self.folder}: an interrupted job has got to step {step_of(self.checkpoint)} there: "
                "--resume goes on with it, --overwrite starts anew"
            )
        try:
            if self.partial.exists() and not resume:
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True, exist_ok=True)
            probe = self.partial / "probe"
            probe.write_bytes(bytes(4096))
            probe.unlink()
        except OSError as error:
            raise OutputError(
                f"--output {self.folder}: cannot be written ({error.strerror}): give a folder that can"
            ) from error

    def remember(self, settings: dict[str, Any]) -> None:
        """Keep what the job is, for `recall`."""
        (self.partial / "job.json").write_text(json.dumps(settings, indent=1), "utf-8")

    def recall(self) -> dict[str, Any]:
        """What `remember` kept of the interrupted job; empty where there is no job to go on with. Raises
        OutputError."""
        if self.checkpoint is None:
            return {}
        try:
            kept: dict[str, Any] = json.loads((self.partial / "job.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{self.partial}: its job.json cannot be read ({error}): start anew with --overwrite"
            ) from error
        return kept

    def require(self, needed: int) -> None:
        """Raise OutputError where less than `needed` bytes are free."""
        free = shutil.disk_usage(self.partial).free
        if free < needed:
            raise OutputError(
                f"--output {self.folder}: {_size(free)} free, and checkpoints and result need {_size(needed)}: "
                "free some space or give a folder on another disk"
            )

    @property
    def is_full(self) -> bool:
        """Whether nothing more can be written."""
        return shutil.disk_usage(self.partial).free < MiB

    def publish(self, result: Path) -> None:
        """Put `result`, a folder in `partial`, into its place, and remove the rest."""
        for path in (*result.rglob("*"), result):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)  # on the disk before it has its name, so that no power cut leaves it half there
            os.close(descriptor)
        if self.folder.exists():
            self.folder.rename(self.partial / "replaced")
        result.rename(self.folder)
        shutil.rmtree(self.partial)

    def tidy(self) -> None:
        """Remove `partial` unless there is a checkpoint to go on from."""
        if self.checkpoint is None:
            shutil.rmtree(self.partial, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """The optimizer steps done when `checkpoint` was saved."""
    return int(checkpoint.name.split("-")[1])


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _size(count: int) -> str:
    return f"{count / GiB:.2f} GiB" if count >= GiB else f"{count / MiB:.0f} MiB"
