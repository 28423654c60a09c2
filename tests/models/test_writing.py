"""Folders that are written for models which have none."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer

from conftest import MICRO
from lightweight import corpus, models
from lightweight.corpus import pair
from lightweight.models import ModelError
from lightweight.models.writing import _end_as_the_network_does

CPU = torch.device("cpu")


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


def test_a_gguf_file_is_turned_into_safetensors(tmp_path, monkeypatch):
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
    readings, reader = [], gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", lambda *place: readings.append(place) or reader(*place))
    written = models.write(found, tmp_path / "written", seed=0)
    assert len(readings) == 1
    assert written.is_loadable
    assert written.weights_file == "tiny.gguf"  # these are still the weights of that file
    loaded = models.load(written, torch.float32, CPU, None)
    assert torch.equal(loaded.lm_head.weight, network.lm_head.weight)

    alone, beside = models.find_tokenizer(models.named(str(folder))), models.load_tokenizer(written)
    assert alone.encode("abba") == beside.encode("abba")
    assert (alone.eos_token_id, alone.pad_token_id) == (beside.eos_token_id, beside.pad_token_id)


def test_a_tokenizer_from_gguf_ends_where_its_network_does(micro):
    """What transformers 5.17 makes of a GGUF file: another end, and nothing to pad with."""
    tokenizer, config = models.load_tokenizer(micro), models.configuration(micro)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    tokenizer.eos_token, tokenizer.pad_token = tokenizer.convert_ids_to_tokens(42), None
    config.eos_token_id, config.pad_token_id = end, pad
    _end_as_the_network_does(tokenizer, config)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (end, pad)


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
    ids = corpus.encode_whole(pair("Hi", "Hello"), models.load_tokenizer(written))["input_ids"]
    network = models.load(written, torch.float32, CPU, None)
    models.check_rows(written, network.config, longest=len(ids), largest=int(ids.max()))
