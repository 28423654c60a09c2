"""A mean over seeds and its interval, held against scipy's own."""

import math

import pytest
from scipy import stats

from lightweight.verdict import seeds


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_interval_is_students(confidence):
    values = [2.51, 2.48, 2.60, 2.55]
    found = seeds.over_seeds(values, confidence)
    expected = stats.ttest_1samp(values, 0).confidence_interval(confidence)
    assert (found.low, found.high) == pytest.approx(tuple(expected))
    assert found.mean == pytest.approx(sum(values) / 4)


def test_one_seed_bounds_nothing_and_none_is_no_mean():
    assert seeds.over_seeds([0.1]) == seeds.Estimate(0.1, -math.inf, math.inf)
    assert seeds.over_seeds([0.1]).text("{:.1f}") == "0.1"
    with pytest.raises(ValueError, match="at least one"):
        seeds.over_seeds([])


def test_ratios_are_averaged_as_factors():
    found = seeds.geometric_over_seeds([0.5, 2.0])
    assert found.mean == pytest.approx(1.0)
    assert found.low * found.high == pytest.approx(1.0)
    assert seeds.geometric_over_seeds([9.0]) == seeds.Estimate(9.0, 0.0, math.inf)
    assert seeds.geometric_over_seeds([1e-300, 1e300]).high == math.inf


def test_a_time_is_never_below_zero_however_far_its_seeds_are_apart():
    found = seeds.geometric_over_seeds([214.3, 356.5])
    assert found.mean == pytest.approx(math.sqrt(214.3 * 356.5))
    half = 12.7062 * math.log(356.5 / 214.3) / 2  # Student's t of one degree of freedom
    assert (found.low, found.high) == pytest.approx(
        (found.mean / math.exp(half), found.mean * math.exp(half)), rel=1e-4
    )
    assert 0 < found.low < 214.3


def test_a_share_has_wilsons_interval():
    found = seeds.share(8, 10)
    z = stats.norm.ppf(0.975)
    center, half = (0.8 + z**2 / 20) / (1 + z**2 / 10), z * math.sqrt(0.8 * 0.2 / 10 + z**2 / 400) / (1 + z**2 / 10)
    assert (found.mean, found.low, found.high) == pytest.approx((0.8, center - half, center + half))
    assert seeds.share(0, 10).low == 0 and seeds.share(10, 10).high == pytest.approx(1)
