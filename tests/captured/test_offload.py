"""Layers whose activations lie on the host: the same loss and gradients, bit for bit, and nothing held twice."""

import gc
import weakref

import pytest
import torch

from lightweight.captured import offload
from lightweight.internals import torch as torch_internals
from lightweight.internals import transformers as transformers_internals
from tests.captured.test_fused import build, loss_and_gradients

AGAIN = transformers_internals.recomputing(keeps_random_numbers=False)


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST_BYTES", 1)


@pytest.fixture
def network():
    return build("llama")


def taken(network, count=2, by=None):
    """The offload of the first layers, each called `by` another."""
    layers = transformers_internals.recomputable_layers(network)[:count]
    host = offload.Offload(network.get_base_model(), layers)
    transformers_internals.called_by({layer: host.calling(layer, by) for layer in layers})
    return host


def again(network):
    network.zero_grad()
    return loss_and_gradients(network)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("by", [None, AGAIN], ids=["kept", "computed twice"])
def test_loss_and_gradients_are_the_same_bit_for_bit(network, count, by):
    loss, gradients = loss_and_gradients(build("llama"))
    host = taken(network, count, by)
    for _ in range(3):
        found, of_it = again(network)
        assert found == loss
        assert all(torch.equal(gradient, of_it[name]) for name, gradient in gradients.items())
        assert not host._alive  # nothing outlives its backward pass


@pytest.mark.parametrize("by", [None, AGAIN], ids=["kept", "computed twice"])
def test_what_a_layer_keeps_is_on_the_host_until_its_backward_pass(network, by):
    """But for the newest layer's, which is on its way."""
    host = taken(network, by=by)
    ids = torch.ones(1, 9, dtype=torch.long, device=network.device)
    loss = network(input_ids=ids, labels=ids, use_cache=False).loss
    first, second = host._newest.before, host._newest
    assert first.all_kept()
    assert all(kept.here is None and kept.there is not None for kept in first.all_kept())
    assert all(kept.here is not None and kept.there is not None for kept in second.all_kept())
    if by is AGAIN:
        assert [kept.there.numel() for kept in first.all_kept()] == [9 * 32]  # the layer's input alone
    loss.backward()
    assert not host._alive


def test_of_a_pass_that_was_broken_off_nothing_is_held_while_it_rests(network):
    host = taken(network)
    ids = torch.ones(1, 9, dtype=torch.long, device=network.device)
    loss = network(input_ids=ids, labels=ids, use_cache=False).loss
    kept = [weakref.ref(each.here) for each in host._newest.all_kept()]
    del loss
    assert kept and all(each() is not None for each in kept), "whose copies are on their way"
    with host.resting():
        assert not any(each() is not None for each in kept)
        network(input_ids=ids, labels=ids, use_cache=False)
        assert host._newest is None
    assert again(network)[0] == loss_and_gradients(build("llama"))[0]


def test_weights_and_what_all_layers_are_given_stay_where_they_are(network, monkeypatch):
    tables = []
    rotary = network.get_base_model().model.rotary_emb
    rotary.register_forward_hook(lambda _, __, result: tables.extend(result))
    pack = offload.Offload._pack
    moved: list[int] = []
    stayed: list[int] = []

    def packed(self, own, tensor):
        result = pack(self, own, tensor)
        (stayed if result is tensor else moved).append(torch_internals.address(tensor.untyped_storage()))
        return result

    monkeypatch.setattr(offload.Offload, "_pack", packed)
    taken(network)
    again(network)
    shared = {torch_internals.address(tensor.untyped_storage()) for tensor in (*network.parameters(), *tables)}
    assert len(tables) == 2
    assert moved
    assert not shared.intersection(moved)
    assert shared.issuperset(stayed)
    assert shared.intersection(stayed).issuperset(torch_internals.address(table.untyped_storage()) for table in tables)


def test_a_second_pass_before_the_first_has_gone_back_takes_memory_of_its_own(network):
    """As a method's own loss may: what lies on the host is not written over."""
    ids = [torch.full((1, 9), token, device=network.device) for token in (3, 5)]
    reference = build("llama")
    sum(reference(input_ids=each, labels=each, use_cache=False).loss for each in ids).backward()
    expected = {name: weight.grad for name, weight in reference.named_parameters() if weight.requires_grad}
    host = taken(network)
    losses = [network(input_ids=each, labels=each, use_cache=False).loss for each in ids]
    sum(losses).backward()
    for name, weight in network.named_parameters():
        if weight.requires_grad:
            assert torch.equal(weight.grad, expected[name]), name
    before = host._host._taken
    again(network)
    assert host._host._taken < before  # and the next pass begins where the first one did


def test_a_pass_that_never_goes_back_leaves_nothing(network):
    host = taken(network)
    ids = torch.ones(1, 9, dtype=torch.long, device=network.device)
    loss = network(input_ids=ids, labels=ids, use_cache=False).loss
    del loss
    gc.collect()
    again(network)
    assert not host._alive


def test_evaluation_moves_nothing(network):
    host = taken(network)
    ids = torch.ones(1, 9, dtype=torch.long, device=network.device)
    with torch.no_grad():
        network.eval()(input_ids=ids)
        network.train()(input_ids=ids)
    assert host._newest is None


def test_small_tensors_stay(network, monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST_BYTES", 2**20)
    host = taken(network)
    again(network)
    assert not host._host._chunks


class Written:
    """A ledger."""

    def __init__(self):
        self.host, self.copies = 0, {True: 0, False: 0}

    def on_the_host(self, size):
        self.host += size
        return torch.zeros(size, dtype=torch.uint8)

    def copied(self, size, *, to_host):
        self.copies[to_host] += size


def test_a_ledger_is_told_of_memory_and_copies():
    """Of an embedding, of pinned memory, and of what goes there and back; the newest layer's has never left."""
    network, ledger = build("llama").cpu(), Written()
    embedding = network.get_input_embeddings().weight
    with offload.told_to(ledger):
        offload.keep_embedding_on_the_host(network)
        assert ledger.host == embedding.nbytes
        taken(network)
        again(network)
    assert ledger.host == embedding.nbytes + offload.CHUNK_BYTES
    assert ledger.copies[True] > ledger.copies[False] > 0


def test_an_embedding_that_the_head_has_as_well_stays():
    network, ledger = build("gemma2").cpu(), Written()
    assert network.config.tie_word_embeddings
    with offload.told_to(ledger):
        offload.keep_embedding_on_the_host(network)
    assert ledger.host == 0
