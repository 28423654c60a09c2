"""Random weights drawn in chunks, by any number of threads."""

import hashlib
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightweight.models import random_weights
from lightweight.models.random_weights import Drawing, drawn

SHAPES = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},  # scales some of its layers by their number
    "opt": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 128, "pad_token_id": 1},
    "qwen3_moe": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},  # draws and then computes with it
}


def build(model_type, **settings):
    config = AutoConfig.for_model(model_type, vocab_size=384, **SHAPES[model_type] | settings)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float16)


@pytest.mark.parametrize("model_type", SHAPES)
def test_what_is_drawn_is_distributed_as_the_networks_own_initialization_has_it(model_type):
    torch.manual_seed(0)
    own, ours = build(model_type).state_dict(), drawn(lambda: build(model_type), 0).state_dict()
    assert own.keys() == ours.keys()
    for name, tensor in own.items():
        expected, got = tensor.double(), ours[name].double()
        deviation = float(expected.std(correction=0))
        if deviation == 0 or torch.equal(expected, got):
            assert torch.equal(expected, got), name
            continue
        wide = 6 * deviation / tensor.numel() ** 0.5
        assert float(got.mean()) == pytest.approx(float(expected.mean()), abs=1.5 * wide), name
        assert float(got.std(correction=0)) == pytest.approx(deviation, abs=1.5 * wide), name


def test_the_numbers_follow_from_the_seed_and_not_from_the_cores(monkeypatch):
    monkeypatch.setattr(random_weights, "CHUNK", 1000)  # so that tensors have many, the last one smaller
    of_cores = []
    for cores in (1, 5):
        monkeypatch.setattr(random_weights, "cores", lambda cores=cores: cores)
        of_cores.append(drawn(lambda: build("opt"), 3).state_dict())
    once, again = of_cores
    assert all(torch.equal(once[name], again[name]) for name in once)
    other = drawn(lambda: build("opt"), 4).state_dict()
    assert not any(torch.equal(once[name], other[name]) for name in once if "proj.weight" in name)
    chunks = once["model.decoder.embed_tokens.weight"].flatten()[1000:].split(1000)
    assert len({bytes(chunk.numpy()) for chunk in chunks}) == len(chunks)


def test_a_tensor_that_is_read_is_drawn_at_once():
    with Drawing(0):
        whole = torch.empty(4, 4).normal_(0.0, 1.0)
        shifted = whole + 0
        rescaled = torch.empty(64).uniform_(-1.0, 1.0).mul_(2)
        part = torch.empty(4, 4).zero_()
        part[1].normal_()
    assert torch.equal(whole, shifted)
    assert float(whole.std()) > 0.1
    assert 1 < float(rescaled.abs().max()) <= 2
    assert int((part != 0).sum()) == 4


def test_what_is_written_over_is_not_drawn():
    """A linear layer draws itself before the network does, and a tied head is nobody's in the end."""
    filled = []

    class Noting(Drawing):
        def _fill(self, draw, start):
            filled.append(draw.tensor)
            super()._fill(draw, start)

    with Noting(0) as noting:
        layer = nn.Linear(8, 8)
        nn.init.normal_(layer.weight)
        nn.init.zeros_(layer.bias)
        nn.Linear(8, 8)
        noting.finish(layer.parameters())
    assert len(filled) == 1
    assert filled[0] is layer.weight
    assert not layer.bias.any()


SAME = """
import hashlib, torch
from lightweight.models.random_weights import Drawing
with Drawing(3) as drawing:
    tensor = torch.empty(2**18, dtype=torch.float16).normal_(0.0, 0.02)
    drawing.finish([tensor])
print(hashlib.sha256(tensor.numpy().tobytes()).hexdigest())
"""


def test_the_numbers_are_the_same_for_other_instruction_sets(monkeypatch):
    """torch's own differ between these two."""
    told = []
    for capability in ("default", "avx2"):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
        ran = subprocess.run([sys.executable, "-c", SAME], capture_output=True, text=True, check=True)
        told.append(ran.stdout.strip())
    assert told[0] == told[1]
    assert len(told[0]) == len(hashlib.sha256().hexdigest())


PEAK = """
import pathlib, resource, sys
from lightweight import models
from lightweight.models import Model
def written(layers):
    architecture = {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 1000}
    architecture |= {"num_hidden_layers": layers, "num_attention_heads": 8, "tie_word_embeddings": True}
    found, _ = models.find(Model(name="any", architecture=architecture), "random")
    models.write(found, pathlib.Path(sys.argv[1]) / str(layers), seed=0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small, large = written(1), written(5)
print(large - small)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_weights_are_in_the_hosts_memory_once_while_they_are_written(tmp_path):
    ran = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    written = [sum(file.stat().st_size for file in (tmp_path / n).glob("*.safetensors")) for n in ("1", "5")]
    assert written[1] > 150 * 2**20
    assert int(ran.stdout) < (written[1] - written[0]) * 1.3


def test_several_threads_draw_at_one_time(monkeypatch):
    monkeypatch.setattr(random_weights, "cores", lambda: 2)
    monkeypatch.setattr(random_weights, "CHUNK", 1024)
    both, fill = threading.Barrier(2), Drawing._fill

    def together(self, *chunk):
        both.wait(timeout=30)
        fill(self, *chunk)

    monkeypatch.setattr(Drawing, "_fill", together)
    weight = drawn(lambda: nn.Linear(64, 32, bias=False), 0).weight
    assert weight.std() > 0
