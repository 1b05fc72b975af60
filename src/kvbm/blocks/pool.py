"""The pool of one tier's blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from kvbm.abc.observer import Observer
from kvbm.abc.policy import EvictionOrder
from kvbm.blocks.leases import Pinned, Writable
from kvbm.blocks.ledger import Ledger
from kvbm.blocks.statistics import PoolStatistics
from kvbm.core.errors import Misuse


class Pool:
    """Hands out slots, finds blocks by key, and evicts what nobody holds.

        free --allocate--> writable --stage(key)--> staged --register--> registered: active (held) <--> inactive
         ^                    |                        |                                                   |
         +---- dropped -------+------- dropped --------+--------------------- evicted ---------------------+

    free + writable + staged + registered + un-published but held = all slots, always; `check` proves it. Any thread;
    every method is one step under one lock. `order` belongs to the pool from now on. Misuse changes nothing.
    """

    def __init__(
        self,
        num_slots: int,
        *,
        order: EvictionOrder,
        tier: str = "g2",
        clock: Callable[[], float] = time.monotonic,
        observers: Iterable[Observer] = (),
    ) -> None:
        if num_slots < 1:
            raise Misuse(f"a pool needs at least one slot, got {num_slots}")
        self._ledger = Ledger(num_slots, order, tier, clock, observers)

    def allocate(self, n: int) -> Writable | None:
        """`n` slots to write: free ones first, then those of the blocks that should go first; None if there are less.

        All or nothing: where it gives None nothing was evicted.
        """
        if n < 1:
            raise Misuse(f"cannot allocate {n} slots")
        taken = self._ledger.allocate(n)
        return None if taken is None else Writable(self._ledger, *taken)

    def match(self, keys: Sequence[bytes], start: int = 0) -> Pinned:
        """Hold the longest prefix of the distinct `keys[start:]` that is registered; may be empty."""
        _check_start(start)
        slots, generation = self._ledger.match(keys, start)
        return Pinned(self._ledger, slots, tuple(keys[start : start + len(slots)]), generation)

    def scan(self, keys: Sequence[bytes]) -> tuple[Pinned, list[int]]:
        """Hold those of the distinct `keys` that are registered, and say at which positions they are."""
        if len(set(keys)) != len(keys):
            raise Misuse("a key is twice among the keys")
        slots, positions, generation = self._ledger.scan(keys)
        return Pinned(self._ledger, slots, tuple(keys[at] for at in positions), generation), positions

    def peek(self, keys: Sequence[bytes], start: int = 0) -> int:
        """How many blocks `match` would hold; holds and changes nothing."""
        _check_start(start)
        return self._ledger.peek(keys, start)

    def candidates(self, n: int) -> Pinned:
        """Hold up to `n` of the blocks that would be evicted next, the first to go first.

        For a tier that moves blocks down before it gives up their slots: copy them, then `Pinned.evict`.
        """
        if n < 0:
            raise Misuse(f"cannot hold {n} blocks")
        slots, keys, generation = self._ledger.candidates(n)
        return Pinned(self._ledger, slots, keys, generation)

    def absent(self, keys: Sequence[bytes]) -> list[int]:
        """Positions of keys that are neither registered nor staged right now: what a store would have to copy."""
        return self._ledger.absent(keys)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Make the registered blocks among `keys` (in prompt order) that nobody holds the most recent ones.

        To keep a prompt's leaf before its root although its parts were let go at different times: call it with all
        of the prompt's keys after the last part was let go.
        """
        self._ledger.touch(keys)

    def discard(self, keys: Iterable[bytes]) -> int:
        """Un-publish: from now on they cannot be matched. Returns how many were registered.

        A held slot comes back when its last holder lets go. Staged keys are not touched.
        """
        return self._ledger.discard(keys)

    def clear(self) -> None:
        """Un-publish everything and begin a new generation: what is writable or staged now is never published."""
        self._ledger.clear()

    def add_observer(self, observer: Observer) -> None:
        """`observer` hears the events of every transition from now on."""
        self._ledger.subscribe(observer)

    def statistics(self) -> PoolStatistics:
        """A consistent snapshot."""
        return self._ledger.statistics()

    def check(self) -> None:
        """Prove the invariants; raises AssertionError that says what is wrong. Looks at every slot."""
        self._ledger.check()


def _check_start(start: int) -> None:
    if start < 0:
        raise Misuse(f"start {start} is negative")
