"""Reads and writes of the disk tier, as steps that `kvbm.stores.disk.disk` takes."""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from ctypes import addressof, c_char
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt

from kvbm.abc.transport import Completion, Plan
from kvbm.core.outcome import Outcome
from kvbm.core.region import Plane, Region, Slots
from kvbm.stores.checksum import Words, checksums, extents
from kvbm.stores.disk.cipher import TAG_BYTES, Cipher
from kvbm.stores.disk.format import PAGE, Labels, Records
from kvbm.stores.disk.shard import Shard

Done = Callable[[int, Completion, Words], None]
"""Called with the job, how it ended, and the checksum of each block; of one that is not `DONE` it means nothing."""


@dataclass(frozen=True, slots=True)
class Sides:
    """Between what blocks move, and how they are encrypted."""

    shard: Shard
    memory: Region
    cipher: Cipher | None


class DiskJob(ABC):
    """One call of `read` or `write`.

    One thread at a time has it; `error`, `moving`, `busy` (steps that somebody is in) and `over` (its end is told by
    somebody) are under the disk's lock.
    """

    rank: int
    """Lower goes first."""

    def __init__(
        self, sides: Sides, number: int, memory_slots: Slots, disk_slots: Slots, deadline: float, done: Done
    ) -> None:
        self.sides, self.number, self.deadline, self.done = sides, number, deadline, done
        self.memory_slots, self.disk_slots = memory_slots, disk_slots
        self.outcomes: npt.NDArray[np.uint8] = np.full(len(disk_slots), Outcome.FAILED, dtype=np.uint8)
        self.sums: Words = np.zeros(len(disk_slots), dtype=np.uint64)
        self.left: npt.NDArray[np.int64] = np.arange(len(disk_slots))
        """Which blocks of the job are still to be moved; `piece`: which are moved now."""
        self.piece = self.left[:0]
        self.bounce: Bounce | None = None
        self.busy, self.over = 0, False
        self.moving: int | None = None
        self.error: str | None = None
        self.why: str | None = None
        self.seconds, self.nbytes = 0.0, 0
        self.region = sides.shard.region
        self.records: Records

    @abstractmethod
    def prepare(self) -> None:
        """What comes before the first byte."""

    @abstractmethod
    def plan(self) -> Plan:
        """How to move `piece`, to or from the bounce buffer if there is one."""

    @abstractmethod
    def arrived(self, here: npt.NDArray[np.int64]) -> None:
        """These of the job's blocks were moved: set their outcomes."""

    def side(self) -> tuple[Region, Slots]:
        """Where in memory a transport finds the blocks of `piece`, or puts them."""
        if self.bounce is not None:
            return self.bounce.region, np.arange(len(self.piece))
        return self.sides.memory, self.memory_slots[self.piece]

    def plain(self, blocks: npt.NDArray[np.int64]) -> list[memoryview]:
        """The memory of these blocks."""
        return list(extents(self.sides.memory, self.memory_slots[blocks], self.sides.shard.place.block_bytes))


@final
class DiskWrite(DiskJob):
    rank = 1

    def __init__(
        self,
        sides: Sides,
        number: int,
        memory_slots: Slots,
        disk_slots: Slots,
        deadline: float,
        done: Done,
        labels: Labels,
        sums: Words | None,
    ) -> None:
        super().__init__(sides, number, memory_slots, disk_slots, deadline, done)
        self.labels, self.given = labels, sums

    def prepare(self) -> None:
        shard, memory = self.sides.shard, self.sides.memory
        given = self.given
        self.sums = checksums(memory, self.memory_slots, shard.place.block_bytes) if given is None else given
        self.records = shard.records(self.disk_slots, self.labels, self.sums)
        shard.forget(self.disk_slots)

    def plan(self) -> Plan:
        memory, slots = self.side()
        if (cipher := self.sides.cipher) is not None and self.bounce is not None:
            place = self.sides.shard.place
            rooms = extents(self.bounce.wide, slots, place.block_bytes + TAG_BYTES)
            for block, plain, into in zip(self.piece.tolist(), self.plain(self.piece), rooms, strict=True):
                cipher.encrypt(plain, into, self.records[block : block + 1], place.fingerprint)
        return Plan(memory, slots, self.region, self.disk_slots[self.piece], False, "store")

    def arrived(self, here: npt.NDArray[np.int64]) -> None:
        self.sides.shard.commit(self.records[here], self.region)
        self.outcomes[here] = Outcome.DONE


@final
class DiskRead(DiskJob):
    rank = 0

    def __init__(
        self,
        sides: Sides,
        number: int,
        memory_slots: Slots,
        disk_slots: Slots,
        deadline: float,
        done: Done,
        keys: Sequence[bytes],
        urgent: bool,
    ) -> None:
        super().__init__(sides, number, memory_slots, disk_slots, deadline, done)
        self.keys, self.urgent = keys, urgent

    def prepare(self) -> None:
        found, self.records = self.sides.shard.expect(self.disk_slots, self.keys)
        self.outcomes[~found] = Outcome.MISSING
        self.left = np.flatnonzero(found)

    def plan(self) -> Plan:
        return Plan(self.region, self.disk_slots[self.piece], *self.side(), self.urgent, "load")

    def arrived(self, here: npt.NDArray[np.int64]) -> None:
        shard, place = self.sides.shard, self.sides.shard.place
        if (self.records["generation"][here] != place.generation).any():
            self.why = "the disk tier was cleared"
            return
        good = np.ones(len(here), dtype=np.bool_)
        if (cipher := self.sides.cipher) is not None and self.bounce is not None:
            rooms = extents(self.bounce.wide, np.flatnonzero(np.isin(self.piece, here)), place.block_bytes + TAG_BYTES)
            for i, (plain, room) in enumerate(zip(self.plain(here), rooms, strict=True)):
                good[i] = cipher.decrypt(room, plain, self.records[here[i] : here[i] + 1], place.fingerprint)
        self.sums[here] = checksums(self.sides.memory, self.memory_slots[here], place.block_bytes)
        good &= self.sums[here] == self.records["checksum"][here]
        self.outcomes[here] = np.where(good, Outcome.DONE, Outcome.CORRUPT)
        if len(damaged := here[~good]):
            shard.quarantine(self.disk_slots[damaged], self.records[damaged])


@final
class Bounce:
    """Anonymous memory for encrypted blocks: `region` as a transport sees it, `wide` with a tag's room per slot."""

    def __init__(self, slot_bytes: int, slots: int) -> None:
        memory = mmap.mmap(-1, slots * (slot_bytes + PAGE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without; a virtual disk can take several times as long with small pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        address, stride = addressof(c_char.from_buffer(memory)), slot_bytes + PAGE
        self.region = Region("G3 bounce", "host", slots, (Plane(address, stride, slot_bytes),), owner=memory)
        self.wide = Region("G3 bounce", "host", slots, (Plane(address, stride, stride),), owner=memory)
