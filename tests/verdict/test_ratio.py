import json
import math
from dataclasses import astuple
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

from lightweight.verdict import ratio
from lightweight.verdict.ratio import Interval

SERIES = Path(__file__).parents[2] / "experiments" / "series"


def gate(draw, floor, cap=ratio.CAP, stored=()):
    """Add pairs until the verdict is clear, as the plugin does; the verdict and how many pairs it took."""
    pairs: list[float] = []
    for look in ratio.looks(cap):
        pairs += list(draw(look - len(pairs)))
        verdict = ratio.verdict(ratio.repeated_interval(pairs, cap, stored), floor)
        if verdict != "undecided":
            break
    return verdict, len(pairs)


def share(verdict, draw, floor, gates=1000, **options):
    return sum(gate(draw, floor, **options)[0] == verdict for _ in range(gates)) / gates


def test_the_estimate_is_the_geometric_mean_and_the_interval_students():
    found = ratio.interval([math.log(2), math.log(8)])
    assert found.ratio == pytest.approx(4)
    assert found.high == pytest.approx(4 * math.exp(12.7062 * math.log(2)), rel=1e-4)  # t of 1 degree of freedom
    assert found.low * found.high == pytest.approx(16)


def test_pairs_that_agree_leave_no_doubt_and_one_pair_leaves_all():
    assert ratio.interval([0.0, 0.0, 0.0]) == Interval(1.0, 1.0, 1.0)
    assert astuple(ratio.interval([math.log(3)])) == (pytest.approx(3), 0.0, math.inf)
    with pytest.raises(ValueError, match="at least one ratio"):
        ratio.interval([])


def covered(draw, gates=4000):
    """How often the interval of what `draw` gives, around 0.3, holds 0.3."""
    found = [ratio.interval(list(draw())) for _ in range(gates)]
    return sum(i.low <= math.exp(0.3) <= i.high for i in found) / gates


@pytest.mark.parametrize("pairs", [8, 16, 32])
def test_the_interval_covers_the_truth_in_95_of_100(pairs):
    """Pairs that are alike by chance widen it a little."""
    rng = np.random.default_rng(pairs)
    assert 0.943 <= covered(lambda: rng.normal(0.3, 0.05, pairs)) <= 0.972


def alike(rng, pairs, autocorrelation):
    """Pairs each of which remembers the one before."""
    steps = rng.normal(0, 0.05, pairs + 50)
    for now in range(1, len(steps)):
        steps[now] += autocorrelation * steps[now - 1]
    return 0.3 + steps[50:]


@pytest.mark.parametrize(("autocorrelation", "pairs", "least"), [(0.2, 16, 0.92), (0.4, 32, 0.9), (0.6, 128, 0.91)])
def test_pairs_that_are_like_those_before_them_count_less(autocorrelation, pairs, least):
    """Taken for independent they would be covered in 90, 80 and 67 of 100."""
    rng = np.random.default_rng(pairs)
    assert covered(lambda: alike(rng, pairs, autocorrelation), gates=2000) >= least
    counts = [ratio.independent(alike(rng, 400, autocorrelation)) for _ in range(50)]
    assert np.mean(counts) / 400 == pytest.approx((1 - autocorrelation) / (1 + autocorrelation), rel=0.15)


def test_pairs_that_take_turns_count_no_more_than_they_are():
    assert ratio.independent([0.1, -0.1] * 8) == 16
    assert ratio.independent([0.1, 0.2]) == 2
    assert ratio.independent([0.0] * 8) == 8


def test_a_drift_that_both_rounds_share_cancels():
    rng = np.random.default_rng(0)
    drift = np.cumsum(rng.normal(0, 0.1, 400))
    baseline, method = (drift + rng.normal(0, 0.02, 400) for _ in range(2))
    assert ratio.interval(list(baseline - method)).half_width < 0.005


def test_looking_after_every_few_pairs_fails_no_more_than_one_look_would():
    """At the floor itself, where a fixed-size interval that is looked at again and again is wrong three times as
    often."""
    rng = np.random.default_rng(1)
    fails = share("fail", lambda count: rng.normal(0, 0.05, count), floor=1.0, gates=800)
    assert fails <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / 800)

    def naive(pairs):
        return any(ratio.interval(pairs[:look]).high < 1 for look in ratio.looks(ratio.CAP))

    assert sum(naive(list(rng.normal(0, 0.05, ratio.CAP))) for _ in range(400)) / 400 > 0.06


