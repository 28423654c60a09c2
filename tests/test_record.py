import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import SchedulerType

from lightweight import no_worse, record, targets
from lightweight.methods import LORA, QLORA, QLORA_CAPTURED, CapturedStep
from lightweight.record import RecordError
from lightweight.targets import Device
from lightweight.trial import Completed, Crashed, Diverged, Measurements, OutOfMemory, TimedOut, Trial

H200 = Device(name="NVIDIA H200", total_bytes=150_109_880_320, capability=(9, 0), driver="580")
MEASURED = Measurements(train_loss=(3.0, 2.0), step_seconds=(0.2, 0.1), phase_seconds={"train": 0.3, "evaluate": 9.0})

REQUIRED = {
    *("model", "method", "target", "emulated", "weights", "corpus_digest", "seed", "outcome", "phase", "steps"),
    *("tokens_per_step", "train_loss", "heldout_loss_before", "heldout_loss_after", "step_seconds", "cold_seconds"),
    *("peak_allocated_bytes", "peak_reserved_bytes", "average_allocated_bytes", "host_peak_bytes"),
}


@pytest.fixture
def trial(micro, small_corpus):
    return Trial(model=micro, method=QLORA, target=targets.T4, corpus=small_corpus, device_index=0)


OUTCOMES = [
    Completed(measured=MEASURED),
    OutOfMemory(phase="backward", requested_bytes=64, budget_bytes=100, reason="r", measured=MEASURED),
    Diverged(step=2, reason="training loss is nan at step 2", measured=MEASURED),
    Crashed(phase="build", reason="killed by SIGKILL", details="last words", measured=Measurements()),
    TimedOut(phase="train", silent_seconds=5.0, reason="reported nothing", details="", measured=MEASURED),
]


@pytest.mark.parametrize("outcome", OUTCOMES, ids=lambda outcome: outcome.kind)
def test_every_outcome_is_one_entry_with_every_key_as_plain_json(trial, outcome):
    entry = record.entry(trial, outcome, H200, None)
    assert set(entry) >= REQUIRED
    assert set(record.KEYS) <= set(entry)
    restored = json.loads(json.dumps(entry, allow_nan=False))
    assert restored["outcome"] == outcome.kind
    assert restored["reason"] == getattr(outcome, "reason", None)
    assert restored["phase"] == getattr(outcome, "phase", None)
    assert restored["steps"] == len(outcome.measured.step_seconds)
    assert restored["device"] == "NVIDIA H200"
    assert restored["versions"]["torch"].startswith("2.")
    assert set(restored["versions"]) >= {"torch", "transformers", "peft", "bitsandbytes"}
    assert restored["adapter"]["target_modules"] == "all-linear"
    assert restored["quantization"]["bnb_4bit_quant_type"] == "nf4"


def test_entries_say_what_was_emulated_and_in_which_precision(trial):
    entry = record.entry(trial, OUTCOMES[0], H200, None)
    assert (entry["emulated"], entry["precision"], entry["budget_bytes"]) == (True, "fp16", targets.T4.budget_bytes)
    assert not record.entry(trial, OUTCOMES[0], replace(H200, name="Tesla T4"), None)["emulated"]
    on_cpu = record.entry(
        replace(trial, target=targets.CPU, device_index=None), OUTCOMES[0], Device(name="a CPU"), None
    )
    assert (on_cpu["emulated"], on_cpu["precision"], on_cpu["budget_bytes"]) == (False, "fp32", None)


def test_what_json_has_no_word_for_is_written_as_none(trial):
    measured = Measurements(train_loss=(3.0, math.nan, math.inf), heldout_loss_before=math.nan)
    entry = record.entry(
        trial, Diverged(step=2, reason="training loss is nan at step 2", measured=measured), H200, None
    )
    assert entry["train_loss"] == [3.0, None, None]
    assert entry["heldout_loss_before"] is None
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry


def test_a_method_may_say_things_in_objects(trial):
    arguments = {"lr_scheduler_type": SchedulerType.COSINE, "label_names": ("labels",), "output_dir": Path("here")}
    entry = record.entry(replace(trial, method=replace(LORA, training_arguments=arguments)), OUTCOMES[0], H200, None)
    assert type(entry["training_arguments"]["lr_scheduler_type"]) is str  # SchedulerType only behaves like one
    assert entry["training_arguments"] == {
        "lr_scheduler_type": "cosine",
        "label_names": ["labels"],
        "output_dir": "here",
    }


