"""A tokenizer's chat template, which is a program of somebody else's: what it writes of a conversation, and which of
that the loss is on; or why that cannot be told, in one line.

The template's own marks say it where it has them (`{% generation %}`, as transformers' `return_assistant_tokens_mask`
reads them). Else a turn is what the conversation grows by: it begins where the text of all messages before it ends with
the prompt to answer, and ends where the text up to it does. Both must be how the whole text begins. A template that
writes an earlier turn otherwise once another follows, as those that take thoughts out do, leaves only the last turn.
"""

from __future__ import annotations

import contextlib
import functools
import re
import resource
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightweight.corpus.conversation import Message
from lightweight.models import ModelError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDER_SECONDS = 10.0
"""What a chat template may take for one conversation; those that end take a thousandth."""

RENDER_BYTES = 2**30
"""What a chat template may take of memory while it is at it; one operation of it may ask for any amount, and cannot be
interrupted."""

MARKUP_CHARACTERS = 1_000_000
"""What a chat template may write around what is said; a long system prompt has a hundredth."""

LossOn = Literal["all", "last"]
"""Which of the assistant's turns the loss is on."""

Span = tuple[int, int]
"""Characters of a text, from the first to the one after the last."""

HAS_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class MarkedUp:
    """What a chat template writes of a conversation, with the spans that the loss is on. `end` is the special token
    that ends the last of them, None where the template writes none after an answer."""

    text: str
    learned: tuple[Span, ...]
    end: str | None


class _UnstableError(ValueError):
    """Where a turn lies in the text cannot be told."""


def marked_up(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, loss_on: LossOn = "all") -> MarkedUp:
    """A conversation that ends with an answer. Raises ModelError, a ValueError, for a template that raises, does not
    end, writes too much or no text, or leaves something out, and for one that does not tell where a turn lies.

    A turn's loss ends with the first special token after its last word. That is what the model must write to end its
    answer, and the last thing that it writes: whitespace, and the end of the text that some templates write after it,
    come from the template. Where no special token follows, all that the template writes up to the next turn counts.
    """
    with _refused(tokenizer):
        text = _rendered(messages, tokenizer)
        _check_nothing_is_left_out(messages, text, tokenizer)
        answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
        wanted = answers if loss_on == "all" else answers[-1:]
        if HAS_MARKS.search(tokenizer.get_chat_template()):
            spans = _by_marks(messages, text, tokenizer)
            if loss_on == "last" and len(spans) != len(answers):
                raise _UnstableError("it does not mark each turn once")
            spans = spans[-1:] if loss_on == "last" else spans
            return _with_their_ends(text, spans, _special(tokenizer))
        special = _special(tokenizer)
        # the last one first, since where it cannot be told either, it is no way out
        spans = [_by_growing(messages, index, text, tokenizer, special) for index in reversed(wanted)][::-1]
        ends = [_end_within(text, span, special) for span in spans]
        learned = tuple((start, stop) for (start, _), (stop, _) in zip(spans, ends, strict=True))
        return MarkedUp(text, learned, ends[-1][1])


