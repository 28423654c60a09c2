"""What of the forward pass lies in the host's memory until the backward pass needs it?

What a layer keeps is copied out while the next layer is computed, and back while the backward pass is in the layer
behind it: in a stream of its own, so that PCIe's 50 GB/s each way (gen 5) lie beside the kernels. Gate and up, which
are most of what a layer keeps, are computed again instead, by one product, where adapters drop nothing: copies of them
would take longer than the layer. An embedding that is only looked up lies on the host for good: a step reads a row of
it for each token.

Within a CUDA graph nothing may ask the allocator to look after another stream (`record_stream`). So memory of the
device is held until the stream that computes has waited for the copies, and the host's memory, pinned, is taken in
the same order in every pass: a step that is run before the capture has made all of it.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from lightweight.captured import activations
from lightweight.internals import torch as torch_internals

SMALLEST_BYTES = 2**20
"""What is smaller stays on the device: a norm's statistics, what lies between an adapter's factors. A copy of less than
that is all latency."""

CHUNK_BYTES = 2**28
"""Pinned memory comes in pieces of so much; torch makes a power of two of any other size."""

ALIGNED_BYTES = 512


class HostLedger(Protocol):
    """Counts, for a forecast, the host's memory that is taken and the bytes that are copied there and back."""

    def on_the_host(self, size: int) -> torch.Tensor:
        """A tensor of `size` bytes that stands for the host's memory."""

    def copied(self, size: int, *, to_host: bool) -> None:
        """Count a copy of `size` bytes."""


_ledger: HostLedger | None = None


@contextlib.contextmanager
def told_to(ledger: HostLedger) -> Iterator[None]:
    """Inside, tensors have no content: nothing is copied, and `ledger` counts what would be."""
    global _ledger
    _ledger = ledger
    try:
        yield
    finally:
        _ledger = None


