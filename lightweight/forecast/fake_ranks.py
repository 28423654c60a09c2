"""What does one rank of several hold? FSDP2 itself shards a network of fake tensors, with nobody else there.

torch's fake process group says that it has so many members and moves nothing; every buffer that its collectives would
fill is allocated all the same. So the Trainer, accelerate and `fully_shard` do in a trace what they do on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def rank_zero_of(world_size: int) -> Iterator[None]:
    """Be rank 0 of `world_size` inside: the one whose shards are the largest where they are uneven.

    To be entered outside of any FakeTensorMode, whose tensors a device mesh cannot be made of. One rank is left as it
    is.
    """
    if world_size == 1:
        yield
        return
    variables = {
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)},
        "ACCELERATE_TORCH_DEVICE": "cpu",  # and not cpu:0, which is another device to a fake tensor
    }
    with mock.patch.dict(os.environ, variables):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
        try:
            mesh = init_device_mesh("cpu", (world_size,))
            with (
                mock.patch.object(_fully_shard, "_init_default_mesh", return_value=mesh),
                # accelerate shards on GPUs only; the device is said above
                mock.patch.object(PartialState, "_prepare_backend", return_value=("nccl", DistributedType.MULTI_GPU)),
                # accelerate tells parameters from each other by their addresses, which fake ones do not have
                mock.patch.object(FakeTensor, "data_ptr", _address, create=True),
            ):
                yield
        finally:
            dist.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def _address(tensor: Any) -> int:
    return int(tensor.untyped_storage()._cdata)
