import json
import math
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import entry

from lightweight import __main__, record
from lightweight.record import SAME_TRIAL, Run, Speedup
from lightweight.report import comparison
from lightweight.verdict import gate, limits, ratio
from lightweight.verdict.limits import Limits

BOTH = Limits(speedup_fail=0.05, memory_fail=0.05)


def speedup(center, *, pairs=12, noise=0.005, seed=0, **changes):
    """Pairs around `center` times as fast."""
    logs = tuple(float(log) for log in np.random.default_rng(seed).normal(math.log(center), noise, pairs))
    known: dict[str, Any] = {"baseline": "baseline", "cap": 16, "steps_per_round": 4, "log_ratios": logs}
    return Speedup(**known | asdict(ratio.interval(logs)) | changes)


NO_PAIRS = {"log_ratios": (), "ratio": None, "low": None, "high": None}


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


def test_a_training_that_ended_earlier_or_had_other_rows_fails_whatever_it_measured():
    then = cell("baseline", steps=130)
    assert compare([cell("baseline", steps=130)], [then]).failures == []
    (failure,) = compare([cell("baseline", steps=100)], [then]).failures
    assert failure.startswith("opt-350m x baseline: 100 of 130 steps now, 130 in 0001_old.json. ")
    then = cell("baseline", steps=2, step_tokens=(900, 1000), training_rows=1100)
    for changes, words in (
        ({"step_tokens": (450, 500)}, "trained on 950 tokens now, 1,900 in 0001_old.json"),
        ({"training_rows": 80}, "trained on 80 rows now, 1,100 in 0001_old.json"),
    ):
        (failure,) = compare([replace(then, **changes)], [then]).failures
        assert failure.startswith(f"opt-350m x baseline: {words}. ")
    note = "2 rows are left out"
    (failure,) = compare([cell("baseline", steps=130, data_note=note)], [then]).failures
    assert f"trained otherwise now: {note}; no such note in 0001_old.json" in failure
    noted = cell("baseline", steps=130, data_note=note)
    assert compare([noted], [noted]).failures == []
    assert compare([replace(noted, seed=1)], [then]).failures == []  # another trial, whose rows may be others
    assert compare([noted], [then], Limits()).failures == []


@pytest.mark.parametrize(("undecided", "failures"), [("pass", 0), ("fail", 1)])
def test_what_noise_leaves_open_is_the_users_choice(undecided, failures):
    now, then = cell(speedup=speedup(1.62, noise=0.2)), cell(speedup=speedup(1.7, noise=0.2, seed=9))
    found = compare([now], [then], replace(BOTH, undecided=undecided))
    assert len(found.failures) == failures
    assert all("undecided after 12 pairs" in failure for failure in found.failures)
    assert undecided == "fail" or found.cells[0].verdict == "undecided"


@pytest.mark.parametrize("undecided", ["pass", "fail"])
def test_a_verdict_that_time_left_open_says_so(undecided):
    of_now = speedup(1.62, noise=0.2, ended_after_seconds=120.0)
    now, then = cell(speedup=of_now), cell(speedup=speedup(1.7, noise=0.2, seed=9))
    found = compare([now], [then], replace(BOTH, undecided=undecided))
    (line,) = [line for line in [*found.failures, *found.notes] if "undecided after" in line and "is " in line][:1]
    assert "undecided after 12 pairs, since the 120 s for them were over" in line
    now = cell(speedup=speedup(1.62, noise=0.2))
    assert "s for them were over" not in comparison.text(compare([now], [then], replace(BOTH, undecided=undecided)))


def test_gate_fails_when_the_baseline_is_missing():
    lost = speedup(1.7, **NO_PAIRS, reason="baseline crashed")
    for now, why in ((cell(speedup=lost), "baseline crashed"), (cell(), "no pairs of rounds were measured")):
        (failure,) = compare([now], [cell(speedup=speedup(1.7))]).failures
        assert "none now" in failure and why in failure


def test_a_ratio_to_a_baseline_out_of_memory_is_no_number():
    out = cell("baseline", outcome="out_of_memory", steady_step_seconds=None)
    none = speedup(1.7, **NO_PAIRS, reason="baseline out of memory")
    found = compare([out, cell("qlora", speedup=none)], [out, cell("qlora", speedup=none)])
    assert found.failures == []
    assert comparison.text(found).count("baseline out of memory") == 2
    assert "x [" not in comparison.text(found)


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


