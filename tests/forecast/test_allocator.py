"""The model of torch's caching allocator against sequences worked by hand from CUDACachingAllocator.cpp."""

import pytest

from lightweight.forecast.allocator import CachingAllocator, OutOfBudgetError
from lightweight.targets import MiB


@pytest.mark.parametrize(
    ("requested", "allocated", "reserved"),
    [
        (1, 512, 2 * MiB),  # rounded to 512 bytes, out of a small segment
        (513, 1024, 2 * MiB),
        (MiB, MiB, 2 * MiB),  # the largest of the small pool
        (MiB + 1, MiB + 512, 20 * MiB),  # the smallest of the large one
        (10 * MiB - 512, 10 * MiB - 512, 20 * MiB),
        (10 * MiB, 10 * MiB, 10 * MiB),  # from 10 MiB on a segment of its own, rounded to 2 MiB
        (11 * MiB, 11 * MiB, 12 * MiB),
        (19 * MiB + 512, 19 * MiB + 512, 20 * MiB),  # what is left over, under 1 MiB, stays with the segment
    ],
)
def test_one_block_takes_the_segment_that_torch_would_take(requested, allocated, reserved):
    allocator = CachingAllocator()
    allocator.allocate(0, requested)
    assert allocator.reserved_bytes == allocator.peak_reserved_bytes == reserved
    # A remainder of the large pool that is too small to split off counts as allocated.
    whole = reserved if reserved - allocated <= MiB and allocated > MiB else allocated
    assert allocator.allocated_bytes == whole


def test_small_blocks_share_a_segment_until_it_is_full():
    allocator = CachingAllocator()
    for name in range(4):
        allocator.allocate(name, 512 * 1024)
    assert allocator.reserved_bytes == 2 * MiB
    allocator.allocate(4, 512)
    assert allocator.reserved_bytes == 4 * MiB


def test_released_memory_is_kept_and_used_again():
    allocator = CachingAllocator()
    allocator.allocate(0, 30 * MiB)
    allocator.release(0)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (0, 30 * MiB)
    allocator.allocate(1, 12 * MiB)
    allocator.allocate(2, 18 * MiB)
    assert allocator.reserved_bytes == 30 * MiB


def test_free_neighbours_are_merged_on_both_sides():
    allocator = CachingAllocator()
    allocator.allocate(0, 40 * MiB)
    allocator.release(0)
    for name in (1, 2, 3, 4):
        allocator.allocate(name, 10 * MiB)
    for name in (1, 3, 2):  # the middle one last: it joins both neighbours
        allocator.release(name)
    allocator.allocate(5, 30 * MiB)
    assert allocator.reserved_bytes == 40 * MiB


def test_the_smallest_block_that_is_large_enough_is_taken():
    allocator = CachingAllocator()
    allocator.allocate(0, 50 * MiB)
    allocator.allocate(1, 20 * MiB)
    allocator.release(0)
    allocator.release(1)
    allocator.allocate(2, 16 * MiB)  # out of the 20 MiB, so that the 50 MiB stay whole
    allocator.allocate(3, 50 * MiB)
    assert allocator.reserved_bytes == 70 * MiB


def test_pools_do_not_lend_to_each_other():
    allocator = CachingAllocator()
    allocator.allocate(0, 20 * MiB)
    allocator.release(0)
    allocator.allocate(1, 1024)
    assert allocator.reserved_bytes == 22 * MiB


def test_emptying_the_cache_gives_back_only_segments_that_nothing_uses():
    allocator = CachingAllocator()
    allocator.allocate(0, 20 * MiB)
    allocator.allocate(1, 30 * MiB)
    allocator.release(1)
    allocator.allocate(2, 12 * MiB)
    allocator.release(0)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 30 * MiB  # the segment that block 2 was split from
    allocator.release(2)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


def test_over_budget_the_cache_is_emptied_before_giving_up():
    allocator = CachingAllocator(budget_bytes=50 * MiB)
    allocator.allocate(0, 30 * MiB)
    allocator.release(0)
    allocator.allocate(1, 40 * MiB)  # 70 MiB would be too much; the 30 MiB that lie idle are given back
    assert allocator.reserved_bytes == 40 * MiB
    assert allocator.peak_reserved_bytes == 40 * MiB
    with pytest.raises(OutOfBudgetError) as failure:
        allocator.allocate(2, 12 * MiB)
    assert failure.value.requested_bytes == 12 * MiB
    assert allocator.allocated_bytes == 40 * MiB


def test_a_stream_gets_no_memory_of_another_stream():
    allocator = CachingAllocator(budget_bytes=60 * MiB)
    allocator.allocate(0, 30 * MiB)
    allocator.release(0)
    allocator.allocate(1, 30 * MiB, stream=1)
    assert allocator.reserved_bytes == 60 * MiB
    allocator.release(1)
    allocator.allocate(2, 30 * MiB, stream=1)
    assert allocator.reserved_bytes == 60 * MiB
    allocator.allocate(3, 20 * MiB, stream=2)  # over budget, what any stream has idle is given back
    assert allocator.reserved_bytes == 50 * MiB


def test_peaks_can_be_counted_anew():
    allocator = CachingAllocator()
    allocator.allocate(0, 30 * MiB)
    allocator.release(0)
    allocator.empty_cache()
    allocator.reset_peaks()
    allocator.allocate(1, 12 * MiB)
    assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (12 * MiB, 12 * MiB)
