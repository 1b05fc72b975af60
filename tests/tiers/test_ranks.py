"""The rules of a tier's part on a rank, kept by the disk's, by those of other instances and of shared storage, and by a
dict's."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from kvbm.abc.transport import Completion, Plan
from kvbm.core.region import Region
from kvbm.link.messages import FromTier, Sick, pack
from kvbm.stores.checksum import checksums
from kvbm.stores.disk.disk import Disk
from kvbm.stores.disk.folder import Folder
from kvbm.stores.disk.meta import DiskPlace, bytes_of
from kvbm.stores.disk.shard import Shard
from kvbm.stores.objects.envelope import Envelope
from kvbm.stores.objects.folder import FolderStore
from kvbm.stores.objects.names import Names
from kvbm.stores.objects.runs import RunFormat, Shape
from kvbm.testing.ranks import FILLING, KEYS, PATIENCE_S, SLOTS, RankTierRig, RankTierSuite, Side
from kvbm.tiers.disk.orders import Read, Write, to_open
from kvbm.tiers.disk.orders import to_rank as to_disk
from kvbm.tiers.disk.rank import DiskRank
from kvbm.tiers.objects.clerk import Habits
from kvbm.tiers.objects.mover import Library
from kvbm.tiers.objects.orders import AttachArenas, GetRun, PutRun, RankArena, RunsPlace
from kvbm.tiers.objects.orders import decode_answer as objects_answer
from kvbm.tiers.objects.orders import to_open as to_storage
from kvbm.tiers.objects.orders import to_rank as objects_order
from kvbm.tiers.objects.rank import CallLimits, ObjectsRank
from kvbm.tiers.peers.orders import Attach, Pull
from kvbm.tiers.peers.orders import to_rank as to_peers
from kvbm.tiers.peers.rank import PeerMemory, PeerRank
from kvbm.tiers.tier import RankSide
from kvbm.transfer.executor import Executor
from kvbm.transfer.file import FileTransport
from kvbm.transfer.memcpy import MemcpyTransport
from tests.build.g9 import G9Rank, Order

BLOCK = 8768


class OnDisk(RankTierRig):
    def __init__(self, path: Path) -> None:
        self.folder = Folder.claim(path / "g3", "e").namespace(
            "f" * 64, {}, ranks=1, block_bytes=BLOCK, bound_bytes=bytes_of(SLOTS, 1, 12288)
        )
        self.place = self.folder.place
        self.side = Side(BLOCK, self.place.slot_bytes, [MemcpyTransport(1), FileTransport(2, 8, "threads")])
        self.part = DiskRank(self.side, self._open, PATIENCE_S)
        self.part.open(to_open(self.place).body)
        self.part.ready()
        self.slots: dict[bytes, int] = {}

    @staticmethod
    def _open(place: DiskPlace, side: RankSide) -> Disk:
        shard = Shard(place, side.rank, sync="never", direct=False)
        return Disk(shard, side.memory("G2 for the disk"), side.executor.submit, side.executor.cancel)

    def _of(self, keys: Sequence[bytes]) -> bytes:
        return pack([self.slots.setdefault(key, len(self.slots)) for key in keys])

    def write(self, job: int, keys: Sequence[bytes], slots: Sequence[int]) -> bytes:
        count, parents = len(keys), [None, *keys[:-1]]
        return to_disk(
            Write(
                job, pack(slots), self._of(keys), list(keys), parents, np.zeros(count, np.int32).tobytes(),
                np.full(count, np.inf).tobytes(), 0, 0,
            )
        ).body  # fmt: skip

    def read(self, job: int, keys: Sequence[bytes], slots: Sequence[int]) -> bytes:
        return to_disk(Read(job, self._of(keys), pack(slots), list(keys))).body

    def spoil(self, key: bytes) -> None:
        with self.place.data(0).open("r+b") as file:
            file.seek(self.slots[key] * self.place.slot_bytes + 5000)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))

    def close(self) -> None:
        self.folder.close()


class Near(MemcpyTransport):
    """Another instance's memory is here: NIXL, played."""

    restarts = 0

    def reaches(self, source: Region, destination: Region) -> bool:
        return True

    def submit(self, plan: Plan, done: Callable[[Completion], None]) -> int:
        return super().submit(replace(plan, source=replace(plan.source, kind="host")), done)

    def register(self, region: Region) -> None:
        """It is reachable."""

    def metadata(self) -> bytes:
        return b"agent"

    def connect(self, metadata: bytes) -> str:
        return metadata.decode()

    def disconnect(self, peer: str) -> None:
        """Nothing was connected."""


