"""When has a speedup been measured well enough? Pairs of rounds are added until its verdict is clear, or time is up."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from lightweight.child.owner import Child
from lightweight.record import ONE_AFTER_THE_OTHER, Entry, Speedup
from lightweight.schema import GateVerdict
from lightweight.session.alternation import Alternation, alternate, trial_of_rounds
from lightweight.session.progress import Progress
from lightweight.trial import Trial
from lightweight.verdict import gate, ratio
from lightweight.verdict.limits import FAIL

CUDA_STEPS = 4  # of a round that is paired: some 100 ms and more on a fast GPU
CPU_STEPS = 1
PRECISION = 0.005
"""Half the width, as a share, of the interval that is wanted of a speedup which later runs are held against."""
PAIRS_SECONDS = 120.0
"""After which no more pairs of rounds are added to a speedup, whatever its precision."""


def measure(
    trial: Trial,
    baseline: Trial,
    empty: Speedup,
    *,
    start: Callable[[Trial], AbstractContextManager[Child]],
    stored: Entry | None,
    fail: float | None,
    is_kept: bool,
    progress: Progress,
) -> Speedup:
    """`empty` completed by what pairs of rounds of `trial` and `baseline` say, whose children `start` gives.

    `stored` is the trial of an older run that the gate holds the speedup against, which may lose the share `fail` of
    it; `is_kept` says that later runs are held against this one.
    """
    pairs_then = gate.log_ratios(stored)
    floor = 1 - fail if pairs_then and fail else None

    def verdict(log_ratios: Sequence[float], is_in_turn: int = 0) -> GateVerdict | None:
        if floor is None:
            return None
        in_turn = gate.in_turn(stored) + is_in_turn
        return ratio.verdict(ratio.repeated_interval(log_ratios, empty.cap, pairs_then, in_turn), floor)

    started = time.monotonic()
    time_is_up = False

    def is_enough(log_ratios: Sequence[float]) -> bool:
        nonlocal time_is_up
        so_far, seconds = ratio.interval(log_ratios), time.monotonic() - started
        held_against_later = is_kept or (pairs_then and floor is None)
        wanted = precision_wanted(so_far.ratio) if held_against_later else math.inf
        known = f"known to {so_far.half_width:.1%}"
        if held_against_later:
            known += f", {wanted:.1%} wanted within {PAIRS_SECONDS:.0f} s"
        progress.show(f"{trial.name}: {len(log_ratios)} pairs of rounds, {so_far} times as fast, {known}", "\n")
        is_clear = verdict(log_ratios) != "undecided" and so_far.half_width <= wanted
        time_is_up = not is_clear and seconds > PAIRS_SECONDS
        return is_clear or time_is_up

    first, second = (trial_of_rounds(part, empty.cap, empty.steps_per_round) for part in (baseline, trial))
    pairs = alternate(first, second, start, is_enough, empty.cap)
    measured = _with_pairs(empty, pairs, time_is_up=time_is_up)
    if not pairs.log_ratios:
        return measured
    is_in_turn = int(pairs.pairing == ONE_AFTER_THE_OTHER)
    now = ratio.interval(pairs.log_ratios, in_turn=is_in_turn)
    return replace(
        measured,
        ratio=now.ratio,
        low=now.low,
        high=now.high,
        floor=floor,
        verdict=verdict(pairs.log_ratios, is_in_turn),
    )


def _with_pairs(empty: Speedup, pairs: Alternation, *, time_is_up: bool) -> Speedup:
    """`empty` with the pairs that were measured, and why there are no more of them."""
    is_over = time_is_up and len(pairs.log_ratios) < empty.cap
    return replace(
        empty,
        log_ratios=pairs.log_ratios,
        pairing=pairs.pairing,
        reason=pairs.ended and f"{pairs.ended[0].name} {pairs.ended[1].kind.replace('_', ' ')} between rounds",
        ended_after_seconds=PAIRS_SECONDS if is_over else None,
    )


def precision_wanted(ratio: float) -> float:
    """Half the width, as a share, of the interval that is wanted of a `ratio` which later runs are held against:
    `PRECISION` near 1, where a verdict hangs on it, and a twentieth of the way from there, up to half of what a gate
    lets a cell lose, for one that is far from it."""
    return max(PRECISION, min(FAIL / 2, abs(math.log(ratio)) / 20)) if ratio > 0 else PRECISION
