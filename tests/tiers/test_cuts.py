"""Reads of offers that come in parts, each as a whole: the promotion ends them where the parts end."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from kvbm.blocks import Pool, Staged
from kvbm.core.region import Slots
from kvbm.policy import eviction_order
from kvbm.testing.clock import ManualClock
from kvbm.tiers.gate import Gate
from kvbm.tiers.host import Host
from kvbm.tiers.moves import Ended, Passage
from kvbm.tiers.promote import Promotion
from kvbm.tiers.tier import Record, Seeker
from tests.leader.roles import keys_of


class Parts:
    """An offer whose blocks come in parts that end at `cuts`."""

    tier: ClassVar[str] = "g4"
    words: ClassVar[str] = "parts"
    keeps: ClassVar[bool] = True
    places: ClassVar[None] = None

    def __init__(self, keys: Sequence[bytes], cuts: Sequence[int] | None, gate: Gate) -> None:
        self.keys, self.cuts, self.gate = keys, cuts, gate
        self.parents = [None, *keys[:-1]]
        self.terms = [(0, float("inf"))] * len(keys)
        self.queue = self
        self.begun: list[tuple[list[int], Ended]] = []
        self.ended = 0

    def accept(self) -> None: ...

    def failing(self) -> None: ...

    def read(self, at: Slots, into: Staged, ended: Ended) -> int:
        self.gate.read_begins(len(at))
        self.begun.append((at.tolist(), ended))
        return len(self.begun)

    def end(self, number: int) -> None:
        """That read went well."""
        self.ended = number + 1
        at, ended = self.begun[number]
        self.gate.read_ends(len(at), len(at), 0.1)
        ended(Passage(id=number + 1, ranks=set(), blocks=len(at), patience=1.0, down=False, ended=ended))

    def finish(self, up: Promotion) -> None:
        """Nobody wants it any more, and all reads end."""
        up.clear()
        for number in range(self.ended, len(self.begun)):
            self.end(number)

    def cancel(self, jobs: Collection[int]) -> None: ...

    def judge(self, at: Slots, passage: Passage) -> None: ...

    def drop(self) -> None: ...

    @property
    def parts(self) -> list[list[int]]:
        return [at for at, _ in self.begun]


def promotion(pool: Pool, clock: ManualClock, in_flight: int) -> Promotion:
    return Promotion(
        Host(pool), most=lambda: pool.total, in_flight=in_flight, batch=2, unmeasured=1, emit=lambda event: None,
        clock=clock,
    )  # fmt: skip


def give(up: Promotion, offer: Any, keys: Sequence[bytes]) -> bool:
    return up.give(Seeker("r", Record("r", 0), keys), offer)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def pool() -> Pool:
    return Pool(32, order=eviction_order("lru", 32))


def test_each_read_is_one_part_whatever_else_bounds_it(pool: Pool, clock: ManualClock) -> None:
    """A batch is two blocks, the first one, while nothing is known."""
    keys = keys_of("a", 10)
    offer = Parts(keys, [4, 8, 10], Gate(16, clock, lanes=4))
    up = promotion(pool, clock, 100)
    assert give(up, offer, keys)
    assert offer.parts == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    whole, other = Parts(keys_of("b", 10), None, Gate(16, clock)), promotion(pool, clock, 100)
    assert give(other, whole, whole.keys)
    assert whole.parts[0] == [0], "the control: without cuts it is bounded"
    offer.finish(up)
    whole.finish(other)


def test_what_is_there_already_is_left_out_of_its_part(pool: Pool, clock: ManualClock) -> None:
    keys = keys_of("a", 8)
    raw = pool.allocate(2)
    assert raw is not None
    raw.stage((keys[1], keys[4])).register().drop()
    offer, up = Parts(keys, [4, 8], Gate(16, clock, lanes=4)), promotion(pool, clock, 100)
    assert give(up, offer, keys)
    assert offer.parts == [[0, 2, 3], [5, 6, 7]]
    offer.finish(up)


def test_one_part_is_read_however_little_may_be_on_its_way(pool: Pool, clock: ManualClock) -> None:
    keys = keys_of("a", 12)
    offer = Parts(keys, [4, 8, 12], Gate(16, clock, lanes=4))
    up = promotion(pool, clock, 3)
    assert give(up, offer, keys)
    assert offer.parts == [[0, 1, 2, 3]]
    up.pump()
    assert len(offer.parts) == 1, "no second one beside it"
    offer.end(0)
    up.pump()
    assert offer.parts[1:] == [[4, 5, 6, 7]]
    assert pool.present(keys).tolist() == [True] * 4 + [False] * 8
    offer.finish(up)


def test_parts_wait_for_slots(pool: Pool, clock: ManualClock) -> None:
    keys = keys_of("a", 8)
    taken = pool.allocate(28)
    assert taken is not None
    offer = Parts(keys, [4, 8], Gate(16, clock, lanes=4))
    up = promotion(pool, clock, 100)
    assert give(up, offer, keys)
    assert offer.parts == [[0, 1, 2, 3]]
    taken.drop()
    up.pump()
    assert offer.parts == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert np.array_equal(pool.present(keys), np.zeros(8, np.bool_))
    offer.finish(up)
