from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoConfig, OPTConfig
from transformers.models.bloom import BloomConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig

from lightweight.captured import attention
from lightweight.captured.parts import PartError

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "max_position_embeddings": 128}
CONFIGS = {
    "gpt-neo": GPTNeoConfig(
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        attention_dropout=0.0,
        **SMALL,
    ),
    "opt": OPTConfig(
        num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0, **SMALL
    ),
    "llama": LlamaConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, **SMALL
    ),
    "mistral": MistralConfig(
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        sliding_window=8,
        **SMALL,
    ),
}


def build(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").train()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("time", [6, 8, 40], ids=["within the window", "the window", "beyond the window"])
def test_logits_and_gradients_are_those_of_eager_attention(name, time):
    model, reference = build(name), build(name)
    attention.install(model)
    assert model.config._attn_implementation == attention.NAME
    ids = torch.randint(64, (3, time), generator=torch.Generator().manual_seed(time))
    mask = torch.ones_like(ids)
    for each in (model, reference):
        each(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    ours, theirs = (m(input_ids=ids, attention_mask=mask, use_cache=False).logits for m in (model, reference))
    assert torch.allclose(ours, theirs, atol=1e-5)
    expected = dict(reference.named_parameters())
    for parameter_name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[parameter_name].grad, atol=1e-5), parameter_name


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_on_the_right_changes_no_token_before_it(name):
    model, reference = build(name), build(name)
    attention.install(model)
    ids = torch.randint(64, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    ours, theirs = (m(input_ids=ids, attention_mask=mask, use_cache=False).logits for m in (model, reference))
    assert torch.allclose(ours[0], theirs[0], atol=1e-5)
    assert torch.allclose(ours[1, :12], theirs[1, :12], atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_dialogue_is_as_if_it_were_alone(name):
    model = build(name)
    attention.install(model)
    first, second = torch.randint(64, (1, 13)), torch.randint(64, (1, 17))
    row = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(13), torch.arange(17)]).unsqueeze(0)
    dialogues = torch.tensor([[4] * 13 + [2] * 17])
    with attention.packed(dialogues):
        logits = model(
            input_ids=row, attention_mask=torch.ones_like(row), position_ids=positions, use_cache=False
        ).logits
    for part, ids in ((logits[:, :13], first), (logits[:, 13:], second)):
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        assert torch.allclose(part, alone, atol=1e-5)


def test_no_mask_is_made_where_causality_says_it_all(monkeypatch):
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watched(*arguments, attn_mask=None, is_causal=False, **options):
        seen.append((attn_mask is None, is_causal))
        return real(*arguments, attn_mask=attn_mask, is_causal=is_causal, **options)  # type: ignore[misc]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    ids = torch.randint(64, (2, 20))
    mask = torch.ones_like(ids)
    mask[:, 10:] = 0
    for name, expected in (
        ("opt", [(True, True)] * 2),
        ("llama", [(True, True)] * 2),
        ("gpt-neo", [(True, True), (False, False)]),  # the local layer's window is shorter than the row
        ("mistral", [(False, False)] * 2),
    ):
        model = build(name)
        attention.install(model)
        seen.clear()
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        assert seen == expected, name


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_gets_its_own_attention_back(name):
    model, expected = build(name), build(name)
    undo = attention.install(model)
    undo()
    assert model.config._attn_implementation == expected.config._attn_implementation
    assert [type(module) for module in model.modules()] == [type(module) for module in expected.modules()]
    ids = torch.randint(64, (2, 20))
    ours, theirs = (m(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for m in (model, expected))
    assert torch.equal(ours, theirs)


def test_a_model_that_asks_no_registry_keeps_its_own_attention():
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)
    model = AutoModelForCausalLM.from_config(config)
    own = model.config._attn_implementation
    with pytest.raises(PartError):
        attention.install(model)
    assert model.config._attn_implementation == own


def test_packed_rows_that_something_has_lengthened_are_refused_before_they_are_read():
    """Prompt tuning puts tokens of its own before a row. On a GPU, reading beyond it would end the process."""
    model = build("llama")
    attention.install(model)
    with attention.packed(torch.zeros(1, 10, dtype=torch.int64)), pytest.raises(PartError, match="10 tokens are 14"):
        model(inputs_embeds=torch.zeros(1, 14, 32), use_cache=False)
