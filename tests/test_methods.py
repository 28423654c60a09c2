import contextlib
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from lightweight import methods, models, targets, training_arguments
from lightweight.methods import (
    BASELINE,
    BASELINE_CAPTURED,
    LORA,
    LORA_CAPTURED,
    QLORA,
    QLORA_CAPTURED,
    CapturedStep,
    Method,
    MethodError,
    adapt,
    adapted_layers,
)
from lightweight.models import OPT_TINY
from lightweight.preload import peft

MINE = replace(LORA, name="mine")


def lora_config(method: Method) -> peft.LoraConfig:
    assert isinstance(method.adapter, peft.LoraConfig)
    return method.adapter


def quantization(method: Method) -> BitsAndBytesConfig:
    assert isinstance(method.quantization, BitsAndBytesConfig)
    return method.quantization


def test_the_three_methods_are_the_originals():
    assert (BASELINE.adapter, BASELINE.quantization, BASELINE.precision) == (None, None, "fp32")
    for method in (LORA, QLORA):
        assert isinstance(method.adapter, peft.LoraConfig)
        assert (method.adapter.r, method.adapter.lora_alpha, method.adapter.lora_dropout) == (8, 32, 0.1)
        assert method.precision == "fp16"
    assert quantization(QLORA).load_in_4bit
    assert QLORA.training_arguments["gradient_checkpointing"]
    assert (QLORA.sequences_per_pass, QLORA.sequences_per_step) == (2, 8)
    assert BASELINE.sequences_per_step == LORA.sequences_per_step == 8


def test_on_a_cpu_nothing_asks_for_fp16():
    for method in methods.METHODS.values():
        assert method.on_cpu().precision == "fp32"
    assert quantization(QLORA.on_cpu()).bnb_4bit_compute_dtype == torch.float32
    assert quantization(QLORA.on_cpu()).bnb_4bit_quant_type == "nf4"
    assert quantization(QLORA).bnb_4bit_compute_dtype == torch.float16


@pytest.mark.parametrize(
    "method",
    [
        replace(LORA, training_arguments={"bf16": True}),
        replace(BASELINE, weights_dtype="bfloat16"),
        replace(QLORA, quantization=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16")),
    ],
)
def test_bf16_is_seen_wherever_it_is_asked_for(method):
    assert method.uses_bf16
    assert not any(known.uses_bf16 for known in methods.METHODS.values())


def test_a_method_of_ones_own_is_named_by_its_import_path():
    assert methods.named("test_methods:MINE") is MINE
    assert methods.named("lora") is LORA


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lorra", "unknown method 'lorra': choose one of baseline, lora, qlora"),
        ("nowhere:MINE", "cannot be imported"),
        ("test_methods:NONE", "cannot be imported"),
        ("test_methods:pytest", "is a module"),
    ],
)
def test_a_name_that_is_no_method_is_told(text, expected):
    with pytest.raises(ValueError, match=expected):
        methods.named(text)


NAMELESS = replace(BASELINE, training_arguments={"learning_rate": 1e-3})


def test_another_method_of_the_suites_name_is_refused_since_it_would_be_taken_for_it():
    with pytest.raises(ValueError, match=r"methods are called 'baseline' \(their training_arguments differ"):
        methods.named("test_methods:NAMELESS")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import os\nMINE = nothing\n", r"cannot be imported: name 'nothing' is not defined \(mine_\d.py, line 2\)"),
        ("def f(:\n", r"cannot be imported: invalid syntax \(mine_\d.py, line 1\)"),
        ("def f(): return 1 / 0\nMINE = f()\n", r"cannot be imported: division by zero \(f in mine_\d.py, line 1\)"),
    ],
)
def test_a_file_that_cannot_be_imported_is_one_line_with_the_place(text, expected, tmp_path, request):
    number = request.node.callspec.indices["text"]
    (tmp_path / f"mine_{number}.py").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=expected) as raised:
        methods.named(f"{tmp_path}/mine_{number}.py:MINE")
    assert "\n" not in str(raised.value)


def test_what_peft_leaves_to_its_caller_is_not_left_out():
    def lora(beginning):
        return peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=beginning)

    for beginning in ("eva", "corda", "lora_ga"):
        with pytest.warns() if beginning != "lora_ga" else contextlib.nullcontext():
            adapter = lora(beginning)
        method = Method(name="m", adapter=adapter)  # whose neighbours in a file are still to be had
        with pytest.raises(MethodError, match=f"method m: init_lora_weights='{beginning}' is computed from data"):
            training_arguments.check(method, targets.NATIVE, 1)
        training_arguments.check(replace(method, transform=os.path.abspath), targets.NATIVE, 1)
    training_arguments.check(Method(name="m", adapter=lora("olora")), targets.NATIVE, 1)


