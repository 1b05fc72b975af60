"""Reading all of the disk tier while the engine goes on."""

from __future__ import annotations

from functools import partial

from kvbm.blocks import Pinned, Pool, Writable
from kvbm.core.outcome import Outcome
from kvbm.tiers.disk.tier import DiskTier
from kvbm.tiers.moves import Passage

_SOON = 0.05
"""Seconds that reading one slice should take at most: what a request wants waits for it."""
_SLICE, _FIRST = 64, 4
"""Most blocks of a slice, and those of one while nobody knows how fast the disk is."""
STRETCH = 1024
"""Slots that are looked at together for blocks."""
PATIENCE = 64
"""Stretches without a block that are passed at once."""


class Sweep:
    """One reading of all blocks on disk, a slice at a time, while the engine goes on. Under the leader's lock.

    They are read into slots of host memory that are given back. What is not what was written is un-published.
    """

    def __init__(self, tier: DiskTier, g2: Pool) -> None:
        self.slots = tier.pool.total
        self.looked = self.whole = self.bad = self.unread = 0
        """Slots that were passed; blocks in them."""
        self.problem: str | None = None
        """Why it ended too early."""
        self._tier, self._g2 = tier, g2
        self._most = max(1, min(_SLICE, g2.total // 8))
        self._job: int | None = None
        self._next = 0

    @property
    def over(self) -> bool:
        """Whether nothing more will be read."""
        return self.problem is not None or (self._next >= self.slots and self._job is None)

    def end(self, problem: str) -> None:
        """Read no more."""
        if not self.over:
            self.problem = problem
            self._tier.cancel([self._job] if self._job is not None else [])

    def pump(self) -> None:
        """Have the next slice read, if none is being read."""
        if self._tier.problem is not None:
            self.end(self._tier.problem)
        for _ in range(PATIENCE):
            if self._job is not None or self.over:
                return
            keys = self._tier.pool.keys(self._next, self._next + STRETCH)
            count = min(self._most, self._tier.gate.soon(_SOON) or _FIRST)
            hold, _ = self._tier.pool.scan(keys[:count])
            slots = hold.slots
            if not self._read(hold):
                return
            end = self._next + STRETCH
            if len(keys) > count:
                end = int(slots[-1]) + 1 if len(slots) else self._next  # their time was over: others come now
            self._next = min(self.slots, end)
            if self._job is None:
                self.looked = self._next

    def _read(self, hold: Pinned) -> bool:
        """False where there is no memory to read them into."""
        if not len(hold):
            hold.drop()
            return True
        if (into := self._g2.allocate(len(hold))) is None:
            hold.drop()
            return False
        self._job = self._tier.read(hold.slots, hold.keys, into, partial(self._ended, hold, into))
        return True

    def _ended(self, hold: Pinned, into: Writable, move: Passage) -> None:
        self._job = None
        self.looked = self._next
        into.drop()
        bad: list[bytes] = []
        for key, slot, outcome in zip(hold.keys, hold.slots.tolist(), move.outcomes.tolist(), strict=True):
            self.whole += outcome == Outcome.DONE
            self.unread += outcome >= Outcome.FAILED
            # Not what was written since, in another generation: that lies elsewhere, for this slot is still held.
            block = self._tier.pool.look(key) if outcome in (Outcome.CORRUPT, Outcome.MISSING) else None
            if block is not None and block.slot == slot:
                bad.append(key)
        self.bad += len(bad)
        self._tier.discard(bad)
        hold.drop()
