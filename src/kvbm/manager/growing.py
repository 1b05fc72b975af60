"""G2 gets its slots while the engine serves, as their memory is touched."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from kvbm.blocks import Pool
from kvbm.manager.wire import Touched

log = logging.getLogger(__name__)


class Growing:
    """`usable` says how many slots each rank that stores has now; `pool` has those that all have, and more as they say
    so. Under the leader's lock."""

    def __init__(self, pool: Pool, usable: Mapping[int, int], block_bytes: int, begun: float) -> None:
        self._pool, self._usable = pool, dict(usable)
        self._block_bytes, self._begun = block_bytes, begun
        self.problem: str | None = None
        """Why the pool stays smaller than it was to be."""
        self._resize()
        if pool.total < pool.capacity:
            log.info(
                "KVBM: serving with %s of G2; the rest is touched meanwhile, when nobody else wants the processor",
                self._gb(pool.total),
            )  # fmt: skip

    def take(self, message: Touched) -> None:
        """A rank has more, or will have no more."""
        self._usable[message.rank] = message.slots
        before = self._pool.total
        self._resize()
        if self._pool.total == self._pool.capacity > before:
            log.info(
                "KVBM: G2: %s ready after %.0f s", self._gb(self._pool.capacity), time.monotonic() - self._begun
            )  # fmt: skip
        if message.problem is not None and self.problem is None:
            self.problem = message.problem
            log.warning("KVBM: %s", self.shortage())

    def shortage(self) -> str | None:
        """What is missing for good, if so."""
        if self.problem is None:
            return None
        capacity = self._pool.capacity
        return (
            f"G2 stays at {self._gb(min(self._usable.values()))} of {self._gb(capacity)} until the engine is started "
            f"anew: {self.problem}"
        )

    def _gb(self, slots: int) -> str:
        return f"{slots * self._block_bytes / 1e9:.2f} GB"

    def _resize(self) -> None:
        if (slots := min(self._usable.values())) != self._pool.total:  # less at first only
            self._pool.resize(slots)
