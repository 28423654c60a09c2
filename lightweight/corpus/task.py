"""What can be answered right or wrong? Prompts with the one answer that counts, none of which is trained on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightweight.corpus.conversation import (
    THERAPIST,
    Conversation,
    Corpus,
    CorpusError,
    Example,
    Message,
    Question,
    Task,
    Text,
    contents,
)


@dataclass(frozen=True)
class _Asked:
    messages: tuple[Message, ...]
    answer: str


def load_task(path: Path, corpus: Corpus) -> Task:
    """The task in the JSON lines at `path`, `{"prompt": ..., "answer": ...}` or `{"messages": [...], "answer": ...}`
    with the user's turn last, put as the examples of `corpus` are. Raises CorpusError, also for a question that is
    trained on."""
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # JSON strings may hold other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise CorpusError(f"task {path}: cannot be read ({reason}): give a file of JSON lines") from error
    asked: list[_Asked] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                asked.append(_of_row(json.loads(line)))
            except (ValueError, RecursionError) as error:
                mend = 'write {"prompt": "...", "answer": "..."} or {"messages": [...], "answer": "..."}'
                raise CorpusError(f"task {path}: line {number}: {error}: {mend}") from error
    if not asked:
        raise CorpusError(f"task {path}: has no question: write one per line")
    questions = tuple(Question(_begun(one, corpus, path), one.answer) for one in asked)
    trained_on = {contents(example) for example in corpus.train}
    for number, one in enumerate(asked, 1):
        if (*(message.content for message in one.messages), one.answer) in trained_on:
            raise CorpusError(
                f"task {path}: question {number} is in the training data with its answer: leave it out of one of them"
            )
    said = [[*([message.role, message.content] for message in one.messages), one.answer] for one in asked]
    digest = hashlib.sha256(json.dumps(said, ensure_ascii=False).encode()).hexdigest()
    return Task(questions, digest)


def _of_row(row: Any) -> _Asked:
    """Raises ValueError."""
    match row:
        case {"prompt": str(prompt), "answer": str(answer)} if prompt.strip() and answer.strip():
            return _Asked((Message("user", prompt),), answer.strip())
        case {"messages": [*given], "answer": str(answer)} if given and answer.strip():
            messages = tuple(map(_message, given))
            turns = [message.role for message in messages if message.role != "system"]
            if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
                raise ValueError("messages that are not turns of user and assistant, ending with the user's")
            return _Asked(messages, answer.strip())
    raise ValueError("no prompt or messages with an answer")


def _message(given: Any) -> Message:
    match given:
        case {"role": "system" | "user" | "assistant" as role, "content": str(content)}:
            return Message(role, content)
    raise ValueError("a message without a role (system, user, assistant) or a text as content")


def _begun(asked: _Asked, corpus: Corpus, path: Path) -> Example:
    """The question as what it is trained on begins."""
    if corpus.kind == "conversations":
        return Conversation(asked.messages)
    if len(asked.messages) > 1:
        raise CorpusError(f"task {path}: has a dialogue, but the corpus has {corpus.kind}: ask one turn")
    if corpus.kind == "texts":
        return Text(asked.messages[0].content, "")
    return Conversation(asked.messages, THERAPIST)
