"""The papers' count of what training needs, by hand."""

import pytest

from conftest import MICRO
from lightweight import models
from lightweight.methods import BASELINE, LORA
from lightweight.models import Model

WEIGHTS = 4 * 32**2 + 2 * 32 * 64 + 384 * 32
ATTENTION = 12 * 32


def network(model, method=BASELINE):
    import torch

    return method.adapt(models.skeleton(models.configuration(model), torch.float32, None), upcast=True)


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