def test_a_set_in_a_peft_config_is_written_in_order(trial):
    entry = record.entry(replace(trial, method=LORA), OUTCOMES[0], H200, None)
    assert entry["adapter"]["target_modules"] == ["q_proj", "v_proj"]


def test_the_steady_step_is_the_median_after_the_first_epoch():
    assert record.steady_step_seconds((9.0, 9.0, 1.0, 2.0, 3.0), steps_per_epoch=2) == 2.0
    assert record.steady_step_seconds((9.0, 8.0, 7.0), steps_per_epoch=3) == 8.0
    assert record.steady_step_seconds((), steps_per_epoch=3) is None


def test_records_are_read_in_order(trial, tmp_path):
    for name, seeds in (("a", [1, 2]), ("b", [3])):
        entries = [record.entry(replace(trial, seed=seed), OUTCOMES[0], H200, None) for seed in seeds]
        (tmp_path / name).write_text(json.dumps({"outcomes": entries}))
    assert [entry["seed"] for entry in record.load([tmp_path / "b", tmp_path / "a"])] == [3, 1, 2]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train_loss", 5),
        ("rank_peak_allocated_bytes", 5),
        ("rank_peak_allocated_bytes", ["x", 3]),
        ("forecast_bytes_by_cause", [3]),
        ("forecast_bytes_by_cause", {"weights": "x"}),
    ],
)
def test_a_value_that_nothing_can_be_computed_with_is_one_line(trial, tmp_path, key, value):
    path = tmp_path / "run.json"
    entry = record.entry(trial, OUTCOMES[0], H200, None)
    path.write_text(json.dumps({"outcomes": [entry | {key: value}]}))
    with pytest.raises(RecordError, match=f"outcome 0 has .* as {key!r}, where .* belongs: store the run again"):
        record.load([path])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "has no 'outcomes'"),
        (b'{"benchmarks": []}', "give a file that `pytest experiments --benchmark-json` wrote"),
        (b'{"outcomes": 3}', "has no 'outcomes'"),
        (b'{"outcomes": [{"model": "m"}]}', "outcome 0 has no 'method': store the run again"),
        (b'{"outcomes": ["m"]}', "outcome 0 is no object"),
    ],
)
def test_a_record_that_cannot_be_read_is_one_line(tmp_path, content, expected):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecordError, match=expected) as raised:
        record.load([path])
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


IN_ANOTHER_PROCESS = """
from dataclasses import replace
from lightweight import record
from lightweight.methods import LORA, QLORA_CAPTURED
print(record.method_digest(LORA), record.method_digest(QLORA_CAPTURED))
"""


def test_the_digest_of_a_method_is_the_same_in_every_process():
    expected = f"{record.method_digest(LORA)} {record.method_digest(QLORA_CAPTURED)}\n"
    for seed in ("1", "2"):  # the order of a set of strings is the hash's
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", IN_ANOTHER_PROCESS]
        assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == expected


def with_adapter(**changes):
    adapter = copy.deepcopy(LORA.adapter)
    for name, value in changes.items():
        setattr(adapter, name, value)
    return replace(LORA, adapter=adapter)


@pytest.mark.parametrize(
    "other",
    [
        with_adapter(r=64),
        with_adapter(target_modules={"q_proj"}),
        replace(LORA, weights_dtype="float16"),
        replace(LORA, training_arguments={"learning_rate": 1e-3}),
        replace(LORA, step="captured"),
        replace(LORA, step=CapturedStep(packing=False)),
        replace(LORA, quantization=QLORA.quantization),
        replace(LORA, adapter=None),
    ],
)
def test_another_setting_is_another_digest(other):
    assert record.method_digest(other) != record.method_digest(LORA)


