"""What does `lightweight train` have to do? A `Job`, and the error of one that cannot start."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lightweight.corpus import How
from lightweight.models import Weights
from lightweight.settings import Settings


class JobError(ValueError):
    """A job that cannot start. The message names what it is about and the mend."""


class NothingFitsError(JobError):
    """No method is forecast to fit."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to train and where to leave it. Names are those of the command line; `None` is what it chooses itself.

    `reading` is how the corpus is read. `save_steps` are optimizer steps between checkpoints, `None` one every five
    minutes.
    """

    model: str
    corpus: Path
    output: Path
    method: str | None = None
    target: str | None = None
    weights: Weights | None = None
    epochs: int = 10
    max_steps: int | None = None
    reading: How = field(default_factory=How)
    settings: Settings = field(default_factory=Settings)
    seed: int = 0
    report_to: str = "none"
    save_steps: int | None = None
    resume: bool = False
    overwrite: bool = False
