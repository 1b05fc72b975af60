"""Every transition as an event, kept duplicates, and looking at one block."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvbm.blocks import Block, Pool
from kvbm.core.events import Cleared, Event, Moved, Removed, Stored
from kvbm.policy import LRU
from kvbm.testing.clock import ManualClock

A, B, C, D, E = [bytes([letter]) * 32 for letter in b"ABCDE"]


class Ear:
    def __init__(self) -> None:
        self.heard: list[Event] = []

    def on_event(self, event: Event) -> None:
        self.heard.append(event)

    def told(self) -> list[Event]:
        heard = self.heard[:]
        self.heard.clear()
        return heard


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(100.0)


def watched(num_slots: int = 4, **options: Any) -> tuple[Pool, Ear]:
    pool, ear = Pool(num_slots, order=LRU(num_slots), tier="t", group=3, **options), Ear()
    pool.add_observer(ear, transitions=True)
    return pool, ear


def moved(source: str, target: str, *slots: int) -> Moved:
    return Moved("t", slots, source, target, 3)


def store(pool: Pool, *keys: bytes, priority: int = 0, ttl: float | None = None, parent: bytes | None = None) -> None:
    raw = pool.allocate(len(keys))
    assert raw is not None
    raw.stage(keys, priority=priority, ttl=ttl, parent=parent).register().drop()


def test_the_life_of_blocks_is_told_in_order() -> None:
    pool, ear = watched()
    raw = pool.allocate(2)
    assert raw is not None
    assert ear.told() == [moved("free", "writable", 0, 1)]
    staged = raw.stage([A, B])
    assert ear.told() == [moved("writable", "staged", 0, 1)]
    pinned = staged.register()
    assert ear.told() == [moved("staged", "active", 0, 1), Stored("t", (A, B), None, 3)]
    pinned.drop()
    assert ear.told() == [moved("active", "inactive", 0, 1)]
    with pool.match([A]), pool.match([A, B]):
        assert ear.told() == [moved("inactive", "active", 0), moved("inactive", "active", 1)]
    assert ear.told() == [moved("active", "inactive", 1), moved("active", "inactive", 0)]
    big = pool.allocate(3)
    assert big is not None
    assert ear.told() == [
        moved("inactive", "writable", 1),
        Removed("t", (B,), 3),
        moved("free", "writable", 2, 3),
    ]
    big.drop()
    assert ear.told() == [moved("writable", "free", 2, 3, 1)]
    pool.discard([A])
    assert ear.told() == [moved("inactive", "free", 0), Removed("t", (A,), 3)]


def test_what_was_only_staged_goes_back() -> None:
    pool, ear = watched()
    raw = pool.allocate(3)
    assert raw is not None
    staged = raw.stage([A, B, C])
    ear.told()
    with staged.register(np.array([False, True, False])):
        assert ear.told() == [
            moved("staged", "active", 1),
            Stored("t", (B,), A, 3),
            moved("staged", "free", 0, 2),
        ]
    raw = pool.allocate(1)
    assert raw is not None
    staged = raw.stage([C])
    ear.told()
    staged.drop()
    assert ear.told() == [moved("staged", "free", 2)]


def test_neighbours_are_one_event() -> None:
    pool, ear = watched(8)
    raw = pool.allocate(7)
    assert raw is not None
    keys = [bytes([number]) * 32 for number in range(7)]
    with raw.stage(keys, parent=E).register(np.array([True, True, False, True, False, True, True])):
        assert [event for event in ear.told() if isinstance(event, Stored)] == [
            Stored("t", (keys[0], keys[1]), E, 3),
            Stored("t", (keys[3],), keys[2], 3),
            Stored("t", (keys[5], keys[6]), keys[4], 3),
        ]


def test_orphans() -> None:
    pool, ear = watched()
    store(pool, A, B)
    one, two = pool.match([A]), pool.match([A])
    ear.told()
    pool.discard([A, B])
    assert ear.told() == [
        moved("inactive", "free", 1),
        moved("active", "orphaned", 0),
        Removed("t", (A, B), 3),
    ]
    one.drop()
    assert ear.told() == []
    two.drop()
    assert ear.told() == [moved("orphaned", "free", 0)]


def test_slots_are_told_in_the_order_of_their_keys() -> None:
    pool, ear = watched()
    store(pool, A, B, C)
    with pool.match([A, B, C]):
        ear.told()
        pool.discard([C, A, B])
        assert ear.told() == [moved("active", "orphaned", 2, 0, 1), Removed("t", (C, A, B), 3)]


def test_a_clear() -> None:
    pool, ear = watched(5)
    store(pool, A, B)
    pinned, raw = pool.match([A]), pool.allocate(1)
    assert raw is not None
    staged = raw.stage([C])
    ear.told()
    pool.clear()
    assert ear.told() == [moved("inactive", "free", 1), moved("active", "orphaned", 0), Cleared("t", 1, 3)]
    assert len(staged.register()) == 0
    assert ear.told() == [moved("staged", "free", 2)]
    pinned.drop()
    assert ear.told() == [moved("orphaned", "free", 0)]


def test_pins_candidates_and_a_resize() -> None:
    pool, ear = watched()
    store(pool, A, B, C)
    ear.told()
    pool.pin([B], owner="me", ttl=1.0)
    assert ear.told() == [moved("inactive", "active", 1)]
    pool.unpin("me")
    assert ear.told() == [moved("active", "inactive", 1)]
    chosen = pool.candidates(1)
    assert ear.told() == [moved("inactive", "active", 2)]
    chosen.evict()
    assert ear.told() == [
        moved("active", "inactive", 2),
        moved("inactive", "free", 2),
        Removed("t", (C,), 3),
    ]
    pool.resize(1)
    assert ear.told() == [
        moved("inactive", "writable", 0),
        Removed("t", (A,), 3),
        moved("writable", "free", 0),
        moved("free", "retired", 3, 2, 0),
    ]
    assert pool.resize(4) == 4
    assert ear.told() == [moved("retired", "free", 0, 2, 3)]


def test_giving_up_what_is_free_evicts_nothing() -> None:
    pool, ear = watched()
    store(pool, A)
    ear.told()
    assert pool.resize(1) == 1
    assert ear.told() == [moved("free", "retired", 3, 2, 1)]


def test_an_expiry(clock: ManualClock) -> None:
    pool, ear = watched(clock=clock)
    store(pool, A, ttl=1.0)
    ear.told()
    clock.advance(1.0)
    assert pool.look(A) is None
    assert ear.told() == [moved("inactive", "free", 0), Removed("t", (A,), 3)]


@pytest.mark.parametrize("look", ["peek", "absent", "touch", "upgrade", "match", "scan", "register"])
def test_whatever_meets_an_expired_block_says_so_at_once(clock: ManualClock, look: str) -> None:
    pool, ear = watched(clock=clock)
    raw = pool.allocate(1)
    assert raw is not None
    staged = raw.stage([A])
    store(pool, A, ttl=1.0)
    with pool.match([A]) as pinned:
        weak = pinned.weak()
    ear.told()
    clock.advance(1.0)
    match look:
        case "peek":
            assert pool.peek([A]) == 0
        case "absent":
            assert pool.absent([A, B]) == [1]  # staged
        case "touch":
            pool.touch([A])
        case "upgrade":
            assert weak.upgrade() is None
        case "match":
            assert len(pool.match([A])) == 0
        case "scan":
            assert pool.scan([A])[1] == []
        case "register":
            staged.register().drop()
    assert ear.told()[:2] == [moved("inactive", "free", 1), Removed("t", (A,), 3)]
    if look != "register":
        staged.drop()
    assert pool.statistics().expired == 1


@pytest.mark.parametrize("look", ["pins", "statistics", "allocate"])
def test_whatever_ends_a_pin_says_so_at_once(clock: ManualClock, look: str) -> None:
    pool, ear = watched(clock=clock)
    store(pool, A)
    pool.pin([A], owner="me", ttl=1.0)
    ear.told()
    clock.advance(1.0)
    match look:
        case "pins":
            assert pool.pins() == {}
        case "statistics":
            assert pool.statistics().inactive == 1
        case "allocate":
            assert pool.allocate(5) is None
    assert ear.told() == [moved("active", "inactive", 0)]


def test_a_forgotten_handle() -> None:
    pool, ear = watched()
    raw = pool.allocate(1)
    ear.told()
    with pytest.warns(ResourceWarning):
        del raw
    pool.statistics()
    assert ear.told() == [moved("writable", "free", 0)]


def test_what_was_forgotten_is_no_orphan_of_a_clear() -> None:
    pool, ear = watched()
    store(pool, A)
    pinned = pool.match([A])
    ear.told()
    with pytest.warns(ResourceWarning), pool._ledger._lock:
        del pinned  # it cannot be taken back yet
    pool.clear()
    assert ear.told() == [moved("active", "inactive", 0), moved("inactive", "free", 0), Cleared("t", 1, 3)]


def test_only_who_asks_hears_transitions() -> None:
    plain = Ear()
    pool = Pool(4, order=LRU(4), observers=[plain], tier="t")
    late = Ear()
    store(pool, A)
    pool.add_observer(late, transitions=True)
    store(pool, B)
    assert plain.heard == [Stored("t", (A,), None), Stored("t", (B,), None)]
    assert [event for event in late.heard if isinstance(event, Moved)] == [
        Moved("t", (1,), "free", "writable"),
        Moved("t", (1,), "writable", "staged"),
        Moved("t", (1,), "staged", "active"),
        Moved("t", (1,), "active", "inactive"),
    ]
    assert [event for event in late.heard if not isinstance(event, Moved)] == plain.heard[1:]


def test_a_watcher_that_raises_hears_nothing_more(caplog: pytest.LogCaptureFixture) -> None:
    class Bad(Ear):
        def on_event(self, event: Event) -> None:
            super().on_event(event)
            raise RuntimeError("no")

    pool, ear = watched()
    bad = Bad()
    pool.add_observer(bad, transitions=True)
    with caplog.at_level(logging.ERROR):
        store(pool, A)
    assert bad.heard == [moved("free", "writable", 0)]
    assert "raised and is removed" in caplog.text
    assert len(ear.told()) == 5
    store(pool, B)
    assert len(ear.told()) == 5
    pool.check()


@pytest.fixture
def keeping() -> Iterator[tuple[Pool, Ear]]:
    pool, ear = watched(6, duplicates="keep")
    yield pool, ear
    pool.check()


def test_a_duplicate_is_its_writers_alone(keeping: tuple[Pool, Ear]) -> None:
    pool, ear = keeping
    store(pool, A)
    raw = pool.allocate(2)
    assert raw is not None
    staged = raw.stage([A, B], priority=7, ttl=1.0)
    ear.told()
    mine = staged.register()
    assert (mine.keys, mine.slots.tolist()) == ((A, B), [1, 2])
    assert ear.told() == [
        moved("staged", "active", 2),
        Stored("t", (B,), A, 3),
        moved("staged", "orphaned", 1),
    ]
    seen = pool.statistics()
    assert (seen.duplicates, seen.registrations, seen.orphaned, seen.active) == (1, 2, 1, 1)
    with pool.match([A, B]) as found:
        assert found.slots.tolist() == [0, 2]
        assert ear.told() == [moved("inactive", "active", 0)]
    first, second = pool.look(A), pool.look(B)
    assert first is not None
    assert second is not None
    assert (first.priority, first.expires, second.priority) == (0, None, 7)
    weak = mine.weak()
    assert weak.upgrade() is None  # not what is found by its key
    mine.drop()
    assert pool.statistics().free == 4


def test_a_duplicate_that_is_not_done_is_nobodys(keeping: tuple[Pool, Ear]) -> None:
    pool, ear = keeping
    store(pool, A, B)
    raw = pool.allocate(2)
    assert raw is not None
    staged = raw.stage([A, B])
    ear.told()
    with staged.register(np.array([False, True])) as mine:
        assert (mine.keys, mine.slots.tolist()) == ((B,), [3])
        assert ear.told() == [moved("staged", "orphaned", 3), moved("staged", "free", 2)]
        assert pool.statistics().duplicates == 1
    assert pool.statistics().free == 4


def test_evicting_a_kept_duplicate_evicts_nothing(keeping: tuple[Pool, Ear]) -> None:
    pool, _ = keeping
    store(pool, A)
    raw = pool.allocate(1)
    assert raw is not None
    assert raw.stage([A]).register().evict() == 0
    assert (pool.peek([A]), pool.statistics().free, pool.statistics().evictions) == (1, 5, 0)


def test_looking_at_a_block(clock: ManualClock) -> None:
    pool, _ = watched(clock=clock)
    store(pool, A, B, parent=D)
    store(pool, C, priority=60, ttl=5.0)
    assert pool.look(A) == Block(key=A, slot=0, parent=D, holds=0, priority=0, expires=None)
    with pool.match([A, B]), pool.match([A]):
        assert pool.look(A) == Block(key=A, slot=0, parent=D, holds=2, priority=0, expires=None)
        assert pool.look(B) == Block(key=B, slot=1, parent=A, holds=1, priority=0, expires=None)
    assert pool.look(C) == Block(key=C, slot=2, parent=None, holds=0, priority=60, expires=105.0)
    assert pool.look(D) is None
    raw = pool.allocate(1)
    assert raw is not None
    with raw.stage([D]) as staged:
        assert pool.look(D) is None
        with staged.register():
            assert pool.look(D) == Block(key=D, slot=3, parent=None, holds=1, priority=0, expires=None)
    clock.advance(5.0)
    assert pool.look(C) is None
    assert pool.statistics().expired == 1
