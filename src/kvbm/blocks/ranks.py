"""Eviction by priority first, then by the injected order."""

from __future__ import annotations

import numpy as np

from kvbm.abc.policy import EvictionOrder
from kvbm.blocks.slots import SlotTable, as_array
from kvbm.core.region import Slots


class Ranks:
    """One eviction order per priority that was ever used; the lowest gives first. No lock of its own.

    A slot's priority (in `table`) may change only between `forget` and `admit`.
    """

    def __init__(self, order: EvictionOrder, table: SlotTable) -> None:
        self._table = table
        self._orders: dict[int, EvictionOrder] = {0: order}
        self._only: EvictionOrder | None = order
        """The order of all slots while one priority is in use: what nearly every pool does."""
        kind = type(order)
        self.admits = kind.admit is not EvictionOrder.admit
        """Whether the order wants to hear of that, as the next two."""
        self.uses = kind.use is not EvictionOrder.use
        self.forgets = kind.forget is not EvictionOrder.forget

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

    def add(self, slots: bytes) -> None:
        """These became inactive; in prompt order."""
        if self._only is not None:
            self._only.add(np.frombuffer(slots, np.int64))
            return
        for order, part in self._split(as_array(slots)):
            order.add(part)

    def discard(self, slots: bytes) -> None:
        """These are no longer inactive."""
        if self._only is not None:
            self._only.discard(np.frombuffer(slots, np.int64))
            return
        for order, part in self._split(as_array(slots)):
            order.discard(part)

    def admit(self, slots: bytes) -> None:
        """These were registered, or have a new priority, and are held."""
        if self.admits and slots:
            tags, parents = as_array(self._table.tags(slots)), as_array(self._table.parent_slots(slots))
            numbers = as_array(slots)
            if self._only is not None:
                self._only.admit(numbers, tags, parents)
            else:
                ranks = self._table.priority[numbers]
                for rank in set(ranks.tolist()):
                    mine = ranks == rank
                    self._orders[rank].admit(numbers[mine], tags[mine], parents[mine])

    def use(self, slots: bytes) -> None:
        """These were found by somebody."""
        if self.uses and slots:
            for order, part in self._split(as_array(slots)):
                order.use(part)

    def forget(self, slots: bytes) -> None:
        """These are gone, and in no order."""
        if self.forgets and slots:
            for order, part in self._split(as_array(slots)):
                order.forget(part)

    def victims(self, n: int) -> bytes:
        """Take out up to `n` slots, the first to go first."""
        if self._only is not None:
            return self._only.victims(n).tobytes()
        parts = []
        for order in self._orders.values():
            if n and len(order):
                parts.append(order.victims(n))
                n -= len(parts[-1])
        return b"".join(part.tobytes() for part in parts)

    def resize(self, num_slots: int) -> None:
        """From now on slots are below `num_slots`."""
        for order in self._orders.values():
            order.resize(num_slots)

    def _split(self, slots: Slots) -> list[tuple[EvictionOrder, Slots]]:
        if self._only is not None:
            return [(self._only, slots)]
        ranks = self._table.priority[slots]
        used = set(ranks.tolist())
        if len(used) == 1:
            return [(self._orders[used.pop()], slots)]
        return [(self._orders[rank], slots[ranks == rank]) for rank in used]
