"""What does the device do in an optimizer step? Its kernels, by what they compute and how much: from the trace.

A kernel is known by its kind, the number format it computes in, and the few sizes its speed depends on; with them go
the arithmetic it does and the bytes it reads and writes at the least. Kernels of one description are counted, so that
the work of a network of any depth is some hundred of these.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lightweight.internals.torch import VIEW_THAT_SAYS_IT_IS_NONE, schema, tree_iter


class Kernel(NamedTuple):
    """A kernel of the device: `kind` with the `shape` that its speed depends on.

    Products have [m, n, k], and "nt" in their kind where the second factor is stored transposed; attention has [rows x
    heads, queries, keys, width of a head]; kernels of this project have [bytes, programs]; all others, [bytes].
    `flop` are multiplications and additions.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    flop: int
    bytes: int


Kernels = Mapping[Kernel, int]
"""How often each kernel runs."""


class Work(NamedTuple):
    """What a step has the device do, and the operators by which the host asks for it."""

    kernels: Kernels
    operators: int

    @property
    def flop(self) -> int:
        """Multiplications and additions of products and attention."""
        return sum(kernel.flop * count for kernel, count in self.kernels.items())

    @property
    def format(self) -> str:
        """The number format in which most of that is done."""
        of_format: Counter[str] = Counter()
        for kernel, count in self.kernels.items():
            of_format[kernel.dtype] += kernel.flop * count
        return max(of_format, key=lambda dtype: of_format[dtype], default="float32")

    def copied(self, kind: str) -> int:
        """Bytes that copies of this kind move, see COPIES."""
        return sum(kernel.bytes * count for kernel, count in self.kernels.items() if kernel.kind == kind)

    @property
    def launches(self) -> int:
        """How many kernels run."""
        return sum(self.kernels.values())


NOTHING = Work({}, 0)


def added(*parts: tuple[Work, int]) -> Work:
    """The work of each part, so many times."""
    kernels: Counter[Kernel] = Counter()
    for work, times in parts:
        for kernel, count in work.kernels.items():
            kernels[kernel] += count * times
    return Work(dict(kernels), sum(work.operators * times for work, times in parts))


class Watch:
    """Sees every operator, and every launch of a kernel of ours, and counts the kernels, each as often as `times`
    says."""

    def __init__(self) -> None:
        self.times = 1
        self._kernels: Counter[Kernel] = Counter()
        self._operators = 0

    def see(self, operator: Any, arguments: Sequence[Any], options: Mapping[str, Any], result: Any) -> None:
        """Count the kernels of an operator that has returned `result`."""
        self._operators += self.times
        if operator.is_view or operator is VIEW_THAT_SAYS_IT_IS_NONE:
            return
        for kernel in kernels_of(operator, arguments, options, result):
            if kernel.bytes:
                self._kernels[kernel] += self.times

    def launched(
        self, name: str, programs: Sequence[int], arguments: Sequence[Any], settings: Mapping[str, Any]
    ) -> None:
        """Count a kernel of `captured.triton_kernels`."""
        self._operators += self.times
        self._kernels[triton_kernel(name, programs, arguments, settings)] += self.times

    def copied(self, size: int, *, to_host: bool) -> None:
        """Count a copy between the device and the host."""
        self._kernels[a_pass(TO_HOST if to_host else FROM_HOST, size)] += self.times

    def work(self) -> Work:
        """What was seen so far."""
        return Work(dict(self._kernels), self._operators)


TO_HOST, FROM_HOST = COPIES = "copy to the host", "copy from the host"
"""Kinds that are no kernels, but run beside them."""


# Kernels of ours

PASSED_OVER_AGAIN = {
    "add_adapter": {0: 1},  # what the adapter's output is added to is read as well
    "project_backward": {3: 1},  # so is the input's gradient
    "adapter_backward": {5: 1},
    "cross_entropy": {0: 2},  # logits are read twice, and their gradient is written
}
"""How often more a kernel passes over an argument, by its position; over every other one it passes once."""


