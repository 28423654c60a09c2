"""The forecast of captured steps against peaks that were measured on a GPU, and what it is made of."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.test_forecast import ALLOCATED, CAPTURED_CELLS, CAPTURED_MODELS, RESERVED, STEP, STEP_BY_DATA_SHEET
from experiments.test_large import LONG
from lightweight import corpus, models, record
from lightweight.captured import frozen
from lightweight.captured.offload import CHUNK_BYTES
from lightweight.child import helper
from lightweight.corpus import Corpus
from lightweight.forecast import calibration, captured, plan, plan_row, replay, step_time, tracer
from lightweight.forecast.replay import within
from lightweight.forecast.work import COPIES
from lightweight.methods import BASELINE, BASELINE_CAPTURED, LORA, LORA_CAPTURED, QLORA, QLORA_CAPTURED, CapturedStep
from lightweight.models import GPT_NEO_TINY, OPT_TINY, Model
from lightweight.targets import CONTEXT_BYTES, HOPPER, NATIVE, T4, Device, GiB, MiB, Target
from lightweight.trial import Trial

pytestmark = pytest.mark.xdist_group("traces")  # of which one worker makes all

ROOT = Path(__file__).parents[2]


def measured(*runs):
    """What was measured, by the name that experiments/test_forecast.py gives the cell; of several runs, the last."""
    return {
        str(entry.test).partition("[")[2].rstrip("]"): entry
        for name in runs
        for entry in record.load(ROOT / "experiments" / "records" / f"{name}.json").entries
        if entry.outcome == "completed"
    }


CELLS = measured("h100-captured-forecast-rest", "h100-captured-forecast")
"""The second of these runs was cut off by its machine's time, the first has the cells that it lacked."""

ON_AN_H200 = measured("h200-captured-forecast")
"""17 of the 19, after which that machine's time was over."""

OF_ALL_CELLS = pytest.mark.parametrize("cell", CAPTURED_CELLS)

RESERVED_OFF: dict[str, float] = {}
"""Cells whose reserved bytes are forecast further off than they may be, and by how much."""

SIX_LAYERS = Model(
    name="six-layers",
    architecture={
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "vocab_size": 384,
        "max_position_embeddings": 16384,
    },
)


def trial(model, method, **changes):
    return Trial(model=model, method=method, target=NATIVE, corpus=Corpus(train=(), heldout=(), digest=""), **changes)


def trace(model, method, **changes):
    return tracer.trace(trial(model, method, **changes), HOPPER)


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """Every captured cell of the run traced as it was trained, two at a time."""
    folder, read = tmp_path_factory.mktemp("traces"), corpus.load(ROOT / "corpus.json")

    def traced(cell):
        name, method, max_length, target = CAPTURED_CELLS[cell]
        model = CAPTURED_MODELS[name]
        found, _ = models.find(models.named(model) if isinstance(model, str) else model, "random")
        of = Trial(model=found, method=method, target=target, corpus=read, max_steps=13, max_length=max_length)
        device = Device(name=CELLS[cell].device, total_bytes=CELLS[cell].device_bytes, capability=HOPPER)
        return helper.call(tracer.trace_on, folder, of, device)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CELLS, pool.map(traced, CELLS), strict=True))


@OF_ALL_CELLS
def test_step_times_agree_with_the_committed_measurements(traces, cell):
    """The card was calibrated two minutes after it was measured."""
    entry = CELLS[cell]
    model, method, max_length, _ = CAPTURED_CELLS[cell]
    of = trial(CAPTURED_MODELS[model], method, max_length=max_length)
    step = step_time.forecast(traces[cell], of, entry.device, calibration.stored())
    assert step is not None and step.is_calibrated
    assert step.seconds == pytest.approx(entry.steady_step_seconds, rel=STEP)


@pytest.mark.parametrize("cell", ON_AN_H200)
def test_a_card_that_is_not_calibrated_was_measured_as_its_data_sheet_lets_expect(traces, cell):
    """An H200 has the processors of an H100, and other memory."""
    entry = ON_AN_H200[cell]
    model, method, max_length, _ = CAPTURED_CELLS[cell]
    of = trial(CAPTURED_MODELS[model], method, max_length=max_length)
    step = step_time.forecast(traces[cell], of, entry.device, calibration.stored())
    assert step is not None and not step.is_calibrated
    assert step.seconds == pytest.approx(entry.steady_step_seconds, rel=STEP_BY_DATA_SHEET)
    assert traces[cell].replay().allocated_bytes == pytest.approx(entry.peak_allocated_bytes, rel=ALLOCATED)


