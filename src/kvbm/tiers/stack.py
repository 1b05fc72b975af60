"""What the leader does with what is below host memory, in the order in which things happen to a request."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from kvbm.core.events import Admitted
from kvbm.core.region import Slots
from kvbm.leader.requests import Request
from kvbm.link.messages import FromTier, Result, Sick
from kvbm.observe.names import json_key
from kvbm.tiers.demote import Demotion
from kvbm.tiers.disk.orders import TIER as DISK
from kvbm.tiers.disk.sweep import Verification
from kvbm.tiers.disk.tier import DiskTier
from kvbm.tiers.host import ENGINE, Landing
from kvbm.tiers.peers.orders import TIER as PEERS
from kvbm.tiers.peers.tier import Peers
from kvbm.tiers.promote import Promotion
from kvbm.tiers.tier import Wanted

log = logging.getLogger(__name__)


@dataclass(slots=True)
class DiskSide:
    """The disk tier, and what moves down to it."""

    tier: DiskTier
    demotion: Demotion
    exclusive: bool
    """Whether a block is there no more once it is in host memory."""
    verification: Verification | None = None
    """The last that was asked for."""

    def leave(self, why: str) -> None:
        """From now on nothing is read from there and nothing written; what is on its way is given up."""
        self.demotion.clear()
        if self.verification is not None:
            self.verification.end(why)
        self.tier.leave(why)

    def landed(self, keys: Sequence[bytes], how: Landing) -> None:
        """These are in host memory now."""
        if how.origin == ENGINE and not self.tier.left:
            self.demotion.offer(keys)
        elif how.origin == DISK and self.exclusive:
            self.tier.pool.discard(keys)

    def counts(self) -> dict[str, int]:
        """Blocks that were kept from disk, and those that were damaged there."""
        return {
            "refused": self.demotion.refused,
            "cancelled": self.demotion.cancelled,
            "corrupt": self.tier.corrupt,
        }


@dataclass(slots=True)
class Lower:
    """The disk tier and other instances, as far as there are such, and what comes up from them. Under the leader's
    lock."""

    promotion: Promotion
    block_tokens: int
    disk: DiskSide | None = None
    peers: Peers | None = None
    isolated: bool = False
    """Whether nothing of this is used any more."""

    def begin(self, request: Request, asked: Sequence[bytes], wanted: Wanted) -> None:
        """A request arrives: its blocks start to move before it is scheduled."""
        if self.isolated:
            return
        if self.disk is not None:
            self.disk.demotion.used(asked)
        if request.params.load:
            reach = self.promotion.begin(request.id, request.record, wanted)
            if self.peers is not None:
                self.peers.begin(request, wanted.keys, reach)

    def landing(self, slots: Slots, keys: Sequence[bytes], how: Landing) -> None:
        """Blocks are about to be published in host memory."""
        if self.peers is not None:
            self.peers.landing(slots, keys, how)

    def landed(self, keys: Sequence[bytes], how: Landing) -> None:
        """They are published."""
        if self.isolated and how.origin == ENGINE:
            return
        if self.disk is not None:
            self.disk.landed(keys, how)
        if self.peers is not None:
            self.peers.landed(keys, how)

    def waits(self, request: Request, wanted: Wanted, at: int) -> bool:
        """The engine asks: whether it should ask again later for what follows its match, from block `at` on."""
        if self.isolated or not len(wanted.keys):
            return False
        if self.promotion.waits(request.id, request.record, wanted):
            return True
        return self.peers is not None and self.peers.waits(request, wanted.keys, at)

    @property
    def waiting(self) -> bool:
        """Whether a request waits for what comes from below."""
        return self.promotion.waiting or (self.peers is not None and self.peers.waiting)

    def placed(self, request: Request, tokens: Admitted) -> Admitted:
        """The request got its blocks, and holds what it matched itself."""
        self._done_with(request)
        staged, block = request.record.staged, float(self.block_tokens)
        if not staged:
            return tokens
        if request.needs:  # blocks of several layer groups make up one stretch of tokens
            block = tokens.g2_tokens / len(request.needs)
        if self.peers is not None and not self.peers.keep and json_key(PEERS) in staged:
            # Or what is not to be kept would be offloaded again.
            request.offered = max(request.offered, (tokens.device_tokens + tokens.g2_tokens) // self.block_tokens)
        sources, left = dict[str, int](), tokens.g2_tokens
        for tier in (PEERS, DISK):
            if came := min(int(staged.get(json_key(tier), 0) * block), left):
                sources[tier] = came
                left -= came
        if request.params.pull_from is None:
            return msgspec.structs.replace(tokens, sources=sources)
        # What that instance found, and did not compute either, is among its own hits.
        pulled = sources.pop(PEERS, 0)
        return msgspec.structs.replace(
            tokens, g2_tokens=tokens.g2_tokens - pulled, pulled_tokens=pulled, sources=sources
        )

    def finished(self, request: Request, blocks: Sequence[bytes]) -> None:
        """The request is over, or gone. `blocks` were offered of it, in prompt order."""
        self._done_with(request)
        if self.disk is not None:
            # Written batch by batch, its root first; together, its leaf goes before its root.
            self.disk.tier.pool.touch(blocks)

    def _done_with(self, request: Request) -> None:
        self.promotion.drop(request.id)
        if self.peers is not None:
            self.peers.drop(request.id)

    def take(self, answer: Result | FromTier | Sick) -> bool:
        """An answer from a worker; false where it is about something else."""
        match answer:
            case Result():
                return (self.disk is not None and self.disk.tier.answer(answer)) or (
                    self.peers is not None and self.peers.answer(answer)
                )
            case FromTier(tier="g3", body=body) if self.disk is not None:
                self.disk.tier.hear(body)
            case FromTier(tier="peers", body=body) if self.peers is not None:
                self.peers.hear(body)
            case Sick(tier="g3", rank=rank, problem=problem) if self.disk is not None and not self.disk.tier.left:
                why = f"rank {rank}: {problem}"
                log.error("KVBM: the disk tier (G3) is left alone until the engine is started anew: %s", why)
                self.disk.leave(why)
        return True

    def tick(self) -> None:
        """A few times a second."""
        if self.disk is not None:
            self.disk.tier.tick()
        if self.peers is not None:
            self.peers.tick()

    def pump(self) -> None:
        """Start the moves that can start now."""
        self.promotion.pump()
        if self.disk is not None:
            self.disk.demotion.pump()
            if self.disk.verification is not None:
                self.disk.verification.pump()

    def stand_aside(self) -> None:
        """Nothing is moved for requests while the engine is to work as if there were no KVBM."""
        self.promotion.clear()
        if self.peers is not None:
            self.peers.stand_aside()

    def isolate(self, why: str) -> None:
        """From now on nothing is read from here and nothing written; what is on its way is given up."""
        self.isolated = True
        self.promotion.clear()
        if self.disk is not None:
            self.disk.leave(why)
        if self.peers is not None:
            self.peers.leave(why)

    def clear(self) -> None:
        """A new generation, maybe of other weights."""
        self.clear_disk(lasting=False)
        if self.peers is not None:
            self.peers.clear()

    def clear_disk(self, *, lasting: bool = True) -> None:
        """Nothing that is on disk now is served any more; see `DiskTier.clear`."""
        self.promotion.clear()
        if self.disk is not None:
            self.disk.demotion.clear()
            if self.disk.verification is not None:
                self.disk.verification.end("a new generation began")
            self.disk.tier.clear(lasting=lasting)

    def counts(self) -> dict[str, int]:
        """What is not a copy, for metrics."""
        counts = self.disk.counts() if self.disk is not None else {}
        return counts | (self.peers.counts() if self.peers is not None else {})

    def problems(self) -> dict[str, str]:
        """Tiers that are left alone, and why."""
        found: dict[str, str] = {}
        if self.disk is not None and self.disk.tier.problem is not None:
            found["g3"] = self.disk.tier.problem
        if self.peers is not None and self.peers.problem is not None:
            found["peers"] = self.peers.problem
        return found

    def close(self) -> None:
        """The process is about to end."""
        if self.peers is not None:
            self.peers.close()
        if self.disk is not None:
            self.disk.tier.close()
