"""Least recently used: what was let go longest ago goes first."""

from __future__ import annotations

import numpy as np

from kvbm.abc.policy import EvictionOrder
from kvbm.core.region import Slots

_SHORTEST = 1024


class LRU(EvictionOrder):
    """A log of slots, oldest first, and where in it each slot stands; what left the middle is a hole.

        log   [ . . . 7 6 _ 4 _ _ 12 11 10 | free ]      _ is a hole (-1)
                      head                tail

    A run is written leaf first. When the log is full the holes are squeezed out: every call is amortised O(run), the
    squeeze itself O(live slots) once per at least that many additions.
    """

    def __init__(self, num_slots: int) -> None:
        self._place = np.empty(num_slots, np.int64)
        self._log = np.empty(_SHORTEST, np.int64)
        self._numbers = np.arange(_SHORTEST)  # a slice of it costs a fifth of a new arange
        self._head = self._tail = self._live = 0

    def add(self, slots: Slots) -> None:
        count = len(slots)
        if self._tail + count > len(self._log):
            self._squeeze(count)
        here = slice(self._tail, self._tail + count)
        self._log[here] = leaf_first = slots[::-1].copy()
        self._place[leaf_first] = self._numbers[here]
        self._tail += count
        self._live += count

    def discard(self, slots: Slots) -> None:
        self._log[self._place[slots]] = -1
        self._live -= len(slots)

    def victims(self, n: int) -> Slots:
        missing = min(n, self._live)
        self._live -= missing
        first = self._log[self._head : self._head + missing]
        if -1 not in first.tolist():  # nearly every call
            self._head += missing
            return first.copy()
        chosen: list[Slots] = []
        width = missing + 32
        while missing:
            window = self._log[self._head : min(self._head + width, self._tail)]
            alive = (window >= 0).nonzero()[0][:missing]
            chosen.append(window[alive])
            missing -= len(alive)
            self._head += len(window) if missing else int(alive[-1]) + 1
            width *= 2  # a long stretch of holes is crossed in few steps, and only once
        return np.concatenate(chosen)

    def __len__(self) -> int:
        return self._live

    def fresh(self) -> LRU:
        return LRU(len(self._place))

    def resize(self, num_slots: int) -> None:
        self._place = np.resize(self._place, num_slots)

    def _squeeze(self, room: int) -> None:
        """Move what is live to the front of a log at least half of which is then free, with `room` for a run."""
        window = self._log[self._head : self._tail]
        live = window[window >= 0]
        needed = 2 * (len(live) + room)
        if not needed <= len(self._log) <= 4 * max(needed, _SHORTEST):
            self._log = np.empty(max(needed, _SHORTEST), np.int64)
            self._numbers = np.arange(len(self._log))
        self._log[: len(live)] = live
        self._place[live] = self._numbers[: len(live)]
        self._head, self._tail = 0, len(live)
