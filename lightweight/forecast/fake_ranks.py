"""What does one rank of several hold? FSDP2 or DistributedDataParallel itself takes on a network of fake tensors.

torch's fake process group says that it has so many members and moves nothing; every buffer that its collectives would
fill is allocated all the same. So the Trainer, accelerate and what they wrap the network in do in a trace what they do
on a GPU, with nobody else there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lightweight.internals import torch as torch_internals
from lightweight.internals.accelerate import ranks_as_of_gpus


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
        "ACCELERATE_BYPASS_DEVICE_MAP": "true",  # DistributedDataParallel would want the number of a GPU
    }
    with mock.patch.dict(os.environ, variables):
        dist.init_process_group("fake", store=torch_internals.fake_store(), rank=0, world_size=world_size)
        try:
            with (
                ranks_as_of_gpus(),  # the device is said above
                torch_internals.sharded_over(init_device_mesh("cpu", (world_size,))),
                torch_internals.fake_tensors_have_addresses(),
                torch_internals.replicas_of_fake_tensors(),
            ):
                yield
        finally:
            dist.destroy_process_group()
