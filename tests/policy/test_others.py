"""Admissions and placements."""

from __future__ import annotations

import numpy as np

from kvbm.abc.policy import Drop, Keep, Move
from kvbm.policy import All, Exclusive, Frequency, Presence, WriteThrough

TIERS = ("g2", "g3", "g4")


def tags(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def test_all_and_presence() -> None:
    present = np.array([True, False])
    assert All().admit(tags(1, 2), present).tolist() == [True, True]
    assert Presence().admit(tags(1, 2), present).tolist() == [False, True]


def test_frequency_wants_a_second_use() -> None:
    frequency, absent = Frequency(100), np.zeros(3, np.bool_)
    frequency.use(tags(1, 2, 3))
    assert frequency.admit(tags(1, 2, 3), absent).tolist() == [False, False, False]
    frequency.use(tags(2, 3))
    assert frequency.admit(tags(1, 2, 3), np.array([False, False, True])).tolist() == [False, True, False]


def test_frequency_counts_up_to_what_is_asked() -> None:
    frequency, absent = Frequency(100, least=5), np.zeros(1, np.bool_)
    seen = []
    for _ in range(6):
        frequency.use(tags(8))
        seen += frequency.admit(tags(8), absent).tolist()
    assert seen == [False, False, False, False, True, True]


def test_frequency_forgets() -> None:
    frequency, random = Frequency(100), np.random.default_rng(3)
    frequency.use(tags(8, 8))
    frequency.use(random.integers(1 << 40, 1 << 60, 1600))
    assert not frequency.admit(tags(8), np.zeros(1, np.bool_))[0]


def test_write_through() -> None:
    policy = WriteThrough()
    assert tuple(policy.store(TIERS)) == TIERS
    assert policy.promote("g3", TIERS) == Keep()
    assert [policy.evict(tier, TIERS) for tier in TIERS] == [Drop()] * 3


def test_exclusive() -> None:
    policy = Exclusive()
    assert tuple(policy.store(TIERS)) == ("g2",)
    assert policy.promote("g3", TIERS) == Drop()
    assert [policy.evict(tier, TIERS) for tier in TIERS] == [Move("g3"), Move("g4"), Drop()]
