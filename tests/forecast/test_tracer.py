"""The forecast against measured peaks, and against parameter counts from the papers."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import peft
import pytest
import torch
from bitsandbytes import functional as bitsandbytes_functional
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from bitsandbytes.optim import GlobalOptimManager
from training.test_stock import Unattended
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.training_args import OptimizerNames

from conftest import MICRO
from experiments import test_training as training_experiment
from experiments.test_forecast import ALLOCATED, CELLS, MODELS, RESERVED
from lightweight import methods, models, record, targets
from lightweight.child import helper
from lightweight.corpus import Corpus, Row, Rows, pair
from lightweight.forecast import calibration, step_time, tracer
from lightweight.forecast.replay import within
from lightweight.forecast.tracer import ForecastError
from lightweight.forecast.work import DEQUANTIZATIONS
from lightweight.methods import BASELINE, LORA, LORA_CAPTURED, QLORA, CapturedStep, MethodError
from lightweight.models import GPT_NEO_TINY, OPT_TINY, Model
from lightweight.targets import HOPPER, NATIVE, MiB
from lightweight.training import stock
from lightweight.training.meter import Meter
from lightweight.trial import Measurements, OutOfMemory, Trial

pytestmark = pytest.mark.xdist_group("traces")  # of which one worker makes all

RECORDS = Path(__file__).parents[2] / "experiments" / "records"
MATRIX, T4_RUN = RECORDS / "h200-forecast.json", RECORDS / "h200-t4.json"


def trial(model, method, **changes):
    return Trial(
        model=models.named(model) if isinstance(model, str) else model,
        method=method,
        target=NATIVE,
        corpus=Corpus(train=(), heldout=(), digest=""),
        **changes,
    )


def trace(of):
    return tracer.trace(of, HOPPER)


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """Every cell of the matrix traced, two at a time, each in a process of its own."""
    folder = tmp_path_factory.mktemp("traces")

    def traced(cell):
        model, method, max_length = CELLS[cell]
        return helper.call(tracer.trace, folder, trial(MODELS[model], method, max_length=max_length), HOPPER)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CELLS, pool.map(traced, CELLS), strict=True))


def cell_of(entry):
    """The cell that a record's entry measured."""
    sequences = entry.training_arguments["per_device_train_batch_size"]
    return next(
        name
        for name, (model, method, max_length) in CELLS.items()
        if (entry.model, entry.method) == (model, method.name)
        and (entry.max_length, sequences) == (max_length, method.sequences_per_pass)
    )


def test_layers_that_are_left_out_by_chance_are_no_captured_step():
    dropping = replace(MICRO, architecture={**MICRO.architecture, "layerdrop": 0.1}, location=None)
    with pytest.raises(ForecastError, match=r"cannot be captured: its layers are left out by chance \(layerdrop=0.1\)"):
        trace(trial(dropping, LORA_CAPTURED, max_length=32))


def test_adalora_is_traced_although_it_moves_its_ranks_by_numbers():
    adapter = peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=4, tinit=0, target_modules=["q_proj"])
    method = replace(LORA, name="adalora", adapter=adapter)
    assert trace(trial(MICRO, method, max_length=32)).events
    with pytest.raises(ForecastError, match="cannot be captured: AdaLoRA moves its ranks"):
        trace(trial(MICRO, replace(method, step="captured"), max_length=32))


def test_the_committed_matrix_is_whole():
    completed = [entry for entry in record.load(MATRIX).entries if entry.target == "native"]
    assert {cell_of(entry) for entry in completed} == set(CELLS)
    assert len(CELLS) >= 12


@pytest.mark.parametrize("cell", CELLS)
def test_forecasts_agree_with_the_committed_measurements(traces, cell):
    (entry,) = [e for e in record.load(MATRIX).entries if e.target == "native" and cell_of(e) == cell]
    peak = traces[cell].replay()
    assert peak.allocated_bytes == pytest.approx(entry.peak_allocated_bytes, rel=ALLOCATED)
    assert peak.reserved_bytes == pytest.approx(entry.peak_reserved_bytes, rel=RESERVED)


