"""What is private or patched in torch: read in 2.11 and 2.13.

Fake tensors, the dispatcher's keys and FSDP2's parts have no public names. What else is here is replaced while
something runs, where torch has no switch for it.
"""

from __future__ import annotations

import copy
import functools
import math
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.nn import functional
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

__all__ = ["FakeTensor", "FakeTensorMode", "in_kernel_invocation_manager", "no_dispatch", "tree_iter"]
# Fake tensors have shapes and no content. torch/_subclasses/fake_tensor.py, where everybody imports them from;
# torch/utils/_mode_utils.py and _pytree.py are what their own operators are written with.

aten = torch.ops.aten

# What a module, a storage, an operator, a pass keeps to itself


@contextmanager
def no_hooks_left() -> Iterator[None]:
    """Where an exception leaves this, it takes no checkpointed layer's hook along. torch before 2.13 has the hook in
    place for as long as the exception's traceback lives, and takes every later pass of the process for a part of that
    layer. torch/utils/checkpoint.py, `checkpoint`."""
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise


def pin(network: Any) -> None:
    """Have `network.to` do nothing from now on: `Module.to` swaps tensors, which fake ones cannot.
    torch/nn/modules/module.py."""
    network.to = lambda *_, **__: network


def twin_of(module: nn.Module, children: dict[str, Any]) -> Any:
    """A copy of `module` with its class's own forward pass, computed once, and other `children`, of any class; weights
    are shared. Ibid., `Module._modules`; transformers/modeling_layers.py, `GradientCheckpointingLayer`."""
    twin = copy.copy(module)
    for own in ("forward", "gradient_checkpointing"):
        vars(twin).pop(own, None)
    vars(twin)["_modules"] = children
    return twin


def is_fork_without_cuda() -> bool:
    """Whether this process was forked from one that had initialised CUDA, and so can never use it.
    `torch.cuda.is_initialized` is false there, and torch raises only when CUDA is used."""
    return bool(torch.cuda._is_in_bad_fork())


def address(storage: torch.UntypedStorage) -> int:
    """What tells a storage from another while it lives, fake ones too: these have no `data_ptr`. torch/storage.py."""
    return int(storage._cdata)


def pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory of the host that a GPU can read. Raises MemoryError where there is none: torch has the words of CUDA for
    that, "out of memory", as if it were the GPU's."""
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise MemoryError(f"{math.prod(shape) * dtype.itemsize:,} bytes cannot be pinned: {reason}") from error


def on_the_host(tensor: Tensor) -> Tensor:
    """A copy of a GPU's tensor that is one of the GPU's as well, and whose numbers lie in the host's memory, pinned:
    kernels read them over PCIe, since both have one space of addresses. torch takes what lies there, as anything's that
    says so, by `__cuda_array_interface__`. torch/csrc/utils/tensor_numpy.cpp, `tensor_from_cuda_array_interface`."""
    place = pinned(tensor.shape, tensor.dtype)
    place.copy_(tensor)
    seen = torch.as_tensor(_SeenByTheGpu(place), device=tensor.device)
    return seen.view(tensor.dtype).view(tensor.shape)


class _SeenByTheGpu:
    """Pinned memory of the host as a GPU's bytes; the tensor that is made of it holds it."""

    def __init__(self, pinned: Tensor) -> None:
        self._pinned = pinned
        place = {"data": (pinned.data_ptr(), False), "shape": (pinned.nbytes,), "typestr": "|u1"}
        self.__cuda_array_interface__ = {**place, "version": 3}


def forward_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """What a module calls before and after its forward pass. torch/nn/modules/module.py, `_call_impl`."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def schema(operator: Any) -> Any:
    """The arguments and returns of an operator, and what it writes to. torch/_ops.py, `OpOverload`."""
    return operator._schema


VIEW_THAT_SAYS_IT_IS_NONE = aten._unsafe_view.default
"""What `matmul` reshapes its result by: its schema has no alias. aten/src/ATen/native/TensorShape.cpp."""


def copy_each_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy every source to its target, in a few kernels for all of them. torch's optimizers call it; there is no public
    name. aten/src/ATen/native/ForeachOpsKernels.cpp."""
    torch._foreach_copy_(list(targets), list(sources))


