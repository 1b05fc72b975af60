"""Handles: every transition, every misuse, and slots that always come back."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvbm.blocks import Pinned, Pool, Staged, Writable
from kvbm.blocks.slots import FREE, SlotTable
from kvbm.core.errors import Misuse
from kvbm.policy import LRU

A, B, C, D, E, F, G, H = KEYS = [bytes([letter]) * 32 for letter in b"ABCDEFGH"]


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Eight slots; whatever a test does, they are all free when everything is cleared."""
    pool = Pool(8, order=LRU(8))
    yield pool
    pool.check()
    pool.clear()
    assert pool.statistics().free == 8


def writable(pool: Pool, n: int = 2) -> Writable:
    got = pool.allocate(n)
    assert got is not None
    return got


def store(pool: Pool, *keys: bytes, priority: int = 0) -> None:
    writable(pool, len(keys)).stage(keys, priority=priority).register().drop()


def test_a_block_lives(pool: Pool) -> None:
    with writable(pool).stage([A, B]) as staged:
        assert pool.absent([A, C]) == [1]
        assert len(pool.match([A])) == 0
        pinned = staged.register()
    assert pinned.keys == (A, B)
    assert pool.statistics().active == 2
    pinned.drop()
    assert pool.statistics().inactive == 2
    with pool.match([A, B, C]) as again:
        assert (len(again), again.keys) == (2, (A, B))
        assert pool.peek([A, B, C]) == 2


def test_match_starts_where_told(pool: Pool) -> None:
    store(pool, B, C)
    with pool.match([A, B, C, D], start=1) as pinned:
        assert pinned.keys == (B, C)
    assert pool.peek([A, B], start=1) == 1
    assert len(pool.match([A, B], start=5)) == 0
    assert (pool.statistics().requested, pool.statistics().returned) == (3, 2)


def test_scan_finds_any_subset(pool: Pool) -> None:
    store(pool, A, C)
    pinned, positions = pool.scan([A, B, C, D])
    with pinned:
        assert positions == [0, 2]
        assert pinned.keys == (A, C)


def test_all_or_nothing(pool: Pool) -> None:
    store(pool, A, B, C)
    with pool.match([A]), writable(pool, 4):
        assert pool.allocate(4) is None
        assert pool.peek([A, B, C]) == 3
        with writable(pool, 3):
            assert pool.peek([A, B, C]) == 1
    assert pool.statistics().evictions == 2
    before = pool.statistics().allocations
    assert pool.allocate(9) is None
    assert pool.statistics().allocations == before == 10


def test_an_order_that_gives_too_few_loses_nothing() -> None:
    class Stingy(LRU):
        def victims(self, n: int) -> np.ndarray:
            return super().victims(n - 1)

    pool = Pool(4, order=Stingy(4))
    store(pool, A, B, C, D)
    assert pool.allocate(2) is None
    pool.check()
    assert pool.peek([A, B, C, D]) == 4


def test_leaf_is_evicted_before_root(pool: Pool) -> None:
    store(pool, A, B, C, D)
    store(pool, E, F, G, H)
    with writable(pool, 3):
        assert pool.peek([A, B, C, D]) == 1
        assert pool.peek([E, F, G, H]) == 4


def test_touch_puts_a_prompt_let_go_in_parts_in_order(pool: Pool) -> None:
    store(pool, A, B)
    store(pool, C, D)
    store(pool, E, F, G, H)
    with pool.match([E]):
        pool.touch([A, B, C, D, E, b"unknown", A])
    with writable(pool, 5):
        assert pool.peek([A, B, C, D]) == 2
        assert pool.peek([E]) == 1


def test_only_done_blocks_are_published(pool: Pool) -> None:
    pinned = writable(pool, 3).stage([A, B, C]).register(np.array([True, False, True]))
    assert pinned.keys == (A, C)
    assert pool.absent([A, B, C]) == [1]
    assert pool.statistics().free == 6
    pinned.drop()
    assert len(writable(pool, 1).stage([D]).register(np.array([False]))) == 0


