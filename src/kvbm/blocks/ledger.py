"""What a pool and its handles do, each as one step under one lock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from kvbm.abc.observer import Observer
from kvbm.abc.policy import Mask
from kvbm.blocks.pins import Hold
from kvbm.blocks.slots import NEVER, REGISTERED, as_array
from kvbm.blocks.statistics import Block, PoolStatistics
from kvbm.blocks.transitions import SLOT_BYTES, Adopted, Priorities, Seconds, Terms, Transitions
from kvbm.core.events import Cleared


class Ledger(Transitions):
    """What `Pool` and the handles share: it takes the lock, and afterwards delivers events. No handles. Any thread."""

    # -- writing --

    def allocate(self, n: int) -> tuple[bytes, int] | None:
        """`n` writable slots and the generation they belong to, or None and nothing changed."""
        with self._lock:
            if self._abandoned or self._ends:
                self._settle_debts()
            free = self._table.free
            if n <= free:
                slots: bytes | None = self._table.take(n)
            elif (slots := self._evict(n - free)) is not None and free:
                slots = self._table.take(free) + slots
            if slots is not None:
                self._counted["allocations"] += n
                if self._feed.watchers:
                    self._moved(slots[: free * SLOT_BYTES], "free", "writable")
            generation = self._generation
        if self._queue:
            self._feed.deliver()
        return None if slots is None else (slots, generation)

    def stage(self, slots: bytes, terms: Terms) -> None:
        """Writable to staged."""
        with self._lock:
            # What was allocated before a clear is never published, so nobody may wait for it either.
            current = terms.generation == self._generation
            self._table.stage(slots, terms.keys if current else None, terms.parent)
            if self._feed.watchers:
                self._moved(slots, "writable", "staged")
        if self._queue:
            self._feed.deliver()

    def register(self, slots: bytes, terms: Terms, done: Mask | None) -> tuple[bytes, tuple[bytes, ...]]:
        """Publish; returns what is now held, in the order of the keys."""
        with self._lock:
            if self._ends:
                self._expire_among(terms.keys)  # an expired block must not win over its successor
            held = self._register(slots, terms, done)
        if self._queue:
            self._feed.deliver()
        return held

    def adopt(self, found: Adopted) -> None:
        """Free to registered and inactive, the first to go first. TypeError or ValueError: nothing was changed."""
        with self._lock:
            if len(self._table.absent(found.keys)) < len(found.keys):
                raise ValueError("a key is there already")
            self._table.claim(found.slots)
            try:
                self._table.stage(found.slots, found.keys, found.parents)
            except (TypeError, ValueError):
                self._table.give_back(found.slots)
                raise
            self._adopt(found)
        if self._queue:
            self._feed.deliver()

    # -- reading --

    def match(self, keys: Sequence[bytes], start: int) -> tuple[bytes, int]:
        """Hold the longest registered prefix of `keys[start:]`; its slots and the generation."""
        with self._lock:
            if self._ends:
                self._expire_among(keys)
            slots, idle = self._table.match(keys, start)
            if slots:
                self._found(slots, idle)
                self._ranks.want(slots, b"")
                self._counted["returned"] += len(slots) // SLOT_BYTES
            self._counted["requested"] += max(0, len(keys) - start)
            generation = self._generation
        if self._queue:
            self._feed.deliver()
        return slots, generation

    def scan(self, keys: Sequence[bytes]) -> tuple[bytes, list[int], int]:
        """Hold whatever is registered among distinct `keys`; slots, positions and the generation."""
        with self._lock:
            self._expire_among(keys)
            slots, positions = self._present(keys)
            self._found(slots, self._table.hold(slots))
            generation = self._generation
        if self._queue:
            self._feed.deliver()
        return slots, positions, generation

    def rehold(self, slots: bytes, keys: tuple[bytes, ...], generation: int) -> bool:
        """Hold these again if every one is still the registered block of its key."""
        with self._lock:
            self._expire_among(keys)
            alive = generation == self._generation and self._table.find(keys) == slots
            if alive:
                self._found(slots, self._table.hold(slots))
        if self._queue:
            self._feed.deliver()
        return alive

    def candidates(self, n: int) -> tuple[bytes, tuple[bytes, ...], int]:
        """Hold up to `n` blocks that would be evicted next, the first to go last; slots, keys and the generation."""
        with self._lock:
            self._settle_debts()
            victims = self._ranks.victims(min(n, len(self._ranks)))
            slots = as_array(victims)[::-1].tobytes()  # prompt order, in which they are let go again
            self._table.hold(slots)
            self._moved(slots, "inactive", "active")
            keys, generation = self._table.keys(slots), self._generation
        if self._queue:
            self._feed.deliver()
        return slots, keys, generation

    def pin(self, keys: Sequence[bytes], owner: str, ttl: float) -> int:
        """Hold a prefix of `keys` in the name of `owner`."""
        with self._lock:
            self._settle_debts()
            self._expire_among(keys)
            most = int(self._max_pinned * self.total) - self._pins.blocks
            slots, idle = self._table.match(keys[: max(0, most)], 0)
            self._ranks.discard(idle)
            self._moved(idle, "inactive", "active")
            if slots:
                self._ends = True
                self._pins.add(Hold(owner, slots, self._clock() + ttl))
        if self._queue:
            self._feed.deliver()
        return len(slots) // SLOT_BYTES

    # -- letting go, un-publishing --

    def give_back(self, state: int, slots: bytes) -> None:
        """A handle lets go of slots in `state`."""
        with self._lock:
            self._give_back(state, slots)
        if self._queue:
            self._feed.deliver()

    def abandon(self, state: int, slots: bytes) -> None:
        """`give_back` for handles that nobody dropped.

        The garbage collector may call this inside any allocation, so also inside a locked part of this very thread:
        it must not wait for the lock. What it cannot return at once, the next call that needs slots returns first.
        """
        self._abandoned.append((state, slots))
        if self._lock.acquire(blocking=False):
            try:
                self._reclaim()
            finally:
                self._lock.release()

    def evict(self, slots: bytes) -> int:
        """Let go of registered slots and un-publish those nobody else holds; returns how many."""
        with self._lock:
            idle = self._release(slots)
            self._withdraw(idle)
            self._counted["evictions"] += len(idle) // SLOT_BYTES
        if self._queue:
            self._feed.deliver()
        return len(idle) // SLOT_BYTES

    def unpin(self, owner: str) -> int:
        """Let go of what is held in the name of `owner`; returns how many blocks."""
        with self._lock:
            ended = self._unpin(lambda hold: hold.owner == owner)
        if self._queue:
            self._feed.deliver()
        return ended

    def touch(self, keys: Sequence[bytes]) -> None:
        """Make what nobody holds most recent."""
        with self._lock:
            self._expire_among(keys)
            slots, _ = self._present(list(dict.fromkeys(keys)))
            idle = self._table.idle(slots)
            self._ranks.discard(idle)
            self._ranks.add(idle)
        if self._queue:
            self._feed.deliver()

    def doubt(self, keys: Sequence[bytes]) -> None:
        """Whether anybody will ask for them is not known."""
        with self._lock:
            slots, _ = self._present(list(dict.fromkeys(keys)))
            numbers = as_array(slots)
            slots = numbers[self._table.priority[numbers] == 0].tobytes()
            self._ranks.doubt(slots, self._table.idle(slots))

    def want(self, keys: Sequence[bytes]) -> None:
        """Somebody asks for them."""
        if not self._ranks.doubts:
            return
        with self._lock:
            slots, _ = self._present(list(dict.fromkeys(keys)))
            self._ranks.want(slots, self._table.idle(slots))

    def discard(self, keys: Iterable[bytes]) -> int:
        """Un-publish what is registered among `keys`."""
        with self._lock:
            slots, _ = self._present(list(dict.fromkeys(keys)))
            self._unpublish(slots)
        if self._queue:
            self._feed.deliver()
        return len(slots) // SLOT_BYTES

    def clear(self) -> None:
        """Un-publish everything and begin a new generation."""
        with self._lock:
            self._reclaim()
            self._unpin(lambda _: True)
            slots = self._table.registered_slots()
            idle = self._table.idle(slots)
            self._ranks.discard(idle)
            self._ranks.forget(slots)
            self._table.immortal(slots)
            if self._feed.watchers:
                self._moved(idle, "inactive", "free")
                held = np.setdiff1d(as_array(slots), as_array(idle))
                self._moved(held.tobytes(), "active", "orphaned")
            self._table.clear()
            self._due = NEVER
            self._generation += 1
            if self._feed.observers:
                self._feed.put(Cleared(self._tier, self._generation, self._group))
        if self._queue:
            self._feed.deliver()

    def resize(self, num_slots: int) -> int:
        """As many slots, or as few as are in use; returns how many."""
        with self._lock:
            self._settle_debts()
            self._resize(num_slots)
            total = self.total
        if self._queue:
            self._feed.deliver()
        return total

    # -- looking --

    def peek(self, keys: Sequence[bytes], start: int) -> int:
        """Length of what `match` would hold."""
        with self._lock:
            self._expire_among(keys)
            length = self._table.peek(keys, start)
        if self._queue:
            self._feed.deliver()
        return length

    def present(self, keys: Sequence[bytes]) -> Mask:
        """Which are registered."""
        with self._lock:
            self._expire_among(keys)
            found: Mask = as_array(self._table.find(keys)) >= 0
        if self._queue:
            self._feed.deliver()
        return found

    def absent(self, keys: Sequence[bytes]) -> list[int]:
        """Positions neither registered nor staged."""
        with self._lock:
            self._expire_among(keys)
            missing = self._table.absent(keys)
        if self._queue:
            self._feed.deliver()
        return missing

    def keys(self, first: int, last: int) -> tuple[bytes, ...]:
        """What is registered in these slots, by slot."""
        with self._lock:
            slots = np.arange(first, min(last, self._table.capacity), dtype=np.int64)
            found = [
                (slot, key) for slot, key in enumerate(self._table.keys(slots.tobytes()), first) if key is not None
            ]
            keys = [key for _, key in found]
            # A slot that is staged has a key, too.
            there = as_array(self._table.find(keys)).tolist()
            return tuple(key for (slot, key), at in zip(found, there, strict=True) if slot == at)

    def look(self, key: bytes) -> Block | None:
        """What is known of a registered block."""
        with self._lock:
            self._expire_among([key])
            found = self._table.find([key])
            slot = int(as_array(found)[0])
            block = None
            if slot >= 0:
                expiry = float(self._table.expiry[slot])
                block = Block(
                    key=key,
                    slot=slot,
                    parent=self._table.parents(found)[0],
                    holds=self._table.state(slot) - REGISTERED,
                    priority=int(self._table.priority[slot]),
                    expires=None if expiry == NEVER else expiry,
                )
        if self._queue:
            self._feed.deliver()
        return block

    def parents(self, slots: bytes) -> tuple[bytes | None, ...]:
        """The key before each of these blocks in its prompt."""
        with self._lock:
            return self._table.parents(slots)

    def terms(self, slots: bytes) -> tuple[Priorities, Seconds]:
        """The priority of each of these blocks, and the seconds until it ends."""
        numbers = as_array(slots)
        with self._lock:
            return self._table.priority[numbers], self._table.expiry[numbers] - self._clock()

    def pins(self) -> dict[str, int]:
        """How many blocks are held in whose name."""
        with self._lock:
            self._end_pins()
            held: dict[str, int] = {}
            for hold in self._pins:
                held[hold.owner] = held.get(hold.owner, 0) + len(hold.slots) // SLOT_BYTES
        if self._queue:
            self._feed.deliver()
        return held

    def subscribe(self, observer: Observer, *, transitions: bool) -> None:
        """Add an observer."""
        with self._lock:
            self._feed.subscribe(observer, transitions=transitions)

    def statistics(self) -> PoolStatistics:
        """A consistent snapshot."""
        with self._lock:
            self._reclaim()
            self._end_pins()
            table = self._table
            statistics = PoolStatistics(
                total=self.total,
                capacity=self.capacity,
                free=table.free,
                writable=table.writable,
                staged=table.staged,
                registered=table.registered,
                active=table.active,
                inactive=table.registered - table.active,
                orphaned=table.orphaned,
                pinned=self._pins.blocks,
                generation=self._generation,
                **self._counted,
            )
        if self._queue:
            self._feed.deliver()
        return statistics

    def examine(self, first: int, last: int) -> tuple[int, list[str]]:
        """What is wrong with these slots and the counts, and where the next look begins: `first` again past the end."""
        with self._lock:
            table, problems = self._table, self._table.problems_among(first, last)
            if (able := len(self._ranks)) != (idle := table.registered - table.active):
                problems.append(f"{able} blocks can be evicted, {idle} are inactive")
            return max(first, min(last, table.capacity)), problems

    def check(self) -> None:
        """Prove the invariants over all slots; raises AssertionError with everything that is wrong."""
        with self._lock:
            table, problems = self._table, self._table.problems()
            registered = as_array(table.registered_slots())
            idle = table.priority[as_array(table.idle(registered.tobytes()))]
            for priority, size in self._ranks.sizes().items():
                if size != (expected := int((idle == priority).sum())):
                    problems.append(f"{size} blocks of priority {priority} can be evicted, {expected} are inactive")
            problems += self._ranks.problems(registered, as_array(self._table.idle(registered.tobytes())))
            if len(registered) and float(table.expiry[registered].min()) < self._due:
                problems.append("a block expires before the pool looks for it")
        if problems:
            raise AssertionError("; ".join(problems))
