"""Blocks of which nobody knows whether they are asked for again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from kvbm.blocks import Pool
from kvbm.policy import EVICTION_ORDERS, LRU, eviction_order

A, B, C, D, E, F, G, H = KEYS = [bytes([letter]) * 32 for letter in b"ABCDEFGH"]


def keep(pool: Pool, keys: Sequence[bytes], priority: int = 0) -> None:
    slots = pool.allocate(len(keys))
    assert slots is not None
    slots.stage(keys, priority=priority).register().drop()


def gone(pool: Pool) -> set[bytes]:
    return {key for key, there in zip(KEYS, pool.present(KEYS), strict=True) if not there}


def full(order: str = "lru", most_doubted: float = 0.25) -> Pool:
    """A prompt of two blocks with an answer of four, then another prompt of two."""
    pool = Pool(8, order=eviction_order(order, 8), most_doubted=most_doubted)
    keep(pool, [A, B])
    keep(pool, [C, D, E, F])
    pool.doubt([C, D, E, F])
    keep(pool, [G, H])
    return pool


@pytest.mark.parametrize("order", EVICTION_ORDERS)
def test_what_is_more_than_their_share_goes_first(order: str) -> None:
    pool = full(order)
    with pool.allocate(2) or pytest.fail("nothing to evict"):
        assert gone(pool) == {E, F}
    pool.check()


def test_within_their_share_they_are_like_all_others() -> None:
    pool = full()
    with pool.allocate(4) or pytest.fail("nothing to evict"):
        assert gone(pool) == {E, F, A, B}
    pool = full(most_doubted=1.0)
    with pool.allocate(2) or pytest.fail("nothing to evict"):
        assert gone(pool) == {A, B}


@pytest.mark.parametrize(
    "ask", [lambda pool: pool.match([C, D, E, F]).drop(), lambda pool: pool.want([C, D, E, F, b"x" * 32])]
)
def test_who_asks_ends_the_doubt(ask: Callable[[Pool], object]) -> None:
    pool = full()
    ask(pool)
    with pool.allocate(2) or pytest.fail("nothing to evict"):
        assert gone(pool) == {A, B}
    pool.check()


def test_who_only_holds_does_not_end_it() -> None:
    pool = full()
    hold, _ = pool.scan([C, D, E, F])  # to write them to disk, say
    with pool.allocate(2) or pytest.fail("nothing to evict"):
        assert gone(pool) == {A, B}
    hold.drop()
    keep(pool, [A])
    with pool.allocate(2) or pytest.fail("nothing to evict"):
        assert gone(pool) == {B, F}
    pool.check()


def test_a_slot_forgets_with_its_block() -> None:
    pool = full()
    pool.discard([C, D, E, F])
    keep(pool, [C, D, E, F])
    with pool.allocate(2) or pytest.fail("nothing to evict"):
        assert gone(pool) == {A, B}
    pool.clear()
    pool.resize(16)
    keep(pool, KEYS)
    pool.doubt(KEYS)
    pool.check()


def test_a_priority_is_never_doubted() -> None:
    pool = Pool(8, order=LRU(8), most_doubted=0.0)
    keep(pool, [A, B], priority=10)
    pool.doubt([A, B])
    keep(pool, [C, D, E, F, G, H])
    with pool.allocate(2) or pytest.fail("nothing to evict"):
        assert gone(pool) == {G, H}


def test_books_that_do_not_fit_are_noticed() -> None:
    pool = full()
    pool.doubt([C, D])
    ranks = pool._ledger._ranks
    assert ranks._doubts is not None
    ranks._doubts.pop(0, 1)
    with pytest.raises(AssertionError, match="doubted blocks can be evicted"):
        pool.check()
    ranks._doubted[:] = True
    with pytest.raises(AssertionError, match=r"doubted (that holds no block|blocks can be evicted)"):
        pool.check()