def test_the_existing_block_wins(pool: Pool) -> None:
    store(pool, A)
    with pool.match([A]) as first, writable(pool).stage([A, B]).register() as second:
        assert second.slots[0] == first.slots[0]
        assert pool.statistics().free == 6
    assert pool.statistics().duplicates == 1


def test_two_may_stage_one_key(pool: Pool) -> None:
    one, two = writable(pool, 1).stage([A]), writable(pool, 1).stage([A])
    one.drop()
    assert pool.absent([A]) == []
    two.drop()
    assert pool.absent([A]) == [0]


def test_narrow_lets_the_rest_go(pool: Pool) -> None:
    store(pool, A, B, C)
    with pool.match([A, B, C]) as pinned:
        pinned.narrow(1)
        assert (len(pinned), pinned.keys) == (1, (A,))
        assert (pool.statistics().active, pool.statistics().inactive) == (1, 2)
        for n in (-1, 2):
            with pytest.raises(Misuse):
                pinned.narrow(n)
        pinned.narrow(0)
        assert pool.statistics().active == 0


def test_discarded_blocks_stay_until_let_go(pool: Pool) -> None:
    store(pool, A, B, C)
    pinned, other = pool.match([A, B]), pool.match([A])
    assert pool.discard([B, C, B, D]) == 2
    assert pool.statistics().orphaned == 1
    assert pool.peek([A, B]) == 1
    store(pool, B)
    with pool.match([A, B]) as again:
        assert again.slots[1] != pinned.slots[1]
    pinned.drop()
    assert (pool.statistics().orphaned, pool.statistics().free) == (0, 6)
    other.drop()


def test_a_weak_reference_lives_as_long_as_its_block(pool: Pool) -> None:
    store(pool, A, B)
    with pool.match([A, B]) as pinned:
        weak = pinned.weak()
    again = weak.upgrade()
    assert again is not None
    with again:
        assert again.keys == (A, B)
    pool.discard([B])
    assert weak.upgrade() is None


def test_clear_begins_a_new_generation(pool: Pool) -> None:
    store(pool, A, B)
    pinned, raw, staged = pool.match([A]), writable(pool, 1), writable(pool, 1).stage([C])
    weak = pinned.weak()
    pool.clear()
    assert pool.statistics().generation == 1
    assert pool.absent([A, C]) == [0, 1]
    late = raw.stage([D])
    assert pool.absent([D]) == [0]
    fresh = writable(pool, 1).stage([C])
    assert len(staged.register()) == 0
    assert pool.absent([C]) == []
    late.drop()
    fresh.drop()
    pinned.drop()
    for _ in range(8):
        store(pool, A)
        assert weak.upgrade() is None
        pool.discard([A])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda pool: pool.allocate(0),
        lambda pool: pool.allocate(-1),
        lambda pool: pool.match([A], start=-1),
        lambda pool: pool.peek([A], start=-1),
        lambda pool: pool.scan([B, B]),
        lambda pool: Pool(0, order=LRU(1)),
        lambda pool: Pool(8, order=LRU(8), duplicates="both"),
        lambda pool: Pool(8, order=LRU(8), max_pinned=1.1),
        lambda pool: Pool(8, order=LRU(8), max_pinned=-0.1),
        lambda pool: Pool(8, order=LRU(8), most_doubted=1.1),
        lambda pool: Pool((1 << 29) + 1, order=LRU(1)),
        lambda pool: pool.resize(0),
        lambda pool: pool.candidates(-1),
        lambda pool: pool.pin([A], owner="me", ttl=0),
        lambda pool: pool.pin([A], owner="me", ttl=float("inf")),
        lambda pool: pool.pin([A], owner="me", ttl=float("nan")),
    ],
)
def test_misuse_of_the_pool_changes_nothing(pool: Pool, wrong: Callable[[Pool], object]) -> None:
    store(pool, A)
    before = pool.statistics()
    with pytest.raises(Misuse):
        wrong(pool)
    assert pool.statistics() == before


