"""Which options does pytest get, without a collision with those of other plugins?

Every option has a long name, `--lightweight-model`, that is nobody else's, and a short one, `--model`, where nobody
else has an option of that name: another plugin's or conftest's goes before ours, whichever was loaded first.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lightweight import models, names, targets
from lightweight.internals.pytest import before_parsing, taken_names
from lightweight.settings import OF_CORPUS, SETTINGS, Setting
from lightweight.verdict.limits import LIMITS, Limit
from lightweight.verdict.noninferiority import MARGIN

TRUE_SIZES = ("opt-350m", "gpt-neo-1.3b")
TWINS = ("opt-tiny", "gpt-neo-tiny")
CUDA_EPOCHS = 10  # the original job
CPU_EPOCHS = 2  # enough for the loss of a twin to fall, and for the suite to end within minutes on two cores
CAP = 128
"""Pairs of rounds at most; `ratio.CAP`, which is not imported to say so."""
LONG = "--lightweight-"


@dataclass(frozen=True)
class Option:
    """`--name` with its help, in which % is a plain character, and argparse's other `settings`."""

    name: str
    help: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What its value is asked for by."""
        return self.name.replace("-", "_")


def _of_limit(limit: Limit) -> Option:
    words = f"with --benchmark-compare: fail if {limit.of} ({limit.default} if no number is given)"
    settings = {"metavar": limit.metavar, "nargs": "?", "const": limit.default}
    return Option(limit.name.replace("_", "-"), words, settings)


def _of_setting(setting: Setting) -> Option:
    return Option(setting.name.replace("_", "-"), setting.help, {"metavar": setting.metavar})


OPTIONS = (
    Option(
        "model",
        "a model to train, repeatable: a known name, a hub id or a local folder; tests of other models are deselected "
        f"(default: {', '.join(TRUE_SIZES)}; without CUDA: {', '.join(TWINS)})",
        {"action": "append", "metavar": "NAME"},
    ),
    Option(
        "method",
        "a method to train with, repeatable: baseline, lora, qlora, each also as NAME-captured, or package.module:NAME "
        "or FILE.py:NAME (default: all)",
        {"action": "append", "metavar": "NAME"},
    ),
    Option(
        "target",
        "train within the memory of this card, such as t4, or of an amount such as 16GiB (default: t4 if the GPU has "
        "as much, else native, which is all there is)",
        {"metavar": "NAME"},
    ),
    Option(
        "gpus-per-trial",
        "train every trial on N ranks: one per GPU, or N processes on a CPU (default: 1)",
        {"type": int, "default": 1, "metavar": "N"},
    ),
    Option(
        "corpus",
        "what to train on: a file, or hub:NAME[:SPLIT] (default: corpus.json)",
        {"type": Path, "metavar": "PATH"},
    ),
    *(Option(one.name, one.help, one.settings) for one in OF_CORPUS),
    Option(
        "task",
        "JSON lines of prompts with answers: count exact answers before and after training",
        {"type": Path, "metavar": "FILE.jsonl"},
    ),
    Option(
        "weights",
        "where weights come from (default: pretrained if they are available, else random)",
        {"choices": ("pretrained", "random")},
    ),
    Option("seed", "seed of every trial (default: 0)", {"type": int, "default": 0, "metavar": "N"}),
    Option(
        "seeds",
        "train each model and method N times, with the seeds from --seed on; each seed has its own order of the data, "
        "initial adapter, dropout masks and random weights (default: 1)",
        {"type": int, "metavar": "N"},
    ),
    Option(
        "margin",
        "how much higher than the baseline's a loss may be and still count as no worse, in nats a token "
        f"(default: {MARGIN})",
        {"type": float, "default": MARGIN, "metavar": "NATS"},
    ),
    Option(
        "pilot",
        "a record with several seeds: the spread of their losses gives, before training, how many seeds the margin "
        "needs (default: a committed record)",
        {"type": Path, "metavar": "RUN.json"},
    ),
    Option(
        "epochs",
        f"passes over the corpus (default: {CUDA_EPOCHS}; without CUDA: {CPU_EPOCHS})",
        {"type": int, "metavar": "N"},
    ),
    *map(_of_setting, SETTINGS),
    Option(
        "pairs",
        "measure a speedup with at most N pairs of rounds, a multiple of 4; fewer once the verdict is clear "
        f"(default: {CAP})",
        {"type": int, "default": CAP, "metavar": "N"},
    ),
    *map(_of_limit, LIMITS),
    Option(
        "missing",
        "with --benchmark-compare: verdict on a model and method that was selected, but that only the stored run has "
        "(default: fail)",
        {"choices": ("pass", "fail"), "default": "fail"},
    ),
    Option(
        "require-match",
        "with --benchmark-compare: fail if nothing stored was measured under the same conditions",
        {"action": "store_true", "default": False},
    ),
    Option(
        "undecided",
        "verdict on a speedup that noise leaves open after --pairs (default: pass)",
        {"choices": ("pass", "fail"), "default": "pass"},
    ),
    Option(
        "report",
        "write the results as one HTML page, or as Markdown if PATH ends in .md; with --benchmark-compare, beside the "
        "stored runs",
        {"type": Path, "metavar": "PATH"},
    ),
    Option(
        "false-alarms",
        "also count the gate's false alarms in N runs of the gate (200 if no number is given), and its misses in half "
        "as many; takes an hour on a CPU",
        {"nargs": "?", "type": int, "const": 200, "metavar": "N"},
    ),
    Option(
        "trial-timeout",
        "a trial that reports nothing for this long, not even a step, has timed out (default: 600)",
        {"type": float, "default": 600.0, "metavar": "SECONDS"},
    ),
)


def register(parser: pytest.Parser) -> None:
    """Add the options to `parser` at the last moment: just before it reads the command line for good, when every other
    plugin and conftest has added its own."""
    before_parsing(parser, lambda: _add(parser))


def value(config: pytest.Config, key: str) -> Any:
    """What `config`'s command line says for the option asked for by `key`, under whichever of its names."""
    return getattr(config.option, key if not hasattr(config.option, _own(key)) else _own(key))


def place(config: pytest.Config, path: Path) -> Path:
    """Where a file of the command line lies, also for a test that has gone to another folder."""
    return config.invocation_params.dir / path


def are_given(config: pytest.Config) -> bool:
    """Whether the command line says anything of lightweight's."""
    return any(value(config, option.key) != option.settings.get("default") for option in OPTIONS)


def check_names(config: pytest.Config) -> None:
    """Whether there are such models, methods and targets, before anything that takes long is imported to use them.
    Raises pytest.UsageError."""
    checks = (
        ("model", "", models.named),
        ("method", "--method: ", names.check_method),
        ("target", "--target: ", targets.named),
    )
    for key, place, check in checks:
        given = value(config, key) or ()
        try:
            for name in (given,) if isinstance(given, str) else given:
                check(name)
        except ValueError as error:
            raise pytest.UsageError(f"{place}{error}") from None


def _own(key: str) -> str:
    return f"lightweight_{key}"


def _add(parser: pytest.Parser) -> None:
    group = parser.getgroup("lightweight", "fine-tuning experiments")
    taken = taken_names(parser)
    for option in OPTIONS:
        settings: dict[str, Any] = {**option.settings, "help": option.help.replace("%", "%%")}
        if f"--{option.name}" not in taken and option.key not in taken:
            try:
                group.addoption(f"--{option.name}", LONG + option.name, dest=option.key, **settings)
                continue
            except (ValueError, argparse.ArgumentError):  # taken all the same
                pass
        group.addoption(LONG + option.name, dest=_own(option.key), **settings)
