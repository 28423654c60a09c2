"""`lightweight plan`: which method fits which card, and how large a batch."""

import json
import re
from dataclasses import replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import samples
from packaging.version import Version

from conftest import MICRO
from lightweight import record, targets
from lightweight.__main__ import main
from lightweight.forecast import plan, plan_choice, plan_search, tracer
from lightweight.forecast.plan_row import PlanOptions, PlanRow
from lightweight.forecast.replay import MARGIN, Trace
from lightweight.forecast.tracer import ForecastError
from lightweight.methods import BASELINE, BASELINE_CAPTURED, LORA, LORA_CAPTURED, QLORA, QLORA_CAPTURED, CapturedStep
from lightweight.models import OPT_TINY
from lightweight.preload import peft
from lightweight.targets import CONTEXT_BYTES, HOPPER, MiB, Target

KEYS = {
    *("model", "method", "target", "forecast_allocated_bytes", "forecast_reserved_bytes", "budget_bytes"),
    *("phase", "verdict"),
}


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> str:
    """A model of one layer, whose traces take a third of those of opt-tiny."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "config.json").write_text(json.dumps(MICRO.architecture))
    return str(folder)


def rows(capsys, *arguments):
    status = main(["plan", *arguments, "--format", "json"])
    return status, json.loads(capsys.readouterr().out)


def test_json_has_a_row_for_every_model_method_and_target(capsys):
    status, found = rows(capsys, "opt-tiny", "--target", "t4", "--target", "2GiB", "--max-length", "64")
    assert status == 0
    assert [(row["method"], row["target"]) for row in found] == [
        (method, target)
        for target in ("t4", "2GiB")
        for method in ("baseline", "lora", "qlora", "lora-captured", "qlora-captured")
    ]
    for row in found:
        assert set(row) >= KEYS
        assert row["verdict"] == "fits"
        assert row["budget_bytes"] == targets.named(row["target"]).budget_bytes
        assert sum(row["bytes_by_cause"].values()) == row["forecast_allocated_bytes"] <= row["forecast_reserved_bytes"]
    assert found[0]["parameters"] == 503_296
    assert found[0]["max_length"] == 64


def test_the_batch_can_be_given(capsys, small):
    _, (own,) = rows(capsys, small, "--method", "baseline", "--target", "t4")
    _, (larger,) = rows(capsys, small, "--method", "baseline", "--target", "t4", "--batch-size", "32")
    assert (own["batch_size"], larger["batch_size"]) == (8, 32)
    assert own["forecast_allocated_bytes"] < larger["forecast_allocated_bytes"]


def test_status_is_1_where_no_method_fits_a_target_that_was_asked_for(capsys, small):
    status, found = rows(capsys, small, "--target", "t4", "--target", "0.45GiB", "--method", "baseline")
    assert status == 1
    assert [row["verdict"] for row in found] == ["fits", "does_not_fit"]
    assert [row["chosen"] for row in found] == [True, False]


def test_the_table_says_what_is_held_and_what_to_take(capsys):
    assert main(["plan", "opt-tiny", "--target", "t4"]) == 0
    printed = capsys.readouterr().out
    for word in ("opt-tiny", "quantization state", "optimizer", "logits", "workspace", "430 MiB"):
        assert word in printed
    (chosen,) = [line for line in printed.splitlines() if "take this" in line]
    assert "lora-captured" in chosen.split()


def test_the_table_says_what_was_set(capsys, small):
    arguments = [small, "--target", "t4", "--method", "lora", "--method", "baseline", "--max-length", "64"]
    assert main(["plan", *arguments, "--lora-rank", "2", "--batch-size", "4"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Set from")]
    assert line == "Set from outside the method: lora (--batch-size 4 --lora-rank 2), baseline (--batch-size 4)."
    assert main(["plan", *arguments]) == 0
    assert "Set from" not in capsys.readouterr().out


def test_bf16_is_refused_where_the_card_has_none(capsys, monkeypatch, tmp_path, small):
    (tmp_path / "bf16_methods.py").write_text(
        "from dataclasses import replace\nfrom lightweight.methods import BASELINE\n"
        "MINE = replace(BASELINE, name='mine', weights_dtype='bfloat16')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arguments = [small, "--method", "bf16_methods:MINE", "--target", "t4", "--target", "l4"]
    status, (on_t4, on_l4) = rows(capsys, *arguments, "--max-length", "64")
    assert status == 1
    assert (on_t4["verdict"], on_l4["verdict"]) == ("does_not_fit", "fits")
    assert "bf16" in on_t4["reason"]
    assert main(["plan", *arguments]) == 1
    assert "computes in bf16, which t4 does not have" in capsys.readouterr().out


REMOTE = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["opt-tiny", "--method", "nosuch"], "unknown method 'nosuch'"),
        (["opt-tiny", "--method", "no.such:THING"], "cannot be imported"),
        (["opt-tiny", "--target", "nosuch"], "unknown target 'nosuch'"),
        (["opt-tiny", "--target", "native"], "no amount of memory"),
        (["opt-tiny", "--batch-size", "0"], "--batch-size 0"),
        (["opt-tiny", "--max-length", "-3"], "--max-length -3"),
        (["opt-tiny", "--lora-dropout", "1"], "--lora-dropout 1: give a share"),
        (["opt-tiny", "--schedule", "cosin"], "--schedule cosin: choose one of linear"),
        (["opt-tiny", "--method", "baseline", "--lora-rank", "4"], "method baseline has no LoRA adapter"),
        (["opt-tiny", "--max-length", "4096"], "rows of 4096 tokens"),
        (["opt-tiny", "--method", "lora", "--lora-layers", "q_prj"], "no layer called q_prj: name some of fc1"),
        (["opt-tiny", "--gpus", "0"], "--gpus 0: give at least 1"),
        (["opt-tiny", "--gpus", "-2"], "--gpus -2: give at least 1"),
        (["opt-tiny", "--gpus", "two"], "--gpus two: give a whole number"),
        (["opt-tiny", "--gpus", "9"], "8 sequences a step, which 9 ranks cannot share"),
        (["opt-tiny", "--gpus", "3", "--batch-size", "2", "--method", "lora"], "which 3 ranks cannot share"),
        (["./nowhere"], "./nowhere"),
        (["{empty}"], "has no config.json"),
        (["{remote}"], "cannot be used"),
        (["{broken}"], "cannot be used"),
        (["opt-tiny", "--record", "nowhere.json"], "nowhere.json"),
        (
            ["opt-tiny", "--target", "16GiB", "--tokens", "9", "--max-hours", "1"],
            "time is not forecast for target '16GiB'",
        ),
        (["opt-tiny", "--gpus", "2", "--tokens", "9", "--price", "1", "--max-price", "1"], "leave out one of them"),
        (
            ["opt-tiny", "--target", "t4", "--price", "1"],
            "--price is about a whole job: give its --tokens or its --corpus",
        ),
        (["opt-tiny", "--target", "t4", "--max-hours", "1"], "--max-hours is about a whole job: give its --tokens or"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, tmp_path, arguments, words):
    folders = {name: tmp_path / name for name in ("empty", "remote", "broken")}
    for folder in folders.values():
        folder.mkdir()
    (folders["remote"] / "config.json").write_text(json.dumps(REMOTE))
    (folders["broken"] / "config.json").write_text("{")
    assert main(["plan", *(argument.format(**folders) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lightweight: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_a_local_configuration_is_enough(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OPT_TINY.architecture))
    status, (row,) = rows(capsys, str(tmp_path), "--method", "lora", "--target", "t4")
    assert status == 0
    assert row["model"] == str(tmp_path)


NEOX = {"model_type": "gpt_neox", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1} | {
    "intermediate_size": 64,
    "vocab_size": 384,
    "max_position_embeddings": 256,
}


assert isinstance(LORA.adapter, peft.LoraConfig)
Q_LORA = replace(LORA, name="q-lora", adapter=replace(LORA.adapter, target_modules=["q_proj"]))
COMPILED = replace(LORA_CAPTURED, name="compiled", step=CapturedStep(compile=True))


@pytest.fixture
def neox(tmp_path) -> str:
    """A model that has no q_proj, which Q_LORA names."""
    (tmp_path / "config.json").write_text(json.dumps(NEOX))
    return str(tmp_path)


def test_a_model_without_a_configuration_is_a_line_among_the_others(capsys, small, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "op')
    for folders in ([small, str(tmp_path)], [str(tmp_path), small]):
        arguments = [*folders, "--target", "t4", "--method", "baseline", "--max-length", "64"]
        status, found = rows(capsys, *arguments)
        assert status == 1
        assert {row["model"]: row["verdict"] for row in found} == {small: "fits", str(tmp_path): "cannot_be_forecast"}
        (reason,) = [row["reason"] for row in found if row["reason"]]
        assert "its config.json cannot be used" in reason and "\n" not in reason
    assert main(["plan", *arguments]) == 1
    assert reason in capsys.readouterr().out


def test_a_method_that_cannot_be_forecast_is_a_line_among_the_others(capsys, neox, tmp_path):
    asked = [neox, "--target", "t4", "--target", "l4", "--max-length", "32", "--max-batch"]
    methods = [
        "--method",
        "forecast.test_plan:Q_LORA",
        "--method",
        "baseline",
        "--method",
        "forecast.test_plan:COMPILED",
    ]
    status = main(["plan", *asked, *methods, "--format", "json"])
    printed = capsys.readouterr().out
    found = json.loads(printed)
    assert status == 0
    assert [row["verdict"] for row in found] == ["cannot_be_forecast", "fits", "cannot_be_forecast"] * 2
    assert [row["chosen"] for row in found] == [False, True, False] * 2
    no_lora, _, no_captured = found[:3]
    assert no_lora["reason"].startswith("cannot be built: ") and "q_proj" in no_lora["reason"]
    assert "take compile=False" in no_captured["reason"]
    assert no_lora["forecast_reserved_bytes"] is None and no_lora["max_batch"] is None
    (tmp_path / "plan.json").write_text(printed)
    assert [row.method for row in record.load(tmp_path / "plan.json").forecasts] == ["baseline", "baseline"]


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.mark.parametrize("cards", [("a100-40", "l4", "h100"), ("h100", "l4", "a100-40")])
def test_what_cards_from_ada_on_compute_in_fp8_is_forecast_for_those_that_dequantize_it(capsys, tmp_path, cards):
    (tmp_path / "config.json").write_text(json.dumps({**MICRO.architecture, "quantization_config": FP8}))
    asked = [argument for card in cards for argument in ("--target", card)]
    _, found = rows(capsys, str(tmp_path), *asked, "--method", "lora", "--max-length", "32")
    reasons = {row["target"]: row["reason"] for row in found}
    assert reasons["a100-40"] is None
    assert "quantized by fp8" in reasons["l4"] == reasons["h100"]  # where there is such a card, for want of its kernels


@pytest.mark.parametrize("order", [1, -1])
def test_what_cannot_be_traced_for_one_kind_of_card_is_asked_of_the_others(monkeypatch, order):
    trace, asked = tracer.trace, []

    def refused_by_turing(trial, capability, rows=None):
        asked.append(capability)
        if capability == targets.T4.capability:
            raise ForecastError(f"{trial.name}: it cannot be traced")
        return trace(trial, capability, rows)

    monkeypatch.setattr(tracer, "trace", refused_by_turing)
    cards = [targets.T4, replace(targets.T4, name="another"), targets.L4][::order]
    told: list[str] = []
    found = plan.plan([MICRO], [LORA], cards, PlanOptions(max_length=16), failed=lambda error: told.append(str(error)))
    assert {row.target.name: row.reason for row in found} == {
        "t4": "it cannot be traced",
        "another": "it cannot be traced",
        "l4": None,
    }
    assert told == ["micro x lora: it cannot be traced"]
    assert len(asked) == 2, "once for each kind of card"


def test_the_table_says_why_a_method_cannot_be_forecast_and_the_rest(capsys, neox):
    asked = [
        "plan",
        neox,
        "--target",
        "t4",
        "--max-length",
        "32",
        "--method",
        "forecast.test_plan:Q_LORA",
        "--method",
        "baseline",
    ]
    assert main(asked) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    (line,) = [line for line in printed.out.splitlines() if "cannot be forecast" in line]
    assert "q-lora" in line and "q_proj" in line
    assert "take this" in printed.out
    main([*asked, "--traceback"])
    assert "Traceback" in capsys.readouterr().err


def test_two_methods_of_one_name_are_refused(capsys, monkeypatch, tmp_path):
    (tmp_path / "namesakes.py").write_text(
        "from dataclasses import replace\nfrom lightweight.methods import LORA\n"
        "OTHER = replace(LORA, training_arguments={**LORA.training_arguments, 'learning_rate': 0.5})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["plan", "opt-tiny", "--target", "t4", "--method", "lora", "--method", "namesakes:OTHER"]) == 2
    assert "two different methods are called 'lora' (their training_arguments differ)" in capsys.readouterr().err


def test_status_is_1_where_no_method_can_be_forecast(capsys, neox):
    assert main(["plan", neox, "--method", "forecast.test_plan:Q_LORA"]) == 1
    assert "M parameters" not in (printed := capsys.readouterr().out)
    assert printed.count("cannot be forecast") == len(targets.TARGETS) - 1, "native has no amount"


def test_what_no_method_can_be_forecast_of_is_known_before_anything_is_traced(monkeypatch, small):
    monkeypatch.setattr(tracer, "trace", lambda *_: pytest.fail("traced"))
    model = replace(MICRO, architecture=MICRO.architecture | {"max_position_embeddings": 16})
    with pytest.raises(ForecastError, match="micro x lora: rows of 256 tokens, where the model takes 16"):
        plan.plan([model], [LORA, BASELINE], [targets.T4])


# Plans of a card whose allocator may reserve so many MiB, on traces made by hand


def card(mib):
    return Target(name="card", capability=HOPPER, total_bytes=round(mib * MiB) + CONTEXT_BYTES)


@pytest.fixture
def traced(monkeypatch):
    """Traces of 100 MiB of weights and 100 MiB a row of a pass, for each GPU of a trial; the rows and GPUs of each."""
    asked = []

    def trace(trial, capability, rows=None):
        rows = trial.method.on_rank(trial.world_size).sequences_per_pass
        asked.append((rows, trial.world_size))
        return Trace(
            parameters=1,
            trainable_parameters=1,
            events=[(0, 100 * MiB), (1, rows * 100 * MiB), (1, 0)],
            causes={0: "weights", 1: "activations"},
            phases=[(0, "build"), (1, "forward")],
        )

    monkeypatch.setattr(tracer, "trace", trace)
    return asked


def planned(method, mib, **changes):
    (row,) = plan.plan([MICRO], [method], [card(mib)], PlanOptions(**changes))
    return row, (row.passes, row.batch_size, row.accumulation, row.verdict, row.chosen)


@pytest.mark.parametrize(("mib", "passes", "rows"), [(1000, 1, 8), (900, 2, 4), (600, 2, 4), (400, 4, 2), (250, 8, 1)])
def test_the_most_rows_of_the_same_step_that_fit_are_advised(traced, mib, passes, rows):
    assert planned(LORA, mib)[1] == (passes, rows, passes, "fits", True)
    assert len(traced) <= 3


def test_a_step_may_have_any_number_of_rows(traced):
    assert planned(LORA.with_batch(12), 800)[1] == (2, 6, 2, "fits", True)
    assert planned(QLORA, 250)[1] == (8, 1, 8, "fits", True)
    assert planned(LORA.with_batch(7), 800)[1] == (7, 1, 7, "fits", True)


def test_where_no_rows_fit_the_row_is_about_the_methods_own(traced):
    assert planned(LORA, 150)[1] == (1, 8, 1, "does_not_fit", False)


def test_a_batch_that_was_asked_for_is_not_changed(traced):
    assert planned(LORA, 600, keeps_passes=True)[1] == (1, 8, 1, "does_not_fit", False)
    assert traced == [(8, 1)]


@pytest.mark.usefixtures("without_gpu")
def test_settings_are_forecast(capsys, tmp_path):
    """A larger rank on more layers has more to train, and an accumulation that is said is not changed."""
    asked = ["opt-tiny", "--target", "t4", "--method", "lora", "--max-length", "32"]
    _, (own,) = rows(capsys, *asked)
    _, (changed,) = rows(capsys, *asked, "--lora-rank", "32", "--lora-layers", "all-linear", "--accumulation", "2")
    _, (rank,) = rows(capsys, *asked, "--lora-rank", "32")
    assert rank["trainable_parameters"] == 4 * own["trainable_parameters"]
    assert changed["trainable_parameters"] > 2 * rank["trainable_parameters"]
    assert changed["bytes_by_cause"]["optimizer"] > rank["bytes_by_cause"]["optimizer"]
    assert (own["passes"], changed["passes"], changed["batch_size"]) == (1, 2, 8)


def test_fewer_rows_are_not_sought_where_what_every_pass_holds_is_too_much(traced):
    assert planned(LORA, 90)[1] == (1, 8, 1, "does_not_fit", False)
    assert traced == [(8, 1)]


def test_several_gpus_take_the_rows_that_fit_each(traced):
    row, shape = planned(LORA, 400, gpus=2, fewest_gpus=True)
    assert shape == (2, 2, 4, "fits", True), "2 passes of 2 rows on each of two GPUs: 4 of 2 on one"
    assert row.fewest_gpus == 1
    assert [method.passes_per_step for method in plan_search.smaller_passes(LORA, 2)] == [4, 8]


def test_passes_that_cannot_be_shared_among_gpus_are_a_line_of_that_method(traced):
    lora, qlora = plan.plan([MICRO], [LORA.with_batch(2), QLORA], [card(900)], PlanOptions(keeps_passes=True, gpus=3))
    assert lora.verdict == "cannot_be_forecast"
    assert lora.reason is not None and "which 3 ranks cannot share" in lora.reason
    assert qlora.verdict == "fits" and qlora.chosen


def row_of(method, verdict="fits"):
    forecast = samples.predicted(verdict)
    return PlanRow(model="m", method=method, target=targets.T4, question=PlanOptions(), forecast=forecast)


def names_of_chosen(rows):
    return [row.method.name for row in rows if row.chosen]


def entry(method, seconds, device="H200", **changes):
    computed = {
        "model": "m",
        "method": method.name,
        "steady_step_seconds": seconds,
        "tokens_per_step": 1,
        "device": device,
        "device_bytes": 2**33,
        "max_length": 256,
        "world_size": 1,
        "method_digest": record.method_digest(method),
        "weights_dtype": method.on_gpu(bf16=False).weights_dtype,
        "precision": method.precision,
        "training_arguments": dict(method.training_arguments),
    }
    return samples.entry(**computed | changes)


ALL = (QLORA, BASELINE, LORA)
SLOW_LORA = [entry(BASELINE, 1.0), entry(LORA, 2.0), entry(QLORA, 9.0)]
FAST_QLORA = [entry(method, 1.0 + (method != QLORA), "L4") for method in ALL]


@pytest.mark.parametrize(
    ("measured", "chosen", "device"),
    [
        ([], "lora", None),  # expected: half precision and no optimizer state for every parameter
        (SLOW_LORA, "baseline", "H200"),
        ([entry(BASELINE, 1.0), entry(QLORA, 0.5)], "lora", None),  # not all were measured
        ([*SLOW_LORA, *2 * [entry(QLORA, 0.1, max_length=64)]], "baseline", "H200"),  # other rows
        ([*SLOW_LORA, *2 * [entry(QLORA, 0.1, world_size=2)]], "baseline", "H200"),
        ([*SLOW_LORA, *2 * [entry(QLORA, 0.1, model="other")]], "baseline", "H200"),
        ([*SLOW_LORA, *2 * [entry(QLORA, 0.1, outcome="crashed")]], "baseline", "H200"),
        ([*SLOW_LORA, *2 * [entry(replace(QLORA, adapter=LORA.adapter), 0.1)]], "baseline", "H200"),  # of its name
        ([*SLOW_LORA, *2 * [entry(QLORA, 0.1, method_digest=None)]], "qlora", "H200"),  # from before there were digests
        ([*SLOW_LORA, *2 * [entry(QLORA, 0.1, weights_dtype="bfloat16")]], "baseline", "H200"),  # which a T4 has not
        ([*SLOW_LORA, *2 * [entry(LORA, 0.1, precision="fp32")]], "baseline", "H200"),
        ([entry(method, 1.0 + (method != QLORA), "CPU", device_bytes=None) for method in ALL], "lora", None),
        ([*SLOW_LORA, entry(QLORA, None)], "baseline", "H200"),
        (
            [*SLOW_LORA, *2 * [entry(QLORA, 0.1, training_arguments={"per_device_train_batch_size": 8})]],
            "baseline",
            "H200",
        ),
        ([*SLOW_LORA, entry(QLORA, 0.1, "L4")], "baseline", "H200"),  # of no device two
        ([*SLOW_LORA, entry(BASELINE, 9.0), entry(BASELINE, 9.0)], "lora", "H200"),  # the median of three
        ([*SLOW_LORA, entry(BASELINE, 1.0), entry(BASELINE, 9.0)], "baseline", "H200"),  # not the last of three
        ([*SLOW_LORA, *FAST_QLORA], "qlora", "L4"),  # the newest device of those that have them all
        ([*FAST_QLORA, *SLOW_LORA], "baseline", "H200"),
        ([*[entry(m, e, "Tesla T4") for m, e in zip(ALL, (1, 2, 2), strict=True)], *SLOW_LORA], "qlora", "Tesla T4"),
    ],
)
def test_the_fastest_method_that_fits_is_chosen(measured, chosen, device):
    made = plan_choice.with_choice([row_of(method) for method in ALL], measured)
    assert names_of_chosen(made) == [chosen]
    assert {row.measured_on for row in made} == {device}


def test_of_methods_that_cost_alike_the_one_with_fewer_passes_is_chosen():
    made = [row_of(replace(LORA, name="more").with_passes(4)), row_of(LORA.with_passes(2))]
    assert names_of_chosen(plan_choice.with_choice(made, [])) == ["lora"]


def test_lora_in_more_passes_is_expected_to_be_faster_than_qlora():
    made = [row_of(QLORA), row_of(LORA.with_passes(2))]
    assert names_of_chosen(plan_choice.with_choice(made, [])) == ["lora"]


def test_every_row_says_which_device_the_order_comes_from(traced):
    of_micro = [entry(method, 1.0, "NVIDIA H200", model="micro") for method in ALL]
    rows = plan.plan([MICRO], ALL, [card(1000)], measured=of_micro)
    assert {row.measured_on for row in rows} == {"NVIDIA H200"}


def test_paged_state_is_in_no_peak(traced, monkeypatch):
    trace = tracer.trace
    monkeypatch.setattr(tracer, "trace", lambda *given: replace(trace(*given), paged_bytes=900 * MiB))
    (row,) = plan.plan([MICRO], [LORA], [card(1000)])
    assert row.forecast is not None
    assert (row.verdict, row.forecast.paged_bytes, row.forecast.allocated_bytes) == ("fits", 900 * MiB, 900 * MiB)
    assert row.as_json()["paged_bytes"] == 900 * MiB


def test_json_has_what_was_asked_for_and_no_bytes_where_there_is_no_forecast():
    row, extras = row_of(LORA), ("max_batch", "fewest_gpus")
    assert row.as_json().keys() & set(extras) == set()
    asked = replace(row, question=PlanOptions(max_batch=True, fewest_gpus=True), max_batch=3)
    assert [asked.as_json()[key] for key in extras] == [3, None]
    unknown = replace(row, forecast=None, reason="no").as_json()
    assert unknown.keys() == row.as_json().keys()
    assert (unknown["verdict"], unknown["forecast_allocated_bytes"], unknown["bytes_by_cause"]) == (
        "cannot_be_forecast",
        None,
        {},
    )


def test_what_does_not_surely_fit_is_never_chosen():
    made = [row_of(LORA, "too_close_to_call"), row_of(QLORA)]
    entries = [entry(QLORA, 1.0), entry(LORA, 0.5)]
    rows = plan_choice.with_choice(made, entries)
    assert [(row.chosen, row.measured_on) for row in rows] == [(False, None), (True, "H200")]
    assert plan_choice.with_choice(made[:1], entries) == made[:1]


@pytest.mark.parametrize("largest", [0, 1, 2, 7, 8, 9, 100, 4097])
@pytest.mark.parametrize("curve", [1.0, 1.2])
def test_the_largest_batch_is_found_in_few_forecasts(largest, curve):
    asked = []

    def fits(batch):
        asked.append(batch)
        need = round(1000 + 10 * batch**curve)
        budget = round((1000 + 10 * (largest + 0.5) ** curve) / (1 - MARGIN))
        return SimpleNamespace(
            verdict="fits" if need <= budget * (1 - MARGIN) else "does_not_fit",
            allocated_bytes=need,
            budget_bytes=budget,
        )

    assert plan_search.largest_batch(fits, 8) == largest
    assert len(asked) == len(set(asked)) <= 20


@pytest.mark.parametrize("needed", [1, 2, 7, 19, 28])
def test_the_fewest_layers_are_found_in_few_forecasts(needed):
    asked = []

    def fits(layers):
        asked.append(layers)
        need = 5000 - 100 * layers - (200 if layers == 28 else 0)
        verdict = "fits" if layers >= needed else "does_not_fit"
        room = 5000 - 100 * (needed - 0.5)
        return SimpleNamespace(verdict=verdict, allocated_bytes=need, budget_bytes=round(room / (1 - MARGIN)))

    assert plan_search.fewest_layers(fits, 28) == needed
    assert len(set(asked)) <= 8
    assert needed == 1 or plan_search.fewest_layers(fits, needed - 1) is None


def test_rows_of_the_longest_length_fit_and_longer_ones_do_not(capsys, tmp_path):
    shape = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "vocab_size": 384, "max_position_embeddings": 16384}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    found = {}
    for method in ("lora", "lora-captured"):
        arguments = [str(tmp_path), "--method", method, "--target", "1GiB"]
        _, (row,) = rows(capsys, *arguments, "--max-length-that-fits")
        found[method] = length = row["longest_row"]
        assert length % plan.ROW_STEP == 0
        verdicts = []
        for tokens in (length, length + plan.ROW_STEP):
            if tokens <= 16384:
                _, (at,) = rows(capsys, *arguments, "--max-length", str(tokens))
                verdicts.append(at["verdict"] == "fits")
        assert verdicts in ([True, False], [True])
    assert 256 < found["lora"] < found["lora-captured"]


def test_max_batch_fits_and_one_more_does_not(capsys, small):
    arguments = [small, "--method", "baseline", "--target", "1GiB"]
    _, (row,) = rows(capsys, *arguments, "--max-batch")
    batch = row["max_batch"]
    assert batch > 8
    _, (at,) = rows(capsys, *arguments, "--batch-size", str(batch))
    _, (above,) = rows(capsys, *arguments, "--batch-size", str(batch + 1))
    assert at["verdict"] == "fits"
    assert above["verdict"] != "fits"


@pytest.mark.parametrize("fewest", [1, 2, 3, 7, 8, None])
def test_the_fewest_gpus_are_found_in_few_forecasts(fewest):
    asked = []

    def fits(count):
        asked.append(count)
        return SimpleNamespace(verdict="fits" if fewest is not None and count >= fewest else "too_close_to_call")

    assert plan_search.fewest_gpus(fits, 8) == fewest
    assert len(asked) <= 4


def test_more_gpus_hold_less_each_and_the_fewest_that_suffice_are_told(capsys):
    arguments = ["opt-tiny", "--method", "baseline", "--target", "0.513GiB", "--batch-size", "4"]
    status, (one,) = rows(capsys, *arguments)
    assert (status, one["gpus"], one["batch_size"], one["verdict"]) == (1, 1, 4, "does_not_fit")
    assert "fewest_gpus" not in one
    status, (two,) = rows(capsys, *arguments, "--gpus", "2")
    assert (status, two["gpus"], two["batch_size"], two["verdict"]) == (0, 2, 2, "fits")
    assert two["fewest_gpus"] == 2
    assert two["forecast_allocated_bytes"] < one["forecast_allocated_bytes"]
    assert one["bytes_by_cause"]["gathered"] == 0 < two["bytes_by_cause"]["gathered"]


def test_the_table_says_what_one_of_several_gpus_holds(capsys):
    assert main(["plan", "opt-tiny", "--method", "lora", "--target", "t4", "--gpus", "2", "--max-length", "32"]) == 0
    printed = capsys.readouterr().out
    for words in ("at the peak on each of 2 GPUs", "gathered", "fewest GPUs", "NCCL"):
        assert words in printed
    (chosen,) = [line for line in printed.splitlines() if "take this" in line]
    assert chosen.split()[2:5] == ["1", "x", "4"], "one pass of 4 sequences, of 8"
    assert chosen.split()[-1] == "1", "one would do"


def test_expected_cost_orders_methods_as_they_were_measured():
    no_checkpointing = replace(QLORA, training_arguments={"fp16": True})
    halves = replace(BASELINE, weights_dtype="bfloat16")
    ordered = [LORA_CAPTURED, LORA, halves, BASELINE_CAPTURED, BASELINE, QLORA_CAPTURED, no_checkpointing, QLORA]
    assert all(a.expected_cost < b.expected_cost for a, b in pairwise(ordered))


def test_a_corpus_is_a_job_that_limits_hold_for(capsys):
    corpus_file = str(Path(__file__).parents[2] / "corpus.json")
    asked = ["plan", "llama-tiny", "--target", "t4", "--method", "lora-captured", "--corpus", corpus_file]
    main([*asked, "--epochs", "2", "--max-hours", "0.00001"])
    assert "more than 1e-05 h" in capsys.readouterr().out


def test_the_docs_show_what_the_command_prints(capsys, monkeypatch):
    """Where the cards' kernels are alike, once for all of them: this model's own attention is matrix products. With
    other releases a step has other operators, for each of which Python is waited for."""
    constraints = (Path(__file__).parents[2] / "constraints.txt").read_text("utf-8")
    for package in ("bitsandbytes", "peft", "torch", "transformers"):
        (shown_with,) = re.findall(rf"^{package}==(\S+)", constraints, re.MULTILINE)
        if Version(version(package)).public != shown_with:
            pytest.skip(f"shown with {package} {shown_with}, not {version(package)}")
    traces: dict[Any, Any] = {}
    trace = tracer.trace

    def traced_once(trial, capability, rows=None):
        if trial.method.captured_step is None:
            capability = targets.named("t4").capability
        key = trial.name, trial.method.passes_per_step, capability
        return traces.get(key) or traces.setdefault(key, trace(trial, capability))

    monkeypatch.setattr(tracer, "trace", traced_once)
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text("utf-8")
    command, shown = page.split("    lightweight plan gpt-neo-1.3b", 1)[1].split("```", 2)[:2]
    assert main(["plan", "gpt-neo-1.3b", *command.split()]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.rstrip() for line in printed] == [line.rstrip() for line in shown.strip().splitlines()]
