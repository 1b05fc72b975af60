"""Adaptive replacement: the share of what was used once follows which evictions turn out to be mistakes."""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np

from kvbm.abc.policy import Tags
from kvbm.core.region import Slots
from kvbm.native import Ghosts
from kvbm.policy.levels import Levels

ONCE, AGAIN = 0, 1

_ADMIT: Final = bytes((ONCE, AGAIN, AGAIN)) + bytes(253)
"""The list of a new block, by what `Ghosts.take` says of it."""


class ARC(Levels):
    """T1 (used once) and T2 (used again), each least recently used first, and ghosts of what left them, B1 and B2.

    A new block that was in B1 says T1 is too small, one that was in B2 says T2 is: the target of T1 moves. (Megiddo
    and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003.) Unlike there

    - only what is idle counts as in T1 or T2, since what is held cannot go;
    - B1 and B2 share a lossy memory of the last `num_slots` evictions, and their sizes are estimates: what it forgets
      is taken to be of each in proportion. So |T1| + |B1| is not kept at the capacity, but all four are at twice that.
    """

    levels: ClassVar[int] = 2

    def __init__(self, num_slots: int) -> None:
        super().__init__(num_slots)
        self._ghosts = Ghosts(num_slots)
        self._remembered = [0.0, 0.0]  # of B1 and of B2
        self._target = 0.0  # how many slots T1 should have
        self._tags = np.zeros(num_slots, np.int64)

    def admit(self, slots: Slots, tags: Tags, parents: Slots) -> None:
        self._tags[slots] = tags
        found = self._ghosts.take(tags)
        if found.count(0) < len(found):
            self._lists.place(slots, found.translate(_ADMIT))
            self._adapt(found.count(1 + ONCE), found.count(1 + AGAIN))

    def use(self, slots: Slots) -> None:
        self._lists.climb(slots)

    def victims(self, n: int) -> Slots:
        surplus = max(0, self._lists.size(ONCE) - int(self._target))
        chosen = self._lists.pop(ONCE, min(n, surplus))
        for level in (AGAIN, ONCE):
            if missing := n - len(chosen) // 8:
                chosen += self._lists.pop(level, missing)
        return np.frombuffer(chosen, np.int64)

    def forget(self, slots: Slots) -> None:
        lists = self._lists.forget(slots)
        once, again = self._remembered[ONCE] + lists.count(ONCE), self._remembered[AGAIN] + lists.count(AGAIN)
        self._ghosts.add(self._tags[slots], lists)
        shrink = min(1.0, self._lists.num_slots / max(once + again, 1.0))
        self._remembered = [once * shrink, again * shrink]

    def resize(self, num_slots: int) -> None:
        super().resize(num_slots)  # rare: what is remembered of blocks that are gone may be lost
        self._tags = np.resize(self._tags, num_slots)
        self._ghosts = Ghosts(num_slots)
        self._remembered = [0.0, 0.0]

    def _adapt(self, once: int, again: int) -> None:
        """So many new blocks were ghosts of T1, so many of T2."""
        in_once, in_again = (max(size, 1.0) for size in self._remembered)
        step = once * max(1.0, in_again / in_once) - again * max(1.0, in_once / in_again)
        self._target = min(max(self._target + step, 0.0), float(self._lists.num_slots))
        self._remembered = [max(self._remembered[ONCE] - once, 0.0), max(self._remembered[AGAIN] - again, 0.0)]