def test_no_verdict_is_wrong_on_the_committed_runs(traces):
    decided = 0
    for entry in [*record.load(MATRIX).entries, *record.load(T4_RUN).entries]:
        budget = entry.budget_bytes
        if budget is None:
            assert entry.device_bytes is not None
            budget = entry.device_bytes - targets.CONTEXT_BYTES
        found = within(traces[cell_of(entry)], budget)
        if entry.outcome == "out_of_memory":
            assert found.verdict != "fits", (entry.model, entry.method, entry.target)
            if found.verdict == "does_not_fit":
                assert found.phase == entry.phase, "where it ran out of memory"
        else:
            assert found.verdict != "does_not_fit", (entry.model, entry.method, entry.target)
        decided += found.verdict != "too_close_to_call"
    assert decided >= 30


@pytest.mark.parametrize(
    ("model", "parameters", "lora"),
    [
        # arXiv:2205.01068 table 1, with the tied embeddings that this size projects; lora: q and v of 24 layers, r=8
        ("opt-350m", 331_196_416, 24 * 2 * 8 * (1024 + 1024)),
        ("gpt-neo-1.3b", 1_315_575_808, 24 * 2 * 8 * (2048 + 2048)),
        ("smollm2-135m", 134_515_008, 30 * 8 * (576 + 576 + 576 + 192)),
    ],
)
def test_traces_count_the_parameters_of_the_papers(traces, model, parameters, lora):
    baseline, adapter = traces[f"{model} x baseline"], traces[f"{model} x lora"]
    assert baseline.parameters == baseline.trainable_parameters == parameters
    assert adapter.trainable_parameters == lora
    assert adapter.parameters == parameters + lora
    assert traces[f"{model} x qlora"].parameters > parameters, "a 4-bit weight counts as the elements it packs"


def test_causes_add_up_and_are_what_they_are_called(traces):
    peak = traces["opt-350m x baseline"].replay()
    assert sum(peak.by_cause.values()) == peak.allocated_bytes
    weights = 4 * 331_196_416
    assert peak.by_cause["weights"] == pytest.approx(weights, rel=1e-3)
    assert peak.by_cause["optimizer"] == pytest.approx(2 * weights, rel=1e-3)
    assert peak.by_cause["logits"] == 3 * 8 * 256 * 50272 * 4, "logits, their log-softmax and its gradient"
    assert peak.by_cause["workspace"] == 65 * MiB
    assert peak.phase == "backward"

    packed = traces["gpt-neo-1.3b x qlora"].replay()
    linear = 24 * (4 * 2048 * 2048 + 2 * 2048 * 8192)
    assert packed.by_cause["quantization state"] == pytest.approx(linear / 64 * 4, rel=1e-3)
    trainable = traces["gpt-neo-1.3b x qlora"].trainable_parameters
    assert packed.by_cause["gradients"] == pytest.approx(4 * trainable, rel=1e-2)


def test_larger_batches_and_rows_hold_more_and_checkpointing_less(traces):
    def peak(model, method, **changes):
        return trace(trial(model, method, **changes)).replay().allocated_bytes

    assert peak(OPT_TINY, BASELINE) < peak(OPT_TINY, BASELINE.with_batch(16))
    assert peak(GPT_NEO_TINY, LORA) < peak(GPT_NEO_TINY, LORA, max_length=512)
    for model in MODELS:
        kept = traces[f"{model} x qlora-no-checkpointing"].replay().allocated_bytes
        assert traces[f"{model} x qlora"].replay().allocated_bytes < kept


def test_the_optimizer_of_the_method_is_the_one_that_is_traced():
    def state(**arguments):
        method = replace(BASELINE, training_arguments={**BASELINE.training_arguments, **arguments})
        return trace(trial(OPT_TINY, method)).replay().by_cause["optimizer"]

    assert state(optim="sgd") == 0
    assert state(optim="adafactor") < state() / 2


def training(**arguments):
    return replace(BASELINE, name="mine", training_arguments={"per_device_train_batch_size": 4, **arguments})


@pytest.mark.parametrize("name", OptimizerNames)
def test_every_optimizer_is_forecast_or_one_line_names_it(name):
    try:
        traced = trace(trial(MICRO, training(optim=name.value), max_length=16))
    except ForecastError as error:
        line = str(error)
    else:
        assert (traced.replay().by_cause["optimizer"] > 0) == (name != OptimizerNames.SGD)
        return
    assert f"optim='{name.value}'" in line
    assert line.isprintable()


