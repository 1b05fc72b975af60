"""What lands in host memory, and who is told."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from kvbm.blocks import Pinned, Pool
from kvbm.core.region import Slots
from kvbm.policy.lru import LRU
from kvbm.tiers.host import ENGINE, Host, Landing
from tests.leader.roles import keys_of

KEYS = keys_of("a", 4)


class Ear:
    """Writes down what it hears, and whether it can be found at that moment."""

    def __init__(self, pool: Pool, name: str, heard: list[str]) -> None:
        self._pool, self._name, self._heard = pool, name, heard
        self.raises = False

    def landing(self, slots: Slots, keys: Sequence[bytes], how: Landing) -> None:
        self._heard.append(f"{self._name} landing {len(slots)} {how.origin}, {self._pool.peek(keys)} there")

    def landed(self, blocks: Pinned, how: Landing) -> None:
        if self.raises:
            raise ZeroDivisionError
        places = None if how.places is None else how.places.tolist()
        held = self._pool.statistics().active
        self._heard.append(f"{self._name} landed {[KEYS.index(key) for key in blocks.keys]} at {places}, {held} held")


def land(host: Host, done: Sequence[bool], places: Slots | None) -> Pinned:
    raw = host.pool.allocate(len(KEYS))
    assert raw is not None
    return host.land(raw.stage(KEYS), np.array(done), Landing(ENGINE, places))


@pytest.fixture
def pool() -> Pool:
    return Pool(8, order=LRU(8))


def test_all_are_told_before_and_while_it_is_held(pool: Pool) -> None:
    heard: list[str] = []
    host = Host(pool)
    for name in ("one", "two"):
        host.listen(Ear(pool, name, heard))
    land(host, [True, False, True, True], np.arange(10, 14)).drop()
    assert heard == [
        "one landing 4 engine, 0 there",
        "two landing 4 engine, 0 there",
        "one landed [0, 2, 3] at [10, 12, 13], 3 held",
        "two landed [0, 2, 3] at [10, 12, 13], 3 held",
    ]
    assert pool.statistics().active == 0


def test_after_a_clear_nothing_lands(pool: Pool) -> None:
    heard: list[str] = []
    host = Host(pool)
    host.listen(Ear(pool, "one", heard))
    raw = pool.allocate(4)
    assert raw is not None
    staged = raw.stage(KEYS)
    pool.clear()
    host.land(staged, np.ones(4, np.bool_), Landing("g3", np.arange(4))).drop()
    assert heard[-1] == "one landed [] at [], 0 held"
    assert pool.peek(KEYS) == 0


def test_who_raises_leaves_nothing_held(pool: Pool) -> None:
    host, ear = Host(pool), Ear(pool, "one", [])
    host.listen(ear)
    ear.raises = True
    with pytest.raises(ZeroDivisionError):
        land(host, [True] * 4, None)
    assert pool.statistics().active == 0
