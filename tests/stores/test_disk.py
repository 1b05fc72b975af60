"""Reads and writes of blocks, with everything around them going wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvbm.stores.cipher import Cipher
from kvbm.stores.disk import Disk
from kvbm.stores.folder import Folder
from kvbm.stores.format import PAGE
from kvbm.stores.meta import OVERHEAD_BYTES
from kvbm.stores.shard import Shard, Sync
from kvbm.testing.faults import FaultTransport
from kvbm.testing.store import HostBlocks, Rig, StoreSuite
from kvbm.transfer.executor import Executor
from tests.stores.plain import PlainTransport

FINGERPRINT = "0123456789abcdef" * 4
BLOCK = 8192
SLOT = 8192


class DiskRig(Rig):
    block_bytes = BLOCK

    def __init__(
        self, folder: Path, *, cipher: Cipher | None = None, sync: Sync = "never", direct: bool = False
    ) -> None:
        super().__init__()
        self.folder, self.cipher, self.sync, self.direct = folder, cipher, sync, direct
        self.memory = HostBlocks(16, SLOT)
        self.open()

    def open(self, **faults: float) -> None:
        self.owner = Folder.claim(self.folder, "test")
        self.namespace = self.owner.namespace(
            FINGERPRINT,
            {},
            ranks=1,
            block_bytes=BLOCK,
            bound_bytes=16 * (SLOT + 128) + 3 * PAGE + 2 * OVERHEAD_BYTES,
            encryption=self.cipher.id if self.cipher else "",
        )
        assert self.namespace.num_slots == 16
        self.generation = self.namespace.generation
        self.shard = Shard(self.namespace.place, 0, sync=self.sync, direct=self.direct)
        self.executor = Executor([FaultTransport(PlainTransport(), **faults)])
        self.store = self.disk = Disk(
            self.shard,
            self.memory.region,
            self.executor.submit,
            self.executor.cancel,
            cipher=self.cipher,
            bounce_bytes=2 * 3 * (SLOT + 4096),
        )

    def restart(self, **faults: float) -> None:
        self.close()
        self.open(**faults)

    def damage(self, slot: int) -> None:
        with self.namespace.place.data(0).open("r+b") as file:
            file.seek(slot * SLOT + 1234)
            byte = file.read(1)[0]
            file.seek(slot * SLOT + 1234)
            file.write(bytes([byte ^ 4]))

    def clear(self) -> None:
        self.generation = self.namespace.clear()
        self.shard.clear(self.generation)

    def close(self) -> None:
        self.store.close(1)
        self.executor.close(1)
        self.namespace.close()
        self.owner.close()


class TestPlain(StoreSuite):
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path) -> None:
        self.path = tmp_path

    def make_rig(self) -> Rig:
        return DiskRig(self.path)


class TestAlwaysSynced(TestPlain):
    def make_rig(self) -> Rig:
        return DiskRig(self.path, sync="always")


class TestDirect(TestPlain):
    def make_rig(self) -> Rig:
        return DiskRig(self.path, sync="batch", direct=True)


class TestEncrypted(TestPlain):
    def make_rig(self) -> Rig:
        return DiskRig(self.path, cipher=Cipher(bytes(32)))
