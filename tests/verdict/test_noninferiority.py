import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import samples
import torch
from scipy import stats

from lightweight import corpus, models, record, targets
from lightweight.__main__ import main
from lightweight.child import owner, worker
from lightweight.cli.train import Unattended
from lightweight.corpus import Rows
from lightweight.methods import BASELINE
from lightweight.targets import Device
from lightweight.training import stock
from lightweight.training.heldout import heldout_loss
from lightweight.training.meter import Meter
from lightweight.trial import Completed, Trial
from lightweight.verdict import noninferiority
from lightweight.verdict.noninferiority import MARGIN, Estimate

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
CPU = Device(name="a CPU")


def entry(method, seed, after, **changes):
    """An entry with what is compared of it."""
    losses = {"heldout_loss_before": 4.0, "heldout_loss_after": after}
    losses |= {"elsewhere_loss_before": 3.0, "elsewhere_loss_after": 3.1 + seed / 10}
    return samples.entry(**{"method": method, "seed": seed, "elsewhere_digest": "e"} | losses | changes)


BASELINES = [entry("baseline", seed, 3.0 + seed) for seed in range(3)]
LORAS = [entry("lora", seed, 3.0 + seed + extra) for seed, extra in enumerate((0.00, 0.02, 0.01))]


def test_the_interval_is_students_for_a_mean_and_its_upper_end_the_one_sided_bound():
    values = [0.03, -0.01, 0.02, 0.05]
    found = noninferiority.over_seeds(values)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.90)
    assert (found.mean, found.low, found.high) == pytest.approx((fmean(values), expected.low, expected.high))
    below = stats.ttest_1samp(values, found.high, alternative="less").pvalue
    assert below == pytest.approx(0.05)
    assert noninferiority.over_seeds([0.5]) == Estimate(0.5, -math.inf, math.inf)
    with pytest.raises(ValueError, match="at least one"):
        noninferiority.over_seeds([])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.3, -0.1, "no worse"),
        (0.01, MARGIN - 0.001, "no worse"),
        (0.01, MARGIN, "inconclusive"),
        (MARGIN, 0.2, "inconclusive"),
        (MARGIN + 0.001, 0.2, "worse"),
        (-math.inf, math.inf, "inconclusive"),
    ],
)
def test_no_worse_is_claimed_only_where_the_whole_interval_is_below_the_margin(low, high, expected):
    assert noninferiority.conclusion(Estimate((low + high) / 2, low, high)) == expected


def test_a_method_at_the_margin_is_called_no_worse_one_time_in_twenty():
    draw = random.Random(0)
    seeds = [[draw.gauss(MARGIN, 0.02) for _ in range(4)] for _ in range(2000)]
    share = fmean(noninferiority.conclusion(noninferiority.over_seeds(values)) == "no worse" for values in seeds)
    assert 0.04 < share < 0.06


def test_a_method_is_held_against_the_baseline_of_the_same_seed():
    baseline, lora = noninferiority.qualities([*reversed(BASELINES), *LORAS])
    assert (baseline.method, baseline.difference, baseline.conclusion) == ("baseline", None, None)
    assert lora.difference == noninferiority.over_seeds([0.0 + 3.0 - 3.0, 4.02 - 4.0, 5.01 - 5.0])
    assert lora.conclusion == "no worse"  # baselines differ by whole nats; only pairs show it
    assert lora.heldout == pytest.approx((4.0, 4.01))
    assert lora.elsewhere == pytest.approx((3.0, 3.2))
    assert lora.forgotten is not None
    assert lora.forgotten.mean == pytest.approx(0.2)
    assert lora.forgotten.low < 0.2 < lora.forgotten.high
    assert [of.seed for of in lora.entries] == [0, 1, 2]


def test_a_method_that_lost_something_is_told():
    worse = [entry("lora", seed, 3.2 + seed + seed / 100) for seed in range(3)]
    assert noninferiority.qualities([*BASELINES, *worse])[1].conclusion == "worse"
    scattered = [entry("lora", seed, 3.0 + seed + extra) for seed, extra in enumerate((-0.3, 0.3, 0.0))]
    assert noninferiority.qualities([*BASELINES, *scattered])[1].conclusion == "inconclusive"