@pytest.mark.parametrize(
    "same",
    [
        replace(LORA, name="another"),
        with_adapter(peft_version="99.0"),
        with_adapter(target_modules=["v_proj", "q_proj"]),
        with_adapter(base_model_name_or_path="facebook/opt-350m"),
    ],
)
def test_a_name_a_version_and_the_order_of_a_set_are_no_settings(same):
    if isinstance(same.adapter.target_modules, list):
        same.adapter.target_modules = set(same.adapter.target_modules)
    assert record.method_digest(same) == record.method_digest(LORA)
    assert record.method_digest(replace(same, step="captured")) == record.method_digest(
        replace(LORA, step=CapturedStep())
    )


def test_the_digest_is_that_of_the_method_not_of_what_a_device_makes_of_it(trial):
    on_cpu = replace(trial, target=targets.CPU, device_index=None)
    assert record.settings(trial)["method_digest"] == record.settings(on_cpu)["method_digest"]
    assert record.settings(trial)["precision"] != record.settings(on_cpu)["precision"]


def test_what_says_when_entries_are_alike_is_one_list(trial):
    known = set(record.settings(trial)) | {"device"}
    assert set(record.BASELINE_SHARES) < set(record.SAME_CELL) < set(record.SAME_TRIAL) <= known
    assert set(record.SAME_TRIAL) - set(record.SAME_BUT_RANKS) == {"world_size"}
    assert set(no_worse.SAME_JOB) - set(record.SAME_TRIAL) == {"elsewhere_digest"}


def test_a_speedup_is_put_into_the_trial_it_is_of_among_namesakes(trial):
    entries = [
        record.entry(replace(trial, method=replace(method, name="lora")), OUTCOMES[0], H200, None)
        for method in (LORA, with_adapter(r=64))
    ]
    record.add_speedup(entries, entries[1], record.Speedup(baseline="baseline", cap=8, steps_per_round=1))
    assert "speedup" not in entries[0] and entries[1]["speedup"]["cap"] == 8


def test_namesakes_of_a_record_from_before_digests_are_told_apart(trial, tmp_path):
    path = tmp_path / "run.json"
    two = [record.entry(replace(trial, method=m), OUTCOMES[0], H200, None) for m in (LORA, with_adapter(r=64))]
    for entry in two:
        del entry["method_digest"]
    path.write_text(json.dumps({"outcomes": two}))
    first, second = record.run(path).entries
    assert first["method_digest"] != second["method_digest"]
    assert not record.are_alike(first, second, record.SAME_TRIAL)
    path.write_text(json.dumps({"outcomes": [two[0], two[0] | {"seed": 1}]}))
    assert {entry["method_digest"] for entry in record.run(path).entries} == {None}


def test_a_record_says_cuda_triton_the_weights_commit_and_whether_the_code_was_clean(trial, tmp_path):
    commit = "0123456789abcdef" * 2 + "01234567"
    location = f"/cache/models--facebook--opt-350m/snapshots/{commit}"
    entry = record.entry(replace(trial, model=replace(trial.model, location=location)), OUTCOMES[0], H200, None)
    assert entry["weights_revision"] == commit
    assert record.settings(trial)["weights_revision"] is None
    assert {"cuda", "triton"} <= set(entry["versions"]) and entry["versions"]["cuda"] == torch.version.cuda
    path = tmp_path / "run.json"
    for commit_info, expected in (
        ({"id": commit, "dirty": True}, (commit, True)),
        ({"id": "unknown", "dirty": False}, (None, False)),
        (None, (None, None)),
        ({"id": 3, "dirty": "perhaps"}, (None, None)),
    ):
        path.write_text(json.dumps({"outcomes": [entry], "commit_info": commit_info}))
        assert (record.run(path).commit, record.run(path).is_dirty) == expected


def test_tables_of_their_own_are_said_by_the_record_and_in_old_ones_by_the_test(trial, tmp_path):
    path = tmp_path / "run.json"
    entry = record.entry(trial, OUTCOMES[0], H200, None)
    said = [
        entry | {"test": "t.py::test_a_rung_from_here[x]"},
        entry | {"test": "t.py::test_a_peer_trains[x]"},
        entry | {"test": "t.py::test_else", "shown_as": "ladder"},
        entry | {"test": "t.py::test_a_rung_from_here[x]", "shown_as": None},
    ]
    path.write_text(json.dumps({"outcomes": said}))
    assert [of["shown_as"] for of in record.run(path).entries] == ["ladder", "peers", "ladder", None]
