"""What every process of a session imports, without any of them but a trial's own child touching the GPU.

`import peft` imports bitsandbytes, and torchao where it is installed, and these ask every GPU what it is while they are
imported. Through torch that question creates a CUDA context: some 400 MiB of the card held by a process that never
trains, and in the forkserver a context that no forked child can use. NVML answers the same question without one.
`from lightweight.preload import peft` is therefore how every other module gets at peft.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

# torch.cuda.is_available() asks NVML instead of the CUDA runtime, whose answer would poison the forkserver's children.
# https://docs.pytorch.org/docs/stable/notes/cuda.html#environment-variables
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

# On a CPU, threads that wait for one another spin by default: where anything else had one of their cores, a step of 0.1
# s took 0.6 to 1.1 s, and 0.1 to 0.2 s where they sleep instead. libgomp reads this once, when torch loads it.
# https://gcc.gnu.org/onlinedocs/libgomp/OMP_005fWAIT_005fPOLICY.html
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pynvml
import torch

from lightweight.internals import torch as torch_internals

_properties = torch.cuda.get_device_properties


@dataclass(frozen=True)
class Gpu:
    """What NVML says of a GPU, by torch's names: its memory in bytes, and its compute capability. Whatever else is
    asked, torch answers, and touches the GPU."""

    name: str
    total_memory: int
    major: int
    minor: int

    def __getattr__(self, name: str) -> Any:
        return getattr(_properties(0), name)


def gpus() -> list[Gpu]:
    """Every NVIDIA GPU of this machine that answers, from NVML; empty without an NVIDIA driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    answering = []
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            with suppress(pynvml.NVMLError):  # one that has fallen off the bus costs what runs on it, not the others
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
                name, memory = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetMemoryInfo(handle).total
                answering.append(Gpu(name=name, total_memory=memory, major=major, minor=minor))
    except pynvml.NVMLError:
        pass  # the driver does not even count them
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
    return answering


@contextmanager
def _answered_by_nvml() -> Iterator[None]:
    """Inside, who asks torch what the GPUs are is told of the most capable one by NVML. torchao and bitsandbytes do so
    while they are imported, and asking torch itself creates a CUDA context."""
    known = gpus()
    if not known:  # no GPU to keep off, or no NVML to ask instead
        yield
        return
    with torch_internals.answering_about_gpus(max(known, key=lambda gpu: (gpu.major, gpu.minor))):
        yield


# Its import tells that an optional package of CPU kernels is missing; every child would say it again.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# bitsandbytes compiles two functions that no GPU and no CPU runs, a fifth of what a process takes to start.
with _answered_by_nvml(), torch_internals.compiling_when_called():
    import peft

# Looking for garbage in all of this once more, as Python does before it ends, would take a second.
atexit.register(gc.freeze)

__all__ = ["gpus", "peft"]
