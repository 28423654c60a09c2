"""Which values may a record hold? Each kind of value as the type of a record's fields, and the first fault of a record.

A record is JSON that anybody may have edited, cut off, or written with another version. Everything that reads one
computes with it and shows it, so types, ranges and words are checked here, once, and what passes needs no second look.
A field's type says its kind: `Count | None` is a whole number or null, `tuple[Loss, ...]` a list of losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

Ending = Literal["completed", "out_of_memory", "diverged", "crashed", "timed_out"]
Phase = Literal["start", "build", "evaluate", "capture", "train", "forward", "backward", "optimizer", "save"]
Weights = Literal["pretrained", "random"]
Precision = Literal["fp32", "fp16", "bf16", "half"]
ForecastVerdict = Literal["fits", "does_not_fit", "too_close_to_call"]
GateVerdict = Literal["pass", "fail", "undecided"]
Pairing = Literal["alternating", "sharing a core", "one after the other"]
ShownAs = Literal["ladder", "peers"]
TrainedOn = Literal["pairs", "conversations", "texts"]
LossOn = Literal["all", "last"]
Long = Literal["cut", "split", "drop"]
Padding = Literal["longest", "max"]
Placement = Literal["replicated", "sharded"]
"""The words that a record may say, as the modules that write them spell them; a test holds the two together. This one
imports none of those: they need torch, and reading a record does not."""

LARGEST = 2**53
"""Up to here every reader of JSON has whole numbers exactly; as bytes it is 8 PiB, as seconds a long time."""

LARGEST_FLOAT32 = 3.5e38
"""What a loss can be at most before it is infinite."""

LARGEST_LOG_RATIO = 100.0
"""exp(100) is far beyond what a step can gain, and exp() of a few such numbers is still finite."""

MOST_PAIRS = 2**16
"""Pairs of rounds that a speedup may be planned with."""

LONGEST_NAME = 1000
DEEPEST = 20
"""Characters of a name, and lists and objects within each other, in any value that is kept."""


@dataclass(frozen=True)
class Kind:
    """What values a key may have, in words that complete "where ... belongs", and whether a value is one of them."""

    words: str
    holds: Callable[[Any], bool]

    def or_none(self) -> Kind:
        """This, or null where there is nothing to say."""
        return Kind(f"{self.words} or null", lambda value: value is None or self.holds(value))

    def listed(self) -> Kind:
        """A list of these."""
        return Kind(
            f"a list of ({self.words})",
            lambda value: isinstance(value, list) and all(self.holds(item) for item in value),
        )

    def by_name(self) -> Kind:
        """An object with these as values."""
        return Kind(
            f"an object of ({self.words})",
            lambda value: isinstance(value, dict) and all(self.holds(item) for item in value.values()),
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(float(value))
    except OverflowError:
        return False


def _within(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: _is_finite(value) and low <= value <= high


def word(words: tuple[str, ...]) -> Kind:
    """One of `words`."""
    return Kind(f"one of {', '.join(words)}", lambda value: isinstance(value, str) and value in words)


def _is_shallow(value: Any, depth: int = DEEPEST) -> bool:
    """Whether no list or object lies deeper than `depth`, and every number is finite."""
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_is_shallow(item, depth - 1) for item in items)
    return value is None or isinstance(value, str | bool) or _is_finite(value)


NAME = Kind(
    f"a name of 1 to {LONGEST_NAME} characters",
    lambda value: isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and bool(value.strip()),
)
TEXT = Kind("text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
COUNT = Kind("a whole number from 0 to 2^53", lambda value: _is_whole(value) and 0 <= value <= LARGEST)
AT_LEAST_1 = Kind("a whole number from 1 to 2^53", lambda value: _is_whole(value) and 1 <= value <= LARGEST)
AMOUNT = Kind("a number from 0 to 2^53", _within(0, LARGEST))
POSITIVE = Kind("a number above 0, up to 2^53", lambda value: _within(0, LARGEST)(value) and value > 0)
LOSS = Kind("a finite number of nats", _within(-LARGEST_FLOAT32, LARGEST_FLOAT32))
LOG_RATIO = Kind("a logarithm from -100 to 100", _within(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))
RATIO = Kind("a number above 0", lambda value: _is_finite(value) and value > 0)
ANYTHING = Kind(f"finite numbers, text, and at most {DEEPEST} levels of lists and objects", _is_shallow)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))

Name = Annotated[str, NAME]
Count = Annotated[int, COUNT]
AtLeast1 = Annotated[int, AT_LEAST_1]
Amount = Annotated[float, AMOUNT]
Positive = Annotated[float, POSITIVE]
Loss = Annotated[float, LOSS]
LogRatio = Annotated[float, LOG_RATIO]
Ratio = Annotated[float, RATIO]
Share = Annotated[float, Kind("a share", _within(0, 1))]
Pairs = Annotated[
    int,
    Kind("a multiple of 4 from 8 on", lambda value: _is_whole(value) and 8 <= value <= MOST_PAIRS and value % 4 == 0),
]
Settings = Annotated[Mapping[str, Any], OBJECT]
"""Types with what a checker of types does not know of them."""

NO_KEY = "no key"
"""In the metadata of a dataclass's field that is no key of the JSON."""


