"""What is the largest batch that fits, with the fewest layers computed twice, on the fewest GPUs? By few forecasts."""

from __future__ import annotations

import bisect
from collections.abc import Callable

from lightweight.forecast import replay
from lightweight.methods import Method
from lightweight.trial import Forecast

LARGEST_BATCH = 2**14
"""Where the search for the largest batch ends."""


def smaller_passes(method: Method, gpus: int) -> list[Method]:
    """The method with fewer and fewer sequences in a pass on each of `gpus`, and as many in a step as before."""
    methods, rows = [], method.on_rank(gpus).sequences_per_pass
    for passes in range(method.passes_per_step + 1, method.sequences_per_step + 1):
        if method.sequences_per_step % passes == 0:
            smaller = method.with_passes(passes)
            if (fewer := smaller.on_rank(gpus).sequences_per_pass) < rows:
                methods.append(smaller)
                rows = fewer
    return methods


def largest_batch(fits: Callable[[int], Forecast], first: int, most: int = LARGEST_BATCH) -> int:
    """The largest batch whose verdict is `fits`, up to the `most`, 0 if none is. `first` is what is tried first.

    What a step holds grows with the batch almost in a straight line, so two forecasts point at the next to try; every
    other try halves what is left, in case the line is none. The answer and its successor are always forecast
    themselves.
    """
    low, high, guess = 0, most + 1, min(first, most)
    held: dict[int, int] = {}
    while high - low > 1:
        forecast = fits(guess)
        held[guess] = forecast.allocated_bytes
        low, high = (guess, high) if forecast.verdict == "fits" else (low, guess)
        if len(held) == 1:
            guess = 2 * low or high // 2
        elif len(held) % 2 or high > most:
            near, far = sorted(held, key=lambda batch: abs(batch - (low or high)))[:2]
            slope = (held[near] - held[far]) / (near - far)
            room = (forecast.budget_bytes or 0) * (1 - replay.MARGIN) - held[near]
            guess = int(near + room / max(slope, 1.0))
        else:
            guess = (low + high) // 2
        guess = max(low + 1, min(guess, high - 1))
    return low


def fewest_layers(fits: Callable[[int], Forecast], layers: int) -> int | None:
    """The fewest layers to compute again, of `layers`, whose verdict is `fits`, None where not even all of them.

    What they free is a straight line but for its ends, which points at the next number to try; the answer and the one
    below it are always forecast themselves.
    """
    low, high = 0, layers
    held = {count: fits(count).allocated_bytes for count in (low, high)}
    if fits(high).verdict != "fits":
        return None
    while high - low > 1:
        each = (held[low] - held[high]) / (high - low)
        room = (fits(high).budget_bytes or 0) * (1 - replay.MARGIN) - held[high]
        guess = max(low + 1, min(high - int(room / max(each, 1.0)), high - 1))
        forecast = fits(guess)
        held[guess] = forecast.allocated_bytes
        low, high = (low, guess) if forecast.verdict == "fits" else (guess, high)
    return high


def fewest_gpus(fits: Callable[[int], Forecast], sequences: int) -> int | None:
    """The least number of GPUs whose verdict is `fits`, up to one for each of the `sequences` of a step; None if none
    is. More GPUs hold no more each, so that every other forecast halves what is left."""
    counts = range(1, sequences + 1)
    index = bisect.bisect_left(counts, True, key=lambda count: fits(count).verdict == "fits")
    return counts[index] if index < len(counts) else None
