"""What each order is for: against naive models and made-up histories."""

from __future__ import annotations

import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm.abc.policy import EvictionOrder
from kvbm.policy import ARC, EVICTION_ORDERS, FIFO, LFU, LRU, S3FIFO, Lineage, MultiLRU
from kvbm.testing.policy import Caller


class Cache:
    """A pool in small: blocks by tag; what is asked for is found, or evicts something."""

    def __init__(self, order: EvictionOrder, num_slots: int) -> None:
        self.caller = Caller(order, num_slots)
        self.slots: dict[int, int] = {}
        self._free = list(range(num_slots))

    def ask(self, *tags: int) -> list[bool]:
        """Whether each was there; held and let go one after the other."""
        return [self._ask(tag) for tag in tags]

    def _ask(self, tag: int) -> bool:
        found = tag in self.slots
        if found:
            slots = [self.slots[tag]]
            self.caller.discard(slots)
            self.caller.use(slots)
        else:
            slots = [self._free.pop() if self._free else self._evict()]
            self.slots[tag] = slots[0]
            self.caller.admit(slots, tags=[tag])
        self.caller.add(slots)
        return found

    def _evict(self) -> int:
        (slot,) = self.caller.evict(1)
        self.slots = {tag: here for tag, here in self.slots.items() if here != slot}
        return slot


def hits(order: EvictionOrder, num_slots: int, tags: Iterator[int] | list[int]) -> float:
    cache = Cache(order, num_slots)
    found = cache.ask(*tags)
    return sum(found) / len(found)


def unknown() -> Iterator[int]:
    """Tags nobody asked for before."""
    yield from range(1_000_000, 2_000_000)


def skewed(num_tags: int, requests: int, seed: int = 1, shift: int = 0) -> list[int]:
    """Zipf, alpha 1."""
    weights = 1 / np.arange(1, num_tags + 1)
    chosen = np.random.default_rng(seed).choice(num_tags, requests, p=weights / weights.sum())
    return (chosen + shift).tolist()


REQUESTS = st.lists(st.integers(0, 14), max_size=120)


@settings(max_examples=60, deadline=None)
@given(REQUESTS)
def test_lru_is_an_ordered_dict(requests: list[int]) -> None:
    cache, model = Cache(LRU(6), 6), OrderedDict[int, None]()
    for tag in requests:
        assert cache.ask(tag) == [tag in model]
        model[tag] = None
        model.move_to_end(tag)
        if len(model) > 6:
            model.popitem(last=False)
        assert cache.slots.keys() == model.keys()


@settings(max_examples=60, deadline=None)
@given(REQUESTS)
def test_fifo_does_not_mind_use(requests: list[int]) -> None:
    cache, model = Cache(FIFO(6), 6), OrderedDict[int, None]()
    for tag in requests:
        assert cache.ask(tag) == [tag in model]
        model.setdefault(tag)
        if len(model) > 6:
            model.popitem(last=False)


@settings(max_examples=60, deadline=None)
@given(REQUESTS)
def test_lfu_is_a_list_of_counts(requests: list[int]) -> None:
    """The least used goes first, of those the one used longest ago."""
    cache, uses, last, age = Cache(LFU(6), 6), dict[int, int](), dict[int, tuple[int, int]](), 0
    for now, tag in enumerate(requests):
        found = tag in uses
        if not found and len(uses) == 6:
            out = min(uses, key=lambda tag: (uses[tag], last[tag]))
            del uses[out]
        assert cache.ask(tag) == [found]
        uses[tag] = min(uses[tag] + 1, 15) if found else 0
        last[tag] = (0, now)
        age += found or len(cache.slots) == 6
        if age == 50:  # before the first halving, after which the order within a list has a longer history
            break
        assert cache.slots.keys() == uses.keys()


