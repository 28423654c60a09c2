"""Real ranks: processes that talk through gloo on a CPU, through NCCL where there are GPUs enough."""

import copy
import os
import signal
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pynvml
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.utils.data import BatchSampler
from transformers import TrainingArguments

from conftest import torchruns
from lightweight import models, targets
from lightweight.captured import reference
from lightweight.child import failure, worker
from lightweight.child.owner import Child
from lightweight.internals import torch as torch_internals
from lightweight.internals.multiprocessing import forkserver_pid
from lightweight.methods import BASELINE, METHODS, QLORA, Method
from lightweight.training import ranks
from lightweight.trial import Completed, Crashed, Measurements, OutOfMemory, TimedOut, Trial, of_all_ranks

assert models.OPT_TINY.architecture is not None
TINY = models.OPT_TINY.architecture | {"dropout": 0.0, "num_hidden_layers": 2, "hidden_size": 64, "ffn_dim": 128}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Large enough to be 4-bit, without dropout."""
    found, _ = models.find(models.Model(name="tiny", architecture=TINY))
    return models.write(found, tmp_path_factory.mktemp("tiny"), seed=0)


GPUS = torch.cuda.device_count() if torch.cuda.device_count() > 1 else 0
pytestmark = [] if GPUS else [pytest.mark.usefixtures("without_gpu")]
WORLDS = [size for size in (2, 4) if not GPUS or size <= GPUS]
EQUAL = 1e-4 if not GPUS else 1e-2
"""How far apart losses of one and of several ranks may be: in fp32 by rounding, in half precision on a GPU by more."""


@pytest.fixture
def trial(tiny, small_corpus):
    index, target = (0, targets.NATIVE) if GPUS else (None, targets.CPU)
    job = {"corpus": small_corpus, "max_steps": 20, "max_length": 64}
    return Trial(model=tiny, method=BASELINE, target=target, device_index=index, **job)


def quick(method: Method, **arguments) -> Method:
    """`method` without dropout, at a rate at which twenty steps make a difference."""
    adapter = copy.deepcopy(method.adapter)
    if adapter is not None:
        vars(adapter)["lora_dropout"] = 0.0
    arguments = {**method.training_arguments, "learning_rate": 2e-3, **arguments}
    return replace(method, adapter=adapter, training_arguments=arguments)


def outcome(trial: Trial, folder: Path, **options):
    folder.mkdir()
    with Child(trial, folder, **options) as child:
        return child.finish()


def on_gpus() -> list[int]:
    """Processes that hold memory of any GPU, by NVML."""
    if not GPUS:
        return []
    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(GPUS)]
    return [process.pid for handle in handles for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)]


PLACED = [
    (name, placement)
    for name, method in METHODS.items()
    for placement in ("replicated", "sharded")
    if placement == "replicated" or method.captured_step is None
]


@pytest.mark.parametrize(("name", "placement"), PLACED)
def test_several_ranks_have_the_losses_of_one_and_save_the_same_file(trial, tmp_path, name, placement):
    """20 steps over 20 pairs, so that every third step is short."""
    trial = replace(trial, method=quick(METHODS[name]), placement=placement)
    found = {size: outcome(replace(trial, world_size=size), tmp_path / str(size)) for size in (1, *WORLDS)}
    (weights,) = {path.name for path in (tmp_path / "1" / "saved").glob("*.safetensors")}
    one = load_file(tmp_path / "1" / "saved" / weights)
    for size, ended in found.items():
        assert isinstance(ended, Completed), ended
        assert ended.measured.train_loss == pytest.approx(found[1].measured.train_loss, abs=EQUAL)
        assert ended.measured.heldout_loss_after == pytest.approx(found[1].measured.heldout_loss_after, abs=EQUAL)
        saved = load_file(tmp_path / str(size) / "saved" / weights)
        assert saved.keys() == one.keys()
        for key, tensor in saved.items():
            assert tensor.dtype == one[key].dtype
            if not GPUS:
                torch.testing.assert_close(tensor, one[key], atol=1e-3, rtol=1e-2)
    losses = found[1].measured.train_loss
    assert len(losses) == 20 and max(losses) - min(losses) > 0.01  # it learned something that could have differed
    assert [len(found[size].measured.rank_peak_allocated_bytes) for size in WORLDS] == WORLDS


@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_gradients_of_several_ranks_are_as_large_as_those_of_one(trial, tmp_path, placement):
    """AdamW and clipping would take any multiple of them for the same."""
    method = quick(BASELINE, optim="sgd", max_grad_norm=0.0, learning_rate=0.5)
    trial = replace(trial, method=method, max_steps=6, placement=placement)
    one, two = (outcome(replace(trial, world_size=size), tmp_path / str(size)) for size in (1, 2))
    assert two.measured.train_loss == pytest.approx(one.measured.train_loss, abs=EQUAL)
    assert max(one.measured.train_loss) - min(one.measured.train_loss) > 0.01


@pytest.mark.parametrize(
    ("name", "placement"), [("qlora", "replicated"), ("lora", "sharded"), ("lora-captured", "replicated")]
)
@pytest.mark.skipif(bool(GPUS), reason="fp32 on a CPU is what tells rounding from a mistake")
def test_a_step_that_grows_with_two_ranks_is_that_of_one_with_twice_the_passes(trial, tmp_path, name, placement):
    method = quick(METHODS[name]).scaled(2, "batch-sqrt")
    assert method.sequences_per_step == 2 * METHODS[name].sequences_per_step
    assert method.on_rank(2).sequences_per_step == METHODS[name].sequences_per_step
    trial = replace(trial, method=method, max_steps=6, placement=placement)
    one, two = (outcome(replace(trial, world_size=size), tmp_path / str(size)) for size in (1, 2))
    assert isinstance(two, Completed), two
    assert two.measured.train_loss == pytest.approx(one.measured.train_loss, abs=1e-5)
    assert two.measured.heldout_loss_after == pytest.approx(one.measured.heldout_loss_after, abs=1e-5)
    assert two.measured.step_tokens == one.measured.step_tokens
    assert abs(one.measured.heldout_loss_after - one.measured.heldout_loss_before) > 1e-3


def test_half_precision_weights_get_the_sums_of_ranks_in_their_masters(trial, tmp_path):
    """In two passes on each of two ranks: the first writes into the masters' gradients, the last adds and is sent."""
    arguments = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    method = replace(quick(METHODS["lora-captured"], **arguments), weights_dtype="bfloat16")
    trial = replace(trial, method=method, max_steps=6)
    one, two = (outcome(replace(trial, world_size=size), tmp_path / str(size)) for size in (1, 2))
    assert isinstance(two, Completed), two
    assert two.measured.capture_note == one.measured.capture_note, "captured, both"
    learned = one.measured.heldout_loss_before - one.measured.heldout_loss_after
    assert abs(learned) > 1e-3
    assert two.measured.heldout_loss_after == pytest.approx(one.measured.heldout_loss_after, abs=abs(learned) / 10)
    assert two.measured.train_loss == pytest.approx(one.measured.train_loss, abs=1e-4)


