"""How many times as fast as its baseline is a cell? Rounds of both in alternation on one card, and an interval.

What `--benchmark-compare --speedup-fail` holds against a stored run; on its own it measures no more pairs than it takes
to have an interval. Which ratio is right depends on the machine, so the claims are that the pairs measured one at all
and, on a GPU, that a captured step is what it is there for: faster than the Trainer's of the baseline.
"""

import pytest

from lightweight.plugin import NOT_RUN, Laboratory, MeasureSpeedup

WIDEST = 1.5
"""The upper end of an interval over its lower: pairs that leave more open have measured too little. An H200's
leave up to 1.17 open (h200-two-workers.json)."""


def test_speedup(speedup: MeasureSpeedup, laboratory: Laboratory, model: str, method: str) -> None:
    if laboratory.takes_long(model):
        pytest.skip(f"{NOT_RUN}many minutes a cell on a CPU; --epochs 2 trains them")

    found = speedup(model, method)

    if found.reason and found.reason.endswith("out of memory"):
        assert found.ratio is None  # no number where there is nothing to divide by
        return
    cell = f"{model} x {method}"
    assert found.reason is None, f"{cell}: {found.reason}"
    assert found.low is not None and found.high is not None
    interval = f"[{found.low:.2f}, {found.high:.2f}]"
    assert found.high < WIDEST * found.low, f"{cell}: {interval} leaves a factor of {WIDEST:g} open"
    if laboratory.has_cuda and method.endswith("-captured"):
        assert found.low > 1, f"{cell}: {interval} times the baseline's speed"
