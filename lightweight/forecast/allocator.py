"""How much would torch's caching allocator reserve? A model of it, driven by a trace of allocations and releases.

What a program allocates is not what the card must have: the allocator takes segments from the driver, hands out blocks
of them and keeps both for later. The rules are those of torch's c10/cuda/CUDACachingAllocator.cpp with its default
settings; the numbers are its constants.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from dataclasses import dataclass, field

from lightweight.targets import MiB

MIN_BLOCK_BYTES = 512  # kMinBlockSize: every block is a multiple of it
SMALL_BYTES = MiB  # kSmallSize: the largest block of the small pool
SMALL_SEGMENT_BYTES = 2 * MiB  # kSmallBuffer: a segment of the small pool
MIN_LARGE_BYTES = 10 * MiB  # kMinLargeAlloc: from here on a segment is made for one block
LARGE_SEGMENT_BYTES = 20 * MiB  # kLargeBuffer: a segment for blocks between the two
LARGE_ROUNDING_BYTES = 2 * MiB  # kRoundLarge: what a segment for one block is rounded up to


class OutOfBudgetError(Exception):
    """The budget leaves no room for a segment, even after every unused one was given back."""

    def __init__(self, requested_bytes: int) -> None:
        super().__init__(f"no room for {requested_bytes} bytes")
        self.requested_bytes = requested_bytes


Pool = tuple[int, bool]
"""Blocks that can stand for each other: those of one stream, and small or large."""


@dataclass(slots=True, eq=False)
class _Segment:
    number: int
    total_bytes: int
    pool: Pool


@dataclass(slots=True, eq=False)
class _Block:
    segment: _Segment
    offset: int
    size: int
    is_free: bool = False
    before: _Block | None = None
    after: _Block | None = None

    @property
    def order(self) -> tuple[int, int, int]:
        """Best fit: the smallest block that is large enough, and among equals the one at the lowest address."""
        return self.size, self.segment.number, self.offset


@dataclass
class CachingAllocator:
    """The allocator of one device, in bytes. `budget_bytes` is what it may reserve at most; `None` is no limit.
    What streams in `kept` have reserved is never given back: a CUDA graph has recorded its addresses. Ibid.,
    PrivatePool.

    `allocated_bytes` counts whole blocks, as `torch.cuda.memory_allocated` does; `reserved_bytes` counts segments.
    """

    budget_bytes: float | None = None
    kept: frozenset[int] = frozenset()
    allocated_bytes: int = 0
    reserved_bytes: int = 0
    peak_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0
    _segments: int = 0
    _blocks: dict[int, _Block] = field(default_factory=dict)
    _free: defaultdict[Pool, list[tuple[tuple[int, int, int], _Block]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def allocate(self, name: int, requested_bytes: int, stream: int = 0) -> None:
        """Allocate a block called `name` in `stream`; no other stream gets it later. Raises OutOfBudgetError."""
        size = max(1, -(-requested_bytes // MIN_BLOCK_BYTES)) * MIN_BLOCK_BYTES
        small = size <= SMALL_BYTES
        pool = stream, small
        block = self._best_fit(size, pool) or self._new_segment(size, pool)
        rest = block.size - size
        if rest >= MIN_BLOCK_BYTES if small else rest > SMALL_BYTES:
            remainder = _Block(block.segment, block.offset + size, rest, before=block, after=block.after)
            if block.after is not None:
                block.after.before = remainder
            block.after, block.size = remainder, size
            self._insert(remainder)
        self._blocks[name] = block
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)

    def release(self, name: int) -> None:
        """Release the block called `name`; it is merged with free neighbours and kept for later."""
        block = self._blocks.pop(name)
        self.allocated_bytes -= block.size
        if (before := block.before) is not None and before.is_free:
            self._remove(before)
            block.offset, block.size, block.before = before.offset, block.size + before.size, before.before
            if block.before is not None:
                block.before.after = block
        if (after := block.after) is not None and after.is_free:
            self._remove(after)
            block.size, block.after = block.size + after.size, after.after
            if block.after is not None:
                block.after.before = block
        self._insert(block)

    def empty_cache(self) -> None:
        """Give every segment back of which no block is in use, as `torch.cuda.empty_cache` does."""
        for pool, free in self._free.items():
            if pool[0] in self.kept:
                continue
            kept = [(order, block) for order, block in free if block.size < block.segment.total_bytes]
            self.reserved_bytes -= sum(order[0] for order, _ in free) - sum(order[0] for order, _ in kept)
            self._free[pool] = kept

    def reset_peaks(self) -> None:
        """Begin to look for peaks anew, as `torch.cuda.reset_peak_memory_stats` does."""
        self.peak_allocated_bytes, self.peak_reserved_bytes = self.allocated_bytes, self.reserved_bytes

    def _best_fit(self, size: int, pool: Pool) -> _Block | None:
        free = self._free[pool]
        index = bisect.bisect_left(free, (size, -1, -1), key=lambda item: item[0])
        if index == len(free):
            return None
        _, block = free.pop(index)
        block.is_free = False
        return block

    def _new_segment(self, size: int, pool: Pool) -> _Block:
        if pool[1]:
            total_bytes = SMALL_SEGMENT_BYTES
        elif size < MIN_LARGE_BYTES:
            total_bytes = LARGE_SEGMENT_BYTES
        else:
            total_bytes = -(-size // LARGE_ROUNDING_BYTES) * LARGE_ROUNDING_BYTES
        if self.budget_bytes is not None and self.reserved_bytes + total_bytes > self.budget_bytes:
            self.empty_cache()
            if self.reserved_bytes + total_bytes > self.budget_bytes:
                raise OutOfBudgetError(size)
        self._segments += 1
        self.reserved_bytes += total_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return _Block(_Segment(self._segments, total_bytes, pool), 0, total_bytes)

    def _insert(self, block: _Block) -> None:
        block.is_free = True
        bisect.insort(self._free[block.segment.pool], (block.order, block), key=lambda item: item[0])

    def _remove(self, block: _Block) -> None:
        free = self._free[block.segment.pool]
        del free[bisect.bisect_left(free, block.order, key=lambda item: item[0])]
