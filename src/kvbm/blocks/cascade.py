"""Several tiers as one cache of prompts: look-ups span them, hits are copied up, victims move down.

Decisions and states only. Bytes are moved by the callables that are given, slot by slot; without them nothing moves,
which is what a replay wants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import NamedTuple, Self, final

import numpy as np

from kvbm.abc.policy import Admission, Drop, Mask, Move, Placement, tags_of
from kvbm.blocks import Pinned, Pool, Writable
from kvbm.core.errors import Misuse
from kvbm.core.region import Slots

Copy = Callable[[str, Slots, str, Slots], None]
"""Copies blocks from the slots of one tier to as many slots of another. Returns when all bytes are there, or raises:
then none of these blocks is published."""

Fill = Callable[[str, Sequence[bytes], Slots], None]
"""Writes the blocks of these keys into the slots of a tier. Returns when all bytes are there, or raises."""


class Stretch(NamedTuple):
    """`length` consecutive blocks of a prompt, the first of them its block number `first`, in one tier."""

    tier: str
    first: int
    length: int


@final
class Held:
    """What is held of one prompt. Nothing of it can be evicted until `drop`, or the end of a `with` block.

    Made by `Tiers.match`; `Tiers.promote` and `Tiers.store` add to it.
    """

    __slots__ = ("_leases", "prefix")

    def __init__(self) -> None:
        self.prefix: tuple[Stretch, ...] = ()
        """Where the longest prefix was found, from the prompt's first block on."""
        self._leases: list[tuple[int, str, Pinned]] = []

    def __len__(self) -> int:
        """Blocks of the prefix."""
        return self.prefix[-1].first + self.prefix[-1].length if self.prefix else 0

    def drop(self) -> None:
        """Let go of everything, so that in every tier the prompt's leaf goes before its root. FIFO alone takes what was
        held when its turn came as it is let go: stretch by stretch, that of the root first."""
        # Each lease is added to an eviction order when it is dropped, and what is added later goes later.
        self._leases.sort(key=lambda entry: entry[0])
        while self._leases:
            self._leases.pop()[2].drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.drop()


