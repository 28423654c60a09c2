import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from test_report import entry

from lightweight import gate, ratio, record
from lightweight.gate import Limits, Run
from lightweight.record import Speedup

BOTH = Limits(speedup_fail=0.05, memory_fail=0.05)


def speedup(center, *, pairs=12, noise=0.005, seed=0, **changes):
    """As JSON: pairs around `center` times as fast."""
    logs = [float(log) for log in np.random.default_rng(seed).normal(math.log(center), noise, pairs)]
    found = ratio.interval(logs)
    numbers = {"ratio": found.ratio, "low": found.low, "high": found.high}
    return (
        json.loads(
            json.dumps(
                asdict(Speedup(baseline="baseline", log_ratios=tuple(logs), cap=16, steps_per_round=4, **numbers))
            )
        )
        | changes
    )


def cell(method="lora", **changes):
    known = {"precision": "fp16", "device_driver": "580", "planned_steps": 130}
    return entry(method=method, **known | changes)


def run(*entries, name="0001_old.json", ended="2026-01-01"):
    return Run(path=Path(name), ended=ended, entries=[*entries])


def compare(now, then, limits=BOTH):
    return gate.compare(now, [run(*then)], limits)


def test_a_ratio_that_stayed_passes_although_every_time_is_another():
    now = [cell("baseline", steady_step_seconds=0.3), cell(steady_step_seconds=0.1, speedup=speedup(1.7, seed=1))]
    then = [cell("baseline", steady_step_seconds=0.1), cell(steady_step_seconds=0.03, speedup=speedup(1.7, seed=2))]
    found = compare(now, then)
    assert found.failures == []
    assert found.cells[1].verdict == "pass"


def test_a_slowdown_fails_and_names_the_cell_both_ratios_and_what_changed():
    now = cell(speedup=speedup(1.5), versions={"torch": "2.13.0", "peft": "0.21.0"}, device_driver="590")
    then = cell(speedup=speedup(1.7), versions={"torch": "2.11.0", "peft": "0.21.0"})
    (failure,) = compare([now], [then]).failures
    assert failure.startswith("opt-350m x lora: speedup 1.50")
    for interval in (ratio.interval(gate.log_ratios(now)), ratio.interval(gate.log_ratios(then))):
        assert str(interval) in failure
    assert "the floor 0.950" in failure
    assert failure.endswith("Changed since: torch 2.11.0 -> 2.13.0, driver 580 -> 590")


def test_without_limits_nothing_fails():
    assert compare([cell(speedup=speedup(1.0))], [cell(speedup=speedup(1.7))], Limits()).failures == []


@pytest.mark.parametrize(("undecided", "failures"), [("pass", 0), ("fail", 1)])
def test_what_noise_leaves_open_is_the_users_choice(undecided, failures):
    now, then = cell(speedup=speedup(1.62, noise=0.2)), cell(speedup=speedup(1.7, noise=0.2, seed=9))
    found = compare([now], [then], replace(BOTH, undecided=undecided))
    assert len(found.failures) == failures
    assert all("undecided after 12 pairs" in failure for failure in found.failures)
    assert undecided == "fail" or found.cells[0].verdict == "undecided"


def test_gate_fails_when_the_baseline_is_missing():
    lost = speedup(1.7) | {"log_ratios": [], "ratio": None, "low": None, "high": None, "reason": "baseline crashed"}
    for now, why in ((cell(speedup=lost), "baseline crashed"), (cell(), "no pairs of rounds were measured")):
        (failure,) = compare([now], [cell(speedup=speedup(1.7))]).failures
        assert "none now" in failure and why in failure


def test_a_ratio_to_a_baseline_out_of_memory_is_no_number():
    out = cell("baseline", outcome="out_of_memory", steady_step_seconds=None)
    none = speedup(1.7) | {
        "log_ratios": [],
        "ratio": None,
        "low": None,
        "high": None,
        "reason": "baseline out of memory",
    }
    found = compare([out, cell("qlora", speedup=none)], [out, cell("qlora", speedup=none)])
    assert found.failures == []
    assert gate.text(found).count("baseline out of memory") == 2
    assert "x [" not in gate.text(found)


def test_a_cell_that_no_longer_completes_fails():
    now = cell(outcome="out_of_memory", phase="backward", steady_step_seconds=None)
    (failure,) = compare([now], [cell(speedup=speedup(1.7))]).failures
    assert "completed in 0001_old.json, out of memory now" in failure
    assert compare([cell(speedup=speedup(1.7))], [now]).failures == []  # the other way round it is good news


def test_the_memory_gate_is_exact_to_the_byte():
    baseline = cell("baseline", peak_allocated_bytes=10_000_000_000)
    then = [baseline, cell(peak_allocated_bytes=6_000_000_000)]
    for peak, failures in ((6_300_000_000, 0), (6_300_000_001, 1), (6_400_000_000, 1)):
        now = [baseline, cell(peak_allocated_bytes=peak)]
        assert len(compare(now, then).failures) == failures
    assert "memory ratio 0.6400 of the baseline's now, 0.6000 in 0001_old.json: +6.7%" in compare(now, then).failures[0]


