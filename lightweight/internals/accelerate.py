"""What is private or patched in accelerate: read in 1.11 and 1.15."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def leave_cpu_unnumbered() -> None:
    """Have ranks on CPUs compute on `cpu`, which accelerate numbers as it does GPUs: torch knows no `cpu:0` to load to,
    and transformers 5.17 resumes an optimizer there. accelerate/state.py, `PartialState`."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"


@contextmanager
def ranks_as_of_gpus() -> Iterator[None]:
    """Inside, a process with an initialised process group is a rank with a GPU, whatever the group is: accelerate would
    ask for a GPU's backend. Afterwards nothing is left in the states that a process shares. accelerate/state.py."""
    with mock.patch.object(PartialState, "_prepare_backend", return_value=("nccl", DistributedType.MULTI_GPU)):
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def shard_on_cpu(trainer: Any) -> None:
    """Have ranks that were started on CPUs shard a network by FSDP2, which accelerate sets up for GPUs only; its code
    runs on CPUs as well. Both states are said so, since each copies the other. accelerate/state.py."""
    state = trainer.accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


def gather_as_stored(trainer: Any) -> None:
    """Have FSDP2 gather weights in the format they are stored in. The plugin takes another format from mixed precision,
    and none for none. accelerate/utils/dataclasses.py, `set_mixed_precision`."""
    trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = None


def autocast_on_cpu(trainer: Any, scaler: Any) -> None:
    """fp16 autocast and its loss scaler on a CPU, which accelerate sets up for GPUs only. accelerate/accelerator.py,
    `Accelerator.__init__`."""
    trainer.accelerator.native_amp, trainer.accelerator.scaler = True, scaler


@contextmanager
def losses_scaled_by(trainer: Any, scaler: Any) -> Iterator[None]:
    """Inside, `Accelerator.backward` multiplies losses by another scale. Ibid."""
    with mock.patch.object(trainer.accelerator, "scaler", scaler):
        yield
