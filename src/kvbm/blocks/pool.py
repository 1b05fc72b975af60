"""The pool of one tier's blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import get_args

import numpy as np

from kvbm.abc.observer import Observer
from kvbm.abc.policy import EvictionOrder, Mask
from kvbm.blocks.leases import Pinned, Writable
from kvbm.blocks.ledger import Ledger
from kvbm.blocks.statistics import Block, PoolStatistics
from kvbm.blocks.transitions import SLOT_BYTES, Adopted, Duplicates, Priorities, Seconds
from kvbm.core.errors import Misuse
from kvbm.core.region import Slots


class Pool:
    """Hands out slots, finds blocks by key, and evicts what nobody holds.

        free --allocate--> writable --stage(key)--> staged --register--> registered: active (held) <--> inactive
         ^                    |                        |                                                   |
         +---- dropped -------+------- dropped --------+--------------------- evicted ---------------------+

    free + writable + staged + registered + orphaned (held, not to be matched) = all slots, always; `check` proves it.
    Any thread; every method is one step under one lock. Misuse raises and changes nothing.

    `order` belongs to the pool from now on. `tier` and `group` (of layers that are cached together) label the events.
    `duplicates` says what becomes of a slot whose key is registered already: with "share" it goes back and the handle
    holds the existing block, with "keep" the handle keeps its own, which nobody else can find. `max_pinned` is the
    share of the slots that `pin` may hold, `most_doubted` that which `doubt` leaves to what nobody has asked for yet.
    `clock` counts seconds.
    """

    def __init__(
        self,
        num_slots: int,
        *,
        order: EvictionOrder,
        tier: str = "g2",
        group: int = 0,
        duplicates: Duplicates = "share",
        max_pinned: float = 0.5,
        most_doubted: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        observers: Iterable[Observer] = (),
    ) -> None:
        _check_size(num_slots)
        if duplicates not in get_args(Duplicates):
            raise Misuse(f"duplicates must be one of {get_args(Duplicates)}, got {duplicates!r}")
        if not 0 <= max_pinned <= 1:
            raise Misuse(f"max_pinned must be in 0..1, got {max_pinned}")
        if not 0 <= most_doubted <= 1:
            raise Misuse(f"most_doubted must be in 0..1, got {most_doubted}")
        self._ledger = Ledger(num_slots, order, tier, group, duplicates, max_pinned, most_doubted, clock, observers)

    def allocate(self, n: int) -> Writable | None:
        """`n` slots to write: free ones first, then those of the blocks that should go first; None if there are less.

        All or nothing: where it gives None nothing was evicted.
        """
        if n < 1:
            raise Misuse(f"cannot allocate {n} slots")
        taken = self._ledger.allocate(n)
        return None if taken is None else Writable(self._ledger, *taken)

    def match(self, keys: Sequence[bytes], start: int = 0) -> Pinned:
        """Hold the longest prefix of `keys[start:]` that is registered; may be empty."""
        _check_start(start)
        slots, generation = self._ledger.match(keys, start)
        return Pinned(self._ledger, slots, tuple(keys[start : start + len(slots) // SLOT_BYTES]), generation)

    def scan(self, keys: Sequence[bytes]) -> tuple[Pinned, list[int]]:
        """Hold those of the distinct `keys` that are registered, and say at which positions they are."""
        if len(set(keys)) != len(keys):
            raise Misuse("a key is twice among the keys")
        slots, positions, generation = self._ledger.scan(keys)
        held = tuple(keys if len(positions) == len(keys) else [keys[at] for at in positions])
        return Pinned(self._ledger, slots, held, generation), positions

    def peek(self, keys: Sequence[bytes], start: int = 0) -> int:
        """How many blocks `match` would hold; holds nothing."""
        _check_start(start)
        return self._ledger.peek(keys, start)

    def candidates(self, n: int) -> Pinned:
        """Hold up to `n` of the blocks that would be evicted next, in prompt order: the first to go is the last.

        For a tier that moves blocks down before it gives up their slots: copy them, then `Pinned.evict`. Those that are
        dropped instead count as just used.
        """
        if n < 0:
            raise Misuse(f"cannot hold {n} blocks")
        slots, keys, generation = self._ledger.candidates(n)
        return Pinned(self._ledger, slots, keys, generation)

    def present(self, keys: Sequence[bytes]) -> Mask:
        """Which of `keys` are registered right now; holds nothing."""
        return self._ledger.present(keys)

    def absent(self, keys: Sequence[bytes]) -> list[int]:
        """Positions of keys that are neither registered nor staged right now: what a store would have to copy."""
        return self._ledger.absent(keys)

    def pin(self, keys: Sequence[bytes], *, owner: str, ttl: float) -> int:
        """Keep the longest registered prefix of `keys` for `ttl` seconds, or until `unpin(owner)`.

        Nobody has a handle: for promises to others, and for prompts that are to stay. Returns how many blocks that is,
        fewer than are registered where `max_pinned` is reached. An owner may pin several times; a clear ends all pins.
        """
        if not 0 < ttl < float("inf"):
            raise Misuse(f"a pin must end: ttl {ttl} is not positive and finite")
        return self._ledger.pin(keys, owner, ttl)

    def unpin(self, owner: str) -> int:
        """Let go of all that `owner` pinned; returns how many blocks, 0 where the time was over."""
        return self._ledger.unpin(owner)

    def pins(self) -> dict[str, int]:
        """Owners and how many blocks each has pinned; a block that is pinned twice counts twice."""
        return self._ledger.pins()

    def touch(self, keys: Sequence[bytes]) -> None:
        """Make the registered blocks among `keys` (in prompt order) that nobody holds the most recent ones.

        To keep a prompt's leaf before its root although its parts were let go at different times: call it with all
        of the prompt's keys after the last part was let go.
        """
        self._ledger.touch(keys)

    def doubt(self, keys: Sequence[bytes]) -> None:
        """Whether anybody will ever ask for the registered blocks among `keys` is not known: blocks of an answer, say.

        They are in the eviction order as all others are. Only where they are more than the share `most_doubted` of the
        slots, the least recent of them go before anything else. Until somebody asks: `match` and `want` end the doubt.
        Blocks of a priority above 0 are not doubted.
        """
        self._ledger.doubt(keys)

    def want(self, keys: Sequence[bytes]) -> None:
        """Somebody asks for the registered blocks among `keys`, and need not hold them: he has them from elsewhere."""
        self._ledger.want(keys)

    def discard(self, keys: Iterable[bytes]) -> int:
        """Un-publish: from now on they cannot be matched. Returns how many were registered.

        A held slot comes back when its last holder lets go. Staged keys are not touched.
        """
        return self._ledger.discard(keys)

    def clear(self) -> None:
        """Un-publish everything and begin a new generation: what is writable or staged now is never published."""
        self._ledger.clear()

    def adopt(
        self,
        slots: Slots,
        keys: Sequence[bytes],
        parents: Sequence[bytes | None],
        *,
        priorities: Priorities | None = None,
        ttls: Seconds | None = None,
    ) -> None:
        """Register blocks whose bytes lie in these free slots already: what a durable tier found at its start.

        One entry per block, the one that should go first first. `parents` has the key before each in its prompt,
        `priorities` and `ttls` (infinite: never) are as in `Writable.stage`. One step, whatever the number.
        """
        priorities = np.zeros(len(slots), np.uint8) if priorities is None else priorities
        ttls = np.full(len(slots), np.inf) if ttls is None else ttls
        rows = {len(keys), len(parents), len(priorities), len(ttls)}
        if rows != {len(slots)}:
            raise Misuse(f"{len(slots)} slots need as many keys, parents, priorities and ttls, got {sorted(rows)}")
        if priorities.max(initial=0) > 100:
            raise Misuse(f"priority {priorities.max()} is not in 0..100")
        if not (ttls > 0).all():
            raise Misuse("a ttl is not positive")
        try:
            self._ledger.adopt(Adopted(slots.astype(np.int64).tobytes(), tuple(keys), tuple(parents), priorities, ttls))
        except (TypeError, ValueError) as error:
            raise Misuse(f"these blocks cannot be adopted: {error}") from None

    def resize(self, num_slots: int) -> int:
        """Have `num_slots` slots from now on, or as few as are in use; returns how many.

        Blocks that nobody holds are evicted as needed. Slot numbers stay below the largest size the pool ever had; the
        highest that are free are given up first.
        """
        _check_size(num_slots)
        return self._ledger.resize(num_slots)

    @property
    def total(self) -> int:
        """Slots that there are now."""
        return self._ledger.total

    @property
    def capacity(self) -> int:
        """The most slots that there ever were: numbers of slots are below it, and arrays by slot need so many."""
        return self._ledger.capacity

    def keys(self, first: int, last: int) -> tuple[bytes, ...]:
        """The keys of the registered blocks in slots `first` to `last - 1`, by slot. Holds nothing."""
        if first < 0:
            raise Misuse(f"slot {first} is negative")
        return self._ledger.keys(first, last)

    def look(self, key: bytes) -> Block | None:
        """What is known of a registered block; None where there is none. Holds nothing."""
        return self._ledger.look(key)

    def add_observer(self, observer: Observer, *, transitions: bool = False) -> None:
        """`observer` hears `Stored`, `Removed` and `Cleared` from now on, with `transitions` also every `Moved`."""
        self._ledger.subscribe(observer, transitions=transitions)

    def statistics(self) -> PoolStatistics:
        """A consistent snapshot."""
        return self._ledger.statistics()

    def examine(self, first: int, last: int) -> tuple[int, list[str]]:
        """A part of `check` for a pool in use: of slots `first` to `last - 1`, and of the counts, what is wrong.

        Returns where the next look begins as well, `first` itself where there are no more slots.
        """
        if first < 0:
            raise Misuse(f"slot {first} is negative")
        return self._ledger.examine(first, last)

    def check(self) -> None:
        """Prove the invariants; raises AssertionError that says what is wrong. Looks at every slot."""
        self._ledger.check()


def _check_start(start: int) -> None:
    if start < 0:
        raise Misuse(f"start {start} is negative")


def _check_size(num_slots: int) -> None:
    if not 1 <= num_slots <= 1 << 29:
        raise Misuse(f"a pool has 1 to {1 << 29} slots, not {num_slots}")
