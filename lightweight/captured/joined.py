"""Which frozen layers are one product, and are their adapters in it? Query, key and value as one feed a matrix unit
better than one by one, and so do gate and up.

Where nothing is dropped, the factors of an adapter go beside the weight, in one matrix:

    [x, x A'] [W, B]' = x W' + x A' B'        [dy, dy B] [W; A] = dy W + dy B A

so that what the adapter adds to the layer's output and to the gradient of its input costs no pass over either. It asks
for rows that have room at their end for what comes between the factors: their owner leaves it (`kernels.with_room`) and
says so (`has_room`); a gradient lies as what it is of does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from lightweight import preload  # isort: skip  # noqa: F401  # before bitsandbytes

import bitsandbytes.functional
import torch
from bitsandbytes.nn.modules import Linear4bit

from lightweight.captured import kernels, launching
from lightweight.internals import torch as torch_internals

Adapter = tuple[torch.Tensor, torch.Tensor]
"""Its factors a [r, in] and b [out, r]."""

MOST_RANKS = 128
"""Ranks of all adapters of a family that one kernel's program has in its registers."""

ALIGNED = 8
"""Numbers of two bytes that a product loads at once: rows that begin elsewhere halve its speed."""


@dataclass(frozen=True)
class Joint:
    """The weights of several layers as one, [sum of `widths`, in], and their biases. Where they are of 4 bits, they are
    made one when they are dequantized."""

    bases: list[Any]
    widths: list[int]
    whole: torch.Tensor | None
    bias: torch.Tensor | None

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """[sum of widths, in]."""
        if self.whole is not None:
            return self.whole
        packed: Any = [base.weight for base in self.bases]
        shape = sum(self.widths), self.bases[0].in_features
        joint = torch.empty(shape, dtype=packed[0].quant_state.dtype, device=packed[0].device)
        for part, each in zip(joint.split(self.widths), packed, strict=True):
            bitsandbytes.functional.dequantize_4bit(each.data, each.quant_state, out=part)
        return joint.to(dtype)

    def bias_in(self, dtype: torch.dtype) -> torch.Tensor | None:
        """[sum of widths], if any."""
        return None if self.bias is None else self.bias.to(dtype)


@torch.no_grad()
def joint_of(bases: list[Any], between: Sequence[torch.Tensor], most: int) -> Joint | None:
    """Several layers as one; the weights of whole ones become parts of one, and move together with those that were
    loaded `between` them: what they leave is then as large as what the next layer's need, and they take it. None where
    that cannot be, and where one of 4 bits would have more than `most` elements."""
    biases = [base.bias for base in bases if base.bias is not None]
    if len(bases) == 1 or len(biases) not in (0, len(bases)):
        return None
    bias = torch.cat(biases) if biases else None
    widths = [base.out_features for base in bases]
    if all(isinstance(base, Linear4bit) for base in bases):
        elements = sum(widths) * bases[0].in_features
        is_fast = elements <= most and launching.take(bases[0].weight)
        return Joint(bases, widths, None, bias) if is_fast else None
    if any(type(base) is not torch.nn.Linear for base in bases):
        return None
    weights = [base.weight for base in bases]
    if (whole := _as_they_lie(weights)) is None:
        moved = [*weights, *(weight for weight in between if weight.dtype == weights[0].dtype)]
        storage = torch.cat([weight.flatten() for weight in moved])
        for weight, part in zip(moved, storage.split([weight.numel() for weight in moved]), strict=True):
            weight.data = part.view(weight.shape)
        whole = _as_they_lie(weights)
    return Joint(bases, widths, whole, bias)


def _as_they_lie(weights: list[torch.Tensor]) -> torch.Tensor | None:
    """Weights [out, in] as one, [sum of out, in], where each already lies behind the one before it."""
    first, place = weights[0], weights[0].storage_offset()
    storage = torch_internals.address(first.untyped_storage())
    for weight in weights:
        is_next = torch_internals.address(weight.untyped_storage()) == storage and weight.storage_offset() == place
        if not (is_next and weight.is_contiguous() and weight.dtype == first.dtype):
            return None
        place += weight.numel()
    rows = sum(weight.shape[0] for weight in weights)
    return first.detach().as_strided((rows, first.shape[1]), first.stride(), first.storage_offset())