def test_a_verdict_is_the_same_from_the_files_alone():
    now, then = cell(speedup=speedup(1.5)), cell(speedup=speedup(1.7))
    again = [record.entry_of(json.loads(json.dumps(record.as_json(one)))) for one in (now, then)]
    assert comparison.text(compare([again[0]], [again[1]])) == comparison.text(compare([now], [then]))


@pytest.mark.parametrize(("text", "expected"), [("10%", 0.1), ("2.5%", 0.025)])
def test_a_share_is_a_percentage(text, expected):
    assert limits.share(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["10", "0%", "100%", "-3%", "x%", "", "experiments", "nan%"])
def test_any_other_text_is_told(text):
    with pytest.raises(ValueError, match="give a percentage between 0% and 100%"):
        limits.share(text)


def test_files_are_read_newest_first_and_what_is_none_costs_one_line(tmp_path):
    whole = record.as_json(cell(speedup=speedup(1.7)))
    for name, ended in (("a", "2026-01"), ("b", "2026-02")):
        (tmp_path / name).write_text(json.dumps({"datetime": ended, "outcomes": [whole]}))
    (tmp_path / "undated").write_text(json.dumps({"outcomes": [whole]}))  # put together by hand: of no known age
    broken = {
        "c": "{",
        "d": "[]",
        "e": json.dumps({"outcomes": [whole | {"peak_allocated_bytes": "many"}]}),
        "f": json.dumps({"outcomes": [whole | {"speedup": {"log_ratios": ["fast"]}}]}),
        "g": json.dumps({"outcomes": [whole | {"speedup": whole["speedup"] | {"cap": 3}}]}),
    }
    for name, content in broken.items():
        (tmp_path / name).write_text(content)
    runs, problems = gate.load(sorted(tmp_path.iterdir()))
    assert [run.name for run in runs] == ["b", "a", "undated"]
    assert len(problems) == len(broken)
    for name, problem in zip(broken, problems, strict=True):
        assert problem.startswith(f"left out: record {tmp_path / name}: ")
        assert "\n" not in problem


ALL = Limits(speedup_fail=0.05, memory_fail=0.05, loss_fail=0.02, step_fail=0.15)
RECORDS = Path(__file__).parents[2] / "experiments" / "records"


def test_what_appeared_is_told():
    notes = compare([cell("lora"), cell("qlora")], [cell("lora")]).notes
    assert "appeared: opt-350m x qlora" in notes


@pytest.mark.parametrize("gone", ["baseline", "qlora"])
def test_a_stored_cell_that_is_missing_now_fails_the_baseline_too(gone):
    then = [cell("baseline"), cell("lora"), cell("qlora")]
    now = [entry for entry in then if entry.method != gone]
    (failure,) = compare(now, then).failures
    assert failure == f"opt-350m x {gone}: missing now, completed in 0001_old.json (seed 0, steps 130)"
    assert compare(now, then, replace(BOTH, missing="pass")).failures == []
    assert failure in compare(now, then, replace(BOTH, missing="pass")).notes
    assert compare(now, then, Limits()).failures == [], "nobody asked for a verdict"


def test_of_several_seeds_each_has_its_counterpart():
    then = [cell(seed=seed) for seed in range(3)]
    assert compare(then, then).failures == []
    (failure,) = compare([then[0], then[2]], then).failures
    assert "(seed 1, steps 130)" in failure
    others = [cell(seed=seed) for seed in range(7, 10)]
    assert compare(others, then).failures == [], "other seeds of the same cell are as many"


def test_of_several_seeds_each_is_named():
    worse = [cell(seed=0), cell(seed=1, heldout_loss_after=9.0), cell("qlora", seed=0), cell("qlora", seed=1)]
    found = compare(worse, [cell(seed=0), cell(seed=1)], ALL)
    assert [note for note in found.notes if "appeared" in note] == [
        "appeared: opt-350m x qlora (seed 0)",
        "appeared: opt-350m x qlora (seed 1)",
    ]
    (failure,) = found.failures
    assert failure.startswith("opt-350m x lora (seed 1): held-out loss 9.0000")
    lines = comparison.text(found).splitlines()
    assert [line.split("  ")[1].strip() for line in lines[2:6]] == [
        *("lora, seed 0", "lora, seed 1", "qlora, seed 0", "qlora, seed 1"),
    ]


