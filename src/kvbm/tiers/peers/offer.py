"""One promise of one peer, as the promotion reads it. Under the leader's lock."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kvbm.blocks import Staged
from kvbm.core.outcome import Outcome
from kvbm.core.region import Slots
from kvbm.tiers.gate import Gate
from kvbm.tiers.moves import Ended, Passage
from kvbm.tiers.peers.client import Client
from kvbm.tiers.peers.network import Network
from kvbm.tiers.peers.orders import TIER
from kvbm.tiers.peers.sums import Words

if TYPE_CHECKING:
    from kvbm.tiers.peers.tier import Peers

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Lease:
    """A peer's promise, until it is not needed."""

    network: Network
    client: Client
    number: int

    def drop(self) -> None:
        self.network.release(self.client, self.number)


@dataclass(slots=True, eq=False)
class PeerSource:
    """One promise of one peer, as the promotion reads it."""

    name: ClassVar[str] = "a peer"
    tier: ClassVar[str] = TIER

    peers: Peers
    client: Client
    gate: Gate
    attached: str
    rows: dict[int, int]
    """Their slot -> its place in the promise."""
    sums: list[Words]
    """By rank, what the bytes must have as checksums."""
    _places: dict[bytes, int]
    """Which block of its prompt each is."""
    until: float
    keep: bool
    limit: float
    """When the request does not wait any longer for the first blocks: the search was part of its wait."""
    due: float = math.inf
    """When the peer counts as dead if nothing has come. Moves with all that comes."""
    reading: int = 0
    broken: str | None = None

    @property
    def problem(self) -> str | None:
        now = self.peers.clock()
        if self.broken is None and self.reading and now > self.due:
            self.fail("its blocks do not come")
        if self.broken is None and self.reading and now > self.limit:
            self.broken = "its blocks do not come in time"
            self.peers.network.slow(self.client, self.broken)
        if self.broken is None and now > self.until:
            self.broken = "its promise is over"
        return self.broken

    def read(self, slots: Slots, into: Staged, ended: Ended) -> int:
        if not self.reading:
            self.due = self.peers.due(len(slots))
        self.reading += 1
        return self.peers.pull(self, slots, into, ended)

    def cancel(self, jobs: Collection[int]) -> None:
        self.peers.cancel(jobs)

    def judge(self, keys: Sequence[bytes], slots: Slots, move: Passage) -> None:
        self.reading -= 1
        corrupt = int((move.outcomes == Outcome.CORRUPT).sum())
        if corrupt:
            self.peers.corrupt += corrupt
            log.error("KVBM: peer %s gave %d blocks that are not what it promised", self.client.name, corrupt)
            self.fail("its blocks are not what it promised")
        elif not move.done.all():
            if move.wanted:
                self.fail(move.error or "its blocks do not come")
        else:
            self.due, self.limit = self.peers.due(len(slots)), math.inf
            self.peers.network.works(self.client)

    def fail(self, problem: str) -> None:
        self.broken = self.broken or problem
        self.peers.failed(self, problem)

    def places(self, keys: Sequence[bytes]) -> Slots:
        return np.array([self._places[key] for key in keys], np.int64)