def triton_kernel(name: str, programs: Sequence[int], arguments: Sequence[Any], settings: Mapping[str, Any]) -> Kernel:
    """A launch of the kernel called `name` in `captured.triton_kernels` or beside it."""
    if name.startswith("attend"):
        return _attended(name, arguments)
    again = PASSED_OVER_AGAIN.get(name, {})
    if name == "rotate" and arguments[0] is arguments[2]:
        again = {0: 1, 1: 1}  # in place
    if settings.get("reaches_x") is False:
        again = {}  # what stands in for the input's gradient is the input, and nothing is added to it
    seen: dict[int, int] = {}
    for index, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            seen[id(argument)] = max(seen.get(id(argument), 0), _bytes(argument) * (1 + again.get(index, 0)))
    total = sum(seen.values())
    first = next(argument for argument in arguments if isinstance(argument, Tensor))
    kind = name + " with dropout" * bool(settings.get("drops")) + " with a norm" * bool(settings.get("normed"))
    return Kernel(kind, _dtype(first), (total, math.prod(programs)), 0, total)


def _attended(name: str, arguments: Sequence[Any]) -> Kernel:
    """Attention by the kernels of `captured.triton_flash`. What a window spares is not known here. Of the gradient of
    keys, a program has all queries of a group that see its keys, one after the other: they count as so many queries."""
    query = arguments[0] if name == "attend" else arguments[1]
    time = next(argument for argument in arguments if isinstance(argument, int))
    tokens, heads, width = query.shape
    sizes = (max(1, tokens // time) * heads, time, time, width)
    whole = attention("our", _dtype(query), sizes, causal=True, masked=False, backward=name != "attend")
    if name == "attend":
        return whole
    if name.endswith("query"):
        return whole._replace(kind="our attention backward of queries, causal", flop=int(whole.flop * 0.4))
    group = heads // arguments[2].shape[1]
    sizes = (sizes[0] // group, group * time, time, width)
    return whole._replace(kind="our attention backward of keys, causal", flop=int(whole.flop * 0.6), shape=sizes)


# torch's and bitsandbytes'

SILENT = frozenset(
    f"aten::{name}"
    for name in """
    alias detach detach_ empty empty_like empty_strided new_empty new_empty_strided lift_fresh resize_ set_
    _local_scalar_dense is_same_size sym_size record_stream
    """.split()  # noqa: SIM905
)
"""What runs no kernel and says it is no view."""

PRODUCTS = frozenset(["aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"])

GATHERS = frozenset(["aten::embedding", "aten::index_select", "aten::index", "aten::gather"])
"""What reads of its first argument only as much as it writes."""

FILLS = frozenset(
    f"aten::{name}"
    for name in """
    zeros zeros_like new_zeros zero_ ones ones_like new_ones full full_like new_full fill_ arange scalar_tensor
    rand randn rand_like randn_like random_ uniform_ normal_ bernoulli_
    """.split()  # noqa: SIM905
)
"""What reads nothing."""

ROW_BY_ROW = frozenset(
    f"aten::{name}"
    for name in """
    _softmax _log_softmax _softmax_backward_data _log_softmax_backward_data native_layer_norm
    native_layer_norm_backward _fused_rms_norm _fused_rms_norm_backward
    """.split()  # noqa: SIM905
)

REDUCTIONS = frozenset(
    f"aten::{name}"
    for name in """
    sum mean amax max min amin norm linalg_vector_norm var std var_mean argmax logsumexp any all prod dot
    """.split()  # noqa: SIM905
)

DEQUANTIZATIONS = frozenset(["dequantization", "unpack"])
"""Kinds of kernels, bitsandbytes' and ours, that make weights of 4 bits whole."""

AT_ONCE = (*("aten::_foreach_", "aten::_fused_adam", "aten::_amp_foreach"),)
"""How operators on whole lists of tensors begin."""

TENSORS_OF_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
CHUNK, CHUNKS_OF_A_LAUNCH = 65_536, 320
"""How many tensors a kernel on lists takes, by the number of lists, and how many chunks of so many elements.
aten/src/ATen/native/cuda/MultiTensorApply.cuh."""

CAUSAL_SHARE = 0.5
"""Of the scores of all pairs, what causality leaves."""

BACKWARD = 2.5
"""Five products in the place of two: the scores once more, and the gradients of four factors."""


def kernels_of(operator: Any, arguments: Sequence[Any], options: Mapping[str, Any], result: Any) -> Iterator[Kernel]:
    """The kernels that an operator, none of whose results is a view, runs on a GPU."""
    name = schema(operator).name
    if name in SILENT or name.startswith("profiler::"):
        return
    if name in PRODUCTS:
        yield _product(name, arguments)
    elif name == "bitsandbytes::gemm_4bit":
        x, shape = arguments[0], arguments[2]
        yield _dequantization(_bytes(arguments[1]), math.prod(shape), x)
        yield product("nt", _dtype(x), x.numel() // x.shape[-1], shape[0], shape[1], x.element_size())
    elif name == "bitsandbytes::int8_linear_matmul":
        rows, weight = arguments[:2]
        n, k = weight.shape
        yield product("nt", _dtype(rows), rows.numel() // k, n, k, rows.element_size())
    elif name == "bitsandbytes::dequantize_4bit":
        whole = arguments[-1] if result is None else result
        yield _dequantization(_bytes(arguments[0]), whole.numel(), whole)
    elif name in ("aten::_flash_attention_forward", "aten::_flash_attention_backward"):
        yield _flash({**dict(zip(_names(operator), arguments, strict=False)), **options}, name.endswith("backward"))
    elif "scaled_dot_product" in name:
        yield _attention(name, {**dict(zip(_names(operator), arguments, strict=False)), **options})
    elif name.startswith(AT_ONCE):
        yield from _at_once(arguments, options)
    else:
        yield from _passes(name, operator, arguments, options, result)


def product(layout: str, dtype: str, m: int, n: int, k: int, size: int, *, is_added: bool = False) -> Kernel:
    """[m, k] by [k, n], of elements of `size` bytes; `is_added` to what the result held before."""
    kind = f"product {layout}, added" if is_added else f"product {layout}"
    moved = (m * k + k * n + m * n * (2 if is_added else 1)) * size if m * n * k else 0
    return Kernel(kind, dtype, (m, n, k), 2 * m * n * k, moved)


def attention(
    kernel: str, dtype: str, sizes: tuple[int, int, int, int], *, causal: bool, masked: bool, backward: bool
) -> Kernel:
    """Attention by the `kernel` so called, of [rows x heads, queries, keys, width] as `sizes`, in two bytes a number or
    four."""
    rows, queries, keys, width = sizes
    flop = 4 * rows * queries * keys * width * (CAUSAL_SHARE if causal else 1) * (BACKWARD if backward else 1)
    size = 4 if dtype == "float32" else 2
    moved = rows * width * size * (2 * queries + 2 * keys) * (2 if backward else 1)
    words = f"{kernel} attention{' backward' if backward else ''}"
    kind = words + (", causal" if causal else "") + (", masked" if masked else "")
    return Kernel(kind, dtype, sizes, int(flop), moved)


def a_pass(kind: str, count: int) -> Kernel:
    """A pass over so many bytes of memory."""
    return Kernel(kind, "", (count,), 0, count)


def _product(name: str, arguments: Sequence[Any]) -> Kernel:
    adds = name in ("aten::addmm", "aten::addmm_", "aten::baddbmm")
    first, second = arguments[1:3] if adds else arguments[:2]
    layout = "".join("t" if _is_transposed(factor) else "n" for factor in (first, second))
    batch = first.shape[0] if first.dim() == 3 else 1
    m, k = first.shape[-2:]
    is_added = adds and arguments[0].dim() == first.dim()  # and no bias
    size = first.element_size()
    return product(layout, _dtype(first), batch * m, second.shape[-1], k, size, is_added=is_added)


def _is_transposed(factor: Tensor) -> bool:
    return factor.stride(-1) != 1 and factor.stride(-2) == 1


def _dequantization(packed: int, elements: int, like: Tensor) -> Kernel:
    return a_pass("dequantization", packed + elements * like.element_size())


def _attention(name: str, given: Mapping[str, Any]) -> Kernel:
    kernel = name.removeprefix("aten::_scaled_dot_product_").split("_")[0]
    query, key = given["query"], given["key"]
    return attention(
        kernel,
        _dtype(query),
        (query.shape[0] * query.shape[1], query.shape[2], key.shape[2], query.shape[3]),
        causal=bool(given.get("is_causal")),
        masked=given.get("attn_bias") is not None and given["attn_bias"].numel() > 0,
        backward=name.endswith("_backward"),
    )


def _flash(given: Mapping[str, Any], backward: bool) -> Kernel:
    """FlashAttention over [tokens, heads, width] of several sequences, which are taken to be as long as they are in the
    mean; or over [rows, time, heads, width]. A window leaves of causality what lies within it."""
    query, ends, window = given["query"], given.get("cum_seq_q"), given.get("window_size_left")
    heads, width = query.shape[-2:]
    tokens = query.numel() // (heads * width)
    rows = query.shape[0] if ends is None or query.dim() == 4 else max(1, ends.numel() - 1)
    length = max(1, tokens // rows)
    whole = attention(
        "flash", _dtype(query), (rows * heads, length, length, width), causal=True, masked=False, backward=backward
    )
    if window is None or not 0 <= window < length:
        return whole
    seen = (window + 1) * (2 * length - window) / length**2  # of the pairs that causality leaves
    return whole._replace(flop=int(whole.flop * min(1, seen)))


def _at_once(arguments: Sequence[Any], options: Mapping[str, Any]) -> Iterator[Kernel]:
    """The launches of an operator on lists of tensors, the first of which it writes to."""
    lists = [
        [item for item in value if isinstance(item, Tensor)]
        for value in (*arguments, *options.values())
        if isinstance(value, list | tuple)
    ]
    lists = [of for of in lists if sum(item.numel() for item in of) > len(of)] or [of for of in lists if of]
    if not lists:
        return
    chunks = sum(-(-item.numel() // CHUNK) for item in lists[0])
    tensors = TENSORS_OF_A_LAUNCH[min(len(lists), 5)]
    launches = max(-(-len(lists[0]) // tensors), -(-chunks // CHUNKS_OF_A_LAUNCH))
    moved = sum(_bytes(item) for of in [*lists, lists[0]] for item in of)
    for _ in range(launches):
        yield a_pass("elementwise", moved // launches)


def _passes(
    name: str, operator: Any, arguments: Sequence[Any], options: Mapping[str, Any], result: Any
) -> Iterator[Kernel]:
    """The passes over memory of all other operators: over each argument, and over what is written."""
    outputs = _tensors(result)
    written = sum(_bytes(tensor) for tensor in outputs)
    inputs = _tensors((arguments, [value for name, value in options.items() if name != "out"]))
    if name in FILLS:
        yield a_pass("elementwise", written)
        return
    if name in GATHERS:
        yield a_pass("elementwise", 2 * written)
        return
    if name in ("aten::slice_backward", "aten::select_backward"):
        yield a_pass("elementwise", written)
        yield a_pass("elementwise", 2 * _bytes(arguments[0]))
        return
    if name == "aten::copy_":
        inputs = _tensors(arguments[1:])
    read = {id(tensor): _bytes(tensor) for tensor in inputs}
    kind = _kind_of_pass(name, inputs, outputs, arguments)
    own = {id(tensor) for tensor in inputs}
    if name != "aten::copy_" and not _writes_in_place(operator):
        written = sum(_bytes(tensor) for tensor in outputs if id(tensor) not in own)
    yield a_pass(kind, sum(read.values()) + written)


def _kind_of_pass(name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], arguments: Sequence[Any]) -> str:
    if name in ROW_BY_ROW:
        return "row by row"
    if name in REDUCTIONS:
        axes = next((value for value in arguments[1:] if isinstance(value, list | tuple)), None)
        last = axes is None or any(axis in (-1, arguments[0].dim() - 1) for axis in axes)
        return "reduction of rows" if last else "reduction of columns"
    if name == "aten::cat":
        return "concatenation"
    layouts = {_layout(tensor) for tensor in (*inputs, *outputs)}
    return "elementwise" if len(layouts) < 2 and not any(layout[0] == 0 for layout in layouts) else "strided"


@functools.cache
def _names(operator: Any) -> tuple[str, ...]:
    return tuple(argument.name for argument in schema(operator).arguments)


@functools.cache
def _writes_in_place(operator: Any) -> bool:
    return bool(schema(operator).is_mutable)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_iter(values) if isinstance(value, Tensor)]


def _distinct(tensor: Tensor) -> list[tuple[int, int]]:
    """Size and stride of each axis along which there are different elements."""
    return [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride and size > 1]


def _bytes(tensor: Tensor) -> int:
    """Of a tensor's elements, those that are expanded counted once."""
    return math.prod(size for size, _ in _distinct(tensor)) * tensor.element_size()


def _layout(tensor: Tensor) -> tuple[int, ...]:
    """Alike for tensors that are walked through together in wide loads, as all of an operator's must be: where their
    elements lie one after the other, how many, and in which order of the axes; else what is no other's layout."""
    axes = list(_distinct(tensor))
    expected = 1
    for size, stride in sorted(axes, key=lambda axis: axis[1]):
        if stride != expected:
            return 0, id(tensor)
        expected *= size
    return expected, *(stride for _, stride in axes)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
