"""Which settings of a method and its rows can a command line change? They are declared once, for pytest and every
command. A command's own options are in `__main__`, pytest's in `session.options`.

Imports nothing that takes long: a pytest that only prints its help reads the table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from lightweight import names

Placement = Literal["replicated", "sharded"]
"""What each of several ranks holds of a network: all of it, or a part."""

if TYPE_CHECKING:  # a method takes seconds to import
    from lightweight.corpus import How
    from lightweight.methods import Method

MAX_LENGTH = 256
"""Tokens in a row where nobody says otherwise, padding included, as in the original scripts."""


MOST = 2**31 - 1
"""What whole numbers may be said: torch's sizes and Python's ranges take no more than some of what is larger."""


def whole(least: int) -> Callable[[str], int]:
    """Reads whole numbers from `least` to MOST, and raises ValueError for anything else."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError("give a whole number") from None
        if value < least:
            raise ValueError(f"give at least {least}")
        if value > MOST:
            raise ValueError(f"give at most {MOST}")
        return value

    return read


def rate(text: str) -> float:
    """A learning rate. Raises ValueError."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise ValueError("give a number above 0, such as 1e-3")
    return value


@dataclass(frozen=True)
class SweptRates:
    """The learning rate of each method by its name, as `lightweight sweep` found them on the model of that name and
    wrote them to the file `path`. `digests` and `arguments`, which are TrainingArguments, are those of the methods as
    they were searched for, at their rates."""

    path: str
    model: str
    of: Mapping[str, float]
    digests: Mapping[str, str]
    arguments: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, path: str) -> Self:
        """Raises ValueError for what no sweep wrote."""
        try:
            document = json.loads(Path(path).read_text("utf-8"))
            found, tried = document["sweep"]["found"], document["outcomes"]
            rates = {name: rate(str(one["learning_rate"])) for name, one in found.items()}
            best = {
                one["method"]: one
                for one in tried
                if one["training_arguments"]["learning_rate"] == rates.get(one["method"])
            }
            digests = {name: str(best[name]["method_digest"]) for name in rates}
            arguments = {name: dict(best[name]["training_arguments"]) for name in rates}
            return cls(path, str(tried[0]["model"]), rates, digests, arguments)
        except OSError as error:
            raise ValueError(f"cannot be read ({error.strerror}): give what `lightweight sweep` wrote") from None
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError):
            raise ValueError("is not the record of a sweep: give what `lightweight sweep` wrote") from None


def rate_or_rates(text: str) -> float | SweptRates:
    """A learning rate, or those of a sweep's file. Raises ValueError."""
    return SweptRates.read(text) if text.endswith(".json") else rate(text)


def warmup(text: str) -> int | float:
    """Optimizer steps, or a share of all of them below 1. Raises ValueError."""
    value = _number(text)
    if not (0 <= value < 1 or (value >= 1 and value.is_integer())):
        raise ValueError("give a whole number of steps, or a share of them below 1, such as 0.1")
    if value > MOST:
        raise ValueError(f"give at most {MOST}")
    return value if 0 < value < 1 else int(value)


def share(text: str) -> float:
    """A probability below 1. Raises ValueError."""
    value = _number(text)
    if not 0 <= value < 1:
        raise ValueError("give a share from 0 to below 1, such as 0.05")
    return value


def layers(text: str) -> str | tuple[str, ...]:
    """`all-linear`, or names with commas between them, sorted. Raises ValueError."""
    said = {name.strip() for name in text.split(",")} - {""}
    if not said or ("all-linear" in said and len(said) > 1):
        raise ValueError("give names separated by commas, such as q_proj,v_proj, or all-linear alone")
    return "all-linear" if "all-linear" in said else tuple(sorted(said))


def one_of(*words: str) -> Callable[[str], str]:
    """Reads one of `words`, and raises ValueError for anything else."""

    def read(text: str) -> str:
        if text not in words:
            raise ValueError(f"choose one of {', '.join(words)}{names.question(text, words)}")
        return text

    return read


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


FORMATS = ("turns", "preference", "messages", "sharegpt", "alpaca", "prompt-completion", "text", "question-answer")
"""What `corpus.FORMATS` are called, which is not imported to say so."""


