"""What comes from shared storage to host memory before anybody asks for it. Under the leader's lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import numpy as np

from kvbm.blocks import Staged
from kvbm.core.events import Copied
from kvbm.tiers.host import Host, Landing
from kvbm.tiers.moves import Passage
from kvbm.tiers.objects.orders import TIER, HotRun
from kvbm.tiers.objects.traffic import Traffic

_AT_ONCE: Final = 2


class Warmth:
    """Reads at most `most` blocks. It evicts nothing, and waits while anything is read for a request."""

    def __init__(self, host: Host, traffic: Traffic, most: int, emit: Callable[[Copied], None]) -> None:
        self._host, self._traffic, self._emit = host, traffic, emit
        self._left = most
        self._waiting: deque[HotRun] = deque()
        self._reading = self.warmed = 0
        """Reads that have not ended; blocks that have come."""

    def hear(self, runs: Sequence[HotRun]) -> None:
        """These are hot, the hottest first, each behind those before it in its prompt."""
        if self._left:
            self._waiting.extend(runs)

    def end(self) -> None:
        """Read nothing more."""
        self._left = 0
        self._waiting.clear()

    def pump(self) -> None:
        """Start what may start now."""
        pool = self._host.pool
        while self._waiting and self._reading < _AT_ONCE and self._traffic.reading == self._reading:
            run = self._waiting[0]
            blocks = len(run.keys)
            free = pool.statistics().free
            if blocks > self._left or (free < blocks and pool.total == pool.capacity):
                self.end()  # host memory is full, and what is there was asked for
                return
            if free < blocks or (raw := pool.allocate(blocks)) is None:
                return
            self._waiting.popleft()
            if pool.present(run.keys).any():  # then of all, or they are read once they are asked for
                raw.drop()
                continue
            self._left -= blocks
            self._reading += 1
            staged = raw.stage(run.keys, parent=run.parent)
            self._traffic.get(run.keys[-1], np.arange(blocks), staged, partial(self._read, staged, run.place))

    def _read(self, staged: Staged, place: int, move: Passage) -> None:
        self._reading -= 1
        how = Landing(TIER, np.arange(place, place + len(staged)), move.sums, move.priority)
        there = self._host.land(staged, move.done, how)
        self.warmed += len(there)
        self._emit(Copied(TIER, "g2", len(there), int((~move.done).sum()), move.nbytes, move.seconds))
        there.drop()
