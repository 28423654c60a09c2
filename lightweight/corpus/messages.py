"""Messages as other people write them: which role each has, what it says, and whether they follow each other."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lightweight.corpus.conversation import Conversation, Defect, Message, Role
from lightweight.corpus.files import json_kind
from lightweight.names import is_text

ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
"""What roles are called in OpenAI's messages, ShareGPT's conversations, Open Assistant's trees and Gemini's turns."""

OF_TOOLS = ("tool", "tools", "function", "function_call", "function_response", "observation", "ipython")
"""The roles of what a program was asked, or has answered."""

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""What models' thoughts are called where they stand beside an answer."""

LEARNED = ("weight", "loss", "train", "training")
"""By which OpenAI's, ms-swift's and axolotl's messages say whether the loss is on them."""

CALLS = ("tool_calls", "function_call")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")

WANTED = ("label", "kto_tag")
"""What KTO's rows say of every answer whether it is wanted by."""

NOTHING = ("", "[]", "{}", "null", "none")
"""How no tools and no media are written as a text, in tables too."""

TOOLS_MEND = "only text is trained on: leave the row out"
EMPTY_MEND = "write its text or leave the row out"

HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
"""How a turn begins in hh-rlhf, whose conversations are strings."""


def text_of(value: Any, field: str) -> str:
    """The text that a row says as `field`. Raises Defect."""
    if not isinstance(value, str):
        raise Defect(f"{field}: is a JSON {json_kind(value)}: give it a text")
    if not value.strip():
        raise Defect(f"{field}: is empty: {EMPTY_MEND}")
    if not is_text(value):
        raise Defect(f"{field}: holds half of a surrogate pair, which is not a character: write the character itself")
    return value


def optional_text_of(value: Any, field: str) -> str:
    """The text of `field`, empty where a row has none. Raises Defect."""
    return "" if value is None or (isinstance(value, str) and not value.strip()) else text_of(value, field)


def refuse_what_is_no_text(value: Mapping[str, Any], field: str = "") -> None:
    """Raise Defect for a row, or a message of the name `field`, with tools, calls of them, or media."""
    for key in (*CALLS, "tools", "functions", *MEDIA):
        said = value.get(key)
        if said and not (isinstance(said, str) and said.strip().lower() in NOTHING):
            what = "an image, audio or a video" if key in MEDIA else "of a tool"
            raise Defect(f"{field}{'.' if field else ''}{key}: is {what}, and {TOOLS_MEND}")


def refuse_what_is_not_wanted(row: Mapping[str, Any]) -> None:
    """Raise Defect for a row whose answer is one to be unlearned; in a table, false is a text."""
    for key in WANTED:
        said = row.get(key)
        if said is False or (isinstance(said, str) and said.strip().lower() == "false"):
            raise Defect(f"{key}: is false, which marks an answer that is not wanted: leave the row out")


def messages_of(value: Any, field: str) -> list[Message]:
    """The messages that a row has as `field`, a list of them or a single one. Raises Defect."""
    if isinstance(value, dict):
        return [_message(value, field)]
    if not isinstance(value, list):
        raise Defect(f'{field}: is a JSON {json_kind(value)}: write a list of {{"role": ..., "content": ...}}')
    if not value:
        raise Defect(f"{field}: is empty: write its messages or leave the row out")
    if isinstance(value[0], str):  # LIMA's, which are texts alone and begin with the user's
        roles: tuple[Role, Role] = ("user", "assistant")
        return [Message(roles[index % 2], text_of(text, f"{field}[{index}]")) for index, text in enumerate(value)]
    said = [message for index, one in enumerate(value) for message in _said(one, f"{field}[{index}]")]
    return [message for message in said if message.role != "system" or message.content]


def _said(value: Any, field: str) -> list[Message]:
    """The message that `value` is, or both of a turn with its answer, as Capybara has them."""
    if isinstance(value, dict) and value and value.keys() <= {"input", "output"}:
        asked, answered = (text_of(value.get(key), f"{field}.{key}") for key in ("input", "output"))
        return [Message("user", asked), Message("assistant", answered)]
    return [_message(value, field)]


