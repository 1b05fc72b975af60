"""What the directory is told of our blocks."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kvbm.blocks import Pool
from kvbm.policy.lru import LRU
from kvbm.tiers.peers.directory import entry
from kvbm.tiers.peers.published import Published
from tests.leader.roles import keys_of


class Tiers:
    """Host memory and a disk, and what is told of them."""

    def __init__(self, slots: int = 32) -> None:
        self.g2, self.g3 = Pool(slots, order=LRU(slots)), Pool(slots, order=LRU(slots), tier="g3")
        self.published = Published(lambda key: any(pool.peek([key]) for pool in (self.g2, self.g3)))
        self.g2.add_observer(self.published)
        self.g3.add_observer(self.published)

    def store(self, keys: list[bytes], at: int = 0) -> None:
        put(self.g2, keys)
        self.published.stored(keys, np.arange(at, at + len(keys)))

    def told(self) -> tuple[set[bytes], set[bytes], bool]:
        assert self.published.pending
        taken = self.published.take()
        assert self.published.pending == any(taken), "the directory does not know it yet"
        self.published.told()
        return taken


def put(pool: Pool, keys: list[bytes]) -> None:
    slots = pool.allocate(len(keys))
    assert slots is not None
    slots.stage(keys).register().drop()


def names(keys: list[bytes]) -> set[bytes]:
    return {entry(key) for key in keys}


@pytest.fixture
def tiers() -> Tiers:
    return Tiers()


KEYS = keys_of("p", 20)
NONE: set[bytes] = set()


def test_what_is_stored_is_told_once(tiers: Tiers) -> None:
    tiers.store(KEYS[:6])
    assert tiers.told() == (names(KEYS[:6]), NONE, False)
    assert tiers.published.written == len(tiers.published) == 6
    assert not tiers.published.pending
    tiers.published.stored(KEYS[:6], np.arange(6))
    assert not tiers.published.pending


def test_not_every_block_has_an_entry(tiers: Tiers) -> None:
    tiers.store(KEYS[:5], at=16)
    assert tiers.told()[0] == names([KEYS[1], KEYS[3]])
    tiers.published.stored([], np.zeros(0, np.int64))
    tiers.g2.discard(KEYS[:1])
    assert not tiers.published.pending  # it never had one


def test_what_leaves_host_memory_loses_its_entry(tiers: Tiers) -> None:
    tiers.store(KEYS[:6])
    tiers.told()
    tiers.g2.discard(KEYS[4:6])
    assert tiers.told() == (NONE, names(KEYS[4:6]), False)
    assert tiers.published.written == 4


def test_what_is_on_disk_keeps_its_entry_until_it_left_that_too(tiers: Tiers) -> None:
    tiers.store(KEYS[:3])
    tiers.told()
    put(tiers.g3, KEYS[:2])
    tiers.g2.discard(KEYS[:3])
    assert tiers.told() == (NONE, names(KEYS[2:3]), False)
    tiers.g3.discard(KEYS[:1])
    assert tiers.told() == (NONE, names(KEYS[:1]), False)


def test_what_comes_and_goes_between_two_looks_is_not_told(tiers: Tiers) -> None:
    tiers.store(KEYS[:2])
    tiers.g2.discard(KEYS[:2])
    assert tiers.told() == (NONE, NONE, False)
    assert len(tiers.published) == 0


def test_what_goes_and_comes_back_keeps_its_entry(tiers: Tiers) -> None:
    tiers.store(KEYS[:2])
    tiers.told()
    tiers.g2.discard(KEYS[:2])
    tiers.store(KEYS[:2])
    assert tiers.told() == (NONE, NONE, False)
    assert len(tiers.published) == 2


def test_what_comes_back_after_its_entry_went_has_one_again(tiers: Tiers) -> None:
    tiers.store(KEYS[:2])
    tiers.told()
    tiers.g2.discard(KEYS[:2])
    tiers.told()
    tiers.store(KEYS[:2])
    assert tiers.told() == (names(KEYS[:2]), NONE, False)


def test_after_a_loss_everything_that_is_there_is_told_again(tiers: Tiers) -> None:
    tiers.store(KEYS[:6])
    tiers.told()
    tiers.g2.discard(KEYS[:2])
    tiers.published.again()
    added, _, afresh = tiers.told()
    assert (added, afresh) == (names(KEYS[2:6]), True)
    assert not tiers.published.pending


@pytest.mark.parametrize("disk", [True, False])
def test_a_tier_that_is_cleared_takes_its_entries_with_it(tiers: Tiers, disk: bool) -> None:
    tiers.store(KEYS[:4])
    tiers.told()
    put(tiers.g3, KEYS[:2])
    if disk:
        tiers.g2.discard(KEYS[:2])
        tiers.told()
        tiers.g3.clear()
        assert tiers.told() == (NONE, names(KEYS[:2]), False)
    else:
        tiers.g2.clear()
        assert tiers.told() == (NONE, names(KEYS[2:4]), False)


def test_threads_end_with_what_is_there() -> None:
    tiers, told = Tiers(), set[bytes]()
    stop = threading.Event()

    def tell() -> None:
        while True:
            last = stop.is_set()
            added, removed, _ = tiers.published.take()
            told.difference_update(removed)
            told.update(added)
            if last:
                return

    teller = threading.Thread(target=tell)
    teller.start()
    for turn in range(300):
        keys = KEYS[turn % 7 : turn % 7 + 6]
        tiers.g2.discard(keys)
        absent = [keys[at] for at in tiers.g2.absent(keys)]
        put(tiers.g2, absent)
        tiers.published.stored(keys, np.arange(len(keys)))
    stop.set()
    teller.join()
    assert told >= names([key for key in KEYS if tiers.g2.peek([key])])


def test_what_is_stored_again_while_it_is_looked_for_stays(tiers: Tiers) -> None:
    tiers.store(KEYS[:3])
    tiers.told()
    tiers.g2.discard(KEYS[:3])

    def stored_meanwhile(key: bytes) -> bool:
        if key == KEYS[1]:
            tiers.published.stored([key], np.array([1]))
        return False

    tiers.published.holds = stored_meanwhile
    added, removed, _ = tiers.told()
    assert (added, removed) == (names(KEYS[1:2]), names([KEYS[0], KEYS[2]]))
    assert len(tiers.published) == 1
