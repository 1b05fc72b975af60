"""What happens to blocks, step by step: under the pool's lock, which others take."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import compress, pairwise
from typing import Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from kvbm.abc.observer import Observer
from kvbm.abc.policy import EvictionOrder, Mask
from kvbm.blocks.feed import Feed
from kvbm.blocks.pins import Hold, Pins
from kvbm.blocks.ranks import Ranks
from kvbm.blocks.slots import FREE, NEVER, REGISTERED, STAGED, WRITABLE, SlotTable, as_array
from kvbm.core.events import Moved, Removed, Stored

Priorities = npt.NDArray[np.uint8]
Seconds = npt.NDArray[np.float64]

SLOT_BYTES: Final = 8
"""A run of slots is bytes of int64: immutable, and cheaper to make and to pass on than an array."""

Duplicates = Literal["share", "keep"]


Parents = bytes | tuple[bytes | None, ...] | None
"""The key before the first of a run, or before each."""


class Terms(msgspec.Struct, frozen=True):
    """How a staged run is to be published."""

    keys: tuple[bytes, ...]
    parent: Parents
    priority: int
    ttl: float | None
    generation: int


class Adopted(msgspec.Struct, frozen=True):
    """Blocks whose bytes lie in free slots already: one entry each, the one that should go first first."""

    slots: bytes
    keys: tuple[bytes, ...]
    parents: tuple[bytes | None, ...]
    priorities: Priorities
    ttls: Seconds


class Transitions:
    """The state of a pool and every step that changes it. No lock is taken here, and no event delivered.

    Arguments are the handles' and the pool's to check, before they take anything.
    """

    def __init__(
        self,
        num_slots: int,
        order: EvictionOrder,
        tier: str,
        group: int,
        duplicates: Duplicates,
        max_pinned: float,
        most_doubted: float,
        clock: Callable[[], float],
        observers: Iterable[Observer],
    ) -> None:
        self._lock = threading.Lock()
        self._table = SlotTable(num_slots)
        self._ranks = Ranks(order, self._table, most_doubted)
        self._feed = Feed(observers)
        self._queue = self._feed.queue
        self._pins = Pins()
        self._clock = clock
        self._tier, self._group = tier, group
        self._keep = duplicates == "keep"
        self._max_pinned = max_pinned
        self._generation = 0
        self._due = NEVER  # no registered block expires before
        self._next_sweep = -NEVER
        # What most pools never have and do not pay for: blocks with terms of their own; blocks or pins that end.
        self._special = self._ends = False
        self._counted = dict.fromkeys(_COUNTERS, 0)
        self._abandoned: deque[tuple[int, bytes]] = deque()

    @property
    def total(self) -> int:
        """Slots that are not retired."""
        return self._table.capacity - self._table.retired

    @property
    def capacity(self) -> int:
        """Slots, retired ones too."""
        return self._table.capacity

    def _evict(self, n: int) -> bytes | None:
        """`n` writable slots from the eviction order, a prompt's in its order; or None and nothing changed."""
        if n > len(self._ranks):
            return None
        victims = self._ranks.victims(n)
        if len(victims) < n * SLOT_BYTES:
            self._ranks.add(as_array(victims)[::-1].tobytes())
            return None
        if self._ranks.forgets:
            self._ranks.forget(victims)
        if self._ends:
            self._table.immortal(victims)
        keys, root_first = self._table.evict(victims)
        self._counted["evictions"] += n
        if self._feed.observers:
            if self._feed.watchers:
                self._moved(victims, "inactive", "writable")
            self._feed.put(Removed(self._tier, keys, self._group))
        return root_first

    def _register(self, slots: bytes, terms: Terms, done: Mask | None) -> tuple[bytes, tuple[bytes, ...]]:
        if terms.generation != self._generation:
            self._table.give_back(slots)
            self._moved(slots, "staged", "free")
            return b"", ()
        keys = terms.keys
        wanted = None if done is None else done.tobytes()
        held, fresh, twins, idle = self._table.register(slots, wanted, self._keep)
        if fresh is None:
            self._publish(slots, terms, [(0, len(keys))])
            return held, keys
        numbers = as_array(slots)
        self._publish(numbers[fresh].tobytes(), terms, _runs(fresh))
        self._renew(twins, idle, terms)
        self._counted["duplicates"] += (len(keys) if done is None else int(done.sum())) - len(fresh)
        if self._feed.watchers:
            new = np.isin(numbers, numbers[fresh])
            kept = np.isin(numbers, as_array(held)) & ~new
            self._moved(numbers[kept].tobytes(), "staged", "orphaned")
            self._moved(numbers[~new & ~kept].tobytes(), "staged", "free")
        return held, keys if done is None else tuple(compress(keys, done.tolist()))

    def _publish(self, slots: bytes, terms: Terms, runs: Iterable[tuple[int, int]]) -> None:
        """The slots of the keys in `runs` (first and end) of a staged run were registered."""
        if self._special or terms.priority or terms.ttl:
            self._special = True
            self._table.set_terms(slots, terms.priority, self._open(terms))
        if self._ranks.admits:
            self._ranks.admit(slots)
        self._counted["registrations"] += len(slots) // SLOT_BYTES
        if self._feed.observers:
            if self._feed.watchers:
                self._moved(slots, "staged", "active")
            for first, end in runs:
                self._tell_stored(terms.keys, terms.parent, first, end)

    def _adopt(self, found: Adopted) -> None:
        """Staged slots, whose keys are new, are registered and held by nobody."""
        slots, keys, priorities = found.slots, found.keys, found.priorities
        self._table.register(slots, None, False)
        ends = self._clock() + found.ttls
        due = float(ends.min(initial=NEVER))
        if self._special or priorities.any() or due < NEVER:
            self._special = True
            self._ends |= due < NEVER
            self._due = min(self._due, due)
            for priority in np.unique(priorities[priorities > 0]).tolist():
                self._ranks.open(priority)
            self._table.set_terms(slots, priorities, ends)
        self._ranks.admit(slots)
        self._ranks.add(as_array(self._table.release(slots))[::-1].tobytes())
        self._counted["registrations"] += len(keys)
        if self._feed.observers:
            self._moved(slots, "free", "inactive")
            self._tell_stored(keys, found.parents, 0, len(keys))

    def _tell_stored(self, keys: tuple[bytes, ...], parent: Parents, first: int, end: int) -> None:
        """One event for each stretch of `keys[first:end]` whose blocks follow each other."""
        if not isinstance(parent, tuple):
            self._feed.put(Stored(self._tier, keys[first:end], keys[first - 1] if first else parent, self._group))
            return
        while first < end:
            stop = first + 1
            while stop < end and parent[stop] == keys[stop - 1]:
                stop += 1
            self._feed.put(Stored(self._tier, keys[first:stop], parent[first], self._group))
            first = stop

    def _renew(self, twins: bytes, idle: bytes, terms: Terms) -> None:
        """Blocks that were there already get the better of both terms; `idle` nobody had held."""
        self._found(twins, idle)
        expiry = self._open(terms)
        table, better = self._table, self._table.outranked(twins, terms.priority)
        self._ranks.forget(better)
        table.promote(better, terms.priority)
        self._ranks.admit(better)
        table.prolong(twins, expiry)

    def _open(self, terms: Terms) -> float:
        """Prepare for blocks on these terms; returns when they expire."""
        if terms.priority:
            self._ranks.open(terms.priority)
        if terms.ttl is None:
            return NEVER
        self._ends = True
        expiry = self._clock() + terms.ttl
        self._due = min(self._due, expiry)
        return expiry

    def _found(self, slots: bytes, idle: bytes) -> None:
        """Somebody holds these now; `idle` nobody had held."""
        if idle:
            self._ranks.discard(idle)
        if self._ranks.uses:
            self._ranks.use(slots)
        if self._feed.watchers:
            self._moved(idle, "inactive", "active")

    def _present(self, keys: Sequence[bytes]) -> tuple[bytes, list[int]]:
        """Slots and positions of the registered blocks among distinct `keys`."""
        found = as_array(self._table.find(keys))
        positions = (found >= 0).nonzero()[0]
        return found[positions].tobytes(), positions.tolist()

    def _expire_among(self, keys: Sequence[bytes]) -> None:
        """Remove those of `keys` whose time is over: whatever is looked up must not meet them."""
        if self._due != NEVER and self._due <= (now := self._clock()):
            slots, _ = self._present(list(dict.fromkeys(keys)))
            self._expire(self._table.expired(now, as_array(slots)))

    def _sweep(self) -> None:
        """Remove every expired block. Looks at all slots, so it is spaced to cost a thousandth of the time."""
        now = self._clock()
        if now < self._due or now < self._next_sweep:
            return
        self._expire(self._table.expired(now))
        self._due = float(self._table.expiry.min())
        self._next_sweep = now + self._table.capacity * 1e-6

    def _expire(self, slots: bytes) -> None:
        self._unpublish(slots)
        self._counted["expired"] += len(slots) // SLOT_BYTES

    def _unpublish(self, slots: bytes) -> None:
        """Registered blocks, held or not, can no longer be matched."""
        self._ranks.discard(self._table.idle(slots))
        self._withdraw(slots)

    def _withdraw(self, slots: bytes) -> None:
        """Registered blocks that are in no order can no longer be matched."""
        self._ranks.forget(slots)
        self._table.immortal(slots)
        if self._feed.watchers:
            idle = self._table.idle(slots)
            held = np.setdiff1d(as_array(slots), as_array(idle), assume_unique=True)
            self._moved(idle, "inactive", "free")
            self._moved(held.tobytes(), "active", "orphaned")
        self._removed(self._table.unpublish(slots))

    def _removed(self, keys: tuple[bytes, ...]) -> None:
        if keys and self._feed.observers:
            self._feed.put(Removed(self._tier, keys, self._group))

    def _moved(self, slots: bytes, source: str, target: str) -> None:
        if slots and self._feed.watchers:
            self._feed.put(Moved(self._tier, tuple(as_array(slots).tolist()), source, target, self._group))

    def _give_back(self, state: int, slots: bytes) -> None:
        if state != REGISTERED:
            self._moved(slots, _NAMES[state], "free")
            self._table.give_back(slots)
            return
        if idle := self._release(slots):
            self._ranks.add(idle)

    def _release(self, slots: bytes) -> bytes:
        """One hold less; returns those of the blocks that nobody holds now."""
        idle = self._table.release(slots)
        if self._feed.watchers:
            self._moved(idle, "active", "inactive")
            freed = [slot for slot in dict.fromkeys(as_array(slots).tolist()) if self._table.state(slot) == FREE]
            self._moved(np.array(freed, np.int64).tobytes(), "orphaned", "free")
        return idle

    def _unpin(self, over: Callable[[Hold], bool]) -> int:
        ended = self._pins.take(over)
        for hold in ended:
            self._give_back(REGISTERED, hold.slots)
        return sum(len(hold.slots) for hold in ended) // SLOT_BYTES

    def _resize(self, num_slots: int) -> None:
        table, total = self._table, self.total
        if num_slots > total:
            back = min(table.retired, num_slots - total)
            self._moved(table.restore(back), "retired", "free")
            if num_slots > total + back:
                table.grow(table.capacity + num_slots - total - back)
                self._ranks.resize(table.capacity)
            return
        excess = min(total - num_slots, table.free + len(self._ranks))
        if excess > table.free:
            victims = self._evict(excess - table.free)
            if victims is not None:
                table.give_back(victims)
                self._moved(victims, "writable", "free")
        self._moved(table.retire(min(excess, table.free)), "free", "retired")

    def _settle_debts(self) -> None:
        """What is over ends before anybody looks for slots: forgotten handles, pins, blocks."""
        self._reclaim()
        self._end_pins()
        self._sweep()

    def _end_pins(self) -> None:
        now = self._clock()
        if self._pins.due <= now:
            self._unpin(lambda hold: hold.until <= now)

    def _reclaim(self) -> None:
        while self._abandoned:
            self._give_back(*self._abandoned.popleft())


_NAMES = {WRITABLE: "writable", STAGED: "staged"}
_COUNTERS = ("allocations", "evictions", "registrations", "duplicates", "requested", "returned", "expired")


def _runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """First and end of each stretch of consecutive positions."""
    cuts = [0, *(at for at in range(1, len(positions)) if positions[at] != positions[at - 1] + 1), len(positions)]
    return [(positions[first], positions[end - 1] + 1) for first, end in pairwise(cuts) if end > first]