def test_batch_is_the_trainers_default_where_nothing_is_said():
    assert Method(name="bare").sequences_per_step == 8


def test_captured_methods_train_what_the_stock_ones_do():
    for stock, captured in ((BASELINE, BASELINE_CAPTURED), (LORA, LORA_CAPTURED), (QLORA, QLORA_CAPTURED)):
        assert stock.captured_step is None
        assert captured.captured_step == CapturedStep()
        assert captured.name == f"{stock.name}-captured"
        assert captured.adapter == stock.adapter
        assert captured.sequences_per_step == stock.sequences_per_step
    assert not QLORA_CAPTURED.training_arguments.get("gradient_checkpointing")
    assert BASELINE_CAPTURED.precision == "fp32"


@pytest.mark.parametrize(("bf16", "dtype", "precision"), [(True, "bfloat16", "bf16"), (False, "float16", "fp16")])
def test_half_is_the_format_the_target_has(bf16, dtype, precision):
    assert not QLORA_CAPTURED.uses_bf16  # no target needs to have it
    method = QLORA_CAPTURED.on_gpu(bf16=bf16)
    assert (method.weights_dtype, method.precision) == (dtype, precision)
    assert quantization(method).bnb_4bit_compute_dtype == getattr(torch, dtype)
    assert QLORA.on_gpu(bf16=bf16) == QLORA


def test_packing_on_the_models_own_attention_is_refused():
    with pytest.raises(ValueError, match="packing needs attention='sdpa'"):
        CapturedStep(attention="model")
    assert Method(name="m", step=CapturedStep(packing=False)).captured_step == CapturedStep(packing=False)


@pytest.mark.parametrize("name", ["recompute", "offload"])
@pytest.mark.parametrize("layers", [-1, 1.5, "all", True])
def test_a_number_of_layers_is_one(name, layers):
    with pytest.raises(ValueError, match=rf"^{name}=.*: is not a number of layers: give 0 or more$"):
        CapturedStep(**{name: layers})


def test_a_peer_needs_a_lora_adapter_and_the_trainers_steps():
    with pytest.raises(ValueError, match="unsloth trains LoRA with the Trainer's steps only"):
        replace(BASELINE, library="unsloth")
    with pytest.raises(ValueError, match="unsloth trains LoRA with the Trainer's steps only"):
        replace(LORA, step="captured", library="unsloth")
    assert replace(LORA, library="unsloth").library == "unsloth"


def test_a_step_has_as_many_sequences_in_other_passes():
    for method, passes, sequences in ((LORA, 2, 4), (LORA, 8, 1), (QLORA, 1, 8), (QLORA, 8, 1)):
        other = method.with_passes(passes)
        assert (other.passes_per_step, other.sequences_per_pass) == (passes, sequences)
        assert other.sequences_per_step == method.sequences_per_step
    assert LORA.with_passes(1) is LORA
    with pytest.raises(
        methods.MethodError, match="method lora: 8 sequences a step cannot be divided into 3 equal passes"
    ):
        LORA.with_passes(3)


SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LAYERS = {
    # what the original names, which peft's mapping says as well
    "opt": {"q_proj", "v_proj"},
    "gpt_neo": {"q_proj", "v_proj"},
    "llama": {"q_proj", "v_proj"},
    # peft's mapping for names of their own
    "gpt_neox": {"query_key_value"},
    "gpt2": {"c_attn"},
    "bloom": {"query_key_value"},
    "falcon": {"query_key_value"},
    "mpt": {"Wqkv"},
    "phi": {"q_proj", "v_proj", "fc1", "fc2"},
    # none there, though they have layers of these names
    "olmo": {"q_proj", "v_proj"},
    "starcoder2": {"q_proj", "v_proj"},
    # none there and none of these names: all linear layers
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "mamba": {"in_proj", "x_proj", "dt_proj"},
}


def network_of(model_type: str):
    sizes: dict[str, dict[str, Any]] = {
        "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
        "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2},
        "opt": {"ffn_dim": 32, "word_embed_proj_dim": 32},
    }
    config = AutoConfig.for_model(model_type, **SHAPE | sizes.get(model_type, {}) | {"pad_token_id": 0})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft says that it knows GPT-2's layers from others
@pytest.mark.parametrize("model_type", LAYERS)
def test_lora_is_put_on_the_layers_that_peft_names_for_the_architecture(model_type):
    network = adapt(LORA, network_of(model_type))
    assert set(adapted_layers(network)) == LAYERS[model_type]
    assert lora_config(LORA).target_modules is None  # the method itself is as it was written
    assert {name for name, parameter in network.named_parameters() if parameter.requires_grad} == {
        name for name, _ in network.named_parameters() if "lora_" in name
    }


