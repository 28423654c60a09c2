"""Can what a command was given be used? All that is known before torch, which takes seconds, is imported.

A check leaves what it read with the options. Its ValueError names the option and the mend.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lightweight import files, names, targets
from lightweight.settings import Settings


def nothing(options: argparse.Namespace) -> None:
    """Of a command that finds out itself."""


def plan(options: argparse.Namespace) -> None:
    """Cards that have an amount of memory, and a job that is held to what is known of it. Raises ValueError."""
    if options.gpus is not None:
        options.gpus = _whole_number("--gpus", options.gpus)
    _at_least(options, gpus=1, tokens=1, epochs=1)
    options.settings = _settings(options)
    for name in ("price", "max_hours", "max_price"):
        value, option = getattr(options, name), f"--{name.replace('_', '-')}"
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{option} {value:g}: give a number above 0")
        if value is not None and options.tokens is None and options.corpus is None:
            raise ValueError(f"{option} is about a whole job: give its --tokens or its --corpus")
    if options.max_price is not None and options.price is None:
        raise ValueError("--max-price: give the --price of an hour as well")
    of_names(options)
    for name in options.target or ():
        if targets.named(name).total_bytes is None:
            raise ValueError(
                f"target {name!r} has no amount of memory to plan for: give a card, or an amount such as 16GiB"
            )
    _check_limits(options)


def train(options: argparse.Namespace) -> None:
    """A training of some steps, from a seed that numpy takes. Raises ValueError."""
    _at_least(options, epochs=1, max_steps=1, save_steps=1)
    options.settings = _settings(options)
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed {options.seed}: give a number from 0 to {2**32 - 1}, which is what numpy takes")
    of_names(options)


def sweep(options: argparse.Namespace) -> None:
    """A range of rates, and a place for the record. Raises ValueError."""
    _at_least(options, epochs=1, max_steps=1)
    low, _, high = options.learning_rate.partition("..")
    try:
        options.low, options.high = float(low), float(high)
    except ValueError:
        raise ValueError(f"--learning-rate {options.learning_rate}: give a range, such as 1e-5..1e-2") from None
    options.settings = Settings.read(lambda name: None if name == "learning_rate" else getattr(options, name))
    of_names(options)
    _writable("--output", options.output)


def calibrate(options: argparse.Namespace) -> None:
    """A place for the record. Raises ValueError."""
    _writable("--output", options.output)  # before two minutes of measuring


def chat(options: argparse.Namespace) -> None:
    """An answer of some tokens, to a text. Raises ValueError."""
    _at_least(options, max_tokens=1, temperature=0)
    for name in ("prompt", "system"):
        if not names.is_text(getattr(options, name) or ""):
            raise ValueError(f"--{name} {getattr(options, name)}: is not UTF-8: write it in that encoding")


def of_names(options: argparse.Namespace) -> None:
    """Models, methods and targets that there can be. Raises ValueError."""
    from lightweight import models  # ten modules, which a report does without

    for name in _given(options, "models", "model"):
        models.named(name)
    for name in _given(options, "method"):
        names.check_method(name)
    for name in _given(options, "target"):
        targets.named(name)


def _given(options: argparse.Namespace, *options_of: str) -> list[str]:
    """What was given to those of the options that the command has, each of them once or repeatable."""
    values = [getattr(options, name, None) for name in options_of]
    return [text for value in values for text in ([value] if isinstance(value, str) else value or [])]


def _at_least(options: argparse.Namespace, **least: int) -> None:
    """Options that are not below their least value."""
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give at least {bound}")


def _writable(option: str, path: Path) -> None:
    """A place for a file. Raises ValueError."""
    try:
        files.check(path)
    except OSError as error:
        raise ValueError(f"{option} {path}: cannot be written ({error.strerror})") from error


def _settings(options: argparse.Namespace) -> Settings:
    return Settings.read(lambda name: getattr(options, name))


def _whole_number(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{option} {text}: give a whole number") from None


def _check_limits(options: argparse.Namespace) -> None:
    """Nothing is chosen under a limit that nobody can hold it to. Raises ValueError."""
    given = [name for name in ("max_hours", "max_price") if getattr(options, name) is not None]
    limits = [f"--{name.replace('_', '-')}" for name in given]
    if not limits:
        return
    if (options.gpus or 1) > 1:
        raise ValueError(f"{limits[0]}: time is not forecast for GPUs that share a trial: leave out one of them")
    for target in map(targets.named, options.target or ()):
        if target.card is None or targets.rates(target.card) is None:
            raise ValueError(f"{limits[0]}: time is not forecast for target {target.name!r}: name a card instead")
