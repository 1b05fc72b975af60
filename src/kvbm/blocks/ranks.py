"""Eviction by priority first, then by the injected order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvbm.abc.policy import EvictionOrder
from kvbm.core.region import Slots


class Ranks:
    """One eviction order per priority that was ever used; the lowest gives first. No lock of its own.

    `priorities` (by slot) is only read; a slot's entry may change only while the slot is in no order.
    """

    def __init__(self, order: EvictionOrder, priorities: npt.NDArray[np.uint8]) -> None:
        self._priorities = priorities
        self._orders: dict[int, EvictionOrder] = {0: order}
        self._only: EvictionOrder | None = order
        """The order of all slots while one priority is in use: what nearly every pool does."""

    def __len__(self) -> int:
        return len(self._only) if self._only is not None else sum(map(len, self._orders.values()))

    def sizes(self) -> dict[int, int]:
        """How many slots each priority has."""
        return {priority: len(order) for priority, order in self._orders.items()}

    def open(self, priority: int) -> None:
        """Have an order for `priority`."""
        if priority not in self._orders:
            self._orders[priority] = self._orders[0].fresh()
            self._orders = dict(sorted(self._orders.items()))
            self._only = None

    def add(self, slots: Slots) -> None:
        """These became inactive; in prompt order."""
        if self._only is not None:
            self._only.add(slots)
        else:
            for order, part in self._split(slots):
                order.add(part)

    def discard(self, slots: Slots) -> None:
        """These are no longer inactive."""
        if self._only is not None:
            self._only.discard(slots)
        else:
            for order, part in self._split(slots):
                order.discard(part)

    def victims(self, n: int) -> Slots:
        """Take out up to `n` slots, the first to go first."""
        if self._only is not None:
            return self._only.victims(n)
        parts: list[Slots] = []
        for order in self._orders.values():
            if n and len(order):
                parts.append(order.victims(n))
                n -= len(parts[-1])
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _split(self, slots: Slots) -> list[tuple[EvictionOrder, Slots]]:
        ranks = self._priorities[slots]
        used = set(ranks.tolist())
        if len(used) == 1:
            return [(self._orders[used.pop()], slots)]
        return [(self._orders[rank], slots[ranks == rank]) for rank in used]
