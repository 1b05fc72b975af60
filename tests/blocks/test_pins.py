"""Holds in somebody's name: who, how many, until when."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvbm.blocks import Pool
from kvbm.policy import LRU
from kvbm.testing.clock import ManualClock

A, B, C, D, E, F, G, H = KEYS = [bytes([letter]) * 32 for letter in b"ABCDEFGH"]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(100.0)


@pytest.fixture
def pool(clock: ManualClock) -> Iterator[Pool]:
    pool = Pool(8, order=LRU(8), clock=clock)
    yield pool
    pool.check()
    pool.clear()
    assert (pool.statistics().free, pool.statistics().pinned, pool.pins()) == (8, 0, {})


def store(pool: Pool, *keys: bytes, priority: int = 0, ttl: float | None = None) -> None:
    raw = pool.allocate(len(keys))
    assert raw is not None
    raw.stage(keys, priority=priority, ttl=ttl).register().drop()


def evict(pool: Pool, n: int) -> None:
    raw = pool.allocate(n)
    assert raw is not None
    raw.drop()


def test_what_is_pinned_survives_every_eviction(pool: Pool) -> None:
    store(pool, A, B, C)
    assert pool.pin([A, B], owner="me", ttl=10.0) == 2
    store(pool, D, E, F, G, H, priority=100)
    evict(pool, 6)
    assert pool.allocate(7) is None
    assert pool.peek([A, B, C]) == 2
    assert (pool.statistics().active, pool.statistics().pinned) == (2, 2)


def test_a_pin_is_of_the_prefix_that_is_there(pool: Pool) -> None:
    store(pool, A, B, D)
    assert pool.pin([C, A], owner="me", ttl=1.0) == 0
    assert pool.pins() == {}
    assert pool.pin([A, B, C, D], owner="me", ttl=1.0) == 2
    assert pool.pins() == {"me": 2}


def test_owners_are_apart(pool: Pool) -> None:
    store(pool, A, B)
    assert pool.pin([A], owner="one", ttl=10.0) == 1
    assert pool.pin([A, B], owner="two", ttl=10.0) == 2
    assert pool.pin([A], owner="one", ttl=20.0) == 1
    assert pool.pins() == {"one": 2, "two": 2}
    assert (pool.statistics().pinned, pool.statistics().active) == (4, 2)
    block = pool.look(A)
    assert block is not None
    assert block.holds == 3
    assert pool.unpin("one") == 2
    assert pool.unpin("one") == 0
    assert pool.unpin("nobody") == 0
    assert pool.pins() == {"two": 2}
    assert pool.unpin("two") == 2
    assert pool.statistics().inactive == 2


def test_each_pin_ends_in_its_time(pool: Pool, clock: ManualClock) -> None:
    store(pool, A, B, C)
    pool.pin([A], owner="me", ttl=2.0)
    pool.pin([A, B, C], owner="me", ttl=1.0)
    clock.advance(0.9)
    assert pool.pins() == {"me": 4}
    clock.advance(0.1)
    assert pool.pins() == {"me": 1}
    assert (pool.statistics().pinned, pool.statistics().active) == (1, 1)
    clock.advance(1.0)
    assert pool.statistics().pinned == 0
    assert pool.unpin("me") == 0


@pytest.mark.parametrize("asks", ["statistics", "pins", "allocate", "candidates", "resize", "pin"])
def test_whoever_needs_slots_ends_pins_that_are_over(pool: Pool, clock: ManualClock, asks: str) -> None:
    store(pool, *KEYS)
    pool.pin([A, B, C, D], owner="me", ttl=1.0)
    assert pool.allocate(8) is None
    clock.advance(1.0)
    match asks:
        case "statistics":
            assert pool.statistics().inactive == 8
        case "pins":
            assert pool.pins() == {}
        case "allocate":
            evict(pool, 8)
        case "candidates":
            with pool.candidates(9) as pinned:
                assert len(pinned) == 8
        case "resize":
            assert pool.resize(1) == 1
            assert pool.resize(8) == 8
        case "pin":
            assert pool.pin([E, F], owner="other", ttl=1.0) == 2


@pytest.mark.parametrize(
    ("share", "slots", "most"), [(0.0, 8, 0), (0.5, 8, 4), (0.3, 8, 2), (1.0, 8, 8), (0.5, 7, 3), (0.1, 8, 0)]
)
def test_only_a_share_can_be_pinned(share: float, slots: int, most: int) -> None:
    pool = Pool(slots, order=LRU(slots), max_pinned=share)
    store(pool, *KEYS[:slots])
    assert pool.pin(KEYS, owner="one", ttl=1.0) == most
    assert pool.pin(KEYS[::-1], owner="two", ttl=1.0) == 0
    assert pool.statistics().pinned == most
    pool.check()


def test_half_can_be_pinned_unless_told_otherwise() -> None:
    pool = Pool(6, order=LRU(6))
    store(pool, *KEYS[:6])
    assert pool.pin(KEYS[:2], owner="one", ttl=1.0) == 2
    assert pool.pin(KEYS, owner="two", ttl=1.0) == 1
    assert pool.pin(KEYS, owner="two", ttl=1.0) == 0


def test_the_share_follows_the_size(pool: Pool) -> None:
    store(pool, *KEYS)
    assert pool.pin(KEYS, owner="me", ttl=1.0) == 4
    assert pool.resize(6) == 6
    assert pool.pin(KEYS, owner="me", ttl=1.0) == 0  # more than half is pinned already
    assert pool.statistics().pinned == 4
    assert pool.resize(10) == 10
    assert pool.pin(KEYS, owner="me", ttl=1.0) == 1
    pool.unpin("me")
    assert pool.resize(8) == 8


def test_a_clear_ends_all_pins(pool: Pool, clock: ManualClock) -> None:
    store(pool, A, B)
    pool.pin([A, B], owner="me", ttl=10.0)
    pool.pin([A], owner="other", ttl=20.0)
    pool.clear()
    assert (pool.pins(), pool.statistics().pinned, pool.statistics().free) == ({}, 0, 8)
    store(pool, A, B)
    clock.advance(10.0)
    assert pool.statistics().inactive == 2


def test_a_pin_outlives_a_discard_but_not_its_time(pool: Pool, clock: ManualClock) -> None:
    store(pool, A)
    pool.pin([A], owner="me", ttl=1.0)
    assert pool.discard([A]) == 1
    assert (pool.statistics().orphaned, pool.pins()) == (1, {"me": 1})
    clock.advance(1.0)
    assert pool.statistics().orphaned == 0


def test_a_pin_does_not_prolong_a_block(pool: Pool, clock: ManualClock) -> None:
    store(pool, A, ttl=1.0)
    pool.pin([A], owner="me", ttl=10.0)
    clock.advance(1.0)
    assert pool.pin([A], owner="me", ttl=10.0) == 0
    assert pool.statistics().orphaned == 1


def test_what_expired_since_the_last_search_is_not_pinned(pool: Pool, clock: ManualClock) -> None:
    store(pool, A, ttl=1.0)
    store(pool, B, ttl=1.000004)  # the next search is 8 microseconds later
    clock.advance(1.0)
    evict(pool, 1)
    assert pool.statistics().expired == 1
    clock.advance(0.000005)
    assert pool.pin([B], owner="me", ttl=1.0) == 0


def test_a_pin_and_a_handle_hold_apart(pool: Pool) -> None:
    store(pool, A)
    with pool.match([A]) as pinned:
        pool.pin([A], owner="me", ttl=1.0)
        assert pool.unpin("me") == 1
        assert pool.statistics().active == 1
        pool.pin([A], owner="me", ttl=1.0)
        assert pinned.evict() == 0
    assert pool.peek([A]) == 1
