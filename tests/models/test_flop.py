"""What training needs, counted by hand as in the PaLM paper."""

import pytest

from conftest import MICRO
from lightweight import methods, models
from lightweight.methods import BASELINE, LORA
from lightweight.models import Model

WEIGHTS = 4 * 32**2 + 2 * 32 * 64 + 384 * 32
ATTENTION = 12 * 32


def network(model, method=BASELINE):
    import torch

    return methods.adapt(method, models.skeleton(models.configuration(model), torch.float32, None), upcast=True)


def test_six_operations_a_weight_twelve_a_pair_of_tokens_and_none_for_what_is_looked_up():
    assert models.flop_per_token(network(MICRO), 16) == 6 * WEIGHTS + ATTENTION * 16, "a tied head is multiplied with"


def test_four_for_a_frozen_weight():
    adapters = 2 * (8 * 32 + 32 * 8)
    assert models.flop_per_token(network(MICRO, LORA), 16) == 4 * WEIGHTS + 6 * adapters + ATTENTION * 16


def test_a_layer_looks_back_no_further_than_its_window():
    architecture = {"model_type": "gpt_neo", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "window_size": 4}
    architecture |= {"attention_types": [[["global", "local"], 1]], "vocab_size": 384, "max_position_embeddings": 64}
    neo = network(Model(name="neo", architecture=architecture))
    weights = 2 * (4 * 32**2 + 2 * 32 * 128) + 384 * 32
    assert models.flop_per_token(neo, 16) == 6 * weights + 12 * 32 * (16 + 4)


@pytest.mark.parametrize("seen", [1, 2])
def test_of_experts_those_count_that_a_token_sees(seen):
    architecture = {"model_type": "mixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    architecture |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 384, "num_local_experts": 4}
    found = network(Model(name="experts", architecture=architecture | {"num_experts_per_tok": seen}))
    weights = 4 * 32**2 + 4 * 32 + seen * 3 * 32 * 48 + 384 * 32
    assert models.flop_per_token(found, 8) == 6 * weights + 12 * 32 * 8


def counted(network, length) -> float:
    flop = models.flop_per_token(network, length)
    assert flop is not None
    return flop


def test_of_layers_that_look_at_no_pairs_none_count():
    architecture = {"model_type": "qwen3_next", "hidden_size": 32, "intermediate_size": 48, "vocab_size": 384}
    architecture |= {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    architecture |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 0}
    architecture |= {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
    hybrid = network(Model(name="hybrid", architecture=architecture | {"linear_value_head_dim": 16}))
    assert counted(hybrid, 24) - counted(hybrid, 16) == 12 * 2 * 16 * 8


def test_layers_whose_heads_differ_are_counted_one_by_one():
    from transformers import CONFIG_MAPPING

    if "gemma4_text" not in CONFIG_MAPPING or not hasattr(CONFIG_MAPPING["gemma4_text"](), "per_layer_config"):
        pytest.skip("this transformers has no configuration of each layer")
    architecture = {"model_type": "gemma4_text", "hidden_size": 32, "intermediate_size": 48, "vocab_size": 384}
    architecture |= {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    architecture |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 32}
    architecture |= {"sliding_window": 8, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 384}
    mixed = network(Model(name="mixed", architecture=architecture))
    assert counted(mixed, 24) - counted(mixed, 16) == 12 * 2 * 32 * 8
    assert counted(mixed, 8) - counted(mixed, 4) == 12 * 2 * (16 + 32) * 4


def test_what_has_no_heads_to_count_is_not_known_and_is_trained_all_the_same():
    architecture = {"model_type": "rwkv", "hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 48}
    recurrent = network(Model(name="rwkv", architecture=architecture | {"num_hidden_layers": 1, "vocab_size": 384}))
    assert models.flop_per_token(recurrent, 16) is None
