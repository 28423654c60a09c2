"""When are two trials alike? What they must have in common for each kind of comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightweight.record.entries import BASELINE, Entry
from lightweight.settings import SETTINGS

NOT_ALWAYS_KNOWN = ("method_digest", "weights_revision")
"""Keys that an entry may have no value for, though its trial had one."""


@dataclass(frozen=True)
class Likeness:
    """Trials with equal `keys`, which are fields of an `Entry`. A key of NOT_ALWAYS_KNOWN is ignored if one of the two
    has no value for it."""

    keys: tuple[str, ...]

    def also(self, *keys: str) -> Likeness:
        """This likeness with more keys."""
        return Likeness((*self.keys, *keys))

    def but(self, *keys: str) -> Likeness:
        """This likeness without `keys`."""
        return Likeness(tuple(key for key in self.keys if key not in keys))

    def of(self, entry: Entry) -> tuple[Any, ...]:
        """The values of the keys in `entry`."""
        return tuple(getattr(entry, key) for key in self.keys)

    def differing(self, one: Entry, other: Entry) -> list[str]:
        """The keys that differ between two entries."""
        pairs = [(key, getattr(one, key), getattr(other, key)) for key in self.keys]
        return [key for key, a, b in pairs if a != b and not (key in NOT_ALWAYS_KNOWN and None in (a, b))]

    def holds(self, one: Entry, other: Entry) -> bool:
        """Whether two entries are alike."""
        return not self.differing(one, other)

    def groups(self, entries: Iterable[Entry]) -> list[list[Entry]]:
        """`entries` in groups with equal keys, in the order of their first."""
        groups: dict[tuple[Any, ...], list[Entry]] = {}
        for entry in entries:
            groups.setdefault(self.of(entry), []).append(entry)
        return list(groups.values())


SAME_BASELINE = Likeness(("model", "target", "device", "world_size", "weights", "corpus_digest"))
"""What a trial has in common with the baseline that it is held against: network, card, data."""

SAME_METHOD = SAME_BASELINE.also("method", "method_digest")
"""What the seeds and lengths of one method have in common."""

SAME_CELL = SAME_METHOD.also("precision", "max_length", "tokens_per_step", "loss_on", "long", "padding", "placement")
"""What two runs of a cell have in common: rates and memory can be compared."""

SAME_TRIAL = SAME_CELL.also("seed", "planned_steps")
"""What two runs of a trial have in common, step times included, and what tells the trials of a run apart."""

SAME_WEIGHTS = SAME_TRIAL.also("weights_revision")
"""What two runs of a trial have in common if their losses can be compared."""

SAME_BUT_RANKS = SAME_TRIAL.but("world_size", "placement")
"""A trial on one GPU and the same on several."""

SAME_BUT_SCALE = SAME_BUT_RANKS.but("method_digest", "tokens_per_step", "planned_steps").also(
    "adapter", "weights_dtype", "captured_step"
)
"""And on several whose step has grown with them."""


OF_METHOD = ("adapter", "quantization", "weights_dtype", "training_arguments", "captured_step", "library", "own_code")
"""Fields of an `Entry` that its `method_digest` is of."""

WITH_DEFAULTS = ("adapter", "quantization")
"""Those of them in which a library writes all that it knows, so that another version of it writes other keys."""


def differing_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ between two trials, each as it was and is. Settings are JSON; keys of objects are listed
    by their own names, and None means that one trial lacks the key. The method's digest is listed only if nothing else
    differs."""
    found: dict[str, tuple[Any, Any]] = {}
    for key, is_now in now.items():
        was = then.get(key)
        if isinstance(was, Mapping) and isinstance(is_now, Mapping):
            inner = was.keys() & is_now.keys() if key in WITH_DEFAULTS else was.keys() | is_now.keys()
            found |= {name: (was.get(name), is_now.get(name)) for name in sorted(inner - {"peft_version"})}
        elif key != "changed":  # which says again what differs
            found[key] = was, is_now
    differing = {key: pair for key, pair in found.items() if pair[0] != pair[1]}
    return {key: pair for key, pair in differing.items() if key != "method_digest"} or differing


def arguments_told(then: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    """Which TrainingArguments that a command line can set differ from those that a record has, in words; nothing where
    none do. A record has others as the device had them, such as fp16."""
    keys = [setting.key for setting in SETTINGS if setting.of == "arguments"]
    pairs = {key: ((then or {}).get(key), now.get(key)) for key in keys}
    return ", ".join(f"{key} was {was!r} and is {here!r}" for key, (was, here) in pairs.items() if was != here)


def baseline_of(entry: Entry, entries: Sequence[Entry]) -> Entry | None:
    """The baseline of `entry`'s model on the same target and device; of several, the one most alike. None if there is
    none."""
    baselines = [other for other in entries if other.method == BASELINE and SAME_BASELINE.holds(other, entry)]
    length = Likeness(("max_length", "loss_on", "long", "padding", "tokens_per_step", "planned_steps", "seed"))
    wanted = length.of(entry)
    return max(
        baselines, key=lambda other: [a == b for a, b in zip(length.of(other), wanted, strict=True)], default=None
    )