@OF_ALL_CELLS
def test_forecasts_agree_with_the_committed_measurements(traces, cell):
    """Measured with torch 2.11 on an H100; traced with what is installed here."""
    entry, peak = CELLS[cell], traces[cell].replay()
    assert peak.allocated_bytes == pytest.approx(entry.peak_allocated_bytes, rel=ALLOCATED)
    assert peak.reserved_bytes == pytest.approx(entry.peak_reserved_bytes, rel=RESERVED_OFF.get(cell, RESERVED))
    assert sum(peak.by_cause.values()) == peak.allocated_bytes
    assert peak.phase == "capture"


@OF_ALL_CELLS
def test_what_was_measured_to_fit_is_not_forecast_not_to(traces, cell):
    assert within(traces[cell], CELLS[cell].budget_bytes).verdict == "fits"


@pytest.mark.parametrize(("method", "widest"), [(BASELINE, 1.6), (LORA, 3.3)], ids=lambda value: str(value))
def test_stock_steps_were_measured_within_their_interval(method, widest):
    """On every machine with such a card that there is a record of: of `lora` one took twice as long as another."""
    entries = [
        entry
        for name in ("h100-t4", "h100-captured", "h100-ladder")
        for entry in record.load(ROOT / "experiments" / "records" / f"{name}.json").entries
        if (entry.model, entry.method, entry.outcome) == ("opt-350m", method.name, "completed")
    ]
    assert len(entries) == 3
    model, _ = models.find(models.named("opt-350m"), "random")
    of = Trial(model=model, method=method, target=T4, corpus=Corpus(train=(), heldout=(), digest=""))
    step = step_time.forecast(tracer.trace(of, HOPPER), of, entries[0].device, calibration.stored())
    assert step is not None and step.high / step.low < widest
    assert all(step.low < (entry.steady_step_seconds or 0) < step.high for entry in entries)


def test_every_cell_was_measured_with_a_captured_step():
    assert CELLS.keys() == CAPTURED_CELLS.keys()
    assert all(entry.captured for entry in CELLS.values())
    assert CELLS.keys() >= RESERVED_OFF.keys()


def test_each_thread_has_a_workspace_in_each_stream_and_only_the_graphs_are_kept():
    traced = trace(OPT_TINY, LORA_CAPTURED)
    released = {name for name, size in traced.events if size == 0}
    large = {name: traced.streams.get(name, 0) for name, size in traced.events if size == 32 * 2**20}
    assert len(large) == 8, "forward and backward: the Trainer's step, the check's, the one that warms up, the graph's"
    assert {stream for name, stream in large.items() if name not in released} == traced.kept
    assert len(large.keys() - released) == 2


def test_masters_moments_and_gradients_of_trained_weights_are_held_in_fp32():
    traced = trace(OPT_TINY, LORA_CAPTURED)
    peak = traced.replay()
    bytes_of_one = 4 * traced.trainable_parameters
    assert peak.by_cause["gradients"] == pytest.approx(bytes_of_one, rel=0.6)
    assert peak.by_cause["optimizer"] >= 3 * bytes_of_one, "a master and two moments of each"


WIDE = replace(
    OPT_TINY,
    architecture={
        **(OPT_TINY.architecture or {}),
        "hidden_size": 1024,
        "ffn_dim": 4096,
        "word_embed_proj_dim": 1024,
        "vocab_size": 50272,
        "max_position_embeddings": 1024,
    },
)


def test_what_a_part_saves_is_forecast():
    def kept(**step):
        causes = trace(WIDE, replace(LORA_CAPTURED, step=CapturedStep(**step))).replay().by_cause
        return causes["activations"] + causes["logits"]

    all_parts = kept()
    assert all_parts < kept(lean=False)
    assert all_parts < kept(loss="model")


def test_rows_that_are_at_hand_are_the_ones_traced():
    """Two and more of these dialogues share a row of 1024 tokens."""
    model, _ = models.find(WIDE, "random")
    read = corpus.load(ROOT / "corpus.json")
    of = Trial(model=model, method=LORA_CAPTURED, target=NATIVE, corpus=read, max_length=1024, max_steps=2)
    unpacked = replace(of, method=replace(LORA_CAPTURED, step=CapturedStep(packing=False)))
    packed, alone = (
        tracer.trace_on(one, Device(name="a card", capability=HOPPER)).replay().by_cause["activations"]
        for one in (of, unpacked)
    )
    assert packed < 0.7 * alone