def test_the_refusal_of_a_size_says_which_are_possible(pool: Pool) -> None:
    with pytest.raises(Misuse, match=r"^a pool has 1 to 536870912 slots, not 0$"):
        pool.resize(0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda w: w.stage([A]),
        lambda w: w.stage([A, B, C]),
        lambda w: w.stage([A, A]),
        lambda w: w.stage([A, B], priority=-1),
        lambda w: w.stage([A, B], priority=101),
        lambda w: w.stage([A, B], priority=0.5),
        lambda w: w.stage([A, B], ttl=0.0),
        lambda w: w.stage([A, B], ttl=float("nan")),
    ],
)
def test_wrong_arguments_take_nothing_from_a_writable(pool: Pool, wrong: Callable[[Writable], object]) -> None:
    with writable(pool) as raw:
        with pytest.raises(Misuse):
            wrong(raw)
        with raw.stage([A, B]) as staged:
            assert staged.keys == (A, B)


def test_wrong_keys_are_counted_in_the_refusal(pool: Pool) -> None:
    with writable(pool, 3) as raw, pytest.raises(Misuse, match=r"^3 slots need .* got 1 in 2$"):
        raw.stage([A, A])


@pytest.mark.parametrize("done", [np.array([True]), np.array([0, 1]), np.array([[True, True]])])
def test_wrong_arguments_take_nothing_from_a_staged(pool: Pool, done: np.ndarray) -> None:
    with writable(pool).stage([A, B]) as staged:
        with pytest.raises(Misuse):
            staged.register(done)
        assert pool.statistics().staged == 2


CONSUMED: list[Callable[[Writable, Staged, Pinned], object]] = [
    lambda w, s, p: w.slots,
    lambda w, s, p: w.drop(),
    lambda w, s, p: w.stage([C, D]),
    lambda w, s, p: s.slots,
    lambda w, s, p: s.keys,
    lambda w, s, p: s.drop(),
    lambda w, s, p: s.register(),
    lambda w, s, p: s.register(np.array([True, True])),
    lambda w, s, p: p.slots,
    lambda w, s, p: p.keys,
    lambda w, s, p: len(p),
    lambda w, s, p: p.drop(),
    lambda w, s, p: p.parents,
    lambda w, s, p: p.narrow(0),
    lambda w, s, p: p.select([]),
    lambda w, s, p: p.evict(),
    lambda w, s, p: p.weak(),
]


@pytest.mark.parametrize("use", CONSUMED)
def test_a_consumed_handle_is_refused(pool: Pool, use: Callable[[Writable, Staged, Pinned], object]) -> None:
    raw = writable(pool)
    staged = raw.stage([A, B])
    pinned = staged.register()
    pinned.drop()
    before = pool.statistics()
    with pytest.raises(Misuse, match="already used or dropped"):
        use(raw, staged, pinned)
    assert pool.statistics() == before
    assert repr(raw) == "<Writable consumed>"


def test_a_handle_leaves_its_block_dropped(pool: Pool) -> None:
    with writable(pool) as raw:
        assert repr(raw) == "<Writable of 2 blocks>"
        assert pool.statistics().writable == 2
    with writable(pool).stage([A, B]):
        assert pool.statistics().staged == 2
    assert pool.statistics().free == 8
    with pytest.raises(Misuse):
        raw.drop()


@pytest.mark.parametrize("last", ["Writable", "Staged", "Pinned"])
def test_a_forgotten_handle_gives_back_first_and_then_warns(pool: Pool, last: str) -> None:
    handle: Writable | Staged | Pinned | None = writable(pool)
    if isinstance(handle, Writable) and last != "Writable":
        handle = handle.stage([A, B])
    if isinstance(handle, Staged) and last == "Pinned":
        handle = handle.register()
    free_at_warning = []
    with warnings.catch_warnings():
        warnings.showwarning = lambda *_, **__: free_at_warning.append(
            pool.statistics().free + pool.statistics().inactive
        )
        warnings.simplefilter("always")
        handle = None
        gc.collect()
    assert free_at_warning == [8]


def test_a_handle_forgotten_while_the_lock_is_held_comes_back_later(pool: Pool) -> None:
    raw = writable(pool)
    with pytest.warns(ResourceWarning, match="Writable over 2 blocks"), pool._ledger._lock:
        del raw
    assert pool.statistics().free == 8


