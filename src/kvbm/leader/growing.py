"""G2 gets its slots while the engine serves, as their memory is touched."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress

from kvbm.blocks import Pool
from kvbm.core.errors import Broken
from kvbm.core.events import Event, Removed
from kvbm.link.channel import Link
from kvbm.link.messages import Hurry, Touched

log = logging.getLogger(__name__)


class Growing:
    """`usable` says how many slots each rank that stores has now; `pool` has those that all have, and more as they say
    so; `links` lead to them. An observer of the pool: once what there is of it is full, they hurry. Under the leader's
    lock."""

    def __init__(
        self, pool: Pool, usable: Mapping[int, int], links: Iterable[Link], block_bytes: int, begun: float
    ) -> None:
        self._pool, self._usable, self._idle = pool, dict(usable), list(links)
        self._block_bytes, self._begun = block_bytes, begun
        self.problem: str | None = None
        """Why the pool stays smaller than it was to be."""
        self._resize()
        if pool.total < pool.capacity:
            log.info(
                "KVBM: serving with %s of G2; the rest is touched meanwhile",
                self._gb(pool.total),
            )  # fmt: skip
            pool.add_observer(self)

    def on_event(self, event: Event) -> None:
        """Told once: a block was evicted for want of slots that are still to come."""
        if isinstance(event, Removed) and self._pool.total < self._pool.capacity:
            while self._idle:
                with suppress(Broken):  # its reader notices, too
                    self._idle.pop().send(Hurry())

    def take(self, message: Touched) -> None:
        """A rank has more, or will have no more."""
        self._usable[message.rank] = message.slots
        before = self._pool.total
        self._resize()
        if self._pool.total == self._pool.capacity > before:
            log.info(
                "KVBM: all of G2 (%s) is ready after %.0f s",
                self._gb(self._pool.capacity), time.monotonic() - self._begun,
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
