"""A corpus file, read and checked.

It is a JSON list of turns `{"role": "user"|"therapist", "content": "..."}` in alternation. A user turn and the
therapist's answer to it are one conversation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from lightweight.corpus.conversation import Conversation, Corpus, CorpusError, pair
from lightweight.corpus.split import split


def load(path: Path) -> Corpus:
    """Read, check and split the corpus at `path`. Raises CorpusError."""
    pairs = _pairs(_turns(path), path)
    if len(pairs) < 2:
        _fail(path, f"has {len(pairs)} pair(s): add turns until there are at least 2, one to train on and one held out")
    return split(pairs)


def _turns(path: Path) -> list[Any]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        _fail(path, "does not exist: give --corpus the path of a JSON file")
    except IsADirectoryError:
        _fail(path, "is a directory: give --corpus the path of a JSON file")
    except UnicodeDecodeError as error:
        _fail(path, f"is not UTF-8 at byte {error.start}: save it as UTF-8")
    except OSError as error:
        _fail(path, f"cannot be read ({error.strerror}): make it a readable file")
    try:
        turns = json.loads(text)
    except json.JSONDecodeError as error:
        _fail(path, f"is not JSON at line {error.lineno}, column {error.colno} ({error.msg}): mend it there")
    except RecursionError:
        _fail(path, "is nested too deeply: write a flat list of turns")
    except ValueError:  # Python reads no number of over 4300 digits
        _fail(path, "holds a number of thousands of digits, which JSON readers refuse: write it as text")
    if not isinstance(turns, list):
        _fail(path, f"holds a JSON {_kind(turns)}: write a list of turns")
    return turns


def _pairs(turns: list[Any], path: Path) -> list[Conversation]:
    contents = [_content(turn, index, path) for index, turn in enumerate(turns)]
    if len(turns) % 2:
        _fail(path, f"turn {len(turns) - 1}: the last user turn has no answer: add a 'therapist' turn or remove it")
    return [pair(prompt, answer) for prompt, answer in zip(contents[::2], contents[1::2], strict=True)]


def _content(turn: Any, index: int, path: Path) -> str:
    where = f"turn {index}"
    if not isinstance(turn, dict):
        _fail(path, f'{where}: is a JSON {_kind(turn)}: write {{"role": ..., "content": ...}}')
    role, content = turn.get("role"), turn.get("content")
    expected = ("user", "therapist")[index % 2]
    if role not in ("user", "therapist"):
        problem = "has no 'role'" if "role" not in turn else f"unknown role {_short(role)}"
        _fail(path, f"{where}: {problem}: use 'user' or 'therapist'")
    if role != expected:
        problem = f"two {role!r} turns in a row" if index else "the first turn is the therapist's"
        _fail(path, f"{where}: {problem}: a {expected!r} turn belongs here, join or remove one")
    if not isinstance(content, str):
        problem = "has no 'content'" if "content" not in turn else f"'content' is a JSON {_kind(content)}"
        _fail(path, f"{where}: {problem}: give it a text")
    if not content.strip():
        _fail(path, f"{where}: 'content' is empty: write the turn's text or remove its pair")
    try:
        content.encode()
    except UnicodeEncodeError:
        _fail(
            path,
            f"{where}: 'content' holds half of a surrogate pair, which is no character: write the character itself",
        )
    return content


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(value: Any) -> str:
    kinds = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), "null")


def _fail(path: Path, problem: str) -> NoReturn:
    raise CorpusError(f"corpus {path}: {problem}") from None
