"""Other instances' blocks for our requests. Under the leader's lock, but for what says otherwise.

A request that wants more than is here has the network look for it from the moment it arrives. What a peer promises is
read into host memory as the disk's blocks are (`tiers/promote.py`); the engine is promised what has arrived.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Final
from weakref import WeakValueDictionary

import numpy as np

from kvbm.blocks import Staged
from kvbm.core.region import Slots
from kvbm.link.channel import Link
from kvbm.link.messages import Result, pack, unpack
from kvbm.tiers.gate import Gate
from kvbm.tiers.host import Landing
from kvbm.tiers.moves import Ended, Moves
from kvbm.tiers.peers.client import Client
from kvbm.tiers.peers.messages import Memory, Promise, Slab
from kvbm.tiers.peers.network import Network, PeerSearch
from kvbm.tiers.peers.offer import Counted, PeerOffer
from kvbm.tiers.peers.orders import TIER, Attach, Detach, Pull, Shared, decode_answer, to_rank
from kvbm.tiers.peers.published import Published
from kvbm.tiers.peers.serving import Serving
from kvbm.tiers.sums import bound
from kvbm.tiers.tier import Give, Record, Seeker

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


class Patience:
    """How long blocks of other instances are waited for. `gate` knows how fast the engine computes; `deadline_s` is the
    longest that a peer may be silent; `pull_s` the longest that a request waits for what a peer computes for it."""

    def __init__(self, gate: Gate, clock: Callable[[], float], *, deadline_s: float, pull_s: float) -> None:
        self.gate, self.clock, self._deadline_s, self._pull_s = gate, clock, deadline_s, pull_s

    def search_s(self, blocks: int, *, pulls: bool) -> float:
        """Of a search for so many blocks."""
        return self._pull_s if pulls else self._within(blocks)

    def due(self, blocks: int) -> float:
        """When a peer from which so many are read counts as dead."""
        return self.clock() + max(self._within(blocks), _LEAST_S)

    def _within(self, blocks: int) -> float:
        """No longer than it takes to compute them."""
        computing = self.gate.computing_s(blocks)
        return self._deadline_s if computing is None else min(self._deadline_s, computing)


class Searches:
    """Those that somebody still knows, by number, and how many were `begun`."""

    def __init__(self) -> None:
        self._known: WeakValueDictionary[int, PeerSearch] = WeakValueDictionary()
        self.begun = 0

    def number(self) -> int:
        """Of the next."""
        return self.begun + 1

    def begin(self, search: PeerSearch) -> None:
        self.begun = search.id
        self._known[search.id] = search

    @property
    def going(self) -> list[PeerSearch]:
        """Searches that go on."""
        return [search for search in tuple(self._known.values()) if not search.ended]


class Peers:
    """Other instances as a tier (`Tier`). `keeps`: whether what came stays in host memory."""

    name: ClassVar[str] = TIER
    words: ClassVar[str] = "other instances"

    def __init__(
        self,
        network: Network,
        serving: Serving,
        published: Published,
        patience: Patience,
        links: Mapping[int, Link],
        *,
        keeps: bool,
        next_id: Callable[[], int],
        lock: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self.network, self.serving, self.published, self.patience = network, serving, published, patience
        self.keeps, self._lock = keeps, lock
        self._moves = Moves(links, next_id, patience.clock)
        self.counted = Counted()
        self.sought = Searches()
        self.peers: dict[str, Peer] = {}
        """Those that were read from and live, by name."""
        self._mine: dict[int, Shared] = {}
        self._closed: str | None = None

    @property
    def searches(self) -> int:
        """Searches that began."""
        return self.sought.begun

    @property
    def found(self) -> int:
        """Promises that were used."""
        return self.counted.promises

    @property
    def corrupt(self) -> int:
        """Blocks that came and were not what had been promised."""
        return self.counted.corrupt

    @property
    def _ranks(self) -> list[int]:
        """In the order in which instances speak of them."""
        return sorted(self._moves.links)

    # ------------------------------------------------------------------ requests

    def covers(self, keys: Sequence[bytes]) -> None:
        """The directory knows, and it is asked."""

    def seek(self, seeker: Seeker, keys: Sequence[bytes], first: int | None, give: Give) -> PeerSearch | None:
        assert first is not None  # it covers no keys
        if self.problem is not None or not self.network.peers:
            return None
        seconds = self.patience.search_s(len(keys), pulls=seeker.pull_from is not None)
        if seconds < _WORTH_S:
            return None
        search = PeerSearch(
            self.sought.number(), seeker, keys, first, give, seconds=seconds,
            until=self.patience.clock() + seconds, found=self._promised,
        )  # fmt: skip
        self.sought.begin(search)
        self.network.search(search)
        return search

    def asked(self, keys: Sequence[bytes]) -> None:
        """Others keep account of their own."""

    def over(self, keys: Sequence[bytes], record: Record) -> None:
        """The same."""

    # ------------------------------------------------------------------ what the network finds (on its thread)

    def _promised(self, search: PeerSearch, client: Client, promise: Promise, memory: Memory, start: int) -> bool:
        """See `Found`. Takes the lock."""
        with self._lock():
            if search.ended or self._closed is not None:
                return False
            keys = search.seeker.keys[start : start + promise.count]
            if not _makes_sense(promise, memory, len(keys), len(self._ranks)):
                self.network.failed(client, "its promise does not make sense")
                return False
            offer = self._offer(search, client, promise, memory, keys, start)
            if not search.give(offer):
                return False
            self.counted.promises += 1
            return True

    def _offer(
        self, search: PeerSearch, client: Client, promise: Promise, memory: Memory, keys: Sequence[bytes], start: int
    ) -> PeerOffer:
        now, count, known = self.patience.clock(), len(keys), self.peers.get(client.name)
        priorities, ttls = np.frombuffer(promise.priorities, np.uint8), np.frombuffer(promise.ttls, np.float64)
        before = search.seeker.keys[start - 1] if start else None
        return PeerOffer(
            self, client, known.gate if known is not None else self.patience.gate.beside(), self.keeps, memory,
            keys, [before, *keys[:-1]], [(int(priorities[at]), now + float(ttls[at])) for at in range(count)],
            np.arange(start, start + count), unpack(promise.slots),
            [bound(np.frombuffer(each, np.uint64), keys) for each in promise.sums], promise.lease,
            until=now + promise.seconds,
            limit=math.inf if search.peer is not None else max(search.until, now + _LEAST_S),
        )  # fmt: skip

    def attach(self, client: Client, memory: Memory, gate: Gate) -> str:
        """Have the workers know the peer's memory; by what name they do. `gate` is new where the peer is."""
        peer = self.peers.setdefault(client.name, Peer(gate))
        name = f"{client.name}/{client.instance.incarnation:x}/{memory.number}/{client.connections}"
        if peer.attached != name:
            for rank, slab in zip(self._ranks, memory.slabs, strict=True):
                attach = Attach(name, slab.metadata, slab.address, slab.stride, slab.slots, peer.attached)
                self._moves.tell_rank(rank, to_rank(attach))
            peer.attached = name
            peer.gate.forget_reads()
        return name

    # ------------------------------------------------------------------ reading

    def pull(self, offer: PeerOffer, at: Slots, into: Staged, ended: Ended) -> int:
        """Copy a peer's slots to those of host memory, which the caller holds; returns the passage's number. It ends
        when nothing writes to them any more, however long that takes."""
        passage = self._moves.read(len(at), ended, offer.gate)
        theirs = pack(offer.slots[at])
        for rank, sums in zip(self._ranks, offer.sums, strict=True):
            wanted = np.ascontiguousarray(sums[at]).tobytes()
            self._moves.tell_rank(rank, to_rank(Pull(passage.id, offer.attached, theirs, pack(into.slots), wanted)))
        return passage.id

    def cancel(self, jobs: Collection[int]) -> None:
        """Nobody wants these any more. They end all the same, when nothing writes to their slots any more."""
        self._moves.cancel(jobs)

    def answer(self, result: Result) -> bool:
        """Takes one rank's result; False where it is about none of these."""
        return self._moves.answer(result)

    def landing(self, slots: Slots, keys: Sequence[bytes], how: Landing) -> None:
        """Blocks are about to be published in host memory: a peer that is promised them has to know their checksums."""
        self.serving.sums.note(slots, keys, how.sums)

    def landed(self, keys: Sequence[bytes], how: Landing) -> None:
        """They are published: what comes from the disk has been known since it was new."""
        if how.places is not None:
            self.published.stored(keys, how.places)

    def sick(self, why: str) -> None:
        """No rank says so."""

    def pump(self) -> None:
        """The network's thread does all by itself."""

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
            for peer in (self.peers.get(name),)
        }

    def in_flight(self) -> int:
        """Reads that some rank has not answered."""
        return self._moves.count()[1]

    def status(self) -> Mapping[str, Any]:
        return {"fetch": {"in_flight": self.in_flight()}, "peers": self.known(), "sharing": self.counts()}

    def limits(self) -> str | None:
        return None

    def namesakes(self) -> tuple[str, ...]:
        return self.network.namesakes

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
            self.network.server.place(slabs)

    @property
    def pool(self) -> None:
        """Others have pools."""

    @property
    def problem(self) -> str | None:
        """Why nothing is shared; None while it is."""
        return self._closed or self.network.problem

    def tick(self) -> None:
        """A few times a second: promises end, and the dead are forgotten."""
        self.serving.tick()
        if self.network.problem is None:
            for name in sorted(self.peers.keys() - set(self.network.peers)):
                self._forget(name)

    def _forget(self, name: str) -> None:
        """A peer's lease has ended. Names may be made up anew at every start, so nothing of it is kept."""
        if self.peers[name].gate.reading:
            return
        if (attached := self.peers.pop(name).attached) is not None:
            self._moves.tell(to_rank(Detach(attached)))

    def clear(self, *, lasting: bool) -> None:
        """A new generation. Whether others have begun it too is not known, so this instance shares nothing any more."""
        if self._closed is None:
            log.warning("KVBM: after a reset this engine shares no blocks until it is restarted")
            self._close("a reset began a new generation")

    def leave(self, why: str) -> None:
        """Share nothing any more, and take back what the directory says of us."""
        self._moves.leave()
        if self._closed is None:
            self._close(why)

    def _close(self, why: str) -> None:
        self._closed = why
        for search in self.sought.going:
            search.ended = True
        self.serving.close()
        self.network.leave()

    @property
    def drains(self) -> bool:
        """What others want they have to read."""
        return False

    def drain(self) -> None:
        """Nothing is written there."""

    @property
    def drained(self) -> bool:
        return True

    def stop(self) -> None:
        self.network.close()

    def close(self) -> None:
        """The process is about to end."""
        self._closed = self._closed or "the engine ends"
        self.serving.close()


def _makes_sense(promise: Promise, memory: Memory, count: int, ranks: int) -> bool:
    """Whether a promise of `count` blocks can be used: what others say is looked at before anything is done with it."""
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
