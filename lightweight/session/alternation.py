"""How much faster is one trial than another? Rounds of two live children in alternation on one device.

Whatever the machine does to one round it does to its neighbour, and a drift favours neither, since each side goes first
as often: A B B A and its mirror image in turn, in which each side stands in each place as often. What is compared is
the rounds' device time per token.

On a GPU that is the time between two of its events. A stock step waits for Python to launch its kernels, so that this
is a matter of cores as well: processes stay where they are for long, and a core that something else uses, or that has
slept, launches more slowly. So both children take a pair's rounds on the same two, one for the forward pass's thread
and one for the backward pass's, and those of the next pair on the next two. A method that waits for the GPU alone meets
a slow core without being slowed: pairs that shared their cores would be alike, and tell less than as many others.

On a CPU it is the time the processor worked for the child (CLOCK_PROCESS_CPUTIME_ID), since the clock on the wall also
counts what other jobs had of the core. Work added to a step shows in it; sleeping, waiting for a disk and processes
that the child started do not. How fast a core works changes all the same, for tenths of a second, with what its
neighbours do to caches and clock rate. So both children of a CPU are asked for their round at once, one thread each, on
one core: the kernel alternates them every few milliseconds, and they meet the same core; when one is done, something
else takes its place (CHANGELOG.md has the figures of all of that). Where a process cannot be kept on a core, as on
macOS, they take turns wherever they are.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np

from lightweight.child.owner import Child
from lightweight.child.process import CAN_PIN
from lightweight.schema import Pairing
from lightweight.trial import Outcome, OutOfMemory, Trial
from lightweight.verdict import ratio

NEIGHBOUR = np.zeros(2**18)
"""What is walked over in a child's place: 2 MiB, as much as a core's caches hold."""

METHOD_FIRST = (False, True, True, False)
"""Who goes first in the pairs of a turn: A B, B A, B A, A B."""

IN_TURN_PAIRS = 32
"""Rounds of either trial where they cannot be alive at once; nothing can be added to them later."""


@dataclass(frozen=True, kw_only=True)
class Alternation:
    """What came of it: the logarithm of baseline seconds over method seconds, per token, of each pair of rounds.

    'Sharing a core' is how a CPU alternates. 'One after the other' says that both did not fit on the device at once:
    pairs then share nothing of the machine's drift, so their interval promises more than it can keep. `ended` is how
    one of the trials ended before all rounds that were wanted had been trained, if it did.
    """

    log_ratios: tuple[float, ...]
    pairing: Pairing = "alternating"
    ended: tuple[Trial, Outcome] | None = None


def trial_of_rounds(trial: Trial, rounds: int, steps: int) -> Trial:
    """`trial` with rounds of `steps` full optimizer steps each, on its first training pairs, for as many as `rounds`
    rounds and one to warm up; on a CPU with one thread, since threads that wait for each other are not idle.

    A step that is larger than the corpus sees all of it in the trial and no more, so that a larger batch changes
    nothing: it is cut to the full passes that there are pairs for.
    """
    method = trial.method.with_at_most(max(len(trial.corpus.train), trial.world_size))
    rows = itertools.islice(itertools.cycle(trial.corpus.train), steps * method.sequences_per_step)
    corpus = replace(trial.corpus, train=tuple(rows), task=None)
    rounded = replace(trial, method=method, corpus=corpus, epochs=rounds + 1, max_steps=None)
    return replace(rounded, threads=1) if trial.device_index is None else rounded


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
        alternation = _pairs(first, second, is_enough, ratio.looks(cap))
    if alternation.ended is not None and isinstance(alternation.ended[1], OutOfMemory):
        return _in_turn(baseline, method, start, min(cap, IN_TURN_PAIRS))
    return alternation


def seconds_per_token(*children: Child) -> tuple[float, ...]:
    """Train one round of each, those of a CPU at once; their device time per token, NaN where a trial has ended.

    A token here is one of a row as it was padded where all are padded to one length, for packed rows too: the first
    pairs of a corpus are longer or shorter than others, and the padded row is what each pair has alike. Where batches
    are padded to their longest row it is a token of the dialogues.
    """
    began = [(_device_seconds(child), len(child.measured.step_seconds)) for child in children]
    if all(_shares_a_core(child) and child.outcome is None for child in children):
        _train_at_once(children)
    else:
        for child in children:
            child.round()
    return tuple(
        math.nan if child.outcome is not None else (_device_seconds(child) - seconds) / _tokens_since(child, steps)
        for child, (seconds, steps) in zip(children, began, strict=True)
    )


def _tokens_since(child: Child, step: int) -> int:
    """The tokens of the child's steps after `step`, as `seconds_per_token` counts them; a round is all of its rows."""
    trial, measured = child.trial, child.measured
    if not trial.pads_to_max:
        return sum(measured.step_tokens[step:])
    rounds = (len(measured.step_seconds) - step) / trial.steps_per_epoch
    return round(rounds * (trial.rows or len(trial.corpus.train)) * trial.max_length)


