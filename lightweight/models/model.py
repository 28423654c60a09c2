"""What is a model, and how is one refused?"""

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
    """A model that cannot be used. The message names it and the mend."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A causal language model.

    Attributes:
        name: What it is called.
        source: A hub id or a local folder.
        architecture: A transformers configuration with its `model_type`. Random weights are built from it without
            files.
        package: An installed Python package that has the weights.
        weights: 'pretrained' or 'random'. `find` fills in this and what follows.
        location: What the weights are loaded from: a folder, or the hub id.
        gguf_file: The file in `location` that `write` still has to convert to safetensors.
        weights_file: The file that the weights were converted from. They were stored in fewer bits, so they are not
            exactly those of `source`.
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
        """The hub's commit of weights from its cache, `.../snapshots/COMMIT`; for random weights how they are drawn;
        None for others."""
        if self.weights == "random":
            return DRAWN
        match = re.search(r"/snapshots/([0-9a-f]{40})(?:/|$)", self.location or "")
        return match and match[1]


@contextlib.contextmanager
def refused(model: Model, what: str, mend: str) -> Iterator[None]:
    """Errors while somebody else's files are read become a ModelError in one line. Errors about this machine (memory,
    disk) are not changed."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        if ran_out(error):
            raise
        raise ModelError(f"model {model.name}: {what} ({reason(error)}): {mend}") from error


def ran_out(error: BaseException) -> bool:
    """Whether the error says that memory or disk ran out. torch says it in three ways."""
    import torch

    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
    return out_of_memory or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something; its type if none does."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def reason(error: BaseException) -> str:
    """The whole message of an error in one line of at most 200 characters; its type if it has none."""
    text = " ".join(str(error).split()).rstrip(".:") or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."
