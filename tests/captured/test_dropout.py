from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, OPTConfig
from transformers.models.llama import LlamaConfig

from lightweight.captured import dropout

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "opt": OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, dropout=0.5, attention_dropout=0.5),
    "llama": LlamaConfig(**SMALL, intermediate_size=64, attention_dropout=0.5),
}
IDS = torch.arange(20).view(2, 10)


def loss_and_gradients(model):
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("twice", [False, True], ids=["kept", "computed twice"])
def test_a_network_in_training_drops_nothing_while_dropout_is_off(name, attention, twice):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention).eval()
    expected = loss_and_gradients(model)
    model.train()
    if twice:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert not torch.allclose(model(input_ids=IDS, labels=IDS).loss, expected[0], atol=1e-4)
    with dropout.off():
        found = loss_and_gradients(model)
        assert model.training
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(found, expected, strict=True))
    assert not torch.allclose(model(input_ids=IDS, labels=IDS).loss, expected[0], atol=1e-4)


def test_every_way_of_naming_the_input_and_the_share():
    x = torch.ones(1, 2, 4, 8)
    with dropout.off():
        assert torch.equal(functional.dropout2d(input=x, p=0.9, training=True), x)
        plain = functional.scaled_dot_product_attention(x, x, x)
        assert torch.equal(functional.scaled_dot_product_attention(x, x, x, None, 0.9), plain)
        assert torch.equal(functional.scaled_dot_product_attention(x, x, x, dropout_p=0.9), plain)
        attention = torch.nn.MultiheadAttention(8, 2, dropout=0.9)
        y = torch.ones(4, 1, 8, requires_grad=True)
        assert torch.equal(attention(y, y, y)[0], attention.eval()(y, y, y)[0])
        leaf = torch.ones(3, requires_grad=True)
        (2 * leaf).backward(torch.arange(3.0))
        assert leaf.grad is not None and torch.equal(leaf.grad, 2 * torch.arange(3.0))


def test_kernels_of_our_own_keep_everything_and_stay_the_ones_that_train():
    module = torch.nn.Dropout(0.5)
    assert dropout.probability(module, module.p) == 0.5
    with dropout.off():
        share = dropout.probability(module, module.p)
        assert share > 0
        kept, mask = torch.native_dropout(torch.ones(1000), share, True)
    assert mask.all() and torch.equal(kept, torch.ones(1000))
    assert dropout.probability(module, 0.0) == 0.0
    assert dropout.probability(module.eval(), 0.5) == 0.0