def test_the_code_that_differs_is_named_by_its_digest():
    def mine(letter):
        own = {"compute_loss": {"import_path": "mine:loss", "source_sha256": letter * 64}}
        return cell("mine", method_digest=letter, own_code=own)

    (note,) = [note for note in compare([cell(), mine("b")], [cell(), mine("a")]).notes if "not compared with" in note]
    assert note.endswith("digest of the code of compute_loss is aaaaaaaaaaaa... there and bbbbbbbbbbbb... here")


def test_what_the_new_run_was_not_asked_for_is_not_missing():
    then = [cell("lora"), cell("lora", model="gpt-neo-1.3b")]
    runs = [run(*then)]
    assert gate.compare(then[:1], runs, BOTH, lambda stored: stored.model == "opt-350m").failures == []
    assert len(gate.compare(then[:1], runs, BOTH).failures) == 1


def test_a_run_that_holds_no_trial_fails_and_so_does_one_whose_only_cell_is_another():
    then = [cell("baseline"), cell("lora")]
    assert compare([], then).failures[0] == "the new run holds no trial"
    assert len(compare([], then).failures) == 3
    assert len(compare([cell("nothing-like-it")], then).failures) == 2


def test_a_run_of_another_target_or_card_misses_nothing():
    for key in ("target", "device", "corpus_digest", "weights"):
        assert compare([cell(**{key: "other"})], [cell()]).failures == []


def test_methods_of_one_name_and_other_settings_are_not_compared():
    now, then = cell(method_digest="a" * 64, speedup=speedup(1.0)), cell(method_digest="b" * 64, speedup=speedup(9.0))
    (failure,) = compare([now], [then]).failures
    assert "missing now" in failure and "method_digest is bbbbbbbbbbbb... there and aaaaaaaaaaaa... here" in failure
    assert gate.stored(now, [run(then)]) is None
    assert compare([now], [now]).failures == []


def test_which_setting_makes_a_method_another_is_told():
    settings = {"training_arguments": {"fp16": True}, "adapter": {"r": 8, "peft_version": "0.20", "old": 1}}
    changed = {"training_arguments": {"fp16": True, "learning_rate": 1e-3}, "adapter": {"r": 64, "new": 1}}
    now = cell(method_digest="a" * 64, changed={"lora_rank": 64, "learning_rate": 1e-3}, **changed)
    then = cell(method_digest="b" * 64, **settings)
    found = gate.compare([now], [run(then)], BOTH)
    said = "r is 8 there and 64 here, learning_rate is None there and 0.001 here"
    assert f"not compared with {run(then).name}: {said}" in found.notes
    assert any(line.endswith(f"; {said}") for line in found.failures)


def test_settings_that_an_old_record_does_not_say_are_told_as_unknown():
    found = compare([cell(method_digest="a" * 64)], [cell(method_digest=None)])
    assert found.cells[0].then is not None
    assert (
        "0001_old.json does not say its methods' settings: whether methods of one name are the same is not known"
        in (found.notes)
    )
    assert not any("settings" in note for note in compare([cell(method_digest="a")], [cell(method_digest="a")]).notes)


@pytest.mark.parametrize(
    ("rise", "fails"), [(0.0, False), (0.019, False), (0.021, True), (3.0, True), (-3.0, False), (None, True)]
)
@pytest.mark.parametrize("key", ["heldout_loss_after", "elsewhere_loss_after"])
def test_a_loss_that_rose_or_is_gone_fails(key, rise, fails):
    then = cell(**{key: 2.5}, elsewhere_digest="e")
    now = replace(then, **{key: None if rise is None else 2.5 + rise})
    failures = compare([now], [then], replace(BOTH, loss_fail=0.02)).failures
    assert len(failures) == fails
    assert not fails or ("none now" if rise is None else f"{rise:+.4f}, more than +0.02") in failures[0]
    assert compare([now], [then]).failures == [], "nobody asked"


