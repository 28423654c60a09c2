"""Turns of user and therapist in alternation, as this project began with: two of them are a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lightweight.corpus.conversation import Conversation, Defect, pair
from lightweight.corpus.files import Item, json_kind
from lightweight.corpus.messages import short
from lightweight.names import is_text

Bad = Callable[..., None]
"""What is told of an item, its Defect, and all items that are to be skipped for it; it raises, or counts them."""


def pairs(items: Iterable[Item], bad: Bad) -> Iterator[Conversation]:
    """Each user turn with the answer to it. A turn that is skipped takes the other half of its pair along, but for a
    user turn where an answer belongs, which begins another pair."""
    asked: tuple[Item, str] | None = None
    for item in items:
        try:
            said = _content(item, "user" if asked is None else "therapist")
        except Defect as defect:
            if asked is not None and _is_sound_user_turn(item):
                bad(item, defect, asked[0])
                asked = item, _content(item, "user")
            else:
                bad(item, defect, item if asked is None else asked[0], item)
                asked = None
            continue
        if asked is None:
            asked = item, said
        else:
            yield pair(asked[1], said)
            asked = None
    if asked is not None:
        unanswered = Defect("the last user turn has no answer: add a 'therapist' turn or remove it")
        bad(asked[0], unanswered, asked[0])


def _is_sound_user_turn(item: Item) -> bool:
    try:
        _content(item, "user")
    except Defect:
        return False
    return True


def _content(item: Item, expected: str) -> str:
    turn = item.value
    if isinstance(turn, Defect):
        raise turn
    if not isinstance(turn, dict):
        raise Defect(f'is a JSON {json_kind(turn)}: write {{"role": ..., "content": ...}}')
    role, content = turn.get("role"), turn.get("content")
    if role not in ("user", "therapist"):
        problem = "has no 'role'" if "role" not in turn else f"unknown role {short(role)}"
        raise Defect(f"{problem}: use 'user' or 'therapist'")
    if role != expected:
        in_a_row = expected == "therapist" or item.place[1] > (item.place[0] == "line")
        problem = f"two {role!r} turns in a row" if in_a_row else "the first turn is the therapist's"
        raise Defect(f"{problem}: a {expected!r} turn belongs here, join or remove one")
    return _said(turn, content)


def _said(turn: dict[str, Any], content: Any) -> str:
    if not isinstance(content, str):
        problem = "has no 'content'" if "content" not in turn else f"'content' is a JSON {json_kind(content)}"
        raise Defect(f"{problem}: give it a text")
    if not content.strip():
        raise Defect("'content' is empty: write the turn's text or remove its pair")
    if not is_text(content):
        raise Defect("'content' holds half of a surrogate pair, which is not a character: write the character itself")
    return content
