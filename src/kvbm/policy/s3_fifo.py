"""Three FIFO queues: a small one that most blocks never get past, a main one, and ghosts."""

from __future__ import annotations

from typing import Final

import numpy as np

from kvbm.abc.policy import Tags
from kvbm.core.region import Slots
from kvbm.native import Ghosts
from kvbm.policy.fifo import FIFO

SMALL, MAIN = 0, 1
MOST_USES: Final = 3
SHARE: Final = 10
"""The small queue has a tenth of all."""

_ALWAYS: Final = 255
_ONLY_SMALL: Final = bytes((SMALL,)) + bytes([255]) * 255


class S3FIFO(FIFO):
    """A block that was used twice while in the small queue goes on to the main queue; else it leaves, as a ghost.

    A new block that is a ghost starts in the main queue. There a block with uses left has another round for each of
    them. (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023.) Unlike there

    - a held block keeps its place; one that is held when its turn comes has its turn as soon as it is let go;
    - the ghosts are a lossy memory of the last `num_slots` blocks that left the small queue;
    - a call of `victims` gives `4096 + n` second chances per queue, then takes what comes first: a bound on its time.
    """

    queues = 2

    def __init__(self, num_slots: int) -> None:
        super().__init__(num_slots)
        self._ghosts = Ghosts(num_slots)
        self._tags = np.zeros(num_slots, np.int64)

    def admit(self, slots: Slots, tags: Tags, parents: Slots) -> None:
        self._tags[slots] = tags
        self._lists.place(slots, self._ghosts.take(tags))  # 1 where it is a ghost: MAIN
        super().admit(slots, tags, parents)

    def use(self, slots: Slots) -> None:
        self._lists.use(slots, MOST_USES)

    def victims(self, n: int) -> Slots:
        lists, missing, chosen = self._lists, min(n, self._idle), b""
        small, main = lists.size(SMALL), lists.size(MAIN)
        surplus = max(0, small - (small + main) // SHARE)
        for queue, most, above in (SMALL, surplus, 1), (MAIN, n, 0), (SMALL, n, 1), (MAIN, n, _ALWAYS):
            if missing == 0:
                break
            part = lists.pop(queue, min(most, missing), above, MAIN)
            missing -= len(part) // 8
            chosen += part
        self._idle -= len(chosen) // 8
        return np.frombuffer(chosen, np.int64)

    def forget(self, slots: Slots) -> None:
        self._ghosts.add(self._tags[slots], self._lists.forget(slots).translate(_ONLY_SMALL))

    def resize(self, num_slots: int) -> None:
        super().resize(num_slots)  # rare: what is remembered of blocks that are gone may be lost
        self._tags = np.resize(self._tags, num_slots)
        self._ghosts = Ghosts(num_slots)
