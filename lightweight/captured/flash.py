"""Can a pass's attention run on flash kernels, and does it see there what it should?

They take causal attention with grouped queries, a window, and several dialogues one behind the other, told apart by
how many tokens lie before each: no mask is built, none is read, and nothing is computed that one would hide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn import functional

from lightweight.captured import dropout, hopper
from lightweight.captured.parts import PartError
from lightweight.captured.temporary import HALVES
from lightweight.internals import torch as torch_internals
from lightweight.targets import Capability

CAPABILITY = (8, 0)
"""Cards from Ampere on have the kernels: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, check_flash."""

WIDEST = 256
"""Numbers of a head, which must be a multiple of 8. Ibid., check_head_dim_size_flash."""

_capability: ContextVar[Capability | None] = ContextVar("capability", default=None)  # of this thread alone
_met: set[_Kernel] = set()
_checked: set[_Kernel] = set()


@contextmanager
def as_on(capability: Capability) -> Iterator[None]:
    """Inside, every device is taken to be a card of this `capability`: what a forecast is of. Kernels that it met are
    none of this device's, and are not checked afterwards."""
    token, before = _capability.set(capability), set(_met)
    try:
        yield
    finally:
        _capability.reset(token)
        _met.clear()
        _met.update(before)


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention in `dtype` has flash kernels on `device`."""
    capability = _capability_of(device)
    return capability is not None and capability >= CAPABILITY and dtype in HALVES


def _capability_of(device: torch.device) -> Capability | None:
    """None where torch has no flash kernels for it."""
    capability = _capability.get()
    if capability is None and device.type == "cuda" and torch.backends.cuda.is_flash_attention_available():
        capability = torch.cuda.get_device_capability(device)
    return capability


def takes(config: Any) -> bool:
    """Whether the heads of a model with this `config` are as the kernels want them, as far as it says; `attend` asks
    the layers."""
    config = config.get_text_config()
    names = ("head_dim", "global_head_dim", "qk_head_dim", "v_head_dim")
    widths = {width for name in names if isinstance(width := getattr(config, name, None), int)}
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if not widths and isinstance(hidden, int) and isinstance(heads, int):
        widths = {hidden // heads}
    return all(width % 8 == 0 and width <= WIDEST for width in widths) and len(widths) <= 1


@dataclass(frozen=True)
class Sequences:
    """Dialogues one behind the other in one row: `ends`, int32 [dialogues + 1], has how many tokens lie before each,
    and the row's length at the end, as often as there is room; none is longer than `longest`."""

    ends: torch.Tensor
    longest: int


@dataclass(frozen=True, eq=False)
class Reach:
    """What a pass's tokens see: those before them in their row; of the same number in `dialogues`, [rows, time], where
    there are any; and `window` of them at most, themselves included, where it is not None. A layer is given this in a
    mask's place."""

    window: int | None = None
    dialogues: torch.Tensor | None = None
    sequences: Sequences | None = None
    _masks: dict[int, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def within(self, window: int) -> Reach:
        """The same, no further back than `window`."""
        return replace(self, window=window if self.window is None else min(window, self.window))

    def mask(self, time: int, device: torch.device) -> torch.Tensor | None:
        """It as a mask for rows of `time` tokens, [rows or 1, 1, time, time], True where seen; None where causality
        says it all."""
        window = self.window if self.window is not None and self.window < time else None
        if window is None and self.dialogues is None:
            return None
        if time not in self._masks:  # layers share it
            places = torch.arange(time, device=device)
            back = places.unsqueeze(1) - places
            seen = ((back >= 0) & (back < (window or time))).unsqueeze(0)
            if self.dialogues is not None:
                seen = seen & (self.dialogues.unsqueeze(2) == self.dialogues.unsqueeze(1))
            self._masks[time] = seen.unsqueeze(1)
        return self._masks[time]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    reach: Reach,
    p: float,
    scale: float | None,
    cap: float | None = None,
) -> torch.Tensor | None:
    """Attention of `query`, [rows, heads, time, width], within `reach`, with its share `p` dropped:
    [rows, time, heads, width]; None where there is no kernel for it, in fp32 say. `key` and `value` may have fewer
    heads. Scores are bent to within `cap`, if any.

    Raises PartError for dialogues one behind the other that have none: masks of so many tokens cost more than packing
    saves.
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    if query.dtype not in HALVES or not query.dtype == key.dtype == value.dtype:
        return None
    rows, heads, time, width = query.shape
    if width % 8 or width > WIDEST or value.shape[-1] != width or key.shape[-1] != width:
        if reach.sequences is not None:
            raise PartError(f"heads of {width} and {value.shape[-1]} have no flash kernel")
        return None
    window = reach.window if reach.window is not None and reach.window < time else None
    sequences = reach.sequences
    if sequences is None and reach.dialogues is not None:
        return None
    if sequences is not None and rows != 1:
        raise PartError(f"{rows} rows reach its attention instead of one")
    p = 0.0 if dropout.is_off() else p
    is_ours = not p and _are_ours_wanted and hopper.takes(query, _capability_of(query.device), cap)
    is_ours = is_ours and not torch.compiler.is_compiling()
    if cap is not None and not is_ours:
        return None
    global _have_ours_run
    _have_ours_run |= is_ours
    if not torch.compiler.is_compiling():  # whose layers have run before
        is_joined = sequences is not None or not is_ours  # torch's are the same for both
        kernel = _Kernel(query.device, query.dtype, heads // key.shape[1], width, window, cap, is_ours, is_joined)
        _met.update({kernel} - _checked)
    scale = width**-0.5 if scale is None else scale
    # as the kernels want them, time before heads; a single row has no dimension of its own
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    longest = time if sequences is None else sequences.longest
    ends = None if sequences is None else sequences.ends
    if is_ours:
        query, key, value = (tensor.flatten(0, 1) for tensor in (query, key, value))
        attended = hopper.attend(query, key, value, hopper.Sees(ends, longest, window, scale, cap))
        return attended.view(rows, time, heads, width)
    if sequences is not None:
        query, key, value = (tensor.squeeze(0) for tensor in (query, key, value))
    attended = torch_internals.flash_attention_forward(
        query, key, value, ends, longest, window=window, dropout=p, scale=scale
    )
    return attended if sequences is None else attended.unsqueeze(0)


_are_ours_wanted = True
_have_ours_run = False


def has_run_ours() -> bool:
    """Whether attention has run on kernels of our own, and may go on so."""
    return _are_ours_wanted and _have_ours_run


@contextmanager
def left_to_torch() -> Iterator[Callable[[], None]]:
    """Inside, all attention runs on torch's kernels; afterwards, too, in this process, where what this gives is
    called."""
    global _are_ours_wanted
    kept: list[bool] = []
    _are_ours_wanted = False
    try:
        yield lambda: kept.append(True)
    finally:
        _are_ours_wanted = not kept


# Do the kernels do what is said of them?


@dataclass(frozen=True)
class _Kernel:
    """A kernel that layers have run on, with so many `heads` of queries for one of keys and values; one of ours or of
    torch's. Ours are others for sequences that are `joined` than for rows of one length."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    width: int
    window: int | None
    cap: float | None = None
    is_ours: bool = False
    is_joined: bool = True


