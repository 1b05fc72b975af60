"""The disk (G3) as a tier: what comes from there, what goes there, and reading all of it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from kvbm.blocks import Pinned, Pool, Staged
from kvbm.core.outcome import Outcome
from kvbm.core.region import Slots
from kvbm.link.messages import Result
from kvbm.tiers.demote import Demotion
from kvbm.tiers.disk.orders import TIER
from kvbm.tiers.disk.sweep import Sweep
from kvbm.tiers.disk.tier import DiskTier
from kvbm.tiers.gate import Gate
from kvbm.tiers.host import ENGINE, Landing
from kvbm.tiers.moves import Ended, Passage
from kvbm.tiers.tier import Give, Mask, Record, Seeker

log = logging.getLogger(__name__)

_SUSPECTS = 10_000
"""Blocks whose last read failed, that are remembered: the second time in a row a block counts as lost."""
_NOT_IT = (Outcome.CORRUPT, Outcome.MISSING)


class DiskOffer:
    """Blocks that the disk's pool holds for us (`Offer`)."""

    tier: ClassVar[str] = TIER
    words: ClassVar[str] = "disk"
    keeps: ClassVar[bool] = True
    places: ClassVar[Slots | None] = None
    cuts: ClassVar[None] = None

    def __init__(self, disk: DiskTier, suspects: Suspects, lease: Pinned, now: float) -> None:
        self._disk, self._suspects, self._lease, self._slots = disk, suspects, lease, lease.slots
        self.keys, self.parents = lease.keys, lease.parents
        priorities, left = lease.terms  # now: they mean nothing once a block was un-published
        self.terms = list(zip(priorities.tolist(), (left + now).tolist(), strict=True))

    @property
    def gate(self) -> Gate:
        return self._disk.gate

    @property
    def queue(self) -> object:
        return self._disk

    def accept(self) -> None:
        """Its files are open."""

    def failing(self) -> str | None:
        return self._disk.problem

    def read(self, at: Slots, into: Staged, ended: Ended) -> int:
        return self._disk.read(self._slots[at], into.keys, into, ended)

    def cancel(self, jobs: Collection[int]) -> None:
        self._disk.cancel(jobs)

    def judge(self, at: Slots, passage: Passage) -> None:
        self._suspects.judge([self.keys[place] for place in at.tolist()], self._slots[at], passage)

    def drop(self) -> None:
        self._lease.drop()


class Suspects:
    """Which blocks are lost: what is not what was written at once, what could not be read the second time."""

    def __init__(self, disk: DiskTier) -> None:
        self._disk = disk
        self.failed: set[bytes] = set()
        """Those whose last read failed."""

    def judge(self, keys: Sequence[bytes], slots: Slots, passage: Passage) -> None:
        """These were read from these slots, or not."""
        lost: dict[bytes, int] = {}
        for key, slot, outcome in zip(keys, slots.tolist(), passage.outcomes.tolist(), strict=True):
            if outcome in _NOT_IT or (outcome != Outcome.DONE and passage.wanted and key in self.failed):
                lost[key] = slot
            elif outcome != Outcome.DONE and passage.wanted and len(self.failed) < _SUSPECTS:
                self.failed.add(key)
            elif outcome == Outcome.DONE:
                self.failed.discard(key)
        self.failed.difference_update(lost)
        # Not what was written since, in another generation: that lies elsewhere, for this slot is still held.
        there = [key for key, slot in lost.items() if (block := self._disk.pool.look(key)) and block.slot == slot]
        if there:
            self._disk.discard(there)


