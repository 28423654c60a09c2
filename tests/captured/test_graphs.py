"""Graphs of steps, with a stand-in for CUDA's."""

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightweight.captured.graphs import Graphs, what_cannot_be_captured
from lightweight.captured.packing import Shape


class StandInGraph:
    """A CUDA graph as the job sees it: what ran while it was recorded runs again over the same buffers."""

    recording: Any = None
    again: Callable[[], None]

    def replay(self):
        self.again()

    def pool(self):
        return "pool"


@contextlib.contextmanager
def recording(graph, pool=None, capture_error_mode="global"):
    StandInGraph.recording = graph
    graph.in_pool = pool
    yield
    StandInGraph.recording = None


def test_all_graphs_of_a_step_are_in_the_pool_of_the_first_until_they_are_let_go(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandInGraph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    graphs, ran = Graphs(several_ranks=False), []
    large, small = (Shape(passes=1, rows=rows, time=8, answers=4) for rows in (2, 1))

    def record(shape):
        def step():
            if StandInGraph.recording is not None:
                StandInGraph.recording.again = step
            ran.append(shape)

        graphs.record(shape, step)
        made: Any = graphs.by_shape[shape]
        return made

    assert record(large).in_pool is None
    second = record(small)
    assert second.in_pool == "pool"
    gone = weakref.ref(second)
    del second
    graphs.replay(large)
    assert ran == [large, small, large]
    graphs.clear()
    assert gone() is None
    assert record(small).in_pool is None


@pytest.mark.parametrize(("several_ranks", "errors"), [(False, "global"), (True, "thread_local")])
def test_whoever_watches_over_messages_to_other_ranks_spoils_no_graph(monkeypatch, several_ranks, errors):
    modes = []

    def noted(graph, pool=None, capture_error_mode="global"):
        modes.append(capture_error_mode)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandInGraph)
    monkeypatch.setattr(torch.cuda, "graph", noted)
    Graphs(several_ranks=several_ranks).record(Shape(passes=1, rows=1, time=8, answers=4), lambda: None)
    assert modes == [errors]


def test_what_prevents_a_capture_is_named_with_its_module():
    def waits(*_):
        raise RuntimeError("called a synchronizing CUDA operation\nand more")

    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2)))
    step = lambda: network(torch.zeros(1, 2)).sum().backward()  # noqa: E731
    assert what_cannot_be_captured(network, step) is None
    handle = network.get_submodule("1.0").register_forward_pre_hook(waits)
    assert what_cannot_be_captured(network, step) == "1.0 (Linear): called a synchronizing CUDA operation"
    handle.remove()
    assert what_cannot_be_captured(network, step) is None
    assert what_cannot_be_captured(network, waits) == (
        "backward, loss or optimizer: called a synchronizing CUDA operation"
    )
