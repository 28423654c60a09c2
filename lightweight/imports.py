"""What does importing torch, transformers and peft cost? Seconds, a third of which can be saved.

They make half a million objects that live as long as the process. Python's garbage collector looks through all of them
again and again while they become more, and in every full collection afterwards.
"""

import gc
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def without_collecting() -> Iterator[None]:
    """Inside, Python does not look for garbage; what is made there is old afterwards. For imports, which leave hardly
    any."""
    with _not_collecting():
        yield
        if not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()  # into the oldest generation


@contextmanager
def interrupted_silently() -> Iterator[None]:
    """Inside, Ctrl-C ends the process at once, as it ends one that is not Python's: nothing has begun that a traceback
    could be about. For imports at the top of a program."""
    heeds = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeds:
        with suppress(ValueError):  # another thread than the first
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if heeds:
            with suppress(ValueError):
                signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def for_good() -> Iterator[None]:
    """Inside, Python does not look for garbage, and what there is afterwards is never looked through: in a process that
    is all ours. What a fork of it does not look through it does not copy either."""
    with _not_collecting():
        yield
        gc.freeze()  # without asking how much is frozen already: Python counts it one by one, which takes milliseconds


@contextmanager
def _not_collecting() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