@pytest.mark.parametrize("changes", [{"seed": 1}, {"planned_steps": 26}])
def test_losses_and_steps_of_other_trials_are_not_compared_which_is_told(changes):
    now, then = cell(heldout_loss_after=9.0, **changes), cell()
    found = compare([now], [then], ALL)
    assert found.failures == []
    assert any(note.startswith("losses and steps of 1 cells are not compared") for note in found.notes)


@pytest.mark.parametrize(("revision", "is_compared"), [("drawn 1", True), (None, True), ("drawn 2", False)])
def test_losses_on_weights_that_were_drawn_otherwise_are_not_compared_which_is_told(revision, is_compared):
    then = cell(weights="random", weights_revision="drawn 1")
    now = replace(then, heldout_loss_after=9.0, weights_revision=revision)
    found = compare([now], [then], ALL)
    assert len(found.failures) == is_compared
    assert any("losses of 1 cells are not compared: their weights" in note for note in found.notes) != is_compared


@pytest.mark.parametrize(("times", "fails"), [(1.0, False), (1.09, False), (1.16, True), (2.0, True), (0.5, False)])
def test_a_captured_steps_own_time_is_gated_where_ratios_see_nothing(times, fails):
    def of(factor):
        baseline = cell("baseline", steady_step_seconds=0.1 * factor)
        return [baseline, cell(captured=True, steady_step_seconds=0.01 * factor, speedup=speedup(10, seed=1))]

    failures = compare(of(times), of(1.0), ALL).failures
    assert len(failures) == fails
    assert not fails or ("captured step" in failures[0] and "on NVIDIA H200, 10.00 ms in 0001_old.json" in failures[0])


def test_a_stock_step_is_gated_only_when_asked_and_what_is_not_known_is_told():
    on_gpu = {"device_bytes": 2**37}
    now, then = (
        [cell("baseline", steady_step_seconds=s, **on_gpu), cell(steady_step_seconds=s / 2, **on_gpu)]
        for s in (0.2, 0.1)
    )
    found = compare(now, then, ALL)
    assert found.failures == []
    assert any(note.startswith("not known: a slowdown that a cell shares with its baseline") for note in found.notes)
    gated = compare(now, then, replace(ALL, stock_step_fail=0.75))
    assert len(gated.failures) == 2 and not any(note.startswith("not known: a slowdown") for note in gated.notes)


def test_a_step_on_a_cpu_which_others_use_as_well_is_not_gated():
    now, then = ([cell("baseline", steady_step_seconds=s, device_bytes=None)] for s in (0.2, 0.1))
    found = compare(now, then, replace(ALL, stock_step_fail=0.75))
    assert found.failures == []
    assert any(note.startswith("not known: a slowdown") and "on a CPU" in note for note in found.notes)


@pytest.mark.parametrize("path", sorted(RECORDS.glob("*.json")), ids=lambda path: path.stem)
@pytest.mark.parametrize("times", [1, 2])
def test_a_committed_record_against_itself_passes_and_with_all_times_doubled_fails(path, times, tmp_path):
    document = json.loads(path.read_text())
    outcomes = document["outcomes"] if isinstance(document, dict) else ()  # a plan is a list
    timed = [outcome for outcome in outcomes if outcome["steady_step_seconds"]]
    if not timed:
        pytest.skip("holds no times")
    for outcome in timed:
        outcome["step_seconds"] = [seconds * times for seconds in outcome["step_seconds"]]
        outcome["steady_step_seconds"] *= times
    new = tmp_path / "new.json"
    new.write_text(json.dumps(document))
    assert __main__.main(["gate", str(new), "--against", str(path)]) == times - 1


def test_a_step_that_is_captured_no_more_fails():
    now = cell(captured=False, capture_note="uncaptured: GPTNeo uploads a constant")
    (failure,) = compare([now], [cell(captured=True)], ALL).failures
    assert "not captured now: uncaptured: GPTNeo uploads a constant" in failure


@pytest.mark.parametrize("peak", [None, 0])
def test_memory_that_was_measured_and_is_not_now_fails(peak):
    (failure,) = compare([cell(peak_allocated_bytes=peak)], [cell()]).failures
    assert "peak memory 4.00 GiB in 0001_old.json, none now" in failure


