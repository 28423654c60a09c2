"""`lightweight plan`: which method fits which card, and how large a batch."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import MICRO
from lightweight import forecast, plan, targets
from lightweight.__main__ import main
from lightweight.forecast import MARGIN
from lightweight.methods import BASELINE, LORA, QLORA
from lightweight.models import OPT_TINY

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
        (method, target) for target in ("t4", "2GiB") for method in ("baseline", "lora", "qlora")
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
    assert "lora" in chosen.split()


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
        (["opt-tiny", "--max-length", "4096"], "rows of 4096 tokens"),
        (["opt-tiny", "--gpus", "0"], "--gpus 0: give at least 1"),
        (["opt-tiny", "--gpus", "-2"], "--gpus -2: give at least 1"),
        (["opt-tiny", "--gpus", "two"], "--gpus two: give a whole number"),
        (["opt-tiny", "--gpus", "9"], "8 sequences a step, which 9 ranks cannot share"),
        (["opt-tiny", "--gpus", "3", "--batch-size", "2"], "2 sequences a step, which 3 ranks cannot share"),
        (["./nowhere"], "./nowhere"),
        (["{empty}"], "has no config.json"),
        (["{remote}"], "cannot be used"),
        (["{broken}"], "cannot be used"),
        (["opt-tiny", "--record", "nowhere.json"], "nowhere.json"),
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


def entry(method, seconds):
    return {
        "model": "m",
        "method": method,
        "outcome": "completed",
        "steady_step_seconds": seconds,
        "tokens_per_step": 1,
    }


@pytest.mark.parametrize(
    ("measured", "chosen"),
    [
        ([], "lora"),  # expected: half precision and no optimizer state for every parameter
        ([entry("baseline", 1.0), entry("lora", 2.0), entry("qlora", 9.0)], "baseline"),
        ([entry("baseline", 1.0), entry("qlora", 0.5)], "lora"),  # not all were measured
    ],
)
def test_the_fastest_method_that_fits_is_chosen(measured, chosen):
    methods = {method.name: method for method in (QLORA, BASELINE, LORA)}
    made = [{"model": "m", "method": name, "verdict": "fits", "chosen": False} for name in methods]
    plan._choose(made, methods, measured)
    assert [row["method"] for row in made if row["chosen"]] == [chosen]


def test_what_does_not_surely_fit_is_never_chosen():
    made = [
        {"model": "m", "method": "lora", "verdict": "too_close_to_call", "chosen": False},
        {"model": "m", "method": "qlora", "verdict": "fits", "chosen": False},
    ]
    plan._choose(made, {"lora": LORA, "qlora": QLORA}, [])
    assert [row["chosen"] for row in made] == [False, True]


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

    assert plan.largest_batch(fits, 8) == largest
    assert len(asked) == len(set(asked)) <= 20


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

    assert plan.fewest_gpus(fits, 8) == fewest
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
    assert chosen.split()[2] == "4", "sequences a pass, of 8"
    assert chosen.split()[-1] == "1", "one would do"


def test_expected_cost_orders_methods_as_they_were_measured():
    no_checkpointing = replace(QLORA, training_arguments={"fp16": True})
    ordered = [LORA, replace(BASELINE, weights_dtype="bfloat16"), BASELINE, no_checkpointing, QLORA]
    assert all(a.expected_cost < b.expected_cost for a, b in pairwise(ordered))


def test_the_readme_shows_what_the_command_prints(capsys, monkeypatch):
    """Where the cards' kernels are alike: this model's attention is matrix products."""
    traces, trace = {}, forecast.trace

    def traced_once(trial, _):
        return traces.get(trial.name) or traces.setdefault(trial.name, trace(trial, targets.named("t4").capability))

    monkeypatch.setattr(forecast, "trace", traced_once)
    readme = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    command, shown = readme.split("    lightweight plan gpt-neo-1.3b", 1)[1].split("```", 2)[:2]
    assert main(["plan", "gpt-neo-1.3b", *command.split()]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.rstrip() for line in printed] == [line.rstrip() for line in shown.strip().splitlines()]