class DiskSide:
    """See `Tier`. With `exclusive` a block is there no more once it is in host memory."""

    name: ClassVar[str] = TIER
    words: ClassVar[str] = "disk"
    keeps: ClassVar[bool] = True

    def __init__(
        self, tier: DiskTier, demotion: Demotion, *, exclusive: bool, folder: Path | None = None,
        namesakes: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.tier, self.demotion, self._exclusive, self._namesakes = tier, demotion, exclusive, namesakes
        self.folder = folder
        """The namespace's, on disk."""
        self.suspects = Suspects(tier)
        self.verification: Sweep | None = None
        """The last that was asked for."""

    @property
    def problem(self) -> str | None:
        return self.tier.problem

    @property
    def pool(self) -> Pool:
        return self.tier.pool

    def verify(self, host: Pool) -> None:
        """Begin to read all blocks, through slots of `host`, unless that is going on."""
        if self.verification is None or self.verification.over:
            self.verification = Sweep(self.tier, host)
            self.verification.pump()

    # ------------------------------------------------------------------ what a request does

    def covers(self, keys: Sequence[bytes]) -> Mask:
        return self.pool.present(keys)

    def seek(self, seeker: Seeker, keys: Sequence[bytes], first: int | None, give: Give) -> None:
        offer = DiskOffer(self.tier, self.suspects, self.pool.scan(keys)[0], self.tier.clock())
        if not give(offer):
            offer.drop()

    def asked(self, keys: Sequence[bytes]) -> None:
        self.pool.touch(keys)
        self.demotion.used(keys)

    def over(self, keys: Sequence[bytes], record: Record) -> None:
        # Written batch by batch, its root first; together, its leaf goes before its root.
        self.pool.touch(keys)

    # ------------------------------------------------------------------ what host memory does

    def landing(self, slots: Slots, keys: Sequence[bytes], how: Landing) -> None:
        """What is written needs no more than its rank has."""

    def landed(self, keys: Sequence[bytes], how: Landing) -> None:
        if how.origin == ENGINE and not self.tier.left:
            self.demotion.offer(keys)
        elif how.origin == TIER and self._exclusive:
            self.pool.discard(keys)

    # ------------------------------------------------------------------ what is moved

    def answer(self, result: Result) -> bool:
        return self.tier.answer(result)

    def hear(self, body: bytes) -> None:
        self.tier.hear(body)

    def sick(self, why: str) -> None:
        if not self.tier.left:
            log.error("KVBM: the disk tier (G3) is left alone until the engine is started anew: %s", why)
            self.leave(why)

    def pump(self) -> None:
        self.demotion.pump()
        if self.verification is not None:
            self.verification.pump()

    def tick(self) -> None:
        self.tier.tick()

    def in_flight(self) -> tuple[int, int]:
        return self.tier.in_flight()

    # ------------------------------------------------------------------ its end

    def clear(self, *, lasting: bool) -> None:
        """See `DiskTier.clear`."""
        self._stop_moving("a new generation began")
        self.tier.clear(lasting=lasting)

    def leave(self, why: str) -> None:
        self._stop_moving(why)
        self.tier.leave(why)

    def _stop_moving(self, why: str) -> None:
        self.demotion.clear()
        if self.verification is not None:
            self.verification.end(why)

    @property
    def drains(self) -> bool:
        return not self.tier.left

    def drain(self) -> None:
        self.demotion.drain()

    @property
    def drained(self) -> bool:
        return self.demotion.idle

    def stop(self) -> None:
        """Its thread takes no lock."""

    def close(self) -> None:
        self.tier.close()

    # ------------------------------------------------------------------ what is told

    def counts(self) -> dict[str, int]:
        """Blocks that were kept from disk, and those that were damaged there."""
        return {"refused": self.demotion.refused, "cancelled": self.demotion.cancelled, "corrupt": self.tier.corrupt}

    def status(self) -> Mapping[str, Any]:
        down, up = self.in_flight()
        demote = {"in_flight": down, "refused": self.demotion.refused, "cancelled": self.demotion.cancelled}
        return {
            "demote": demote,
            "promote": {"in_flight": up, "corrupt": self.tier.corrupt},
            "rates": self.tier.gate.rates(),
        }

    def limits(self) -> str | None:
        return None

    def namesakes(self) -> tuple[str, ...]:
        return self._namesakes