def test_a_margin_is_too_wide_where_it_is_larger_than_what_the_baseline_gained_with_the_methods_seeds():
    baselines = [entry("baseline", seed, after) for seed, after in enumerate((3.97, 3.95, 3.0))]
    baseline, lora = noninferiority.qualities([*baselines, *(entry("lora", seed, 4.0) for seed in range(2))])
    assert lora.gained == pytest.approx(0.04)  # the third seed is no pair
    assert lora.too_wide == noninferiority.too_wide(MARGIN, 0.04) is not None
    assert baseline.too_wide is None
    assert noninferiority.too_wide(0.04, 0.04) is None


@pytest.mark.parametrize(
    "key",
    [
        *("model", "target", "device", "weights", "corpus_digest", "elsewhere_digest"),
        *("planned_steps", "max_length", "tokens_per_step", "loss_on", "long"),
    ],
)
def test_another_job_is_no_baseline(key):
    others = [replace(of, **{key: "pretrained" if key == "weights" else "other"}) for of in BASELINES]
    found = [of for of in noninferiority.qualities([*others, *LORAS]) if of.method == "lora"]
    if key == "weights":
        assert found[0].conclusion == "no worse"
        assert noninferiority.qualities([replace(of, weights="random") for of in [*BASELINES, *LORAS]]) == []
    else:
        assert (found[0].conclusion, found[0].difference, found[0].failed) == ("inconclusive", None, 3)


def test_a_failed_trial_is_counted_and_shows_nothing():
    failed = entry("lora", 3, None, outcome="out_of_memory", heldout_loss_before=None)
    found = noninferiority.qualities([*BASELINES, entry("baseline", 3, 3.0), *LORAS, failed])[1]
    assert (found.conclusion, found.failed, len(found.entries)) == ("inconclusive", 1, 4)
    assert found.difference == noninferiority.qualities([*BASELINES, *LORAS])[1].difference


def test_one_seed_is_no_comparison_and_the_newest_trial_of_a_seed_counts():
    assert noninferiority.qualities([BASELINES[0], LORAS[0]]) == []
    assert noninferiority.qualities([BASELINES[0], LORAS[0], LORAS[0]]) == []
    again = entry("lora", 0, 3.03)
    difference = noninferiority.qualities([*BASELINES, *LORAS, again])[1].difference
    assert difference is not None and difference.mean == pytest.approx(0.02)


def test_records_from_before_there_was_a_text_from_elsewhere_are_compared_too():
    unknown = dict.fromkeys(("elsewhere_digest", "elsewhere_loss_before", "elsewhere_loss_after"))
    _, lora = noninferiority.qualities([replace(of, **unknown) for of in [*BASELINES, *LORAS]])
    assert (lora.conclusion, lora.forgotten) == ("no worse", None)


def test_the_loss_elsewhere_is_measured_before_and_after_and_recorded(micro, small_corpus, folder):
    text = (EXPERIMENTS / "elsewhere.txt").read_text("utf-8")
    trial = Trial(
        model=micro,
        method=BASELINE,
        target=targets.CPU,
        corpus=replace(small_corpus, elsewhere=text),
        max_steps=2,
    )
    with owner.Child(trial, folder) as child:
        outcome = child.finish()
    assert isinstance(outcome, Completed), outcome.reason
    network, meter = worker.build(trial, torch.device("cpu")), Meter(torch.device("cpu"), 0.0)
    trainer = stock.make_trainer(trial, network, Rows([], 0), meter, Unattended(), folder)
    rows = corpus.encode_text(text, models.load_tokenizer(micro), trial.max_length)
    untrained = heldout_loss(trainer, rows)
    measured = outcome.measured
    assert measured.elsewhere_loss_before == pytest.approx(untrained, abs=1e-5)
    assert measured.elsewhere_loss_after is not None
    assert measured.elsewhere_loss_after != measured.elsewhere_loss_before
    recorded = record.entry(trial, outcome, CPU, None)
    assert recorded.elsewhere_loss_before == measured.elsewhere_loss_before
    assert recorded.elsewhere_loss_after == measured.elsewhere_loss_after
    assert recorded.elsewhere_digest == trial.corpus.elsewhere_digest != recorded.corpus_digest


