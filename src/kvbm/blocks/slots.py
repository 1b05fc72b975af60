"""The state of every slot, in flat arrays; the only place that writes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from kvbm.core.region import Slots

NEVER: Final = float("inf")

# What a slot is: one number. A registered slot with h holds is REGISTERED + h, an orphaned one (un-published while
# held: free when the last holder lets go) ORPHANED + h. Plain ints: enum members are slow where every step counts.
FREE: Final = -3
WRITABLE: Final = -2
STAGED: Final = -1
REGISTERED: Final = 0
ORPHANED: Final = 1 << 30


class SlotTable:
    """Flat arrays by slot. No lock of its own; arguments are the caller's to check.

    Keys lie in an object array because the garbage collector does not walk those; a list of a million would cost it
    milliseconds. A key, a priority and an expiry mean something only while the slot is registered.

    Short runs dominate, where a call into numpy costs more than its work: the usual case (all idle, all held once)
    is recognised from a list, and attributes that were never used are not written.
    """

    def __init__(self, num_slots: int) -> None:
        self.priority = np.zeros(num_slots, np.uint8)
        self.expiry = np.full(num_slots, NEVER)
        self.key = np.empty(num_slots, object)
        self.count = {FREE: num_slots, WRITABLE: 0, STAGED: 0, REGISTERED: 0, ORPHANED: 0}
        self._state = np.full(num_slots, FREE, np.int32)
        self._free = np.arange(num_slots, dtype=np.int64)
        self._ranked = self._mortal = False

    def take(self, n: int) -> Slots:
        """`n` free slots, now writable; there are that many. Neighbours where possible: copies coalesce."""
        top = self.count[FREE]
        slots = self._free[top - n : top].copy()
        self._move(slots, FREE, WRITABLE)
        return slots

    def evict(self, slots: Slots) -> list[bytes]:
        """Registered slots without holds, now writable; returns their keys."""
        keys: list[bytes] = self.key[slots].tolist()
        if self._mortal:
            self.expiry[slots] = NEVER
        self._move(slots, REGISTERED, WRITABLE)
        return keys

    def stage(self, slots: Slots) -> None:
        """Writable to staged."""
        self._move(slots, WRITABLE, STAGED)

    def publish(self, slots: Slots, keys: Sequence[bytes], priority: int, expiry: float) -> None:
        """Staged to registered, held once."""
        self._move(slots, STAGED, REGISTERED, holds=1)
        self.key[slots] = np.array(keys, object)
        if priority or self._ranked:
            self._ranked = True
            self.priority[slots] = priority
        if expiry != NEVER:
            self._mortal = True
            self.expiry[slots] = expiry

    def improve(self, slots: Slots, priority: int, expiry: float) -> None:
        """Registered again: the larger priority and the later expiry stay. The slots are held."""
        self._ranked = self._ranked or priority > 0
        self.priority[slots] = np.maximum(self.priority[slots], priority)
        self.expiry[slots] = np.maximum(self.expiry[slots], expiry)

    def hold(self, slots: Slots) -> Slots:
        """One more hold on registered slots; returns those that had none."""
        states = self._state[slots]
        if not any(states.tolist()):
            self._state[slots] = REGISTERED + 1
            return slots
        self._state[slots] = states + 1
        idle: Slots = slots[states == REGISTERED]
        return idle

    def release(self, slots: Slots) -> Slots:
        """One hold less on each; orphans without any are freed, registered slots without any are returned."""
        states = self._state[slots]
        if states.tolist().count(REGISTERED + 1) == len(slots):
            self._state[slots] = REGISTERED
            return slots
        self._state[slots] = states - 1
        self.free(slots[states == ORPHANED + 1], ORPHANED)
        idle: Slots = slots[states == REGISTERED + 1]
        return idle

    def idle(self, slots: Slots) -> Slots:
        """Those of the registered `slots` that nobody holds."""
        idle: Slots = slots[self._state[slots] == REGISTERED]
        return idle

    def unpublish(self, slots: Slots) -> list[bytes]:
        """Registered to free or, where held, to orphaned; returns their keys."""
        keys: list[bytes] = self.key[slots].tolist()
        self.key[slots] = None
        self.expiry[slots] = NEVER
        holds = self._state[slots] - REGISTERED
        held, orphans = holds > 0, slots[holds > 0]
        self._move(orphans, REGISTERED, ORPHANED, holds=holds[held])
        self.free(slots[~held], REGISTERED)
        return keys

    def free(self, slots: Slots, source: int) -> None:
        """From `source` to free."""
        top = self.count[FREE]
        self._free[top : top + len(slots)] = slots
        self._move(slots, source, FREE)

    def registered(self) -> Slots:
        """Every registered slot; looks at all."""
        return np.flatnonzero((self._state >= REGISTERED) & (self._state < ORPHANED))

    def problems(self) -> list[str]:
        """What is wrong with the arrays; empty when nothing is. Looks at all."""
        state, free = self._state, self._free[: self.count[FREE]]
        registered = self.registered()
        counts = {known: int((state == known).sum()) for known in (FREE, WRITABLE, STAGED)}
        counts |= {REGISTERED: len(registered), ORPHANED: int((state > ORPHANED).sum())}
        found = {
            f"slots per state are {counts}, counted {self.count}": counts != self.count,
            "a slot is in no state": sum(counts.values()) != len(state),
            "a slot is on the free stack twice": len(np.unique(free)) != len(free),
            "a slot on the free stack is not free": bool((state[free] != FREE).any()),
            "a registered slot has no key": None in self.key[registered].tolist(),
            "a slot that is not registered can expire": bool(
                np.isfinite(np.delete(self.expiry, registered)).any(),
            ),
        }
        return [text for text, wrong in found.items() if wrong]

    def _move(self, slots: Slots, source: int, target: int, *, holds: int | npt.NDArray[np.int32] = 0) -> None:
        self._state[slots] = target + holds
        self.count[source] -= len(slots)
        self.count[target] += len(slots)
