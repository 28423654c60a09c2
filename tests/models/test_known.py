"""The models that are known by name."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from lightweight import models


def configuration(name: str) -> PretrainedConfig:
    architecture = models.MODELS[name].architecture
    assert architecture is not None
    return AutoConfig.for_model(**architecture)


@pytest.mark.parametrize(
    ("name", "parameters"),
    # what the hub's own model pages and the papers' code count; tied embeddings once
    [
        ("opt-350m", 331_196_416),
        ("gpt-neo-1.3b", 1_315_575_808),
        ("smollm2-135m", 134_515_008),
        ("tinyllama-1.1b", 1_100_048_384),
        ("qwen3-0.6b", 596_049_920),
        ("llama-3.2-1b", 1_235_814_400),
        ("gemma-3-1b", 999_885_952),
        ("qwen2.5-7b", 7_615_616_512),
        ("llama-3.1-8b", 8_030_261_248),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_true_sizes_have_the_true_number_of_parameters(name, parameters):
    config = configuration(name)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize(("twin", "true"), [("opt-tiny", "opt-350m"), ("gpt-neo-tiny", "gpt-neo-1.3b")])
def test_twins_have_the_classes_and_quirks_of_the_true_sizes(twin, true):
    small, large = (configuration(name) for name in (twin, true))
    assert type(small) is type(large)
    for quirk in ("do_layer_norm_before", "enable_bias", "activation_function"):
        assert getattr(small, quirk, None) == getattr(large, quirk, None)
    if twin == "opt-tiny":
        assert small.word_embed_proj_dim < small.hidden_size
    else:
        assert set(small.attention_layers) == {"global", "local"}
