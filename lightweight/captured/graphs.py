"""How is a step recorded as a CUDA graph and replayed, and what of a network prevents it?"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any
from unittest import mock

import numpy
import torch

from lightweight.captured.packing import Shape
from lightweight.internals import torch as torch_internals
from lightweight.models import first_line


def what_cannot_be_captured(network: torch.nn.Module, step: Callable[[], None]) -> str | None:
    """Run `step`: the innermost module of `network` in which it failed and why, in one line, or None. On a device,
    within `waiting_forbidden`.

    Where the host draws random numbers, the step is run again with others: layers that are computed by chance (OPT's
    `layerdrop`) would be those that a graph has recorded, in every step. Many draw also where nothing can follow.
    """
    inside: list[str] = []
    entered: list[str] = []

    def enter(label: str) -> None:
        inside.append(label)
        entered.append(label)

    hooks = []
    for name, module in network.named_modules():
        label = f"{name or 'the network'} ({type(module).__name__})"
        hooks.append(module.register_forward_pre_hook(lambda *_, label=label: enter(label), prepend=True))
        hooks.append(module.register_forward_hook(lambda *_: inside.pop() and None))
    begin = host_random_numbers()
    try:
        step()
        if host_random_numbers() != begin:
            usual = entered.copy()
            entered.clear()
            with drawing_zeros():
                step()
            if entered != usual:
                return f"{_first_apart(usual, entered)}: whether it is computed is drawn on the host"
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"{inside[-1] if inside else 'backward, loss or optimizer'}: {first_line(error)}"
    finally:
        for hook in hooks:
            hook.remove()
    return None


def _first_apart(usual: list[str], other: list[str]) -> str:
    return next(label for label, another in zip_longest(usual, other) if label != another) or other[len(usual)]


def host_random_numbers() -> tuple[Any, ...]:
    """Where the host's random numbers are: torch's, Python's and NumPy's."""
    numpys: Any = numpy.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), numpys[1].tobytes(), numpys[2]


@contextlib.contextmanager
def drawing_zeros() -> Iterator[None]:
    """Inside, a number between 0 and 1 that the host draws is 0."""
    draw = torch.rand

    def lowest(*size: Any, **options: Any) -> torch.Tensor:
        drawn = draw(*size, **options)
        return drawn.zero_() if drawn.device.type == "cpu" else drawn

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "rand", lowest))
        for module, name in ((random, "random"), (random, "uniform"), (numpy.random, "rand"), (numpy.random, "random")):
            stack.enter_context(mock.patch.object(module, name, return_value=0.0))
        yield


@contextlib.contextmanager
def waiting_forbidden() -> Iterator[None]:
    """Inside, whatever waits for the GPU raises RuntimeError, since a graph has no host to wait."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def recorded(step: Callable[[], None], pool: Any, *, several_ranks: bool) -> torch.cuda.CUDAGraph:
    """A graph of `step` in a memory `pool`, None for one of its own. Raises torch.OutOfMemoryError where that is the
    reason it cannot be recorded, and RuntimeError for any other."""
    torch_internals.free_workspaces()  # of the stream that warmed up, which no step runs in; the graph has its own
    graph = torch.cuda.CUDAGraph()
    # The thread that watches over messages to other ranks asks CUDA for their state meanwhile.
    errors = "thread_local" if several_ranks else "global"
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode=errors):
            step()
    except RuntimeError as error:
        ran_out = next((e for e in (error, error.__context__) if isinstance(e, torch.OutOfMemoryError)), None)
        if ran_out is not None:
            raise ran_out from None
        raise
    return graph


class Graphs:
    """The graphs of a step, one for each static shape, all in one memory pool: the largest shape is to come first."""

    def __init__(self, *, several_ranks: bool) -> None:
        self._several_ranks = several_ranks
        self._pool: Any = None
        self.by_shape: dict[Shape, torch.cuda.CUDAGraph] = {}

    def record(self, shape: Shape, step: Callable[[], None]) -> None:
        """Record `step`, which is of that shape. Raises as `recorded`."""
        graph = recorded(step, self._pool, several_ranks=self._several_ranks)
        self._pool = graph.pool()
        self.by_shape[shape] = graph

    def replay(self, shape: Shape) -> None:
        """Run the step of a shape again, over what its buffers hold now."""
        self.by_shape[shape].replay()

    def clear(self) -> None:
        """Let go of the graphs and of their memory."""
        self.by_shape.clear()
        self._pool = None


@contextlib.contextmanager
def on_a_side_stream() -> Iterator[None]:
    """Warm-up runs off the stream that is captured, as torch's notes on CUDA graphs ask."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
