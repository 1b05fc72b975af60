"""The state of every slot; the only place that writes it."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from kvbm.core.region import Slots
from kvbm.native import Table

NEVER: Final = float("inf")

# What a slot is: one number. A registered slot with h holds is REGISTERED + h, an orphaned one (not or no longer
# published while held: free when the last holder lets go) ORPHANED + h.
RETIRED: Final = -4
FREE: Final = -3
WRITABLE: Final = -2
STAGED: Final = -1
REGISTERED: Final = 0
ORPHANED: Final = 1 << 30


def as_array(slots: bytes) -> Slots:
    """A run of slots as numpy sees it; read-only, no copy."""
    return np.frombuffer(slots, np.int64)


class SlotTable(Table):
    """States and keys (in C), and what few blocks have: a priority, an end. No lock of its own.

    A priority and an expiry mean something only while the slot is registered. The second is reset when it no longer
    is, because `expired` looks at all.
    """

    def __init__(self, num_slots: int) -> None:
        super().__init__(num_slots)
        self.priority = np.zeros(num_slots, np.uint8)
        self.expiry = np.full(num_slots, NEVER)
        self.mortal = False
        """Whether any block ever had an end."""

    def set_terms(
        self, slots: bytes, priority: int | npt.NDArray[np.uint8], expiry: float | npt.NDArray[np.float64]
    ) -> None:
        """How blocks that were just registered are to be kept."""
        self.priority[as_array(slots)] = priority
        if self.mortal or np.min(expiry, initial=NEVER) < NEVER:
            self.mortal = True
            self.expiry[as_array(slots)] = expiry

    def outranked(self, slots: bytes, priority: int) -> bytes:
        """Those of lower priority than this."""
        if not priority:
            return b""
        numbers = as_array(slots)
        return numbers[self.priority[numbers] < priority].tobytes()

    def promote(self, slots: bytes, priority: int) -> None:
        """Registered blocks get this priority."""
        self.priority[as_array(slots)] = priority

    def prolong(self, slots: bytes, expiry: float) -> None:
        """The later expiry stays."""
        if self.mortal:
            numbers = as_array(slots)
            self.expiry[numbers] = np.maximum(self.expiry[numbers], expiry)

    def immortal(self, slots: bytes) -> None:
        """These are no longer registered."""
        if self.mortal:
            self.expiry[as_array(slots)] = NEVER

    def expired(self, now: float, among: Slots | None = None) -> bytes:
        """Registered slots whose time is over by `now`; without `among` it looks at all."""
        if among is None:
            return np.flatnonzero(self.expiry <= now).tobytes()
        return among[self.expiry[among] <= now].tobytes()

    def grow(self, capacity: int) -> None:
        """More slots, free."""
        more = capacity - self.capacity
        priority = np.concatenate((self.priority, np.zeros(more, np.uint8)))
        expiry = np.concatenate((self.expiry, np.full(more, NEVER)))
        super().grow(capacity)  # last: where memory is short nothing has changed
        self.priority, self.expiry = priority, expiry

    def problems_among(self, first: int, last: int) -> list[str]:
        """What is wrong with the slots from `first` to `last - 1`, or with the counts; empty when nothing is. Quick: it
        looks at no other slot."""
        slots = np.arange(first, max(first, min(last, self.capacity)), dtype=np.int64)
        states = np.array([self.state(slot) for slot in slots.tolist()], np.int64)
        registered = (states >= REGISTERED) & (states < ORPHANED)
        there = slots[registered]
        keys = self.keys(there.tobytes())
        counts = self.retired + self.free + self.writable + self.staged + self.registered + self.orphaned
        found = {
            f"{counts} slots are counted, there are {self.capacity}": counts != self.capacity,
            f"{self.active} of {self.registered} registered blocks are held": self.active > self.registered,
            "a slot is in no state": bool((states < RETIRED).any()),
            "a registered slot has no key": None in keys,
            "a key does not lead to its slot": None not in keys and self.find(keys) != there.tobytes(),
            "a slot that is not registered can expire": bool(np.isfinite(self.expiry[slots[~registered]]).any()),
        }
        return [text for text, wrong in found.items() if wrong]

    def problems(self) -> list[str]:
        """What is wrong; empty when nothing is. Looks at every slot."""
        states: npt.NDArray[np.int32] = np.frombuffer(self.states(), np.int32)
        registered = self.registered_slots()
        keys, free = self.keys(registered), as_array(self.free_slots())
        held = (states > REGISTERED) & (states < ORPHANED)
        counts = [int((states == state).sum()) for state in (RETIRED, FREE, WRITABLE, STAGED)]
        counts += [len(keys), int(held.sum()), int((states > ORPHANED).sum())]
        counted = [self.retired, self.free, self.writable, self.staged, self.registered, self.active, self.orphaned]
        found = {
            f"slots per state are {counts}, counted {counted}": counts != counted,
            "a slot is in no state": sum(counts) - counts[5] != self.capacity,
            "a slot is on the free stack twice": len(np.unique(free)) != len(free),
            "a slot on the free stack is not free": bool((states[free] != FREE).any()),
            "a registered slot has no key": None in keys,
            "a key does not lead to its slot": None not in keys and self.find(keys) != registered,
            "a slot that is not registered can expire": bool(
                np.isfinite(np.delete(self.expiry, as_array(registered))).any()
            ),
        }
        return [text for text, wrong in found.items() if wrong]
