"""Where blocks can be read from into host memory, as the promotion sees it. Under the leader's lock."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import ClassVar, Protocol

from kvbm.blocks import Pinned, Staged
from kvbm.core.events import Fetched, Promoted
from kvbm.core.outcome import Outcome
from kvbm.core.region import Slots
from kvbm.manager.disk import DiskTier
from kvbm.manager.gate import Gate
from kvbm.manager.jobs import Move

_SUSPECTS = 10_000
"""Blocks whose last read failed, that are remembered: the second time in a row a block counts as lost."""
_NOT_IT = (Outcome.CORRUPT, Outcome.MISSING)


class Hold(Protocol):
    """What keeps blocks where they are while they are read."""

    def drop(self) -> None:
        """They are not read any more."""


class Source(Protocol):
    """The disk, or a peer. `gate` knows how fast it is; `problem` why it is not to be read from."""

    name: ClassVar[str]
    """As sentences call it."""
    tier: ClassVar[str]
    """As records of requests call it."""
    event: ClassVar[type[Promoted] | type[Fetched]]
    """What is told of a read that ended."""
    gate: Gate
    keep: bool
    """Whether host memory keeps what came after the requests that waited for it got it."""

    @property
    def problem(self) -> str | None: ...

    def read(self, slots: Slots, into: Staged, ended: Callable[[Move], None]) -> int:
        """Copy slots to those of host memory; returns the move's number."""

    def cancel(self, jobs: Collection[int]) -> None:
        """Nobody wants these any more. They end all the same."""

    def judge(self, keys: Sequence[bytes], slots: Slots, move: Move) -> None:
        """How a read of these ended."""

    def arrived(self, blocks: Pinned) -> None:
        """These are in host memory now."""


class DiskSource:
    """The disk tier. With `exclusive` a block is there no more once it is in host memory."""

    name: ClassVar[str] = "disk"
    tier: ClassVar[str] = "g3"
    event: ClassVar[type[Promoted] | type[Fetched]] = Promoted

    def __init__(self, tier: DiskTier, *, exclusive: bool) -> None:
        self._tier, self._exclusive = tier, exclusive
        self.gate, self.pool, self.keep = tier.gate, tier.pool, True
        self._suspects: set[bytes] = set()

    @property
    def problem(self) -> str | None:
        return self._tier.problem

    def read(self, slots: Slots, into: Staged, ended: Callable[[Move], None]) -> int:
        return self._tier.read(slots, into.keys, into, ended)

    def cancel(self, jobs: Collection[int]) -> None:
        self._tier.cancel(jobs)

    def arrived(self, blocks: Pinned) -> None:
        if self._exclusive:
            self.pool.discard(blocks.keys)

    def judge(self, keys: Sequence[bytes], slots: Slots, move: Move) -> None:
        """What is not what was written is lost at once; what could not be read, the second time."""
        lost: dict[bytes, int] = {}
        for key, slot, outcome in zip(keys, slots.tolist(), move.outcomes.tolist(), strict=True):
            if outcome in _NOT_IT or (outcome != Outcome.DONE and move.wanted and key in self._suspects):
                lost[key] = slot
            elif outcome != Outcome.DONE and move.wanted and len(self._suspects) < _SUSPECTS:
                self._suspects.add(key)
            elif outcome == Outcome.DONE:
                self._suspects.discard(key)
        self._suspects.difference_update(lost)
        # Not what was written since, in another generation: that lies elsewhere, for this slot is still held.
        there = [key for key, slot in lost.items() if (block := self.pool.look(key)) and block.slot == slot]
        if there:
            self._tier.discard(there)
