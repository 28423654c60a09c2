"""What every process of a session imports, without any of them but a trial's own child touching the GPU.

`import peft` imports bitsandbytes, and bitsandbytes 0.50 asks every GPU for its compute capability while it is imported
(`cuda_specs.get_compute_capabilities`). Through torch that question creates a CUDA context: some 400 MiB of the card
held by a process that never trains, and in the forkserver a context that no forked child can use. NVML answers the same
question without one. `from lightweight.preload import peft` is therefore how every other module gets at peft.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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


def compute_capabilities() -> list[tuple[int, int]]:
    """(major, minor) of every NVIDIA GPU of this machine that answers, from NVML; empty without an NVIDIA driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    found = []
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            with suppress(pynvml.NVMLError):  # one that has fallen off the bus costs what runs on it, not the others
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                found.append(tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)))
    except pynvml.NVMLError:
        pass  # the driver does not even count them
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
    return found


@contextmanager
def _capability_from_nvml() -> Iterator[None]:
    capabilities = compute_capabilities()
    if not capabilities:  # no GPU to keep off, or no NVML to ask instead
        yield
        return
    original = torch.cuda.get_device_capability

    def highest(device: Any = None) -> tuple[int, int]:
        return max(capabilities)

    torch.cuda.get_device_capability = highest
    try:
        yield
    finally:
        torch.cuda.get_device_capability = original


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

with _capability_from_nvml(), _compiling_when_called():
    import peft

__all__ = ["compute_capabilities", "peft"]