def test_what_a_learning_rate_becomes_is_as_the_scale_says():
    method = replace(BASELINE, training_arguments={**BASELINE.training_arguments, "learning_rate": 1e-3})
    rates = {scale: method.scaled(4, scale) for scale in ("fixed", "batch", "batch-sqrt", "batch-linear")}
    assert {scale: of.training_arguments["learning_rate"] for scale, of in rates.items()} == {
        "fixed": 1e-3,
        "batch": 1e-3,
        "batch-sqrt": 2e-3,
        "batch-linear": 4e-3,
    }
    assert [of.sequences_per_step for of in rates.values()] == [8, 32, 32, 32]
    assert BASELINE.scaled(4, "batch-linear").training_arguments["learning_rate"] == 2e-4, "of transformers' default"
    assert rates["fixed"] is method.scaled(1, "batch-linear") is method
    assert [of.changed.get("scale") for of in rates.values()] == [None, "batch", "batch-sqrt", "batch-linear"]


def test_gradients_are_sent_while_the_backward_pass_still_makes_others(monkeypatch):
    """In one order, the last layer's first; a weight that no pass reaches goes last, as zeros."""
    sent: list[torch.Tensor] = []

    class Sent:
        def wait(self) -> None: ...

    def all_reduce(flat: torch.Tensor, async_op: bool) -> Sent:
        sent.append(flat.clone())
        flat *= 2  # as if the other rank had the same
        return Sent()

    monkeypatch.setattr(ranks.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(ranks, "BUCKET_BYTES", 1)
    first, unreached, last = (torch.nn.Parameter(torch.full((2,), value)) for value in (2.0, 3.0, 5.0))
    when: list[int] = []

    class Looking(torch.autograd.Function):
        """Between the two layers, tells how many buckets have been sent when the backward pass gets there."""

        @staticmethod
        def forward(_, x):
            return x.clone()

        @staticmethod
        def backward(_, grad):
            when.append(len(sent))
            return grad

    def gradients(weights):
        for weight in weights:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        return [weight.grad for weight in weights]

    loss = torch.tensor(7.0)
    reducer = ranks.Reducer([first, unreached, last], gradients, [loss])
    with reducer.adding_up():
        (Looking.apply(first) * last).sum().backward()
    assert when == [1]
    assert [flat.tolist() for flat in sent] == [[7.0, 2.0, 2.0], [0.0, 0.0], [5.0, 5.0]]
    assert last.grad is not None and first.grad is not None
    assert (loss.item(), last.grad.tolist(), first.grad.tolist()) == (14.0, [4.0, 4.0], [10.0, 10.0])
    assert not first._post_accumulate_grad_hooks, "none is left behind"


def test_a_captured_step_of_shards_is_refused(trial):
    with pytest.raises(ValueError, match="a captured step has the whole network on every rank: leave out --placement"):
        replace(trial, method=METHODS["lora-captured"], world_size=2, placement="sharded")


def adamw_by_names(network, arguments):
    rates = {"lora_A": arguments.learning_rate, "lora_B": 8 * arguments.learning_rate}
    groups = [
        {"params": [w for name, w in network.named_parameters() if of in name], "lr": rate}
        for of, rate in rates.items()
    ]
    return torch.optim.AdamW(groups, weight_decay=0.0)


@pytest.mark.parametrize(
    "method",
    [
        quick(replace(BASELINE, optimizer=(torch.optim.SGD, {"momentum": 0.9})), learning_rate=0.1),
        quick(replace(METHODS["lora-captured"], optimizer=adamw_by_names)),
    ],
    ids=["a class that works element by element", "captured"],
)
def test_an_optimizer_of_ones_own_trains_on_several_ranks_as_on_one(trial, tmp_path, method):
    trial = replace(trial, method=method, max_steps=6)
    one, two = (outcome(replace(trial, world_size=size), tmp_path / str(size)) for size in (1, 2))
    assert isinstance(two, Completed), two
    assert two.measured.train_loss == pytest.approx(one.measured.train_loss, abs=EQUAL)
    assert two.measured.heldout_loss_after == pytest.approx(one.measured.heldout_loss_after, abs=EQUAL)
    assert one.measured.heldout_loss_after != pytest.approx(one.measured.heldout_loss_before, abs=EQUAL)


@pytest.mark.parametrize("adapter", [None, METHODS["lora"].adapter], ids=["whole", "lora"])
def test_labels_smoothed_on_several_ranks_are_those_of_one(trial, tmp_path, adapter):
    """The Trainer does not know the network's class behind FSDP2's, and would not shift the labels."""
    method = quick(replace(BASELINE, adapter=adapter), label_smoothing_factor=0.3)
    trial = replace(trial, method=method, max_steps=6)
    one, two = (outcome(replace(trial, world_size=size), tmp_path / str(size)) for size in (1, 2))
    assert two.measured.train_loss == pytest.approx(one.measured.train_loss, abs=EQUAL)
    assert two.measured.heldout_loss_after == pytest.approx(one.measured.heldout_loss_after, abs=EQUAL)


@pytest.mark.parametrize("name", ["baseline", "lora-captured"])
def test_tokens_of_several_ranks_are_those_of_one(trial, tmp_path, name):
    """7 pairs do not go round: a row that only fills a pass has no real tokens."""
    small = replace(trial.corpus, train=trial.corpus.train[:7])
    trial = replace(trial, method=quick(METHODS[name]), corpus=small, max_steps=4)
    one, two = (outcome(replace(trial, world_size=size), tmp_path / str(size)).measured for size in (1, 2))
    assert two.step_tokens == one.step_tokens
    assert len(one.step_tokens) == 4
    assert all(real <= padded for real, padded in zip(two.step_tokens, two.step_padded_tokens, strict=True))


@pytest.mark.parametrize("method", [BASELINE, METHODS["lora-captured"]], ids=["baseline", "lora-captured"])
def test_a_corpus_smaller_than_the_world_trains(trial, tmp_path, method):
    small = replace(trial.corpus, train=trial.corpus.train[: WORLDS[-1] - 1])
    trial = replace(trial, method=quick(method), corpus=small, max_steps=4)
    one, all_ = (outcome(replace(trial, world_size=size), tmp_path / str(size)) for size in (1, WORLDS[-1]))
    assert isinstance(all_, Completed), all_
    assert all_.measured.train_loss == pytest.approx(one.measured.train_loss, abs=EQUAL)


def test_more_ranks_than_a_step_has_sequences_are_refused(trial):
    with pytest.raises(ValueError, match="method baseline trains 8 sequences a step, which 9 ranks cannot share"):
        replace(trial, world_size=9)


@pytest.mark.parametrize(("world_size", "passes"), [(2, 2), (3, 2), (4, 1), (8, 1)])
def test_a_ranks_method_sees_no_more_in_a_pass_and_all_of_a_step_together(world_size, passes):
    own = QLORA.on_rank(world_size)
    assert own.sequences_per_pass <= QLORA.sequences_per_pass
    assert own.training_arguments["gradient_accumulation_steps"] == passes
    assert own.sequences_per_step * world_size >= QLORA.sequences_per_step
    assert QLORA.on_rank(1) is QLORA


def test_every_row_is_dealt_once_and_steps_are_those_of_one_rank():
    rows = list(range(20))
    drawn = ranks.SeedableRandomSampler(rows, data_seed=3)
    deal = ranks.Deal(ranks.SeedableRandomSampler(rows, data_seed=3), step=8, batch=3, world_size=2, nothing=20)
    for epoch in range(2):
        drawn.set_epoch(epoch)
        deal.set_epoch(epoch)
        steps = list(BatchSampler(drawn, 8, drop_last=False))
        numbers = list(deal)
        assert len(numbers) == len(deal) == 30  # two passes of 2 x 3 for each of two full steps, one for the short one
        for step, slots in zip(steps, (numbers[:12], numbers[12:24], numbers[24:]), strict=True):
            assert sorted(number for number in slots if number != 20) == sorted(step)


def test_a_killed_rank_ends_the_trial_as_a_crash_of_that_rank_and_leaves_no_process(trial, tmp_path):
    killed_at = []

    def kill(_: Trial, step: int, __: float | None) -> None:
        if step == 4:
            killed_at.append(time.monotonic())
            os.kill(child.pids[1], signal.SIGKILL)

    (tmp_path / "killed").mkdir()
    with Child(replace(trial, world_size=2), tmp_path / "killed", on_step=kill) as child:
        ended = child.finish()
        seconds = time.monotonic() - killed_at[0]
        assert seconds < 5
        print(f"known {seconds:.2f} s after the kill")
    assert isinstance(ended, Crashed)
    assert ended.rank == 1
    assert ended.reason.startswith("rank 1: killed by SIGKILL")
    assert len(ended.measured.train_loss) == 3  # the round before it is not lost
    for pid in child.pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not set(child.pids) & set(on_gpus())
    assert isinstance(outcome(replace(trial, max_steps=1, world_size=2), tmp_path / "next"), Completed)


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_does_not_answer_is_the_one_that_timed_out(trial, tmp_path, stopped):
    (tmp_path / "trial").mkdir()
    with Child(replace(trial, world_size=2), tmp_path / "trial") as child:
        child.round()
        child.silence_seconds = 2.0
        os.kill(child.pids[stopped], signal.SIGSTOP)
        began = time.monotonic()
        child.round()
        assert time.monotonic() - began < 8
    assert isinstance(child.outcome, TimedOut)
    assert child.outcome.rank == stopped
    assert child.outcome.reason == f"rank {stopped}: reported nothing for 2 s and was killed"
    assert f"rank {stopped}: does not answer" in child.outcome.details
    for pid in child.pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


class Sleepy(Trial):
    """A trial whose second rank sleeps for ever before it builds anything."""

    @property
    def running_method(self) -> Method:
        if os.environ.get("RANK") == "1":
            time.sleep(1e6)
        return super().running_method


def test_a_rank_that_sleeps_for_ever_is_named_with_where_it_sleeps(trial, tmp_path):
    sleepy = Sleepy(**vars(replace(trial, world_size=2)))
    ended = outcome(sleepy, tmp_path / "trial", silence_seconds=8)
    assert isinstance(ended, TimedOut)
    assert ended.rank == 1
    assert ended.phase == "build"
    assert "running_method" in ended.details


class Faulty(Trial):
    """A trial whose second rank raises while it builds."""

    @property
    def running_method(self) -> Method:
        if os.environ.get("RANK") == "1":
            raise ZeroDivisionError("on rank 1 alone")
        return super().running_method


class Full(Trial):
    """A trial whose second rank runs out of a GPU's memory while it builds."""

    @property
    def running_method(self) -> Method:
        if os.environ.get("RANK") == "1":
            failure._allocator_ran_out = lambda device: True  # a CPU has no allocator that could
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 394.00 MiB.")
        return super().running_method


def test_out_of_memory_on_one_rank_is_that_with_the_rank(trial, tmp_path):
    job = replace(trial, world_size=2, target=targets.named("16GiB"))
    ended = outcome(Full(**vars(job)), tmp_path / "trial")
    assert isinstance(ended, OutOfMemory)
    assert ended.rank == 1
    assert ended.phase == "build"
    assert ended.requested_bytes == 394 * 2**20
    assert ended.reason.startswith("rank 1: OutOfMemoryError: CUDA out of memory")
    assert len(ended.measured.rank_peak_allocated_bytes) == 2


def test_an_exception_of_one_rank_is_told_as_its_own(trial, tmp_path):
    ended = outcome(Faulty(**vars(replace(trial, world_size=2))), tmp_path / "trial")
    assert isinstance(ended, Crashed)
    assert ended.rank == 1
    assert ended.reason == "rank 1: ZeroDivisionError: on rank 1 alone"


def test_a_trials_peaks_are_those_of_its_fullest_rank():
    parts = [
        Measurements(peak_allocated_bytes=bytes_, peak_reserved_bytes=2 * bytes_, step_seconds=(float(bytes_),))
        for bytes_ in (3, 5)
    ]
    found = of_all_ranks(parts)
    assert found.peak_allocated_bytes == 5
    assert found.peak_reserved_bytes == 10
    assert found.rank_peak_allocated_bytes == (3, 5)
    assert found.step_seconds == (3.0,)
    untold = of_all_ranks([Measurements(), parts[1]])
    assert (untold.peak_allocated_bytes, untold.rank_peak_allocated_bytes) == (5, (None, 5))
    assert of_all_ranks(parts[:1]) is parts[0]


@pytest.mark.parametrize(("asked", "expected"), [(None, 3), ("5", 6)], ids=["its share", "as OMP_NUM_THREADS says"])
def test_a_rank_computes_with_its_share_of_the_threads(monkeypatch, asked, expected):
    had = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", asked or "")
    if asked is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    for name, value in torchruns(0, 2, 1234).items():
        monkeypatch.setenv(name, value)
    try:
        torch.set_num_threads(6)
        ranks.share_threads()
        assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (expected, asked or "3")
    finally:
        torch.set_num_threads(had)


def test_one_rank_of_torchrun_forgets_its_launcher(monkeypatch):
    for name, value in torchruns(0, 1, 1234).items():
        monkeypatch.setenv(name, value)
    ranks.meet(cpu=True)
    assert not torch.distributed.is_initialized()
    assert "RANK" not in os.environ


def test_ranks_on_cpus_compute_where_torch_can_load_to(monkeypatch, tmp_path):
    for name, value in (torchruns(0, 2, port=1) | {"OMP_NUM_THREADS": "1", "ACCELERATE_TORCH_DEVICE": ""}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE")
    torch.save(torch.ones(2), tmp_path / "optimizer.pt")
    torch.distributed.init_process_group("fake", store=torch_internals.fake_store(), rank=0, world_size=2)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(torch.distributed, "is_initialized", lambda: False)
            patched.setattr(ranks, "PartialState", lambda **_: None)
            ranks.meet(cpu=True)
        device = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none").device
        loaded = torch.load(tmp_path / "optimizer.pt", map_location=device, weights_only=True)
    finally:
        torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
    assert loaded.tolist() == [1, 1]


def listening() -> dict[str, str]:
    """The TCP sockets that listen on this machine: inode -> address, as the kernel writes both."""
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    lines = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    return {line[9]: line[1] for line in lines if line[3] == "0A"}


def test_ranks_listen_on_loopback_alone_and_find_each_other_where_nobody_else_can_look(trial, tmp_path):
    with Child(replace(trial, world_size=2), tmp_path) as child:
        child.round()
        (folder,) = tmp_path.glob("ranks-*")
        assert folder.stat().st_mode & 0o077 == 0
        everywhere, found = listening(), set()
        for pid in (os.getpid(), forkserver_pid(), *child.pids):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    link = str(descriptor.readlink())
                    if link.startswith("socket:["):
                        found.add((pid, everywhere.get(link[8:-1])))
        of_ranks = {address for pid, address in found if address and pid in child.pids}
        of_others = {address for pid, address in found if address and pid not in child.pids}
    assert of_ranks, "gloo's ranks listen for each other"
    assert all(address.startswith("0100007F:") or address.startswith("0" * 24 + "01") for address in of_ranks)
    assert not of_others


@pytest.mark.parametrize(("here", "is_loopback"), [("2", True), ("1", False)])
def test_torchruns_ranks_listen_on_loopback_where_all_are_on_this_host(monkeypatch, here, is_loopback):
    for name, value in (torchruns(0, 2, port=1) | {"LOCAL_WORLD_SIZE": here, "OMP_NUM_THREADS": "1"}).items():
        monkeypatch.setenv(name, value)
    listening_on = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    for name in (*listening_on, "ACCELERATE_TORCH_DEVICE"):
        monkeypatch.setenv(name, "eth0")
    monkeypatch.setattr(ranks, "PartialState", lambda **_: None)
    ranks.meet(cpu=True)
    assert {os.environ[name] in ("lo", "lo0") for name in listening_on} == {is_loopback}


def test_a_trial_whose_folder_is_gone_is_an_outcome_also_for_several_ranks(trial, tmp_path):
    with Child(replace(trial, world_size=2), tmp_path / "gone") as child:
        outcome = child.finish()
    assert isinstance(outcome, Crashed) and outcome.reason.startswith("FileNotFoundError"), outcome


RUN = worker.run


def run_drawing_otherwise(connection, trial, *rest) -> None:
    """`worker.run`, where the Trainer is found to draw other rows than the captured step."""
    reference.Reference.draws = lambda reference, passes: False  # type: ignore[assignment]
    RUN(connection, trial, *rest)


def test_a_captured_step_that_is_not_the_trainers_is_left_to_it_on_several_ranks_too(trial, tmp_path, monkeypatch):
    trial = replace(trial, method=quick(METHODS["lora-captured"]), max_steps=6)
    one = outcome(trial, tmp_path / "one")
    monkeypatch.setattr(worker, "run", run_drawing_otherwise)
    two = outcome(replace(trial, world_size=2), tmp_path / "two")
    assert isinstance(two, Completed), two
    assert two.measured.capture_note is not None
    assert two.measured.capture_note.endswith(
        "the Trainer runs the steps, since it draws other rows than the captured step"
    )
    assert two.measured.train_loss == pytest.approx(one.measured.train_loss, abs=EQUAL)
    assert two.measured.heldout_loss_after == pytest.approx(one.measured.heldout_loss_after, abs=EQUAL)


def run_and_stop_in_save(connection, trial, folder, started, environment, *rest) -> None:
    """`worker.run`; the rank whose number is the trial's seed stops before it takes part in saving."""
    import transformers

    save = transformers.Trainer.save_model

    def stop(trainer, *arguments, **keywords):
        if int(environment["RANK"]) == trial.seed:
            os.kill(os.getpid(), signal.SIGSTOP)
        return save(trainer, *arguments, **keywords)

    transformers.Trainer.save_model = stop  # type: ignore[assignment]
    RUN(connection, trial, folder, started, environment, *rest)


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_is_stopped_while_saving_is_the_one_that_is_blamed(trial, tmp_path, monkeypatch, number):
    """The other one waits for it, in whatever library."""
    monkeypatch.setattr(worker, "run", run_and_stop_in_save)
    folder = tmp_path / "trial"
    folder.mkdir()
    with Child(replace(trial, world_size=2, max_steps=2, seed=number), folder, silence_seconds=60) as child:
        child.round()
        child.silence_seconds = 8
        ended = child.finish()
    assert isinstance(ended, TimedOut), ended
    assert (ended.rank, ended.phase) == (number, "save")
