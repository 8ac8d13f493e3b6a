"""The allocator in miniature against what PyTorch's documents and code say of the real one."""

from __future__ import annotations

import random

import pytest

from eco_llm.instant.plan.allocator import CachingAllocator

MIB = 2**20


def test_requests_are_rounded_up_to_512_bytes() -> None:
    a = CachingAllocator()
    assert [a.take(n).size for n in (1, 512, 513, 0)] == [512, 512, 1024, 512]
    assert a.allocated == 2560
    assert a.reserved == 2 * MIB  # one small segment


@pytest.mark.parametrize(("request_mib", "segment_mib"), [(1, 2), (1.5, 20), (9.9, 20), (10, 10), (10.5, 12), (33, 34)])
def test_segments(request_mib: float, segment_mib: int) -> None:
    a = CachingAllocator()
    a.take(int(request_mib * MIB))
    assert a.reserved == segment_mib * MIB


def test_a_rest_of_a_mebibyte_is_not_split_off_and_counts_as_allocated() -> None:
    a = CachingAllocator()
    a.take(11 * MIB)  # a segment of 12: 1 MiB is left, which is too little
    assert a.allocated == 12 * MIB
    a.take(19 * MIB - 512)  # a segment of 20: 1 MiB and 512 bytes are left, which are split off
    assert a.allocated == 12 * MIB + 19 * MIB - 512


def test_the_smallest_free_block_that_fits_is_taken() -> None:
    a = CachingAllocator()
    large, small = a.take(40 * MIB), a.take(20 * MIB)
    a.give(large)
    a.give(small)
    a.take(18 * MIB)
    assert a.reserved == 60 * MIB
    a.take(40 * MIB)  # the large one is still whole
    assert a.reserved == 60 * MIB


def test_free_neighbours_are_merged() -> None:
    a = CachingAllocator()
    whole = a.take(30 * MIB)
    a.give(whole)
    parts = [a.take(10 * MIB) for _ in range(3)]
    assert a.reserved == 30 * MIB
    for i in (0, 2, 1):
        a.give(parts[i])
    a.take(30 * MIB)
    assert a.reserved == 30 * MIB


def test_a_private_pool_shares_nothing() -> None:
    a = CachingAllocator()
    a.give(a.take(20 * MIB))
    a.take(20 * MIB, pool="graph")
    assert a.reserved == 40 * MIB


@pytest.mark.parametrize("expandable", [False, True])
def test_emptying_the_cache_leaves_what_is_in_use(expandable: bool) -> None:
    a = CachingAllocator(expandable)
    parts = [a.take(20 * MIB) for _ in range(3)]
    for part in parts:
        a.give(part)
    kept = a.take(12 * MIB)  # the rest of its segment, 8 MiB, stays with it unless segments grow
    a.empty_cache()
    assert a.reserved == 60 * MIB  # at most, ever
    a.take(40 * MIB)
    assert a.reserved == 60 * MIB
    a.take(8 * MIB)
    assert a.reserved == (72 if expandable else 60) * MIB
    a.give(kept)


def test_freeing_twice_is_an_error() -> None:
    a = CachingAllocator()
    block = a.take(512)
    a.give(block)
    with pytest.raises(ValueError, match="twice"):
        a.give(block)


def test_expandable_segments_grow_and_leave_no_rests() -> None:
    a = CachingAllocator(expandable=True)
    a.take(11 * MIB)
    assert (a.allocated, a.reserved) == (11 * MIB, 20 * MIB)
    middle = a.take(9 * MIB - 512)
    assert (a.allocated, a.reserved) == (20 * MIB - 512, 20 * MIB)
    last = a.take(5 * MIB)  # 512 bytes are at the end already
    assert a.reserved == 40 * MIB
    a.give(last)
    a.give(middle)
    a.take(60 * MIB)  # from the end of the first block: one segment, which grows by what is missing
    assert a.reserved == 80 * MIB
    assert a.allocated == 71 * MIB
    a.take(512)  # small blocks have a segment of their own
    assert a.reserved == 82 * MIB


@pytest.mark.parametrize("expandable", [False, True])
def test_random_use_leaves_nothing_behind(expandable: bool) -> None:
    a, rng, live = CachingAllocator(expandable), random.Random(0), []
    for _ in range(2000):
        if live and rng.random() < 0.5:
            a.give(live.pop(rng.randrange(len(live))))
        else:
            live.append(a.take(rng.choice([100, 5000, 2**20, 3 * 2**20, 12 * 2**20, 64 * 2**20])))
        assert a.allocated == sum(block.size for block in live) <= a.reserved
    for block in live:
        a.give(block)
    assert a.allocated == 0
    before = a.reserved
    a.give(a.take(64 * MIB))
    assert a.reserved == before  # all segments are whole again
