"""How much faster is one trial than another? Rounds of two live children in alternation, A B B A, on one device.

Whatever the machine does to one round it does to its neighbour, and a drift favours neither, since each side goes first
as often. A round that follows one of its own child is faster, its caches being warm (by 2 to 4 % on a busy CPU with
rounds of 100 ms), and one that follows a pause is not: hence A B B A and its mirror image in turn, in which each side
stands in each place as often. What is compared is the rounds' device time per token.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from lightweight import ratio
from lightweight.isolation import Child
from lightweight.trial import Outcome, OutOfMemory, Trial

Pairing = Literal["alternating", "one after the other"]

IN_TURN_PAIRS = 32
"""Rounds of either trial where they cannot be alive at once; nothing can be added to them later."""


@dataclass(frozen=True, kw_only=True)
class Alternation:
    """What came of it: the logarithm of baseline seconds over method seconds, per token, of each pair of rounds.

    'One after the other' says that both did not fit on the device at once: pairs then share nothing of the machine's
    drift, so their interval promises more than it can keep. `ended` is how one of the trials ended before all rounds
    that were wanted had been trained, if it did.
    """

    log_ratios: tuple[float, ...]
    pairing: Pairing = "alternating"
    ended: tuple[Trial, Outcome] | None = None


def trial_of_rounds(trial: Trial, rounds: int, steps: int) -> Trial:
    """`trial` with rounds of `steps` full optimizer steps each, on its first training pairs, for as many as `rounds`
    rounds and one to warm up."""
    rows = itertools.islice(itertools.cycle(trial.corpus.train), steps * trial.method.sequences_per_step)
    return replace(trial, corpus=replace(trial.corpus, train=tuple(rows)), epochs=rounds + 1, max_steps=None)


def alternate(
    baseline: Trial,
    method: Trial,
    start: Callable[[Trial], AbstractContextManager[Child]],
    is_enough: Callable[[Sequence[float]], bool],
    cap: int,
) -> Alternation:
    """Add pairs until `is_enough` of them, which is asked after each of `ratio.looks(cap)`, or `cap` is reached.

    `start` gives the child of a trial as a context. Where one of them runs out of memory beside the other, each gets
    the device to itself, one after the other.
    """
    with start(baseline) as first, start(method) as second:
        found = _pairs(first, second, is_enough, ratio.looks(cap))
    if found.ended is not None and isinstance(found.ended[1], OutOfMemory):
        return _in_turn(baseline, method, start, min(cap, IN_TURN_PAIRS))
    return found


def seconds_per_token(child: Child) -> float:
    """Train one round; its device time per token, NaN where the trial has ended."""
    before = len(child.measured.step_seconds)
    child.round()
    if child.outcome is not None:
        return math.nan
    steps = child.measured.step_seconds[before:]
    return sum(steps) / (len(steps) * child.trial.tokens_per_step)


def log_ratio(baseline: Child, method: Child, *, method_first: bool) -> float:
    """Train one pair of rounds; the logarithm of how many times as long `baseline` took, NaN where one has ended."""
    if method_first:
        of_method = seconds_per_token(method)
        of_baseline = seconds_per_token(baseline)
    else:
        of_baseline = seconds_per_token(baseline)
        of_method = seconds_per_token(method)
    return math.log(of_baseline / of_method)


def method_goes_first(pair: int) -> bool:
    """Who goes first in a pair, counted from 0: A B, B A, B A, A B."""
    return pair % 4 in (1, 2)


def share_cores(*children: Child) -> None:
    """Keep the children of a CPU on the same cores. Else each stays on the one it happened to get, for seconds, while
    something else may be busy on one of the two; on the same ones both meet it."""
    if not hasattr(os, "sched_setaffinity"):  # macOS does not have it
        return
    cores = sorted(os.sched_getaffinity(0))[: torch.get_num_threads()]
    for child in children:
        if child.trial.device_index is None and child.outcome is None:
            for thread in (thread for pid in child.pids for thread in Path(f"/proc/{pid}/task").iterdir()):
                with suppress(ProcessLookupError):  # it has ended since
                    os.sched_setaffinity(int(thread.name), cores)


def _pairs(
    baseline: Child, method: Child, is_enough: Callable[[Sequence[float]], bool], schedule: Sequence[int]
) -> Alternation:
    log_ratios: list[float] = []
    share_cores(baseline, method)
    for child in (baseline, method):
        child.round()  # to warm up
    for look in schedule:
        while len(log_ratios) < look:
            found = log_ratio(baseline, method, method_first=method_goes_first(len(log_ratios)))
            for child in (baseline, method):
                if child.outcome is not None:
                    return Alternation(log_ratios=tuple(log_ratios), ended=(child.trial, child.outcome))
            log_ratios.append(found)
        if is_enough(log_ratios):
            break
    return Alternation(log_ratios=tuple(log_ratios))


def _in_turn(
    baseline: Trial, method: Trial, start: Callable[[Trial], AbstractContextManager[Child]], rounds: int
) -> Alternation:
    seconds: list[list[float]] = []
    for trial in (baseline, method):
        with start(trial) as child:
            child.round()  # to warm up
            seconds.append([seconds_per_token(child) for _ in range(rounds)])
            if child.outcome is not None:
                return Alternation(log_ratios=(), pairing="one after the other", ended=(trial, child.outcome))
    return Alternation(
        log_ratios=tuple(math.log(of_baseline / of_method) for of_baseline, of_method in zip(*seconds, strict=True)),
        pairing="one after the other",
    )