def test_dialogues_that_need_no_mask_are_traced_one_behind_the_other():
    """And where a card has no flash kernels, in rows that are as wide as the widest, of which some is padding."""
    model, _ = models.find(WIDE, "random")
    read = corpus.load(ROOT / "corpus.json")
    of = Trial(model=model, method=LORA_CAPTURED, target=NATIVE, corpus=read, max_length=1024, max_steps=2)
    joined, in_rows = (
        tracer.trace_on(of, Device(name="a card", capability=capability)) for capability in (HOPPER, (7, 5))
    )
    assert joined.replay().by_cause["activations"] < 0.8 * in_rows.replay().by_cause["activations"]


def test_what_a_layers_weights_leave_where_they_are_joined_the_next_layers_take(monkeypatch):
    """Queries', keys' and values' become one, and the output's, which was loaded between them, goes along."""
    deep = replace(WIDE, architecture={**(WIDE.architecture or {}), "num_hidden_layers": 8})
    moved = trace(deep, LORA_CAPTURED).replay()
    monkeypatch.setattr(frozen, "_between", lambda *_: [])
    left = trace(deep, LORA_CAPTURED).replay()
    holes = 6 * 4 * 1024 * 1024 * 2
    assert left.reserved_bytes - moved.reserved_bytes > holes / 2
    assert left.allocated_bytes == pytest.approx(moved.allocated_bytes, rel=0.01)


def test_every_weight_of_4_bits_is_dequantized_twice_also_where_several_are_made_one():
    """For the products of the forward pass and of the backward one, which those of the first layer's queries, keys and
    values have not: nothing before them is trained. As in a profiled step of thirty such layers, 417."""
    kernels = trace(SIX_LAYERS, QLORA_CAPTURED.with_at_most(1), max_length=64).work.kernels
    found = {kernel.shape: count for kernel, count in kernels.items() if kernel.kind == "dequantization"}
    assert sum(found.values()) == 6 * 7 * 2 - 3


def test_full_training_in_fp32_is_forecast():
    traced = trace(OPT_TINY, BASELINE_CAPTURED)
    assert traced.replay().by_cause["optimizer"] == pytest.approx(8 * traced.trainable_parameters, rel=0.05)


def test_what_a_compiler_makes_of_it_is_not_forecast():
    with pytest.raises(tracer.ForecastError, match="take compile=False"):
        trace(OPT_TINY, replace(LORA_CAPTURED, step=CapturedStep(compile=True)))


def test_a_step_without_a_graph_has_no_pool_of_its_own():
    traced = trace(OPT_TINY, replace(LORA_CAPTURED, step=CapturedStep(graph=False)))
    assert not traced.kept
    assert traced.replay().reserved_bytes < trace(OPT_TINY, LORA_CAPTURED).replay().reserved_bytes


def test_recomputing_keeps_less():
    def captured(name):
        arguments = {key: value for key, value in QLORA.training_arguments.items() if name in key}
        return replace(QLORA_CAPTURED, training_arguments={"per_device_train_batch_size": 8, **arguments})

    kept, recomputed = (
        trace(GPT_NEO_TINY, captured(name)).replay().by_cause["activations"] for name in ("no", "checkpointing")
    )
    assert recomputed < kept


def test_a_step_of_many_passes_is_forecast_from_its_first_two_as_from_all(monkeypatch):
    """Its bytes, and what the device does in it."""
    eight = LORA_CAPTURED.with_passes(8)
    few = trace(OPT_TINY, eight)
    monkeypatch.setattr(captured, "PASSES", 8)
    every = trace(OPT_TINY, eight)
    assert len(few.events) < len(every.events)
    assert few.replay() == every.replay()
    assert few.work == every.work


def test_the_fewest_layers_that_let_a_long_row_fit_are_computed_again():
    long = LORA_CAPTURED.with_at_most(1)
    held = {
        layers: trace(SIX_LAYERS, long.recomputing(layers), max_length=8192).replay().allocated_bytes
        for layers in (0, 3, 6)
    }
    assert held[0] > held[3] > held[6]
    for budget in (1.3 * held[0], held[3]):
        target = Target(name="any", capability=HOPPER, total_bytes=int(budget) + CONTEXT_BYTES)
        (row,) = plan.plan([SIX_LAYERS], [long], [target], plan_row.PlanOptions(max_length=8192))
        assert row.verdict == "fits"
        assert row.as_json()["recomputed_layers"] == row.recomputed_layers
        assert (row.recomputed_layers > 0) == (budget < held[0])
        if row.recomputed_layers:
            fewer = trace(SIX_LAYERS, long.recomputing(row.recomputed_layers - 1), max_length=8192)
            assert within(fewer, target.budget_bytes).verdict != "fits"


