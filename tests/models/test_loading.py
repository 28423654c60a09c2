"""Folders of somebody's that are not what they say, and those that are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import MICRO
from lightweight import corpus, models
from lightweight.corpus import pair
from lightweight.models import Model, ModelError
from lightweight.models.model import refused
from models.damage import content, settings, tensors

CPU = torch.device("cpu")


def test_code_that_comes_with_a_model_is_not_run(weights_folder):
    config = json.loads((weights_folder / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (weights_folder / "config.json").write_text(json.dumps(config))
    (weights_folder / "code.py").write_text("raise SystemExit('ran their code')")
    with pytest.raises(ValueError, match=r"trust_remote_code|custom code"):
        models.load(Model(name="x", location=str(weights_folder)), torch.float32, CPU, None)


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


NORM = "model.decoder.layers.0.final_layer_norm.weight"
WORD_383 = "{% for m in messages %}{{ m['content'] }}<extra_id_124>{% endfor %}"
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
    "an encoder": (settings("config.json", model_type="vit"), "not a causal language model"),
    "size a text": (settings("config.json", hidden_size="32"), "expected int"),
    "size negative": (settings("config.json", hidden_size=-32), "cannot be used|negative"),
    "size huge": (settings("config.json", vocab_size=10**10), "parameters and the files"),
    "dropout of all": (settings("config.json", dropout=2.0), "dropout is not a probability"),
    "layers huge": (settings("config.json", num_hidden_layers=10_001), "num_hidden_layers is over"),
    "heads 0": (settings("config.json", num_attention_heads=0), "(modulo|division) by zero"),
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
        "unknown tokens only",
    ),
    "a tokenizer of too many": (settings("tokenizer_config.json", extra_ids=10**9), "extra_ids is over"),
    "a tokenizer without an end": (settings("tokenizer_config.json", eos_token=None), "it has no end token"),
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
    ids = corpus.encode_whole(pair("Hi", "Hello"), tokenizer)["input_ids"]
    models.check_rows(found, models.configuration(found), longest=64, largest=int(ids.max()))
    return models.load(found, torch.float32, CPU, None)


def test_a_whole_folder_is_read_and_constants_beside_its_weights_are_no_fault(weights_folder):
    """Checkpoints of GPT-2's and GPT-Neo's time hold causal masks, which transformers 5 computes."""
    constants = {"model.decoder.layers.0.attn.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)}
    constants["model.decoder.layers.0.attn.attention.masked_bias"] = torch.tensor(-1e9)
    tensors(lambda t: t | constants)(weights_folder)
    assert prepare(models.named(str(weights_folder))).config.hidden_size == 32


def test_memory_of_this_machine_is_no_fault_of_a_model():
    with pytest.raises(torch.OutOfMemoryError), refused(MICRO, "what", "mend"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(ModelError, match=r"what \(KeyError\): mend"), refused(MICRO, "what", "mend"):
        raise KeyError
