"""Every transition of a pool's blocks, under one lock."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import compress, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvbm.abc.observer import Observer
from kvbm.abc.policy import EvictionOrder
from kvbm.blocks.feed import Feed
from kvbm.blocks.index import Index
from kvbm.blocks.ranks import Ranks
from kvbm.blocks.slots import FREE, NEVER, ORPHANED, REGISTERED, STAGED, WRITABLE, SlotTable
from kvbm.blocks.statistics import PoolStatistics
from kvbm.core.errors import Misuse
from kvbm.core.events import Cleared, Removed, Stored
from kvbm.core.region import Slots

Mask = npt.NDArray[np.bool_]


class Terms(NamedTuple):
    """How a staged run is to be published."""

    keys: tuple[bytes, ...]
    parent: bytes | None
    priority: int
    ttl: float | None
    generation: int


class Ledger:
    """What `Pool` and the handles share: state and transitions, no handles.

    Any thread. Methods come in pairs: the public one takes the lock and afterwards delivers events, the private one
    runs under the lock. Arguments are the handles' and the pool's to check, before they take anything.
    """

    def __init__(
        self,
        num_slots: int,
        order: EvictionOrder,
        tier: str,
        clock: Callable[[], float],
        observers: Iterable[Observer],
    ) -> None:
        self._lock = threading.Lock()
        self._table = SlotTable(num_slots)
        self._index = Index()
        self._ranks = Ranks(order, self._table.priority)
        self._feed = Feed(observers)
        self._clock = clock
        self._tier = tier
        self._generation = 0
        self._due = NEVER  # no registered block expires before
        self._next_sweep = -NEVER
        self._counted = dict.fromkeys(_COUNTERS, 0)
        self._abandoned: deque[tuple[int, Slots, Terms | None]] = deque()

    # -- writing --

    def allocate(self, n: int) -> tuple[Slots, int] | None:
        """`n` writable slots and the generation they belong to, or None and nothing changed."""
        with self._lock:
            self._reclaim()
            slots = self._allocate(n)
            generation = self._generation
        self._feed.deliver()
        return None if slots is None else (slots, generation)

    def stage(self, slots: Slots, terms: Terms) -> None:
        """Writable to staged."""
        with self._lock:
            self._table.stage(slots)
            if terms.generation == self._generation:
                self._index.stage(terms.keys)

    def register(self, slots: Slots, terms: Terms, done: Mask | None) -> tuple[Slots, tuple[bytes, ...]]:
        """Publish; returns what is now held, in the order of the keys."""
        with self._lock:
            held = self._register(slots, terms, done)
        self._feed.deliver()
        return held

    # -- reading --

    def match(self, keys: Sequence[bytes], start: int) -> tuple[Slots, int]:
        """Hold the longest registered prefix of `keys[start:]`; its slots and the generation."""
        with self._lock:
            found = self._index.prefix(keys, start)
            if len(set(found)) != len(found):
                raise Misuse("a key is twice among the keys")
            slots = np.array(found, np.int64)
            late = self._late(slots)
            if late is not None:
                self._expire(slots[late])
                slots = slots[: int(late.argmax())]
            self._hold(slots)
            self._counted["requested"] += max(0, len(keys) - start)
            self._counted["returned"] += len(slots)
            generation = self._generation
        self._feed.deliver()
        return slots, generation

    def scan(self, keys: Sequence[bytes]) -> tuple[Slots, list[int], int]:
        """Hold whatever is registered among distinct `keys`; slots, positions and the generation."""
        with self._lock:
            slots, positions = self._present(keys)
            self._hold(slots)
            generation = self._generation
        self._feed.deliver()
        return slots, positions, generation

    def peek(self, keys: Sequence[bytes], start: int) -> int:
        """Length of what `match` would hold."""
        with self._lock:
            slots = self._index.prefix(keys, start)
            late = None if self._due == NEVER else self._late(np.array(slots, np.int64))
            return len(slots) if late is None else int(late.argmax())

    def absent(self, keys: Sequence[bytes]) -> list[int]:
        """Positions neither registered nor staged."""
        with self._lock:
            _, present = self._present(keys)
            known, staged = set(present), self._index.is_staged
            missing = [at for at, key in enumerate(keys) if at not in known and not staged(key)]
        self._feed.deliver()
        return missing

    def touch(self, keys: Sequence[bytes]) -> None:
        """Make what nobody holds most recent."""
        with self._lock:
            slots, _ = self._present(list(dict.fromkeys(keys)))
            idle = self._table.idle(slots)
            self._ranks.discard(idle)
            self._ranks.add(idle)
        self._feed.deliver()

    def rehold(self, slots: Slots, keys: tuple[bytes, ...], generation: int) -> bool:
        """Hold these again if every one is still the registered block of its key."""
        with self._lock:
            alive = generation == self._generation and self._index.find(keys) == slots.tolist()
            if alive and self._late(slots) is None:
                self._hold(slots)
                return True
            return False

    def candidates(self, n: int) -> tuple[Slots, tuple[bytes, ...], int]:
        """Hold up to `n` blocks that would be evicted next, the first to go first; slots, keys and the generation."""
        with self._lock:
            self._reclaim()
            if self._due != NEVER:
                self._sweep()
            slots = self._ranks.victims(min(n, len(self._ranks)))
            self._table.hold(slots)
            keys = tuple(self._table.key[slots].tolist())
            generation = self._generation
        self._feed.deliver()
        return slots, keys, generation

    # -- giving back, un-publishing --

    def evict(self, slots: Slots) -> int:
        """Let go of registered slots and un-publish those nobody else holds; returns how many."""
        with self._lock:
            idle = self._table.release(slots)
            self._withdraw(self._table.unpublish(idle))
            self._counted["evictions"] += len(idle)
        self._feed.deliver()
        return len(idle)

    def give_back(self, state: int, slots: Slots, terms: Terms | None = None) -> None:
        """A handle lets go of slots in `state`; `terms` where they are staged."""
        with self._lock:
            self._give_back(state, slots, terms)

    def abandon(self, state: int, slots: Slots, terms: Terms | None) -> None:
        """`give_back` for handles that nobody dropped.

        The garbage collector may call this inside any allocation, so also inside a locked part of this very thread:
        it must not wait for the lock. What it cannot return at once, the next `allocate`, `statistics`, `check` or
        `clear` returns first.
        """
        self._abandoned.append((state, slots, terms))
        if self._lock.acquire(blocking=False):
            try:
                self._reclaim()
            finally:
                self._lock.release()

    def discard(self, keys: Iterable[bytes]) -> int:
        """Un-publish what is registered among `keys`."""
        wanted = list(dict.fromkeys(keys))
        with self._lock:
            slots = np.array([slot for slot in self._index.find(wanted) if slot is not None], np.int64)
            self._unpublish(slots)
        self._feed.deliver()
        return len(slots)

    def clear(self) -> None:
        """Un-publish everything and begin a new generation."""
        with self._lock:
            self._reclaim()
            slots = self._table.registered()
            self._ranks.discard(self._table.idle(slots))
            self._table.unpublish(slots)
            self._index.clear()
            self._due = NEVER
            self._generation += 1
            if self._feed.observers:
                self._feed.put(Cleared(self._tier, self._generation))
        self._feed.deliver()

    # -- looking --

    def subscribe(self, observer: Observer) -> None:
        """Add an observer."""
        with self._lock:
            self._feed.subscribe(observer)

    def statistics(self) -> PoolStatistics:
        """A consistent snapshot."""
        with self._lock:
            self._reclaim()
            count, inactive = self._table.count, len(self._ranks)
            return PoolStatistics(
                total=sum(count.values()),
                free=count[FREE],
                writable=count[WRITABLE],
                staged=count[STAGED],
                registered=count[REGISTERED],
                active=count[REGISTERED] - inactive,
                inactive=inactive,
                orphaned=count[ORPHANED],
                generation=self._generation,
                **self._counted,
            )

    def check(self) -> None:
        """Prove the invariants over all slots; raises AssertionError with everything that is wrong."""
        with self._lock:
            self._reclaim()
            table, problems = self._table, self._table.problems()
            registered = table.registered()
            if dict(self._index.items()) != dict(zip(table.key[registered], registered.tolist(), strict=True)):
                problems.append("the index and the slots' keys differ")
            idle = table.priority[table.idle(registered)]
            for priority, size in self._ranks.sizes().items():
                if size != (expected := int((idle == priority).sum())):
                    problems.append(f"{size} blocks of priority {priority} can be evicted, {expected} are inactive")
            if len(registered) and float(table.expiry[registered].min()) < self._due:
                problems.append("a block expires before the pool looks for it")
        if problems:
            raise AssertionError("; ".join(problems))

    # -- under the lock --

    def _allocate(self, n: int) -> Slots | None:
        if self._due != NEVER:
            self._sweep()
        free = self._table.count[FREE]
        if n > free:
            victims = self._evict(n - free)
            if victims is None:
                return None
            slots = np.concatenate((self._table.take(free), victims)) if free else victims.copy()
        else:
            slots = self._table.take(n)
        self._counted["allocations"] += n
        return slots

    def _evict(self, n: int) -> Slots | None:
        """`n` writable slots from the eviction order, a prompt's in its order; or None and nothing changed."""
        if n > len(self._ranks):
            return None
        victims = self._ranks.victims(n)
        root_first = victims[::-1]
        if len(victims) < n:
            self._ranks.add(root_first)
            return None
        self._withdraw(self._table.evict(victims))
        self._counted["evictions"] += n
        return root_first

    def _register(self, slots: Slots, terms: Terms, done: Mask | None) -> tuple[Slots, tuple[bytes, ...]]:
        if terms.generation != self._generation:
            self._table.free(slots, STAGED)
            return np.empty(0, np.int64), ()
        keys = terms.keys
        self._index.unstage(keys)
        if self._due != NEVER:
            self._present(keys)  # an expired block must not win over its successor
        if done is None and self._index.none_of(keys):
            self._publish(slots, terms, range(len(keys)))
            return slots, keys
        existing = np.array([-1 if slot is None else slot for slot in self._index.find(keys)], np.int64)
        wanted = np.ones(len(keys), np.bool_) if done is None else done
        new, old = wanted & (existing < 0), wanted & (existing >= 0)
        self._table.free(slots[~new], STAGED)
        self._publish(slots[new], terms, new.nonzero()[0].tolist())
        self._renew(existing[old], terms)
        return np.where(new, slots, existing)[wanted], tuple(compress(keys, wanted))

    def _publish(self, slots: Slots, terms: Terms, positions: Sequence[int]) -> None:
        """Make the keys at `positions` of a staged run matchable, held once."""
        expiry = self._open(terms)
        keys = terms.keys if len(positions) == len(terms.keys) else [terms.keys[at] for at in positions]
        self._table.publish(slots, keys, terms.priority, expiry)
        self._index.add(keys, slots.tolist())
        self._counted["registrations"] += len(keys)
        if self._feed.observers:
            for first, end in _runs(positions):
                parent = terms.keys[first - 1] if first else terms.parent
                self._feed.put(Stored(self._tier, terms.keys[first:end], parent))

    def _renew(self, slots: Slots, terms: Terms) -> None:
        """Hold blocks that are registered already, on the better of both terms."""
        self._hold(slots)
        self._table.improve(slots, terms.priority, self._open(terms))
        self._counted["duplicates"] += len(slots)

    def _open(self, terms: Terms) -> float:
        """Prepare for blocks on these terms; returns when they expire."""
        self._ranks.open(terms.priority)
        if terms.ttl is None:
            return NEVER
        expiry = self._clock() + terms.ttl
        self._due = min(self._due, expiry)
        return expiry

    def _hold(self, slots: Slots) -> None:
        self._ranks.discard(self._table.hold(slots))

    def _present(self, keys: Sequence[bytes]) -> tuple[Slots, list[int]]:
        """Slots and positions of the registered blocks among distinct `keys`; expired ones are removed."""
        found = self._index.find(keys)
        positions = [at for at, slot in enumerate(found) if slot is not None]
        slots = np.array([slot for slot in found if slot is not None], np.int64)
        late = self._late(slots)
        if late is None:
            return slots, positions
        self._expire(np.unique(slots[late]))
        return slots[~late], list(compress(positions, ~late))

    def _late(self, slots: Slots) -> Mask | None:
        """Which of these are past their time; None where none is."""
        if self._due == NEVER or self._due > (now := self._clock()):
            return None
        late: Mask = self._table.expiry[slots] <= now
        return late if late.any() else None

    def _sweep(self) -> None:
        """Remove every expired block. Looks at all slots, so it is spaced to cost a thousandth of the time."""
        now = self._clock()
        if now < self._due or now < self._next_sweep:
            return
        expiry = self._table.expiry
        self._expire(np.flatnonzero(expiry <= now))
        self._due = float(expiry.min())
        self._next_sweep = now + len(expiry) * 1e-6

    def _expire(self, slots: Slots) -> None:
        self._unpublish(slots)
        self._counted["expired"] += len(slots)

    def _unpublish(self, slots: Slots) -> None:
        """Registered blocks, held or not, can no longer be matched."""
        self._ranks.discard(self._table.idle(slots))
        self._withdraw(self._table.unpublish(slots))

    def _withdraw(self, keys: list[bytes]) -> None:
        self._index.remove(keys)
        if keys and self._feed.observers:
            self._feed.put(Removed(self._tier, tuple(keys)))

    def _give_back(self, state: int, slots: Slots, terms: Terms | None) -> None:
        if state == REGISTERED:
            self._ranks.add(self._table.release(slots))
            return
        self._table.free(slots, state)
        if terms is not None and terms.generation == self._generation:
            self._index.unstage(terms.keys)

    def _reclaim(self) -> None:
        while self._abandoned:
            self._give_back(*self._abandoned.popleft())


_COUNTERS = ("allocations", "evictions", "registrations", "duplicates", "requested", "returned", "expired")


def _runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """First and end of each stretch of consecutive positions."""
    cuts = [0, *(at for at in range(1, len(positions)) if positions[at] != positions[at - 1] + 1), len(positions)]
    return [(positions[first], positions[end - 1] + 1) for first, end in pairwise(cuts) if end > first]
