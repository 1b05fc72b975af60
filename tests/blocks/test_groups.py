"""One hit over several layer groups."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbm.blocks import LayerGroup, Pool, match_groups
from kvbm.core.errors import Misuse
from kvbm.policy import LRU

SLOTS = 32
present = st.sets(st.integers(0, 9))


def key(group: int, block: int) -> bytes:
    return bytes([group, block])


def filled(group: int, blocks: set[int], needs: int | None) -> LayerGroup:
    pool = Pool(SLOTS, order=LRU(SLOTS), group=group)
    for block in sorted(blocks):
        raw = pool.allocate(1)
        assert raw is not None
        raw.stage([key(group, block)]).register().drop()
    return LayerGroup(pool, needs)


def possible(n: int, start: int, blocks: set[int], needs: int | None) -> bool:
    first = start if needs is None else max(start, n - needs)
    return all(block in blocks for block in range(first, n))


@given(
    has=st.lists(st.tuples(present, st.none() | st.integers(1, 4)), min_size=1, max_size=3),
    total=st.integers(0, 10),
    start=st.integers(0, 3),
)
def test_the_longest_hit_that_every_group_can_serve(
    has: list[tuple[set[int], int | None]], total: int, start: int
) -> None:
    groups = [filled(at, blocks, needs) for at, (blocks, needs) in enumerate(has)]
    keys = {at: [key(at, block) for block in range(total)] for at in range(len(groups))}
    length, held = match_groups(groups, keys, start)
    hits = [n for n in range(start + 1, total + 1) if all(possible(n, start, *each) for each in has)]
    assert length == max(hits, default=0)
    for at, (pinned, (_, needs)) in enumerate(zip(held, has, strict=True)):
        first = start if needs is None else max(start, length - needs)
        assert pinned.keys == tuple(key(at, block) for block in range(first, length))
        assert groups[at].pool.statistics().active == len(pinned)
        pinned.drop()


def test_a_window_needs_fewer_blocks_than_full_attention() -> None:
    full, window = filled(0, set(range(8)), None), filled(1, {6, 7}, 2)
    keys = {at: [key(at, block) for block in range(10)] for at in range(2)}
    length, held = match_groups([full, window], keys)
    assert (length, [len(pinned) for pinned in held]) == (8, [8, 2])
    for pinned in held:
        pinned.drop()
    window.pool.discard([key(1, 6)])
    length, held = match_groups([full, window], keys)
    assert (length, [len(pinned) for pinned in held]) == (0, [0, 0])


@pytest.mark.parametrize("keys", [{}, {0: [b"a"], 1: []}])
def test_groups_need_as_many_keys(keys: dict[int, list[bytes]]) -> None:
    groups = [filled(at, set(), None) for at in range(len(keys))]
    with pytest.raises(Misuse):
        match_groups(groups, keys)


def test_a_group_needs_a_block() -> None:
    with pytest.raises(Misuse):
        filled(0, set(), 0)


@pytest.mark.parametrize("positions", [[0, 0], [3], [-1]])
def test_selecting_what_is_not_there_changes_nothing(positions: list[int]) -> None:
    group = filled(0, {0, 1, 2}, None)
    with group.pool.match([key(0, 0), key(0, 1), key(0, 2)]) as pinned:
        with pytest.raises(Misuse):
            pinned.select(positions)
        assert len(pinned) == 3


def test_selecting_keeps_the_order_that_was_asked_for() -> None:
    group = filled(0, {0, 1, 2}, None)
    pinned = group.pool.match([key(0, 0), key(0, 1), key(0, 2)]).select([2, 0])
    with pinned:
        assert pinned.keys == (key(0, 2), key(0, 0))
        assert group.pool.statistics().active == 2