def test_a_stored_run_with_errors_of_its_own_does_not_make_it_fail_more_often():
    rng = np.random.default_rng(2)
    fails = 0
    for _ in range(700):
        stored = list(rng.normal(0.2, 0.05, 12))
        fails += gate(lambda count: rng.normal(0.2, 0.05, count), 1.0, stored=stored)[0] == "fail"
    assert fails / 700 <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / 700)


@pytest.mark.parametrize("noise", ["normal", "heavy"])
def test_noise_of_six_per_cent_does_not_fail_a_floor_of_five(noise):
    rng = np.random.default_rng(3)
    draws = {
        "normal": lambda count: rng.normal(0, 0.06, count),
        "heavy": lambda count: 0.06 / math.sqrt(2) * rng.standard_t(4, count),
    }
    assert share("fail", draws[noise], floor=0.95) <= 0.002
    assert share("pass", draws[noise], floor=0.95) >= 0.97


def test_slowdowns_are_caught():
    rng = np.random.default_rng(4)
    assert share("fail", lambda count: rng.normal(-math.log(1.10), 0.06, count), floor=0.95) >= 0.97
    assert share("fail", lambda count: rng.normal(-math.log(1.05), 0.05, count), floor=0.97, gates=300) >= 0.90


@pytest.mark.parametrize("series", sorted(SERIES.glob("same-*.json")), ids=lambda path: path.stem)
def test_real_rounds_of_a_method_against_itself_fail_at_most_one_gate_in_a_hundred(series):
    """The committed pairs of two live children, cut anew into as many gates as they make, each pair in one gate."""
    document = json.loads(series.read_text())
    verdicts = []
    for index, stored in enumerate(document["stored"]):
        logs = [log for gate in document["gates"] if gate["stored"] == index for log in gate["log_ratios"]]
        pairs = iter(logs)
        while True:
            verdict, used = gate(lambda count, pairs=pairs: islice(pairs, count), 0.95, stored=stored)
            if used not in ratio.looks(ratio.CAP):  # the pairs have run out
                break
            verdicts.append(verdict)
    assert len(verdicts) >= 20
    assert verdicts.count("fail") <= len(verdicts) / 100


def test_what_is_plain_is_seen_at_the_first_look():
    rng = np.random.default_rng(5)
    assert gate(lambda count: rng.normal(0, 0.003, count), 0.95) == ("pass", 8)
    assert gate(lambda count: rng.normal(-0.11, 0.003, count), 0.95) == ("fail", 8)


def test_what_cannot_be_told_is_undecided_after_the_cap():
    rng = np.random.default_rng(6)
    assert gate(lambda count: rng.normal(math.log(0.95), 0.2, count), 0.95, cap=16) == ("undecided", 16)


def test_all_looks_together_spend_the_error_and_no_more():
    schedule = ratio.looks(32)
    levels = ratio.nominal_levels(schedule, 0.025)
    rng = np.random.default_rng(7)
    steps = np.diff(np.array([0, *schedule]))
    paths = np.cumsum(rng.normal(0, np.sqrt(steps), (200_000, len(steps))), axis=1)
    crossed = (paths / np.sqrt(schedule) > norm.isf(levels)).any(axis=1).mean()
    assert crossed == pytest.approx(0.025, abs=0.0015)
    assert all(level < 0.025 for level in levels)


def test_pairs_after_the_last_look_are_left_out():
    pairs = [0.1, -0.1] * 4 + [5.0]
    assert ratio.repeated_interval(pairs, 12) == ratio.repeated_interval(pairs[:8], 12)
    assert ratio.repeated_interval(pairs[:7], 12).high == math.inf


@pytest.mark.parametrize("cap", [0, 4, 9, 30])
def test_a_cap_that_leaves_no_whole_turn_is_told(cap):
    with pytest.raises(ValueError, match="give a multiple of 4 from 8 on"):
        ratio.looks(cap)


def test_looks_end_with_the_cap():
    assert ratio.looks(8) == (8,)
    assert ratio.looks(20) == (8, 12, 16, 20)
    assert ratio.looks(1024)[-2:] == (512, 1024)
    assert all(look % 4 == 0 for look in ratio.looks(ratio.CAP))


@pytest.mark.parametrize(("low", "high", "expected"), [(0.96, 1.0, "pass"), (0.8, 0.94, "fail"), (0.9, 1, "undecided")])
def test_the_verdict_is_clear_when_the_whole_interval_is_on_one_side(low, high, expected):
    assert ratio.verdict(Interval(0.95, low, high), 0.95) == expected
