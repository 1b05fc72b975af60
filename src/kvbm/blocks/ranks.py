"""Eviction by priority first, then by the injected order."""

from __future__ import annotations

import numpy as np

from kvbm.abc.policy import EvictionOrder, Mask
from kvbm.blocks.slots import SlotTable, as_array
from kvbm.core.region import Slots
from kvbm.native import Lists


class Ranks:
    """One eviction order per priority that was ever used; the lowest gives first. No lock of its own.

    A slot's priority (in `table`) may change only between `forget` and `admit`. Slots that are doubted are in these
    orders like all others; of those that are in order more than `most_doubted` of all slots go before anything else,
    the least recent first.
    """

    def __init__(self, order: EvictionOrder, table: SlotTable, most_doubted: float) -> None:
        self._table, self._most_doubted = table, most_doubted
        self._doubted: Mask = np.zeros(0, np.bool_)
        self._doubts: Lists | None = None
        """Those of them that are in order; None: there never was one, which nobody pays for."""
        self._orders: dict[int, EvictionOrder] = {0: order}
        self._only: EvictionOrder | None = order
        """The order of all slots while one priority is in use: what nearly every pool does."""
        kind = type(order)
        self.admits = kind.admit is not EvictionOrder.admit
        """Whether the order wants to hear of that, as the next two."""
        self.uses = kind.use is not EvictionOrder.use
        self._tells = kind.forget is not EvictionOrder.forget
        self.forgets = self._tells

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
        if self._doubts is not None:
            self._doubts.append(self._among_doubted(slots))
        if self._only is not None:
            self._only.add(np.frombuffer(slots, np.int64))
            return
        for order, part in self._split(as_array(slots)):
            order.add(part)

    def discard(self, slots: bytes) -> None:
        """These are no longer inactive."""
        if self._doubts is not None:
            self._doubts.remove(self._among_doubted(slots))
        self._discard(slots)

    def _discard(self, slots: bytes) -> None:
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
        if self._doubts is not None:
            self._doubted[as_array(slots)] = False
        if self._tells and slots:
            for order, part in self._split(as_array(slots)):
                order.forget(part)

    def doubt(self, slots: bytes, idle: bytes) -> None:
        """Whether anybody will ask for these is doubted; `idle` of them are in order."""
        if self._doubts is None:
            self._doubts, self.forgets = Lists(self._table.capacity), True
            self._doubted = np.zeros(self._table.capacity, np.bool_)
        there = as_array(idle)
        self._doubts.append(there[~self._doubted[there]])
        self._doubted[as_array(slots)] = True

    def want(self, slots: bytes, idle: bytes) -> None:
        """Somebody asks for these; `idle` of them are in order."""
        if self._doubts is not None:
            self._doubts.remove(self._among_doubted(idle))
            self._doubted[as_array(slots)] = False

    @property
    def doubts(self) -> bool:
        """Whether any slot ever was doubted."""
        return self._doubts is not None

    def problems(self, registered: Slots, idle: Slots) -> list[str]:
        """What does not fit these slots."""
        if self._doubts is None:
            return []
        found, count = self._doubted.nonzero()[0], len(self._doubts)
        problems = [] if np.isin(found, registered).all() else ["a slot is doubted that holds no block"]
        if count != (expected := int(self._doubted[idle].sum())):
            problems.append(f"{count} doubted blocks can be evicted, {expected} are inactive")
        return problems

    def _among_doubted(self, slots: bytes) -> Slots:
        numbers = as_array(slots)
        return numbers[self._doubted[numbers]]

    def victims(self, n: int) -> bytes:
        """Take out up to `n` slots, the first to go first."""
        if self._doubts is None:
            return self._victims(n)
        most = int(self._most_doubted * (self._table.capacity - self._table.retired))
        first = self._doubts.pop(0, min(n, max(0, len(self._doubts) - most)))
        if first:
            self._discard(first)
        rest = self._victims(n - len(first) // 8)
        self._doubts.remove(self._among_doubted(rest))
        return first + rest

    def _victims(self, n: int) -> bytes:
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
        if self._doubts is not None:
            self._doubts.resize(num_slots)
            self._doubted = np.append(self._doubted, np.zeros(num_slots - len(self._doubted), np.bool_))

    def _split(self, slots: Slots) -> list[tuple[EvictionOrder, Slots]]:
        if self._only is not None:
            return [(self._only, slots)]
        ranks = self._table.priority[slots]
        used = set(ranks.tolist())
        if len(used) == 1:
            return [(self._orders[used.pop()], slots)]
        return [(self._orders[rank], slots[ranks == rank]) for rank in used]
