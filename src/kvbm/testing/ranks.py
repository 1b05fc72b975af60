"""What a tier's part on a rank has to pass. Subclass `RankTierSuite` in a test file and supply `rig`."""

from __future__ import annotations

import ctypes
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np
import pytest

from kvbm.abc.transport import Completion, Transport
from kvbm.core.outcome import Outcome
from kvbm.core.region import Region, Slots, packed
from kvbm.link.messages import FromTier, Sick
from kvbm.stores.checksum import Words, checksums
from kvbm.stores.memory import Arena
from kvbm.tiers.tier import RankTier
from kvbm.transfer.executor import Executor

KEYS: Final = tuple(bytes([number]) * 32 for number in range(1, 9))
SLOTS: Final = 16
FILLING: Final = 1000
"""The job that fills a place; tests have lower ones."""
PATIENCE_S: Final = 10.0
STILL_S: Final = 0.1
"""How long nothing must happen any more."""


class Side:
    """What a rank has for its tiers (`kvbm.tiers.tier.RankSide`): host memory of SLOTS slots of `slot_bytes`, one every
    `stride` bytes. Writes down what it is told."""

    rank = 0

    def __init__(self, slot_bytes: int, stride: int, transports: Sequence[Transport]) -> None:
        self.slot_bytes, self.stride = slot_bytes, stride
        self.executor = Executor(transports)
        self.sums: Words = np.zeros(SLOTS, np.uint64)
        self.arena = Arena(SLOTS * stride)
        self.begun: list[int] = []
        """Reads that were said to have begun."""
        self.ends: list[tuple[int, Completion]] = []
        self.told: list[FromTier | Sick] = []
        self._news = threading.Condition()

    def memory(self, name: str, slot_bytes: int = 0) -> Region:
        """See `RankSide`."""
        rows = slot_bytes or self.stride
        return packed(name, self.arena.address, [rows], SLOTS, stride=self.stride, owner=self.arena)

    def tell(self, message: FromTier | Sick) -> None:
        """See `RankSide`."""
        self.told.append(message)

    def reads(self, job: int) -> None:
        """See `RankSide`."""
        self.begun.append(job)

    def read(self, slots: Slots, job: int, completion: Completion, sums: Words) -> None:
        """See `RankSide`."""
        self.sums[slots] = sums
        self._over(job, completion)

    def written(self, job: int, completion: Completion) -> None:
        """See `RankSide`."""
        self._over(job, completion)

    def _over(self, job: int, completion: Completion) -> None:
        with self._news:
            self.ends.append((job, completion))
            self._news.notify_all()

    def wait(self, *jobs: int) -> list[Completion]:
        """How these ended."""
        with self._news:
            ended = self._news.wait_for(lambda: {job for job, _ in self.ends}.issuperset(jobs), PATIENCE_S)
            assert ended, f"of {jobs} only {[job for job, _ in self.ends]} were answered"
            said = dict(self.ends)
        return [said[job] for job in jobs]

    def answers(self) -> Counter[int]:
        """How often each job was answered."""
        return Counter(job for job, _ in self.ends)

    def put(self, slot: int, data: bytes) -> None:
        """The engine has stored this block."""
        ctypes.memmove(self.arena.address + slot * self.stride, data, self.slot_bytes)
        self.sums[slot] = checksums(self.memory("put", self.slot_bytes), np.array([slot]), self.slot_bytes)[0]

    def get(self, slot: int) -> bytes:
        """What is there now."""
        return ctypes.string_at(self.arena.address + slot * self.stride, self.slot_bytes)

    def close(self) -> None:
        """The rank ends."""
        self.executor.close(PATIENCE_S)
        self.arena.close()


class RankTierRig(ABC):
    """A tier's part on one rank, open and ready, beside `side`."""

    part: RankTier
    side: Side
    writes: bool = True
    """Whether blocks are written there."""

    def fill(self, keys: Sequence[bytes], blocks: Sequence[bytes]) -> None:
        """The place has these, and nothing was said of it."""
        for slot, block in enumerate(blocks):
            self.side.put(slot, block)
        self.part.take(self.write(FILLING, keys, range(len(keys))))
        self.side.wait(FILLING)
        self.side.ends.clear()

    @abstractmethod
    def read(self, job: int, keys: Sequence[bytes], slots: Sequence[int]) -> bytes:
        """The order to read them to these slots of host memory."""

    def write(self, job: int, keys: Sequence[bytes], slots: Sequence[int]) -> bytes:
        """The order to write these slots under these keys, one after the other in a prompt."""
        raise NotImplementedError

    @abstractmethod
    def spoil(self, key: bytes) -> None:
        """The place has other bytes there."""