class _Host:
    """The host's memory, pinned for a GPU, given out in the same order in every pass."""

    def __init__(self, device: torch.device) -> None:
        self._is_pinned = device.type == "cuda"
        self._chunks: list[torch.Tensor] = []
        self.begin()

    def begin(self) -> None:
        """Give out everything again."""
        self._chunk = self._taken = 0

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """Room for the numbers of `like`, of one dimension."""
        size = like.nbytes
        while self._chunk < len(self._chunks) and self._taken + size > len(self._chunks[self._chunk]):
            self._chunk, self._taken = self._chunk + 1, 0
        if self._chunk == len(self._chunks):
            self._chunks.append(self._made(max(CHUNK_BYTES, size)))
        part = self._chunks[self._chunk][self._taken : self._taken + size]
        self._taken += -(-size // ALIGNED_BYTES) * ALIGNED_BYTES
        return part.view(like.dtype)

    def _made(self, size: int) -> torch.Tensor:
        if _ledger is not None:
            return _ledger.on_the_host(size)
        if self._is_pinned:
            return torch_internals.pinned((size,), torch.uint8)
        return torch.empty(size, dtype=torch.uint8)


@dataclass(eq=False)
class _Activation:
    """Memory of a layer's that its backward pass needs, as one row: on the device where it is `here`, and `there`, on
    the host, once it was copied."""

    here: torch.Tensor | None
    there: torch.Tensor | None = None


@dataclass(eq=False)
class _LayerPass:
    """One layer in one forward pass: what it keeps, which autograd owns; the layer `before` it; and what the device has
    to wait for when it `comes_back`."""

    before: _LayerPass | None
    stays: frozenset[int]
    kept: dict[int, weakref.ref[_Activation]] = field(default_factory=dict)
    comes_back: bool = False
    arrival: Any = None

    def all_kept(self) -> list[_Activation]:
        """What of it is still wanted."""
        return [kept for reference in self.kept.values() if (kept := reference()) is not None]


class Offload:
    """The layers of a model whose activations lie on the host, while the captured step trains."""

    def __init__(self, model: Any, layers: Sequence[Any]) -> None:
        weight = next(model.parameters())
        self._first = layers[0]
        self._host = _Host(weight.device)
        self._stream = torch.cuda.Stream(weight.device) if weight.device.type == "cuda" else None
        self._newest: _LayerPass | None = None
        self._leaving: deque[tuple[Any, list[torch.Tensor], list[weakref.ref[_Activation]]]] = deque()
        self._alive: weakref.WeakSet[_Activation] = weakref.WeakSet()
        self._rests = False

    def calling(self, layer: Any, by: Callable[..., Any] | None) -> Callable[..., Any]:
        """What `transformers_internals.called_by` is to call `layer` by, which would else be called `by` another, None
        for itself."""
        return functools.partial(self._call, layer, by)

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Inside, nothing goes to the host, and nothing is held of a pass that was broken off before."""
        self._newest = None
        self._settle()
        self._rests = True
        try:
            yield
        finally:
            self._rests = False

    def _call(self, layer: Any, by: Callable[..., Any] | None, function: Any, *arguments: Any) -> Any:
        """What `function`, the layer's forward pass, makes of its `arguments`."""
        call = function if by is None else functools.partial(by, function)
        if self._rests or not torch.is_grad_enabled():
            return call(*arguments)
        if layer is self._first:
            self._newest = None
            self._settle()
            if not self._alive:  # else somebody has not gone back through the pass before
                self._host.begin()
        shared = (arguments[1:], getattr(function, "keywords", {}))  # given to all layers
        own = self._newest = _LayerPass(self._newest, frozenset(_addresses(layer, shared)))
        again = activations.gates_computed_again() if by is None else contextlib.nullcontext()
        hooks = torch.autograd.graph.saved_tensors_hooks(functools.partial(self._pack, own), self._unpack)
        with hooks, again:
            result = call(*arguments)
        self._send(own)
        return result

    def _pack(self, own: _LayerPass, tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        address = torch_internals.address(storage)
        if storage.nbytes() < SMALLEST_BYTES or address in own.stays:
            return tensor
        kept = own.kept[address]() if address in own.kept else None
        if kept is None:  # one that is gone has left its address to another
            kept = _Activation(tensor.detach().as_strided((storage.nbytes() // tensor.itemsize,), (1,), 0))
            own.kept[address] = weakref.ref(kept)
            self._alive.add(kept)
        return own, kept, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()

    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        own, kept, dtype, shape, stride, offset = packed
        self._bring(own)
        if own.arrival is not None:
            torch.cuda.current_stream().wait_event(own.arrival)
            own.arrival = None
        if own.before is not None:
            self._bring(own.before)
            own.before = None
        return kept.here.view(dtype).as_strided(shape, stride, offset)  # type: ignore[no-any-return]

    def _send(self, own: _LayerPass) -> None:
        """Begin to copy what a layer has kept, as it now is, to the host, and let go of what the layer before has."""
        pairs = []
        for kept in own.all_kept():
            assert kept.here is not None
            kept.there = self._host.take(kept.here)
            pairs.append((kept.there, kept.here))
        event = self._copy(pairs, to_host=True)
        self._leaving.append((event, [here for _, here in pairs], [*own.kept.values()]))
        own.kept = dict(enumerate(own.kept.values()))  # addresses are others' from now on
        if len(self._leaving) > 1:
            self._let_go()

    def _let_go(self) -> None:
        """Wait for the oldest of what is on its way to the host, whose memory is then free."""
        event, _, references = self._leaving.popleft()
        if event is not None:
            torch.cuda.current_stream().wait_event(event)
        for reference in references:
            if (kept := reference()) is not None:
                kept.here = None

    def _settle(self) -> None:
        """Wait for all that is on its way to the host, and leave it on the device as well."""
        for event, *_ in self._leaving:
            if event is not None:
                torch.cuda.current_stream().wait_event(event)
        self._leaving.clear()

    def _bring(self, own: _LayerPass) -> None:
        """Begin to copy what a layer has kept back to the device, once. What has just left is still there."""
        if own.comes_back:
            return
        own.comes_back = True
        self._settle()
        pairs = []
        for kept in own.all_kept():
            if kept.here is None:
                assert kept.there is not None
                device = None if self._stream is None else self._stream.device
                kept.here = torch.empty(kept.there.shape, dtype=kept.there.dtype, device=device)
                pairs.append((kept.here, kept.there))
        own.arrival = self._copy(pairs, to_host=False)

    def _copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], *, to_host: bool) -> Any:
        """Begin to copy the second of each pair to the first: what is to be waited for, None where it is done."""
        if _ledger is not None:
            for _, source in pairs:
                _ledger.copied(source.nbytes, to_host=to_host)
            return None
        if self._stream is None:
            for target, source in pairs:
                target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self._stream.record_event()


def _addresses(layer: Any, shared: Any) -> Iterator[int]:
    """Of what is not a layer's activations: its weights, and what is given to all layers."""
    for tensor in (*layer.parameters(), *layer.buffers(), *torch_internals.tree_iter(shared)):
        if isinstance(tensor, torch.Tensor):
            yield torch_internals.address(tensor.untyped_storage())


def keep_embedding_on_the_host(model: Any) -> None:
    """Have the embedding of a model's tokens lie in the host's memory, where it is frozen and no other module's too.

    From the start: held-out loss is measured before the first step.
    """
    embedding = model.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    owners = [module for module in model.modules() if any(own is weight for own in _own(module).values())]
    if type(embedding) is not torch.nn.Embedding or weight is None or weight.requires_grad or len(owners) > 1:
        return
    if _ledger is not None:
        weight.data = _ledger.on_the_host(weight.nbytes).view(weight.dtype).view(weight.shape)
    elif weight.is_cuda:
        weight.data = torch_internals.on_the_host(weight.data)
        torch.cuda.empty_cache()  # or what stays for the job would lie where it was, in the middle of a large segment


def _own(module: torch.nn.Module) -> Mapping[str, torch.nn.Parameter]:
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))
