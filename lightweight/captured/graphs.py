"""How is a step recorded as a CUDA graph and replayed, and what of a network prevents it?"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lightweight.captured.packing import Shape
from lightweight.internals import torch as torch_internals
from lightweight.models import first_line


def what_cannot_be_captured(network: torch.nn.Module, step: Callable[[], None]) -> str | None:
    """Run `step`: the innermost module of `network` in which it failed and why, in one line, or None. On a device,
    within `waiting_forbidden`."""
    inside: list[str] = []
    hooks = []
    for name, module in network.named_modules():
        label = f"{name or 'the network'} ({type(module).__name__})"
        hooks.append(module.register_forward_pre_hook(lambda *_, label=label: inside.append(label), prepend=True))
        hooks.append(module.register_forward_hook(lambda *_: inside.pop() and None))
    try:
        step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"{inside[-1] if inside else 'backward, loss or optimizer'}: {first_line(error)}"
    finally:
        for hook in hooks:
            hook.remove()
    return None


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
