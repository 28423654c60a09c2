import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import MICRO
from lightweight import models
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
    assert (found.weights, note, found.is_written) == ("random", None, False)
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
    assert found.is_written
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
    writer.add_token_list([f"t{index}" for index in range(29)] + ["a", "b", "ab"])
    writer.add_token_types([1] * 32)
    writer.add_token_merges(["a b"])
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
    assert (found.weights, found.gguf_file, found.is_written) == ("pretrained", "tiny.gguf", False)
    written = models.write(found, tmp_path / "written", seed=0)
    assert written.is_written
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
            r"not on this machine and not from the hub \(.*\); give a local folder, or take --weights random$",
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