@pytest.fixture
def experiment(pytester, without_gpu):
    """The experiment as it stands, with its corpus."""
    shutil.copy(EXPERIMENTS / "test_no_worse.py", pytester.path / "test_experiment.py")
    for path in (EXPERIMENTS / "elsewhere.txt", EXPERIMENTS.parent / "corpus.json"):
        shutil.copy(path, pytester.path)
    pytester.makeconftest('pytest_plugins = ["lightweight.plugin"]')
    return pytester


def test_the_experiment_waits_until_a_model_with_real_weights_is_named(experiment):
    result = experiment.runpytest()
    result.assert_outcomes(skipped=14)
    result.stdout.fnmatch_lines("not run: takes minutes; name a model with real weights, such as --model smollm2-135m*")
    result = experiment.runpytest("--model=opt-tiny")
    result.assert_outcomes(skipped=7)
    result.stdout.fnmatch_lines("not run: random weights say nothing about quality: *")


def test_the_experiment_trains_every_seed_and_its_record_gives_the_table_again(experiment, micro):
    result = experiment.runpytest(f"--model={micro.location}", "-k", "baseline-captured", "--benchmark-json=run.json")
    result.assert_outcomes(passed=1, skipped=1)  # other rates need a GPU
    entries = record.load(experiment.path / "run.json").entries
    assert [(of.method, of.seed) for of in entries] == [
        (method, seed) for method in ("baseline-captured", "baseline") for seed in range(3)
    ]
    assert {of.corpus_digest for of in entries} == {
        corpus.in_latin_letters(corpus.load(experiment.path / "corpus.json")).digest
    }
    found, baseline = noninferiority.qualities(entries)
    assert (found.conclusion, found.failed, baseline.conclusion) == ("no worse", 0, None)
    assert found.forgotten is not None
    result.stdout.fnmatch_lines("*baseline-captured * 3 *no worse*")


def test_the_experiment_is_of_any_method_with_its_seeds_and_margin_and_tells_what_they_can_show(experiment, micro):
    experiment.makepyfile(
        mine="""
        from dataclasses import replace

        from lightweight.methods import LORA

        MINE = replace(LORA, name="mine", training_arguments={**LORA.training_arguments, "learning_rate": 1e-3})
        """
    )
    experiment.syspathinsert()
    (experiment.path / "talks.jsonl").write_text(
        "".join(f'{{"prompt": "say {n}", "completion": "안녕 {n}"}}\n' for n in range(8)), "utf-8"
    )
    of_mine = (f"--model={micro.location}", "--method=mine:MINE", "--seeds=2", "--corpus=talks.jsonl")
    pilot = experiment.path / "pilot.json"
    wide = [entry("baseline", seed, 3.0) for seed in range(3)]
    wide += [entry("lora", seed, 3.0 + extra) for seed, extra in enumerate((0.0, 0.9, 0.3))]
    pilot.write_text(json.dumps(record.document(wide)), "utf-8")
    run = experiment.runpytest(*of_mine, f"--pilot={pilot}", "--margin=0.2", "--benchmark-json=run.json")
    run.assert_outcomes(passed=1, skipped=2)
    run.stdout.fnmatch_lines(["2 seeds show a method that is as good as its baseline to be no worse within 0.2 nats *"])
    run.stdout.fnmatch_lines(["*(from pilot.json)*", "*No worse: the whole interval is below the margin of 0.2 nats.*"])
    entries = record.load(experiment.path / "run.json").entries
    assert [(of.method, of.seed) for of in entries] == [("mine", 0), ("mine", 1), ("baseline", 0), ("baseline", 1)]
    assert {of.trained_on for of in entries} == {"texts"}  # the whole of it, in whatever letters
    assert {(of.training_arguments or {})["learning_rate"] for of in entries if of.method == "mine"} == {1e-3}
    strict = experiment.runpytest(*of_mine, "--margin=0.0000001", "-k", "no_worse")
    strict.assert_outcomes(failed=1)
    strict.stdout.re_match_lines([".* x mine: (inconclusive: .* nats over the baseline, the margin 1e-07: |worse: ).*"])


OF_MINE = """
from dataclasses import replace

from lightweight.methods import LORA

MINE = replace(LORA, name="mine", training_arguments={**LORA.training_arguments, "learning_rate": 1e-3})
"""


