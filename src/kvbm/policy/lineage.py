"""Leaves only: a block goes after everything that continues it."""

from __future__ import annotations

import numpy as np

from kvbm.abc.policy import EvictionOrder, Tags
from kvbm.core.region import Slots
from kvbm.native import Lists


class Lineage(EvictionOrder):
    """The least recently used block that no registered block continues goes first.

    A block with a registered child, held or not, is never given: what would follow a hole in a prompt could not be
    matched. So it may give less than it has. Within one call a block counts as gone once it was chosen, so that a
    whole prompt goes from its leaf to its root. A block whose turn came while it had children goes next after the
    last of them. (The idea: leaf-first eviction of a radix tree, Zheng et al., "SGLang", NeurIPS 2024.)
    """

    def __init__(self, num_slots: int) -> None:
        self._lists = Lists(num_slots)
        self._idle = 0  # those that wait for their children are in no list

    def admit(self, slots: Slots, tags: Tags, parents: Slots) -> None:
        self._lists.adopt(slots, parents)

    def add(self, slots: Slots) -> None:
        self._lists.append(slots)
        self._idle += len(slots)

    def discard(self, slots: Slots) -> None:
        self._lists.remove(slots)
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
