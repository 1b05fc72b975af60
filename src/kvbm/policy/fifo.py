"""First in, first out: what was registered longest ago goes first, however often it was used."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from kvbm.abc.policy import EvictionOrder, Tags
from kvbm.core.region import Slots
from kvbm.native import Lists


class FIFO(EvictionOrder):
    """One list by birth; of a run that was admitted at once the leaf is first. A held block keeps its place.

    One that is held when its turn comes is first once it is let go. The cheapest order for what is read once.
    """

    queues: ClassVar[int] = 1

    def __init__(self, num_slots: int) -> None:
        self._lists = Lists(num_slots, self.queues)
        self._idle = 0

    def admit(self, slots: Slots, tags: Tags, parents: Slots) -> None:
        self._lists.append(slots)
        self._lists.hold(slots)

    def add(self, slots: Slots) -> None:
        self._lists.release(slots)
        self._idle += len(slots)

    def discard(self, slots: Slots) -> None:
        self._lists.hold(slots)
        self._idle -= len(slots)

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