def log_ratio(baseline: Child, method: Child, pair: int) -> float:
    """Train one pair of rounds, `pair` being its number from 0; the logarithm of how many times as long `baseline`
    took, NaN where one has ended."""
    share_cores(baseline, method, pair=pair)
    if METHOD_FIRST[pair % len(METHOD_FIRST)]:
        of_method, of_baseline = seconds_per_token(method, baseline)
    else:
        of_baseline, of_method = seconds_per_token(baseline, method)
    return math.log(of_baseline / of_method)


def share_cores(*children: Child, pair: int) -> None:
    """Keep like ranks of the children on the same cores, one on a CPU and two beside a GPU, in the next pair on the
    next ones: so they meet the same things, and not all the time the same ones."""
    if not CAN_PIN:
        return
    cores = sorted(os.sched_getaffinity(0))
    for child in children:
        if child.outcome is not None:
            continue
        width = 1 if _shares_a_core(child) else 2
        for rank, pid in enumerate(child.pids):
            first = (pair * len(child.pids) + rank) * width
            shared = {cores[(first + number) % len(cores)] for number in range(width)}
            for thread in _threads(pid):
                with suppress(ProcessLookupError):  # it has ended since
                    os.sched_setaffinity(thread, shared)


def _threads(pid: int) -> list[int]:
    """The numbers of the threads of `pid`; none of a process that has ended, which who waits for it is told."""
    try:
        return [int(thread.name) for thread in Path(f"/proc/{pid}/task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _cores_of(children: Sequence[Child]) -> set[int]:
    """Those that the children are kept on: of the first that has not ended."""
    for pid in (pid for child in children for pid in child.pids):
        with suppress(ProcessLookupError):
            return os.sched_getaffinity(pid)
    return os.sched_getaffinity(0)


def _train_at_once(children: Sequence[Child]) -> None:
    """Train one round of each on the core they share. Who is done first would leave it to the other alone, which then
    works a tenth to a fifth faster and so hides as much of how much slower it is: something else takes its place."""
    for child in children:
        child.ask_for_round()
    silence = max(child.silence_seconds for child in children)  # `await_round` then finds who has timed out
    deadline = time.monotonic() + silence
    wait([connection for child in children for connection in child.connections], silence)
    had = os.sched_getaffinity(0)
    os.sched_setaffinity(0, _cores_of(children))
    try:
        while not all(child.has_answered for child in children) and time.monotonic() < deadline:
            np.add(NEIGHBOUR, 1.0, out=NEIGHBOUR)
    finally:
        os.sched_setaffinity(0, had)
    for child in children:
        child.await_round()


def _shares_a_core(child: Child) -> bool:
    return CAN_PIN and child.trial.device_index is None


def _device_seconds(child: Child) -> float:
    """What the device has worked in all of the child's rounds so far."""
    return child.measured.cpu_seconds if child.trial.device_index is None else sum(child.measured.step_seconds)


def _pairs(
    baseline: Child, method: Child, is_enough: Callable[[Sequence[float]], bool], schedule: Sequence[int]
) -> Alternation:
    log_ratios: list[float] = []
    pairing: Pairing = "sharing a core" if _shares_a_core(baseline) else "alternating"
    for child in (baseline, method):
        child.round()  # to warm up
    for look in schedule:
        while len(log_ratios) < look:
            newest = log_ratio(baseline, method, len(log_ratios))
            for child in (baseline, method):
                if child.outcome is not None:
                    return Alternation(
                        log_ratios=tuple(log_ratios), pairing=pairing, ended=(child.trial, child.outcome)
                    )
            log_ratios.append(newest)
        if is_enough(log_ratios):
            break
    return Alternation(log_ratios=tuple(log_ratios), pairing=pairing)


def _in_turn(
    baseline: Trial, method: Trial, start: Callable[[Trial], AbstractContextManager[Child]], rounds: int
) -> Alternation:
    seconds: list[list[float]] = []
    for trial in (baseline, method):
        with start(trial) as child:
            child.round()  # to warm up
            seconds.append([seconds_per_token(child)[0] for _ in range(rounds)])
            if child.outcome is not None:
                return Alternation(log_ratios=(), pairing="one after the other", ended=(trial, child.outcome))
    return Alternation(
        log_ratios=tuple(math.log(of_baseline / of_method) for of_baseline, of_method in zip(*seconds, strict=True)),
        pairing="one after the other",
    )
