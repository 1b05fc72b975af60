"""Other instances' blocks for our requests. Under the leader's lock, but for what says otherwise.

A request that wants more than is here has the network look for it from the moment it arrives. What a peer promises is
read into host memory as the disk's blocks are (`tiers/promote.py`); the engine is promised what has arrived.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kvbm.blocks import Pool, Staged
from kvbm.core.region import Slots
from kvbm.leader.requests import Request
from kvbm.link.channel import Link
from kvbm.link.messages import Result, pack, unpack
from kvbm.tiers.gate import Gate
from kvbm.tiers.host import Landing
from kvbm.tiers.moves import Ended, Moves
from kvbm.tiers.peers.client import Client
from kvbm.tiers.peers.messages import Memory, Promise, Slab
from kvbm.tiers.peers.network import Network, Search
from kvbm.tiers.peers.offer import Lease, PeerSource
from kvbm.tiers.peers.orders import Attach, Detach, Mine, Pull, decode_answer, to_rank
from kvbm.tiers.peers.published import Published
from kvbm.tiers.peers.serving import Serving
from kvbm.tiers.peers.sums import bound
from kvbm.tiers.promote import Promotion

log = logging.getLogger(__name__)

_WORTH_S: Final = 0.005
"""What is computed in less is not looked for: asking takes about a millisecond."""
_LEAST_S: Final = 0.05
"""Blocks that are on their way are waited for at least so long: what is busy for a moment is not dead."""
_TOP: Final = 100
"""The highest priority."""
_MOST_SLOTS: Final = 1 << 29
_TOP_ADDRESS: Final = 1 << 62


@dataclass(slots=True, eq=False)
class Peer:
    """What is known of one that was read from. `attached` names its memory as the workers know it."""

    gate: Gate
    attached: str | None = None


@dataclass(slots=True, eq=False)
class Sought:
    """A request that looks for blocks elsewhere."""

    request: Request
    search: Search
    until: float
    patient: bool
    """Whether it waits for what a peer computes."""


class Peers:
    """`deadline_s` is the longest that a peer may be silent; `patience_s` the longest that a request waits for what a
    peer computes for it; `keep` whether what came stays in host memory. Also what the network tells what it finds
    (`network.Asker`)."""

    def __init__(
        self,
        network: Network,
        serving: Serving,
        published: Published,
        promotion: Promotion,
        pool: Pool,
        gate: Gate,
        links: Mapping[int, Link],
        *,
        deadline_s: float,
        patience_s: float,
        keep: bool,
        next_id: Callable[[], int],
        lock: Callable[[], AbstractContextManager[object]],
        clock: Callable[[], float],
    ) -> None:
        self.network, self.serving, self.published = network, serving, published
        self.clock = clock
        self._promotion, self._pool, self._gate = promotion, pool, gate
        self._deadline_s, self._patience_s, self._lock = deadline_s, patience_s, lock
        self._moves = Moves(links, next_id, clock)
        self.keep = keep
        self.corrupt = 0
        """Blocks that came and were not what had been promised."""
        self.searches = self.found = 0
        """Searches that began; promises that were used."""
        self._peers: dict[str, Peer] = {}
        self._sought: dict[str, Sought] = {}
        self._numbers = itertools.count(1)
        self._mine: dict[int, Mine] = {}
        self._closed: str | None = None
        network.asker = self

    @property
    def _ranks(self) -> list[int]:
        """In the order in which instances speak of them."""
        return sorted(self._moves.links)

    # ------------------------------------------------------------------ requests

    def begin(self, request: Request, keys: Sequence[bytes], reach: int) -> None:
        """Look for `keys` from `reach` on, once for each request."""
        source = request.params.pull_from
        if reach >= len(keys) or request.record.gated or request.id in self._sought or self.problem is not None:
            return
        if not self.network.peers or self._promotion.coming(keys[reach]):
            return
        seconds = self._patience_s if source is not None else self._within(len(keys) - reach)
        if seconds < _WORTH_S:
            return
        search = Search(next(self._numbers), list(keys[reach:]), reach, seconds, source)
        self._sought[request.id] = Sought(request, search, self.clock() + seconds, source is not None)
        self.searches += 1
        self.network.search(search)

    def _within(self, blocks: int) -> float:
        """How long to wait for so many blocks: no longer than it takes to compute them."""
        computing = self._gate.computing_s(blocks)
        return self._deadline_s if computing is None else min(self._deadline_s, computing)

    def due(self, blocks: int) -> float:
        """When a peer from which so many are read counts as dead."""
        return self.clock() + max(self._within(blocks), _LEAST_S)

    def waits(self, request: Request, keys: Sequence[bytes], at: int) -> bool:
        """Whether the request should ask again later, since peers may have `keys`, block `at` and following."""
        if request.id not in self._sought and self.network.peers:
            self.begin(request, request.keys[: at + len(keys)], at)
        sought = self._sought.get(request.id)
        if sought is None or sought.search.ended or request.record.gated:
            return False
        if self.clock() > sought.until:
            request.record.note("did not wait any longer for other instances")
            self._end(sought)
            return False
        request.record.note("waited for other instances")
        return True

    @property
    def waiting(self) -> bool:
        """Whether a request waits for the network."""
        return any(not sought.search.ended for sought in self._sought.values())

    def drop(self, request: str) -> None:
        """The request got its blocks, or is gone."""
        if (sought := self._sought.pop(request, None)) is not None:
            self._end(sought)

    @staticmethod
    def _end(sought: Sought) -> None:
        sought.search.ended = True

    # ------------------------------------------------------------------ what the network finds (on its thread)

    def promised(self, search: Search, client: Client, promise: Promise, memory: Memory, start: int) -> bool:
        """See `Asker`. Takes the lock."""
        with self._lock():
            sought = next((each for each in self._sought.values() if each.search is search), None)
            if sought is None or search.ended or self._closed is not None:
                return False
            return self._stage(sought, client, promise, memory, start)

    def _stage(self, sought: Sought, client: Client, promise: Promise, memory: Memory, start: int) -> bool:
        request = sought.request
        keys = tuple(request.keys[start : start + promise.count])
        if not _makes_sense(promise, memory, len(keys), len(self._ranks)):
            self.network.failed(client, "its promise does not make sense")
            return False
        sums = [np.frombuffer(each, np.uint64) for each in promise.sums]
        slots, ttls = unpack(promise.slots), np.frombuffer(promise.ttls, np.float64)
        priorities = np.frombuffer(promise.priorities, np.uint8)
        near = self._pool.present(keys)
        wanted = [at for at, key in enumerate(keys) if not near[at] and not self._promotion.coming(key)]
        before = [key for at, key in enumerate(keys) if near[at]]
        wanted = wanted[: max(0, self._promotion.room - len(before))]
        if not wanted:
            return False
        self.found += 1
        at, now = np.array(wanted), self.clock()
        peer = self._peers.setdefault(client.name, Peer(self._gate.beside()))
        source = PeerSource(
            self, client, peer.gate, self._attach(peer, client, memory),
            {int(slots[place]): place for place in wanted}, [bound(each, keys) for each in sums],
            {keys[place]: start + place for place in wanted},
            until=now + promise.seconds, keep=self.keep,
            limit=math.inf if sought.patient else max(sought.until, now + _LEAST_S),
        )  # fmt: skip
        parents = tuple(request.keys[start + place - 1] if start + place else None for place in wanted)
        terms = [(int(priorities[place]), now + float(ttls[place])) for place in wanted]
        self._promotion.stage(
            source, tuple(keys[place] for place in wanted), parents, terms, slots[at],
            Lease(self.network, client, promise.lease), before, {request.id: request.record},
        )  # fmt: skip
        return True

    def _attach(self, peer: Peer, client: Client, memory: Memory) -> str:
        """Have the workers know the peer's memory; by what name they do."""
        name = f"{client.name}/{client.instance.incarnation:x}/{memory.number}/{client.connections}"
        if peer.attached != name:
            for rank, slab in zip(self._ranks, memory.slabs, strict=True):
                attach = Attach(name, slab.metadata, slab.address, slab.stride, slab.slots, peer.attached)
                self._moves.tell_rank(rank, to_rank(attach))
            peer.attached = name
            peer.gate.forget_reads()
        return name

    # ------------------------------------------------------------------ reading

    def pull(self, source: PeerSource, slots: Slots, into: Staged, ended: Ended) -> int:
        """Copy a peer's slots to those of host memory, which the caller holds; returns the passage's number. It ends
        when nothing writes to them any more, however long that takes."""
        passage = self._moves.read(len(slots), ended, source.gate)
        rows = [source.rows[slot] for slot in slots.tolist()]
        for rank, sums in zip(self._ranks, source.sums, strict=True):
            theirs = np.ascontiguousarray(sums[rows]).tobytes()
            pull = Pull(passage.id, source.attached, pack(slots), pack(into.slots), theirs)
            self._moves.tell_rank(rank, to_rank(pull))
        return passage.id

    def cancel(self, jobs: Collection[int]) -> None:
        """Nobody wants these any more. They end all the same, when nothing writes to their slots any more."""
        self._moves.cancel(jobs)

    def answer(self, result: Result) -> bool:
        """Takes one rank's result; False where it is about none of these."""
        return self._moves.answer(result)

    def landing(self, slots: Slots, keys: Sequence[bytes], how: Landing) -> None:
        """Blocks are about to be published in host memory: whoever is promised them has to know their checksums."""
        self.serving.sums.note(slots, keys, how.sums)

    def landed(self, keys: Sequence[bytes], how: Landing) -> None:
        """They are published: what comes from the disk has been known since it was new."""
        if how.places is not None:
            self.published.stored(keys, how.places)

    def failed(self, source: PeerSource, problem: str) -> None:
        """A peer's blocks do not come: it is left alone until it answers a probe, and its memory is attached anew."""
        self.network.failed(source.client, problem)

    def counts(self) -> dict[str, int]:
        """What is not a copy."""
        return {
            "searches": self.searches, "found": self.found, "peer_corrupt": self.corrupt,
            "promised": self.serving.promised, "lapsed": self.serving.lapsed, "entries": len(self.published),
        }  # fmt: skip

    def known(self) -> dict[str, dict[str, Any]]:
        """Instances that live, by name: whether they are asked, and blocks per second that came from them."""
        usable = self.network.usable()
        return {
            name: {"usable": works, "read_blocks_per_s": peer.gate.rates()["read_blocks_per_s"] if peer else None}
            for name, works in usable.items()
            for peer in (self._peers.get(name),)
        }

    def in_flight(self) -> int:
        """Reads that some rank has not answered."""
        return sum(self._moves.count())

    # ------------------------------------------------------------------ our memory, and the end

    def hear(self, body: bytes) -> None:
        """Where a rank's memory is now."""
        message = decode_answer(body)
        self._mine[message.rank] = message
        ranks = [self._mine.get(rank) for rank in self._ranks]
        slabs = [Slab(each.metadata, each.address, each.stride, each.slots) for each in ranks if each is not None]
        if any(each is not None and each.problem for each in ranks):
            log.error("KVBM: rank %d shares nothing with other instances: %s", message.rank, message.problem)
            self._close(message.problem or "a rank cannot share its memory")
        elif len(slabs) == len(self._ranks):
            server = self.network.server
            server.slabs = server.slabs[0] + 1, slabs

    @property
    def problem(self) -> str | None:
        """Why nothing is shared; None while it is."""
        return self._closed or self.network.problem

    def tick(self) -> None:
        """A few times a second: promises end, and the dead are forgotten."""
        self.serving.tick()
        if self.network.problem is None:
            for name in sorted(self._peers.keys() - set(self.network.peers)):
                self._forget(name)

    def _forget(self, name: str) -> None:
        """A peer's lease has ended. Names may be made up anew at every start, so nothing of it is kept."""
        if self._peers[name].gate.reading:
            return
        if (attached := self._peers.pop(name).attached) is not None:
            self._moves.tell(to_rank(Detach(attached)))

    def stand_aside(self) -> None:
        """Nothing is looked for."""
        for sought in self._sought.values():
            self._end(sought)

    def clear(self) -> None:
        """A new generation. Whether others have begun it too is not known, so this instance shares nothing any more."""
        if self._closed is None:
            log.warning("KVBM: a reset began a new generation: until it is started anew this engine shares no blocks")
            self._close("a reset began a new generation")

    def leave(self, why: str) -> None:
        """Share nothing any more, and take back what the directory says of us."""
        if self._closed is None:
            self._close(why)

    def _close(self, why: str) -> None:
        self._closed = why
        self.stand_aside()
        self.serving.close()
        self.network.leave()

    def close(self) -> None:
        """The process is about to end."""
        self._closed = self._closed or "the engine ends"
        self.serving.close()


def _makes_sense(promise: Promise, memory: Memory, count: int, ranks: int) -> bool:
    """Whether a promise of so many blocks can be used: what others say is looked at before anything is done with it."""
    words = {len(promise.priorities) * 8, len(promise.ttls), len(promise.slots) * 2, *map(len, promise.sums)}
    if not count or words != {count * 8} or not ranks == len(promise.sums) == len(memory.slabs):
        return False
    slots, ttls = unpack(promise.slots), np.frombuffer(promise.ttls, np.float64)
    return (
        max(promise.priorities) <= _TOP
        and not np.isnan(ttls).any()
        and promise.seconds >= 0
        and int(slots.min()) >= 0
        and all(int(slots.max()) < slab.slots and _can_be(slab) for slab in memory.slabs)
    )


def _can_be(slab: Slab) -> bool:
    """Whether this can be memory of a process."""
    return 0 < slab.slots <= _MOST_SLOTS and slab.stride > 0 < slab.address < _TOP_ADDRESS - slab.slots * slab.stride
