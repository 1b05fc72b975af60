"""The LRU order: leaf first, oldest run first, and a log that stays bounded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm.core.region import Slots
from kvbm.policy import EVICTION_ORDERS, LRU


def run(*slots: int) -> Slots:
    return np.array(slots, np.int64)


def test_registry_makes_an_order() -> None:
    assert len(EVICTION_ORDERS["lru"](8)) == 0


def test_leaf_goes_before_root_and_older_before_newer() -> None:
    order = LRU(10)
    order.add(run(0, 1, 2))
    order.add(run(3, 4))
    assert order.victims(4).tolist() == [2, 1, 0, 4]
    assert order.victims(4).tolist() == [3]
    assert order.victims(1).tolist() == []


def test_discarded_slots_are_skipped_and_can_return_as_newest() -> None:
    order = LRU(10)
    order.add(run(0, 1, 2, 3))
    order.discard(run(3, 1))
    order.add(run(1))
    assert len(order) == 3
    assert order.victims(2).tolist() == [2, 0]
    assert order.victims(9).tolist() == [1]


def test_empty_runs_change_nothing() -> None:
    order = LRU(4)
    order.add(run())
    order.discard(run())
    assert len(order) == 0
    assert order.victims(0).tolist() == []


def test_fresh_is_empty_and_independent() -> None:
    order = LRU(4)
    order.add(run(1))
    other = order.fresh()
    other.add(run(2, 3))
    assert (len(order), len(other)) == (1, 2)


def test_crosses_a_long_stretch_of_holes() -> None:
    order = LRU(1000)
    order.add(np.arange(999, -1, -1))
    order.discard(np.arange(900))
    assert order.victims(3).tolist() == [900, 901, 902]
    assert len(order) == 97


@pytest.mark.parametrize("live", [1, 100, 5000])
def test_the_log_is_bounded_by_what_is_live(live: int) -> None:
    order = LRU(5000)
    everything = np.arange(5000)
    order.add(everything)
    order.discard(everything[live:])
    kept = everything[:live]
    for _ in range(5000 // live + 40):
        order.discard(kept)
        order.add(kept)
    assert len(order._log) <= 8 * max(live, 1024)
    assert order.victims(live).tolist() == kept[::-1].tolist()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("adv"), st.lists(st.integers(0, 399), max_size=60, unique=True))))
def test_is_a_list(steps: list[tuple[str, list[int]]]) -> None:
    order, model = LRU(400), list[int]()
    for step, slots in steps * 8:
        if step == "a":
            new = [slot for slot in slots if slot not in model]
            order.add(np.array(new, np.int64))
            model += reversed(new)
        elif step == "d":
            old = [slot for slot in slots if slot in model]
            order.discard(np.array(old, np.int64))
            model = [slot for slot in model if slot not in old]
        else:
            count = len(slots)
            assert order.victims(count).tolist() == model[:count]
            model = model[count:]
        assert len(order) == len(model)
