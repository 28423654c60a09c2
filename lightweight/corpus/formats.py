"""In which format is a row written? The formats, each known by its keys, and the example that a row of each is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightweight.corpus.conversation import Conversation, Defect, Example, Message, Text
from lightweight.corpus.files import json_kind
from lightweight.corpus.messages import (
    conversation_of,
    messages_of,
    of_hh_string,
    optional_text_of,
    refuse_what_is_no_text,
    refuse_what_is_not_wanted,
    text_of,
    with_system,
)

Row = Mapping[str, Any]

ASKED = (
    *("prompt", "question", "conversations", "instruction", "input", "query", "context"),
    *("trajectory", "conversation", "messages"),
)
"""What preferences call that which is answered."""

CHOICES = ("choices", "options")
"""What a question that names only the right one of them calls its answers."""


@dataclass(frozen=True)
class Format:
    """A way to write examples, one a row. It is known by `keys`: of each tuple a row has one."""

    name: str
    keys: tuple[tuple[str, ...], ...]
    example: Callable[[Row], Example]

    def is_of(self, row: Row) -> bool:
        """Whether `row` has its keys."""
        return all(any(key in row for key in keys) for keys in self.keys)

    def has_any_key(self, row: Any) -> bool:
        """Whether `row` has one of its keys at least, and so is meant to be of it."""
        return isinstance(row, dict) and any(key in row for keys in self.keys for key in keys)

    def read(self, row: Any) -> Example:
        """The example that `row` is. Raises Defect."""
        if not isinstance(row, dict):
            raise Defect(f"is a JSON {json_kind(row)}: write an object with {self.words}")
        for keys in self.keys:
            if not any(key in row for key in keys):
                raise Defect(f"has no {' or '.join(map(repr, keys))}: write an object with {self.words}")
        refuse_what_is_no_text(row)
        return self.example(row)

    @property
    def words(self) -> str:
        """Its keys, as a person says them."""
        return " and ".join(f"'{keys[0]}'" for keys in self.keys)


def _first(row: Row, *keys: str) -> tuple[str, Any]:
    """Of `keys` the first that `row` has something for, and what; the first of all where it has none."""
    key = next((key for key in keys if row.get(key) is not None), next((key for key in keys if key in row), keys[0]))
    return key, row.get(key)


def _messages(row: Row) -> Conversation:
    refuse_what_is_not_wanted(row)
    key, value = _first(row, "messages", "conversations", "conversation")
    return conversation_of(_behind_system(messages_of(value, key), row), key)


def _behind_system(said: list[Message], row: Row) -> list[Message]:
    key, value = _system(row)
    return with_system(said, optional_text_of(value, key))


def _system(row: Row) -> tuple[str, Any]:
    return _first(row, "system", "system_prompt")


def _refuse_system(row: Row) -> None:
    """Raise Defect for a text that has a system message."""
    key, value = _system(row)
    if optional_text_of(value, key):
        raise Defect(f"{key}: stands beside a text, which has none: write it into the text, or all as messages")


def _alpaca(row: Row) -> Conversation:
    refuse_what_is_not_wanted(row)
    said = [*_instructed(row, "instruction"), Message("assistant", _text(row, "output", "response"))]
    return conversation_of(_behind_system(said, row), "instruction")


def _question_answer(row: Row) -> Conversation:
    refuse_what_is_not_wanted(row)
    if key := next((key for key in CHOICES if row.get(key)), None):
        raise Defect(f"{key}: would be left out of the question: write them into it, or leave the row out")
    said = [*_instructed(row, "question", "query"), Message("assistant", _text(row, "answer", "response"))]
    return conversation_of(_behind_system(said, row), "question")


def _instructed(row: Row, *keys: str) -> list[Message]:
    """What was said before the answer to what a row asks as one of `keys`: its history, and that."""
    said: list[Message] = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise Defect(f"history: is a JSON {json_kind(history)}: write a list of [instruction, output]")
    for index, turn in enumerate(history):
        field = f"history[{index}]"
        if not isinstance(turn, list) or len(turn) != 2:
            raise Defect(f"{field}: is not a pair: write [instruction, output]")
        asked, answered = (text_of(text, f"{field}[{side}]") for side, text in enumerate(turn))
        said += [Message("user", asked), Message("assistant", answered)]
    return [*said, Message("user", _instruction(row, *keys))]


def _instruction(row: Row, *keys: str) -> str:
    """What a row asks as one of `keys` and, under it, what it is about."""
    about_key, about = _first(row, "input", "context")
    instruction = _text(row, *keys)
    more = optional_text_of(about, about_key)
    return f"{instruction}\n\n{more}" if more else instruction


def _text(row: Row, *keys: str) -> str:
    key, value = _first(row, *keys)
    return text_of(value, key)


def _prompt_completion(row: Row) -> Example:
    refuse_what_is_not_wanted(row)
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list | dict):
        said = messages_of(prompt, "prompt")
        answer = messages_of(completion, "completion")
        return conversation_of(_behind_system([*said, *answer], row), "prompt and completion")
    if isinstance(prompt, list) or isinstance(completion, list | dict):
        raise Defect(
            f"completion: is a JSON {json_kind(completion)}, and 'prompt' a {json_kind(prompt)}: "
            "write texts as both, or messages"
        )
    _refuse_system(row)
    return Text(optional_text_of(prompt, "prompt"), text_of(completion, "completion"))


def _plain(row: Row) -> Text:
    if "role" in row:  # Open Assistant's rows, each a message of a tree
        raise Defect("role: belongs to one message of a conversation: write whole conversations, as 'messages'")
    return Text("", text_of(row["text"], "text"))


def _preference(row: Row) -> Example:
    """What was chosen, behind what was asked unless it says that, too."""
    chosen = row["chosen"]
    if isinstance(chosen, str):
        said = of_hh_string(text_of(chosen, "chosen"), "chosen") or [Message("assistant", chosen)]
    else:
        said = messages_of(chosen, "chosen")
    if said and said[0].role == "assistant":
        asked = _asked(row)
        if asked is None:
            if isinstance(chosen, str):
                _refuse_system(row)
                return Text("", chosen)
            raise Defect("has no 'prompt': write what was asked, or begin 'chosen' with it")
        said = [*asked, *said]
    return conversation_of(_behind_system(said, row), "chosen")


def _asked(row: Row) -> list[Message] | None:
    """What a row of preferences asks for, in whichever of the usual keys."""
    key, value = _first(row, *ASKED)
    if value is None:
        return None
    if isinstance(value, list):
        return messages_of(value, key)
    if key == "instruction":
        return _instructed(row, key)
    text = text_of(value, key)
    return of_hh_string(text, key) or [Message("user", text)]


TURNS = "turns"
"""The format that this project began with: a turn is a row, and two of them are an example (`turns`)."""

FORMATS = {
    one.name: one
    for one in (
        Format("preference", (("chosen",), ("rejected",)), _preference),
        Format("messages", (("messages",),), _messages),
        Format("sharegpt", (("conversations", "conversation"),), _messages),
        Format("alpaca", (("instruction",), ("output", "response")), _alpaca),
        Format("prompt-completion", (("prompt",), ("completion",)), _prompt_completion),
        Format("text", (("text",),), _plain),
        Format("question-answer", (("question", "query"), ("answer", "response")), _question_answer),
    )
}
"""By name. A row may have the keys of several, as hub data sets do: it is of the first."""

NAMES = (TURNS, *FORMATS)
"""What `--corpus-format` may say."""


def recognised(row: Any) -> str | None:
    """The name of the format that `row` is written in; None where nothing tells."""
    if not isinstance(row, dict):
        return None
    if of := next((one.name for one in FORMATS.values() if one.is_of(row) and not _is_turn(row)), None):
        return of
    return TURNS if "role" in row or "content" in row else None


def goes_before(name: str, other: str) -> bool:
    """Whether a row with the keys of both formats is of that called `name`, which is not `other`."""
    order = list(FORMATS)
    return name in order and order.index(name) < order.index(other)


def _is_turn(row: Row) -> bool:
    return "role" in row and "content" in row


def unknown(row: Any) -> Defect:
    """That no format has the keys of `row`, and those of the formats that it has some of, of all where it has none."""
    if isinstance(row, dict) and "message_tree_id" in row:  # Open Assistant's, of which each path is a conversation
        return Defect("message_tree_id: belongs to a tree of answers: write each path through it as 'messages'")
    keys = ", ".join(map(repr, list(row)[:8])) if isinstance(row, dict) else ""
    near = [one for one in FORMATS.values() if one.has_any_key(row)] or FORMATS.values()
    known = "; ".join(f"{one.name}: {one.words}" for one in near)
    return Defect(f"has the keys {keys[:100] or 'of nothing'}, which no format has: rename them ({known})")
