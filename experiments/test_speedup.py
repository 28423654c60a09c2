"""How many times as fast as its baseline is a cell? Rounds of both in alternation on one card, and an interval.

What `--benchmark-compare --speedup-fail` holds against a stored run; on its own it measures no more pairs than it takes
to have an interval.
"""

import pytest

from lightweight.plugin import NOT_RUN, Laboratory, MeasureSpeedup


def test_speedup(speedup: MeasureSpeedup, laboratory: Laboratory, model: str, method: str) -> None:
    if laboratory.takes_long(model):
        pytest.skip(f"{NOT_RUN}many minutes a cell on a CPU; --epochs 2 trains them")

    found = speedup(model, method)

    if found.reason and found.reason.endswith("out of memory"):
        assert found.ratio is None  # no number where there is nothing to divide by
        return
    assert found.reason is None, f"{model} x {method}: {found.reason}"
    assert found.low is not None and found.high is not None and found.low <= found.high
