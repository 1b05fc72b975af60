"""Tiers: what the placements do over two and three pools, what is held, what is moved, what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvbm.abc.policy import Drop, Keep, Move, Placement
from kvbm.blocks import Pool
from kvbm.blocks.cascade import Stretch, Tiers
from kvbm.core.errors import Misuse
from kvbm.core.events import Event, Stored
from kvbm.core.region import Slots
from kvbm.policy import LRU, Exclusive, Frequency, WriteThrough


def pools(**sizes: int) -> dict[str, Pool]:
    return {tier: Pool(size, order=LRU(size), tier=tier) for tier, size in sizes.items()}


def prompt(name: str, length: int) -> list[bytes]:
    return [f"{name}{at:02}".encode().ljust(32) for at in range(length)]


def serve(tiers: Tiers, keys: Sequence[bytes]) -> tuple[Stretch, ...]:
    with tiers.match(keys) as held:
        tiers.promote(keys, held)
        tiers.store(keys, held)
        return held.prefix


def there(pool: Pool, keys: Sequence[bytes]) -> list[int]:
    return [at for at, key in enumerate(keys) if pool.peek([key])]


class Bytes:
    """The memory of some tiers: which key lies in which slot."""

    def __init__(self) -> None:
        self.content: dict[tuple[str, int], bytes] = {}
        self.calls: list[str] = []
        self.fails = False

    def copy(self, source: str, slots: Slots, target: str, places: Slots) -> None:
        if self.fails:
            raise OSError("the copy broke")
        assert len(slots) == len(places)
        self.calls.append(f"{len(slots)} {source} to {target}")
        for slot, place in zip(slots.tolist(), places.tolist(), strict=True):
            self.content[target, place] = self.content[source, slot]

    def fill(self, tier: str, keys: Sequence[bytes], slots: Slots) -> None:
        if self.fails:
            raise OSError("the copy broke")
        for key, slot in zip(keys, slots.tolist(), strict=True):
            self.content[tier, slot] = key

    def check(self, there: dict[str, Pool]) -> None:
        """Every block that can be matched has its own bytes."""
        for (tier, _), key in list(self.content.items()):
            if block := there[tier].look(key):
                assert self.content[tier, block.slot] == key


@pytest.mark.parametrize("placement", [WriteThrough(), Exclusive()])
def test_bytes_are_where_the_blocks_are(placement: Placement) -> None:
    memory, tier_pools = Bytes(), pools(g2=5, g3=7, g4=20)
    tiers = Tiers(tier_pools, placement, memory.copy)
    for name, length in [("a", 4), ("b", 3), ("a", 5), ("c", 5), ("b", 4), ("a", 5), ("d", 9), ("b", 5), ("a", 6)]:
        keys = prompt(name, length)
        with tiers.match(keys) as held:
            tiers.promote(keys, held)
            memory.check(tier_pools)
            tiers.store(keys, held, memory.fill)
        memory.check(tier_pools)
        for pool in tier_pools.values():
            pool.check()
            assert pool.statistics().active == 0
    assert any("to g2" in call for call in memory.calls)


def test_a_prefix_spans_tiers() -> None:
    tier_pools = pools(g2=8, g3=8)
    tiers, keys = Tiers(tier_pools, WriteThrough()), prompt("a", 6)
    assert serve(tiers, keys) == ()
    tier_pools["g2"].discard(keys[2:4])
    tier_pools["g3"].discard(keys[5:])
    with tiers.match(keys) as held:
        assert held.prefix == (Stretch("g2", 0, 2), Stretch("g3", 2, 2), Stretch("g2", 4, 2))
        assert len(held) == 6
        assert tiers.promote(keys, held) == 2
    assert there(tier_pools["g2"], keys) == list(range(6))


def test_who_has_what() -> None:
    there_are = pools(g2=2, g3=8)
    tiers, keys = Tiers(there_are, WriteThrough()), prompt("a", 4)
    serve(tiers, keys)
    assert {tier: mask.tolist() for tier, mask in tiers.presence([*keys, b"x"]).items()} == {
        "g2": [True, True, False, False, False],
        "g3": [True, True, True, True, False],
    }


def test_exclusive_moves_up_and_down() -> None:
    tier_pools = pools(g2=3, g3=6)
    tiers, a, b = Tiers(tier_pools, Exclusive()), prompt("a", 3), prompt("b", 3)
    serve(tiers, a)
    serve(tiers, b)
    assert (there(tier_pools["g2"], b), there(tier_pools["g3"], a)) == ([0, 1, 2], [0, 1, 2])
    assert serve(tiers, a) == (Stretch("g3", 0, 3),)
    assert (there(tier_pools["g2"], a), there(tier_pools["g3"], b)) == ([0, 1, 2], [0, 1, 2])
    assert there(tier_pools["g3"], a) == []


def test_what_moves_down_keeps_its_parents() -> None:
    heard: list[Event] = []

    class Observer:
        def on_event(self, event: Event) -> None:
            heard.append(event)

    tier_pools = pools(g2=4, g3=8)
    tier_pools["g3"].add_observer(Observer())
    tiers, a, b = Tiers(tier_pools, Exclusive()), prompt("a", 2), prompt("b", 2)
    serve(tiers, a)
    serve(tiers, b)
    serve(tiers, prompt("c", 3))
    assert heard == [
        Stored("g3", tuple(a), None),
        Stored("g3", (b[1],), b[0]),
    ]


def test_a_part_that_fits_is_promoted_and_the_rest_stays() -> None:
    tier_pools = pools(g2=2, g3=8)
    tiers, keys = Tiers(tier_pools, Exclusive()), prompt("a", 5)
    with tiers.match(keys[:2]) as held:
        tiers.store(keys[:2], held)
    tier_pools["g3"].allocate(5).stage(keys).register().drop()  # type: ignore[union-attr]
    tier_pools["g2"].discard(keys)
    with tiers.match(keys) as held:
        assert held.prefix == (Stretch("g3", 0, 5),)
        assert tiers.promote(keys, held) == 2
        assert there(tier_pools["g3"], keys) == [2, 3, 4]
        assert tier_pools["g3"].statistics().active == 3
    assert there(tier_pools["g2"], keys) == [0, 1]


def test_a_prompt_that_does_not_fit_is_stored_from_its_root() -> None:
    tier_pools = pools(g2=3, g3=4)
    tiers, keys = Tiers(tier_pools, WriteThrough()), prompt("a", 9)
    serve(tiers, keys)
    assert (there(tier_pools["g2"], keys), there(tier_pools["g3"], keys)) == ([0, 1, 2], [0, 1, 2, 3])


def test_what_is_held_by_others_is_in_nobodys_way() -> None:
    tier_pools = pools(g2=4)
    tiers, a, b = Tiers(tier_pools, WriteThrough()), prompt("a", 3), prompt("b", 4)
    serve(tiers, a)
    with tiers.match(a):
        assert serve(tiers, b) == ()
        assert there(tier_pools["g2"], b) == [0]
    tier_pools["g2"].check()


def test_a_block_after_a_gap_is_not_evicted_for_the_gap() -> None:
    tier_pools = pools(g2=4)
    tiers, a = Tiers(tier_pools, WriteThrough()), prompt("a", 4)
    serve(tiers, a)
    tier_pools["g2"].discard([a[1]])
    with tiers.match(a) as held:
        assert len(held) == 1
        tiers.store(a, held)
        assert tier_pools["g2"].statistics().active == 4
    assert tier_pools["g2"].statistics().registrations == 5


def test_leaves_go_before_roots_over_the_whole_prompt() -> None:
    tier_pools = pools(g2=6)
    tiers, a = Tiers(tier_pools, WriteThrough()), prompt("a", 6)
    serve(tiers, a[:3])
    serve(tiers, a)
    with tier_pools["g2"].candidates(6) as order:
        assert order.keys == tuple(a)


@pytest.mark.parametrize("placement", [WriteThrough(), Exclusive()])
def test_a_copy_that_fails_publishes_nothing_and_loses_nothing(placement: Placement) -> None:
    memory, tier_pools = Bytes(), pools(g2=3, g3=6)
    tiers, a, b = Tiers(tier_pools, placement, memory.copy), prompt("a", 3), prompt("b", 3)
    for keys in (a, b):
        with tiers.match(keys) as held:
            tiers.store(keys, held, memory.fill)
    memory.fails = True
    with tiers.match(a) as held, pytest.raises(OSError, match="broke"):
        tiers.promote(a, held)
    assert there(tier_pools["g2"], a) == []
    assert there(tier_pools["g3"], a) == [0, 1, 2]
    with tiers.match(prompt("c", 2)) as held, pytest.raises(OSError, match="broke"):
        tiers.store(prompt("c", 2), held, memory.fill)
    for pool in tier_pools.values():
        pool.check()
        assert pool.statistics().active == pool.statistics().writable == pool.statistics().staged == 0


def test_an_admission_guards_new_blocks_until_they_are_worth_it() -> None:
    tier_pools, memory = pools(g2=8, g3=8), Bytes()
    tiers, a, b = Tiers(tier_pools, WriteThrough(), memory.copy, {"g3": Frequency(8)}), prompt("a", 3), prompt("b", 2)
    for keys, stored in ((a, []), (b, []), (a, [0, 1, 2]), (a, [0, 1, 2])):
        with tiers.match(keys) as held:
            tiers.promote(keys, held)
            tiers.store(keys, held, memory.fill)
        assert (there(tier_pools["g2"], keys), there(tier_pools["g3"], keys)) == ([*range(len(keys))], stored)
    memory.check(tier_pools)
    assert tier_pools["g3"].statistics().registrations == 3


def test_an_admission_guards_victims() -> None:
    tier_pools = pools(g2=3, g3=8)
    tiers, a, b = Tiers(tier_pools, Exclusive(), admissions={"g3": Frequency(8)}), prompt("a", 3), prompt("b", 3)
    serve(tiers, a)
    serve(tiers, a[:2])
    serve(tiers, b)
    assert (there(tier_pools["g2"], b), there(tier_pools["g3"], a)) == ([0, 1, 2], [0, 1])


def test_misuse() -> None:
    class Upwards(Placement):
        def store(self, tiers: Sequence[str]) -> Sequence[str]:
            return tiers

        def promote(self, tier: str, tiers: Sequence[str]) -> Keep | Drop:
            return Keep()

        def evict(self, tier: str, tiers: Sequence[str]) -> Drop | Move:
            return Move("g2")

    with pytest.raises(Misuse, match="at least one tier"):
        Tiers({}, WriteThrough())
    with pytest.raises(Misuse, match="a block that leaves g2 cannot go to g2"):
        Tiers(pools(g2=1), Upwards())