def side_by_side(grads: list[torch.Tensor | None], room: int = 0) -> torch.Tensor | None:
    """Gradients [tokens, out], all in one tensor, [tokens, sum of out]: where they are parts of one already, or the
    first are, in rows with room for the rest, which are then copied there. Behind these there may be `room`. None where
    they lie elsewhere."""
    first = grads[0]
    if first is None or any(grad is None for grad in grads):
        return None
    tokens, width = first.shape[0], sum(grad.shape[1] for grad in grads if grad is not None)
    storage, stride = first.untyped_storage(), first.stride(0)
    if stride not in (width, width + room) or first.stride(1) != 1 or first.storage_offset() != 0:
        return None
    if storage.nbytes() != tokens * stride * first.element_size():
        return None
    row, place = first.as_strided((tokens, width), (stride, 1)), 0
    for grad in grads:
        assert grad is not None
        is_there = torch_internals.address(grad.untyped_storage()) == torch_internals.address(storage)
        if is_there and (grad.stride() != (stride, 1) or grad.storage_offset() != place):
            return None
        if not is_there:
            row[:, place : place + grad.shape[1]].copy_(grad)
        place += grad.shape[1]
    return row


# With their adapters


@dataclass(frozen=True)
class Whole:
    """Frozen layers and all their adapters as one matrix, [[W, B], [A, -]], of `out` + `room` rows and `width` + `room`
    columns; B has each adapter's factor where the rows of its layer and its own columns meet, and zeros elsewhere, and
    A has their `scaling` in it. It is there, or made of weights of 4 bits whenever it is asked for."""

    bases: list[Any]
    adapters: list[Adapter]
    scaling: float
    bias: torch.Tensor | None
    there: torch.Tensor | None

    @cached_property
    def widths(self) -> list[int]:
        """The outputs of each layer."""
        return [base.out_features for base in self.bases]

    @cached_property
    def ranks(self) -> list[int]:
        """Of each adapter."""
        return [a.shape[0] for a, _ in self.adapters]

    @cached_property
    def out(self) -> int:
        """The outputs of all layers together."""
        return sum(self.widths)

    @cached_property
    def width(self) -> int:
        """The inputs."""
        return int(self.bases[0].in_features)

    @cached_property
    def room(self) -> int:
        """How much of it rows of inputs and of outputs' gradients want at their end."""
        return sum(self.ranks)

    @property
    def dtype(self) -> torch.dtype:
        """The number format of all of it."""
        return self.adapters[0][0].dtype

    def forward(self, x: torch.Tensor, *, has_room: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs, [tokens, out] with room, of `x` [tokens, in], and what the second factors were multiplied with,
        [tokens, ranks]. What `has_room` is written to there."""
        matrix, tokens, out, width = self._matrix(), x.shape[0], self.out, self.width
        y = kernels.with_room(torch.Size((tokens, out)), self.room, x)
        first, second = matrix[out:, :width], matrix[:out, width:]
        if has_room:
            beside = x.as_strided((tokens, self.room), x.stride(), x.storage_offset() + width)
            inner = kernels.project(x, first, 1.0, beside)
            x = x.as_strided((tokens, width + self.room), x.stride(), x.storage_offset())
            self._product(x, matrix[:out], y)
            return y, inner
        inner = kernels.project(x, first, 1.0)
        self._product(x, matrix[:out, :width], y)
        return y.addmm_(inner, second.t()), inner

    def backward(self, grad: torch.Tensor, *, reaches_x: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What comes back through the second factors, [tokens, ranks], and the gradient of the input, if that is asked
        for, given that of the outputs, [tokens, out], whose rows have room: it is written to."""
        matrix, tokens = self._matrix(), grad.shape[0]
        reached = grad.as_strided((tokens, self.room), grad.stride(), grad.storage_offset() + self.out)
        torch.mm(grad, matrix[: self.out, self.width :], out=reached)
        if not reaches_x:
            return reached, None
        row = grad.as_strided((tokens, self.out + self.room), grad.stride(), grad.storage_offset())
        return reached, row @ matrix[:, : self.width]

    def with_room(self, *grads: torch.Tensor | None) -> torch.Tensor:
        """The gradients of the layers' outputs, not all of them None, [tokens, out] with room: where they lie, if they
        lie so, or copied."""
        flat = [None if grad is None else kernels.flat(grad)[0] for grad in grads]
        row = side_by_side(flat, self.room)
        if row is not None and row.stride(0) == self.out + self.room:
            return row
        like = next(grad for grad in flat if grad is not None)
        row = kernels.with_room(torch.Size((like.shape[0], self.out)), self.room, like)
        for part, grad in zip(row.split(self.widths, -1), flat, strict=True):
            part.zero_() if grad is None else part.copy_(grad)
        return row

    def placements(self) -> list[Adapter]:
        """Where the factors of each adapter go, in the matrix that is there."""
        places, row, column = [], 0, 0
        if self.there is None:
            return []
        for width, rank in zip(self.widths, self.ranks, strict=True):
            a = self.there[self.out + column : self.out + column + rank, : self.width]
            b = self.there[row : row + width, self.width + column : self.width + column + rank]
            places.append((a, b))
            row, column = row + width, column + rank
        return places

    def _matrix(self) -> torch.Tensor:
        if self.there is not None:
            return self.there
        shape = self.out + self.room, self.width + self.room
        matrix = torch.empty(shape, dtype=self.dtype, device=self.adapters[0][0].device)
        row = column = 0
        for base, adapter in zip(self.bases, self.adapters, strict=True):
            unpack(base, adapter, self.scaling, matrix, (row, column), (self.out, self.room))
            row, column = row + base.out_features, column + adapter[0].shape[0]
        return matrix

    def _product(self, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> None:
        if self.bias is None:
            torch.mm(x, weight.t(), out=y)
        else:
            torch.addmm(self.bias, x, weight.t(), out=y)


ELEMENTS = 4096
"""Of a program that makes numbers of 4 bits."""

FACTORS = 8
"""Programs that place the factors of a layer's adapter beside it."""


def unpack(
    base: Any,
    adapter: Adapter,
    scaling: float,
    matrix: torch.Tensor,
    place: tuple[int, int],
    sizes: tuple[int, int],
) -> None:
    """A layer of 4 bits and its adapter's factors into a `matrix` of `sizes` outputs and ranks, at a `place` among
    these. bitsandbytes/functional.py, `dequantize_4bit`."""
    (a, b), state, (row, column), (out, room) = adapter, base.weight.quant_state, place, sizes
    outer, scales = state.state2 if state.nested else None, state.absmax
    programs = -(-base.out_features * base.in_features // ELEMENTS)
    launching.launch(
        "unpack", (programs + FACTORS,),
        base.weight.data, scales, state.code, scales if outer is None else outer.absmax,
        state.code if outer is None else outer.code, scales if outer is None else state.offset, a, b, matrix, scaling,
        row, column, base.out_features, base.in_features, out, a.shape[0], room, matrix.stride(0), programs,
        block=state.blocksize, outer_block=1 if outer is None else outer.blocksize, nested=outer is not None,
        elements=ELEMENTS,
    )  # fmt: skip


Layers = tuple[list[Any], Sequence[Adapter | None]]
"""Frozen layers that project one input, and their adapters."""

_WHOLES: WeakKeyDictionary[Any, torch.Tensor] = WeakKeyDictionary()
"""The matrix that a layer's weight is a part of, by the first layer of a family."""


@torch.no_grad()
def whole_of(bases: list[Any], adapters: Sequence[Adapter | None], scaling: float) -> Whole | None:
    """Layers with all their adapters as one, whose weights become parts of it; None where that cannot be. The adapters
    drop nothing."""
    if not _can_be_whole(bases, adapters):
        return None
    own = [adapter for adapter in adapters if adapter is not None]
    biases = [base.bias for base in bases if base.bias is not None]
    bias = torch.cat(biases).to(own[0][0].dtype) if biases else None
    if isinstance(bases[0], Linear4bit):
        return Whole(bases, own, scaling, bias, None)
    gather([(bases, adapters)], [])
    return Whole(bases, own, scaling, bias, _WHOLES[bases[0]])


def _can_be_whole(bases: list[Any], adapters: Sequence[Adapter | None]) -> bool:
    own = [adapter for adapter in adapters if adapter is not None]
    biases = [base.bias for base in bases if base.bias is not None]
    if len(own) < len(bases) or len(biases) not in (0, len(bases)):
        return False
    dtype, factors = own[0][0].dtype, [factor for adapter in own for factor in adapter]
    if any(factor.dtype != dtype or not factor.is_contiguous() for factor in factors):
        return False
    (rows, columns), room = _shape_of(bases, adapters), _room_of(adapters)
    if room > MOST_RANKS or any(size % ALIGNED for size in (rows, columns, room)):
        return False
    if all(isinstance(base, Linear4bit) for base in bases):
        return all(_is_known(base.weight, dtype) for base in bases)
    return all(type(base) is torch.nn.Linear and base.weight.dtype == dtype for base in bases)


def _shape_of(bases: list[Any], adapters: Sequence[Adapter | None]) -> tuple[int, int]:
    room = _room_of(adapters)
    return sum(base.out_features for base in bases) + room, bases[0].in_features + room


@torch.no_grad()
def gather(families: Sequence[Layers], others: Sequence[torch.Tensor]) -> None:
    """Have whole weights of `families` become parts of matrices with room for their adapters', in one piece of memory,
    and `others` that lie among them move along: what they leave is then one piece as well, which takes what comes next,
    and not as many holes."""
    moving = [
        family
        for family in families
        if _can_be_whole(*family) and not isinstance(family[0][0], Linear4bit) and not _lies_there(*family)
    ]
    if not moving:
        return
    shapes = [_shape_of(*family) for family in moving]
    first = moving[0][0][0].weight
    along = [other for other in others if other.dtype == first.dtype]
    sizes = [*(rows * columns for rows, columns in shapes), *(other.numel() for other in along)]
    pieces = torch.empty(sum(sizes), dtype=first.dtype, device=first.device).split(sizes)
    for (bases, _), shape, piece in zip(moving, shapes, pieces, strict=False):
        matrix = _WHOLES[bases[0]] = piece.view(shape)
        width = bases[0].in_features
        parts = matrix[:, :width].split([*(base.out_features for base in bases), shape[1] - width])
        matrix[:, width:] = 0
        for base, part in zip(bases, parts, strict=False):
            part.copy_(base.weight)
            base.weight.data = part
    for other, piece in zip(along, pieces[len(moving) :], strict=True):
        other.data = piece.copy_(other.flatten()).view(other.shape)


def _lies_there(bases: list[Any], adapters: Sequence[Adapter | None]) -> bool:
    """Whether the weights of layers are parts of such a matrix already."""
    matrix = _WHOLES.get(bases[0])
    if matrix is None or matrix.shape != _shape_of(bases, adapters):
        return False
    parts = matrix[:, : bases[0].in_features].split([base.out_features for base in bases] + [_room_of(adapters)])
    return all(_is_there(base.weight, part) for base, part in zip(bases, parts, strict=False))


def _room_of(adapters: Sequence[Adapter | None]) -> int:
    return sum(adapter[0].shape[0] for adapter in adapters if adapter is not None)


def _is_known(weight: Any, dtype: torch.dtype) -> bool:
    """Whether a weight of 4 bits is packed as `unpack` takes it, and stands for numbers of this format."""
    state = weight.quant_state
    return (
        weight.dtype == torch.uint8
        and state.dtype == dtype
        and state.code is not None
        and (not state.nested or (state.state2 is not None and state.offset is not None))
    )


def _is_there(weight: torch.Tensor, part: torch.Tensor) -> bool:
    """Whether `weight` lies where `part` does."""
    at, to = ((x.storage_offset(), x.stride(), x.shape, x.dtype) for x in (weight, part))
    storages = (torch_internals.address(x.untyped_storage()) for x in (weight, part))
    return at == to and len(set(storages)) == 1


class Placed(NamedTuple):
    """Matrices that a kernel copies, each to where its rows lie further apart: `addresses` [matrices, 2] of both,
    `sizes` [matrices, 3], their elements, columns, and the stride of the copy, and `scales` [matrices], what they are
    multiplied with; all on their device. `like` is one of them."""

    addresses: torch.Tensor
    sizes: torch.Tensor
    scales: torch.Tensor
    like: torch.Tensor


class Placing:
    """Has the factors of adapters, as they are now, placed beside their layers' weights."""

    def __init__(self) -> None:
        self._sources: list[torch.Tensor] = []
        self._targets: list[torch.Tensor] = []
        self._scales: list[float] = []
        self._made: tuple[list[int], Placed] | None = None

    def add(self, whole: Whole) -> None:
        """Place these as well, the first factors with their scaling."""
        for adapter, places in zip(whole.adapters, whole.placements(), strict=False):
            self._sources += adapter
            self._targets += places
            self._scales += [whole.scaling, 1.0]

    def place(self) -> None:
        """Do so: a kernel, whatever their number."""
        if not self._sources:
            return
        where = [weight.data_ptr() for weight in self._sources] if launching.compute() else []
        if self._made is None or self._made[0] != where:
            self._made = where, self._placed()
        placed = self._made[1]
        launching.launch("place", (len(placed.scales), 4), *placed, elements=2048)

    def _placed(self) -> Placed:
        """What the kernel is told. Waits for the device."""
        pairs = list(zip(self._sources, self._targets, strict=True))
        device = pairs[0][0].device
        addresses = [(a.data_ptr(), b.data_ptr()) if launching.compute() else (0, 0) for a, b in pairs]
        sizes = [(a.numel(), a.shape[1], b.stride(0)) for a, b in pairs]
        return Placed(
            torch.tensor(addresses, dtype=torch.int64, device=device),
            torch.tensor(sizes, dtype=torch.int64, device=device),
            torch.tensor(self._scales, device=device),
            pairs[0][0].detach(),
        )
