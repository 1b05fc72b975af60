"""Checksums of the blocks in host memory, as other instances need them. Under the leader's lock.

A block's checksum is made when it leaves the engine, and is kept made one with the block's key: so a promise of the
wrong slot is noticed by its reader as surely as bytes that changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from kvbm.core.region import Slots

Words = npt.NDArray[np.uint64]


def bound(sums: Words, keys: Sequence[bytes]) -> Words:
    """Checksums of blocks, each made one with its block's key. Its own inverse."""
    mixed: Words = sums ^ heads(keys)
    return mixed


def heads(keys: Sequence[bytes]) -> Words:
    """The first eight bytes of each key."""
    return np.frombuffer(b"".join(key[:8].ljust(8, b"\0") for key in keys), "<u8")


class Sums:
    """Of every slot of host memory, on each rank, the checksum of its bytes, made one with the key of the block."""

    def __init__(self, ranks: int, slots: int) -> None:
        self._sums = np.zeros((ranks, slots), np.uint64)
        self._known = np.zeros(slots, np.bool_)

    def note(self, slots: Slots, keys: Sequence[bytes], sums: Mapping[int, bytes]) -> None:
        """What the ranks say of blocks that are about to be published in these slots."""
        words = {rank: np.frombuffer(theirs, np.uint64) for rank, theirs in sums.items()}
        self._known[slots] = len(words) == len(self._sums) and all(len(each) == len(slots) for each in words.values())
        if len(slots) and self._known[slots[0]]:
            for rank, each in words.items():
                self._sums[rank, slots] = bound(each, keys)

    def known(self, slots: Slots) -> int:
        """Of how many of the first of these every rank has said something."""
        unknown = np.flatnonzero(~self._known[slots])
        return int(unknown[0]) if len(unknown) else len(slots)

    def of(self, slots: Slots) -> list[bytes]:
        """Rank by rank."""
        return [row[slots].tobytes() for row in self._sums]
