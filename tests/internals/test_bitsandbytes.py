"""What is private to bitsandbytes is still there."""

import pytest
import torch

from lightweight.internals import bitsandbytes as internals
from lightweight.preload import peft  # noqa: F401  # before what may ask for the GPU

import bitsandbytes  # isort: skip

LAYERS = {
    "Linear4bit": lambda: bitsandbytes.nn.Linear4bit(64, 32, bias=False, quant_type="nf4"),
    "Linear8bitLt": lambda: bitsandbytes.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False),
}


def test_its_packed_layers_have_these_names():
    assert set(internals.LAYERS) == LAYERS.keys()
    assert all(hasattr(bitsandbytes.nn, name) for name in internals.LAYERS)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_whose_weight_has_not_been_packed_is_told_from_one_whose_weight_has(kind):
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), LAYERS[kind]())
    assert list(internals.layers_without_scales(network)) == ["1"]
    network[1].to("cpu")  # packs it
    assert list(internals.layers_without_scales(network)) == []
    assert internals.count_elements(network[1].weight) == 64 * 32
    assert internals.count_elements(network[0].weight) == 16


def test_no_layer_is_repacked_on_a_cpu():
    layer = LAYERS["Linear4bit"]()
    assert hasattr(layer, "support_avx512bf16_for_cpu")
    layer.support_avx512bf16_for_cpu = True
    internals.never_repack(torch.nn.Sequential(layer))
    assert not layer.support_avx512bf16_for_cpu