def add_each_(targets: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """As `copy_each_`, added."""
    torch._foreach_add_(list(targets), list(others))


def free_workspaces() -> None:
    """Have cuBLAS give back what it keeps on the GPU for each thread and stream that multiplies matrices; it takes it
    again where it needs it. torch's own CUDA graphs call it; there is no public name. aten/src/ATen/cuda/
    CublasHandlePool.cpp, `clearCublasWorkspaces`, which a build without CUDA lacks."""
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether something is called before or after the steps of `optimizer`, beside what all have called.
    torch/optim/optimizer.py."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


class FindingAllFinite(torch.amp.GradScaler):
    """A loss scaler that takes every gradient for finite, since a fake one cannot be asked: optimizers that do not ask
    themselves, on the device, are asked for. torch/amp/grad_scaler.py."""

    def _maybe_opt_step(self, optimizer: Any, optimizer_state: Any, *arguments: Any, **options: Any) -> Any:
        return optimizer.step(*arguments, **options)


# The dispatcher

# The kernels behind `scaled_dot_product_attention`, by which of them keeps what for the backward pass. The public
# function chooses among them by device. aten/src/ATen/native/native_functions.yaml.
cudnn_attention = aten._scaled_dot_product_cudnn_attention
flash_attention = aten._scaled_dot_product_flash_attention
efficient_attention = aten._scaled_dot_product_efficient_attention
math_attention = aten._scaled_dot_product_attention_math


def flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor | None,
    longest: int,
    *,
    window: int | None,
    dropout: float,
    scale: float | None,
) -> Tensor:
    """Causal attention on FlashAttention's kernels, with its backward pass.

    `query`: [tokens, heads, width], `key` and `value` with as many heads or a divisor of them, where `ends`, int32
    [sequences + 1], says how many tokens lie before each sequence, of `longest` tokens at most; [rows, time, heads,
    width] where it is None. A token sees `window` tokens, itself included, or all before it.

    `torch.nn.attention.varlen.varlen_attn` is the public name; it has no dropout and no rows of one length, wraps this
    operator in one of Python, and takes other arguments in 2.13 than in 2.11.
    aten/src/ATen/native/transformers/cuda/attention.cu.
    """
    attended: Tensor = aten._flash_attention_forward(
        query,
        key,
        value,
        ends,
        ends,
        longest,
        longest,
        dropout,
        window is None,
        False,
        scale=scale,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0,
    )[0]
    return attended


FLASH_FORWARD = aten._flash_attention_forward.default
FLASH_BACKWARD = aten._flash_attention_backward.default


