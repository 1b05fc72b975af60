"""What a store of slots has to pass. Subclass `StoreSuite` in a test file and supply a `Rig`."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

import numpy as np
import pytest

from kvbm.abc.transport import Completion
from kvbm.core.errors import Misuse
from kvbm.core.outcome import Outcome
from kvbm.core.region import Slots
from kvbm.stores.checksum import Words, extents
from kvbm.stores.disk.format import Labels
from kvbm.stores.disk.jobs import Done
from kvbm.stores.memory import Arena

PATIENCE_S: Final = 60.0
DONE, MISSING, CORRUPT, FAILED = Outcome.DONE, Outcome.MISSING, Outcome.CORRUPT, Outcome.FAILED


class Store(Protocol):
    """What `kvbm.stores.disk.disk.Disk` is, to the suite; the contracts are there."""

    def write(
        self,
        job: int,
        memory_slots: Slots,
        disk_slots: Slots,
        labels: Labels,
        sums: Words | None,
        deadline_s: float,
        done: Done,
    ) -> None: ...
    def read(
        self,
        job: int,
        disk_slots: Slots,
        memory_slots: Slots,
        keys: Sequence[bytes],
        deadline_s: float,
        done: Done,
    ) -> None: ...
    def wait(self, jobs: Sequence[int], timeout_s: float) -> bool: ...
    def close(self, timeout_s: float) -> None: ...


class HostBlocks:
    """`slots` slots of host memory, on page boundaries."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self._arena = Arena(slots * slot_bytes)
        self.region = self._arena.region([slot_bytes], slots)

    def get(self, slot: int, length: int) -> bytes:
        """The first `length` bytes."""
        return bytes(next(extents(self.region, slots(slot), length)))

    def put(self, slot: int, data: bytes) -> None:
        """Overwrite the first bytes."""
        next(extents(self.region, slots(slot), len(data)))[:] = data


class Result:
    """A `done` that keeps what it is told."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self.calls: list[tuple[int, Completion, Words]] = []

    def __call__(self, job: int, completion: Completion, sums: Words) -> None:
        self.calls.append((job, completion, sums))
        self._over.set()

    def wait(self) -> Completion:
        """The completion."""
        assert self._over.wait(PATIENCE_S), "done was not called"
        return self.calls[0][1]

    @property
    def outcomes(self) -> list[Outcome]:
        """Every block's."""
        return [Outcome(outcome) for outcome in self.wait().outcomes]


class Rig(ABC):
    """A store with 16 slots, and a memory with 16, between which `faults` (see `FaultTransport`) go wrong."""

    store: Store
    memory: HostBlocks
    block_bytes: int
    generation: int = 0

    def __init__(self) -> None:
        self._jobs = iter(range(1, 1 << 62))
        self._sequence = 1

    @abstractmethod
    def restart(self, **faults: float) -> None:
        """Close the store, and open it again on what it left, with these faults."""

    @abstractmethod
    def damage(self, slot: int) -> None:
        """Change a stored block's bytes behind the store's back."""

    @abstractmethod
    def clear(self) -> None:
        """Begin a new generation."""

    @abstractmethod
    def close(self) -> None:
        """Close everything."""

    def start_write(self, blocks: Sequence[int], disk_slots: Sequence[int], **change: Any) -> Result:
        """Write blocks whose bytes follow from their numbers, from the memory's slots 0, 1, ..."""
        keys = [key_of(block) for block in blocks]
        for slot, key in enumerate(keys):
            self.memory.put(slot, bytes_of(key, self.block_bytes))
        text = replace(labels(keys, self._sequence, self.generation), **change)
        self._sequence += len(blocks)
        result = Result()
        places = slots(*range(len(blocks)))
        self.store.write(next(self._jobs), places, slots(*disk_slots), text, None, PATIENCE_S, result)
        return result

    def write(self, blocks: Sequence[int], disk_slots: Sequence[int]) -> list[Outcome]:
        """The outcomes of `start_write`."""
        return self.start_write(blocks, disk_slots).outcomes

    def read(self, blocks: Sequence[int], disk_slots: Sequence[int]) -> list[Outcome]:
        """Read blocks into the memory's last slots, and look at each that is `DONE`: bytes and checksum."""
        result, keys = Result(), [key_of(block) for block in blocks]
        places = slots(*range(16 - len(blocks), 16))
        self.store.read(next(self._jobs), slots(*disk_slots), places, keys, PATIENCE_S, result)
        for place, key, outcome in zip(places, keys, result.outcomes, strict=True):
            if outcome is DONE:
                assert self.memory.get(int(place), self.block_bytes) == bytes_of(key, self.block_bytes)
        completion = result.wait()
        assert (completion.error is None) == (set(result.outcomes) <= {DONE})
        return result.outcomes


