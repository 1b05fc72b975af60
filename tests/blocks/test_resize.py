"""A pool that grows and shrinks."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvbm.blocks import Pool
from kvbm.policy import EVICTION_ORDERS, LRU, eviction_order
from kvbm.testing.clock import ManualClock

KEYS = [bytes([number]) * 32 for number in range(32)]


def store(pool: Pool, *keys: bytes, priority: int = 0, ttl: float | None = None) -> list[int]:
    raw = pool.allocate(len(keys))
    assert raw is not None
    with raw.stage(keys, priority=priority, ttl=ttl).register() as pinned:
        slots: list[int] = pinned.slots.tolist()
    return slots


def sizes(pool: Pool) -> tuple[int, int, int]:
    seen = pool.statistics()
    return seen.total, seen.free, seen.registered


def test_it_grows_with_everything_in_place() -> None:
    pool = Pool(4, order=LRU(4))
    slots = store(pool, *KEYS[:4])
    assert pool.resize(10) == 10
    assert sizes(pool) == (10, 6, 4)
    assert store(pool, *KEYS[4:10]) == list(range(4, 10))
    with pool.match(KEYS) as pinned:
        assert pinned.slots.tolist() == [*slots, *range(4, 10)]
    store(pool, KEYS[10])
    assert pool.statistics().evictions == 1
    pool.check()


@pytest.mark.parametrize("name", sorted(EVICTION_ORDERS))
def test_every_order_takes_new_slots(name: str) -> None:
    pool = Pool(2, order=eviction_order(name, 2))
    store(pool, KEYS[0], priority=7)
    store(pool, KEYS[1])
    pool.resize(8)
    store(pool, *KEYS[2:5])
    store(pool, *KEYS[5:8], priority=7)
    with pool.match(KEYS[2:8]) as pinned:
        assert len(pinned) == 6
    raw = pool.allocate(3)
    assert raw is not None
    raw.drop()
    assert pool.statistics().evictions == 3
    assert pool.peek([KEYS[0]]) == 1
    assert pool.peek(KEYS[5:8]) == 3
    pool.check()


def test_terms_take_no_more_room_than_slots() -> None:
    pool = Pool(4, order=LRU(4))
    for size in (6, 3, 9):
        pool.resize(size)
    table = pool._ledger._table
    assert (len(table.priority), len(table.expiry)) == (9, 9)


def test_it_gives_up_free_slots_first_and_the_highest() -> None:
    pool = Pool(8, order=LRU(8))
    raw = pool.allocate(5)
    assert raw is not None
    with raw:
        assert store(pool, *KEYS[:3]) == [5, 6, 7]
    assert pool.resize(5) == 5
    assert sizes(pool) == (5, 2, 3)
    assert sorted(store(pool, *KEYS[3:5])) == [0, 1]
    assert pool.statistics().evictions == 0
    pool.check()


def test_a_fresh_pool_fills_from_slot_0_so_that_its_end_can_go() -> None:
    pool = Pool(1000, order=LRU(1000))
    assert store(pool, *KEYS[:3]) == [0, 1, 2]
    assert store(pool, KEYS[3]) == [3]
    assert store(pool, *KEYS[4:9]) == [4, 5, 6, 7, 8]
    assert pool.resize(9) == 9
    assert sizes(pool) == (9, 0, 9)
    assert pool.statistics().evictions == 0
    with pool.match(KEYS[:9]) as pinned:
        assert pinned.slots.tolist() == list(range(9))
    pool.check()


def test_it_evicts_in_order() -> None:
    pool = Pool(8, order=LRU(8))
    store(pool, *KEYS[:3])
    store(pool, *KEYS[3:6])
    assert pool.resize(4) == 4
    assert sizes(pool) == (4, 0, 4)
    assert (pool.peek(KEYS[:3]), pool.peek(KEYS[3:6])) == (1, 3)
    assert pool.statistics().evictions == 2
    pool.check()


def test_it_evicts_over_several_priorities() -> None:
    pool = Pool(8, order=LRU(8))
    store(pool, *KEYS[:2], priority=100)
    store(pool, *KEYS[2:4], priority=50)
    store(pool, *KEYS[4:8])
    assert pool.resize(3) == 3
    assert (pool.peek(KEYS[:2]), pool.peek(KEYS[2:4]), pool.peek(KEYS[4:8])) == (2, 1, 0)
    assert pool.resize(1) == 1
    assert (pool.peek(KEYS[:2]), pool.peek(KEYS[2:4])) == (1, 0)
    pool.check()


def test_it_goes_down_to_what_is_held() -> None:
    pool = Pool(8, order=LRU(8))
    store(pool, *KEYS[:6])
    raw = pool.allocate(1)
    assert raw is not None
    with pool.match(KEYS[:2]), raw:
        assert pool.resize(1) == 3
        assert sizes(pool) == (3, 0, 2)
        pool.check()
        assert pool.allocate(1) is None
    assert pool.resize(1) == 1  # let go meanwhile
    assert sizes(pool) == (1, 0, 1)
    pool.check()


def test_what_was_given_up_comes_back_before_there_are_new_slots() -> None:
    pool = Pool(8, order=LRU(8))
    assert pool.resize(3) == 3
    assert pool.resize(5) == 5
    raw = pool.allocate(5)
    assert raw is not None
    with raw:
        assert sorted(raw.slots.tolist()) == [0, 1, 2, 3, 4]
        assert pool.resize(8) == 8
        more = pool.allocate(3)
        assert more is not None
        with more:
            assert sorted(more.slots.tolist()) == [5, 6, 7]
            assert pool.resize(9) == 9
            last = pool.allocate(1)
            assert last is not None
            with last:
                assert last.slots.tolist() == [8]
    assert sizes(pool) == (9, 9, 0)
    pool.check()


def test_it_grows_past_what_was_given_up_in_one_step() -> None:
    pool = Pool(8, order=LRU(8))
    pool.resize(5)
    assert pool.resize(12) == 12
    assert store(pool, *KEYS[:12]) != []
    with pool.match(KEYS) as pinned:
        assert sorted(pinned.slots.tolist()) == list(range(12))
    pool.check()


def test_the_same_size_changes_nothing() -> None:
    pool = Pool(4, order=LRU(4))
    store(pool, *KEYS[:3])
    before = pool.statistics()
    assert pool.resize(4) == 4
    assert pool.statistics() == before


def test_expired_blocks_go_first() -> None:
    clock = ManualClock()
    pool = Pool(4, order=LRU(4), clock=clock)
    store(pool, *KEYS[:2])
    store(pool, *KEYS[2:4], ttl=1.0, priority=100)
    clock.advance(1.0)
    assert pool.resize(2) == 2
    assert pool.peek(KEYS[:2]) == 2
    assert (pool.statistics().expired, pool.statistics().evictions) == (2, 0)
    pool.check()


def test_new_slots_have_no_terms_of_old_ones() -> None:
    clock = ManualClock()
    pool = Pool(1, order=LRU(1), clock=clock)
    store(pool, KEYS[0], ttl=5.0, priority=9)
    pool.resize(4)
    store(pool, *KEYS[1:4])
    clock.advance(5.0)
    assert [pool.peek([key]) for key in KEYS[:4]] == [0, 1, 1, 1]
    block = pool.look(KEYS[1])
    assert block is not None
    assert (block.priority, block.expires) == (0, None)
    pool.check()


def test_an_order_that_gives_too_few_keeps_the_size() -> None:
    class Stingy(LRU):
        def victims(self, n: int) -> object:  # type: ignore[override]
            return super().victims(n - 1)

    pool = Pool(4, order=Stingy(4))
    store(pool, *KEYS[:3])
    assert pool.resize(2) == 3  # the free one
    assert pool.peek(KEYS[:3]) == 3
    assert pool.statistics().free == 0
    pool.check()


@given(
    name=st.sampled_from(sorted(EVICTION_ORDERS)),
    steps=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12)), max_size=30),
)
def test_a_pool_that_only_grows_hands_out_only_what_it_has(name: str, steps: list[tuple[int, int]]) -> None:
    """Memory comes slot by slot: none is handed out above the present size, and each below is."""
    capacity, have = 40, 3
    pool = Pool(capacity, order=eviction_order(name, capacity))
    assert pool.resize(have) == pool.total == have
    numbers = iter(range(1000))
    for more, n in steps:
        have = min(capacity, have + more)
        assert pool.resize(have) == have
        assert (pool.total, pool.capacity) == (have, capacity)
        raw = pool.allocate(n)
        assert (raw is None) == (n > have)
        if raw is not None:
            assert raw.slots.max() < have
            raw.stage([next(numbers).to_bytes(32, "big") for _ in range(n)]).register().drop()
        pool.check()
    raw = pool.allocate(have)
    assert raw is not None
    assert sorted(raw.slots.tolist()) == list(range(have))
    raw.drop()
