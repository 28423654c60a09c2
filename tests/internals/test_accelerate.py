from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import distributed

from lightweight.internals import accelerate as accelerate_internals
from lightweight.internals import torch as torch_internals


@pytest.fixture(autouse=True)
def no_state():
    """What a process shares is that of no test before."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def trainer():
    """What of a Trainer these look at."""
    plugin = {"fsdp_version": 2, "mixed_precision_policy": "fp16"}
    yield SimpleNamespace(accelerator=Accelerator(cpu=True), args=SimpleNamespace(fsdp_plugin_args=plugin))
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_rank_of_whatever_group_counts_as_one_with_a_gpu_and_leaves_nothing(monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    distributed.init_process_group("fake", store=torch_internals.fake_store(), rank=0, world_size=2)
    try:
        with accelerate_internals.ranks_as_of_gpus():
            assert PartialState().distributed_type == DistributedType.MULTI_GPU
        assert not PartialState._shared_state
    finally:
        distributed.destroy_process_group()


def test_a_rank_on_cpus_computes_on_a_device_without_a_number(monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    accelerate_internals.leave_cpu_unnumbered()
    distributed.init_process_group("fake", store=torch_internals.fake_store(), rank=1, world_size=2)
    try:
        with accelerate_internals.ranks_as_of_gpus():
            assert PartialState().device == torch.device("cpu")
    finally:
        distributed.destroy_process_group()


def test_ranks_on_cpus_shard_by_fsdp_and_gather_weights_as_they_are_stored(trainer):
    accelerate_internals.shard_on_cpu(trainer)
    assert trainer.is_fsdp_enabled and trainer.accelerator.distributed_type == DistributedType.FSDP
    assert isinstance(trainer.accelerator.state.fsdp_plugin, FullyShardedDataParallelPlugin)
    assert trainer.accelerator.is_fsdp2
    assert trainer.accelerator.state.fsdp_plugin.mixed_precision_policy is not None
    accelerate_internals.gather_as_stored(trainer)
    assert trainer.accelerator.state.fsdp_plugin.mixed_precision_policy is None


def test_losses_are_autocast_and_scaled_on_a_cpu_as_well(trainer):
    weight = torch.ones((), requires_grad=True)
    assert trainer.accelerator.native_amp is False and trainer.accelerator.scaler is None
    accelerate_internals.autocast_on_cpu(trainer, torch.amp.GradScaler("cpu", init_scale=8.0))
    trainer.accelerator.backward(weight * 1.0)
    assert trainer.accelerator.native_amp and weight.grad.item() == 8.0


def test_another_scale_holds_while_it_is_asked_for(trainer):
    before = trainer.accelerator.scaler
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    weight = torch.ones((), requires_grad=True)
    with accelerate_internals.losses_scaled_by(trainer, scaler):
        trainer.accelerator.backward(weight * 1.0)
    assert weight.grad is not None and weight.grad.item() == 8.0 and trainer.accelerator.scaler is before
