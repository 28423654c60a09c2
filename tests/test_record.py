import copy
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import samples
import torch
from transformers import SchedulerType

from lightweight import record, targets
from lightweight.methods import LORA, QLORA, QLORA_CAPTURED, CapturedStep
from lightweight.models.model import DRAWN
from lightweight.preload import peft
from lightweight.record import SAME_BASELINE, SAME_BUT_RANKS, SAME_CELL, SAME_METHOD, SAME_TRIAL, RecordError, codec
from lightweight.targets import Device
from lightweight.trial import Completed, Crashed, Diverged, Measurements, Outcome, OutOfMemory, TimedOut, Trial
from lightweight.verdict import noninferiority

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


OUTCOMES: list[Outcome] = [
    Completed(measured=MEASURED),
    OutOfMemory(phase="backward", requested_bytes=64, budget_bytes=100, reason="r", measured=MEASURED),
    Diverged(step=2, reason="training loss is nan at step 2", measured=MEASURED),
    Crashed(phase="build", reason="killed by SIGKILL", details="last words", measured=Measurements()),
    TimedOut(phase="train", silent_seconds=5.0, reason="reported nothing", details="", measured=MEASURED),
]


@pytest.mark.parametrize("outcome", OUTCOMES, ids=lambda outcome: outcome.kind)
def test_every_outcome_is_one_entry_with_every_key_as_plain_json(trial, outcome):
    entry = record.as_json(record.entry(trial, outcome, H200, None))
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
    assert (entry.emulated, entry.precision, entry.budget_bytes) == (True, "fp16", targets.T4.budget_bytes)
    assert not record.entry(trial, OUTCOMES[0], replace(H200, name="Tesla T4"), None).emulated
    on_cpu = record.entry(
        replace(trial, target=targets.CPU, device_index=None), OUTCOMES[0], Device(name="a CPU"), None
    )
    assert (on_cpu.emulated, on_cpu.precision, on_cpu.budget_bytes) == (False, "fp32", None)


def test_what_json_has_no_word_for_is_written_as_none(trial):
    measured = Measurements(train_loss=(3.0, math.nan, math.inf), heldout_loss_before=math.nan)
    entry = record.entry(
        trial, Diverged(step=2, reason="training loss is nan at step 2", measured=measured), H200, None
    )
    assert entry.train_loss == (3.0, None, None)
    assert entry.heldout_loss_before is None
    assert record.entry_of(json.loads(json.dumps(record.as_json(entry), allow_nan=False))) == entry


def test_a_method_may_say_things_in_objects(trial):
    arguments = {"lr_scheduler_type": SchedulerType.COSINE, "label_names": ("labels",)}
    entry = record.entry(replace(trial, method=replace(LORA, training_arguments=arguments)), OUTCOMES[0], H200, None)
    assert entry.training_arguments is not None
    assert type(entry.training_arguments["lr_scheduler_type"]) is str  # SchedulerType only behaves like one
    assert entry.training_arguments == {
        "lr_scheduler_type": "cosine",
        "label_names": ["labels"],
    }


def test_a_set_in_a_peft_config_is_written_in_order(trial):
    assert isinstance(LORA.adapter, peft.LoraConfig)
    adapter = replace(LORA.adapter, target_modules=["v_proj", "q_proj"])
    assert isinstance(adapter.target_modules, set)  # peft makes one of a list
    method = replace(LORA, adapter=adapter)
    entry = record.entry(replace(trial, method=method), OUTCOMES[0], H200, None)
    assert entry.adapter is not None and entry.adapter["target_modules"] == ["q_proj", "v_proj"]


def test_the_steady_step_is_the_median_after_the_first_epoch():
    assert record.steady_step_seconds((9.0, 9.0, 1.0, 2.0, 3.0), steps_per_epoch=2) == 2.0
    assert record.steady_step_seconds((9.0, 8.0, 7.0), steps_per_epoch=3) == 8.0
    assert record.steady_step_seconds((), steps_per_epoch=3) is None