class OfOthers(RankTierRig):
    writes = False

    def __init__(self) -> None:
        self.side, self.theirs = Side(BLOCK, BLOCK, []), Side(BLOCK, BLOCK, [])
        transport: Any = Near(1)

        def opened(side: RankSide) -> PeerMemory:
            return PeerMemory(transport, Executor([transport]), side.memory("G2", BLOCK), side, PATIENCE_S)

        self.part = PeerRank(self.side, opened)
        self.part.open(b"")
        self.part.ready()
        self.part.take(to_peers(Attach("other", b"agent", self.theirs.arena.address, BLOCK, SLOTS)).body)
        self.slots: dict[bytes, int] = {}

    def fill(self, keys: Sequence[bytes], blocks: Sequence[bytes]) -> None:
        for slot, (key, block) in enumerate(zip(keys, blocks, strict=True)):
            self.slots[key] = slot
            self.theirs.put(slot, block)

    def read(self, job: int, keys: Sequence[bytes], slots: Sequence[int]) -> bytes:
        theirs = [self.slots[key] for key in keys]
        return to_peers(Pull(job, "other", pack(theirs), pack(slots), self.theirs.sums[theirs].tobytes())).body

    def spoil(self, key: bytes) -> None:
        ctypes.memset(self.theirs.arena.address + self.slots[key] * BLOCK + 5000, 0x11, 8)

    def close(self) -> None:
        self.theirs.close()


class InStorage(RankTierRig):
    """Blocks of one run of all keys."""

    writes = False

    def __init__(self, path: Path) -> None:
        self.side = Side(BLOCK, BLOCK, [])
        self.path, shape = path / "kv", Shape(len(KEYS), 1, BLOCK)
        self.library = Library(FolderStore(self.path), Envelope(), Names(b"n"), RunFormat("f", shape))
        limits, habits = CallLimits(4 * shape.data_bytes, PATIENCE_S, 4), Habits(1.0, 1 << 30, PATIENCE_S)
        self.part = ObjectsRank(self.side, lambda place, shape: self.library, limits, habits)
        self.part.open(to_storage(RunsPlace("f", "m", len(KEYS), [0], "0123456789abcdef")).body)
        self.part.ready()
        (self.arena,) = (objects_answer(said.body) for said in self.side.told if isinstance(said, FromTier))
        assert isinstance(self.arena, RankArena)
        self.part.take(objects_order(AttachArenas([self.arena])).body)
        self.name = self.library.names.run(self.library.names.digest(KEYS[-1]))

    def fill(self, keys: Sequence[bytes], blocks: Sequence[bytes]) -> None:
        slots = np.arange(len(KEYS))
        for slot in slots.tolist():
            self.side.put(slot, blocks[slot] if slot < len(blocks) else bytes(BLOCK))
        sums = checksums(self.side.memory("fill", BLOCK), slots, BLOCK).tobytes()
        put = PutRun(FILLING, pack(slots), list(KEYS), None, 0, bytes(len(KEYS)), sums)
        self.part.take(objects_order(put).body)
        self.side.wait(FILLING)
        self.side.ends.clear()

    def read(self, job: int, keys: Sequence[bytes], slots: Sequence[int]) -> bytes:
        at = [KEYS.index(key) for key in keys]
        return objects_order(GetRun(job, KEYS[-1], pack(at), pack(slots), list(keys))).body

    def spoil(self, key: bytes) -> None:
        path = self.path / self.name
        data = bytearray(path.read_bytes())
        data[64 + self.library.format.header_bytes + KEYS.index(key) * BLOCK + 5000] ^= 1
        path.write_bytes(data)

    def close(self) -> None:
        """Nothing else was opened."""


class InDict(RankTierRig):
    def __init__(self, path: Path) -> None:
        self.side, self.bad = Side(BLOCK, BLOCK, []), set[bytes]()
        self.part = G9Rank(self.side, 0.0, self.bad, path)

    def write(self, job: int, keys: Sequence[bytes], slots: Sequence[int]) -> bytes:
        return msgspec.msgpack.encode(Order(job, False, pack(slots), list(keys)))

    def read(self, job: int, keys: Sequence[bytes], slots: Sequence[int]) -> bytes:
        return msgspec.msgpack.encode(Order(job, True, pack(slots), list(keys)))

    def spoil(self, key: bytes) -> None:
        self.bad.add(key)

    def close(self) -> None:
        """Nothing else was opened."""


def running(rig: Any) -> Iterator[RankTierRig]:
    yield rig
    rig.part.close(PATIENCE_S)
    rig.close()
    rig.side.close()


class TestDisk(RankTierSuite):
    @pytest.fixture
    def rig(self, tmp_path: Path) -> Iterator[RankTierRig]:
        yield from running(OnDisk(tmp_path))


class TestPeers(RankTierSuite):
    @pytest.fixture
    def rig(self) -> Iterator[RankTierRig]:
        yield from running(OfOthers())


class TestStorage(RankTierSuite):
    @pytest.fixture
    def rig(self, tmp_path: Path) -> Iterator[RankTierRig]:
        yield from running(InStorage(tmp_path))


class TestDict(RankTierSuite):
    @pytest.fixture
    def rig(self, tmp_path: Path) -> Iterator[RankTierRig]:
        yield from running(InDict(tmp_path))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"host": "another"}, "different hosts"),
        ({"fd": 99_999}, "cannot be mapped"),
    ],
)
def test_the_memory_of_a_rank_that_is_not_here(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Shared storage is not used, with a sentence; nothing is read or written."""
    rig = InStorage(tmp_path)
    other = msgspec.structs.replace(rig.arena, rank=1, **changed)
    rig.part.take(objects_order(AttachArenas([rig.arena, other])).body)
    (sick,) = (message for message in rig.side.told if isinstance(message, Sick))
    assert said in sick.problem
    rig.part.close(PATIENCE_S)
    rig.side.close()
