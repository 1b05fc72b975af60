"""What comes to host memory (G2) for a request, before it is scheduled: from any tier. Under the leader's lock.

The engine is promised only what is in G2 and verified. So the blocks of a request that are elsewhere are read into G2
from the moment it arrives, in prompt order, batch by batch. Until they are there the engine hears "ask again later", as
long as waiting for them is faster than computing them. What has arrived by then is loaded, the rest is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np

from kvbm.blocks import Pinned, Pool, Staged, Where, prefix
from kvbm.core.events import Copied, Gated
from kvbm.core.region import Slots
from kvbm.observe.names import json_key
from kvbm.tiers.gate import Gate
from kvbm.tiers.host import Host, Landing
from kvbm.tiers.moves import Passage
from kvbm.tiers.tier import Mask, Offer, Record, Seeker, Tier, Wanted

_T = TypeVar("_T")
_KEEP = 30.0
"""Seconds that what has arrived is held for a request that is not scheduled."""
_SOON = 0.05
"""Seconds that one move should take at most: what has arrived can be used, what is being read cannot."""


@dataclass(slots=True, eq=False)
class Staging:
    """Blocks of one prompt on their way. `requests` wait for them; when that is empty nobody does."""

    offer: Offer
    at: Slots
    """Places in the offer of what G2 does not have, in prompt order."""
    there: list[Pinned]
    """Blocks of the prompt in G2: those that were there, those that have arrived."""
    requests: dict[str, Record]
    worth: float = 1.0
    kept: bool = True
    """Whether the offer is still to be dropped: when the last read has ended."""
    sent: int = 0
    ended: int = 0
    jobs: set[int] = field(default_factory=set)
    until: float = 0.0

    def keys(self, part: slice = slice(None)) -> tuple[bytes, ...]:
        """Of what is on its way, or of a part of it."""
        return _at(self.offer.keys, self.at[part])

    @property
    def left(self) -> int:
        """Blocks whose read has not ended."""
        return len(self.at) - self.ended

    @property
    def held(self) -> int:
        """Slots of G2 that are taken, or will be, because of it."""
        return sum(map(len, self.there)) + self.left


class Promotion:
    """`most` blocks are held in G2 because of stagings and `in_flight` of one gate's offers are being read, `batch` in
    one move, or `unmeasured` while nothing is known about their place."""

    def __init__(
        self,
        host: Host,
        *,
        most: Callable[[], int],
        in_flight: int,
        batch: int,
        unmeasured: int,
        emit: Callable[[Copied | Gated], None],
        clock: Callable[[], float],
    ) -> None:
        self._host, self._g2 = host, host.pool
        self._most, self._in_flight, self._batch = most, max(1, in_flight), max(1, min(batch, in_flight))
        self._unmeasured = max(1, unmeasured)
        self._emit, self._clock = emit, clock
        self.stagings: list[Staging] = []
        """Blocks that are being read for requests, or wait for that, in order."""
        self._coming: dict[bytes, Staging] = {}
        """Blocks whose read has not ended."""

    @property
    def waiting(self) -> bool:
        """Whether anything is on its way."""
        return bool(self._coming)

    # ------------------------------------------------------------------ requests

    def begin(self, seeker: Seeker, wants: Wanted, tiers: Sequence[Tier]) -> int:
        """Start to read what the request wants, as far as each block is in G2 or in a tier that knows what it has.
        Returns how far that is."""
        keys = wants.keys
        near, known = self._g2.present(keys), self._covered(seeker.record, keys, tiers)
        anywhere = near.copy()
        for _, mask in known:
            anywhere |= mask
        reach, coming = prefix(anywhere), self._coming
        if not reach:
            return 0
        end = min(reach, self.room)
        if coming:
            first = next((at for at in range(reach) if keys[at] in coming), reach)
            if first < reach and first <= end:
                end = first  # asked for again when that has come
                # Or that would end with the request it began for.
                coming[keys[first]].requests.setdefault(seeker.id, seeker.record)
        taken = near[:end].copy()
        before = [keys[at] for at in np.flatnonzero(taken).tolist()]
        for tier, mask in known:
            its = mask[:end] & ~taken
            if its.any():
                taken |= its
                wanted = [keys[at] for at in np.flatnonzero(its).tolist()]
                # Whether that pays is not asked yet: it costs nothing while the request waits for its turn.
                tier.seek(seeker, wanted, None, partial(self._take, seeker, before, wants.worth))
                before = []
        return reach

    def _covered(self, record: Record, keys: Sequence[bytes], tiers: Sequence[Tier]) -> list[tuple[Tier, Mask]]:
        """Tiers that know which of these they have, and are to be read from."""
        if record.gated:
            return []
        masks = [(tier, tier.covers(keys)) for tier in tiers if tier.problem is None]
        return [(tier, mask) for tier, mask in masks if mask is not None]

    def _take(self, seeker: Seeker, before: Sequence[bytes], worth: float, offer: Offer) -> bool:
        self._stage(offer, np.arange(len(offer.keys)), before, {seeker.id: seeker.record}, worth)
        return True

    def give(self, seeker: Seeker, offer: Offer) -> bool:
        """Read what G2 lacks of an offer that came later, as far as there is room; False where that is nothing."""
        near = self._g2.present(offer.keys)
        wanted = [at for at, key in enumerate(offer.keys) if not near[at] and key not in self._coming]
        before = [key for at, key in enumerate(offer.keys) if near[at]]
        wanted = wanted[: max(0, self.room - len(before))]
        if not wanted:
            return False
        self._stage(offer, np.array(wanted), before, {seeker.id: seeker.record}, 1.0)
        return True

    @property
    def room(self) -> int:
        """Blocks of G2 that may still be held for requests that wait."""
        return self.room_for("")

    def room_for(self, request: str) -> int:
        """Blocks of G2 that may be held for this one, with those that are."""
        others = (staging.held for staging in self.stagings if request not in staging.requests)
        return max(0, self._most() - sum(others))

    def reachable(self, record: Record, tiers: Sequence[Tier]) -> Where:
        """What could be in G2 when this request is scheduled."""
        return _Reachable(lambda keys: self._covered(record, keys, tiers), self._g2)

    def coming(self, key: bytes) -> bool:
        """Whether this block is on its way."""
        return key in self._coming

    def _stage(
        self, offer: Offer, at: Slots, before: Sequence[bytes], requests: dict[str, Record], worth: float
    ) -> None:
        """Start to read these places of an offer, none of which is in G2 or on its way. `before` are the blocks of the
        same prompt in G2, which are held meanwhile."""
        offer.accept()
        staging = Staging(offer, at, [self._g2.scan(before)[0]], requests, worth)
        self.stagings.append(staging)
        self._coming |= dict.fromkeys(staging.keys(), staging)
        self._send(staging)

    def waits(self, seeker: Seeker, wants: Wanted, tiers: Sequence[Tier]) -> bool:
        """Whether the request should ask again later for what it wants, the first of which is not in G2."""
        first, record = wants.keys[0], seeker.record
        if first not in self._coming:
            self.begin(seeker, wants, tiers)
        staging = self._coming.get(first)
        if staging is None or record.gated:
            return False
        staging.requests.setdefault(seeker.id, record)
        self._send(staging)
        offer = staging.offer
        before = self.stagings[: self.stagings.index(staging)]
        ahead = sum(other.left for other in before if other.offer.queue is offer.queue)
        if (objection := offer.gate.objection(staging.left, ahead, staging.worth)) is not None:
            self._refuse(record, objection, staging.left)
        elif not staging.jobs and offer.gate.reading < self._may_read(offer.gate):
            record.note(f"the request did not wait for blocks on {offer.words}: G2 has no room for them")
        elif offer.failing() is None:
            record.note(f"the request waited for blocks that come from {offer.words}")
            return True
        self.drop(seeker.id)
        return False

    def _refuse(self, record: Record, objection: str, blocks: int) -> None:
        record.gated = True
        record.note(f"gated: {objection}")
        self._emit(Gated(blocks))

    def drop(self, request: str) -> None:
        """The request got its blocks, or is gone: nothing is read or held for it any more."""
        for staging in [each for each in self.stagings if request in each.requests]:
            del staging.requests[request]
            if not staging.requests:
                self._give_up(staging)

    def clear(self) -> None:
        """A new generation: nothing that is on its way is wanted."""
        self._coming.clear()
        for staging in tuple(self.stagings):
            staging.requests.clear()
            self._give_up(staging)

    # ------------------------------------------------------------------ reading

    def pump(self) -> None:
        """Start what may start now; let go of what nobody came for."""
        for staging in tuple(self.stagings):
            if staging.offer.failing() is not None:
                self._abandon(staging)
            if not staging.left and self._clock() > staging.until:
                self._give_up(staging)
            else:
                self._send(staging)

    def _send(self, staging: Staging) -> None:
        """Read the next batches, as far as there are slots for them and room in flight."""
        offer = staging.offer
        while staging.sent < len(staging.at) and offer.failing() is None:
            part = self._run(offer, staging.at[staging.sent : staging.sent + self._next(staging)])
            if not len(part):
                return
            if (raw := self._g2.allocate(len(part))) is None:
                return
            priority, until = offer.terms[part[0]]
            staged = raw.stage(
                _at(offer.keys, part),
                parent=_at(offer.parents, part),
                priority=priority,
                ttl=None if until == np.inf else max(until - self._clock(), 1e-3),
            )
            staging.sent += len(part)
            staging.jobs.add(offer.read(part, staged, partial(self._read, staging, part, staged)))

    def _next(self, staging: Staging) -> int:
        """How many blocks are read next, if any may be now: up to the next cut where there are cuts, whatever else
        bounds a read, since the whole part comes in any case."""
        gate, cuts = staging.offer.gate, staging.offer.cuts
        if cuts is None:
            left = self._may_read(gate) - gate.reading
            return max(0, min(self._batch, gate.soon(_SOON) or self._unmeasured, left))
        first = int(staging.at[staging.sent])
        end = next(cut for cut in cuts if cut > first)
        count = int(np.searchsorted(staging.at[staging.sent :], end))
        return count if not gate.reading or gate.reading + count <= self._may_read(gate) else 0

    def _may_read(self, gate: Gate) -> int:
        """Blocks that may be on their way at once."""
        return self._in_flight if gate.most is None else gate.most

    @staticmethod
    def _run(offer: Offer, at: Slots) -> Slots:
        """The first of these that can be staged together: on one set of terms."""
        terms = _at(offer.terms, at)
        if not terms or terms.count(terms[0]) == len(terms):
            return at
        return at[: next(count for count, each in enumerate(terms) if each != terms[0])]

    def _read(self, staging: Staging, part: Slots, staged: Staged, move: Passage) -> None:
        """A batch was read, or not."""
        keys, offer = staged.keys, staging.offer
        staging.jobs.discard(move.id)
        staging.ended += len(keys)
        self._forget(staging, keys)
        places = None if offer.places is None else offer.places[part]
        there = self._host.land(staged, move.done, Landing(offer.tier, places, move.sums, move.priority))
        staging.there.append(there)
        staging.until = self._clock() + _KEEP
        offer.judge(part, move)
        failed = int((~move.done).sum())
        if failed and move.wanted:
            for record in staging.requests.values():
                record.gated = True
                record.note(f"{failed} blocks could not be read from {offer.words}: {move.error}")
            self._abandon(staging)
        for record in staging.requests.values():
            name = json_key(offer.tier)
            record.staged[name] = record.staged.get(name, 0) + len(there)
        self._emit(Copied(offer.tier, "g2", len(there), failed, move.nbytes, move.seconds))
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
        self._forget(staging, staging.keys(slice(staging.sent, None)))
        staging.ended += len(staging.at) - staging.sent
        staging.sent = len(staging.at)
        self._let_go(staging)

    def _let_go(self, staging: Staging) -> None:
        """The offer is over once nothing is read of it any more."""
        if not staging.left and staging.kept:
            staging.kept = False
            staging.offer.drop()

    def _give_up(self, staging: Staging) -> None:
        """Nobody wants it: stop reading. What is being read is let go when it ends."""
        self._abandon(staging)
        staging.offer.cancel(staging.jobs)
        if not staging.offer.keeps:
            self._g2.discard(staging.keys())  # what is being loaded is held, and goes after that
        while staging.there:
            staging.there.pop().drop()
        if not staging.jobs and staging in self.stagings:
            self.stagings.remove(staging)


def _at(values: Sequence[_T], at: Slots) -> tuple[_T, ...]:
    """The values at these places, which ascend."""
    first, end = (int(at[0]), int(at[-1]) + 1) if len(at) else (0, 0)
    return tuple(values[first:end] if end - first == len(at) else [values[place] for place in at.tolist()])


class _Reachable:
    """What is in host memory, or in a tier that knows what it has (`Where`)."""

    def __init__(self, covered: Callable[[Sequence[bytes]], list[tuple[Tier, Mask]]], g2: Pool) -> None:
        self._covered, self._g2 = covered, g2

    def present(self, keys: Sequence[bytes]) -> Mask:
        """See `Where`."""
        there: Mask = self._g2.present(keys)
        for _, mask in self._covered(keys):
            there = there | mask
        return there

    def peek(self, keys: Sequence[bytes]) -> int:
        """See `Where`."""
        return prefix(self.present(keys))