OFF = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""How far a kernel may be from the same in fp32, of the norm of what it gives."""


def check_met() -> None:
    """Raise PartError where a kernel that a layer has run on does not see what it should: asked of a few random tokens,
    a window more than one, since a step's loss and gradient show little of its edge. What a token does not see has a
    gradient of exactly 0 from it."""
    while _met:
        kernel = _met.pop()
        if (problem := _problem_of(kernel)) is not None:
            whose = "our attention for Hopper" if kernel.is_ours else "flash attention"
            raise PartError(f"{whose} {problem}, with heads of {kernel.width} and a window of {kernel.window}")
        _checked.add(kernel)


def _problem_of(kernel: _Kernel) -> str | None:
    """What `kernel` does that it should not, or None."""
    longest = (kernel.window or 100) + 37
    # ours are asked as they have been compiled: others would take seconds
    has_rows = kernel.is_ours and not kernel.is_joined
    lengths = [longest] * 3 if has_rows else [5, longest, 64]
    tokens = sum(lengths)
    generator = torch.Generator(kernel.device).manual_seed(0)
    tensors = [
        torch.randn(tokens, heads, kernel.width, device=kernel.device, generator=generator).to(kernel.dtype)
        for heads in (kernel.heads, 1, 1, kernel.heads)
    ]
    *inputs, upstream = tensors
    borders = torch.tensor([0, *lengths, 0], device=kernel.device).cumsum(0, dtype=torch.int32)  # the last one is empty
    dialogues = torch.arange(3).repeat_interleave(torch.tensor(lengths)).to(kernel.device)
    mask = Reach(kernel.window, dialogues.unsqueeze(0)).mask(tokens, kernel.device)
    assert mask is not None

    def ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if kernel.is_ours:
            ends = None if has_rows else borders
            sees = hopper.Sees(ends, longest, kernel.window, kernel.width**-0.5, kernel.cap)
            return hopper.attend(query, key, value, sees)
        return torch_internals.flash_attention_forward(
            query, key, value, borders, max(lengths), window=kernel.window, dropout=0.0, scale=None
        )

    def expected(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
        if kernel.cap is not None:
            scores = query @ key.transpose(-1, -2) * kernel.width**-0.5
            bent = (kernel.cap * (scores / kernel.cap).tanh()).masked_fill(~mask, float("-inf"))
            attended: torch.Tensor = (bent.softmax(-1) @ value).squeeze(0).transpose(0, 1)
            return attended
        output = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return output.squeeze(0).transpose(0, 1)

    results = []
    for function, dtype in ((ours, kernel.dtype), (expected, torch.float32)):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        with torch.enable_grad():
            output = function(*leaves)
        gradients = torch.autograd.grad(output, leaves, upstream.to(dtype), retain_graph=True)
        last = torch.zeros_like(output)
        last[-lengths[-1] - 1] = 1  # the last token of the longest dialogue
        (reached,) = torch.autograd.grad(output, leaves[2], last)
        results.append(([output.detach(), *gradients], reached.flatten(1).ne(0).any(1)))
    (found, sees), (right, should_see) = results
    if not torch.equal(sees, should_see):
        return f"sees {int(sees.sum())} tokens instead of {int(should_see.sum())}"
    least = upstream.float().norm() / 10  # nothing depends on a single key, and rounding is all that is left
    off = max(float((a.float() - b).norm() / b.norm().clamp_min(least)) for a, b in zip(found, right, strict=True))
    return f"is {off:.0e} off" if not off <= OFF[kernel.dtype] else None