@pytest.mark.parametrize(
    ("then", "now", "fails"),
    [
        ("completed", "crashed", True),
        ("completed", "out_of_memory", True),
        ("out_of_memory", "crashed", True),
        ("out_of_memory", "timed_out", True),
        ("out_of_memory", "out_of_memory", False),
        ("crashed", "out_of_memory", False),
        ("crashed", "diverged", False),
        ("out_of_memory", "completed", False),
    ],
)
def test_how_a_cell_ends_may_not_get_worse(then, now, fails):
    def of(outcome):
        return cell(outcome=outcome, steady_step_seconds=0.1 if outcome == "completed" else None)

    assert len(compare([of(now)], [of(then)]).failures) == fails


def test_pairs_that_were_measured_one_after_the_other_do_not_decide_what_alternating_ones_do():
    """Their sides shared nothing of the machine's temper, so that a tenth more or less is no news."""
    for pairings, verdict in (
        (("alternating", "alternating"), "fail"),
        (("one after the other", "alternating"), "undecided"),
        (("alternating", "one after the other"), "undecided"),
    ):
        now, then = (
            cell(speedup=speedup(center, noise=0.002, seed=seed, pairing=pairing))
            for center, seed, pairing in zip((1.5, 1.7), (1, 2), pairings, strict=True)
        )
        assert compare([now], [then]).cells[0].verdict == verdict
    now, then = (cell(speedup=speedup(c, pairing="one after the other")) for c in (0.5, 1.7))
    assert compare([now], [then]).cells[0].verdict == "fail", "a third of the speed is no temper"


def committed(name):
    """The JSON of a committed record, to be changed."""
    return json.loads((RECORDS / f"{name}.json").read_text("utf-8"))


def outcomes(change):
    """A damage that `change` does to every outcome."""

    def damage(document):
        for outcome in document["outcomes"]:
            change(outcome)

    return damage


def times_doubled(entry):
    entry["steady_step_seconds"] *= 2
    entry["step_seconds"] = [2 * seconds for seconds in entry["step_seconds"]]
    entry["cold_seconds"] *= 2


def slower_pairs(entry):
    if found := entry.get("speedup"):
        found["log_ratios"] = [log - math.log(1.3) for log in found["log_ratios"]]
        found |= {key: found[key] / 1.3 for key in ("ratio", "low", "high")}


def loss_raised(entry):
    entry["heldout_loss_after"] += 3 * (entry["adapter"] is not None)


def an_invented_verdict(entry):
    if found := entry.get("speedup"):
        found["verdict"] = "splendid"