def attention_kernel(
    name: str, tensors: tuple[Tensor, Tensor, Tensor], bias: Tensor | None
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The forward and the backward pass of one of these kernels, "flash", "efficient" or "cudnn", over query, key and
    value: causal where there is no `bias`, without dropout. Ibid."""
    causal = bias is None
    saved: tuple[Any, ...]
    if name == "flash":
        forward = functools.partial(flash_attention, *tensors, 0.0, causal)
        out, normaliser, cum_q, cum_k, max_q, max_k, seed, offset, _ = forward()
        saved = out, normaliser, cum_q, cum_k, max_q, max_k, 0.0, causal, seed, offset
        return forward, functools.partial(aten._scaled_dot_product_flash_attention_backward, out, *tensors, *saved)
    if name == "efficient":
        forward = functools.partial(efficient_attention, *tensors, bias, True, 0.0, causal)
        out, normaliser, seed, offset = forward()
        saved = out, normaliser, seed, offset, 0.0, [True, True, True, False], causal
        return forward, functools.partial(
            aten._scaled_dot_product_efficient_attention_backward, out, *tensors, bias, *saved
        )
    forward = functools.partial(cudnn_attention, *tensors, bias, True, 0.0, causal)
    out, normaliser, cum_q, cum_k, max_q, max_k, seed, offset, _ = forward()
    saved = out, normaliser, seed, offset, bias, cum_q, cum_k, max_q, max_k, 0.0, causal
    return forward, functools.partial(aten._scaled_dot_product_cudnn_attention_backward, out, *tensors, *saved)


# softmax(input, dim, half_to_float), which reads fp16 and writes fp32 where the last is True. Ibid.
softmax = aten._softmax
log_softmax = aten._log_softmax
SOFTMAX_BACKWARD = aten._softmax_backward_data.default


class DispatchMode(TorchDispatchMode):
    """torch's way to see every operator. torch/utils/_python_dispatch.py.

    The guard against compiling is left out, where nothing is compiled: it costs a tenth of a trace's time.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def registered(key: str) -> set[str]:
    """The operators of `aten` that have a kernel for a dispatch key such as AutocastCUDA, without their namespace.
    torch/csrc/utils/python_dispatch.cpp."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return {name.removeprefix("aten::") for name in names if name.startswith("aten::")}


def without_autocast_of_cpu() -> AbstractContextManager[Any]:
    """Inside, this thread's operators on the CPU are not cast: what a kernel of that key goes on with. `torch.autocast`
    would have them cast again. torch/csrc/utils/python_dispatch.cpp."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    guard: AbstractContextManager[Any] = torch._C._ExcludeDispatchKeyGuard(key)
    return guard


def unregister(library: torch.library.Library) -> None:
    """Take back all kernels of a `Library`, at once: else they go when it is collected. torch/library.py."""
    library._destroy()


def fake_constant(mode: FakeTensorMode, value: float) -> FakeTensor:
    """A fake scalar that knows its value, so that a program may branch on it. torch/_subclasses/fake_tensor.py."""
    with no_dispatch():
        real = torch.full((), value)
    return mode.fake_tensor_converter.from_real_tensor(mode, real, make_constant=True)


def has_content(tensor: FakeTensor) -> bool:
    """Whether `tensor` also carries a number, as what `torch.tensor(0.0)` makes does until a product of unknown content
    is written into it. torch/_subclasses/fake_tensor.py, `constant`."""
    return tensor.constant is not None


def with_numbers() -> AbstractContextManager[Any]:
    """Inside, tensors that are made have content, and nobody sees what is computed with them, whatever modes are on.
    torch/utils/_python_dispatch.py."""
    return _disable_current_modes()


DEVICE_OF = torch.ops.prim.device.default
"""By what torch's C++ asks a fake tensor where it is: `FakeTensor.__torch_dispatch__`.
torch/_subclasses/fake_tensor.py."""


def fake_device(tensor: Any) -> torch.device:
    """Where a fake tensor says it is. Ibid."""
    return tensor.fake_device  # type: ignore[no-any-return]


READ_BY_THE_HOST = aten._local_scalar_dense.default
"""By what `item`, `bool` and `tolist` read a number. Ibid."""

ADDED_UP = torch.ops.c10d.allreduce_.default
"""By what tensors are added up over ranks. torch/csrc/distributed/c10d/Ops.cpp."""


def in_backward() -> bool:
    """Whether this thread is in a backward pass. torch/csrc/autograd/init.cpp."""
    return torch._C._current_graph_task_id() != -1


FAKE_TENSOR_LOGGER = "torch._subclasses.fake_tensor"
"""Logs a traceback for every operator that cannot be traced."""

# FSDP2


def written_by_fsdp(operator: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> list[Tensor]:
    """What an operator of FSDP2's own writes to: the buffers that are sent and received; empty for others' operators.
    torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py."""
    if operator.namespace != "fsdp":
        return []
    outputs = arguments[1] if operator.name() == "fsdp::all_gather_copy_in" else options
    return [output for output in tree_iter(outputs) if isinstance(output, Tensor)]


def own_part(tensor: Any) -> Tensor:
    """The rank's own part of a DTensor, any other tensor itself. `DTensor.to_local` gives it another autograd history.
    torch/distributed/tensor/_api.py."""
    return getattr(tensor, "_local_tensor", tensor)  # type: ignore[no-any-return]


@contextmanager
def storages_resized(tell: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Inside, `tell` is told of every storage that has been resized, which no operator does: FSDP2 frees and restores
    gathered weights so. torch/distributed/fsdp/_fully_shard/_fsdp_param.py, `alloc_storage` and `free_storage`."""
    resize: Any = torch.UntypedStorage.resize_

    def resize_and_tell(storage: torch.UntypedStorage, size: int) -> None:
        resize(storage, size)
        tell(storage)

    with mock.patch.object(torch.UntypedStorage, "resize_", resize_and_tell):
        yield


@contextmanager
def shapes_propagated_in(context: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Inside, DTensor tries operators for the shape of their result, on whole tensors, within `context()`.
    torch/distributed/tensor/_sharding_prop.py."""
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    propagate: Any = ShardingPropagator._propagate_tensor_meta_non_cached

    def propagate_inside(*arguments: Any) -> Any:
        with context():
            return propagate(*arguments)

    with mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", propagate_inside):
        yield


@contextmanager
def sharded_over(mesh: Any) -> Iterator[None]:
    """Inside, `fully_shard` without a mesh shards over this one: accelerate gives it none, and its own would be made of
    GPUs. torch/distributed/fsdp/_fully_shard/_fsdp_init.py."""
    from torch.distributed.fsdp._fully_shard import _fully_shard

    with mock.patch.object(_fully_shard, "_init_default_mesh", return_value=mesh):
        yield


def fake_store() -> Any:
    """The store of the process group "fake", which says that it has so many members and moves nothing.
    torch/testing/_internal/distributed/fake_pg.py registers both."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


@contextmanager
def fake_tensors_have_addresses() -> Iterator[None]:
    """Inside, a fake tensor's `data_ptr` is its storage's `address`: accelerate tells parameters from each other by
    it, and torch warns of theirs, which is 0."""
    with mock.patch.object(FakeTensor, "data_ptr", lambda tensor: address(tensor.untyped_storage()), create=True):
        yield


# Functions that are replaced


@contextmanager
def gradients_clipped_at_once() -> Iterator[None]:
    """Inside, `clip_grad_norm_` takes all gradients in a few kernels, as on a GPU: fake tensors on the CPU it would
    take one by one. torch/nn/utils/clip_grad.py."""

    def has_support(*_: Any, **__: Any) -> bool:  # a mock would keep the gradients that it is asked about
        return True

    with mock.patch.object(sys.modules["torch.nn.utils.clip_grad"], "_has_foreach_support", has_support):
        yield


DYNAMOS_MEMORY = ("caching_worker_device_properties", "caching_worker_current_devices")
"""Dictionaries of torch/_dynamo/device_interface.py."""


@contextmanager
def answering_about_gpus(properties: Any) -> Iterator[None]:
    """Inside, who asks torch what the GPUs are is told these `properties`: torch itself would create a CUDA context to
    answer. torch/cuda/__init__.py; what torch/_dynamo/device_interface.py kept of the answers is forgotten."""
    answers: dict[str, Callable[..., Any]] = {
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: properties.name,
        "current_device": lambda: 0,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        yield
    interface = sys.modules.get("torch._dynamo.device_interface")
    for name in DYNAMOS_MEMORY:
        getattr(interface, name, {}).clear()


@contextmanager
def compiling_when_called() -> Iterator[None]:
    """Inside, `torch.compile` of a function waits for its first call: it would import torch's whole compiler."""
    original = torch.compile

    def later(function: Any = None, **options: Any) -> Any:
        if function is None or isinstance(function, nn.Module):
            return original(function, **options)
        compiled: Callable[[], Any] = functools.cache(lambda: original(function, **options))

        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            return compiled()(*arguments, **keywords)

        return call

    with mock.patch.object(torch, "compile", later):
        yield


DROPOUTS = (
    *((functional, name) for name in ("dropout", "dropout1d", "dropout2d", "dropout3d")),
    *((functional, name) for name in ("alpha_dropout", "feature_alpha_dropout")),
    *((torch, name) for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")),
)
"""Where networks find them, each call anew. A mode of torch's dispatcher would be suspended in backward passes, in
which checkpointed layers are computed once more."""


@contextmanager
def without_dropout() -> Iterator[None]:
    """Inside, no dropout of `DROPOUTS` and of attention drops anything."""
    attention = functional.scaled_dot_product_attention

    def let_through(input: Tensor, *_: Any, **__: Any) -> Tensor:
        return input

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,  # noqa: ARG001  named as torch names it
        *arguments: Any,
        **options: Any,
    ) -> Tensor:
        return attention(query, key, value, attn_mask, 0.0, *arguments, **options)

    with ExitStack() as stack:
        for module, name in DROPOUTS:
            stack.enter_context(mock.patch.object(module, name, let_through))
        stack.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", attend))
        yield


@contextmanager
def replicas_of_fake_tensors() -> Iterator[None]:
    """Inside, DistributedDataParallel sends the first rank's weights as flat buffers of its size, two at a time, takes
    replicas to be alike, and keeps its first buckets, where it would make as many anew in the order in which gradients
    came: all of it C++ that reads memory. torch/nn/parallel/distributed.py, `__init__` and `_pre_forward`."""

    def send(*, module: Any, broadcast_bucket_size: int, **_: Any) -> None:
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for tensor in (*module.parameters(), *module.buffers()):
            by_dtype.setdefault(tensor.dtype, []).append(tensor.detach().reshape(-1))
        sent: deque[torch.Tensor] = deque(maxlen=2)
        for tensors in by_dtype.values():
            while tensors:
                size = 0
                bucket = []
                while tensors and size < broadcast_bucket_size:
                    bucket.append(tensors.pop(0))
                    size += bucket[-1].nbytes
                sent.append(torch.cat(bucket))

    module = torch.nn.parallel.distributed
    with (
        mock.patch.object(module, "_verify_param_shape_across_processes", return_value=True),
        mock.patch.object(module, "_sync_module_states", send),
        mock.patch.object(torch.distributed.Reducer, "_rebuild_buckets", return_value=False),  # type: ignore[attr-defined]
    ):
        yield