@dataclass(frozen=True)
class OfCorpus:
    """An option that says how a corpus is read, with argparse's other `settings`."""

    name: str
    help: str
    settings: Mapping[str, Any]


OF_CORPUS = (
    OfCorpus(
        "corpus-format",
        f"how the corpus is written: {', '.join(FORMATS)} (default: recognised by its keys)",
        {"choices": FORMATS, "metavar": "NAME"},
    ),
    OfCorpus(
        "skip-bad",
        "leave out rows that cannot be used, and count them (default: stop at the first one)",
        {"action": "store_true", "default": False},
    ),
    OfCorpus(
        "held-out",
        "what to evaluate on: another corpus, or a share of this one such as 0.1 (default: a sixth)",
        {"metavar": "FILE|SHARE"},
    ),
)


def how_read(said: Callable[[str], Any]) -> How:
    """How a corpus is read, by what is `said` for each of OF_CORPUS."""
    from lightweight.corpus import How

    return How(format=said("corpus_format"), skip_bad=said("skip_bad"), held_out=said("held_out"))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One of `Settings` as a command line says it. `of` is what it belongs to: a method's TrainingArguments, its LoRA
    adapter, the rows of a Trial, or its ranks; `key` is what it is called there. `others` are keys of the adapter that
    say the same for some layers."""

    name: str
    metavar: str
    read: Callable[[str], Any]
    help: str
    of: Literal["arguments", "adapter", "rows", "ranks"]
    key: str
    others: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        """As it is typed."""
        return f"--{self.name.replace('_', '-')}"

    def value(self, text: str | None) -> Any:
        """What `text` says, None for nothing. Raises ValueError."""
        if text is None:
            return None
        try:
            return self.read(text)
        except ValueError as error:
            raise ValueError(f"{self.flag} {names.one_line(text)}: {error}") from None


SETTINGS = (
    Setting(
        name="max_length",
        metavar="N",
        read=whole(2),  # `corpus.MIN_LENGTH`, which is not imported to say so
        help=f"longest row, in tokens (default: {MAX_LENGTH})",
        of="rows",
        key="max_length",
    ),
    Setting(
        name="loss_on",
        metavar="WHICH",
        read=one_of("all", "last"),
        help="which of the assistant's turns the loss is on: all, or the last one of a conversation (default: all)",
        of="rows",
        key="loss_on",
    ),
    Setting(
        name="long",
        metavar="HOW",
        read=one_of("cut", "split", "drop"),
        help="what to do with a conversation longer than a row: cut (leave out its first turns), split (into several "
        "rows) or drop (default: cut)",
        of="rows",
        key="long",
    ),
    Setting(
        name="padding",
        metavar="HOW",
        read=one_of("longest", "max"),
        help="pad the rows of a batch: longest (to the longest of them) or max (to --max-length) (default: max for a "
        "corpus of prompt and answer pairs, else longest)",
        of="rows",
        key="padding",
    ),
    Setting(
        name="batch_size",
        metavar="N",
        read=whole(1),
        help="rows per forward pass (default: the method's; if they do not fit, plan, and train without --method, take "
        "fewer rows in more passes)",
        of="arguments",
        key="per_device_train_batch_size",
    ),
    Setting(
        name="accumulation",
        metavar="N",
        read=whole(1),
        help="gradient accumulation: forward passes per optimizer step (default: the method's)",
        of="arguments",
        key="gradient_accumulation_steps",
    ),
    Setting(
        name="learning_rate",
        metavar="RATE",
        read=rate_or_rates,
        help="peak learning rate, or the file that `lightweight sweep` wrote, with a rate for each method (default: "
        "the method's, else 5e-5)",
        of="arguments",
        key="learning_rate",
    ),
    Setting(
        name="schedule",
        metavar="NAME",
        read=one_of(*names.SCHEDULES),
        help="learning rate schedule, as transformers names it: linear, cosine, constant, ... (default: the "
        "method's, else linear)",
        of="arguments",
        key="lr_scheduler_type",
    ),
    Setting(
        name="warmup",
        metavar="STEPS",
        read=warmup,
        help="warmup in optimizer steps, or as a share of all steps if below 1 (default: the method's, else 0)",
        of="arguments",
        key="warmup_steps",
    ),
    Setting(
        name="lora_rank",
        metavar="N",
        read=whole(1),
        help="rank of a LoRA adapter (default: the method's)",
        of="adapter",
        key="r",
        others=("rank_pattern",),
    ),
    Setting(
        name="lora_alpha",
        metavar="N",
        read=whole(1),
        help="alpha of a LoRA adapter, whose output is scaled by alpha / rank (default: the method's)",
        of="adapter",
        key="lora_alpha",
        others=("alpha_pattern",),
    ),
    Setting(
        name="lora_dropout",
        metavar="SHARE",
        read=share,
        help="dropout on a LoRA adapter's input (default: the method's)",
        of="adapter",
        key="lora_dropout",
    ),
    Setting(
        name="lora_layers",
        metavar="NAMES",
        read=layers,
        help="layers with a LoRA adapter: names separated by commas, or all-linear (default: the method's)",
        of="adapter",
        key="target_modules",
    ),
    Setting(
        name="scale",
        metavar="HOW",
        read=one_of("fixed", "batch", "batch-sqrt", "batch-linear"),
        help="what grows with the number of GPUs: nothing (fixed), the rows of a step (batch), or the rows and the "
        "learning rate, by its square root or linearly (batch-sqrt, batch-linear) (default: fixed)",
        of="ranks",
        key="scale",
    ),
    Setting(
        name="placement",
        metavar="HOW",
        read=one_of("replicated", "sharded"),
        help="with several GPUs: replicated (each holds the whole network) or sharded (each holds a part) (default: "
        "replicated if that is forecast to fit, else sharded)",
        of="ranks",
        key="placement",
    ),
)
"""What the suite, `plan` and `train` take alike."""


def as_typed(changed: Mapping[str, Any]) -> str:
    """What `Settings` have changed, as a record has it, as it was typed."""
    values = {name: ",".join(map(str, v)) if isinstance(v, list | tuple) else v for name, v in changed.items()}
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())


def changes(of_methods: Iterable[tuple[str, Mapping[str, Any] | None]]) -> str | None:
    """What was set of each method, by its name, in one line; None where nothing was."""
    said = dict.fromkeys(f"{name} ({as_typed(changed)})" for name, changed in of_methods if changed)
    return names.one_line(f"Set from outside the method: {', '.join(said)}.") if said else None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is set from a command line, None where nothing is.

    `max_length` is in tokens a row; `loss_on`, `long` and `padding` are as in Trial. `batch_size` is in sequences a
    forward pass, `accumulation` in passes an optimizer step, `warmup` in optimizer steps or, below 1, a share of all of
    them. `schedule` is one of transformers' names. `lora_layers` are names, or "all-linear". `scale` is as
    `Method.scaled` takes it, `placement` as Trial does.
    """

    max_length: int | None = None
    loss_on: str | None = None
    long: str | None = None
    padding: str | None = None
    batch_size: int | None = None
    accumulation: int | None = None
    learning_rate: float | SweptRates | None = None
    schedule: str | None = None
    warmup: int | float | None = None
    lora_rank: int | None = None
    lora_alpha: int | None = None
    lora_dropout: float | None = None
    lora_layers: str | tuple[str, ...] | None = None
    scale: str | None = None
    placement: Placement | None = None

    @classmethod
    def read(cls, said: Callable[[str], str | None]) -> Self:
        """What `said`, asked by a setting's name, has as text for each. Raises ValueError, in one line."""
        return cls(**{setting.name: setting.value(said(setting.name)) for setting in SETTINGS})

    def given(self, *of: str) -> list[tuple[Setting, Any]]:
        """Those settings of `of` that are set, each with its value."""
        every = [(setting, getattr(self, setting.name)) for setting in SETTINGS if setting.of in of]
        return [(setting, value) for setting, value in every if value is not None]

    @property
    def rows(self) -> dict[str, Any]:
        """Fields of a Trial that are set."""
        return {setting.key: value for setting, value in self.given("rows")}

    @property
    def keeps_passes(self) -> bool:
        """Whether it is said how a step is divided into passes, so that no forecast is to choose."""
        return self.batch_size is not None or self.accumulation is not None

    def fits(self, method: Method) -> bool:
        """Whether `method` has all that is set."""
        return not self.given("adapter") or _has_lora(method)

    def apply(self, method: Method, world_size: int = 1) -> Method:
        """`method` with what is set, for so many ranks; LoRA's settings leave alone a method without LoRA. The suite's
        own methods are changed; any other one is where it says nothing itself. Raises MethodError where it says
        otherwise, and for what no method can have."""
        return self._applied(method).scaled(world_size, self.scale or "fixed")

    def _applied(self, method: Method) -> Method:
        from lightweight import methods

        is_stock = methods.METHODS.get(method.name) is method
        of_adapter = self.given("adapter") if _has_lora(method) else []
        changed: dict[str, Any] = {}
        for setting, given in [*self.given("arguments"), *of_adapter]:
            value = given
            own, says = _own(method, setting)
            if isinstance(value, SweptRates):
                if method.name not in value.of:
                    swept = ", ".join(value.of) or "no method"
                    here = f"{setting.flag} {value.path}"
                    raise methods.MethodError(
                        f"{here}: has no rate for method {method.name}, only for {swept}: sweep it, too"
                    )
                value, says = value.of[method.name], ""  # it was searched for, whatever the method says
            if own == (set(value) if isinstance(value, tuple) else value):
                continue
            if says and not is_stock:
                here = as_typed({setting.name: value})
                raise methods.MethodError(
                    f"method {method.name} says {says}, and the command line {here}: leave out one of them"
                )
            changed[setting.name] = value
        return with_changed(method, changed)

    def applied(self, methods: Iterable[Method], world_size: int = 1) -> list[Method]:
        """`methods` with what is set, for so many ranks. Raises MethodError as `apply` does, and where LoRA's settings
        are set and none of them has LoRA."""
        from lightweight.methods import MethodError

        changed = [self.apply(method, world_size) for method in methods]
        if changed and not any(map(self.fits, changed)):
            (setting, value), *_ = self.given("adapter")
            called = ", ".join(method.name for method in changed)
            raise MethodError(
                f"{as_typed({setting.name: value})}: method {called} has no LoRA adapter: leave it out, or take a "
                "method that has one, such as lora"
            )
        return changed


