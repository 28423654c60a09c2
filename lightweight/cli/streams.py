"""What if a command's input or output is closed, full, or in an encoding with few characters? It goes on. Imports no
torch."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any


class _Heedless(io.FileIO):
    """What cannot be written is not: a log on a full disk, or a terminal that is gone, is no reason to end a job."""

    def write(self, data: Any) -> int:
        with suppress(OSError):
            written = super().write(data)
            if written is not None:  # as where nobody reads it now, and nobody is to be waited for
                return written
        return len(data)


def make_usable() -> None:
    """Have standard input, output and error be there and take any text, and the last of them never fail. Bytes that
    are no text are read as halves of surrogate pairs, `names.is_text`."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed, as by `>&-`: the next file to be opened would have its number
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is this one
            os.set_inheritable(descriptor, True)
            setattr(sys, name, os.fdopen(descriptor, "w" if number else "r", encoding="utf-8"))
    if sys.__stderr__ is not None and sys.stderr is sys.__stderr__:
        kept = io.BufferedWriter(_Heedless(sys.stderr.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(kept, sys.stderr.encoding, line_buffering=True)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "backslashreplace")