MANY_WORDS = replace(SIX_LAYERS, architecture={**(SIX_LAYERS.architecture or {}), "vocab_size": 2**17})


def test_activations_on_the_host_leave_the_card():
    """And so does the embedding, none of which is the head's; the copies are work of the step."""
    one = LORA_CAPTURED.with_at_most(1)
    kept, half, moved = (trace(MANY_WORDS, one.offloading(layers), max_length=4096) for layers in (0, 3, 6))
    embedding = 2**17 * 512 * 2
    # of a token: input, query, key, value, attention's result, its sum; gate and up
    layer_bytes = 4096 * (512 * 6 + 2 * 2048) * 2
    assert kept.host_bytes == 0
    assert (half.host_bytes, moved.host_bytes) == (embedding + CHUNK_BYTES, embedding + 2 * CHUNK_BYTES)
    before, after = kept.replay(), moved.replay()
    assert before.by_cause["weights"] - after.by_cause["weights"] == embedding
    left = before.by_cause["activations"] - after.by_cause["activations"]
    assert left == pytest.approx(5 * layer_bytes, rel=0.05)  # all but that which is gone through
    assert before.allocated_bytes > half.replay().allocated_bytes > after.allocated_bytes
    assert before.reserved_bytes - after.reserved_bytes > embedding + 3 * layer_bytes  # no hole is where it was
    there, back = (moved.work.copied(kind) for kind in COPIES)
    assert there == 6 * layer_bytes  # this adapter drops some of its input, so that gates are not computed again
    assert back == there * 5 / 6  # the last layer's are still there
    assert kept.work.copied(COPIES[0]) == 0
    assert moved.work.flop == kept.work.flop


def test_gates_are_computed_again_and_not_copied_where_adapters_drop_nothing():
    kept, moved = (trace(MANY_WORDS, LONG.offloading(layers), max_length=4096) for layers in (0, 6))
    room = 3 * 16  # columns beside queries, keys and values, for what lies between an adapter's factors
    assert moved.work.copied(COPIES[0]) == 6 * 4096 * (512 * 6 + room) * 2
    assert moved.work.flop - kept.work.flop == pytest.approx(6 * 2 * 4096 * 512 * 2 * 2048, rel=0.1)


@pytest.mark.parametrize(("budget", "layers"), [(80, (4, 0)), (60, (0, 5)), (32, (2, 6)), (10, (0, 0))])
def test_what_does_not_fit_with_every_layer_computed_again_goes_to_the_host(monkeypatch, budget, layers):
    """As few layers as suffice, computed again before they go to the host, and both last."""

    def held(of, *_):
        recomputed, offloaded = plan_row.recomputed_layers(of.method), plan_row.offloaded_layers(of.method)
        taken = 100 - 6 * recomputed if not offloaded else 100 - 10 * offloaded - 5 * recomputed
        return replay.Trace(
            parameters=1,
            trainable_parameters=1,
            events=[(0, taken * MiB)],
            causes={0: "activations"},
            phases=[(0, "capture")],
        )

    monkeypatch.setattr(tracer, "trace", held)
    target = Target(name="any", capability=HOPPER, total_bytes=budget * MiB + CONTEXT_BYTES)
    (row,) = plan.plan([SIX_LAYERS], [LORA_CAPTURED.with_at_most(1)], [target], plan_row.PlanOptions(max_length=4096))
    assert (row.recomputed_layers, row.offloaded_layers) == layers
    assert row.as_json()["offloaded_layers"] == layers[1]


def test_eight_billion_parameters_fit_24_gib_captured():
    """The Trainer's own step of one row, which the captured one is compared with, would alone take more."""
    one_row = QLORA_CAPTURED.with_at_most(1)
    found = within(trace(models.QWEN3_8B, one_row, max_length=2048), 24 * GiB)
    assert found.verdict == "fits"
    assert 12 * GiB < found.allocated_bytes < 16 * GiB
