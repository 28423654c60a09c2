"""What a model is to everything else here, and how one is refused."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Weights = Literal["pretrained", "random"]
"""Where weights come from. Random ones have the model's true size; their loss says nothing of quality."""


DRAWN = "drawn 2"
"""How random weights follow from a seed. The number grows where the same seed gives others, as on 2026-11-27."""


class ModelError(ValueError):
    """A model that cannot be had. The message names it and the mend."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A causal language model.

    `source` is a hub id or a local folder. `architecture` is a transformers configuration, `model_type` included, from
    which random weights are built without any file. `package` is an installed Python package that carries the weights.
    `find` fills in the rest: `weights`, and the `location` they are loaded from (a folder, or the hub id), with
    `gguf_file` naming the file inside it that `write` still has to turn into safetensors. `weights_file` keeps that
    name: its weights were stored in fewer bits, and are not those of `source` to the last one.
    """

    name: str
    source: str | None = None
    architecture: dict[str, Any] | None = field(default=None)
    package: str | None = None
    weights: Weights | None = None
    location: str | None = None
    gguf_file: str | None = None
    weights_file: str | None = None

    @property
    def is_loadable(self) -> bool:
        """Whether `location` can be loaded as it is."""
        return self.location is not None and self.gguf_file is None

    @property
    def weights_revision(self) -> str | None:
        """The hub's commit of weights that are loaded from its cache, `.../snapshots/COMMIT`; how random ones are
        drawn; None for others."""
        if self.weights == "random":
            return DRAWN
        match = re.search(r"/snapshots/([0-9a-f]{40})(?:/|$)", self.location or "")
        return match and match[1]


@contextlib.contextmanager
def refused(model: Model, what: str, mend: str) -> Iterator[None]:
    """Whatever is raised while files of somebody else's are read is about them: one line, as a ModelError. What is
    about this machine (memory, disk) goes through."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        if ran_out(error):
            raise
        raise ModelError(f"model {model.name}: {what} ({reason(error)}): {mend}") from error


def ran_out(error: BaseException) -> bool:
    """Whether memory or disk ran out, which torch says in three ways."""
    import torch

    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
    return out_of_memory or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def reason(error: BaseException) -> str:
    """What an error says, in one line of no more than 200 characters; its type where it says nothing."""
    text = " ".join(str(error).split()).rstrip(".:") or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."