def test_a_tokens_seconds_are_those_of_whole_epochs_after_the_first():
    """Two epochs of three steps after one to warm up: however they were dealt, 30 tokens each."""
    seconds = (9.0, 9.0, 9.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 7.0)
    tokens = (12, 12, 6, 10, 14, 6, 12, 12, 6, 12)
    assert record.steady_seconds_per_token(seconds, tokens, 3) == pytest.approx(3.5 / 30)
    assert record.steady_seconds_per_token(seconds[:5], tokens[:5], 3) == pytest.approx(2 / 24)  # no whole epoch
    assert record.steady_seconds_per_token(seconds[:3], tokens[:3], 3) == pytest.approx(18 / 18)  # the first step warms
    assert record.steady_seconds_per_token((2.0,), (8,), 1) == 0.25
    assert record.steady_seconds_per_token((), (), 1) is None
    assert record.steady_seconds_per_token((1.0, 1.0), (0, 5), 1) is None  # of a checkpoint that counted none
    assert record.steady_seconds_per_token((1.0, 1.0), (), 1) is None


@pytest.mark.parametrize(("pairs", "size"), [(7, 64), (100, 128), (20, 20)])
def test_a_batch_larger_than_the_corpus_is_no_faster_for_it(trial, pairs, size):
    """A row takes 1 ms and has 10 tokens, 256 with padding."""

    def of(batch):
        method = replace(LORA, training_arguments={"per_device_train_batch_size": batch})
        corpus = replace(trial.corpus, train=(trial.corpus.train * 5)[:pairs])
        job = replace(trial, method=method, corpus=corpus, epochs=3)
        rows = [min(batch, pairs - start) for start in range(0, pairs, batch)] * 3
        measured = Measurements(
            train_loss=(1.0,) * len(rows),
            step_seconds=tuple(count / 1000 for count in rows),
            step_tokens=tuple(10 * count for count in rows),
            step_padded_tokens=tuple(256 * count for count in rows),
        )
        return record.entry(job, Completed(measured=measured), H200, None)

    small, large = of(8), of(size)
    assert small.tokens_per_second == pytest.approx(10_000)
    assert small.padded_tokens_per_second == pytest.approx(256_000)
    assert large.times_as_fast(small) == pytest.approx(1.0)


def test_records_that_counted_padding_compare_by_it(trial):
    new = record.entry(trial, Completed(measured=replace(MEASURED, step_tokens=(10, 10))), H200, None)
    old = replace(new, step_tokens=None, steady_step_seconds=0.3)
    by_tokens = record.seconds_per_token(new)[0]
    assert by_tokens == pytest.approx(0.1 / 10)
    assert record.seconds_per_token(old)[0] == pytest.approx(0.3 / trial.tokens_per_step)
    assert new.steady_step_seconds is not None
    assert new.times_as_fast(old) == pytest.approx(0.3 / new.steady_step_seconds)
    nothing = record.entry(trial, OUTCOMES[3], H200, None)
    assert record.seconds_per_token(new, nothing) == (by_tokens, None)
    assert nothing.times_as_fast(new) is None