def test_memory_is_compared_as_a_ratio_and_without_a_baseline_in_bytes():
    then = [cell("baseline", peak_allocated_bytes=1000), cell(peak_allocated_bytes=600)]
    both_more = [cell("baseline", peak_allocated_bytes=1040), cell(peak_allocated_bytes=640)]
    assert compare(both_more, then).failures == []
    (failure,) = compare(both_more[1:], then[1:]).failures
    assert "peak memory 640 bytes now, 600 in" in failure


def test_a_whole_process_on_the_host_is_not_exact_and_not_gated():
    now, then = (cell(peak_allocated_bytes=None, host_peak_bytes=size) for size in (2000, 1000))
    assert compare([now], [then]).failures == []


@pytest.mark.parametrize(
    ("key", "then", "said"),
    [
        ("device", "Tesla T4", "device is Tesla T4 there and NVIDIA H200 here"),
        ("target", "l4", "target is l4 there and t4 here"),
        ("corpus_digest", "e", "corpus_digest is e there and d here"),
        ("precision", "bf16", "precision is bf16 there and fp16 here"),
        ("weights", "random", "weights is random there and pretrained here"),
        ("world_size", 2, "world_size is 2 there and 1 here"),
    ],
)
def test_a_run_under_other_conditions_is_passed_over_for_the_newest_that_matches(key, then, said):
    now = cell(speedup=speedup(1.7))
    newest = run(cell(**{key: then}, speedup=speedup(9)), name="0003.json", ended="2026-03")
    match, older = (run(cell(speedup=speedup(c)), name=f"{n}.json", ended=f"2026-0{n}") for c, n in ((1.7, 2), (9, 1)))
    found = gate.compare([now], [newest, match, older], BOTH)
    assert found.failures == []
    assert found.cells[0].run is match
    assert f"not compared with 0003.json: {said}" in found.notes
    alone = gate.compare([now], [newest], replace(BOTH, missing="pass"))
    assert alone.failures == []
    assert any(note.startswith("NOTHING WAS COMPARED") for note in alone.notes)
    (failure,) = gate.compare([now], [newest], replace(BOTH, missing="pass", require_match=True)).failures
    assert failure.startswith("NOTHING WAS COMPARED")


def test_the_text_shows_each_ratio_now_and_stored_and_losses():
    now = [cell("baseline"), cell(speedup=speedup(1.6), peak_allocated_bytes=2 * 2**30, heldout_loss_after=2.4)]
    then = [cell("baseline"), cell(speedup=speedup(1.7), peak_allocated_bytes=3 * 2**30)]
    text = gate.text(compare(now, then))
    row = next(line for line in text.splitlines() if " lora " in line)
    for shown in ("1.60x [", "1.70x [", "0.94", "0.50", "0.75", "3.000 -> 2.400", "3.000 -> 2.500", "FAIL"):
        assert shown in row
    assert "Stored: 0001_old.json." in text
    assert text.splitlines()[-1].startswith("FAILED opt-350m x lora: ")


def test_a_verdict_is_the_same_from_the_files_alone():
    now, then = cell(speedup=speedup(1.5)), cell(speedup=speedup(1.7))
    again = json.loads(json.dumps([now, then]))
    assert gate.text(compare([again[0]], [again[1]])) == gate.text(compare([now], [then]))


@pytest.mark.parametrize(("text", "expected"), [("10%", 0.1), ("2.5%", 0.025)])
def test_a_share_is_a_percentage(text, expected):
    assert gate.share(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["10", "0%", "100%", "-3%", "x%", "", "experiments", "nan%"])
def test_any_other_text_is_told(text):
    with pytest.raises(ValueError, match="give a percentage between 0% and 100%"):
        gate.share(text)


def test_files_are_read_newest_first_and_what_is_none_costs_one_line(tmp_path):
    whole = dict.fromkeys(record.KEYS) | cell(steps=6)
    for name, ended in (("a", "2026-01"), ("b", "2026-02")):
        (tmp_path / name).write_text(json.dumps({"datetime": ended, "outcomes": [whole]}))
    (tmp_path / "undated").write_text(json.dumps({"outcomes": [whole]}))  # put together by hand: of no known age
    broken = {
        "c": "{",
        "d": "[]",
        "e": json.dumps({"outcomes": [whole | {"peak_allocated_bytes": "many"}]}),
        "f": json.dumps({"outcomes": [whole | {"speedup": {"log_ratios": ["fast"]}}]}),
        "g": json.dumps({"outcomes": [whole | {"speedup": speedup(1.7) | {"cap": 3}}]}),
    }
    for name, content in broken.items():
        (tmp_path / name).write_text(content)
    runs, problems = gate.load(sorted(tmp_path.iterdir()))
    assert [run.name for run in runs] == ["b", "a", "undated"]
    assert len(problems) == len(broken)
    for name, problem in zip(broken, problems, strict=True):
        assert problem.startswith(f"left out: record {tmp_path / name}: ")
        assert "\n" not in problem
