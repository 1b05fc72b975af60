"""What orders have in common that keep what is idle in lists, the coldest list first."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from kvbm.abc.policy import EvictionOrder
from kvbm.core.region import Slots
from kvbm.native import Lists


class Levels(EvictionOrder):
    """`levels` lists, each least recently used first; all of a colder one goes before any of a warmer one.

    Which list a slot belongs to is a subclass's to decide, before it is added. Held slots are in no list.
    """

    levels: ClassVar[int]

    def __init__(self, num_slots: int) -> None:
        self._lists = Lists(num_slots, self.levels)

    def add(self, slots: Slots) -> None:
        self._lists.append(slots)

    def discard(self, slots: Slots) -> None:
        self._lists.remove(slots)

    def victims(self, n: int) -> Slots:
        chosen = self._lists.pop(0, n)
        for level in range(1, self.levels):
            if (missing := n - len(chosen) // 8) == 0:
                break
            chosen += self._lists.pop(level, missing)
        return np.frombuffer(chosen, np.int64)

    def __len__(self) -> int:
        return len(self._lists)

    def fresh(self) -> EvictionOrder:
        return type(self)(self._lists.num_slots)

    def resize(self, num_slots: int) -> None:
        self._lists.resize(num_slots)
