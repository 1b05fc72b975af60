"""Several LRU lists by how often a block was asked for; the coldest goes first."""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np

from kvbm.abc.policy import Tags
from kvbm.core.region import Slots
from kvbm.native import Sketch
from kvbm.policy.levels import Levels

COUNTS: Final = (3, 8, 15)
"""A block is in the second, third or fourth list from this many requests on."""

_LEVEL: Final = bytes(sum(count >= least for least in COUNTS) for count in range(256))


class MultiLRU(Levels):
    """Four lists, the thresholds and the counting as in NVIDIA's kvbm-logical: TinyLFU's sketch counts requests.

    The sketch remembers evicted blocks, so that one that comes back soon is warm at once, and forgets by halving. A
    block's list is chosen when it becomes inactive. (The sketch: `kvbm.native.Sketch`.)
    """

    levels: ClassVar[int] = len(COUNTS) + 1

    def __init__(self, num_slots: int) -> None:
        super().__init__(num_slots)
        self._requests = Sketch(num_slots)
        self._tags = np.zeros(num_slots, np.int64)

    def admit(self, slots: Slots, tags: Tags, parents: Slots) -> None:
        self._tags[slots] = tags
        self._requests.add(tags)

    def use(self, slots: Slots) -> None:
        self._requests.add(self._tags[slots])

    def add(self, slots: Slots) -> None:
        self._lists.place(slots, self._requests.estimate(self._tags[slots]).translate(_LEVEL))
        super().add(slots)

    def resize(self, num_slots: int) -> None:
        super().resize(num_slots)  # rare: what is remembered of blocks that are gone may be lost
        self._tags = np.resize(self._tags, num_slots)
        self._requests = Sketch(num_slots)
