"""What of a network is changed while a step of it is checked, and restored afterwards?"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy
import torch

from lightweight.captured import dropout
from lightweight.captured.parts import PartError
from lightweight.internals import bitsandbytes as bitsandbytes_internals
from lightweight.internals import torch as torch_internals
from lightweight.internals import transformers as transformers_internals


def trained(network: torch.nn.Module) -> dict[torch.nn.Parameter, str]:
    """The weights that are trained, and their names."""
    return {weight: name for name, weight in network.named_parameters() if weight.requires_grad}


def drop_gradients(network: Any) -> None:
    """Forget the gradients of `network`."""
    for weight in network.parameters():
        weight.grad = None


@contextlib.contextmanager
def recomputing(layers: Sequence[Any]) -> Iterator[None]:
    """Inside, `layers` are computed again in the backward pass."""
    undo = transformers_internals.recompute(layers, keeps_random_numbers=False)
    try:
        yield
    finally:
        undo()


HALVES = (torch.float16, torch.bfloat16)


@contextlib.contextmanager
def in_fp32(network: torch.nn.Module) -> Iterator[None]:
    """Inside, `network` computes in fp32 what it computes in half precision outside, autocast aside. The halves stay
    where they are: what is freed and allocated anew among the rest of the check holds segments of the device's memory
    for as long as the job lasts. Raises PartError for weights of other formats, but for bitsandbytes' 4 bits, which are
    dequantized to fp32 inside."""
    matmul = torch.backends.cuda.matmul
    with contextlib.ExitStack() as undo:
        undo.callback(setattr, matmul, "fp32_precision", matmul.fp32_precision)
        matmul.fp32_precision = "ieee"
        packed = undo.enter_context(bitsandbytes_internals.dequantized_to_fp32(network))
        for name, tensor in chain(network.named_parameters(), network.named_buffers()):
            if tensor in packed:
                continue
            if tensor.dtype in HALVES:
                undo.callback(setattr, tensor, "data", tensor.data)
                tensor.data = tensor.data.to(torch.float32)
            elif isinstance(tensor, torch.nn.Parameter) and tensor.dtype != torch.float32:
                raise PartError(f"{name} is {tensor.dtype}")
        yield


def free_unused(device: torch.device) -> None:
    """Give back what a GPU has in no use: what torch keeps for later, and cuBLAS' workspaces, each of which else lies
    in the middle of a large segment that was free when it was needed."""
    if device.type == "cuda":
        torch_internals.free_workspaces()
        torch.cuda.empty_cache()


NUDGE = 0.02
"""Standard deviation of what stands in for weights that are all zero."""


@contextlib.contextmanager
def nudged(weights: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Inside, trained weights that are all zero are small random numbers, the same every time. LoRA's B is zero at
    first, and hides A and all that the adapter does."""
    generator = torch.Generator().manual_seed(0)
    zeros = [weight for weight in weights if not weight.any()]
    with torch.no_grad():
        for weight in zeros:
            weight.copy_(NUDGE * torch.randn(weight.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight in zeros:
                weight.zero_()


@contextlib.contextmanager
def without_trace(network: torch.nn.Module) -> Iterator[None]:
    """Inside, dropout is off; afterwards random numbers go on, buffers and what modules have noted are, and the
    device's memory statistics begin, as if nothing had been computed: dynamic rotary embeddings remember the longest
    row so far, and what they made of it."""
    numbers, state = random.getstate(), numpy.random.get_state()
    on_gpu = next(network.parameters()).device.type == "cuda"
    devices = [torch.cuda.current_device()] if on_gpu else []
    buffers = [
        (module, name, buffer, buffer.to("cpu", copy=True))
        for module in network.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    noted = [
        (module, name, value)
        for module in network.modules()
        for name, value in vars(module).items()
        if isinstance(value, int | float | torch.Tensor) and not isinstance(value, bool)
    ]
    try:
        with torch.random.fork_rng(devices), dropout.off(), warnings.catch_warnings():
            # of reentrant checkpointing, where what is asked of the network needs no gradients
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
            yield
    finally:
        random.setstate(numbers)
        numpy.random.set_state(state)
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                setattr(module, name, buffer)
                if buffer.shape == before.shape:
                    buffer.copy_(before)
        for module, name, value in noted:
            setattr(module, name, value)
        drop_gradients(network)
    if on_gpu:
        free_unused(torch.device("cuda"))
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.reset_accumulated_memory_stats()  # a step of the Trainer's that did not fit is no outcome
