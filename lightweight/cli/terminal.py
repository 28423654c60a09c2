"""What a job says: one line each, on the terminal of whoever started it."""

from __future__ import annotations

import sys

from lightweight.names import one_line
from lightweight.training import ranks


def say(text: str) -> None:
    """Tell how it goes, on the first rank alone."""
    if ranks.is_first():
        print(one_line(text), flush=True)


def fail(text: str) -> None:
    """Tell what went wrong."""
    print(f"lightweight: {one_line(text)}", file=sys.stderr, flush=True)
