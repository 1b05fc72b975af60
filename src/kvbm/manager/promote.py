"""What comes from disk (G3) to host memory (G2) for a request, before it is scheduled. Under the leader's lock.

The engine is promised only what is in G2 and verified. So the blocks of a request that are on disk are read into G2
from the moment it arrives, in prompt order, batch by batch. Until they are there the engine hears "ask again later", as
long as waiting for them is faster than computing them. What has arrived by then is loaded, the rest is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from kvbm.blocks import Pinned, Pool, Staged
from kvbm.core.events import Gated, Promoted
from kvbm.core.outcome import Outcome
from kvbm.core.region import Slots
from kvbm.manager.disk import DiskTier, Move
from kvbm.manager.requests import Record

_KEEP = 30.0
"""Seconds that what has arrived is held for a request that is not scheduled."""
_SOON = 0.05
"""Seconds that one move should take at most: what has arrived can be used, what is being read cannot."""
_SUSPECTS = 10_000
"""Blocks whose last read failed, that are remembered: the second time in a row a block counts as lost."""


@dataclass(slots=True, eq=False)
class Staging:
    """Blocks of one prompt on their way. `requests` wait for them; when that is empty nobody does."""

    keys: tuple[bytes, ...]
    """What G2 does not have, in prompt order."""
    parents: tuple[bytes | None, ...]
    terms: Sequence[tuple[int, float]]
    """Of each its priority, and when it ends."""
    slots: Slots
    source: Pinned | None
    """The same blocks on disk, until the last read has ended."""
    there: list[Pinned]
    """Blocks of the prompt in G2: those that were there, those that have arrived."""
    requests: dict[str, Record]
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
    """`most` blocks are held in G2 because of stagings, `in_flight` are being read, `batch` in one move, or `unmeasured`
    while nothing is known about the disk."""

    def __init__(
        self,
        tier: DiskTier,
        g2: Pool,
        *,
        exclusive: bool,
        most: int,
        in_flight: int,
        batch: int,
        unmeasured: int,
        emit: Callable[[Promoted | Gated], None],
        clock: Callable[[], float],
    ) -> None:
        self._tier, self._g2, self._exclusive = tier, g2, exclusive
        self._most, self._in_flight, self._batch = most, max(1, in_flight), max(1, min(batch, in_flight))
        self._unmeasured = max(1, unmeasured)
        self._emit, self._clock = emit, clock
        self._stagings: list[Staging] = []
        self._coming: dict[bytes, Staging] = {}
        """Blocks whose read has not ended."""
        self._suspects: set[bytes] = set()

    # ------------------------------------------------------------------ requests

    def begin(self, request: str, record: Record, keys: Sequence[bytes]) -> None:
        """Start to read what the request will want of `keys`: as far as each block is in G2 or on disk."""
        if self._tier.problem is not None or record.gated:
            return
        near, far = self._g2.present(keys), self._tier.pool.present(keys)
        gone = np.flatnonzero(~(near | far))
        reach = int(gone[0]) if len(gone) else len(keys)
        room = max(0, self._most - sum(staging.held for staging in self._stagings))
        wanted: list[bytes] = []
        before: list[bytes] = []
        for at in range(reach):
            if (other := self._coming.get(keys[at])) is not None:
                other.requests.setdefault(request, record)  # or it would end with the request it began for
                break  # asked for again when that has come
            if len(wanted) + len(before) == room:
                break
            (before if near[at] else wanted).append(keys[at])
        if not wanted:
            return
        # Whether that pays is not asked yet: it costs nothing while the request waits for its turn.
        source, _ = self._tier.pool.scan(wanted)
        priorities, left = source.terms  # now: they mean nothing once a block was un-published
        staging = Staging(
            source.keys, source.parents, list(zip(priorities.tolist(), (left + self._clock()).tolist(), strict=True)),
            source.slots, source, [self._g2.scan(before)[0]], {request: record},
        )  # fmt: skip
        self._stagings.append(staging)
        self._coming |= dict.fromkeys(staging.keys, staging)
        self._send(staging)

    def waits(self, request: str, record: Record, keys: Sequence[bytes]) -> bool:
        """Whether the request should ask again later, for the block of `keys[0]` (not in G2) and those after it."""
        if keys[0] not in self._coming:
            self.begin(request, record, keys)
        staging = self._coming.get(keys[0])
        if staging is None or record.gated:
            return False
        staging.requests.setdefault(request, record)
        self._send(staging)
        ahead = sum(other.left for other in self._stagings[: self._stagings.index(staging)])
        if (objection := self._tier.gate.objection(staging.left, ahead)) is not None:
            self._refuse(record, objection, staging.left)
        elif not staging.jobs and self._tier.gate.reading < self._in_flight:
            record.note("did not wait for blocks on disk: G2 has no room for them")
        elif self._tier.problem is None:
            record.note("waited for blocks that come from disk")
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
            if self._tier.problem is not None:
                self._abandon(staging)
            if not staging.left and self._clock() > staging.until:
                self._give_up(staging)
            else:
                self._send(staging)

    def _send(self, staging: Staging) -> None:
        """Read the next batches, as far as there are slots for them and room in flight."""
        while staging.sent < len(staging.keys) and self._tier.problem is None:
            soon = self._tier.gate.soon(_SOON) or self._unmeasured
            room = min(self._batch, soon, self._in_flight - self._tier.gate.reading)
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
            ended = partial(self._read, staging, slots, staged)
            staging.jobs.add(self._tier.read(slots, staged.keys, staged, ended))

    def _read(self, staging: Staging, slots: Slots, staged: Staged, move: Move) -> None:
        """A batch was read, or not."""
        keys = staged.keys
        staging.jobs.discard(move.id)
        staging.ended += len(keys)
        self._forget(staging, keys)
        there = staged.register(move.done)
        staging.there.append(there)
        staging.until = self._clock() + _KEEP
        if self._exclusive:
            self._tier.pool.discard(there.keys)
        self._judge(keys, slots, move)
        failed = int((~move.done).sum())
        if failed and move.wanted:
            for record in staging.requests.values():
                record.gated = True
                record.note(f"{failed} blocks could not be read from disk: {move.error}")
            self._abandon(staging)
        for record in staging.requests.values():
            record.staged += len(there)
        self._emit(Promoted(len(there), failed, move.nbytes, move.seconds))
        if staging.requests:
            self._let_go(staging)
        else:
            self._give_up(staging)

    def _judge(self, keys: Sequence[bytes], slots: Slots, move: Move) -> None:
        """What is not what was written is lost at once; what could not be read, the second time."""
        lost: dict[bytes, int] = {}
        for key, slot, outcome in zip(keys, slots.tolist(), move.outcomes.tolist(), strict=True):
            if outcome in _NOT_IT or (outcome != Outcome.DONE and move.wanted and key in self._suspects):
                lost[key] = slot
            elif outcome != Outcome.DONE and move.wanted and len(self._suspects) < _SUSPECTS:
                self._suspects.add(key)
            elif outcome == Outcome.DONE:
                self._suspects.discard(key)
        self._suspects.difference_update(lost)
        # Not what was written since, in another generation: that lies elsewhere, for this slot is still held.
        there = [key for key, slot in lost.items() if (block := self._tier.pool.look(key)) and block.slot == slot]
        if there:
            self._tier.discard(there)

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
        """The disk may have its slots back once nothing is read from them any more."""
        if not staging.left and staging.source is not None:
            staging.source.drop()
            staging.source = None

    def _give_up(self, staging: Staging) -> None:
        """Nobody wants it: stop reading. What is being read is let go when it ends."""
        self._abandon(staging)
        self._tier.cancel(staging.jobs)
        while staging.there:
            staging.there.pop().drop()
        if not staging.jobs and staging in self._stagings:
            self._stagings.remove(staging)


_NOT_IT = (Outcome.CORRUPT, Outcome.MISSING)
