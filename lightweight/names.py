"""Which names exist, and which of them is meant? What a person types is checked before torch is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

METHODS = ("baseline", "lora", "qlora", "baseline-captured", "lora-captured", "qlora-captured")
"""The keys of `methods.METHODS`, which cannot be asked for without importing peft."""

SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"),
    *("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"),
)
"""Those of transformers' `SchedulerType`, which is not imported to say so, that need no evaluation on the way."""


def check_method(text: str) -> None:
    """Raise ValueError unless `text` is a known method or looks like `package.module:NAME` or `file.py:NAME`."""
    if text not in METHODS and ":" not in text:
        raise ValueError(unknown("method", text, METHODS, "give your own as package.module:NAME or file.py:NAME"))


def unknown(kind: str, text: str, known: Iterable[str], otherwise: str) -> str:
    """The line that refuses `text` as the name of a `kind`: what exists, what else can be given, and what is near."""
    known = tuple(known)
    return f"unknown {kind} {text[:100]!r}: choose one of {', '.join(known)}, or {otherwise}{question(text, known)}"


def question(text: str, known: Iterable[str]) -> str:
    """The end of a line that refuses `text`: whether one of `known` was meant, nothing where none is near."""
    meant = nearest(text, known)
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def nearest(text: str, known: Iterable[str]) -> list[str]:
    """Those of `known` that `text` may be a slip of, the likeliest first; capitals and hyphens do not count."""
    plain = {_plain(name): name for name in known}
    if _plain(text) in plain:
        return [plain[_plain(text)]]
    import difflib  # of a mistake alone

    return [plain[match] for match in difflib.get_close_matches(_plain(text), plain, n=2, cutoff=0.7)]


def refuse_namesakes(kind: str, things: Iterable[Any]) -> None:
    """Raise ValueError where two of `things`, dataclasses with a `name`, have one name and other settings."""
    known: dict[str, Any] = {}
    for thing in things:
        other = known.setdefault(thing.name, thing)
        if differing := [name for name, value in _settings(thing).items() if _settings(other)[name] != value]:
            raise ValueError(
                f"two different {kind}s are called {thing.name!r} (their {', '.join(differing)} differ): give one "
                f"another name: replace({kind}, name=...)"
            )


def _settings(thing: Any) -> dict[str, str]:
    """What tells methods or models apart, field by field."""
    values = {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}
    return {name: repr(_ordered(value)) for name, value in values.items()}


def _ordered(value: Any) -> Any:
    """`value` so that what is equal reads the same, a config of peft or transformers included."""
    if hasattr(value, "to_dict"):
        return {"type": type(value).__name__, **_ordered(value.to_dict())}
    match value:
        case Mapping():
            return {str(key): _ordered(item) for key, item in sorted(value.items(), key=str)}
        case set() | frozenset():
            return sorted(map(str, value))
        case list() | tuple():
            return [_ordered(item) for item in value]
    return value


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


def is_text(text: str) -> bool:
    """Whether `text` can be encoded: it holds no half of a surrogate pair, as JSON may say, and as Python reads what a
    terminal says in another encoding than its own."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def one_line(text: str) -> str:
    """`text` with what is no printable character spelled as Python spells it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