def kind(of: Any) -> Kind:
    """The kind of value that a field of type `of` has; what is in a dataclass's own fields is no matter of it."""
    origin, parts = get_origin(of), get_args(of)
    if origin is Annotated:
        declared: Kind = of.__metadata__[0]
        return declared
    if origin is Literal:
        return word(parts)
    if origin in (Union, UnionType):
        (one,) = [part for part in parts if part is not NoneType]
        return kind(one).or_none()
    if origin is tuple:
        return kind(parts[0]).listed()
    if origin is not None:
        return kind(parts[1]).by_name()
    return OBJECT if is_dataclass(of) else {str: TEXT, bool: FLAG}[of]


@lru_cache
def kinds(record: type) -> Mapping[str, Kind]:
    """The kind of each key that the JSON of `record`, a dataclass, may have."""
    types = get_type_hints(record, include_extras=True)
    return {field.name: kind(types[field.name]) for field in fields(record) if NO_KEY not in field.metadata}


def fault(given: Any, record: type, required: tuple[str, ...]) -> str | None:
    """What is wrong with `given` as the JSON of `record`, a dataclass, None where nothing is."""
    if not isinstance(given, dict):
        return "is no object"
    if missing := [key for key in required if key not in given]:
        return f"has no {missing[0]!r}"
    for key, of_key in kinds(record).items():
        if key in given and not of_key.holds(given[key]):
            return f"has {brief(given[key])} as {key!r}, where {of_key.words} belongs"
    return None


def fault_of_interval(speedup: Mapping[str, Any]) -> str | None:
    """What is wrong between the numbers of a speedup, each of which is of its kind, None where nothing is."""
    pairs, ratio, low, high = (speedup[key] for key in ("log_ratios", "ratio", "low", "high"))
    if len(pairs) > speedup["cap"]:
        return "has a 'speedup' with more pairs in 'log_ratios' than its 'cap'"
    if ratio is None:
        return "has a 'speedup' with an interval and no 'ratio'" if (low, high) != (None, None) else None
    if low is None or not low <= ratio * (1 + 1e-9) or (high is not None and high < ratio * (1 - 1e-9)):
        return "has a 'speedup' whose 'ratio' lies outside of 'low' to 'high'"
    if not pairs or abs(math.log(ratio) - math.fsum(pairs) / len(pairs)) > 1e-6:
        return "has a 'speedup' whose 'ratio' is not the mean of its 'log_ratios'"
    return None


def fault_of_steps(entry: Mapping[str, Any]) -> str | None:
    """What is wrong between a trial's step times, each of which is of its kind, None where nothing is."""
    if entry["outcome"] == "completed" and entry["step_seconds"] and entry["steady_step_seconds"] is None:
        return "has step times in 'step_seconds' and no 'steady_step_seconds'"
    return None


def fault_of_rest(given: Mapping[Any, Any]) -> str | None:
    """What is wrong with keys that this version does not know, None where they can be kept and shown."""
    wrong = [key for key, value in given.items() if not _is_shallow(value)]
    return f"has {brief(given[wrong[0]])} as {brief(wrong[0])}, where {ANYTHING.words} belong" if wrong else None


def brief(value: Any) -> str:
    """`value` as Python writes it, in ASCII and in 60 characters at most."""
    try:
        said = ascii(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, lists within lists
        said = "what is too long to show"
    return said if len(said) <= 60 else f"{said[:60]}..."