@pytest.mark.parametrize(
    ("adapter", "model_type", "expected"),
    [
        (
            replace(lora_config(LORA), target_modules=["nothing"]),
            "llama",
            r"LORA cannot be put on llama \(Target modules",
        ),
        (QLORA.adapter, "mamba", "'out_proj' is incompatible with Mamba-based models"),
        (peft.IA3Config(task_type="CAUSAL_LM"), "phi3", "IA3 cannot be put on phi3 .*: take another adapter"),
        (
            peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1),
            "gpt_neox",
            "ADAPTION_PROMPT cannot be put on gpt_neox",
        ),
    ],
)
def test_an_adapter_that_an_architecture_has_no_place_for_is_one_line(adapter, model_type, expected):
    with pytest.raises(MethodError, match=expected) as raised:
        adapt(Method(name="mine", adapter=adapter), network_of(model_type))
    assert str(raised.value).startswith("method mine: its ")
    assert "\n" not in str(raised.value)


def test_memory_that_runs_out_is_no_fault_of_a_method(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(peft, "get_peft_model", full)
    with pytest.raises(torch.OutOfMemoryError):
        adapt(LORA, network_of("llama"))


ALL = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", ALL),
        (["v_proj", "q_proj"], ["q_proj", "v_proj"]),
        ({"v_proj", "q_proj"}, ["q_proj", "v_proj"]),
        (r".*\.(q|k)_proj", ["k_proj", "q_proj"]),
        (["mlp.up_proj"], ["up_proj"]),
        (None, ["q_proj", "v_proj"]),
    ],
)
def test_a_library_that_takes_names_alone_gets_those_of_the_same_layers(targets, expected):
    method = replace(LORA, adapter=replace(lora_config(LORA), target_modules=targets), library="unsloth")
    network = network_of("llama")
    assert methods.named_layers(method, network) == expected
    assert list(adapted_layers(adapt(method, network))) == expected


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (r".*layers\.0\..*q_proj", "model.layers.1.self_attn.q_proj has the name of one that it is put on"),
        (["layers.1.mlp.up_proj"], "model.layers.0.mlp.up_proj has the name"),
        (["nothing"], "there is none of them"),
    ],
)
def test_layers_that_names_alone_cannot_say_are_refused(targets, expected):
    method = replace(LORA, adapter=replace(lora_config(LORA), target_modules=targets), library="unsloth")
    with pytest.raises(MethodError, match=f"method lora: unsloth takes layers by name alone, .*{expected}"):
        methods.named_layers(method, network_of("llama"))


def named_layers(*layers, **changes):
    return replace(LORA, adapter=peft.LoraConfig(target_modules=list(layers)), **changes)


@pytest.mark.parametrize(
    ("method", "missing"),
    [
        (named_layers("q_proj", "fc1", changed={"lora_layers": ["q_proj", "fc1"]}), None),
        (named_layers("layers.1.fc1", changed={"lora_layers": ["layers.1.fc1"]}), None),
        (named_layers("q_proj", "c_attn", changed={"lora_layers": ["q_proj", "c_attn"]}), "--lora-layers: *c_attn: "),
        (named_layers("proj", changed={"lora_layers": ["proj"]}), "--lora-layers: *proj: "),  # no layer's whole name
        (named_layers("q_proj", "c_attn"), None),  # one's own, for several architectures
        (named_layers("c_attn", "fc3", changed={"lora_layers": ["c_attn", "fc3"]}), "--lora-layers: *c_attn or fc3: "),
        (LORA, None),
        (QLORA, None),
        (BASELINE, None),
    ],
)
def test_layers_that_the_model_does_not_have_are_one_line(method, missing):
    if missing is None:
        methods.check_layers(method, OPT_TINY)
        return
    with pytest.raises(MethodError, match=missing.replace("*", "there is no layer called ")) as raised:
        methods.check_layers(method, OPT_TINY)
    assert str(raised.value).startswith("opt-tiny x lora: ")


def test_layers_that_are_said_to_be_missing_are_those_that_peft_does_not_find():
    for name in ("fc1", "layers.1.fc1", "proj", "c_attn"):
        method = named_layers(name, changed={"lora_layers": [name]})
        network = models.skeleton(models.configuration(OPT_TINY), torch.float32, None)
        try:
            adapt(method, network)
        except MethodError:
            with pytest.raises(MethodError):
                methods.check_layers(method, OPT_TINY)
        else:
            methods.check_layers(method, OPT_TINY)
