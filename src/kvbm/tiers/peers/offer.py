"""One promise of one peer, as the promotion reads it. Under the leader's lock."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from kvbm.blocks import Staged
from kvbm.core.outcome import Outcome
from kvbm.core.region import Slots
from kvbm.tiers.gate import Gate
from kvbm.tiers.moves import Ended, Passage
from kvbm.tiers.peers.client import Client
from kvbm.tiers.peers.messages import Memory
from kvbm.tiers.peers.orders import TIER
from kvbm.tiers.sums import Words

log = logging.getLogger(__name__)


class Contacts(Protocol):
    """The network, as far as an offer needs it."""

    def slow(self, client: Client, problem: str) -> None: ...

    def works(self, client: Client) -> None: ...

    def failed(self, client: Client, problem: str) -> None: ...

    def release(self, client: Client, lease: int) -> None: ...


class Waits(Protocol):
    """How long it is waited for."""

    def clock(self) -> float: ...

    def due(self, blocks: int) -> float:
        """When the peer counts as dead if none of this many blocks has come."""


@dataclass(slots=True)
class Counted:
    """Promises that were used, and blocks that came and were not what had been promised."""

    promises: int = 0
    corrupt: int = 0


class Source(Protocol):
    """The tier, as far as an offer of its needs it."""

    @property
    def network(self) -> Contacts: ...

    @property
    def patience(self) -> Waits: ...

    @property
    def counted(self) -> Counted: ...

    def attach(self, client: Client, memory: Memory, gate: Gate) -> str:
        """Has ranks attach the peer's memory; by what name they know it."""

    def pull(self, offer: PeerOffer, at: Slots, into: Staged, ended: Ended) -> int:
        """Has ranks read these blocks of the offer."""

    def cancel(self, jobs: Collection[int]) -> None:
        """Nobody wants these any more."""


@dataclass(slots=True, eq=False)
class PeerOffer:
    """One promise of one peer (`Offer`)."""

    tier: ClassVar[str] = TIER
    words: ClassVar[str] = "a peer"
    cuts: ClassVar[None] = None

    peers: Source
    client: Client
    gate: Gate
    keeps: bool
    memory: Memory
    keys: Sequence[bytes]
    parents: Sequence[bytes | None]
    terms: Sequence[tuple[int, float]]
    places: Slots
    slots: Slots
    """Theirs."""
    sums: list[Words]
    """By rank, what the bytes must have as checksums."""
    number: int
    """Of the promise."""
    until: float
    limit: float
    """When the request does not wait any longer for the first blocks: the search was part of its wait."""
    due: float = math.inf
    """When the peer counts as dead if nothing has come. Moves with all that comes."""
    attached: str = ""
    """By what name ranks know the peer's memory."""
    reading: int = 0
    broken: str | None = None

    @property
    def queue(self) -> object:
        return self

    def accept(self) -> None:
        self.attached = self.peers.attach(self.client, self.memory, self.gate)

    def failing(self) -> str | None:
        now = self.peers.patience.clock()
        if self.broken is None and self.reading and now > self.due:
            self.fail("its blocks do not come")
        if self.broken is None and self.reading and now > self.limit:
            self.broken = "its blocks do not come in time"
            self.peers.network.slow(self.client, self.broken)
        if self.broken is None and now > self.until:
            self.broken = "its promise is over"
        return self.broken

    def read(self, at: Slots, into: Staged, ended: Ended) -> int:
        if not self.reading:
            self.due = self.peers.patience.due(len(at))
        self.reading += 1
        return self.peers.pull(self, at, into, ended)

    def cancel(self, jobs: Collection[int]) -> None:
        self.peers.cancel(jobs)

    def judge(self, at: Slots, passage: Passage) -> None:
        self.reading -= 1
        corrupt = int((passage.outcomes == Outcome.CORRUPT).sum())
        if corrupt:
            self.peers.counted.corrupt += corrupt
            log.error("KVBM: peer %s gave %d blocks that are not what it promised", self.client.name, corrupt)
            self.fail("its blocks are not what it promised")
        elif not passage.done.all():
            if passage.wanted:
                self.fail(passage.error or "its blocks do not come")
        else:
            self.due, self.limit = self.peers.patience.due(len(at)), math.inf
            self.peers.network.works(self.client)

    def fail(self, problem: str) -> None:
        """The peer is left alone until it answers a probe, and its memory is attached anew."""
        self.broken = self.broken or problem
        self.peers.network.failed(self.client, problem)

    def drop(self) -> None:
        self.peers.network.release(self.client, self.number)
