"""One hit over several layer groups."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbm.blocks import Either, LayerGroup, Pool, find_groups, match_groups
from kvbm.core.errors import Misuse
from kvbm.policy import LRU

SLOTS = 64
BLOCK = 4
WINDOW = LayerGroup("window", BLOCK, 2 * BLOCK + 1)
"""Needs two blocks."""

rules = st.one_of(
    st.just(LayerGroup("full", BLOCK)),
    st.builds(LayerGroup, st.just("window"), st.just(BLOCK), st.integers(1, 20)),
    st.builds(LayerGroup, st.just("chunk"), st.just(BLOCK), st.integers(1, 20)),
    st.just(LayerGroup("state", BLOCK)),
)
present = st.sets(st.integers(0, 9))


def key(group: int, block: int) -> bytes:
    return bytes([group, block])


def filled(has: list[set[int]]) -> Pool:
    """A pool with these blocks of each group."""
    pool = Pool(SLOTS, order=LRU(SLOTS))
    for group, blocks in enumerate(has):
        for block in sorted(blocks):
            raw = pool.allocate(1)
            assert raw is not None
            raw.stage([key(group, block)]).register().drop()
    return pool


def read_by(rule: LayerGroup, token: int) -> set[int]:
    """The tokens before `token` that such a layer reads to compute it: the definition, token by token."""
    match rule.kind:
        case "full":
            return set(range(token))
        case "window":
            return {other for other in range(token) if token - other < rule.tokens}
        case "chunk":
            return {other for other in range(token) if other // rule.tokens == token // rule.tokens}
        case "state":
            return {token - 1} if token else set()


def needed(rule: LayerGroup, end: int, start: int) -> set[int]:
    """The blocks from `start` on with a token that is read once `end` blocks are there."""
    return {token // BLOCK for token in read_by(rule, end * BLOCK)} & set(range(start, end))


@given(rule=rules, end=st.integers(0, 12))
def test_a_hit_needs_the_blocks_that_its_next_token_reads(rule: LayerGroup, end: int) -> None:
    assert set(range(rule.first(end), end)) == needed(rule, end, 0)
    if rule.kind != "full":
        assert end - rule.first(end) <= rule.reach


@given(rule=rules, tokens=st.integers(1, 50), later=st.integers(0, 12))
def test_what_is_not_needed_now_is_never_needed_again(rule: LayerGroup, tokens: int, later: int) -> None:
    gone = range(rule.after(tokens))
    assert not {token // BLOCK for token in read_by(rule, tokens + later)} & set(gone)


@given(
    has=st.lists(st.tuples(present, rules), min_size=1, max_size=3),
    total=st.integers(0, 10),
    start=st.integers(0, 3),
    most=st.none() | st.integers(0, 12),
)
def test_the_longest_hit_that_every_group_can_serve(
    has: list[tuple[set[int], LayerGroup]], total: int, start: int, most: int | None
) -> None:
    pool = filled([blocks for blocks, _ in has])
    groups = [rule for _, rule in has]
    keys = [[key(at, block) for block in range(total)] for at in range(len(has))]
    hit = match_groups(pool, groups, keys, start, most)
    costs = {
        end: sum(len(needed(rule, end, start)) for rule in groups)
        for end in range(start + 1, total + 1)
        if all(needed(rule, end, start) <= blocks for blocks, rule in has)
    }
    assert hit.longest == max(costs, default=0)
    assert hit.length == max((end for end in costs if most is None or costs[end] <= most), default=0)
    assert sorted(hit.blocks) == [
        (at, block) for at, rule in enumerate(groups) if hit.length for block in sorted(needed(rule, hit.length, start))
    ]
    assert hit.held.keys == tuple(key(*each) for each in hit.blocks)
    assert pool.statistics().active == len(hit.blocks)
    hit.held.drop()


def test_a_window_needs_fewer_blocks_than_full_attention() -> None:
    pool = filled([set(range(8)), {6, 7}])
    keys = [[key(at, block) for block in range(10)] for at in range(2)]
    hit = match_groups(pool, [LayerGroup("full", BLOCK), WINDOW], keys)
    assert (hit.length, len(hit.blocks), hit.reach) == (8, 10, 8)
    hit.held.drop()
    pool.discard([key(1, 6)])
    hit = match_groups(pool, [LayerGroup("full", BLOCK), WINDOW], keys)
    assert (hit.length, len(hit.blocks), hit.reach) == (0, 0, 8)
    hit.held.drop()


@given(
    has=st.lists(st.tuples(present, present, rules), min_size=1, max_size=3),
    start=st.integers(0, 3),
    most=st.none() | st.integers(0, 12),
)
def test_two_pools_give_together_what_one_with_everything_gives(
    has: list[tuple[set[int], set[int], LayerGroup]], start: int, most: int | None
) -> None:
    either = Either(filled([one for one, _, _ in has]), filled([other for _, other, _ in has]))
    whole, groups = filled([one | other for one, other, _ in has]), [rule for _, _, rule in has]
    keys = [[key(at, block) for block in range(10)] for at in range(len(has))]
    assert find_groups(either, groups, keys, start, most) == find_groups(whole, groups, keys, start, most)


class Going(Pool):
    """Loses a block between asking and holding."""

    def present(self, keys):  # type: ignore[no-untyped-def]
        found = super().present(keys)
        self.discard([key(1, 7)])
        return found


def test_a_block_that_goes_meanwhile_makes_a_miss() -> None:
    pool = Going(SLOTS, order=LRU(SLOTS))
    for name in [key(0, block) for block in range(8)] + [key(1, 6), key(1, 7)]:
        raw = pool.allocate(1)
        assert raw is not None
        raw.stage([name]).register().drop()
    hit = match_groups(pool, [LayerGroup("full", BLOCK), WINDOW], [[key(at, n) for n in range(8)] for at in range(2)])
    assert (hit.length, len(hit.held)) == (0, 0)
    assert pool.statistics().active == 0
    hit.held.drop()


@pytest.mark.parametrize("keys", [[], [[b"a"], []], [[b"a"]]])
def test_groups_need_as_many_keys(keys: list[list[bytes]]) -> None:
    with pytest.raises(Misuse):
        match_groups(filled([]), [WINDOW] * (2 if keys else 0), keys)


@pytest.mark.parametrize(("block", "tokens"), [(0, 1), (1, 0)])
def test_a_group_has_tokens(block: int, tokens: int) -> None:
    with pytest.raises(Misuse):
        LayerGroup("window", block, tokens)


@pytest.mark.parametrize("positions", [[0, 0], [3], [-1]])
def test_selecting_what_is_not_there_changes_nothing(positions: list[int]) -> None:
    pool = filled([{0, 1, 2}])
    with pool.match([key(0, 0), key(0, 1), key(0, 2)]) as pinned:
        with pytest.raises(Misuse):
            pinned.select(positions)
        assert len(pinned) == 3


def test_selecting_keeps_the_order_that_was_asked_for() -> None:
    pool = filled([{0, 1, 2}])
    pinned = pool.match([key(0, 0), key(0, 1), key(0, 2)]).select([2, 0])
    with pinned:
        assert pinned.keys == (key(0, 2), key(0, 0))
        assert pool.statistics().active == 2