def with_changed(method: Method, changed: Mapping[str, Any], world_size: int = 1) -> Method:
    """`method` with values by the names of `Settings`, as a record has them as `changed`, whatever it says itself; for
    so many ranks. Raises MethodError for what no adapter can have."""
    from lightweight.methods import MethodError

    new: dict[str, dict[str, Any]] = {"arguments": {}, "adapter": {}}
    for setting in SETTINGS:
        if setting.name in changed and setting.of in new:
            value = changed[setting.name]
            new[setting.of][setting.key] = list(value) if isinstance(value, tuple) else value
    adapter: Any = method.adapter
    if new["adapter"]:
        try:
            adapter = replace(adapter, **new["adapter"])
        except (TypeError, ValueError) as error:
            said = as_typed({one.name: changed[one.name] for one in SETTINGS if one.key in new["adapter"]})
            raise MethodError(f"method {method.name}: {said} is refused ({error})") from error
    if new["arguments"] or new["adapter"]:
        method = replace(
            method,
            adapter=adapter,
            training_arguments={**method.training_arguments, **new["arguments"]},
            changed={**method.changed, **{name: value for name, value in changed.items() if name != "scale"}},
        )
    return method.scaled(world_size, changed.get("scale") or "fixed")


def _has_lora(method: Method) -> bool:
    return getattr(method.adapter, "peft_type", None) == "LORA"


def _own(method: Method, setting: Setting) -> tuple[Any, str]:
    """What `method` has for `setting`, and how it says so itself: with nothing where that is the library's default,
    which a config of peft has whether or not somebody has said it, and a copy of the suite's methods spells out."""
    from lightweight import training_arguments

    if setting.of == "arguments":
        usual = training_arguments.default(setting.key)
        value = method.training_arguments.get(setting.key, usual)
        return value, f"{setting.key}={value!r}" if value != usual else ""
    adapter: Any = method.adapter
    defaults = {field.name: field.default for field in fields(adapter)}
    others = [f"{key}={getattr(adapter, key)!r}" for key in setting.others if getattr(adapter, key, None)]
    value = getattr(adapter, setting.key)
    says = [f"{setting.key}={value!r}"] if value != defaults.get(setting.key) else others
    return value, says[0] if says else ""
