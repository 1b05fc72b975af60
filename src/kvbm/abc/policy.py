"""What a policy implements. Policies are told in batches, and never see a block that somebody holds."""

from __future__ import annotations

from abc import ABC, abstractmethod

from kvbm.core.region import Slots


class EvictionOrder(ABC):
    """In which order the blocks nobody holds give up their slots.

    Every call comes from one pool, under that pool's lock: an order needs no lock, must be quick, and must not call
    back into the pool. The pool keeps one order per priority in use, made by `fresh`.
    """

    @abstractmethod
    def add(self, slots: Slots) -> None:
        """These became inactive, in prompt order: the last (a prompt's leaf) has to go before the first (its root).

        No slot is in the order already.
        """

    @abstractmethod
    def discard(self, slots: Slots) -> None:
        """These are no longer inactive (held again or gone). Every slot is in the order."""

    @abstractmethod
    def victims(self, n: int) -> Slots:
        """Take out the `n` slots that should go first, first one first; fewer only where it will not give more.

        A caller that gets too few puts them back with `add`.
        """

    @abstractmethod
    def __len__(self) -> int:
        """How many slots are in the order."""

    @abstractmethod
    def fresh(self) -> EvictionOrder:
        """An empty order of the same kind for the same slots."""
