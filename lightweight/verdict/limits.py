"""How much worse may a run be than a stored one? The gate's limits, as they are said on a command line and in Python.

Imports nothing that takes long: a pytest that only prints its help reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lightweight.record import one_line

FAIL = 0.05
"""The share of a stored speedup that may be lost, and of a stored memory ratio that may come on top, where no other is
said."""

LOSS_FAIL = 0.02
"""Nats a token that a loss may rise. Of 28 trials that two or three runs have, on H100s and H200s, most ended within
0.0001 of themselves, all within 0.004 (experiments/records; gpt-neo-1.3b's random weights in fp16). Other dropout
masks, as another version of a library may draw, cost about what another seed does, a standard deviation of 0.003 to
0.01 nats (h200-no-worse.json)."""

STEP_FAIL = 0.15
"""The share that a captured step may take longer. The same one was within 1 % of itself on three hosts, and once 8 %
apart within a session (h200-no-worse.json, lora-captured: 8.28 and 8.97 ms)."""

STOCK_STEP_FAIL = 0.75
"""The share that any other step on a GPU may take longer. It waits for the host that launches it: the same cell on
cards of one kind took up to 1.37 times as long from one host to the next (experiments/records)."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much worse a cell may be than the stored one. None gives no verdict.

    Attributes:
        speedup_fail: The share of the stored speedup that may be lost.
        memory_fail: The share that the stored memory ratio, or a forecast's peak, may rise.
        loss_fail: How much the held-out loss may rise, in nats per token.
        step_fail: The share that the time of a captured step may rise.
        stock_step_fail: The share that the time of any other step on a GPU may rise.
        undecided: The verdict on a speedup that noise leaves open.
        missing: The verdict on a stored cell that the new run lacks.
        require_match: Whether a run fails if nothing stored matches it.
    """

    speedup_fail: float | None = None
    memory_fail: float | None = None
    loss_fail: float | None = None
    step_fail: float | None = None
    stock_step_fail: float | None = None
    undecided: Literal["pass", "fail"] = "pass"
    missing: Literal["pass", "fail"] = "fail"
    require_match: bool = False

    @property
    def ask(self) -> bool:
        """Whether any verdict is asked for."""
        limits = (self.speedup_fail, self.memory_fail, self.loss_fail, self.step_fail, self.stock_step_fail)
        return any(limit is not None for limit in limits)


def share(text: str, below: float = 1) -> float:
    """`10%` as 0.1. Raises ValueError for what is not above zero and below `below`."""
    try:
        value = float(text.removesuffix("%")) / 100
    except ValueError:
        value = -1.0
    if not (text.endswith("%") and 0 < value < below):
        raise ValueError(f"{one_line(text)!r}: give a percentage between 0% and {below:.0%}, such as 10%")
    return value


def longer(text: str) -> float:
    """`10%` as 0.1, of what may become more than twice as much. Raises ValueError."""
    return share(text, below=10)


def nats(text: str) -> float:
    """`0.02` as it is. Raises ValueError."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise ValueError(f"{one_line(text)!r}: give nats a token from 0 to 100, such as {LOSS_FAIL}")
    return value


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A limit as the command line says it: `metavar` is its unit, `default` what is meant where no number is said.
    `of` completes "fail where"."""

    name: str
    metavar: str
    read: Callable[[str], float]
    default: str
    of: str

    @property
    def flag(self) -> str:
        """As it is typed."""
        return f"--{self.name.replace('_', '-')}"

    def value(self, text: str | None) -> float | None:
        """The limit that `text` says, None for none. Raises ValueError."""
        if text is None or text == "none":
            return None
        try:
            return self.read(text)
        except ValueError as error:
            raise ValueError(f"{self.flag} {error}") from None


LIMITS = (
    Limit(
        name="speedup_fail",
        metavar="PERCENT",
        read=share,
        default=f"{FAIL:.0%}",
        of="the speedup of a model and method fell by more than this share of the stored one",
    ),
    Limit(
        name="memory_fail",
        metavar="PERCENT",
        read=longer,
        default=f"{FAIL:.0%}",
        of="memory, as a ratio to the baseline's, or a forecast peak rose by more than this share",
    ),
    Limit(
        name="loss_fail",
        metavar="NATS",
        read=nats,
        default=f"{LOSS_FAIL}",
        of="the held-out loss of the same trial rose by more than this, in nats a token",
    ),
    Limit(
        name="step_fail",
        metavar="PERCENT",
        read=longer,
        default=f"{STEP_FAIL:.0%}",
        of="a captured step became slower by more than this share, or is no longer captured",
    ),
    Limit(
        name="stock_step_fail",
        metavar="PERCENT",
        read=longer,
        default=f"{STOCK_STEP_FAIL:.0%}",
        of="a stock step on a GPU became slower by more than this share: it waits for the host, so give 50% or more",
    ),
)
"""What `lightweight gate` and `pytest --benchmark-compare` take alike."""
