"""How long are examples? Counts of them by their tokens, few enough for a record, and for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

SHORTEST = 16
"""Tokens up to which examples are counted together."""


def histogram(tokens: Iterable[int]) -> dict[int, int]:
    """How many examples there are by length in tokens. Bounds are powers of two from SHORTEST on: a count is of
    examples up to its bound and above the bound before it."""
    found = Counter(max(SHORTEST, 1 << (number - 1).bit_length()) for number in tokens)
    if not found:
        return {}
    bounds = [min(found)]
    while bounds[-1] < max(found):
        bounds.append(2 * bounds[-1])
    return {bound: found[bound] for bound in bounds}
