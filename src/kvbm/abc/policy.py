"""What a policy implements. Policies are told in batches, and never see a block that somebody holds.

Policies know blocks by slot, or by *tag*: a 64-bit hash of the key that is the same for the same key as long as the
process lives. Nothing here knows bytes or tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvbm.core.region import Slots

Tags = npt.NDArray[np.int64]
"""One 64-bit hash of its key per block."""

Mask = npt.NDArray[np.bool_]


def tags_of(keys: Sequence[bytes]) -> Tags:
    """Their tags."""
    return np.fromiter(map(hash, keys), np.int64, len(keys))


class EvictionOrder(ABC):
    """In which order the blocks nobody holds give up their slots.

        admit --> held --add--> in the order --discard--> held --add--> in the order --victims--> given
                   |                                                                               | |
                   +-- forget --> gone                                  add (it stayed) <----------+ +--> forget

    Every call comes from one pool, under that pool's lock: an order needs no lock, must be quick, and must not call
    back into the pool. Arrays belong to the caller: an order that keeps one copies it. The pool has one order per
    priority in use, made by `fresh`; a block whose priority changes is forgotten by one and admitted by the other.
    """

    @abstractmethod
    def add(self, slots: Slots) -> None:
        """These became inactive, in prompt order: the last (a prompt's leaf) has to go before the first (its root).

        No slot is in the order already. Among them may be slots that `victims` gave and that were not evicted.
        """

    @abstractmethod
    def discard(self, slots: Slots) -> None:
        """These are no longer inactive (held again or about to be forgotten). Every slot is in the order."""

    @abstractmethod
    def victims(self, n: int) -> Slots:
        """Take out the `n` slots that should go first, first one first; fewer only where it will not give more.

        What was given is afterwards either forgotten or added again.
        """

    @abstractmethod
    def __len__(self) -> int:
        """How many slots are in the order."""

    @abstractmethod
    def fresh(self) -> EvictionOrder:
        """An empty order of the same kind for the same slots."""

    @abstractmethod
    def resize(self, num_slots: int) -> None:
        """From now on slots are below `num_slots`, which only grows."""

    # What follows is called only where it is overridden.

    def admit(self, slots: Slots, tags: Tags, parents: Slots) -> None:  # noqa: B027
        """New blocks in these slots; held, so not in the order yet. Consecutive ones follow each other in a prompt.

        `parents`: the slot of the block before each in its prompt, -1 where it is unknown or not registered.
        """

    def use(self, slots: Slots) -> None:  # noqa: B027
        """Somebody found these blocks (a match, or one more registration of the key); they are held now."""

    def forget(self, slots: Slots) -> None:  # noqa: B027
        """These blocks are gone: evicted after `victims` gave them, or un-published. None is in the order."""


class Admission(ABC):
    """Which blocks are worth being copied into a tier. One thread at a time."""

    def use(self, tags: Tags) -> None:  # noqa: B027  most admissions do not count
        """These blocks were asked for, whether they were there or not. Once per request."""

    @abstractmethod
    def admit(self, tags: Tags, present: Mask) -> Mask:
        """Which of these blocks to copy; `present` says which are in the tier already."""


@dataclass(frozen=True, slots=True)
class Keep:
    """The block stays where it is."""


@dataclass(frozen=True, slots=True)
class Drop:
    """The block goes, and nothing remembers it."""


@dataclass(frozen=True, slots=True)
class Move:
    """The block goes to the tier called `tier`."""

    tier: str


class Placement(ABC):
    """Where blocks live when there are several tiers. `tiers` are the names from the fastest to the slowest."""

    @abstractmethod
    def store(self, tiers: Sequence[str]) -> Sequence[str]:
        """The tiers that a new block is copied to."""

    @abstractmethod
    def promote(self, tier: str, tiers: Sequence[str]) -> Keep | Drop:
        """What becomes of the copy in `tier` once the block was copied up to the fastest tier."""

    @abstractmethod
    def evict(self, tier: str, tiers: Sequence[str]) -> Drop | Move:
        """What becomes of a block that has to leave `tier`."""
