"""What does an operator allocate, what for, and when is it released? Every operator of a program is seen and noted."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightweight.captured.cross_entropy import ALIGNMENT
from lightweight.forecast.cuda_rules import GROUPED_PRODUCT, CudaRules, grouped_product
from lightweight.forecast.replay import Event
from lightweight.forecast.work import Watch
from lightweight.internals import bitsandbytes as bitsandbytes_internals
from lightweight.internals.torch import (
    ADDED_UP,
    DEVICE_OF,
    READ_BY_THE_HOST,
    VIEW_THAT_SAYS_IT_IS_NONE,
    DispatchMode,
    FakeTensor,
    address,
    fake_constant,
    fake_device,
    has_content,
    in_backward,
    in_kernel_invocation_manager,
    no_dispatch,
    own_part,
    schema,
    shapes_propagated_in,
    storages_resized,
    tree_iter,
    written_by_fsdp,
)
from lightweight.training.meter import Meter
from lightweight.trial import Cause, Phase

_CPU = torch.device("cpu")

DEQUANTIZES_INTO = "bitsandbytes::dequantize_4bit.out"
"""Gives nothing back, and for fake tensors finds no shape right: it compares a list with a torch.Size."""


class Recorder(DispatchMode):
    """Writes down what operators allocate, and when it is released: when the last tensor of a storage goes, or the
    storage is resized to nothing.

    While it `answers`, a program may read numbers, which fake tensors do not have: conditions hold, and what is
    compared is 0 apart.
    """

    def __init__(self, mode: Any, meter: Meter, rules: CudaRules, vocabulary: int, *, is_sharded: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = mode
        self._results: dict[Any, tuple[Any, Any, torch.dtype]] = {}
        self.meter = meter
        self.rules = rules
        self.paused = False
        self.events: list[Event] = []
        self.causes: dict[int, Cause] = {}
        self.phases: list[tuple[int, Phase]] = []
        self.streams: dict[int, int] = {}
        self.kept: set[int] = set()
        self.emptied: list[int] = []
        self.training_from = 0
        self.paged_bytes = 0
        self.host_bytes = 0
        self.watch: Watch | None = None
        self.of_pass, self.of_optimizer = Watch(), Watch()
        self._is_in_a_pass = False
        self.entered: list[str] = []  # modules that compute at the moment, by name and class, the innermost last
        self.answers: Callable[[], bool] = lambda: False
        self._logits = {vocabulary, -(-vocabulary // ALIGNMENT) * ALIGNMENT}
        self._is_sharded = is_sharded
        self._graphs_stream = torch.cpu.Stream()
        self._stream_numbers = {torch.cpu.current_stream(): 0}
        self._names: dict[int, int | None] = {}
        self._workspaces: dict[tuple[str, int, bool], int] = {}

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        if operator is DEVICE_OF:  # asked for more often than all else together
            return fake_device(arguments[0])
        if operator is torch.ops.aten.rand.default and not arguments[0]:
            # A single number decides whether a layer is dropped: the most memory is held when none is.
            return fake_constant(self._mode, 1.0)
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # and see what it does with the rank's own part
        if operator is READ_BY_THE_HOST and self.answers():
            return arguments[0].dtype == torch.bool  # True, or 0 that differs from nothing
        if self.paused:
            return operator(*arguments, **options or {})
        self._enter_phase()
        for sent_or_received in written_by_fsdp(operator, arguments, options or {}):
            self.mark(sent_or_received, "gathered")
        if operator is ADDED_UP and not self._is_sharded:
            for bucket in arguments[0]:
                self.mark(bucket, "gradients")
        # Each thread that multiplies matrices has workspaces in each stream, and backward runs in another thread.
        for kind, size in self.rules.workspace_bytes(operator).items():
            if (workspace := (kind, self._stream(), in_backward())) not in self._workspaces:
                self._workspaces[workspace] = self._allocate(size, "workspace")
        scratch_bytes = self.rules.scratch_bytes(operator, arguments)
        scratch = self._allocate(scratch_bytes, "workspace") if scratch_bytes else None
        result = self._run(operator, arguments, options or {})
        if self.watch is not None:
            self.watch.see(operator, arguments, options or {}, result)
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._see(value)
        if scratch is not None:
            self.events.append((scratch, 0))
        return result

    def _run(self, operator: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """The operator's result. Shapes that were computed once are remembered: layers are alike, and asking fake
        tensors again takes most of a forecast's time."""
        is_view = operator.is_view or operator is VIEW_THAT_SAYS_IT_IS_NONE
        if is_view and type(arguments[0]) is FakeTensor:
            with no_dispatch(), in_kernel_invocation_manager(self._mode):
                view = operator(*arguments, **options)
            if type(view) is Tensor:
                return FakeTensor(self._mode, view, _CPU)
        if operator.name() == GROUPED_PRODUCT:
            with no_dispatch():
                return FakeTensor(self._mode, grouped_product(*arguments, **options), _CPU)
        if operator.name() == DEQUANTIZES_INTO:
            return None
        if _writes_to_its_first(operator) and type(arguments[0]) is FakeTensor and not has_content(arguments[0]):
            return arguments[0]
        if not _is_pure(operator):
            return operator(*arguments, **options)
        key = operator, _shapes(arguments), _shapes(tuple(options.items()))
        shape = self._results.get(key)
        if shape is None:
            result = operator(*arguments, **options)
            if type(result) is FakeTensor and result.dim() > 0:  # a scalar may carry its value
                self._results[key] = result.shape, result.stride(), result.dtype
            return result
        with no_dispatch():
            size, stride, dtype = shape
            return FakeTensor(self._mode, torch.empty_strided(size, stride, dtype=dtype, device="meta"), _CPU)

    def mark(self, tensor: Tensor, cause: Cause) -> None:
        """Say what a tensor is for; of a sharded one, the rank's own part."""
        tensor = own_part(tensor)
        self._see(tensor)
        if (name := self._names.get(address(tensor.untyped_storage()))) is not None:
            self.causes[name] = cause

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Write nothing down of what is allocated inside, until a tensor of it is marked."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def reserve(self, size: int) -> None:
        """Have a block of so many bytes allocated and released."""
        self._enter_phase()
        self.events.append((self._allocate(size, "weights"), 0))

    def begin_training(self) -> None:
        """Empty the cache, and let peaks count from here on."""
        self.empty_cache()
        self.training_from = len(self.events)

    def empty_cache(self) -> None:
        """As `torch.cuda.empty_cache`."""
        self.emptied.append(len(self.events))

    def free_unused(self) -> None:
        """As `captured.temporary.free_unused`."""
        self.events += [(name, 0) for name in self._workspaces.values()]
        self._workspaces.clear()
        self.empty_cache()

    @contextmanager
    def in_a_stream(self) -> Iterator[None]:
        """Inside, memory is that of a further stream, which no other gets."""
        with torch.cpu.stream(torch.cpu.Stream()):
            yield

    @contextmanager
    def in_the_graphs_pool(self) -> Iterator[None]:
        """Inside, memory is of the pool that all graphs share, and stays theirs."""
        with torch.cpu.stream(self._graphs_stream):
            self.kept.add(self._stream())
            yield

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, what the device does is counted as the work `of_pass`."""
        self.watch = self.of_pass = Watch()
        try:
            yield
        finally:
            self.watch = None

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Inside is one pass of the Trainer's, however often a method's own code has the network compute in it."""
        self.of_pass, self._is_in_a_pass = Watch(), True
        try:
            yield
        finally:
            self._is_in_a_pass = False

    @contextmanager
    def counting(self, times: int) -> Iterator[None]:
        """Inside, what the device does stands for so many times of it."""
        watch = self.watch
        if watch is not None:
            watch.times = times
        try:
            yield
        finally:
            if watch is not None:
                watch.times = 1

    def launched(
        self, name: str, programs: Sequence[int], arguments: Sequence[Any], settings: Mapping[str, Any]
    ) -> None:
        """Be told of a launch of a kernel of ours."""
        if self.watch is not None:
            self.watch.launched(name, programs, arguments, settings)

    def page(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor in managed memory, which the caching allocator knows nothing of."""
        paged = self._elsewhere(size, dtype)
        self.paged_bytes += paged.nbytes
        return paged

    def on_the_host(self, size: int) -> Tensor:
        """Bytes of the host's memory."""
        self.host_bytes += size
        return self._elsewhere((size,), torch.uint8)

    def copied(self, size: int, *, to_host: bool) -> None:
        """Be told of a copy between the device and the host."""
        if self.watch is not None:
            self.watch.copied(size, to_host=to_host)

    def _elsewhere(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor that the caching allocator knows nothing of."""
        with self.unseen():
            tensor = torch.zeros(size, dtype=dtype)
        storage = tensor.untyped_storage()
        key = address(storage)
        self._names[key] = None
        weakref.finalize(storage, self._forget, key)
        return tensor

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Note that a storage has changed its size. FSDP2 so frees the whole weights of a layer, and gets them back."""
        self._enter_phase()
        key = address(storage)
        if key in self._names:
            self._release(key)
        else:
            weakref.finalize(storage, self._forget, key)
        self._names[key] = self._allocate(storage.nbytes(), "gathered") if storage.nbytes() else None

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = address(storage), storage.nbytes()
        if key in self._names or size == 0:
            return
        if self._is_sharded and self._stream():
            cause: Cause = "gathered"
        elif self.meter.phase == "build":
            cause = "weights"
        elif tensor.dim() > 1 and tensor.size(-1) in self._logits:
            cause = "logits"
        else:
            cause = "activations"
        self._names[key] = self._allocate(size, cause)
        weakref.finalize(storage, self._forget, key)

    def _allocate(self, size: int, cause: Cause) -> int:
        name = len(self.causes)
        self.causes[name] = cause
        self.events.append((name, size))
        if stream := self._stream():
            self.streams[name] = stream
        return name

    def _stream(self) -> int:
        """Where memory is allocated now, each stream having a pool of the caching allocator's: FSDP2 gathers and
        reduces in streams of its own. torch gives the CPU such streams in name."""
        return self._stream_numbers.setdefault(torch.cpu.current_stream(), len(self._stream_numbers))

    def _release(self, key: int) -> None:
        if (name := self._names[key]) is not None:
            self.events.append((name, 0))

    def _forget(self, key: int) -> None:
        self._release(key)
        del self._names[key]

    def _enter_phase(self) -> None:
        if not self.phases or self.phases[-1][1] != self.meter.phase:
            if self.phases and self.phases[-1][1] == "build":
                self.begin_training()
            self.phases.append((len(self.events), self.meter.phase))
            self._watch_phase()

    def _watch_phase(self) -> None:
        """Count what the newest pass of the Trainer's has the device do, and the newest optimizer step."""
        phase = self.meter.phase
        if phase == "forward":
            self.of_pass = self.of_pass if self._is_in_a_pass else Watch()
            self.watch = self.of_pass
        elif phase == "optimizer":
            self.watch = self.of_optimizer = Watch()
        elif phase != "backward":
            self.watch = None


@contextmanager
def seeing_libraries(recorder: Recorder) -> Iterator[None]:
    """Inside, the recorder is shown what no operator does, storages being resized, and nothing of the whole tensors on
    which DTensor tries every operator; bitsandbytes does what it does on a GPU."""
    with ExitStack() as stack:
        stack.enter_context(storages_resized(recorder.resized))
        stack.enter_context(shapes_propagated_in(recorder.unseen))
        stack.enter_context(bitsandbytes_internals.as_on_a_gpu(recorder.page, recorder.unseen))
        yield


@functools.cache
def _is_pure(operator: Any) -> bool:
    """Whether an operator's result is new memory, and its shape follows from its arguments' shapes."""
    signature = schema(operator)
    return not (
        signature.is_mutable
        or any(value.alias_info is not None for value in signature.returns)
        or operator is VIEW_THAT_SAYS_IT_IS_NONE
        or torch.Tag.dynamic_output_shape in operator.tags
        or torch.Tag.data_dependent_output in operator.tags
    )


@functools.cache
def _writes_to_its_first(operator: Any) -> bool:
    """Whether an operator writes into its first argument and into nothing else, and gives that back as it was."""
    signature = schema(operator)
    written = [argument.name for argument in signature.arguments if argument.is_write]
    return (
        signature.name.endswith("_")
        and written == [signature.arguments[0].name]
        and [argument.is_write for argument in signature.returns] == [True]
        and not signature.name.startswith(("aten::resize", "aten::set_"))
        and torch.Tag.inplace_view not in operator.tags
    )


def _shapes(value: Any) -> Any:
    """What an operator's result depends on, in a form that can be looked up."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, tuple | list):
        return tuple(_shapes(item) for item in value)
    return type(value), value