class Tiers:
    """Pools by the name of their tier, the fastest first, and the placement that says which block lives where.

    For each prompt: `match`, `promote` what was found below the fastest tier, `store` the rest, drop what is held.
    Every call ends after work that is bounded by the prompt, and nothing is ever waited for: what finds no room,
    because all else is held, is not stored. A tier that hands its victims down does so before it gives up their slots.

    A tier below the fastest that is in `admissions` takes only what its admission lets pass, of new blocks as of
    victims. What was not worth a copy when it was new is looked at again whenever a prompt with it is stored.

    One thread at a time; the pools may be used by others. Raises Misuse where the placement names a tier that is not
    below the one that evicts.
    """

    def __init__(
        self,
        pools: Mapping[str, Pool],
        placement: Placement,
        copy: Copy | None = None,
        admissions: Mapping[str, Admission] | None = None,
    ) -> None:
        if not pools:
            raise Misuse("there has to be at least one tier")
        self._pools = dict(pools)
        self._copy = copy
        self._admissions = dict(admissions or {})
        names = self._names = tuple(pools)
        self._stored = tuple(placement.store(names))
        self._once = frozenset(tier for tier in names[1:] if isinstance(placement.promote(tier, names), Drop))
        """Tiers that give up their copy of a block that is in the fastest one."""
        self._below: dict[str, str] = {}
        for place, tier in enumerate(names):
            if isinstance(fate := placement.evict(tier, names), Move):
                if fate.tier not in names[place + 1 :]:
                    raise Misuse(f"a block that leaves {tier} cannot go to {fate.tier}: it is no tier below")
                self._below[tier] = fate.tier

    def match(self, keys: Sequence[bytes]) -> Held:
        """Hold the longest prefix of the distinct `keys` of which each block is in a tier: in the fastest it is in."""
        for admission in self._admissions.values():
            admission.use(tags_of(keys))
        held, found, at, ended = Held(), [], 0, ""
        try:
            while at < len(keys):
                for tier, pool in self._pools.items():
                    # Where the last stretch ended there is no next block.
                    if tier != ended and len(lease := pool.match(keys, at)):
                        break
                else:
                    break
                held._leases.append((at, tier, lease))
                reach = self._reach(tier, keys, at, len(lease))
                ended = tier
                if reach < len(lease):
                    ended = ""
                    lease.narrow(reach)
                found.append(Stretch(tier, at, reach))
                at += reach
        except BaseException:
            held.drop()
            raise
        held.prefix = tuple(found)
        return held

    def presence(self, keys: Sequence[bytes]) -> dict[str, Mask]:
        """By tier, which of `keys` are there; holds nothing."""
        return {tier: pool.present(keys) for tier, pool in self._pools.items()}

    def promote(self, keys: Sequence[bytes], held: Held) -> int:
        """Copy what was found below the fastest tier up into it, root first, as far as there is room.

        The copies below stay or go as the placement says. Returns how many blocks were copied.
        """
        top, copied = self._names[0], 0
        for index, (first, tier, lease) in enumerate(tuple(held._leases)):
            if tier == top:
                continue
            writable = self._take(top, len(lease))
            if writable is None:
                break
            with writable:
                count = len(writable)
                if self._copy is not None:
                    self._copy(tier, lease.slots[:count], top, writable.slots)
                there = self._publish(writable, keys, first)
            copied += count
            if tier not in self._once:
                held._leases.append((first, top, there))
                continue
            held._leases[index] = (first, top, there)
            if count < len(lease):
                # What stays below stays held, by a lease of its own: a lease cannot be divided.
                held._leases.append((first + count, tier, self._pools[tier].scan(lease.keys[count:])[0]))
                lease.narrow(count)
            lease.evict()
        return copied

    def store(self, keys: Sequence[bytes], held: Held, fill: Fill | None = None) -> None:
        """Put the blocks after the prefix into the tiers where the placement wants new blocks, and hold them too.

        A block that a tier has already is held, not stored again. Of more blocks than there is room for in a tier, the
        first ones are stored. `fill` is called for each run of blocks before it is published; where a tier has an
        admission, also for blocks of the prefix that it did not let pass before.
        """
        start = len(held)
        for tier in self._stored:
            self._store(tier, keys, 0 if tier in self._admissions else start, held, fill)
        for first, tier, lease in held._leases:
            if tier == self._names[0] and first >= start:
                for below in self._once.difference(self._stored):
                    self._pools[below].discard(lease.keys)

    def _reach(self, tier: str, keys: Sequence[bytes], at: int, length: int) -> int:
        """How many of `length` blocks that are in `tier` come before the first that is in a faster one too."""
        for faster in self._names[: self._names.index(tier)]:
            pool = self._pools[faster]
            absent = set(pool.absent(keys[at : at + length]))
            if len(absent) < length:
                # What is not absent may be staged only.
                places = (n for n in range(1, length) if n not in absent and pool.peek([keys[at + n]]))
                length = next(places, length)
        return length

    def _store(self, tier: str, keys: Sequence[bytes], start: int, held: Held, fill: Fill | None) -> None:
        pool = self._pools[tier]
        absent = pool.absent(keys[start:])
        gaps = list(_gaps(absent, start))
        edges = [start, *(edge for gap in gaps for edge in gap), len(keys)]
        for first, end in zip(edges[::2], edges[1::2], strict=True):
            if first < end:  # there although a block before is not: it must not be evicted for what is missing
                held._leases.append((first, tier, pool.scan(keys[first:end])[0]))
        for first, end in _gaps(self._admitted(tier, keys[start:], absent), start):
            writable = self._take(tier, end - first)
            if writable is None:
                return
            count = len(writable)
            with writable:
                if fill is not None:
                    fill(tier, keys[first : first + count], writable.slots)
                held._leases.append((first, tier, self._publish(writable, keys, first)))
            if count < end - first:
                return

    def _take(self, tier: str, n: int) -> Writable | None:
        """Up to `n` slots; None where there is none. Victims are moved down first where the placement says so."""
        pool = self._pools[tier]
        if tier not in self._below and (writable := pool.allocate(n)) is not None:
            return writable
        free = pool.statistics().free
        if n > free:
            with pool.candidates(n - free) as victims:
                if tier in self._below:
                    self._demote(tier, victims)
                n = free + victims.evict()
        return pool.allocate(n) if n else None

    def _demote(self, tier: str, victims: Pinned) -> None:
        """Copy victims, the first to go last, to the tier below; there too they go in that order."""
        target, keys, parents = self._below[tier], victims.keys, victims.parents
        absent = self._admitted(target, keys, self._pools[target].absent(keys))
        for positions in reversed(list(_chains(parents, keys, absent))):
            writable = self._take(target, len(positions))
            if writable is None:
                return
            chosen = positions[: len(writable)]
            with writable:
                if self._copy is not None:
                    self._copy(tier, victims.slots[chosen], target, writable.slots)
                chain = [keys[at] for at in chosen]
                writable.stage(chain, parent=parents[chosen[0]]).register().drop()

    def _admitted(self, tier: str, keys: Sequence[bytes], absent: Sequence[int]) -> Sequence[int]:
        """Positions of the blocks that are `absent` in a tier and worth a copy."""
        if not absent or (admission := self._admissions.get(tier)) is None:
            return absent
        present = np.ones(len(keys), np.bool_)
        present[absent] = False
        return list(map(int, np.flatnonzero(admission.admit(tags_of(keys), present) & ~present)))

    def _publish(self, writable: Writable, keys: Sequence[bytes], first: int) -> Pinned:
        """Register the keys from `first` on in these slots."""
        parent = keys[first - 1] if first else None
        return writable.stage(keys[first : first + len(writable)], parent=parent).register()


def _chains(parents: Sequence[bytes | None], keys: Sequence[bytes], positions: Sequence[int]) -> Iterator[list[int]]:
    """Those `positions` of `keys` as runs that follow each other in a prompt."""
    chain: list[int] = []
    for at in positions:
        if chain and parents[at] != keys[chain[-1]]:
            yield chain
            chain = []
        chain.append(at)
    if chain:
        yield chain


def _gaps(positions: Sequence[int], offset: int) -> Iterator[tuple[int, int]]:
    """First and end of each run of consecutive positions, moved by `offset`."""
    first = 0
    for at in range(1, len(positions) + 1):
        if at == len(positions) or positions[at] != positions[at - 1] + 1:
            yield positions[first] + offset, positions[at - 1] + 1 + offset
            first = at
