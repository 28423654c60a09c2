"""What every process of a session imports, without any of them but a trial's own child touching the GPU.

`import peft` imports bitsandbytes, and torchao where it is installed, and these ask every GPU what it is while they are
imported. Through torch that question creates a CUDA context: some 400 MiB of the card held by a process that never
trains, and in the forkserver a context that no forked child can use. NVML answers the same question without one.
`from lightweight.preload import peft` is therefore how every other module gets at peft.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from unittest import mock

# torch.cuda.is_available() asks NVML instead of the CUDA runtime, whose answer would poison the forkserver's children.
# https://docs.pytorch.org/docs/stable/notes/cuda.html#environment-variables
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

# On a CPU, threads that wait for one another spin by default: where anything else had one of their cores, a step of 0.1
# s took 0.6 to 1.1 s, and 0.1 to 0.2 s where they sleep instead. libgomp reads this once, when torch loads it.
# https://gcc.gnu.org/onlinedocs/libgomp/OMP_005fWAIT_005fPOLICY.html
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pynvml
import torch

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
    found = []
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            with suppress(pynvml.NVMLError):  # one that has fallen off the bus costs what runs on it, not the others
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
                name, memory = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetMemoryInfo(handle).total
                found.append(Gpu(name=name, total_memory=memory, major=major, minor=minor))
    except pynvml.NVMLError:
        pass  # the driver does not even count them
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
    return found


@contextmanager
def _answered_by_nvml() -> Iterator[None]:
    """Inside, who asks torch what the GPUs are is told of the most capable one by NVML. torchao and bitsandbytes do so
    while they are imported, and asking torch itself creates a CUDA context."""
    known = gpus()
    if not known:  # no GPU to keep off, or no NVML to ask instead
        yield
        return
    best = max(known, key=lambda gpu: (gpu.major, gpu.minor))
    instead: dict[str, Callable[..., Any]] = {
        "get_device_capability": lambda device=None: (best.major, best.minor),
        "get_device_properties": lambda device=None: best,
        "get_device_name": lambda device=None: best.name,
        "current_device": lambda: 0,
    }
    with ExitStack() as stack:
        for name, answer in instead.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        yield
    # torch's compiler keeps what it was told.
    interface = sys.modules.get("torch._dynamo.device_interface")
    for name in ("caching_worker_device_properties", "caching_worker_current_devices"):
        getattr(interface, name, {}).clear()


@contextmanager
def _compiling_when_called() -> Iterator[None]:
    """Inside, `torch.compile` of a function waits for its first call. bitsandbytes compiles two that no GPU and no CPU
    runs, and torch loads its whole compiler for them, a fifth of what a process takes to start."""
    original = torch.compile

    def later(function: Any = None, **options: Any) -> Any:
        if function is None or isinstance(function, torch.nn.Module):
            return original(function, **options)
        compiled: Callable[[], Any] = functools.cache(lambda: original(function, **options))

        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            return compiled()(*arguments, **keywords)

        return call

    torch.compile = later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original


# Its import tells that an optional package of CPU kernels is missing; every child would say it again.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

with _answered_by_nvml(), _compiling_when_called():
    import peft

__all__ = ["gpus", "peft"]
