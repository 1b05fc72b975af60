"""What comes to host memory (G2) for a request, before it is scheduled: from disk, from peers. Under the leader's lock.

The engine is promised only what is in G2 and verified. So the blocks of a request that are elsewhere are read into G2
from the moment it arrives, in prompt order, batch by batch. Until they are there the engine hears "ask again later", as
long as waiting for them is faster than computing them. What has arrived by then is loaded, the rest is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from kvbm.blocks import Either, Pinned, Staged, Where, prefix
from kvbm.core.events import Copied, Gated
from kvbm.core.region import Slots
from kvbm.observe.names import json_key
from kvbm.tiers.disk.tier import DiskSource
from kvbm.tiers.host import Host, Landing
from kvbm.tiers.moves import Passage
from kvbm.tiers.tier import Hold, Record, Source, Wanted

_KEEP = 30.0
"""Seconds that what has arrived is held for a request that is not scheduled."""
_SOON = 0.05
"""Seconds that one move should take at most: what has arrived can be used, what is being read cannot."""


@dataclass(slots=True, eq=False)
class Staging:
    """Blocks of one prompt on their way. `requests` wait for them; when that is empty nobody does."""

    source: Source
    keys: tuple[bytes, ...]
    """What G2 does not have, in prompt order."""
    parents: tuple[bytes | None, ...]
    terms: Sequence[tuple[int, float]]
    """Of each its priority, and when it ends."""
    slots: Slots
    lease: Hold | None
    """Keeps the same blocks at their source, until the last read has ended."""
    there: list[Pinned]
    """Blocks of the prompt in G2: those that were there, those that have arrived."""
    requests: dict[str, Record]
    worth: float = 1.0
    sent: int = 0
    ended: int = 0
    jobs: set[int] = field(default_factory=set)
    until: float = 0.0

    @property
    def left(self) -> int:
        """Blocks whose read has not ended."""
        return len(self.keys) - self.ended

    @property
    def held(self) -> int:
        """Slots of G2 that are taken, or will be, because of it."""
        return sum(map(len, self.there)) + self.left


class Promotion:
    """`most` blocks are held in G2 because of stagings and `in_flight` of one source are being read, `batch` in one
    move, or `unmeasured` while nothing is known about the source."""

    def __init__(
        self,
        disk: DiskSource | None,
        host: Host,
        *,
        most: Callable[[], int],
        in_flight: int,
        batch: int,
        unmeasured: int,
        emit: Callable[[Copied | Gated], None],
        clock: Callable[[], float],
    ) -> None:
        self._disk, self._host, self._g2 = disk, host, host.pool
        self._most, self._in_flight, self._batch = most, max(1, in_flight), max(1, min(batch, in_flight))
        self._unmeasured = max(1, unmeasured)
        self._emit, self._clock = emit, clock
        self._stagings: list[Staging] = []
        self._coming: dict[bytes, Staging] = {}
        """Blocks whose read has not ended."""

    @property
    def waiting(self) -> bool:
        """Whether anything is on its way."""
        return bool(self._coming)

    # ------------------------------------------------------------------ requests

    def begin(self, request: str, record: Record, wants: Wanted) -> int:
        """Start to read what the request wants, as far as each block is in G2 or on disk. Returns how far that is."""
        keys = wants.keys
        near = self._g2.present(keys)
        disk = self._readable(record)
        reach, room = prefix(near if disk is None else near | disk.pool.present(keys)), self.room
        wanted: list[bytes] = []
        before: list[bytes] = []
        for at in range(reach):
            if (other := self._coming.get(keys[at])) is not None:
                other.requests.setdefault(request, record)  # or it would end with the request it began for
                break  # asked for again when that has come
            if len(wanted) + len(before) == room:
                break
            (before if near[at] else wanted).append(keys[at])
        if disk is None or not wanted:
            return reach
        # Whether that pays is not asked yet: it costs nothing while the request waits for its turn.
        lease, _ = disk.pool.scan(wanted)
        priorities, left = lease.terms  # now: they mean nothing once a block was un-published
        terms = list(zip(priorities.tolist(), (left + self._clock()).tolist(), strict=True))
        requests = {request: record}
        self.stage(disk, lease.keys, lease.parents, terms, lease.slots, lease, before, requests, wants.worth)
        return reach

    @property
    def room(self) -> int:
        """Blocks of G2 that may still be held for requests that wait."""
        return self.room_for("")

    def room_for(self, request: str) -> int:
        """Blocks of G2 that may be held for this one, with those that are."""
        others = (staging.held for staging in self._stagings if request not in staging.requests)
        return max(0, self._most() - sum(others))

    def reachable(self, record: Record) -> Where:
        """What could be in G2 when this request is scheduled."""
        disk = self._readable(record)
        return self._g2 if disk is None else Either(self._g2, disk.pool)

    def _readable(self, record: Record) -> DiskSource | None:
        return self._disk if self._disk is not None and self._disk.problem is None and not record.gated else None

    def coming(self, key: bytes) -> bool:
        """Whether this block is on its way."""
        return key in self._coming

    def stage(
        self,
        source: Source,
        keys: tuple[bytes, ...],
        parents: tuple[bytes | None, ...],
        terms: Sequence[tuple[int, float]],
        slots: Slots,
        lease: Hold,
        before: Sequence[bytes],
        requests: dict[str, Record],
        worth: float = 1.0,
    ) -> None:
        """Start to read `keys`, none of which is in G2 or on its way, from these slots of a source. `before` are the
        blocks of the same prompt in G2, which are held meanwhile. `terms` are priorities, and ends by the clock."""
        staging = Staging(source, keys, parents, terms, slots, lease, [self._g2.scan(before)[0]], requests, worth)
        self._stagings.append(staging)
        self._coming |= dict.fromkeys(keys, staging)
        self._send(staging)

    def waits(self, request: str, record: Record, wants: Wanted) -> bool:
        """Whether the request should ask again later for what it wants, the first of which is not in G2."""
        first = wants.keys[0]
        if first not in self._coming:
            self.begin(request, record, wants)
        staging = self._coming.get(first)
        if staging is None or record.gated:
            return False
        staging.requests.setdefault(request, record)
        self._send(staging)
        source = staging.source
        ahead = sum(other.left for other in self._stagings[: self._stagings.index(staging)] if other.source is source)
        if (objection := source.gate.objection(staging.left, ahead, staging.worth)) is not None:
            self._refuse(record, objection, staging.left)
        elif not staging.jobs and source.gate.reading < self._in_flight:
            record.note(f"did not wait for blocks on {source.name}: G2 has no room for them")
        elif source.problem is None:
            record.note(f"waited for blocks that come from {source.name}")
            return True
        self.drop(request)
        return False

    def _refuse(self, record: Record, objection: str, blocks: int) -> None:
        record.gated = True
        record.note(f"gated: {objection}")
        self._emit(Gated(blocks))

    def drop(self, request: str) -> None:
        """The request got its blocks, or is gone: nothing is read or held for it any more."""
        for staging in [each for each in self._stagings if request in each.requests]:
            del staging.requests[request]
            if not staging.requests:
                self._give_up(staging)

    def clear(self) -> None:
        """A new generation: nothing that is on its way is wanted."""
        self._coming.clear()
        for staging in tuple(self._stagings):
            staging.requests.clear()
            self._give_up(staging)

    # ------------------------------------------------------------------ reading

    def pump(self) -> None:
        """Start what may start now; let go of what nobody came for."""
        for staging in tuple(self._stagings):
            if staging.source.problem is not None:
                self._abandon(staging)
            if not staging.left and self._clock() > staging.until:
                self._give_up(staging)
            else:
                self._send(staging)

    def _send(self, staging: Staging) -> None:
        """Read the next batches, as far as there are slots for them and room in flight."""
        source = staging.source
        while staging.sent < len(staging.keys) and source.problem is None:
            soon = source.gate.soon(_SOON) or self._unmeasured
            room = min(self._batch, soon, self._in_flight - source.gate.reading)
            if room <= 0:
                return
            first, terms = staging.sent, staging.terms
            end, most = first + 1, min(first + room, len(terms))
            while end < most and terms[end] == terms[first]:  # a run is staged on one set of terms
                end += 1
            if (raw := self._g2.allocate(end - first)) is None:
                return
            priority, until = terms[first]
            ttl = None if until == np.inf else max(until - self._clock(), 1e-3)
            staged = raw.stage(staging.keys[first:end], parent=staging.parents[first:end], priority=priority, ttl=ttl)
            staging.sent = end
            slots = staging.slots[first:end]
            staging.jobs.add(source.read(slots, staged, partial(self._read, staging, slots, staged)))

    def _read(self, staging: Staging, slots: Slots, staged: Staged, move: Passage) -> None:
        """A batch was read, or not."""
        keys, source = staged.keys, staging.source
        staging.jobs.discard(move.id)
        staging.ended += len(keys)
        self._forget(staging, keys)
        there = self._host.land(staged, move.done, Landing(source.tier, source.places(keys), move.sums))
        staging.there.append(there)
        staging.until = self._clock() + _KEEP
        source.judge(keys, slots, move)
        failed = int((~move.done).sum())
        if failed and move.wanted:
            for record in staging.requests.values():
                record.gated = True
                record.note(f"{failed} blocks could not be read from {source.name}: {move.error}")
            self._abandon(staging)
        for record in staging.requests.values():
            record.staged[json_key(source.tier)] = record.staged.get(json_key(source.tier), 0) + len(there)
        self._emit(Copied(source.tier, "g2", len(there), failed, move.nbytes, move.seconds))
        if staging.requests:
            self._let_go(staging)
        else:
            self._give_up(staging)

    def _forget(self, staging: Staging, keys: Sequence[bytes]) -> None:
        """These come no more with this staging."""
        for key in keys:
            if self._coming.get(key) is staging:
                del self._coming[key]

    def _abandon(self, staging: Staging) -> None:
        """Read no more of it than what is being read."""
        self._forget(staging, staging.keys[staging.sent :])
        staging.ended += len(staging.keys) - staging.sent
        staging.sent = len(staging.keys)
        self._let_go(staging)

    def _let_go(self, staging: Staging) -> None:
        """The source may have its slots back once nothing is read from them any more."""
        if not staging.left and staging.lease is not None:
            staging.lease.drop()
            staging.lease = None

    def _give_up(self, staging: Staging) -> None:
        """Nobody wants it: stop reading. What is being read is let go when it ends."""
        self._abandon(staging)
        staging.source.cancel(staging.jobs)
        if not staging.source.keep:
            self._g2.discard(staging.keys)  # what is being loaded is held, and goes after that
        while staging.there:
            staging.there.pop().drop()
        if not staging.jobs and staging in self._stagings:
            self._stagings.remove(staging)
