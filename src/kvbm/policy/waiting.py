"""What orders have in common whose slots may wait outside their list until nothing blocks them."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from kvbm.abc.policy import EvictionOrder
from kvbm.core.region import Slots
from kvbm.native import Lists


class Waiting(EvictionOrder):
    """Gives from the first of `queues` lists. Counts what is idle, since what waits is in no list."""

    queues: ClassVar[int] = 1

    def __init__(self, num_slots: int) -> None:
        self._lists = Lists(num_slots, self.queues)
        self._idle = 0

    def victims(self, n: int) -> Slots:
        chosen = np.frombuffer(self._lists.pop(0, min(n, self._idle)), np.int64)
        self._idle -= len(chosen)
        return chosen

    def forget(self, slots: Slots) -> None:
        self._lists.forget(slots)

    def __len__(self) -> int:
        return self._idle

    def fresh(self) -> EvictionOrder:
        return type(self)(self._lists.num_slots)

    def resize(self, num_slots: int) -> None:
        self._lists.resize(num_slots)