def prompted(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """What a chat template writes of a conversation up to where the answer begins. Raises ModelError."""
    with _refused(tokenizer):
        text = _rendered(messages, tokenizer, answer_follows=True)
        _check_nothing_is_left_out(messages, text, tokenizer, answer_follows=True)
        return text


@contextlib.contextmanager
def _refused(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Whatever is raised inside is about the template, in one line."""
    name = tokenizer.name_or_path
    try:
        yield
    except _UnstableError as error:
        raise ModelError(
            f"model {name}: its chat template does not show which tokens the loss is taken over: {error}"
        ) from error
    except Exception as error:  # a template is a program, and may raise what it likes
        raise ModelError(
            f"model {name}: its chat template cannot be used ({reason(error)}): correct chat_template"
        ) from error


def _rendered(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, answer_follows: bool = False) -> str:
    said = [{"role": message.role, "content": message.content} for message in messages]
    with _limits(RENDER_SECONDS, RENDER_BYTES):
        text = str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=answer_follows))
    if len(text) > sum(len(message.content) for message in messages) + MARKUP_CHARACTERS:
        raise ValueError(f"it writes {len(text):,} characters for {_counted(len(messages), 'message')}")
    text.encode()  # half a character, which no tokenizer takes
    return text


def _check_nothing_is_left_out(
    messages: Sequence[Message], text: str, tokenizer: PreTrainedTokenizerBase, *, answer_follows: bool = False
) -> None:
    """Raise ValueError where `text` says the same whatever one of `messages` says: rows without their prompts, or
    without what the system says, would train all the same."""
    for index, message in enumerate(messages):
        content = message.content.strip()
        if content in text:
            continue
        other = Message(message.role, f"{content} {content}.")
        changed = [*messages[:index], other, *messages[index + 1 :]]
        if text == _rendered(changed, tokenizer, answer_follows=answer_follows):
            raise ValueError(f"it leaves out what the {message.role} says")


# Where the turns lie


def _by_growing(
    messages: Sequence[Message], index: int, text: str, tokenizer: PreTrainedTokenizerBase, special: re.Pattern[str]
) -> Span:
    """Where the answer `index` of `messages` lies in their `text`. Raises _UnstableError."""
    is_last = index + 1 == len(messages)
    mend = "take a chat template with {% generation %} marks"
    if not index:
        raise _UnstableError(f"a conversation begins with the assistant: let another role begin, or {mend}")
    before = _rendered(messages[:index], tokenizer, answer_follows=True)
    upto = text if is_last else _rendered(messages[: index + 1], tokenizer)
    stop = len(upto) if text.startswith(upto) else _without_end_of_text(upto, len(before), text, tokenizer, special)
    if stop is None or not (text.startswith(before) and len(before) < stop):
        what = "the last turn" if is_last else f"message {index + 1} of {len(messages)}"
        after = "after its prompt" if is_last else "once another follows"
        mend = mend if is_last else f"take --loss-on last, or {mend.removeprefix('take ')}"
        raise _UnstableError(f"it writes {what} differently {after}: {mend}")
    return len(before), stop


def _without_end_of_text(
    upto: str, start: int, text: str, tokenizer: PreTrainedTokenizerBase, special: re.Pattern[str]
) -> int | None:
    """Where a turn that begins at `start` ends in `text`, which ends in `upto` with the end of all text, as some write
    it after the last turn. None where `text` does not begin so, or has another end in that one's place."""
    upto = upto.removesuffix(str(tokenizer.eos_token or ""))
    if not text.startswith(upto):
        return None
    is_ended = _end_within(upto, (start, len(upto)), special)[1] is not None
    return len(upto) if is_ended or _follows(text, len(upto), special) is None else None


def _by_marks(messages: Sequence[Message], text: str, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """The spans of `text` that the template marks as generated by the assistant."""
    from transformers.utils.chat_template_utils import render_jinja_template

    said = [{"role": message.role, "content": message.content} for message in messages]
    with _limits(RENDER_SECONDS, RENDER_BYTES):
        special: Any = tokenizer.special_tokens_map
        rendered: Any = render_jinja_template(  # what `apply_chat_template` calls, whose mask is of tokens
            [said], chat_template=tokenizer.get_chat_template(), return_assistant_tokens_mask=True, **special
        )
    (again,), (marks,) = rendered
    if again != text:
        raise ValueError("it writes a different text each time")
    spans = [(start, stop) for start, stop in marks if start < stop]
    if not spans:
        raise ValueError("it marks no turn as generated")
    return spans


# Where they end


def _special(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What matches one special token of `tokenizer`."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return _any_of(frozenset([*added, *map(str, tokenizer.all_special_tokens)]))


@functools.lru_cache(maxsize=8)
def _any_of(texts: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _end_within(text: str, span: Span, special: re.Pattern[str]) -> tuple[int, str | None]:
    """Where what is learned of `span` ends: with the first special token after its last word, which is given too; where
    there is none, with the span."""
    start, stop = span
    match = _run_of(special.pattern).search(text, start, stop)
    found = special.search(text, match.start(), stop) if match else None
    return (found.end(), found[0]) if found else (stop, None)


@functools.lru_cache(maxsize=8)
def _run_of(pattern: str) -> re.Pattern[str]:
    """Special tokens and whitespace up to the end, as many as there are."""
    return re.compile(rf"(?<!\s)(?:\s|{pattern})*\Z")


def _with_their_ends(text: str, spans: Sequence[Span], special: re.Pattern[str]) -> MarkedUp:
    """Marked `spans` as they are, but that a turn whose mark leaves out the token that ends it has it too: else no
    answer would ever end. What that token is, the end of the last turn says; others must have the same one."""
    own = [_end_within(text, span, special)[1] for span in spans]
    if own[-1] is not None:
        return MarkedUp(text, tuple(spans), own[-1])
    follows = _follows(text, spans[-1][1], special)
    if follows is None:
        return MarkedUp(text, tuple(spans), None)
    end = re.compile(rf"\s*{re.escape(follows)}")
    longer = [(start, match.end() if (match := end.match(text, stop)) else stop) for start, stop in spans]
    return MarkedUp(text, tuple(longer), follows)


def _follows(text: str, place: int, special: re.Pattern[str]) -> str | None:
    """The special token that is the next in `text` after `place`, but for whitespace."""
    match = re.compile(rf"\s*({special.pattern})").match(text, place)
    return match[1] if match else None


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


@contextlib.contextmanager
def _limits(seconds: float, count: int) -> Iterator[None]:
    """Raise TimeoutError after `seconds`, and ValueError beyond `count` bytes more than this process has; only a
    process's main thread can, and in another there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    is_over = False

    def stop(*_: object) -> None:
        if not is_over:
            raise TimeoutError(f"not done after {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    # and again a second later: Jinja computes what is constant twice, and whatever the first time raises it swallows
    began, (left, interval) = time.monotonic(), signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        with _memory_limit(count):
            yield
    finally:
        is_over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:  # somebody else's alarm, pytest-timeout's say
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3), interval)


@contextlib.contextmanager
def _memory_limit(count: int) -> Iterator[None]:
    """Inside, this process may map `count` bytes more than it has; without a limit where it cannot tell how many those
    are."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # another system than Linux
        yield
        return
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + count
    if before != resource.RLIM_INFINITY and before <= limit:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    try:
        yield
    except MemoryError:  # which is not this machine's fault, as the error alone would say
        raise ValueError(f"it takes over {count / 2**30:g} GiB of memory") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, most))