def test_without_more_packages_than_these_the_optimizers_of_bitsandbytes_and_torch_are_forecast():
    for name in ("adamw_8bit", "paged_adamw_8bit", "lion_8bit", "ademamix_8bit", "adafactor", "adamw_torch_fused"):
        trace(trial(MICRO, training(optim=name), max_length=16))


def blocks(tensors):
    """What the caching allocator gives for `tensors`, each storage once: blocks of 512 bytes."""
    storages = {s._cdata: s for tensor in tensors if (s := tensor.untyped_storage()).nbytes()}
    return sum(-(-storage.nbytes() // 512) * 512 for storage in storages.values())


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit", "lion_8bit", "ademamix_8bit", "adafactor"])
def test_the_state_of_an_optimizer_is_what_it_holds_after_a_step_on_this_cpu(tmp_path, name):
    of = trial(OPT_TINY, training(optim=name), max_length=16)
    network = AutoModelForCausalLM.from_config(models.configuration(OPT_TINY), dtype=torch.float32)
    row: Row = {name: np.ones(16, np.int32) for name in ("input_ids", "labels")}  # type: ignore[assignment]
    meter = Meter(torch.device("cpu"), start_seconds=0.0)
    with mock.patch.object(GlobalOptimManager, "_instance", None):
        rows = Rows([row] * 4, 0)
        trainer = stock.make_trainer(replace(of, max_steps=1), network, rows, meter, Unattended(), tmp_path)
        trainer.train()
    assert trainer.optimizer is not None
    held = [v for state in trainer.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert trace(of).replay().by_cause["optimizer"] == blocks(held)


@pytest.mark.parametrize("double", [False, True])
def test_the_state_of_quantized_weights_is_what_bitsandbytes_makes_of_them_on_this_cpu(tmp_path, double):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    network = AutoModelForCausalLM.from_config(models.configuration(OPT_TINY), dtype=torch.float32)
    network.save_pretrained(tmp_path)
    with mock.patch.dict(bitsandbytes_functional.name2qmap, clear=True):
        network = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
        held = list(bitsandbytes_functional.name2qmap.values())
    for layer in network.modules():
        if isinstance(layer, Linear4bit):
            state = layer.weight.quant_state  # type: ignore[attr-defined]
            held += [*vars(state).values(), *(vars(state.state2).values() if double else ())]
    peak = trace(trial(OPT_TINY, replace(QLORA, quantization=quantization), max_length=16)).replay()
    assert peak.by_cause["quantization state"] == blocks(t for t in held if isinstance(t, torch.Tensor))


WIDE = replace(
    MICRO, architecture={**MICRO.architecture, "hidden_size": 256, "ffn_dim": 512, "word_embed_proj_dim": 256}
)


def test_what_is_paged_is_not_counted_as_the_cards():
    def found(name):
        return within(trace(trial(WIDE, training(optim=name), max_length=16)), None)

    plain, paged = found("adamw_bnb_8bit"), found("paged_adamw_8bit")
    large = 2 * 256 * 512  # fc1 and fc2 alone have 100,000 elements; 8 bits for each of two moments
    assert plain.paged_bytes == 0
    assert paged.paged_bytes == 2 * large
    assert plain.by_cause["optimizer"] - paged.by_cause["optimizer"] == 2 * large
    in_32_bits = found("paged_adamw_32bit")
    assert in_32_bits.paged_bytes == 4 * 2 * large
    assert sum(in_32_bits.by_cause.values()) == in_32_bits.allocated_bytes
    assert found("paged_ademamix_32bit").paged_bytes == 4 * 3 * large  # two fast moments and a slow one


def test_a_forecast_leaves_nothing_behind_in_bitsandbytes():
    before = GlobalOptimManager._instance, dict(bitsandbytes_functional.name2qmap)
    double = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    trace(trial(MICRO, replace(QLORA, quantization=double), max_length=16))
    trace(trial(MICRO, training(optim="paged_adamw_8bit"), max_length=16))
    assert (GlobalOptimManager._instance, dict(bitsandbytes_functional.name2qmap)) == before


def test_dropping_layers_is_forecast_as_if_none_were_dropped():
    assert OPT_TINY.architecture is not None
    dropping = replace(OPT_TINY, architecture={**OPT_TINY.architecture, "layerdrop": 0.9})
    peaks = [trace(trial(model, LORA)).replay().allocated_bytes for model in (OPT_TINY, dropping)]
    assert peaks[0] == peaks[1]


EIGHT_BITS = BitsAndBytesConfig(load_in_8bit=True)
NO_OUTLIERS = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
assert isinstance(LORA.adapter, peft.LoraConfig)
LSH = {"model_type": "reformer", "is_decoder": True, "vocab_size": 384, "axial_pos_shape": [16, 16]}


@pytest.mark.parametrize(
    ("model", "method", "words"),
    [
        (Model(name="lsh", architecture=LSH), BASELINE, ("lsh x baseline", "LSHSelfAttention", "DataDependent")),
        (
            OPT_TINY,
            replace(LORA_CAPTURED, quantization=EIGHT_BITS),
            ("opt-tiny x lora-captured", "8-bit weights", "take a method without the captured step"),
        ),
        (
            OPT_TINY,
            replace(LORA, adapter=replace(LORA.adapter, target_modules=["nothing"])),
            ("lora", "cannot be built"),
        ),
    ],
    ids=["data-dependent", "8 bits captured", "no such module"],
)
def test_what_cannot_be_traced_is_one_line_that_names_it(model, method, words):
    with pytest.raises(ForecastError) as failure:
        trace(trial(model, method))
    line = str(failure.value)
    assert "\n" not in line
    for word in words:
        assert word in line


class UnheardOfError(Exception):
    """What no list of exceptions names, and no pickle carries."""

    def __init__(self, operator):
        super().__init__(operator)


def raise_unheard_of(*_, **__):
    raise UnheardOfError(torch.ops.aten.add.Tensor)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("lightweight.models.skeleton", "micro x lora: cannot be built: UnheardOfError: aten.add.Tensor"),
        ("peft.get_peft_model", "micro x lora: cannot be built: method lora: its LORA cannot be put on opt"),
        ("lightweight.forecast.skeleton._quantized", "cannot be traced: UnheardOfError"),
        ("transformers.Trainer.create_optimizer", "cannot be traced: UnheardOfError"),
        ("transformers.models.opt.modeling_opt.OPTAttention.forward", "OPTAttention) cannot be traced: UnheardOfError"),
        ("torch.optim.AdamW.step", "cannot be traced: UnheardOfError"),
        ("lightweight.models.load_tokenizer", "micro x lora: its rows cannot be made: UnheardOfError"),
    ],
)
def test_whatever_a_library_raises_is_one_line_that_crosses_processes(monkeypatch, micro, small_corpus, place, words):
    monkeypatch.setattr(place, raise_unheard_of)
    of = Trial(model=micro, method=replace(QLORA, name="lora"), target=NATIVE, corpus=small_corpus, max_length=16)
    with pytest.raises(ForecastError) as failure:
        tracer.trace_on(of, targets.Device(name="cpu"))
    assert words in str(failure.value)
    assert str(pickle.loads(pickle.dumps(failure.value))) == str(failure.value)


def test_a_trace_makes_no_folder_that_would_outlive_a_helper(monkeypatch, micro, small_corpus, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("tempfile.mkdtemp", lambda *_, **__: pytest.fail("a temporary folder was made"))
    tracer.trace_on(
        Trial(model=micro, method=LORA, target=NATIVE, corpus=small_corpus, max_length=16), targets.Device(name="cpu")
    )
    assert not list(tmp_path.iterdir())


def test_a_method_error_is_told_as_it_is(monkeypatch):
    def refuse(*_):
        raise MethodError("method lora: this one\nand not that")

    monkeypatch.setattr("lightweight.models.skeleton", refuse)
    with pytest.raises(ForecastError, match=r"^micro x lora: cannot be built: method lora: this one$"):
        trace(trial(MICRO, LORA))


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
FOUR_BITS = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4").to_dict()


def stored(tmp_path, quantization):
    """A model of one layer whose folder has this quantization in its config.json."""
    assert OPT_TINY.architecture is not None
    config = {**OPT_TINY.architecture, "num_hidden_layers": 1, "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return Model(name="stored", source=str(tmp_path))


def test_what_the_trainer_compiles_is_not_forecast():
    compiled = replace(LORA, name="compiled", training_arguments={"torch_compile": True})
    with pytest.raises(ForecastError, match=r"take torch_compile=False$"):
        trace(trial(MICRO, compiled))


@pytest.mark.parametrize("method", [BASELINE, LORA_CAPTURED])
def test_a_schedule_that_is_too_long_for_the_traced_steps_is_no_matter(method):
    arguments = {"lr_scheduler_type": "polynomial", "warmup_steps": 3}
    assert trace(trial(MICRO, replace(method, training_arguments=arguments))).replay().allocated_bytes > 0


def test_a_network_that_does_not_say_what_is_before_its_head_is_captured_without_chunks():
    sizes = {"hidden_size": 64, "intermediate_size": 64, "intermediate_size_mlp": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2}
    shape = {"model_type": "llama4_text", "vocab_size": 384, **sizes, **heads}
    assert trace(trial(Model(name="llama4", architecture=shape), LORA_CAPTURED)).replay().allocated_bytes > 0


@pytest.mark.parametrize(
    ("quantization", "method", "words"),
    [
        (FP8, LORA, r"quantized by fp8, .*quantization=FineGrainedFP8Config\(dequantize=True\)$"),
        (FP8, BASELINE, "quantized by fp8"),
        ({"quant_method": "gptq", "bits": 4}, LORA, "quantized by gptq"),
        ({"quant_method": "mxfp4"}, QLORA, "quantized by mxfp4"),
        (EIGHT_BITS.to_dict(), LORA_CAPTURED, "asks the device whether an input has outliers"),
        (EIGHT_BITS.to_dict(), QLORA, "quantized by bitsandbytes 8-bit already"),
        ({}, LORA, "quantized by what config.json does not name"),
        (FOUR_BITS, BASELINE, "its weights cannot be trained directly"),
    ],
)
def test_a_quantized_checkpoint_that_cannot_be_forecast_is_refused(tmp_path, quantization, method, words):
    with pytest.raises(ForecastError, match=words):
        trace(trial(stored(tmp_path, quantization), method))


def test_a_checkpoint_of_4_bits_is_forecast_as_it_is(tmp_path):
    model = stored(tmp_path, FOUR_BITS)
    traces = [trace(trial(model, method, max_length=16)) for method in (LORA, QLORA)]
    states = [traced.replay().by_cause["quantization state"] for traced in traces]
    assert states[0] == states[1] > 0
    kinds = [{kernel.kind for kernel in traced.work.kernels} for traced in traces]
    assert all(DEQUANTIZATIONS & of for of in kinds), "by which its step is known to be like qlora's"


@pytest.fixture(scope="module")
def of_8_bits(tmp_path_factory):
    """opt-tiny as a checkpoint of 8 bits, and the bytes by cause that its network has once it is loaded."""
    whole, folder = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("8-bit")
    AutoModelForCausalLM.from_config(models.configuration(OPT_TINY)).save_pretrained(whole)
    AutoModelForCausalLM.from_pretrained(whole, quantization_config=EIGHT_BITS, device_map="cpu").save_pretrained(
        folder
    )
    model = Model(name="stored", source=str(folder), location=str(folder))
    settled = methods.settle_quantization(model, models.configuration(model), LORA)
    network = methods.adapt(LORA, models.load(model, torch.float32, torch.device("cpu"), settled))
    layers: list[Any] = [module for module in network.modules() if isinstance(module, Linear8bitLt)]
    scales = blocks(layer.weight.SCB for layer in layers)
    held = [*{id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}.values()]
    return model, {"weights": blocks(held), "quantization state": scales}


def test_a_checkpoint_of_8_bits_lies_in_memory_as_it_is_loaded(of_8_bits):
    model, held = of_8_bits
    found = trace(trial(model, LORA, max_length=16))
    peak = found.replay()
    assert peak.by_cause["quantization state"] == held["quantization state"]
    assert 0 <= peak.by_cause["weights"] - held["weights"] <= 8 * 512  # of the first batch's tensors
    assert found.parameters == trace(trial(OPT_TINY, LORA, max_length=16)).parameters


def test_a_step_of_8_bits_keeps_inputs_as_they_come_and_no_outliers(of_8_bits):
    """The same products with and without the look for outliers, which keeps nothing where there are none; and time is
    not forecast of them."""
    model, _ = of_8_bits
    found = trace(trial(model, LORA))
    blind = trace(trial(OPT_TINY, replace(LORA, quantization=NO_OUTLIERS)))
    assert found.replay().by_cause["activations"] == blind.replay().by_cause["activations"]
    assert any(kernel.dtype == "int8" for kernel in found.work.kernels)
    assert step_time.forecast(found, trial(model, LORA), "NVIDIA H100 80GB HBM3", calibration.stored()) is None
    assert trace(trial(OPT_TINY, replace(LORA_CAPTURED, quantization=NO_OUTLIERS), max_length=16)).replay()


def test_rows_longer_than_the_model_takes_are_refused():
    with pytest.raises(ForecastError, match="rows of 1024 tokens, where the model takes 512"):
        trace(trial(OPT_TINY, LORA, max_length=1024))


def longest_batches(of):
    return tracer._longest_batches(*tracer._with_rows(of))


def test_only_batches_that_the_corpus_gives_are_traced(micro, small_corpus):
    short = Trial(model=micro, method=BASELINE, target=NATIVE, corpus=small_corpus)
    assert longest_batches(short) == (short.with_rows(20), ("padded",))
    of_8 = replace(short, max_length=8)
    assert longest_batches(of_8) == (of_8.with_rows(20), ("full",))
    unknown = replace(short, model=replace(micro, location=None))
    assert longest_batches(unknown) == (unknown, ("full", "padded"))


def test_where_batches_are_padded_to_their_longest_that_of_the_longest_row_is_traced(micro, small_corpus):
    train = (*(pair("Hi", "Hello") for _ in range(9)), pair("Hi", "Hello" * 20))
    given = Trial(
        model=micro,
        method=BASELINE,
        target=NATIVE,
        corpus=replace(small_corpus, train=train),
        max_length=200,
        padding="longest",
    )
    longest = len("User: Hi\nTherapist: ") + 100 + 1
    assert longest_batches(given) == (replace(given, max_length=longest, rows=10), ("padded",))
    alone = replace(given, method=BASELINE.with_batch(1))  # no row has another beside it
    assert longest_batches(alone) == (replace(alone, max_length=longest, rows=10), ("full",))
    alike = replace(given, corpus=replace(small_corpus, train=train[-1:] * 10))
    assert longest_batches(alike)[1] == ("full",)
    assert longest_batches(replace(given, padding="max"))[0].max_length == 200


def test_a_batch_has_no_more_rows_than_the_corpus(micro, small_corpus):
    of_all, of_more = (
        Trial(model=micro, method=BASELINE.with_batch(size), target=NATIVE, corpus=small_corpus, max_length=64)
        for size in (20, 1000)
    )
    assert longest_batches(of_more) == longest_batches(of_all)
    cpu = targets.Device(name="cpu")
    peaks = [tracer.trace_on(given, cpu).replay().allocated_bytes for given in (of_all, of_more)]
    assert peaks[0] == peaks[1]


def test_the_forecast_of_a_batch_padded_to_its_longest_is_that_of_the_longest_row(micro, small_corpus):
    def peak(longest, padding):
        train = (pair("Hi", "Hello"), pair("Hi", "o" * (longest - 21)))
        found = Trial(
            model=micro,
            method=BASELINE,
            target=NATIVE,
            corpus=replace(small_corpus, train=train),
            max_length=200,
            padding=padding,
        )
        return tracer.trace_on(found, targets.Device(name="cpu")).replay().allocated_bytes

    assert peak(200, "longest") == peak(200, "max") == peak(100, "max") > peak(100, "longest")


def test_a_large_model_is_forecast_in_seconds_without_much_memory(tmp_path):
    architecture = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    }
    llama = trial(Model(name="llama-7b", architecture=architecture), QLORA)
    seconds, host_bytes, parameters = helper.call(timed, tmp_path, llama)
    assert parameters == pytest.approx(6.76e9, rel=0.01)
    assert seconds < 30
    assert host_bytes < 2 * 2**30


def timed(large):
    """CPU seconds of a trace, and by how much it made the peak of its own process's memory grow."""
    import resource
    import time

    def peak_bytes() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    start, had = time.process_time(), peak_bytes()  # other processes do not count
    traced = trace(large)
    traced.replay(targets.T4.budget_bytes)
    return time.process_time() - start, peak_bytes() - had, traced.parameters


def test_records_say_what_was_forecast():
    entries = json.loads(T4_RUN.read_text("utf-8"))["outcomes"]
    assert {entry["forecast_verdict"] for entry in entries} == {"fits", "does_not_fit"}
    assert all(sum(entry["forecast_bytes_by_cause"].values()) == entry["forecast_allocated_bytes"] for entry in entries)


@pytest.mark.parametrize(
    ("verdict", "ends"),
    [
        ("does_not_fit", None),
        ("too_close_to_call", None),
        ("fits", (AssertionError, "was forecast to fit")),
        (None, (AssertionError, "was not forecast")),
    ],
)
def test_out_of_memory_is_an_answer_where_it_was_forecast(verdict, ends, micro, small_corpus):
    ran_out = OutOfMemory(
        phase="train", requested_bytes=1, budget_bytes=1, reason="out of memory", measured=Measurements()
    )
    laboratory = SimpleNamespace(
        takes_long=lambda _: False,
        trial=lambda *_: Trial(model=micro, method=LORA_CAPTURED, target=NATIVE, corpus=small_corpus),
        try_to_forecast=lambda _: verdict and SimpleNamespace(verdict=verdict),
    )
    with nullcontext() if ends is None else pytest.raises(ends[0], match=ends[1]):
        training_experiment.test_training(lambda *_: ran_out, laboratory, "opt-tiny", "lora-captured")  # type: ignore[arg-type]


EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 128, "num_local_experts": 4},
    "qwen3_moe": {
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 16,
    },
    "olmoe": {"intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "eos_token_id": 1},
    "gpt_oss": {
        "intermediate_size": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    },
}
ON_EXPERTS = replace(
    LORA,
    name="experts",
    adapter=peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_dropout=0.0,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ),
)


