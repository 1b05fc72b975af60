"""What an eviction order is told, and what its answers do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvbm.abc.policy import EvictionOrder, Tags
from kvbm.blocks import Pool
from kvbm.core.region import Slots
from kvbm.policy import LRU
from kvbm.testing.clock import ManualClock

A, B, C, D, E, F, G, H = KEYS = [bytes([letter]) * 32 for letter in b"ABCDEFGH"]


class Recording(LRU):
    """Writes down every call, for all priorities."""

    def __init__(self, num_slots: int, calls: list[tuple[Any, ...]] | None = None) -> None:
        super().__init__(num_slots)
        self.calls: list[tuple[Any, ...]] = [] if calls is None else calls
        self.num_slots = num_slots

    def fresh(self) -> EvictionOrder:
        self.calls.append(("fresh",))
        return Recording(self.num_slots, self.calls)

    def add(self, slots: Slots) -> None:
        self.calls.append(("add", slots.tolist()))
        super().add(slots)

    def discard(self, slots: Slots) -> None:
        self.calls.append(("discard", slots.tolist()))
        super().discard(slots)

    def victims(self, n: int) -> Slots:
        self.calls.append(("victims", n))
        return super().victims(n)

    def admit(self, slots: Slots, tags: Tags, parents: Slots) -> None:
        self.calls.append(("admit", slots.tolist(), tags.tolist(), parents.tolist()))

    def use(self, slots: Slots) -> None:
        self.calls.append(("use", slots.tolist()))

    def forget(self, slots: Slots) -> None:
        self.calls.append(("forget", slots.tolist()))

    def told(self) -> list[tuple[Any, ...]]:
        calls = self.calls[:]
        self.calls.clear()
        return calls


def recorded(num_slots: int = 8, **options: Any) -> tuple[Pool, Recording]:
    order = Recording(num_slots)
    return Pool(num_slots, order=order, **options), order


def store(
    pool: Pool, *keys: bytes, priority: int = 0, parent: bytes | None = None, ttl: float | None = None
) -> list[int]:
    raw = pool.allocate(len(keys))
    assert raw is not None
    with raw.stage(keys, priority=priority, parent=parent, ttl=ttl).register() as pinned:
        slots: list[int] = pinned.slots.tolist()
    return slots


def tags(*keys: bytes) -> list[int]:
    return [hash(key) for key in keys]


def test_new_blocks_are_admitted_with_tags_and_parents() -> None:
    pool, order = recorded()
    assert store(pool, A, B) == [0, 1]
    assert order.told() == [("admit", [0, 1], tags(A, B), [-1, 0]), ("add", [0, 1])]
    assert store(pool, C, parent=B) == [2]
    assert store(pool, D, parent=H) == [3]  # nobody has it
    assert order.told() == [
        ("admit", [2], tags(C), [1]),
        ("add", [2]),
        ("admit", [3], tags(D), [-1]),
        ("add", [3]),
    ]


def test_a_parent_that_was_not_done_is_unknown() -> None:
    pool, order = recorded()
    raw = pool.allocate(3)
    assert raw is not None
    raw.stage([A, B, C]).register(np.array([True, False, True])).drop()
    assert order.told() == [("admit", [0, 2], tags(A, C), [-1, -1]), ("add", [0, 2])]


def test_what_is_found_was_used() -> None:
    pool, order = recorded()
    store(pool, A, B, C)
    order.told()
    pool.match([A, B, D]).drop()
    assert order.told() == [("discard", [0, 1]), ("use", [0, 1]), ("add", [0, 1])]
    with pool.match([A]):
        order.told()
        with pool.match([A, B]):
            assert order.told() == [("discard", [1]), ("use", [0, 1])]
        assert order.told() == [("add", [1])]
        pinned, _ = pool.scan([C, D, A])
        assert order.told() == [("discard", [2]), ("use", [2, 0])]
        weak = pinned.weak()
        pinned.drop()
        order.told()
        again = weak.upgrade()
        assert again is not None
        assert order.told() == [("discard", [2]), ("use", [2, 0])]
        again.drop()


def test_looking_is_no_use() -> None:
    pool, order = recorded()
    store(pool, A, B)
    order.told()
    assert pool.match([C]).keys == ()
    pool.peek([A])
    pool.absent([A])
    pool.look(A)
    pool.statistics()
    pool.check()
    assert order.told() == []


def test_one_more_registration_of_a_key_is_a_use() -> None:
    pool, order = recorded()
    store(pool, A)
    order.told()
    assert store(pool, A, B) == [0, 2]
    assert order.told() == [("admit", [2], tags(B), [0]), ("discard", [0]), ("use", [0]), ("add", [0, 2])]


def test_a_better_duplicate_moves_to_another_order() -> None:
    pool, order = recorded()
    store(pool, A, B)
    order.told()
    assert store(pool, A, priority=5) == [0]
    assert order.told() == [
        ("fresh",),
        ("discard", [0]),
        ("use", [0]),
        ("forget", [0]),
        ("admit", [0], tags(A), [-1]),
        ("add", [0]),
    ]
    for priority in (5, 3):
        assert store(pool, A, priority=priority) == [0]
        assert [call for call in order.told() if call[0] in ("forget", "admit")] == []
    block = pool.look(A)
    assert block is not None
    assert block.priority == 5
    pool.check()


def test_what_is_gone_is_forgotten_outside_the_order() -> None:
    clock = ManualClock()
    pool, order = recorded(4, clock=clock)
    store(pool, A, B, C, D)
    order.told()
    raw = pool.allocate(2)
    assert raw is not None
    assert order.told() == [("victims", 2), ("forget", [3, 2])]
    assert raw.slots.tolist() == [2, 3]  # a prompt's in its order
    raw.drop()
    assert pool.discard([A, E]) == 1
    assert order.told() == [("discard", [0]), ("forget", [0])]
    with pool.match([B]):
        order.told()
        pool.discard([B])
        assert [call for call in order.told() if call[1]] == [("forget", [1])]
    store(pool, E, ttl=1.0)
    order.told()
    clock.advance(1.0)
    assert pool.peek([E]) == 0
    assert [call[0] for call in order.told()] == ["discard", "forget"]


def test_a_clear_forgets_all_and_discards_what_nobody_holds() -> None:
    pool, order = recorded()
    store(pool, A, B)
    with pool.match([A]):
        order.told()
        pool.clear()
        assert order.told() == [("discard", [1]), ("forget", [0, 1])]
        assert len(order) == 0
    assert order.told() == []


def test_priorities_have_orders_of_their_own() -> None:
    pool, order = recorded()
    store(pool, A, priority=9)
    store(pool, B, C)
    assert order.told() == [
        ("fresh",),
        ("admit", [0], tags(A), [-1]),
        ("add", [0]),
        ("admit", [1, 2], tags(B, C), [-1, 1]),
        ("add", [1, 2]),
    ]
    with pool.scan([A, B])[0] as pinned:
        assert pinned.slots.tolist() == [0, 1]
        calls = order.told()
        assert sorted(calls[:2]) == [("discard", [0]), ("discard", [1])]
        assert sorted(calls[2:]) == [("use", [0]), ("use", [1])]
    assert sorted(order.told()) == [("add", [0]), ("add", [1])]
    store(pool, D, E, F, G, H)
    order.told()
    raw = pool.allocate(8)
    assert raw is not None
    assert order.told()[:2] == [("victims", 8), ("victims", 1)]
    raw.drop()


def test_nobody_is_asked_who_has_nothing_to_give() -> None:
    pool, order = recorded(4)
    store(pool, A, priority=9)
    store(pool, B, C, priority=5)
    store(pool, D, priority=9)
    order.told()
    raw = pool.allocate(2)
    assert raw is not None
    assert order.told() == [("victims", 2), ("forget", [2, 1])]
    raw.drop()
    assert pool.peek([A]) + pool.peek([D]) == 2


def test_an_order_is_not_asked_for_more_than_it_has() -> None:
    pool, order = recorded(4)
    store(pool, A, B)
    with pool.match([A]):
        order.told()
        assert pool.allocate(4) is None
        assert order.told() == []


def test_a_resize_is_for_every_order() -> None:
    sizes = []

    class Sized(LRU):
        def resize(self, num_slots: int) -> None:
            sizes.append(num_slots)
            super().resize(num_slots)

    pool = Pool(4, order=Sized(4))
    store(pool, A, priority=3)
    pool.resize(2)
    pool.resize(4)
    assert sizes == []
    pool.resize(6)
    assert sizes == [6, 6]


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_order_that_gives_too_few_gets_them_back(stop: int) -> None:
    class Stingy(Recording):
        def victims(self, n: int) -> Slots:
            return super().victims(min(n, stop))

        def fresh(self) -> EvictionOrder:
            return Stingy(self.num_slots, self.calls)

    order = Stingy(4)
    pool = Pool(4, order=order)
    store(pool, A, B, C, D)
    order.told()
    before = pool.statistics()
    assert pool.allocate(4) is None
    assert order.told() == [("victims", stop), ("add", [0, 1, 2, 3][-stop:])]
    assert pool.statistics() == before
    assert len(order) == 4
    raw = pool.allocate(stop)
    assert raw is not None
    assert pool.statistics().evictions == stop
    raw.drop()
    pool.check()


def test_candidates_are_what_goes_next() -> None:
    pool, order = recorded(4)
    store(pool, A, B)
    store(pool, C)
    order.told()
    with pool.candidates(2) as pinned:
        assert order.told() == [("victims", 2)]
        assert pinned.keys == (A, B)
        assert pinned.parents == (None, A)
        assert pool.statistics().active == 2
        with pool.candidates(5) as rest:
            assert rest.keys == (C,)
            assert len(pool.candidates(1)) == 0
    assert len(order) == 3
    assert len(pool.candidates(0)) == 0
    pool.check()


def test_candidates_that_were_copied_are_evicted() -> None:
    pool, order = recorded(4)
    store(pool, A, B, C)
    chosen = pool.candidates(2)
    assert chosen.keys == (B, C)
    with pool.match([A, B]):
        order.told()
        assert chosen.evict() == 1  # somebody wanted the other meanwhile
        assert order.told() == [("forget", [2])]
        assert pool.statistics().active == 2
    assert (pool.peek([A, B, C]), pool.statistics().free, pool.statistics().evictions) == (2, 2, 1)
    assert pool.match([A, B]).evict() == 2
    assert pool.statistics().free == 4
    pool.check()


def test_candidates_that_stay_keep_the_order_of_their_prompt() -> None:
    pool, _ = recorded(4)
    store(pool, A, B, C)
    pool.candidates(3).drop()
    raw = pool.allocate(3)
    assert raw is not None
    assert pool.peek([A, B, C]) == 1
    raw.drop()


def test_candidates_leave_out_what_expired() -> None:
    clock = ManualClock()
    pool, _ = recorded(4, clock=clock)
    store(pool, A, ttl=1.0)
    store(pool, B)
    clock.advance(1.0)
    with pool.candidates(2) as pinned:
        assert pinned.keys == (B,)
    assert pool.statistics().expired == 1


def test_an_order_without_hooks_is_not_called() -> None:
    class Bare(LRU):
        pass

    def refuse(*_: object) -> None:
        raise AssertionError

    pool = Pool(2, order=Bare(2))
    Bare.admit = Bare.use = Bare.forget = refuse  # type: ignore[assignment]  # after the pool looked
    store(pool, A, B)
    pool.match([A]).drop()
    store(pool, C)
    pool.discard([C])
    pool.clear()
    pool.check()
