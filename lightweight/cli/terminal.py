"""What does a command say? One line each, on the terminal of whoever started it. Imports no torch."""

from __future__ import annotations

import errno
import os
import sys
import warnings

from lightweight.names import one_line

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What writing to a file answers that can take no more; of what is printed it does not say which."""

_lost: list[OSError] = []
"""Why something that was to be said was not."""


def say(text: str) -> None:
    """Tell how it goes, on the first rank alone. A disk that is full ends nothing before its time, see `end_output`."""
    from lightweight.training import ranks  # torch takes seconds

    if ranks.is_first():
        try:
            print(one_line(text), flush=True)
        except OSError as error:
            if error.errno not in FULL:
                raise
            _lost.append(error)


def end_output() -> None:
    """Have all that was said printed. Raises OSError where something could not be."""
    lost = list(_lost)
    _lost.clear()
    sys.stdout.flush()
    if lost:
        raise lost[0]


def fail(text: str) -> None:
    """Tell what went wrong, whichever rank this is."""
    print(f"lightweight: {one_line(text)}", file=sys.stderr, flush=True)


def tell(text: str) -> None:
    """Tell, for all that torchrun started on this host, what is no result."""
    if _speaks():
        fail(text)


def refuse(error: Exception) -> int:
    """Tell why there is nothing to do; the exit status."""
    tell(str(error))
    return 2


def show(text: str) -> None:
    """A line of progress that the next one overwrites; none where nobody watches."""
    if sys.stderr.isatty() and _speaks():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _speaks() -> bool:
    """Whether this process tells what it has in common with all that torchrun started on this host."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def leave_to_us() -> None:
    """Leave the terminal to what this program says itself."""
    import transformers  # takes seconds

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # It is of models that add to what FSDP2 gave them in place, which transformers' own do not.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    # transformers and peft call activation checkpointing by its older name
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)
