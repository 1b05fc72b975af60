"""Blocks that lie in their slots already, and who is there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvbm.blocks import Pool
from kvbm.core.errors import Misuse
from kvbm.core.events import Event, Removed, Stored
from kvbm.policy import eviction_order
from kvbm.testing.clock import ManualClock

KEYS = [bytes([number]) * 32 for number in range(8)]


def slots(*numbers: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(numbers, np.int64)


def pool(num_slots: int = 6, **options: Any) -> Pool:
    return Pool(num_slots, order=eviction_order("lru", num_slots), **options)


class Ear:
    def __init__(self) -> None:
        self.heard: list[Event] = []

    def on_event(self, event: Event) -> None:
        self.heard.append(event)


def test_blocks_are_found_in_their_slots_and_go_in_the_given_order() -> None:
    ear = Ear()
    cache = pool(observers=[ear])
    cache.adopt(slots(4, 0, 2), KEYS[:3], [KEYS[1], KEYS[2], None])
    cache.check()
    assert ear.heard == [Stored("g2", (key,), parent) for key, parent in zip(KEYS, [KEYS[1], KEYS[2], None])]  # noqa: B905
    found, _ = cache.scan(KEYS[:3])
    assert found.slots.tolist() == [4, 0, 2]
    assert found.parents == (KEYS[1], KEYS[2], None)
    found.drop()
    cache = pool()
    cache.adopt(slots(4, 0, 2), KEYS[:3], [None] * 3)
    for gone in range(1, 4):
        raw = cache.allocate(3 + gone)
        assert raw is not None
        assert cache.present(KEYS[:3]).tolist() == [at >= gone for at in range(3)]
        raw.drop()


def test_the_terms_come_along() -> None:
    clock, ear = ManualClock(), Ear()
    cache = pool(clock=clock, observers=[ear])
    cache.adopt(
        slots(0, 1, 2),
        KEYS[:3],
        [None] * 3,
        priorities=np.array([7, 0, 7], np.uint8),
        ttls=np.array([np.inf, 5.0, np.inf]),
    )
    seen = [cache.look(key) for key in KEYS[:3]]
    assert [(block.priority, block.expires) for block in seen if block] == [(7, None), (0, 5.0), (7, None)]
    with cache.scan(KEYS[:3])[0] as held:
        clock.advance(1.0)
        assert [part.tolist() for part in held.terms] == [[7, 0, 7], [np.inf, 4.0, np.inf]]
    clock.advance(4.0)
    assert cache.present(KEYS[:3]).tolist() == [True, False, True]
    assert ear.heard[-1] == Removed("g2", (KEYS[1],))
    cache.adopt(slots(1), KEYS[3:4], [None])  # a slot whose block had terms of its own
    block = cache.look(KEYS[3])
    assert block is not None
    assert (block.priority, block.expires) == (0, None)
    raw = cache.allocate(4)
    assert raw is not None
    assert cache.present(KEYS[:4]).tolist() == [True, False, True, False]  # the lowest priority went first
    raw.drop()
    cache.check()


def test_a_parent_for_each_of_a_run() -> None:
    ear = Ear()
    cache = pool(observers=[ear])
    raw = cache.allocate(5)
    assert raw is not None
    for wrong in ((None, None), (None, None, None, None, "a")):
        with pytest.raises(Misuse, match=r"5 slots need .* and as many parents"):
            raw.stage(KEYS[:5], parent=wrong)  # type: ignore[arg-type]
    parents = (KEYS[7], KEYS[0], None, KEYS[6], KEYS[3])
    held = raw.stage(KEYS[:5], parent=parents).register(np.array([True, True, True, False, True]))
    assert held.parents == (*parents[:3], parents[4])
    assert ear.heard == [
        Stored("g2", tuple(KEYS[:2]), KEYS[7]),
        Stored("g2", tuple(KEYS[2:3]), None),
        Stored("g2", tuple(KEYS[4:5]), KEYS[3]),
    ]
    held.drop()


def test_nothing_is_adopted_by_half() -> None:
    cache = pool()
    raw = cache.allocate(2)
    assert raw is not None
    taken = raw.slots.tolist()
    held = raw.stage(KEYS[:2]).register()
    free = [slot for slot in range(6) if slot not in taken]
    wrong: list[tuple[Any, ...]] = [
        (slots(free[0], taken[0]), KEYS[2:4], [None, None]),
        (slots(free[0], free[0]), KEYS[2:4], [None, None]),
        (slots(6), KEYS[2:3], [None]),
        (slots(free[0]), KEYS[:1], [None]),
        (slots(*free[:2]), [KEYS[2], KEYS[2]], [None, None]),
        (slots(free[0]), ["a"], [None]),
        (slots(free[0]), KEYS[2:3], ["a"]),
        (slots(free[0]), KEYS[2:4], [None]),
        (slots(free[0]), KEYS[2:3], [None], np.array([101], np.uint8)),
        (slots(free[0]), KEYS[2:3], [None], None, np.array([0.0])),
    ]
    for at, keys, parents, *more in wrong:
        with pytest.raises(Misuse):
            cache.adopt(at, keys, parents, **dict(zip(["priorities", "ttls"], more, strict=False)))
        assert (cache.statistics().free, cache.statistics().registered) == (4, 2)
        cache.check()
    held.drop()
    cache.adopt(slots(*free), KEYS[2:6], [None] * 4)
    assert cache.present(KEYS[:6]).all()


def test_keys_by_slot() -> None:
    blocks = pool(8)
    blocks.adopt(slots(6, 1, 3), [b"c", b"a", b"b"], [None] * 3)
    assert blocks.keys(0, 8) == blocks.keys(1, 100) == (b"a", b"b", b"c")
    assert blocks.keys(2, 6) == (b"b",)
    assert blocks.keys(4, 4) == blocks.keys(9, 12) == ()
    raw = blocks.allocate(5)
    assert raw is not None
    with raw.stage([b"d", b"e", b"f", b"g", b"a"]):  # nobody can match these, and the last lies elsewhere
        assert blocks.keys(0, 8) == (b"a", b"b", b"c")
    with pytest.raises(Misuse, match="slot -1 is negative"):
        blocks.keys(-1, 3)
