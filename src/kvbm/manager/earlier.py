"""What host memory held before it was known what may lie below it."""

from __future__ import annotations

from typing import Final

import numpy as np

from kvbm.blocks import Pool, Staged
from kvbm.manager.jobs import Job
from kvbm.manager.lower import Lower
from kvbm.manager.peers.sums import Sums

_SLICE: Final = 512
"""Slots that are looked at in one go: about a millisecond."""


class Earlier:
    """Of every slot of host memory, on each rank that stores, what is said of new blocks once there is somebody to say
    it to. Under the leader's lock."""

    def __init__(self, pool: Pool, ranks: int) -> None:
        slots = pool.statistics().total
        self.sums = Sums(ranks, slots)
        """For other instances."""
        self._pool, self._next = pool, 0
        self._places = np.zeros(slots, np.int32)

    def storing(self, job: Job) -> None:
        """Blocks were offloaded, and are about to be published."""
        if isinstance(job.lease, Staged):
            self._places[job.lease.slots] = job.places
            self.sums.note(job.lease.slots, job.lease.keys, job.sums)

    def tell(self, lower: Lower) -> bool:
        """Some of what host memory has now counts as stored now. Whether there is more.

        Nothing is held, for what is held and let go is the last to be evicted. A block that has come from below since
        may be told of as if it were another one of its prompt, which costs those who look for it a question."""
        keys = self._pool.keys(self._next, self._next + _SLICE)
        places = {key: self._places[block.slot] for key in keys if (block := self._pool.look(key)) is not None}
        order = sorted(places, key=places.__getitem__)  # a prompt's root before its leaf
        lower.stored(order, np.array([places[key] for key in order], np.int64))
        self._next += _SLICE
        return self._next < len(self._places)