DAMAGES = {
    "no outcomes": lambda document: document.update(outcomes=[]),
    "only forecasts": lambda document: document.update(outcomes=[], forecasts=committed("plan")),
    "all cells but one gone": lambda document: document.update(outcomes=document["outcomes"][:1]),
    "its baselines gone": lambda document: document.update(
        outcomes=[entry for entry in document["outcomes"] if entry["method"] != "baseline"]
    ),
    "one cell gone": lambda document: document["outcomes"].pop(),
    "memory null": outcomes(lambda entry: entry.update(peak_allocated_bytes=None)),
    "memory zero": outcomes(lambda entry: entry.update(peak_allocated_bytes=0)),
    "memory negative": outcomes(lambda entry: entry.update(peak_allocated_bytes=-entry["peak_allocated_bytes"])),
    "a tenth more memory": outcomes(
        lambda entry: entry.update(peak_allocated_bytes=entry["peak_allocated_bytes"] * 11 // 10)
    ),
    "loss raised": outcomes(loss_raised),
    "loss null": outcomes(lambda entry: entry.update(heldout_loss_after=None)),
    "times doubled": outcomes(times_doubled),
    "times null": outcomes(lambda entry: entry.update(steady_step_seconds=None, step_seconds=[])),
    "pairs slower": outcomes(slower_pairs),
    "pairs gone": outcomes(lambda entry: entry.pop("speedup", None)),
    "crashed": outcomes(lambda entry: entry.update(outcome="crashed")),
    "an outcome invented": outcomes(lambda entry: entry.update(outcome="finished")),
    "a verdict invented": outcomes(an_invented_verdict),
    "captured no more": outcomes(lambda entry: entry.update(captured=None)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_committed_record_that_was_damaged_by_hand_fails(tmp_path, capsys, damage):
    document = committed("h200-one-worker")
    damage(document)
    new, old = tmp_path / "new.json", RECORDS / "h200-one-worker.json"
    new.write_text(json.dumps(document), "utf-8")
    assert __main__.main(["gate", str(new), "--against", str(old)]) in (1, 2)
    said = capsys.readouterr()
    assert "FAILED" in said.out or said.err.startswith("lightweight: record ")


@pytest.mark.parametrize(
    ("new", "old"),
    [
        ("h200-one-worker", "h200-two-workers"),
        ("h200-two-workers", "h200-one-worker"),
        ("h200-one-worker", "h200-one-worker"),
        ("h200-no-worse", "h200-no-worse"),
        ("h200-t4", "h200-t4"),
    ],
)
def test_committed_records_of_the_same_cells_pass_each_other(capsys, new, old):
    """On other hosts, where the same stock step took a third longer."""
    command = ["gate", *(str(RECORDS / f"{name}.json") for name in (new,)), "--against", str(RECORDS / f"{old}.json")]
    assert __main__.main([*command, "--require-match"]) == 0, capsys.readouterr().out


def test_a_plan_is_nothing_to_hold_a_run_against(capsys):
    command = ["gate", str(RECORDS / "h200-t4.json"), "--against", str(RECORDS / "plan.json")]
    assert __main__.main(command) == 2
    assert "plan.json: holds no trial, so nothing can be compared with it" in capsys.readouterr().err


def test_a_match_may_be_required(capsys):
    command = ["gate", str(RECORDS / "h100-captured.json"), "--against", str(RECORDS / "h200-captured.json")]
    assert __main__.main(command) == 0
    assert "NOTHING WAS COMPARED" in capsys.readouterr().out
    assert __main__.main([*command, "--require-match"]) == 1
    assert "FAILED NOTHING WAS COMPARED" in capsys.readouterr().out


def test_a_limit_may_be_lifted_and_a_bad_one_is_told(tmp_path, capsys):
    document = committed("h200-one-worker")
    outcomes(loss_raised)(document)
    new = tmp_path / "new.json"
    new.write_text(json.dumps(document), "utf-8")
    command = ["gate", str(new), "--against", str(RECORDS / "h200-one-worker.json")]
    assert __main__.main([*command, "--loss-fail", "none"]) == 0
    capsys.readouterr()
    for option, value in (("--loss-fail", "-1"), ("--loss-fail", "5%"), ("--step-fail", "2"), ("--memory-fail", "x%")):
        assert __main__.main([*command, f"{option}={value}"]) == 2
        assert capsys.readouterr().err.startswith(f"lightweight: {option} '{value}': give ")


def test_every_default_says_where_it_comes_from():
    """What the committed records of equal trials differ in is well below the defaults, and what matters above."""
    losses: dict[Any, list[float]] = {}
    steps: dict[Any, list[float]] = {}
    for path in RECORDS.glob("*.json"):
        for e in record.load(path).entries:
            if e.outcome == "completed" and e.heldout_loss_after is not None:
                losses.setdefault(SAME_TRIAL.but("device").of(e), []).append(e.heldout_loss_after)
                if e.captured:
                    assert e.steady_step_seconds is not None
                    steps.setdefault(SAME_TRIAL.of(e), []).append(e.steady_step_seconds)
    apart = [max(of) - min(of) for of in losses.values() if len(of) > 1]
    assert len(apart) >= 28 and statistics.median(apart) < limits.LOSS_FAIL / 100
    assert max(apart) < limits.LOSS_FAIL / 5
    longer = [max(of) / min(of) - 1 for of in steps.values() if len(of) > 1]
    assert longer and max(longer) < limits.STEP_FAIL / 10
    assert limits.STEP_FAIL > 8.97 / 8.28 - 1


def test_cells_of_several_lengths_are_told_apart():
    cells = [cell(max_length=length, corpus_digest=f"{length}") for length in (256, 8192)]
    found = compare(cells, cells)
    (note,) = (note for note in found.notes if note.startswith("no verdict on the speedup"))
    assert "opt-350m x lora, opt-350m x lora in rows of 8192:" in note