def test_whoever_allocates_gets_what_was_forgotten(pool: Pool) -> None:
    raw = writable(pool)
    with pytest.warns(ResourceWarning), pool._ledger._lock:
        del raw
    with writable(pool, 8) as everything:
        assert sorted(everything.slots) == list(range(8))


def test_nobody_waits_for_what_a_forgotten_handle_staged(pool: Pool) -> None:
    staged = writable(pool).stage([A, B])
    with pytest.warns(ResourceWarning):
        del staged
    assert pool.absent([A, B]) == [0, 1]


def test_an_empty_handle_holds_nothing_to_forget(pool: Pool) -> None:
    assert len(pool.match([A])) == 0


def test_slots_are_read_only(pool: Pool) -> None:
    with writable(pool) as raw, pytest.raises(ValueError, match="read-only"):
        raw.slots[0] = 7


def run(*slots: int) -> bytes:
    return np.array(slots, np.int64).tobytes()


def states_with(pool: Pool, slot: int, state: int) -> bytes:
    states = np.frombuffer(pool._ledger._table.states(), np.int32).copy()
    states[slot] = state
    return states.tobytes()


@pytest.mark.parametrize(
    ("lies", "text"),
    [
        (lambda pool: {"states": states_with(pool, 1, FREE)}, "slots per state"),
        (lambda pool: {"states": states_with(pool, 7, -9)}, "no state"),
        (lambda pool: {"free_slots": run(2, 3, 4, 5, 6, 6)}, "twice"),
        (lambda pool: {"free_slots": run(2, 3, 4, 5, 6, 1)}, "not free"),
        (lambda pool: {"keys": (None, None)}, "no key"),
        (lambda pool: {"find": run(1, 0)}, "does not lead"),
        (lambda pool: pool._ledger._table.expiry.__setitem__(7, 1.0), "can expire"),
        (lambda pool: pool._ledger._table.expiry.__setitem__(1, 1.0), "before the pool looks"),
        (lambda pool: pool._ledger._table.priority.fill(0), "can be evicted"),
    ],
)
def test_check_says_what_is_wrong(lies: Callable[[Pool], dict[str, object] | None], text: str) -> None:
    pool = Pool(8, order=LRU(8))
    store(pool, A, B, priority=3)
    pool.check()
    table, answers = pool._ledger._table, lies(pool) or {}
    liar = type("Liar", (SlotTable,), {name: lambda *_, said=said: said for name, said in answers.items()})
    table.__class__ = liar
    with pytest.raises(AssertionError, match=text):
        pool.check()


@pytest.mark.parametrize(
    ("lies", "text"),
    [
        (lambda pool: {"free": 5}, "7 slots are counted, there are 8"),
        (lambda pool: {"active": 3}, "3 of 2 registered blocks are held"),
        (lambda pool: {"active": 1}, "2 blocks can be evicted, 1 are inactive"),
        (lambda pool: {"state": -9}, "in no state"),
        (lambda pool: {"keys": (None, None)}, "no key"),
        (lambda pool: {"find": run(1, 0)}, "does not lead"),
        (lambda pool: pool._ledger._table.expiry.__setitem__(7, 1.0), "can expire"),
    ],
)
def test_a_part_of_the_check_says_so_too(lies: Callable[[Pool], dict[str, object] | None], text: str) -> None:
    pool = Pool(8, order=LRU(8))
    store(pool, A, B)
    assert pool.examine(0, 5) == (5, [])
    assert pool.examine(5, 10) == (8, [])
    assert pool.examine(8, 13) == (8, [])
    table, answers = pool._ledger._table, lies(pool) or {}
    numbers = {"free", "active"}
    said = {name: value if name in numbers else lambda *_, value=value: value for name, value in answers.items()}
    table.__class__ = type("Liar", (SlotTable,), said)
    assert text in "; ".join(pool.examine(0, 8)[1])
    with pytest.raises(Misuse):
        pool.examine(-1, 5)


def test_slots_of_a_prompt_stay_neighbours(pool: Pool) -> None:
    store(pool, *KEYS)
    with writable(pool, 8) as raw:
        assert raw.slots.tolist() == list(range(8))
        assert raw.slots.flags.c_contiguous