@pytest.mark.parametrize("model_type", EXPERTS)
def test_experts_are_traced_in_every_format(model_type):
    """torch's own rule for their product knows bf16 alone, and a GPU computes it in fp32 and fp16 too."""
    shape: dict[str, Any] = {"model_type": model_type, "vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    model = Model(name=model_type, architecture=shape | EXPERTS[model_type])
    trainable = {}
    for method in (BASELINE, LORA, ON_EXPERTS, replace(LORA, name="bf16", weights_dtype="bfloat16"), LORA_CAPTURED):
        traced = trace(trial(model, method, max_length=64))
        trainable[method.name] = traced.trainable_parameters
        assert traced.replay().by_cause["activations"] > 0
    assert trainable["lora"] < trainable["experts"] < trainable["baseline"]


def test_a_part_that_a_network_refuses_when_it_computes_is_left_out_of_the_forecast():
    """gpt-oss's attention has sinks, which the captured one has not: it is traced with its own, as it is trained."""
    shape: dict[str, Any] = {"model_type": "gpt_oss", "vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    model = Model(name="gpt_oss", architecture=shape | EXPERTS["gpt_oss"])
    own = replace(LORA_CAPTURED, name="own", step=CapturedStep(attention="model", packing=False))
    given_up, asked = (trace(trial(model, method, max_length=128)).replay() for method in (LORA_CAPTURED, own))
    assert given_up.allocated_bytes == pytest.approx(asked.allocated_bytes, rel=0.01)


def test_adapters_on_experts_are_told_what_peft_lacks():
    shape: dict[str, Any] = {"model_type": "mixtral", "vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 1}
    model = Model(name="any", architecture=shape | EXPERTS["mixtral"] | {"num_attention_heads": 4})
    with pytest.raises(ForecastError, match="give lora_dropout=0, or name its attention's layers"):
        trace(trial(model, QLORA, max_length=64))