def test_lru_keeps_a_prompt_s_root_longest() -> None:
    caller = Caller(LRU(9), 9)
    caller.insert([0, 1, 2])
    caller.insert([3, 4])
    caller.discard([0, 1])
    caller.add([0, 1])
    assert caller.victims(9) == [2, 4, 3, 1, 0]


def test_fifo_gives_what_was_held_in_its_turn_as_soon_as_it_is_let_go() -> None:
    caller = Caller(FIFO(9), 9)
    caller.insert([0, 1, 2])
    caller.insert([3, 4])
    caller.discard([1, 2])
    assert caller.evict(2) == [0, 4]
    caller.insert([5])
    caller.add([1, 2])
    assert caller.victims(9) == [2, 1, 3, 5]


def test_lfu_ageing_forgets() -> None:
    cache = Cache(LFU(4), 4)
    cache.ask(*[1] * 10, *[2] * 3)
    strangers = unknown()
    for _ in range(40):
        assert cache.ask(1, 2) == [True, True]
        cache.ask(next(strangers), next(strangers), next(strangers))
    cache.ask(*(next(strangers) for _ in range(250)))
    assert not {1, 2} & cache.slots.keys()


def test_lfu_halves_in_order() -> None:
    caller = Caller(LFU(4), 4)
    caller.insert([0, 1, 2, 3])
    for slot, uses in (0, 2), (1, 3), (2, 1), (3, 5):
        for _ in range(uses):
            caller.discard([slot])
            caller.use([slot])
            caller.add([slot])
    caller.discard([0])
    for _ in range(29):
        caller.use([0])
    caller.add([0])
    assert caller.victims(4) == [2, 1, 3, 0]


def test_multi_lru_gives_the_coldest_list_first_and_remembers_what_is_gone() -> None:
    cache = Cache(MultiLRU(100), 8)
    cache.ask(*[1] * 3, *[2] * 8, *[3] * 15, 4, 5, 5)
    assert [cache.caller.victims(1)[0] for _ in range(5)] == [cache.slots[tag] for tag in (4, 5, 1, 2, 3)]
    cache = Cache(MultiLRU(100), 2)
    cache.ask(1, 1, 2, 3)
    assert cache.slots.keys() == {2, 3}
    cache.ask(1, 4)  # the third time that 1 is asked for
    assert cache.slots.keys() == {1, 4}


def test_multi_lru_counts_anew_with_more_slots() -> None:
    caller = Caller(MultiLRU(4), 4)
    caller.insert([0, 1])
    caller.order.resize(9)
    caller.num_slots = 9
    caller.insert([8])
    assert caller.victims(3) == [1, 0, 8]


@pytest.mark.parametrize("order", [S3FIFO, ARC, LFU, MultiLRU])
def test_a_scan_does_not_wash_out_what_is_used(order: Callable[[int], EvictionOrder]) -> None:
    cache, lru = Cache(order(100), 100), Cache(LRU(100), 100)
    useful = list(range(50))
    for here in (cache, lru):
        here.ask(*useful * 4)
        strangers = unknown()
        here.ask(*(next(strangers) for _ in range(300)))
    assert sum(tag in cache.slots for tag in useful) >= 45
    assert not any(tag in lru.slots for tag in useful)


def test_s3_fifo_takes_a_ghost_into_the_main_queue() -> None:
    cache = Cache(S3FIFO(20), 20)
    cache.ask(*range(20))
    cache.ask(100)  # the first out is 0
    assert 0 not in cache.slots
    cache.ask(0, *range(200, 217))
    assert cache.slots.keys() == {0, 100, 19, *range(200, 217)}
    cache.ask(*range(300, 318))
    assert 0 in cache.slots


def test_s3_fifo_gives_another_round_for_each_use() -> None:
    cache = Cache(S3FIFO(10), 10)
    cache.ask(*range(10), *[3, 4] * 2)  # twice: they go on to the main queue
    cache.ask(*range(20, 38))
    assert {3, 4} <= cache.slots.keys()
    caller = cache.caller
    for _ in range(2):
        cache.ask(3)
    everything = caller.victims(10)
    assert set(everything) == set(cache.slots.values())
    assert everything.index(cache.slots[4]) < everything.index(cache.slots[3])