def test_a_run_of_ones_own_method_in_the_experiments_steps_is_bundled_until_it_changes(
    experiment, micro, monkeypatch, capsys
):
    experiment.makepyfile(stepped_mine=OF_MINE)
    asked = (f"--model={micro.location}", "--method=stepped_mine.py:MINE", "--seeds=2", "-k", "no_worse")
    experiment.runpytest(*asked, "--benchmark-json=run.json").assert_outcomes(passed=1)
    monkeypatch.chdir(experiment.path)
    of_mine, *_ = record.load(experiment.path / "run.json").entries
    assert of_mine.changed == {"batch_size": 2, "accumulation": 1}  # which the test sets, and the method does not say
    assert main(["report", "run.json", "--bundle", "bundle"]) == 0
    assert (experiment.path / "bundle" / "stepped_mine.py").is_file()
    capsys.readouterr()
    document = json.loads((experiment.path / "run.json").read_text("utf-8"))
    for key, value, problem in (
        ("changed", None, "per_device_train_batch_size was 2 and is 8, gradient_accumulation_steps was 1 and is None"),
        ("method_digest", "0" * 64, "its digest differs"),
    ):
        outcomes = [of | {key: value} for of in document["outcomes"]]
        (experiment.path / "other.json").write_text(json.dumps(document | {"outcomes": outcomes}), "utf-8")
        assert main(["report", "other.json", "--bundle", "another"]) == 2
        assert f"method mine has changed since record other.json: {problem}; run it" in capsys.readouterr().err


def test_rates_of_a_sweep_are_taken_in_the_steps_that_they_were_searched_for(experiment, micro, monkeypatch):
    monkeypatch.chdir(experiment.path)
    swept = ["sweep", "--model", micro.location, "--method", "baseline", "--method", "lora", "--budget", "3"]
    swept += ["--learning-rate", "1e-4..1e-3", "--max-steps", "1", "--max-length", "48", "--output", "rates.json"]
    assert main(swept) == 0
    asked = [f"--model={micro.location}", "--method=lora", "--seeds=2", "-k", "no_worse", "--margin=1"]
    asked += ["--learning-rate=rates.json", "--benchmark-json=run.json"]
    experiment.runpytest(*asked).assert_outcomes(passed=1)
    entries = record.load(experiment.path / "run.json").entries
    assert {(of.training_arguments or {}).get("per_device_train_batch_size") for of in entries} == {8}
    other = experiment.runpytest(*asked, "--batch-size=2")
    assert "was searched for under other settings: per_device_train_batch_size was 8 and is 2: sweep it" in "".join(
        [*other.outlines, *other.errlines]
    )


def test_methods_with_steps_of_other_sizes_are_not_compared(experiment, micro):
    result = experiment.runpytest(f"--model={micro.location}", "--method=qlora", "--batch-size=2", "-k", "no_worse")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*has 8 sequences an optimizer step and baseline 2: give --batch-size and*"])


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "workers"])
def test_what_is_told_of_one_seed_of_a_margin_above_the_baselines_gain_and_where_pytest_is_quiet(
    experiment, micro, workers
):
    experiment.makepyfile(learns_nothing=OF_MINE.replace('"mine"', '"nothing"').replace("1e-3", "1e-12"))
    pilot = f"--pilot={EXPERIMENTS / 'records' / 'h200-no-worse.json'}"
    asked = (f"--model={micro.location}", "--method=learns_nothing.py:MINE", "-k", "no_worse", "--margin=1", "-q")
    one = experiment.runpytest(*asked, pilot, "--seeds=1", *workers)
    one.assert_outcomes(failed=1)
    one.stdout.fnmatch_lines(["1 seed has no interval, and shows a method * with a chance of 0%, *"])
    assert ": one seed has no interval: give --seeds 2 or more: the margin is larger than" in one.stdout.str()
    two = experiment.runpytest(*asked, pilot, "--seeds=2", *workers)
    two.assert_outcomes(passed=1)
    two.stdout.fnmatch_lines(["2 seeds show a method * have 80%*"])
    gained = r"the margin is larger than the -?0\.\d{3} nats that the baseline gained in training, so that what"
    two.stdout.re_match_lines([rf".* x nothing: no worse: .*: {gained}", rf".* x nothing: {gained}"])  # under its table
