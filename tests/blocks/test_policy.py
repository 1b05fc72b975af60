"""Priorities, times to live and events."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pytest

from kvbm.blocks import Pool
from kvbm.core.errors import Misuse
from kvbm.core.events import Cleared, Event, Removed, Stored
from kvbm.policy import LRU
from kvbm.testing.clock import ManualClock

A, B, C, D, E = [bytes([letter]) * 32 for letter in b"ABCDE"]


class Ear:
    def __init__(self) -> None:
        self.heard: list[Event] = []

    def on_event(self, event: Event) -> None:
        self.heard.append(event)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(100.0)


@pytest.fixture
def ear() -> Ear:
    return Ear()


@pytest.fixture
def pool(clock: ManualClock, ear: Ear) -> Iterator[Pool]:
    pool = Pool(4, order=LRU(4), clock=clock, observers=[ear], tier="t")
    yield pool
    pool.check()


def store(pool: Pool, *keys: bytes, priority: int = 0, ttl: float | None = None, parent: bytes | None = None) -> None:
    raw = pool.allocate(len(keys))
    assert raw is not None
    raw.stage(keys, priority=priority, ttl=ttl, parent=parent).register().drop()


def evict(pool: Pool, n: int) -> None:
    raw = pool.allocate(n)
    assert raw is not None
    raw.drop()


def test_the_lowest_priority_goes_first(pool: Pool) -> None:
    store(pool, A, priority=50)
    store(pool, B, priority=100)
    store(pool, C)
    store(pool, D, priority=50)
    for gone in (C, A, D, B):
        assert pool.peek([gone]) == 1
        evict(pool, 1 + pool.statistics().free)
        assert pool.peek([gone]) == 0


def test_one_allocation_takes_from_several_priorities(pool: Pool) -> None:
    store(pool, A, B, priority=9)
    store(pool, C)
    store(pool, D)
    evict(pool, 3)
    assert pool.peek([A]) == 1
    store(pool, B, C, priority=7)
    store(pool, D)
    with pool.match([A]), pool.match([B, C, D]):
        assert pool.statistics().inactive == 0
    assert pool.statistics().inactive == 4


@pytest.mark.parametrize(("first", "second"), [(0, 80), (80, 0)])
def test_a_duplicate_keeps_the_larger_priority(pool: Pool, first: int, second: int) -> None:
    store(pool, A, priority=first)
    store(pool, A, priority=second)
    store(pool, B, C, D, priority=40)
    evict(pool, 3)
    assert pool.peek([A]) == 1


@pytest.mark.parametrize(("first", "raised"), [(0, 60), (60, 10), (60, 60)])
def test_a_priority_is_raised_before_blocks_are_there(pool: Pool, first: int, raised: int) -> None:
    raw = pool.allocate(1)
    assert raw is not None
    staged = raw.stage([A], priority=first)
    with pytest.raises(Misuse):
        staged.raise_to(101)
    staged.raise_to(raised)
    staged.register().drop()
    store(pool, B, C, D, priority=50)
    evict(pool, 3)
    assert pool.peek([A]) == 1
    with pytest.raises(Misuse):
        staged.raise_to(1)


def test_a_block_past_its_time_is_not_found(pool: Pool, clock: ManualClock) -> None:
    store(pool, A)
    store(pool, B, C, ttl=5.0)
    weak = pool.match([A, B])
    reference = weak.weak()
    weak.drop()
    clock.advance(4.9)
    assert pool.peek([A, B, C]) == 3
    clock.advance(0.1)
    assert pool.peek([A, B, C]) == 1
    assert reference.upgrade() is None
    assert pool.absent([A, B, C]) == [1, 2]
    assert pool.statistics().expired == 2


def test_what_meets_an_expired_block_removes_it(pool: Pool, clock: ManualClock, ear: Ear) -> None:
    store(pool, A)
    store(pool, B, ttl=1.0)
    store(pool, C)
    held = pool.match([B])
    clock.advance(1.0)
    with pool.match([A, B, C]) as pinned:
        assert pinned.keys == (A,)
    assert ear.heard[-1] == Removed("t", (B,))
    assert pool.statistics().orphaned == 1
    held.drop()
    store(pool, B, ttl=1.0)
    clock.advance(2.0)
    pinned, positions = pool.scan([A, B, C])
    with pinned:
        assert positions == [0, 2]
    assert ear.heard[-1] == Removed("t", (B,))


def test_expired_blocks_go_before_live_ones(pool: Pool, clock: ManualClock, ear: Ear) -> None:
    store(pool, A)
    store(pool, B, ttl=1.0, priority=100)
    store(pool, C, ttl=9.0)
    clock.advance(1.0)
    evict(pool, 2)
    assert pool.peek([A]) + pool.peek([C]) == 2
    assert ear.heard[-1] == Removed("t", (B,))
    clock.advance(5.0)
    evict(pool, 2)
    assert pool.statistics().evictions == 0


def test_the_search_for_expired_blocks_is_spaced(clock: ManualClock) -> None:
    pool = Pool(1_000_000, order=LRU(1_000_000), clock=clock)
    store(pool, A, ttl=1.0)
    store(pool, B, ttl=1.2)
    clock.advance(1.1)
    evict(pool, 1)
    clock.advance(0.2)
    evict(pool, 1)
    assert pool.statistics().expired == 1
    clock.advance(1.0)
    evict(pool, 1)
    assert pool.statistics().expired == 2


def test_only_a_search_that_was_due_puts_off_the_next(clock: ManualClock) -> None:
    pool = Pool(1_000_000, order=LRU(1_000_000), clock=clock)
    store(pool, A, ttl=0.5)
    store(pool, B, ttl=1.25)
    store(pool, C, ttl=2.75)
    for seconds, expired in ((0.5, 1), (1.0, 2), (1.125, 2), (0.375, 3)):
        clock.advance(seconds)
        evict(pool, 1)
        assert pool.statistics().expired == expired


def test_after_a_clear_nothing_is_searched_for(clock: ManualClock) -> None:
    pool = Pool(1_000_000, order=LRU(1_000_000), clock=clock)
    store(pool, A, ttl=1.0)
    pool.clear()
    clock.advance(1.5)
    store(pool, B, ttl=0.5)
    clock.advance(0.6)
    evict(pool, 1)
    assert pool.statistics().expired == 1


def test_an_expired_block_does_not_win_over_its_successor(pool: Pool, clock: ManualClock, ear: Ear) -> None:
    raw = pool.allocate(1)
    assert raw is not None
    store(pool, A, ttl=1.0)
    clock.advance(2.0)
    raw.stage([A]).register().drop()
    assert ear.heard[-2:] == [Removed("t", (A,)), Stored("t", (A,), None)]
    assert pool.peek([A]) == 1


@pytest.mark.parametrize(
    ("first", "second", "life"), [(1.0, 5.0, 5.0), (5.0, 1.0, 5.0), (1.0, None, None), (None, 1.0, None)]
)
def test_a_duplicate_keeps_the_later_end(
    pool: Pool, clock: ManualClock, first: float | None, second: float | None, life: float | None
) -> None:
    store(pool, A, ttl=first)
    store(pool, A, ttl=second)
    clock.advance(1.0 if life is None else life - 0.1)
    assert pool.peek([A]) == 1
    clock.advance(1000.0)
    assert pool.peek([A]) == (life is None)


def test_events_tell_lineage(pool: Pool, ear: Ear) -> None:
    store(pool, B)
    raw = pool.allocate(3)
    assert raw is not None
    raw.stage([A, B, C], parent=E).register(np.array([True, True, True])).drop()
    assert ear.heard == [Stored("t", (B,), None), Stored("t", (A,), E), Stored("t", (C,), B)]


def test_every_end_is_an_event(pool: Pool, ear: Ear) -> None:
    store(pool, A, B, C, D)
    evict(pool, 1)
    pool.discard([A, B])
    pool.discard([A])
    pool.clear()
    assert ear.heard == [
        Stored("t", (A, B, C, D), None),
        Removed("t", (D,)),
        Removed("t", (A, B)),
        Cleared("t", 1),
    ]


def test_nothing_is_made_for_nobody(clock: ManualClock) -> None:
    pool = Pool(2, order=LRU(2), clock=clock)
    store(pool, A, B)
    evict(pool, 1)
    pool.clear()
    late = Ear()
    pool.add_observer(late)
    store(pool, A)
    assert late.heard == [Stored("g2", (A,), None)]


def test_a_raising_observer_is_removed_and_logged(pool: Pool, ear: Ear, caplog: pytest.LogCaptureFixture) -> None:
    class Bad:
        calls = 0

        def on_event(self, event: Event) -> None:
            self.calls += 1
            raise RuntimeError("no")

    bad = Bad()
    pool.add_observer(bad)
    with caplog.at_level(logging.ERROR):
        store(pool, A)
        store(pool, B)
    assert bad.calls == 1
    assert [record.getMessage() for record in caplog.records] == [f"observer {bad!r} raised and is removed"]
    assert len(ear.heard) == 2


def test_an_observer_may_call_the_pool(pool: Pool, ear: Ear) -> None:
    class Chain:
        def on_event(self, event: Event) -> None:
            if isinstance(event, Stored) and event.keys == (A,):
                pool.discard([A])
                assert ear.heard[-1] == event

    pool.add_observer(Chain())
    store(pool, A)
    assert ear.heard == [Stored("t", (A,), None), Removed("t", (A,))]


def test_the_manual_clock_only_goes_forward() -> None:
    with pytest.raises(ValueError, match="back"):
        ManualClock().advance(-1.0)