def test_s3_fifo_gives_in_bounded_time_what_is_all_used() -> None:
    order = S3FIFO(20_000)
    caller = Caller(order, 20_000)
    everything = list(range(20_000))
    caller.insert(everything)
    caller.discard(everything)
    for _ in range(3):
        caller.use(everything)
    caller.add(everything)
    assert len(caller.evict(5)) == 5
    assert len(caller.evict(6000)) == 6000
    assert len(caller.evict(20_000)) == 13_995


def test_s3_fifo_takes_what_comes_first_where_all_of_the_main_queue_is_used() -> None:
    caller = Caller(S3FIFO(6000), 6000)
    everything = list(range(6000))
    caller.admit(everything, tags=everything)
    caller.add(everything)
    caller.evict(6000)
    caller.admit(everything, tags=everything)  # ghosts, but for the few that were displaced
    for _ in range(3):
        caller.use(everything)
    caller.add(everything)
    assert len(caller.evict(5)) == 5


def test_s3_fifo_forgets_a_ghost_that_was_un_published() -> None:
    caller = Caller(S3FIFO(10), 10)
    caller.admit([1], tags=[5])
    caller.forget([1])
    caller.admit([1], tags=[5])
    assert caller.order._lists.size(0) == 1  # type: ignore[attr-defined]


def test_arc_adapts_to_which_evictions_were_mistakes() -> None:
    cache = Cache(ARC(50), 50)
    order: ARC = cache.caller.order  # type: ignore[assignment]
    cache.ask(*[tag for tag in range(40) for _ in range(2)])  # T2 is large, so what is new is out soon
    assert order._target == 0
    strangers = unknown()
    for _ in range(30):
        recent = [next(strangers) for _ in range(20)]
        cache.ask(*recent, *recent)
    grown = order._target
    assert grown > 5
    again = [tag for tag in range(100, 140) for _ in range(2)]
    for _ in range(20):
        cache.ask(*again, *(next(strangers) for _ in range(45)))
    assert order._target < grown


def test_arc_follows_a_change_of_what_is_popular() -> None:
    requests = skewed(400, 4000) + skewed(400, 4000, shift=1000)
    assert hits(ARC(80), 80, requests) > hits(LFU(80), 80, requests)
    assert hits(ARC(80), 80, requests) > hits(LRU(80), 80, requests)


@pytest.mark.parametrize("order", [S3FIFO, ARC, LFU, MultiLRU])
def test_better_than_lru_where_some_is_popular(order: Callable[[int], EvictionOrder]) -> None:
    requests = skewed(2000, 10_000)
    assert hits(order(100), 100, requests) > hits(LRU(100), 100, requests) + 0.02


def test_arc_with_more_slots_starts_to_learn_anew() -> None:
    caller = Caller(ARC(4), 4)
    caller.insert([0, 1, 2])
    caller.evict(2)
    caller.order.resize(9)
    caller.num_slots = 9
    caller.admit([8], tags=[1])
    caller.add([8])
    assert caller.victims(3) == [0, 8]


class Tree:
    """Lineage in Python: blocks with parents; an idle one without children is given, least recently used first."""

    def __init__(self) -> None:
        self.parent: dict[int, int] = {}
        self.idle: dict[int, int] = {}

    def children(self, slot: int, without: set[int]) -> set[int]:
        return {child for child, parent in self.parent.items() if parent == slot} - without


STEP = st.tuples(st.sampled_from(["new", "hold", "let go", "victims", "drop"]), st.integers(0, 99), st.integers(1, 5))