def test_training_loss_is_the_mean_over_first_and_last_epoch_or_tenth():
    """A single batch of few pairs says little: 2.3 -> 3.3 while the whole fell."""
    losses = (4.0, 2.0, 3.0, 3.0, 1.0, 2.9)
    assert record.training_loss(losses, 2) == (3.0, pytest.approx(1.95))
    assert record.training_loss(tuple(map(float, range(40))), 30) == (1.5, 37.5)
    assert record.training_loss((3.0, 2.0), 30) == (3.0, 2.0)
    assert record.training_loss((3.0, None), 1) is None
    assert record.training_loss((3.0, math.inf), 1) is None
    assert record.training_loss((), 1) is None


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
    entry = record.as_json(record.entry(trial, OUTCOMES[0], H200, None))
    path.write_text(json.dumps({"outcomes": [entry | {key: value}]}))
    with pytest.raises(RecordError, match=f"outcome 0 has .* as {key!r}, where .* belongs: store the run again"):
        record.load(path)


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
        record.load(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


IN_ANOTHER_PROCESS = """
from dataclasses import replace
from pathlib import Path
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
        with_adapter(base_model_name_or_path="facebook/opt-350m"),
    ],
)
def test_a_name_and_a_version_are_no_settings(same):
    assert record.method_digest(same) == record.method_digest(LORA)
    assert record.method_digest(replace(same, step="captured")) == record.method_digest(
        replace(LORA, step=CapturedStep())
    )


def test_the_order_of_a_set_is_no_setting():
    names = [f"layer_{number}" for number in range(50)]
    one, other = (with_adapter(target_modules=set(order)) for order in (names, names[::-1]))
    assert record.method_digest(one) == record.method_digest(other)


def test_the_digest_is_that_of_the_method_not_of_what_a_device_makes_of_it(trial):
    on_cpu = replace(trial, target=targets.CPU, device_index=None)
    assert record.settings(trial)["method_digest"] == record.settings(on_cpu)["method_digest"]
    assert record.settings(trial)["precision"] != record.settings(on_cpu)["precision"]


def test_what_says_when_entries_are_alike_is_one_list(trial):
    known = set(record.settings(trial)) | {"device"}
    baseline, method, cell, same, job = (
        set(like.keys) for like in (SAME_BASELINE, SAME_METHOD, SAME_CELL, SAME_TRIAL, noninferiority.SAME_JOB)
    )
    assert baseline < method < cell < same <= known
    assert same - set(SAME_BUT_RANKS.keys) == {"world_size", "placement"}
    assert job - same == {"elsewhere_digest"}


def test_what_differs_is_named_and_a_digest_that_nobody_knows_is_nothing():
    one, other = samples.entry(method_digest="a"), samples.entry(method_digest=None, precision="bf16")
    assert SAME_CELL.differing(one, other) == ["precision"]
    assert not SAME_CELL.holds(one, other) and SAME_METHOD.holds(one, other)
    assert SAME_CELL.groups([one, other, one]) == [[one, one], [other]]


def test_namesakes_of_a_record_from_before_digests_are_told_apart(trial, tmp_path):
    path = tmp_path / "run.json"
    methods = LORA, with_adapter(r=64)
    two = [record.as_json(record.entry(replace(trial, method=m), OUTCOMES[0], H200, None)) for m in methods]
    for entry in two:
        del entry["method_digest"]
    path.write_text(json.dumps({"outcomes": two}))
    first, second = record.load(path).entries
    assert first.method_digest != second.method_digest
    assert not SAME_TRIAL.holds(first, second)
    path.write_text(json.dumps({"outcomes": [two[0], two[0] | {"seed": 1}]}))
    assert {entry.method_digest for entry in record.load(path).entries} == {None}


def test_a_record_says_cuda_triton_the_weights_commit_and_whether_the_code_was_clean(trial, tmp_path):
    commit = "0123456789abcdef" * 2 + "01234567"
    location = f"/cache/models--facebook--opt-350m/snapshots/{commit}"
    entry = record.entry(
        replace(trial, model=replace(trial.model, weights="pretrained", location=location)), OUTCOMES[0], H200, None
    )
    assert entry.weights_revision == commit
    assert record.settings(replace(trial, model=replace(trial.model, weights="random")))["weights_revision"] == DRAWN
    assert record.settings(replace(trial, model=replace(trial.model, weights="pretrained")))["weights_revision"] is None
    assert entry.versions is not None
    assert {"cuda", "triton"} <= set(entry.versions) and entry.versions["cuda"] == torch.version.cuda
    path = tmp_path / "run.json"
    for commit_info, expected in (
        ({"id": commit, "dirty": True}, (commit, True)),
        ({"id": "unknown", "dirty": False}, (None, False)),
        (None, (None, None)),
        ({"id": 3, "dirty": "perhaps"}, (None, None)),
    ):
        path.write_text(json.dumps(record.document([entry]) | {"commit_info": commit_info}))
        assert (record.load(path).commit, record.load(path).is_dirty) == expected


@pytest.mark.parametrize(("weights", "revision"), [("random", "drawn 1"), ("pretrained", None)])
def test_random_weights_of_a_record_that_does_not_say_were_drawn_as_they_were_then(trial, tmp_path, weights, revision):
    path = tmp_path / "run.json"
    entry = record.as_json(record.entry(trial, OUTCOMES[0], H200, None)) | {"weights": weights}
    path.write_text(json.dumps({"schema": 1, "outcomes": [entry | {"weights_revision": None}]}))
    assert record.load(path).entries[0].weights_revision == revision


def test_tables_of_their_own_are_said_by_the_record_and_in_old_ones_by_the_test(trial, tmp_path):
    path = tmp_path / "run.json"
    entry = record.as_json(record.entry(trial, OUTCOMES[0], H200, None))
    said = [
        entry | {"test": "t.py::test_a_rung_from_here[x]"},
        entry | {"test": "t.py::test_a_peer_trains[x]"},
        entry | {"test": "t.py::test_else", "shown_as": "ladder"},
        entry | {"test": "t.py::test_a_rung_from_here[x]", "shown_as": None},
    ]
    path.write_text(json.dumps({"outcomes": said}))
    assert [of.shown_as for of in record.load(path).entries] == ["ladder", "peers", "ladder", None]


RECORDS = sorted((Path(__file__).parents[1] / "experiments" / "records").glob("*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_what_is_written_again_is_read_as_the_same(tmp_path, path):
    """Every committed record, of whatever age: nothing of its trials and forecasts is lost on the way."""
    stored = record.load(path)
    again = tmp_path / path.name
    again.write_text(
        json.dumps(record.document(stored.entries, stored.forecasts) | {"datetime": stored.ended}), "utf-8"
    )
    assert record.load(again).entries == stored.entries
    assert record.load(again).forecasts == stored.forecasts
    for entry in stored.entries:
        written = record.as_json(entry)
        assert entry.stored is not None
        said = {key: value for key, value in entry.stored.items() if value is not None and key != "run"}
        if "speedup" in said:
            said["speedup"] = written["speedup"] | said["speedup"]  # an older one says less
        assert said == {key: written[key] for key in said}


def test_keys_that_only_some_runs_have_are_left_out_of_the_others():
    only = {"speedup", "test", "shown_as", "worker", "visible_gpu"}
    assert not only & set(record.as_json(samples.entry()))
    ran = samples.entry(test="t.py::t", worker="gw0", speedup=samples.paired(1.5, 1.4, 1.6))
    assert only <= set(record.as_json(ran))
    assert (record.as_json(ran)["shown_as"], record.as_json(ran)["visible_gpu"]) == (None, None)


def test_a_document_says_its_schema_and_one_of_tomorrow_is_refused_in_a_line(tmp_path):
    path = tmp_path / "run.json"
    document = record.document([samples.entry()])
    assert document["schema"] == record.SCHEMA and "forecasts" not in document
    for number, said in (
        (record.SCHEMA + 1, "has schema 2, and this version of lightweight reads up to 1: update it"),
        ("one", "has 'one' as 'schema', where a whole number belongs: store the run again"),
    ):
        path.write_text(json.dumps(document | {"schema": number}), "utf-8")
        with pytest.raises(RecordError, match=re.escape(said)):
            record.load(path)


def test_old_shapes_are_completed_only_where_no_schema_is_said(tmp_path):
    path = tmp_path / "run.json"
    new = record.as_json(samples.entry(test="t.py::test_a_rung_from_here[x]"))
    old = {key: value for key, value in new.items() if key not in ("world_size", "shown_as", "method_digest")}
    path.write_text(json.dumps({"outcomes": [old]}), "utf-8")
    (entry,) = record.load(path).entries
    assert (entry.world_size, entry.shown_as, entry.method_digest) == (1, "ladder", None)
    path.write_text(json.dumps({"schema": 1, "outcomes": [new]}), "utf-8")
    assert record.load(path).entries[0].shown_as is None
    path.write_text(json.dumps({"schema": 1, "outcomes": [old]}), "utf-8")
    with pytest.raises(RecordError, match="outcome 0 has no 'world_size'"):
        record.load(path)


def test_a_key_of_tomorrow_is_kept_as_it_was_stored(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"outcomes": [record.as_json(samples.entry()) | {"watts": 350}]}), "utf-8")
    (entry,) = record.load(str(path)).entries
    assert entry.stored is not None and entry.stored["watts"] == 350


def test_the_gpus_peak_is_that_of_the_fullest_rank_and_else_the_hosts():
    assert samples.entry(rank_peak_allocated_bytes=(None, 5 * 2**30)).peak_bytes == 5 * 2**30
    alone = samples.entry(peak_allocated_bytes=None)
    assert (alone.gpu_peak_bytes, alone.peak_bytes) == (None, 2**30)
    on_a_gpu = replace(alone, device_bytes=80 * 2**30)  # which ended before it had allocated anything there
    assert on_a_gpu.peak_bytes is None
    assert samples.entry().memory_share(samples.stopped()) is None
    assert samples.entry(peak_allocated_bytes=2**30).memory_share(samples.entry()) == 0.25


def test_a_record_from_before_conversations_is_of_pairs_padded_to_their_length():
    """As every corpus was then: it compares with what is written now."""
    now = record.as_json(samples.entry())
    before = {key: now[key] for key in now if key not in ("trained_on", "loss_on", "long", "padding", "training_rows")}
    old, new = codec.entry_of(before), codec.entry_of(now)
    assert (old.trained_on, old.loss_on, old.long, old.padding) == ("pairs", "all", "cut", "max")
    assert SAME_CELL.holds(old, new)
    for change in ({"padding": "longest"}, {"loss_on": "last"}, {"long": "split"}):
        assert SAME_CELL.differing(samples.entry(**change), new) == list(change)