def _message(value: Any, field: str) -> Message:
    if not isinstance(value, dict):
        raise Defect(f'{field}: is a JSON {json_kind(value)}: write {{"role": ..., "content": ...}}')
    refuse_what_is_no_text(value, field)
    is_sharegpt = ("from" in value or "value" in value) and not ("role" in value or "content" in value)
    of_role, of_content = ("from", "value") if is_sharegpt else ("role", "content")
    role = _role(value, of_role, field)
    for key in LEARNED:
        if role == "assistant" and value.get(key) in (0, False):
            written = "false" if value[key] is False else "0"
            raise Defect(
                f"{field}.{key}: is {written}, and the loss is on every answer: leave the row out, or the {key}"
            )
    if of_content not in value:
        others = ", ".join(repr(key) for key in value if key != of_role) or "nothing else"
        raise Defect(f"{field}: has no {of_content!r}, but {short_text(others)}: write the text as {of_content!r}")
    for key in THOUGHTS:
        if value.get(key):
            mend = "write them into the content as the model's template does, or remove them"
            raise Defect(f"{field}.{key}: holds thoughts, which would be left out of the answer: {mend}")
    said = value[of_content]
    if role == "system":
        return Message(role, optional_text_of(_joined(said, f"{field}.{of_content}"), f"{field}.{of_content}"))
    return Message(role, text_of(_joined(said, f"{field}.{of_content}"), f"{field}.{of_content}"))


def _role(value: Mapping[str, Any], key: str, field: str) -> Role:
    if key not in value:
        others = ", ".join(map(repr, value)) or "nothing else"
        raise Defect(f"{field}: has no {key!r}, but {short_text(others)}: use 'system', 'user' or 'assistant'")
    said = value[key]
    if isinstance(said, str) and said.lower() in OF_TOOLS:
        raise Defect(f"{field}.{key}: {said!r} is a tool's, and {TOOLS_MEND}")
    role = ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        raise Defect(f"{field}.{key}: unknown role {short(said)}: use 'system', 'user' or 'assistant'")
    return role


def _joined(content: Any, field: str) -> Any:
    """Parts of a content as one text; anything else as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for index, part in enumerate(content):
        if isinstance(part, dict) and part.get("type", "text") == "text":
            part = part.get("text")
        elif isinstance(part, dict):
            raise Defect(f"{field}[{index}].type: is {short(part.get('type'))}, and {TOOLS_MEND}")
        if not isinstance(part, str):
            raise Defect(f"{field}[{index}]: is a JSON {json_kind(part)}: write {{'type': 'text', 'text': ...}}")
        texts.append(part)
    return "".join(texts)


def conversation_of(said: list[Message], field: str) -> Conversation:
    """The conversation that the messages of `field` are: a system message or none, then user and assistant in turn up
    to an answer. Raises Defect."""
    turns = said[1:] if said and said[0].role == "system" else said
    first = len(said) - len(turns)
    for index, message in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if message.role == expected:
            continue
        place = f"{field}[{first + index}]"
        if message.role == "system":
            raise Defect(f"{place}: a system message after others: put one at the beginning, or leave the row out")
        problem = f"two {message.role} turns in a row" if index else "the first turn is the assistant's"
        raise Defect(f"{place}: {problem}: a turn of the {expected} belongs here, join or remove one")
    if not turns:
        raise Defect(f"{field}: has no turns: write a user's and the assistant's, or leave the row out")
    if turns[-1].role != "assistant":
        raise Defect(f"{field}[{len(said) - 1}]: the last user turn has no answer: add the assistant's or remove it")
    return Conversation(tuple(said))


def with_system(said: list[Message], system: str) -> list[Message]:
    """`said` behind a system message, unless `system` is empty or they begin with one."""
    has_one = bool(said) and said[0].role == "system"
    return said if has_one or not system else [Message("system", system), *said]


def of_hh_string(text: str, field: str) -> list[Message] | None:
    r"""The messages of a string such as hh-rlhf's "\n\nHuman: Hi\n\nAssistant: Hello"; None for any other. One that
    ends where the assistant begins has no last answer."""
    found = list(HH_TURN.finditer(text))
    if not found or text[: found[0].start()].strip():
        return None
    ends = [match.start() for match in found[1:]] + [len(text)]
    said = []
    for index, (match, end) in enumerate(zip(found, ends, strict=True)):
        role: Role = "user" if match[1] == "Human" else "assistant"
        content = text[match.end() : end].strip()
        if not content and role == "assistant" and index == len(found) - 1:
            continue
        said.append(Message(role, text_of(content, f"{field}[{index}]")))
    return said


def short(value: Any) -> str:
    """`value` as Python writes it, cut at 60 characters."""
    return short_text(repr(value))


def short_text(text: str) -> str:
    """`text`, cut at 60 characters."""
    return text if len(text) <= 60 else f"{text[:57]}..."
