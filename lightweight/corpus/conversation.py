"""What a corpus is made of: conversations and plain texts, before any tokenizer has seen them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["system", "user", "assistant"]

Kind = Literal["pairs", "conversations", "texts"]
"""What a corpus is of: the dialogues that this project began with, each a turn and its answer; conversations of any
length; or texts without roles."""

THERAPIST = "Therapist"
"""Who answers in the dialogues that this project began with."""


class CorpusError(ValueError):
    """A corpus that cannot be used. The message names the file, the place in it and the mend."""


class Defect(ValueError):  # noqa: N818  a row's, which becomes an error or is skipped
    """What is wrong with one row of a corpus: the field, the problem and the mend."""


@dataclass(frozen=True, slots=True)
class Message:
    """What one side says in its turn."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A system message, if any, and turns of user and assistant. The assistant's are trained on.

    `answerer` is the assistant's name in the text, for tokenizers without a chat template.
    """

    messages: tuple[Message, ...]
    answerer: str = "Assistant"


@dataclass(frozen=True, slots=True)
class Text:
    """A text without roles or chat template. `completion` is trained on; `prompt` comes before it."""

    prompt: str
    completion: str


Example = Conversation | Text
"""What is trained on as one row, or held out."""


def pair(prompt: str, answer: str) -> Conversation:
    """A user's turn and the therapist's answer to it."""
    return Conversation((Message("user", prompt), Message("assistant", answer)), answerer=THERAPIST)


def contents(example: Example) -> tuple[str, ...]:
    """All that is said in `example`."""
    if isinstance(example, Text):
        return example.prompt, example.completion
    return tuple(message.content for message in example.messages)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a corpus's examples came from, to tell a person.

    Attributes:
        format: The format that the file is in.
        conversations: How many conversations it has.
        messages: Their messages of user and assistant.
        texts: How many texts it has.
        skipped: Rows of the file that could not be used; of the format `turns`, turns.
        duplicates: Examples that are equal to another one, word for word.
        leaked: Examples that were in both parts, and are only held out.
    """

    format: str
    conversations: int = 0
    messages: int = 0
    texts: int = 0
    skipped: int = 0
    duplicates: int = 0
    leaked: int = 0

    def __str__(self) -> str:
        """One line."""
        said = []
        if self.conversations:
            said.append(f"{self.conversations:,} conversations, {self.messages / self.conversations:.1f} turns each")
        if self.texts:
            said.append(f"{self.texts:,} texts")
        if self.format == "preference":
            said.append("trained on is the chosen answer, the rejected one is not read")
        if self.duplicates:
            said.append(f"exact duplicates, each on the side of its first: {self.duplicates:,}")
        if self.leaked:
            said.append(f"held out and so left out of training: {self.leaked:,}")
        if self.skipped:
            said.append(f"{'turns' if self.format == 'turns' else 'rows'} skipped: {self.skipped:,}")
        return f"{self.format}: {'; '.join(said)}"


@dataclass(frozen=True)
class Question:
    """A dialogue up to a user's turn, or the prompt of a text, and the only answer that counts as right."""

    begun: Example
    answer: str


@dataclass(frozen=True)
class Task:
    """Questions, none of which is trained on, and the SHA-256 of their text."""

    questions: tuple[Question, ...]
    digest: str


@dataclass(frozen=True)
class Corpus:
    """Examples to train on and examples held out. Examples are not part of its `repr`, which could be a gigabyte.

    Attributes:
        train: Examples to train on.
        heldout: Examples to evaluate on.
        digest: SHA-256 of all of them, in the order of the file.
        elsewhere: Plain text from somewhere else, which is not trained on. How much its loss rises is what the model
            forgot. None does not measure it.
        origin: What was read.
        task: Questions that are asked before and after training.
    """

    train: tuple[Example, ...] = field(repr=False)
    heldout: tuple[Example, ...] = field(repr=False)
    digest: str
    elsewhere: str | None = field(default=None, repr=False)
    origin: Origin | None = None
    task: Task | None = None

    @property
    def kind(self) -> Kind:
        """The kind of its examples, by the first one to train on."""
        first = self.train[0] if self.train else None
        if isinstance(first, Text):
            return "texts"
        return "pairs" if first is None or first.answerer == THERAPIST else "conversations"

    @property
    def elsewhere_digest(self) -> str | None:
        """The sha256 of `elsewhere`."""
        return None if self.elsewhere is None else hashlib.sha256(self.elsewhere.encode()).hexdigest()
