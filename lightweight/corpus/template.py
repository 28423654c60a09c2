"""A tokenizer's chat template, which is a program of somebody else's: rendered, or refused in one line."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

from lightweight.models import ModelError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDER_SECONDS = 10.0
"""What a chat template may take for one turn; those that end take a thousandth."""

MARKUP_CHARACTERS = 1_000_000
"""What a chat template may write around one turn; a long system prompt has a hundredth."""


def rendered(turn: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """One turn in the tokenizer's chat template. Raises ModelError, a ValueError, for a template that raises, does not
    end, writes too much or no text, or leaves the turn out: rows without their prompts would train all the same."""
    try:
        with _time_limit(RENDER_SECONDS):
            marked = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
            text = turn[0]["content"].strip()
            if text not in marked and marked == tokenizer.apply_chat_template(
                [{"role": "user", "content": f"{text} {text}."}], tokenize=False, add_generation_prompt=True
            ):
                raise ValueError("it leaves out what the user says")
            if len(marked) > len(text) + MARKUP_CHARACTERS:
                raise ValueError(f"it writes {len(marked):,} characters for one turn")
            marked.encode()  # half a character, which no tokenizer takes
    except Exception as error:  # a template is a program, and may raise what it likes
        raise ModelError(
            f"model {tokenizer.name_or_path}: its chat template cannot be used ({reason(error)}): mend chat_template"
        ) from error
    return marked


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after `seconds`, which only a process's main thread can; in another there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> NoReturn:
        raise TimeoutError(f"not done after {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    began, (left, interval) = time.monotonic(), signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:  # somebody else's alarm, pytest-timeout's say
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3), interval)
