"""One rank of several, traced alone, against ranks that talk to each other."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import distributed
from training.test_stock import Unattended
from transformers import AutoModelForCausalLM

from lightweight import models
from lightweight.child import helper
from lightweight.corpus import Corpus, Row, Rows
from lightweight.forecast import tracer
from lightweight.forecast.fake_ranks import rank_zero_of
from lightweight.methods import BASELINE, BASELINE_CAPTURED, LORA, QLORA, QLORA_CAPTURED
from lightweight.models import GPT_NEO_TINY, OPT_TINY
from lightweight.targets import HOPPER, NATIVE
from lightweight.training import stock
from lightweight.training.meter import Meter
from lightweight.trial import Trial

pytestmark = pytest.mark.xdist_group("traces")

ON_A_CPU = {"ACCELERATE_TORCH_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
assert OPT_TINY.architecture is not None
UNEVEN = replace(OPT_TINY, architecture={**OPT_TINY.architecture, "vocab_size": 385, "num_hidden_layers": 2})


def trial(model, method, world_size, placement="sharded", **changes):
    return Trial(
        model=model,
        method=method,
        target=NATIVE,
        corpus=Corpus(train=(), heldout=(), digest=""),
        world_size=world_size,
        placement=placement,
        max_length=32,
        **changes,
    )


def blocks(tensors):
    """What the caching allocator gives for the local parts of `tensors`, each storage once: blocks of 512 bytes."""
    storages = {s._cdata: s for t in tensors if (s := getattr(t, "_local_tensor", t).untyped_storage()).nbytes()}
    return sum(-(-storage.nbytes() // 512) * 512 for storage in storages.values())


def held_by_rank(rank, of, folder):
    """What a real rank holds of weights and of optimizer state after a step, the others on the same machine."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": of.world_size, "LOCAL_WORLD_SIZE": of.world_size}
    os.environ.update({name: str(value) for name, value in variables.items()} | ON_A_CPU)
    store = distributed.FileStore(str(folder / "store"), of.world_size)  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=of.world_size)
    row: Row = {name: np.ones(of.max_length, np.int32) for name in ("input_ids", "labels")}  # type: ignore[assignment]
    network = AutoModelForCausalLM.from_config(models.configuration(of.model), dtype=torch.float32)
    with mock.patch.object(PartialState, "_prepare_backend", return_value=("gloo", DistributedType.MULTI_GPU)):
        meter = Meter(torch.device("cpu"), start_seconds=0.0)
        trainer = stock.make_trainer(replace(of, max_steps=1), network, Rows([row] * 8, 0), meter, Unattended(), folder)
        trainer.train()
    assert trainer.model is not None and trainer.optimizer is not None
    state = [value for values in trainer.optimizer.state.values() for value in values.values()]
    distributed.barrier()
    return blocks([*trainer.model.parameters(), *trainer.model.buffers()]), blocks(state)


def test_the_first_rank_holds_what_it_holds_among_others(tmp_path):
    of = trial(UNEVEN, BASELINE, 2)

    def held(rank):
        folder = tmp_path / str(rank)
        folder.mkdir()
        return helper.call(held_by_rank, folder, rank, of, tmp_path)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(held, range(2))
    assert first > second, "386 rows of 385"
    peak = tracer.trace(of, HOPPER).replay()
    assert peak.by_cause["optimizer"] == first[1]
    scalars = peak.by_cause["weights"] - first[0]
    assert 0 <= scalars <= 8 * 512, "the Trainer's own, from before the first step"


@pytest.fixture(scope="module")
def peaks():
    """Of a twin by each method, the trace's peak by the number of ranks."""
    return {
        (method.name, world_size): tracer.trace(trial(GPT_NEO_TINY, method, world_size), HOPPER).replay()
        for method in (BASELINE, LORA, QLORA)
        for world_size in (1, 2)
    }


