"""Reads and writes of blocks, with everything around them going wrong."""

from __future__ import annotations

import errno
import os
import random
import sys
import threading
import time
from pathlib import Path

import pytest

from kvbm.core.errors import Misuse
from kvbm.stores.disk.cipher import Cipher
from kvbm.stores.disk.disk import Disk
from kvbm.stores.disk.folder import Folder
from kvbm.stores.disk.format import PAGE
from kvbm.stores.disk.meta import OVERHEAD_BYTES
from kvbm.stores.disk.shard import Shard, Sync
from kvbm.testing.faults import FaultTransport
from kvbm.testing.store import (
    CORRUPT,
    DONE,
    FAILED,
    MISSING,
    HostBlocks,
    Result,
    Rig,
    StoreSuite,
    key_of,
    labels,
    slots,
)
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


@pytest.mark.parametrize("cipher", [None, Cipher(bytes(32))])
def test_a_cancel_at_any_moment_ends_the_job(tmp_path: Path, cipher: Cipher | None) -> None:
    rig, dice = DiskRig(tmp_path, cipher=cipher), random.Random(0)
    rig.restart(delay=3600)
    for job in range(1000, 1060):
        result, text = Result(), labels([key_of(i) for i in range(4)], job)
        rig.disk.write(job, slots(0, 1, 2, 3), slots(0, 1, 2, 3), text, None, 3600, result)
        time.sleep(dice.random() * 0.002)
        quiet = rig.disk.cancel([job])
        assert result.outcomes == [FAILED] * 4
        assert quiet in (True, False)
        assert rig.disk.wait([job], 30)
        assert rig.disk.pending() == 0
    assert rig.disk.cancel([1000, 77])
    rig.close()


def test_a_deadline_that_passes_in_the_queue(tmp_path: Path) -> None:
    rig, result = DiskRig(tmp_path), Result()
    rig.disk.read(1, slots(0), slots(0), [key_of(1)], 0.0, missing := Result())
    assert missing.outcomes == [MISSING]
    assert rig.write([1], [0]) == [DONE]
    rig.disk.read(77, slots(0), slots(0), [key_of(1)], -1.0, result)
    assert result.outcomes == [FAILED]
    assert result.wait().error == "deadline"
    rig.close()


def test_an_executor_that_is_closed(tmp_path: Path) -> None:
    rig = DiskRig(tmp_path)
    rig.executor.close(0)
    result = rig.start_write([1], [0])
    assert result.outcomes == [FAILED]
    assert "closed" in (result.wait().error or "")
    rig.close()


def test_a_done_that_raises_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rig = DiskRig(tmp_path)
    rig.disk.read(5, slots(0), slots(0), [key_of(1)], 10, lambda *_: 1 / 0)
    assert rig.disk.wait([5], 30)
    assert "completion of job 5 was not processed" in caplog.text
    assert rig.write([1], [0]) == [DONE]
    rig.close()


class Gone(BaseException):
    """What no step of a job catches."""


@pytest.mark.parametrize("cipher", [None, Cipher(bytes(32))])
@pytest.mark.parametrize("where", ["expect", "quarantine", "submit", "done"])
def test_a_thread_that_dies_ends_all_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str, cipher: Cipher | None
) -> None:
    """One job is being moved, others wait for it to end or have not begun; then come more."""
    rig = DiskRig(tmp_path, cipher=cipher)
    assert rig.write([1, 2], [0, 1]) == [DONE] * 2
    rig.damage(1)
    rig.restart(load_delay=0.2)
    moving = [Result() for _ in range(4)]
    for job, result in enumerate(moving):
        rig.disk.read(job, slots(0), slots(job), [key_of(1)], 30, result)
    assert rig.disk.alive()

    def dies(*_: object, **__: object) -> None:
        raise Gone("injected")

    fatal = Result()
    if where == "submit":
        monkeypatch.setattr(rig.disk, "_submit", dies)
    elif where != "done":
        monkeypatch.setattr(rig.shard, where, dies)
    rig.disk.read(10, slots(1), slots(10), [key_of(2)], 30, dies if where == "done" else fatal)
    assert rig.disk.wait([*range(4), 10], 10), "nothing waits for ever"
    _until_dead(rig.disk)
    if where != "done":
        assert fatal.outcomes == [CORRUPT if where == "quarantine" else FAILED]
        assert "died: Gone('injected')" in str(fatal.wait().error)
    for result in moving:
        assert result.outcomes == [FAILED] or (result.outcomes, result.wait().error) == ([DONE], None)
    monkeypatch.undo()
    assert rig.start_write([1], [0]).outcomes == rig.read([1], [0]) == [FAILED]
    rig.close()
    assert caplog.text.count("a thread of the disk tier died") == 1
    assert rig.disk.pending() == 0


def _until_dead(disk: Disk) -> None:
    deadline = time.monotonic() + 10
    while disk.alive():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_thread_that_is_not_there_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even its death could be noted."""
    rig, died = DiskRig(tmp_path), threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda _: died.set())
    monkeypatch.setattr(rig.disk, "_die", lambda _: 1 / 0)
    monkeypatch.setattr(rig.shard, "expect", lambda *_: sys.exit(1))
    rig.disk.read(5, slots(0), slots(0), [key_of(1)], 10, Result())
    assert died.wait(10)
    _until_dead(rig.disk)
    rig.disk.cancel([5])
    rig.close()


def test_memory_has_the_size_of_slots(tmp_path: Path) -> None:
    rig = DiskRig(tmp_path)
    with pytest.raises(Misuse, match="4096 B in memory, of 8192 B on disk"):
        Disk(rig.shard, HostBlocks(2, 4096).region, rig.executor.submit, rig.executor.cancel)
    rig.close()


def test_a_read_that_is_overtaken_by_a_clear_is_not_served(tmp_path: Path) -> None:
    rig = DiskRig(tmp_path)
    assert rig.write([1], [0]) == [DONE]
    rig.restart(load_delay=0.2)
    result = Result()
    rig.disk.read(5, slots(0), slots(0), [key_of(1)], 10, result)
    time.sleep(0.05)
    rig.clear()
    assert result.outcomes == [FAILED]
    assert (result.wait().error, rig.shard.corrupt) == ("the disk tier was cleared", 0)
    rig.close()


@pytest.mark.usefixtures("rows_by_pwrite")
def test_errors_of_the_index_fail_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = DiskRig(tmp_path)

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        result = rig.start_write([1], [0])
        assert result.outcomes == [FAILED]
        assert "No space left on device" in (result.wait().error or "")
    assert rig.write([1], [0]) == [DONE]
    assert rig.read([1], [0]) == [DONE]
    rig.close()
