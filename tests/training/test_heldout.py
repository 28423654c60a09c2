from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from lightweight.corpus import IGNORED
from lightweight.methods import Method, MethodError, adapt
from lightweight.training import heldout, stock
from lightweight.training.heldout import heldout_loss
from training.test_stock import ADAPTERS, prepare, small

pytestmark = pytest.mark.usefixtures("without_gpu")


def test_heldout_loss_is_the_mean_over_answer_tokens_whatever_the_batch(trial, folder):
    trainer, rows, _, _ = prepare(trial, folder)
    rows = rows[:5]
    ids, mask, labels = (trainer.data_collator(rows)[name] for name in ("input_ids", "attention_mask", "labels"))
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=ids, attention_mask=mask).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED).item()
    for batch_size in (1, 2, 8):
        trainer.args.per_device_train_batch_size = batch_size
        assert heldout_loss(trainer, rows) == pytest.approx(expected, abs=1e-5)


def by_hand(network, rows):
    """Cross-entropy of each next token of an answer, row by row, from the logits of the row alone."""
    losses = []
    for row in rows:
        ids, labels = (torch.tensor(row[name])[None] for name in ("input_ids", "labels"))
        mask = torch.ones_like(ids)
        with torch.no_grad():
            logits = network.eval()(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -ids.shape[1] :]
        for place, token in enumerate(labels[0, 1:].tolist()):
            if token != IGNORED:
                losses.append(-logits[0, place].log_softmax(-1)[token].item())
    return sum(losses) / len(losses)


def own_loss(network, rows):
    batch = stock.Collate(0, 256)(rows)
    del batch[stock.TOKENS]
    with torch.no_grad():
        return network.eval()(**batch, use_cache=False).loss.item()


def test_heldout_loss_has_no_router_loss(trial, folder):
    network = small("mixtral", num_local_experts=4, router_aux_loss_coef=0.5, output_router_logits=True)
    trainer, rows, _, _ = prepare(trial, folder, network)
    expected = by_hand(network, rows[:5])
    assert heldout_loss(trainer, rows[:5]) == pytest.approx(expected, abs=1e-4)
    assert own_loss(network, rows[:5]) > expected + 0.5


@pytest.mark.parametrize("kind", ["bart", "mbart"])
def test_heldout_loss_is_of_the_next_token_where_the_network_shifts_no_labels(trial, folder, kind):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64}
    config = transformers.AutoConfig.for_model(kind, vocab_size=384, is_decoder=True, **sizes)
    config.is_encoder_decoder = False
    network = transformers.AutoModelForCausalLM.from_config(config)
    trainer, rows, _, _ = prepare(trial, folder, network)
    assert heldout_loss(trainer, rows[:5]) == pytest.approx(by_hand(network, rows[:5]), abs=1e-4)


@pytest.mark.parametrize("name", ADAPTERS)
def test_heldout_loss_is_cross_entropy_whatever_the_adapter_adds(trial, folder, name):
    method = Method(name=name, adapter=ADAPTERS[name])
    trial = replace(trial, max_length=64, method=method)
    trainer, rows, _, _ = prepare(trial, folder, adapt(method, small("llama")))
    found = heldout_loss(trainer, rows[:5])
    assert found == pytest.approx(by_hand(trainer.model, rows[:5]), abs=1e-4)
    if name == "adalora":  # which changes nothing yet, and adds its penalty to the network's own loss
        assert found == pytest.approx(by_hand(small("llama"), rows[:5]), abs=1e-4)
        assert own_loss(trainer.model, rows[:5]) > found + 0.1


def test_a_network_without_logits_has_no_heldout_loss(trial, folder):
    trainer, rows, _, _ = prepare(trial, folder)
    forward = trainer.model.forward
    trainer.model.forward = lambda **inputs: forward(**inputs) | {"logits": None}
    with pytest.raises(TypeError, match="gives no logits"):
        heldout_loss(trainer, rows)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 64}),
        ("mamba", {"state_size": 4}),
        ("gemma2", {"head_dim": 16, "final_logit_softcapping": 0.5}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.5}),
        ("bart", {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 64}),
    ],
)
def test_logits_of_a_few_tokens_exist_at_one_time_and_the_decoder_runs_once(trial, folder, monkeypatch, kind, settings):
    monkeypatch.setattr(heldout, "TOKENS_AT_ONCE", 6)
    network = small(kind, **settings)
    trainer, rows, _, _ = prepare(trial, folder, network)
    trainer.args.per_device_train_batch_size = 2
    monkeypatch.setattr(heldout, "_check_causal", lambda *_: None)
    expected = by_hand(network, rows[:5])
    heads, decoders = [], []
    network.get_output_embeddings().register_forward_hook(lambda head, given, logits: heads.append(logits.shape))
    network.get_decoder().get_input_embeddings().register_forward_hook(lambda *_: decoders.append(1))
    assert heldout_loss(trainer, rows[:5]) == pytest.approx(expected, abs=1e-5)
    assert len(decoders) == 3
    assert len(heads) > 3
    assert max(rows * columns for rows, columns, _ in heads) <= 6


@pytest.mark.parametrize(("is_decoder", "causal"), [(True, True), (False, False)])
def test_an_architecture_that_is_not_causal_is_refused_before_it_trains(trial, folder, is_decoder, causal):
    trainer, rows, _, _ = prepare(trial, folder, small("bert", is_decoder=is_decoder, initializer_range=0.5))
    with nullcontext() if causal else pytest.raises(MethodError, match=r"sees the tokens .*: take a causal model$"):
        heldout_loss(trainer, rows[:5])


def test_a_network_that_keeps_all_logits_is_measured_all_the_same(trial, folder, monkeypatch):
    monkeypatch.setattr(heldout, "TOKENS_AT_ONCE", 6)
    network = small("llama")
    trainer, rows, _, _ = prepare(trial, folder, network)
    expected = by_hand(network, rows[:5])
    of_class = network.forward
    network.forward = lambda input_ids, attention_mask, use_cache: of_class(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache
    )
    assert heldout_loss(trainer, rows[:5]) == pytest.approx(expected, abs=1e-5)