class RankTierSuite(ABC):
    """The rules that it keeps (`kvbm.tiers.tier.RankTier`)."""

    @pytest.fixture
    @abstractmethod
    def rig(self) -> RankTierRig:
        """A new one for each test. The fixture closes it."""

    @staticmethod
    def block(rig: RankTierRig, number: int) -> bytes:
        """Bytes that no other number has."""
        return np.random.default_rng(number).bytes(rig.side.slot_bytes)

    def filled(self, rig: RankTierRig, count: int) -> list[bytes]:
        """The first keys are there; their blocks."""
        blocks = [self.block(rig, number) for number in range(count)]
        rig.fill(KEYS[:count], blocks)
        return blocks

    def test_a_read_is_answered_once_with_the_bytes_and_their_checksums(self, rig: RankTierRig) -> None:
        blocks = self.filled(rig, 3)
        rig.part.take(rig.read(7, KEYS[:3], [5, 1, 9]))
        (done,) = rig.side.wait(7)
        assert done.outcomes.tolist() == [Outcome.DONE] * 3
        assert [rig.side.get(slot) for slot in (5, 1, 9)] == blocks
        slots = np.array([5, 1, 9])
        sums = checksums(rig.side.memory("sums", rig.side.slot_bytes), slots, rig.side.slot_bytes)
        assert rig.side.sums[slots].tolist() == sums.tolist()
        assert rig.side.begun == [7]
        time.sleep(STILL_S)
        assert rig.side.answers() == {7: 1}

    def test_a_write_is_answered_once_and_can_be_read(self, rig: RankTierRig) -> None:
        if not rig.writes:
            pytest.skip("nothing is written there")
        blocks = [self.block(rig, number) for number in range(3)]
        for slot, block in enumerate(blocks):
            rig.side.put(slot, block)
        rig.part.take(rig.write(1, KEYS[:3], [0, 1, 2]))
        (done,) = rig.side.wait(1)
        assert done.outcomes.tolist() == [Outcome.DONE] * 3
        rig.part.take(rig.read(2, KEYS[:3], [9, 8, 7]))
        rig.side.wait(2)
        assert [rig.side.get(slot) for slot in (9, 8, 7)] == blocks
        assert rig.side.answers() == {1: 1, 2: 1}

    def test_what_is_not_what_it_was_is_corrupt_and_nothing_else(self, rig: RankTierRig) -> None:
        blocks = self.filled(rig, 3)
        rig.spoil(KEYS[1])
        rig.part.take(rig.read(1, KEYS[:3], [0, 1, 2]))
        (done,) = rig.side.wait(1)
        assert done.outcomes.tolist() == [Outcome.DONE, Outcome.CORRUPT, Outcome.DONE]
        assert (rig.side.get(0), rig.side.get(2)) == (blocks[0], blocks[2])

    def test_cancelled_ones_are_answered_once_and_touch_nothing_afterwards(self, rig: RankTierRig) -> None:
        self.filled(rig, 2)
        jobs = list(range(1, 9))
        for job in jobs:
            rig.part.take(rig.read(job, KEYS[:2], [2 * job - 2, 2 * job - 1]))
        rig.part.cancel([*jobs, 10_000])
        rig.part.cancel(jobs)
        ends = rig.side.wait(*jobs)
        assert all(set(end.outcomes.tolist()) <= {Outcome.DONE, Outcome.FAILED} for end in ends)
        for slot in range(SLOTS):
            rig.side.put(slot, b"\xa5" * rig.side.slot_bytes)
        time.sleep(STILL_S)
        assert all(rig.side.get(slot) == b"\xa5" * rig.side.slot_bytes for slot in range(SLOTS))
        assert rig.side.answers() == dict.fromkeys(jobs, 1)

    def test_jobs_of_others_are_nobodys(self, rig: RankTierRig) -> None:
        blocks = self.filled(rig, 1)
        rig.part.cancel([5, 6])
        rig.part.take(rig.read(7, KEYS[:1], [0]))
        (done,) = rig.side.wait(7)
        assert done.outcomes.tolist() == [Outcome.DONE]
        assert rig.side.get(0) == blocks[0]

    def test_nothing_is_late_or_dead_while_all_is_well(self, rig: RankTierRig) -> None:
        self.filled(rig, 1)
        told = len(rig.side.told)
        rig.part.take(rig.read(1, KEYS[:1], [0]))
        rig.part.expire()
        rig.part.look()
        (done,) = rig.side.wait(1)
        assert done.error is None
        assert not [message for message in rig.side.told[told:] if isinstance(message, Sick)]

    def test_after_it_was_closed_nothing_is_touched_or_said(self, rig: RankTierRig) -> None:
        self.filled(rig, 2)
        for job in range(1, 5):
            rig.part.take(rig.read(job, KEYS[:2], [2 * job, 2 * job + 1]))
        rig.part.close(PATIENCE_S)
        said = rig.side.answers()
        assert not said or max(said.values()) == 1
        for slot in range(SLOTS):
            rig.side.put(slot, b"\xa5" * rig.side.slot_bytes)
        time.sleep(STILL_S)
        assert all(rig.side.get(slot) == b"\xa5" * rig.side.slot_bytes for slot in range(SLOTS))
        assert rig.side.answers() == said
