"""How are random weights drawn by all cores, and the same on every machine?

The network's own initialization runs once and draws nothing: what it asks for is noted, tensor by tensor, and drawn at
the end, or where something reads it, in chunks by as many threads as there are cores. The numbers of a chunk follow
from the seed, from which draw of the initialization it is and from its place there, so not from the cores. They are
numpy's, since torch's normal numbers differ in their last bits between the instruction sets of one kind of processor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightweight.internals import torch as torch_internals
from lightweight.internals.torch import DispatchMode, tree_iter

CHUNK = 2**18
"""Numbers drawn at one time by a generator of their own: 1 MiB of them in fp32, which a core's cache holds."""

DTYPES = (torch.float16, torch.float32)
"""What is drawn here: numpy can write both."""

aten = torch.ops.aten


@dataclass(frozen=True)
class _Draw:
    """`number` counts the draws of an initialization; `scale` and `shift` are applied to what `kind` gives."""

    tensor: torch.Tensor
    number: int
    kind: str
    scale: float
    shift: float


class Drawing(DispatchMode):
    """Inside, tensors are not drawn when they are asked to be, but when they are read, or by `finish`."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed, self._draws = seed, 0
        self._waiting: dict[int, _Draw] = {}  # by storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (aten.normal_.default, aten.uniform_.default) and kwargs.get("generator") is None:
            self._draws += 1
            if (draw := self._noted(func, *args)) is not None:
                self._waiting[_storage(draw.tensor)] = draw
                return args[0]
        elif func in (aten.zero_.default, aten.fill_.Scalar) and _is_whole(args[0]):
            self._waiting.pop(_storage(args[0]), None)
        self._draw(t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor))
        return func(*args, **kwargs)

    def finish(self, tensors: Iterable[torch.Tensor]) -> None:
        """Draw what is waiting of `tensors`, and forget the rest."""
        self._draw(tensors)
        self._waiting.clear()

    def _noted(self, func: Any, tensor: torch.Tensor, first: float = 0.0, second: float = 1.0) -> _Draw | None:
        if tensor.device.type != "cpu" or tensor.dtype not in DTYPES or not _is_whole(tensor):
            return None
        if func is aten.normal_.default:  # mean and standard deviation
            return _Draw(tensor, self._draws, "normal", second, first)
        return _Draw(tensor, self._draws, "uniform", second - first, first)

    def _draw(self, tensors: Iterable[torch.Tensor]) -> None:
        """Draw what is waiting of `tensors`."""
        storages = {_storage(tensor) for tensor in tensors if tensor.device.type == "cpu"} if self._waiting else set()
        draws = [self._waiting.pop(storage) for storage in storages & self._waiting.keys()]
        chunks = [(draw, start) for draw in draws for start in range(0, draw.tensor.numel(), CHUNK)]
        if len(chunks) == 1:
            self._fill(*chunks[0])
        elif chunks:
            with ThreadPoolExecutor(cores()) as threads:
                for _ in threads.map(lambda chunk: self._fill(*chunk), chunks):
                    pass

    def _fill(self, draw: _Draw, start: int) -> None:
        target = draw.tensor.detach().numpy().reshape(-1)[start : start + CHUNK]
        key = np.random.SeedSequence(self._seed, spawn_key=(draw.number, start // CHUNK))
        generator = np.random.Generator(np.random.Philox(key))
        numbers: NDArray[np.float32]
        if draw.kind == "normal":
            numbers = generator.standard_normal(target.shape, dtype=np.float32)
        else:
            numbers = generator.random(target.shape, dtype=np.float32)
        np.multiply(numbers, np.float32(draw.scale), out=numbers)
        np.add(numbers, np.float32(draw.shift), out=numbers)
        target[:] = numbers


def drawn(build: Callable[[], Any], seed: int) -> Any:
    """The network that `build` gives, its random weights those of `seed`."""
    with Drawing(seed) as drawing:
        network = build()
        drawing.finish([*network.parameters(), *network.buffers()])
    return network


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _storage(tensor: torch.Tensor) -> int:
    return torch_internals.address(tensor.untyped_storage())


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether nothing but `tensor` is in its memory."""
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.is_contiguous() and tensor.numel() == elements
