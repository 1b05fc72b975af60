"""What host memory held before it was known what may lie below it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from kvbm.blocks import Pool
from kvbm.core.region import Slots
from kvbm.tiers.host import ENGINE, Landing
from kvbm.tiers.stack import Stack
from kvbm.tiers.sums import Sums, heads

_SLICE: Final = 512
"""Slots that are looked at in one go: about a millisecond."""


class Earlier:
    """Of every slot of host memory, on each rank that stores, what is said of new blocks once there is somebody to say
    it to. Under the leader's lock."""

    def __init__(self, pool: Pool, ranks: int) -> None:
        slots = pool.capacity
        self.sums = Sums(ranks, slots)
        """For other instances."""
        self._pool, self._next = pool, 0
        self._heads, self._places = np.zeros(slots, np.uint64), np.zeros(slots, np.int32)

    def landing(self, slots: Slots, keys: Sequence[bytes], how: Landing) -> None:
        """Blocks were offloaded, and are about to be published."""
        assert how.places is not None, "the engine's blocks have places"
        self._heads[slots], self._places[slots] = heads(keys), how.places
        self.sums.note(slots, keys, how.sums)

    def tell(self, lower: Stack) -> bool:
        """Some of what host memory has now counts as stored now. Whether there is more. Nothing is held: what is held
        and let go is the last to be evicted."""
        part = slice(self._next, self._next + _SLICE)
        where = dict(zip(self._heads[part].tolist(), self._places[part].tolist(), strict=True))
        keys = self._pool.keys(part.start, part.stop)
        places = np.array([where.get(head, -1) for head in heads(keys).tolist()], np.int64)
        order = [at for at in np.argsort(places, kind="stable").tolist() if places[at] >= 0]  # not what came from below
        lower.landed([keys[at] for at in order], Landing(ENGINE, places[order]))
        self._next = part.stop
        return self._next < len(self._heads)