@settings(max_examples=150, deadline=None)
@given(st.lists(STEP, max_size=60))
def test_lineage_gives_leaves_only_and_every_leaf(steps: list[tuple[str, int, int]]) -> None:
    caller = Caller(Lineage(16), 16, gives_all=False)
    parent: dict[int, int] = {}

    def forget(slots: list[int]) -> None:
        caller.forget(slots)
        for slot in slots:
            del parent[slot]
        for child in [child for child, of in parent.items() if of in slots]:
            parent[child] = -1

    for step, at, count in steps:
        held, idle = sorted(caller.held), sorted(caller.idle)
        match step:
            case "new" if caller.free:
                run = sorted(caller.free)[:count]
                root = [-1, *held, *idle][at % (1 + len(held) + len(idle))]
                caller.admit(run, root)
                parent.update(zip(run, [root, *run], strict=False))
            case "hold":
                caller.discard(idle[at % 5 : at % 5 + count])
            case "let go":
                caller.add(held[at % 5 : at % 5 + count])
            case "victims":
                gone: set[int] = set()
                chosen = caller.victims(count)
                for slot in chosen:
                    assert not {child for child, of in parent.items() if of == slot} - gone
                    gone.add(slot)
                if len(chosen) < count:
                    assert all({child for child, of in parent.items() if of == slot} for slot in caller.idle)
                stay = chosen[at % 3 :]
                forget(chosen[: at % 3])
                caller.add(stay[::-1])
            case "drop" if held:
                forget([held[at % len(held)]])
            case _:
                pass
    caller.add(sorted(caller.held))
    assert len(caller.victims(16)) == len(parent)


def test_lineage_is_lru_among_leaves() -> None:
    caller = Caller(Lineage(9), 9, gives_all=False)
    caller.insert([0, 1])
    caller.admit([2, 3], 1)
    caller.add([2, 3])
    caller.admit([4], 1)
    caller.add([4])
    caller.discard([2, 3])
    assert caller.evict(9) == [4]
    caller.add([2, 3])
    assert caller.evict(3) == [3, 2, 1]
    assert caller.evict(3) == [0]


def test_lineage_a_root_alone_goes_by_its_own_age() -> None:
    caller = Caller(Lineage(9), 9, gives_all=False)
    caller.insert([0, 1])
    caller.insert([2])
    caller.discard([0])
    caller.add([0])
    assert caller.victims(3) == [1, 2, 0]


def test_a_fresh_order_is_of_the_same_kind() -> None:
    for make in EVICTION_ORDERS.values():
        assert type(make(8).fresh()) is type(make(8))


@pytest.mark.parametrize("name", EVICTION_ORDERS)
def test_time_does_not_depend_on_the_number_of_slots(name: str) -> None:
    """Ten million against a hundred thousand, with the same few in use, so that memory is equally near."""
    small, large = (EVICTION_ORDERS[name](num_slots) for num_slots in (100_000, 10_000_000))
    best = {small: sys.float_info.max, large: sys.float_info.max}
    for _ in range(25):
        for order in best:
            start = time.perf_counter()
            for first in range(0, 2400, 24):
                work(order, first)
            best[order] = min(best[order], time.perf_counter() - start)
    assert best[large] <= 2 * best[small] + 1e-4


def work(order: EvictionOrder, first: int) -> None:
    """One request of 24 blocks, five of which were there."""
    run = np.arange(first, first + 24)
    order.admit(run, run * 7919, np.concatenate(([-1], run[:-1])))
    order.add(run)
    order.discard(run[:5])
    order.use(run[:5])
    order.add(run[:5])
    order.forget(order.victims(24))


def test_s3_fifo_gives_a_block_even_where_all_were_used_too_often_to_look_at() -> None:
    """More second chances than one call gives: 3 for each of 3000 blocks in the main queue."""
    order, slots = S3FIFO(3000), np.arange(3000)
    order.admit(slots, slots, np.full(3000, -1))
    for _ in range(2):  # the first round is to the main queue
        for _ in range(3):
            order.use(slots)
        order.add(slots)
        last = order.victims(1)
        assert len(last) == 1
        order.add(last)
        order.discard(slots)
