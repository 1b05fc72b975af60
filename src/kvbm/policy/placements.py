"""In which tiers a block lives."""

from __future__ import annotations

from collections.abc import Sequence

from kvbm.abc.policy import Drop, Keep, Move, Placement


class WriteThrough(Placement):
    """A copy in every tier: what leaves a fast tier is still in the slower ones."""

    def store(self, tiers: Sequence[str]) -> Sequence[str]:
        return tuple(tiers)

    def promote(self, tier: str, tiers: Sequence[str]) -> Keep | Drop:
        return Keep()

    def evict(self, tier: str, tiers: Sequence[str]) -> Drop | Move:
        return Drop()


class Exclusive(Placement):
    """One copy, which sinks a tier at each eviction and rises to the fastest tier when it is asked for."""

    def store(self, tiers: Sequence[str]) -> Sequence[str]:
        return tuple(tiers[:1])

    def promote(self, tier: str, tiers: Sequence[str]) -> Keep | Drop:
        return Drop()

    def evict(self, tier: str, tiers: Sequence[str]) -> Drop | Move:
        below = tiers[tiers.index(tier) + 1 :]
        return Move(below[0]) if below else Drop()
