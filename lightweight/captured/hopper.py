"""Attention by kernels of our own, for Hopper: what they take and give back. `triton_flash` has what they compute.

FlashAttention-2's kernels, which torch brings along, were made for Ampere's matrix units and reach a quarter of
Hopper's. cuDNN's are faster than these, and have no windows, no sequences one behind the other and a start of two
seconds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from lightweight.captured import launching
from lightweight.captured.launching import launch

CAPABILITY = (9, 0)


class Tile(NamedTuple):
    """How many queries and keys a program holds, by how many warps, with how many stages of loads ahead."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


TILES: dict[int, tuple[Tile, Tile, Tile]] = {
    64: (Tile(128, 64, 8, 3), Tile(128, 64, 4, 3), Tile(64, 128, 8, 3)),
    128: (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 2)),
    256: (Tile(64, 64, 4, 2), Tile(64, 64, 4, 1), Tile(64, 64, 8, 1)),
}
"""By the width of a head, of the forward pass, of the gradient of queries and of that of keys: the fastest of those
that were tried (H100)."""

SLOWER = 256
"""Heads for which FlashAttention-2's kernels are faster, where they can be had: they bend no scores."""


class Sees(NamedTuple):
    """What tokens see: sequences that lie between `ends`, int32 [sequences + 1], none longer than `time`, or rows of
    `time` tokens where there are none; `window` tokens at most, where it is not None; scores times `scale`, bent to
    within `cap`, if any."""

    ends: torch.Tensor | None
    time: int
    window: int | None
    scale: float
    cap: float | None = None


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sees: Sees) -> torch.Tensor:
    """Causal attention of `query` [tokens, heads, width], `key` and `value` with as many heads or a divisor of them:
    [tokens, heads, width]. The width is one of `TILES`."""
    attended: torch.Tensor = _Attend.apply(query, key, value, sees)  # type: ignore[no-untyped-call]
    return attended


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sees: Sees) -> torch.Tensor:
        tokens, heads, width = query.shape
        query, key, value = (_side_by_side(tensor) for tensor in (query, key, value))
        out = torch.empty(tokens, heads, width, dtype=query.dtype, device=query.device)
        sums = torch.empty(heads, tokens, device=query.device)
        tile, _, _ = TILES[width]
        programs = heads * _sequences(sees, tokens), -(-sees.time // tile.rows)
        launch(
            "attend", programs,
            query, key, value, out, sums, *_told(query, key, value, sees), **_settings(tile, query, sees),
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, out, sums, sees.ends)
        ctx.sees = sees._replace(ends=None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, sums, ends = ctx.saved_tensors
        sees, grad = ctx.sees._replace(ends=ends), _side_by_side(grad)
        tokens, heads, width = query.shape
        _, of_queries, of_keys = TILES[width]
        sequences, told = _sequences(sees, tokens), _told(query, key, value, sees, grad)
        grad_q = torch.empty(tokens, heads, width, dtype=query.dtype, device=query.device)
        grad_k, grad_v = (
            torch.empty(tokens, key.shape[1], width, dtype=key.dtype, device=key.device) for _ in range(2)
        )
        deltas = torch.empty_like(sums)
        launch(
            "attend_backward_query", (heads * sequences, -(-sees.time // of_queries.rows)),
            grad, query, key, value, out, sums, deltas, grad_q, *told, **_settings(of_queries, query, sees),
        )  # fmt: skip
        launch(
            "attend_backward_key", (key.shape[1] * sequences, -(-sees.time // of_keys.columns)),
            grad, query, key, value, sums, deltas, grad_k, grad_v, *told, **_settings(of_keys, query, sees),
        )  # fmt: skip
        return grad_q, grad_k, grad_v, None


def takes(query: torch.Tensor, capability: tuple[int, int] | None, cap: float | None) -> bool:
    """Whether kernels for `query` [..., width] are to be used on a card of this `capability`."""
    width = query.shape[-1]
    is_faster = width in TILES and (width < SLOWER or cap is not None)
    return capability == CAPABILITY and is_faster and launching.take(query)


def _sequences(sees: Sees, tokens: int) -> int:
    return tokens // sees.time if sees.ends is None else len(sees.ends) - 1


def _side_by_side(x: torch.Tensor) -> torch.Tensor:
    """`x` [tokens, heads, width] with the elements of a head side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _told(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sees: Sees, grad: torch.Tensor | None = None
) -> tuple[Any, ...]:
    """What all three kernels are told after their tensors."""
    tokens, heads, _ = query.shape
    strides = [x.stride(i) for x in (grad, query, key, value) if x is not None for i in (0, 1)]
    ends = query if sees.ends is None else sees.ends  # any memory of the device
    return (
        ends, sees.scale, 1.0 if sees.cap is None else sees.cap, sees.time, tokens, sees.window or 0, heads,
        heads // key.shape[1], *strides,
    )  # fmt: skip


def _settings(tile: Tile, query: torch.Tensor, sees: Sees) -> dict[str, Any]:
    return {
        "joined": sees.ends is not None,
        "windowed": sees.window is not None,
        "capped": sees.cap is not None,
        "width": query.shape[-1],
        **tile._asdict(),
    }