@pytest.mark.parametrize("method", ["baseline", "lora", "qlora"])
def test_two_ranks_hold_less_each_and_gather_from_each_other(peaks, method):
    one, two = peaks[method, 1], peaks[method, 2]
    assert one.by_cause["gathered"] == 0
    assert two.by_cause["gathered"] > 0
    if method != "qlora":  # whose passes have as many rows on a rank, and are fewer
        assert two.allocated_bytes < one.allocated_bytes
    assert sum(two.by_cause.values()) == two.allocated_bytes <= two.reserved_bytes
    for cause in ("weights", "optimizer"):
        assert one.by_cause[cause] / 2 <= two.by_cause[cause] < one.by_cause[cause]


def test_what_belongs_to_packed_weights_is_whole_on_every_rank(peaks):
    assert peaks["qlora", 1].by_cause["quantization state"] == peaks["qlora", 2].by_cause["quantization state"] > 0


@pytest.fixture(scope="module")
def sharded():
    """The trace of the first of two ranks."""
    return tracer.trace(trial(OPT_TINY, BASELINE, 2), HOPPER)


def test_ranks_gather_and_reduce_in_streams_of_their_own_and_parameters_are_counted_whole(sharded):
    assert sharded.parameters == sharded.trainable_parameters == 503_296
    causes = {(stream, sharded.causes[name]) for name, stream in sharded.streams.items()}
    assert causes == {(1, "gathered"), (2, "gradients")}


def test_every_layer_is_gathered_anew_and_given_back(sharded):
    ended = {name for name, size in sharded.events if size == 0}
    layer = 4 * 128 * 512  # fc1's whole weight, fp32
    gathered = [n for n, size in sharded.events if size == layer and sharded.causes[n] == "gathered"]
    passes = 3 * 2  # steps, each forward and backward
    assert len(gathered) == 2 * 2 * passes, "fc1 and fc2 of two layers"
    assert set(gathered) <= ended


def test_nothing_of_it_is_left_behind():
    before = dict(os.environ)
    with rank_zero_of(2):
        assert (distributed.get_rank(), distributed.get_world_size()) == (0, 2)
    tracer.trace(trial(GPT_NEO_TINY, BASELINE, 2), HOPPER)
    assert dict(os.environ) == before
    assert not distributed.is_initialized()
    assert PartialState().num_processes == 1


@pytest.mark.parametrize("method", [BASELINE, LORA, QLORA], ids=lambda method: method.name)
def test_a_replica_holds_the_network_and_its_gradients_once_more_in_buckets(peaks, method):
    one, two = peaks[method.name, 1], tracer.trace(trial(GPT_NEO_TINY, method, 2, "replicated"), HOPPER)
    peak = two.replay()
    assert peak.by_cause["gathered"] == 0
    assert peak.by_cause["optimizer"] == one.by_cause["optimizer"]
    assert peak.by_cause["quantization state"] == one.by_cause["quantization state"]
    assert peak.by_cause["weights"] == pytest.approx(one.by_cause["weights"], rel=0.02)
    more = peak.by_cause["gradients"] - one.by_cause["gradients"]
    assert more == pytest.approx(4 * two.trainable_parameters, rel=0.05)


@pytest.mark.parametrize("method", [BASELINE_CAPTURED, QLORA_CAPTURED], ids=lambda method: method.name)
def test_a_rank_of_a_captured_step_holds_what_one_does_for_its_share_of_the_rows(method):
    """A step that grows with the ranks is to each what its own is to one, but for what it sends."""
    one = tracer.trace(trial(GPT_NEO_TINY, method, 1, "replicated"), HOPPER)
    two = tracer.trace(trial(GPT_NEO_TINY, method.scaled(2, "batch"), 2, "replicated"), HOPPER)

    def last(trace, cause):
        """Bytes of `cause` that were allocated in the graph's pool."""
        pool = {name for name, stream in trace.streams.items() if stream in trace.kept}
        return sum(size for name, size in trace.events if name in pool and trace.causes[name] == cause)

    assert one.replay().by_cause["weights"] == two.replay().by_cause["weights"]
    assert one.replay().by_cause["optimizer"] == two.replay().by_cause["optimizer"]
    sent = last(two, "gradients") - last(one, "gradients")
    assert 4 * two.trainable_parameters <= sent <= 4 * two.trainable_parameters * 1.2 + 2**16
    assert last(one, "activations") == last(two, "activations")
