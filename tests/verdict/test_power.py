"""How many seeds show the margin, held against simulation and against what is known of a t-test."""

import random
from pathlib import Path

import pytest
from samples import entry, seeds

from lightweight import record
from lightweight.verdict import noninferiority, power

RECORD = Path(__file__).parents[2] / "experiments" / "records" / "h200-no-worse.json"


@pytest.mark.parametrize(("count", "difference"), [(3, 0.0), (5, 0.02), (8, 0.03)])
def test_power_is_how_often_the_verdict_is_no_worse(count, difference):
    draw = random.Random(count)
    runs = [[draw.gauss(difference, 0.03) for _ in range(count)] for _ in range(2000)]
    shown = sum(noninferiority.conclusion(noninferiority.over_seeds(run)) == "no worse" for run in runs) / 2000
    assert power.power(0.03, count, noninferiority.MARGIN, difference) == pytest.approx(shown, abs=0.035)


def test_at_the_margin_the_power_is_the_error_and_one_seed_shows_nothing():
    assert power.power(0.02, 6, 0.05, difference=0.05) == pytest.approx(0.05)
    assert power.power(0.02, 1, 0.05) == 0
    assert power.power(0.0, 2, 0.05) == 1
    assert power.power(0.0, 2, 0.05, difference=0.06) == 0


def test_the_fewest_seeds_have_the_power_and_one_less_has_not():
    needed = power.seeds_needed(0.05, 0.05)
    assert needed is not None
    assert power.power(0.05, needed, 0.05) >= 0.8 > power.power(0.05, needed - 1, 0.05)
    assert power.seeds_needed(0.05, 0.05, difference=0.05) is None
    assert power.seeds_needed(5.0, 0.05) is None
    assert power.seeds_needed(0.0, 0.05) == 2


def test_more_seeds_are_as_many_on_either_side_of_the_margin():
    below, above = [0.02, 0.06, 0.01], [0.08, 0.04, 0.09]
    assert noninferiority.conclusion(noninferiority.over_seeds(below)) == "inconclusive"
    more = power.more_seeds(below, 0.05)
    assert more is not None and more > 0 and more == power.more_seeds(above, 0.05)
    mean, spread = 0.03, 0.0264575
    assert power.power(spread, 3 + more, 0.05, mean) >= 0.8 > power.power(spread, 2 + more, 0.05, mean)
    assert power.more_seeds([0.1], 0.05) is None
    assert power.undecided([0.1], 0.05) == "one seed has no interval: give --seeds 2 or more"
    assert power.undecided(below, 0.05) == f"{more} more would decide: --seeds {3 + more}"
    assert power.undecided([0.0, 0.1], 0.05) == "over 1000 would be needed"
    assert power.more_seeds([0.0, 0.1], 0.05) is None  # the mean is the margin


def test_a_spread_of_few_seeds_is_planned_with_its_upper_bound():
    assert power.Spread(0.01, 3, "lora").bound == pytest.approx(0.01 * (2 / 0.446287) ** 0.5, rel=1e-4)  # chi2 of 2
    draw = random.Random(7)
    bounds = []
    for _ in range(2000):
        drawn = [draw.gauss(0, 1) for _ in range(3)]
        mean = sum(drawn) / 3
        bounds.append(power.Spread((sum((value - mean) ** 2 for value in drawn) / 2) ** 0.5, 3, "").bound)
    assert sum(bound > 1 for bound in bounds) / 2000 == pytest.approx(0.8, abs=0.03)


def test_spreads_are_of_pairs_of_the_same_seed_on_real_weights():
    stored = [*seeds("baseline", 2.5, 2.7, 2.9), *seeds("lora", 2.5, 2.72, 2.91), entry(method="qlora")]
    (found,) = power.spreads(stored)
    assert (found.of, found.seeds, found.nats) == ("lora", 3, pytest.approx(0.01))
    assert not power.spreads([*seeds("baseline", 2.5, 2.7, weights="random"), *seeds("lora", 2, 3, weights="random")])


def test_what_is_planned_from_the_committed_run_is_told():
    widest = max(power.spreads(record.load(RECORD).entries), key=lambda spread: spread.bound)
    assert widest.of == "baseline-captured-lr0.0002"
    told = power.planned(widest, 3, 0.05)
    assert told.startswith("3 seeds show a method that is as good as its baseline to be no worse within 0.05 nats")
    assert f"{power.seeds_needed(widest.bound, 0.05)} have 80%" in told