class StoreSuite:
    """What is read is what was written, or it says so."""

    def make_rig(self) -> Rig:
        """An empty store; the suite closes it."""
        raise NotImplementedError

    @pytest.fixture
    def rig(self) -> Iterator[Rig]:
        rig = self.make_rig()
        yield rig
        rig.close()

    def test_blocks_come_back_from_their_slots(self, rig: Rig) -> None:
        assert rig.write([1, 2, 3, 4], [7, 0, 15, 8]) == [DONE] * 4
        assert rig.read([4, 1, 3], [8, 7, 15]) == [DONE] * 3

    def test_what_is_not_there_is_missing(self, rig: Rig) -> None:
        assert rig.write([1, 2], [0, 1]) == [DONE] * 2
        assert rig.read([1, 2, 3], [1, 1, 2]) == [MISSING, DONE, MISSING]

    def test_a_slot_has_what_was_written_last(self, rig: Rig) -> None:
        assert rig.write([1, 2], [0, 1]) == [DONE] * 2
        assert rig.write([3, 2], [0, 2]) == [DONE] * 2
        assert rig.read([1, 3, 2, 2], [0, 0, 1, 2]) == [MISSING, DONE, DONE, DONE]

    def test_empty_jobs_end(self, rig: Rig) -> None:
        assert rig.write([], []) == []
        assert rig.read([], []) == []

    def test_the_checksums_are_those_of_the_blocks(self, rig: Rig) -> None:
        result = rig.start_write([1, 2, 1], [0, 1, 2])
        assert result.outcomes == [DONE] * 3
        sums = result.calls[0][2].tolist()
        assert sums[0] == sums[2] != sums[1]

    def test_damage_is_found_once_and_only_there(self, rig: Rig) -> None:
        assert rig.write([1, 2, 3], [0, 1, 2]) == [DONE] * 3
        rig.damage(1)
        assert rig.read([1, 2, 3], [0, 1, 2]) == [DONE, CORRUPT, DONE]
        assert rig.read([1, 2, 3], [0, 1, 2]) == [DONE, MISSING, DONE]
        assert rig.write([4], [1]) == [DONE]
        assert rig.read([4], [1]) == [DONE]

    def test_a_restart_keeps_what_was_done(self, rig: Rig) -> None:
        assert rig.write([1, 2, 3], [3, 4, 9]) == [DONE] * 3
        assert rig.write([5], [4]) == [DONE]
        rig.damage(9)
        rig.restart()
        assert rig.read([1, 2, 5, 3], [3, 4, 4, 9]) == [DONE, MISSING, DONE, CORRUPT]
        rig.restart()
        assert rig.read([1, 5, 3], [3, 4, 9]) == [DONE, DONE, MISSING]

    def test_a_new_generation_finds_nothing_of_the_old_one(self, rig: Rig) -> None:
        assert rig.write([1, 2], [0, 1]) == [DONE] * 2
        rig.clear()
        assert rig.read([1, 2], [0, 1]) == [MISSING] * 2
        assert rig.write([2], [0]) == [DONE]
        rig.restart()
        assert rig.read([1, 2, 2], [0, 0, 1]) == [MISSING, DONE, MISSING]

    def test_labels_of_another_generation_are_refused(self, rig: Rig) -> None:
        assert rig.start_write([1], [0], generation=rig.generation + 1).outcomes == [FAILED]
        assert rig.read([1], [0]) == [MISSING]

    @pytest.mark.parametrize("fault", ["fail", "short"])
    def test_a_write_that_fails_leaves_nothing(self, rig: Rig, fault: str) -> None:
        assert rig.write([1], [0]) == [DONE]
        rig.restart(**{f"store_{fault}": 1})
        assert rig.write([2], [0]) == [FAILED]
        assert rig.read([1, 2], [0, 0]) == [MISSING] * 2
        rig.restart()
        assert rig.read([1, 2], [0, 0]) == [MISSING] * 2

    @pytest.mark.parametrize("fault", ["flip", "garble", "torn", "lie"])
    def test_a_write_that_goes_wrong_unseen_is_found_by_the_read(self, rig: Rig, fault: str) -> None:
        assert rig.write([1, 3], [0, 1]) == [DONE] * 2
        rig.restart(**{f"store_{fault}": 1})
        assert rig.write([2], [0]) == [DONE]
        assert rig.read([2, 1, 3], [0, 0, 1]) == [CORRUPT, MISSING, DONE]

    @pytest.mark.parametrize("fault", ["flip", "garble", "torn", "lie"])
    def test_a_read_that_goes_wrong_unseen_is_corrupt(self, rig: Rig, fault: str) -> None:
        assert rig.write([1, 2], [0, 1]) == [DONE] * 2
        rig.restart(**{f"load_{fault}": 1})
        for slot in range(16):
            rig.memory.put(slot, bytes(rig.block_bytes))
        assert rig.read([1, 2], [0, 1]) == [CORRUPT] * 2

    @pytest.mark.parametrize("fault", ["fail", "short"])
    def test_a_read_that_fails_can_be_repeated(self, rig: Rig, fault: str) -> None:
        assert rig.write([1, 2], [0, 1]) == [DONE] * 2
        rig.restart(**{f"load_{fault}": 1})
        assert rig.read([1, 2], [0, 1]) == [FAILED] * 2
        rig.restart()
        assert rig.read([1, 2], [0, 1]) == [DONE] * 2

    def test_many_jobs_at_once_with_everything_going_wrong(self, rig: Rig) -> None:
        odds = {"fail": 0.1, "flip": 0.1, "torn": 0.1, "lie": 0.1, "short": 0.1, "delay": 0.002, "seed": 1}
        rig.restart(**odds)
        seen = set[Outcome]()
        for turn in range(30):
            written = rig.start_write(range(100 * turn, 100 * turn + 4), range(4))
            results = [Result() for _ in range(6)]
            for i, result in enumerate(results):
                keys = [key_of(100 * turn - 100 * i + 4)]
                rig.store.read(next(rig._jobs), slots(4 + i), slots(8 + i), keys, PATIENCE_S, result)
            seen.update(written.outcomes, *(result.outcomes for result in results))
            seen.update(rig.read(range(100 * turn, 100 * turn + 4), range(4)))
        assert seen == {DONE, MISSING, CORRUPT, FAILED}

    def test_misuse_is_refused_and_done_not_called(self, rig: Rig) -> None:
        result = Result()
        with pytest.raises(Misuse):
            rig.store.read(1, slots(1, 2), slots(1), [key_of(1)] * 2, PATIENCE_S, result)
        with pytest.raises(Misuse):
            rig.store.write(1, slots(1), slots(1, 2), labels([key_of(1)]), None, PATIENCE_S, result)
        rig.store.close(PATIENCE_S)
        with pytest.raises(Misuse):
            rig.store.read(1, slots(1), slots(1), [key_of(1)], PATIENCE_S, result)
        assert result.calls == []

    def test_nonsense_fails(self, rig: Rig) -> None:
        for change in ({"keys": [bytes(34)]}, {"keys": [b""]}, {"parents": [b"", b""]}):
            assert rig.start_write([1], [0], **change).outcomes == [FAILED]
        assert rig.write([1], [16]) == [FAILED]
        assert rig.read([1], [-1]) == [FAILED]

    def test_close_ends_everything(self, rig: Rig) -> None:
        assert rig.write([1, 2], [0, 1]) == [DONE] * 2
        rig.restart(delay=3600)
        results = [rig.start_write([3], [2]), Result()]
        rig.store.read(next(rig._jobs), slots(0), slots(15), [key_of(1)], PATIENCE_S, results[1])
        rig.store.close(1)
        assert [len(result.calls) for result in results] == [1, 1]
        assert [result.outcomes for result in results] == [[FAILED], [FAILED]]


def slots(*numbers: int) -> Slots:
    """Slot numbers."""
    return np.array(numbers, dtype=np.int64)


def key_of(block: int) -> bytes:
    """The key of a block that has a number."""
    return (block + 1).to_bytes(32, "little", signed=True)


def bytes_of(key: bytes, length: int) -> bytes:
    """The contents of a block, which follow from its key."""
    return np.random.default_rng(list(key)).bytes(length)


def labels(keys: Sequence[bytes], sequence: int = 1, generation: int = 0, expires: float = np.inf) -> Labels:
    """Labels of blocks without parents."""
    count = len(keys)
    return Labels(keys, [b""] * count, np.zeros(count, dtype=np.int32), np.full(count, expires), sequence, generation)
