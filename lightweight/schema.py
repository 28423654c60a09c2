"""What may a record hold? Each key's kind of value, and the fault that is found first.

A record is JSON that anybody may have edited, cut off, or written with another version. Everything that reads one
computes with it and shows it, so types, ranges and words are checked here, once, and what passes needs no second look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

OUTCOMES = ("completed", "out_of_memory", "diverged", "crashed", "timed_out")
PHASES = ("start", "build", "evaluate", "capture", "train", "forward", "backward", "optimizer", "save")
WEIGHTS = ("pretrained", "random")
PRECISIONS = ("fp32", "fp16", "bf16", "half")
FORECAST_VERDICTS = ("fits", "does_not_fit", "too_close_to_call")
GATE_VERDICTS = ("pass", "fail", "undecided")
PAIRINGS = ("alternating", "sharing a core", "one after the other")
SHOWN_AS = ("ladder", "peers")
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
SETTINGS = Kind("an object", lambda value: isinstance(value, dict))


def _kinds(*groups: tuple[str, Kind]) -> dict[str, Kind]:
    return {key: kind for keys, kind in groups for key in keys.split()}


OUTCOME: Mapping[str, Kind] = _kinds(
    ("model method target corpus_digest device", NAME),
    ("outcome", word(OUTCOMES)),
    ("phase forecast_phase", word(PHASES).or_none()),
    ("weights", word(WEIGHTS)),
    ("precision", word(PRECISIONS).or_none()),
    ("forecast_verdict", word(FORECAST_VERDICTS).or_none()),
    ("shown_as", word(SHOWN_AS).or_none()),
    ("emulated", FLAG.or_none()),
    ("captured compiled", FLAG.or_none()),
    ("seed", COUNT.or_none()),
    ("world_size", AT_LEAST_1),
    ("steps", COUNT),
    ("tokens_per_step steps_per_epoch max_length", AT_LEAST_1.or_none()),
    ("planned_steps diverged_at_step failed_rank parameters trainable_parameters truncated_sequences", COUNT.or_none()),
    ("peak_allocated_bytes peak_reserved_bytes average_allocated_bytes average_reserved_bytes", COUNT.or_none()),
    ("process_bytes host_peak_bytes saved_bytes requested_bytes budget_bytes device_bytes", COUNT.or_none()),
    ("forecast_allocated_bytes forecast_reserved_bytes", COUNT.or_none()),
    ("rank_peak_allocated_bytes rank_peak_reserved_bytes", COUNT.or_none().listed().or_none()),
    ("step_tokens step_padded_tokens", COUNT.listed().or_none()),
    ("forecast_bytes_by_cause", COUNT.by_name().or_none()),
    ("train_loss", LOSS.or_none().listed().or_none()),
    ("heldout_loss_before heldout_loss_after elsewhere_loss_before elsewhere_loss_after", LOSS.or_none()),
    ("step_seconds", AMOUNT.or_none().listed().or_none()),
    ("steady_step_seconds", POSITIVE.or_none()),
    ("cold_seconds cpu_seconds rank_tokens_per_second padded_tokens_per_second", AMOUNT.or_none()),
    ("tokens_per_second", POSITIVE.or_none()),
    ("phase_seconds", AMOUNT.by_name().or_none()),
    ("versions", TEXT.or_none().by_name().or_none()),
    (
        "reason details test worker visible_gpu capture_note device_driver elsewhere_digest method_digest library",
        TEXT.or_none(),
    ),
    ("weights_dtype weights_revision weights_file base_quantization", TEXT.or_none()),
    ("adapted_layers", TEXT.listed().or_none()),
    ("adapter quantization training_arguments captured_step", SETTINGS.or_none()),
)

SPEEDUP: Mapping[str, Kind] = _kinds(
    ("baseline", NAME),
    ("log_ratios", LOG_RATIO.listed()),
    ("ratio high", RATIO.or_none()),
    ("low", AMOUNT.or_none()),
    (
        "cap",
        Kind(
            "a multiple of 4 from 8 on", lambda value: _is_whole(value) and 8 <= value <= MOST_PAIRS and value % 4 == 0
        ),
    ),
    ("pairing", word(PAIRINGS)),
    ("steps_per_round", AT_LEAST_1),
    ("floor", Kind("a share", _within(0, 1)).or_none()),
    ("verdict", word(GATE_VERDICTS).or_none()),
    ("ended_after_seconds", AMOUNT.or_none()),
    ("reason", TEXT.or_none()),
)

LATER = ("ended_after_seconds",)
"""Keys of a speedup that older records do not have."""

FORECAST: Mapping[str, Kind] = _kinds(
    ("model method target", NAME),
    ("verdict", word(FORECAST_VERDICTS)),
    ("phase", word(PHASES).or_none()),
    ("forecast_allocated_bytes forecast_reserved_bytes", COUNT),
    ("budget_bytes", COUNT.or_none()),
    ("max_length", AT_LEAST_1.or_none()),
    ("bytes_by_cause", COUNT.by_name()),
    ("gpus world_size batch_size tokens_per_step", AT_LEAST_1.or_none()),
)


def fault_of_outcome(entry: Any, required: tuple[str, ...]) -> str | None:
    """What is wrong with an element of a record's `outcomes`, None where nothing is."""
    return (
        _fault(entry, OUTCOME, required)
        or _fault_of_speedup(entry.get("speedup"))
        or _fault_of_ends(entry)
        or _fault_of_rest(entry)
    )


def fault_of_forecast(row: Any, required: tuple[str, ...]) -> str | None:
    """What is wrong with an element of a record's `forecasts`, None where nothing is."""
    return _fault(row, FORECAST, required) or _fault_of_rest(row)


def _fault(found: Any, kinds: Mapping[str, Kind], required: tuple[str, ...]) -> str | None:
    if not isinstance(found, dict):
        return "is no object"
    if missing := [key for key in required if key not in found]:
        return f"has no {missing[0]!r}"
    for key, kind in kinds.items():
        if key in found and not kind.holds(found[key]):
            return f"has {brief(found[key])} as {key!r}, where {kind.words} belongs"
    return None


def _fault_of_speedup(speedup: Any) -> str | None:
    if speedup is None:
        return None
    fault = _fault(speedup, SPEEDUP, tuple(key for key in SPEEDUP if key not in LATER))
    if fault:
        return f"has a 'speedup' that {fault}"
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


def _fault_of_ends(entry: Mapping[str, Any]) -> str | None:
    """Some values must be there for others to be true."""
    if entry["outcome"] == "completed" and entry["step_seconds"] and entry["steady_step_seconds"] is None:
        return "has step times in 'step_seconds' and no 'steady_step_seconds'"
    return None


def _fault_of_rest(found: Mapping[Any, Any]) -> str | None:
    """Keys that this version does not know are kept, as long as they can be shown."""
    wrong = [key for key, value in found.items() if not _is_shallow(value)]
    return f"has {brief(found[wrong[0]])} as {brief(wrong[0])}, where {ANYTHING.words} belong" if wrong else None


def brief(value: Any) -> str:
    """`value` as Python writes it, in ASCII and in 60 characters at most."""
    try:
        said = ascii(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, lists within lists
        said = "what is too long to show"
    return said if len(said) <= 60 else f"{said[:60]}..."
