"""A shard whose files go wrong under it."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kvbm.core.errors import Broken, Misuse
from kvbm.stores.disk.format import PAGE
from kvbm.stores.disk.meta import DiskPlace as Place
from kvbm.stores.disk.shard import Shard
from kvbm.testing.store import key_of, labels, slots

PLACE = Place("", "d" * 64, 1, 4096, 32, 0)


def commit(shard: Shard, places: list[int], blocks: list[int], generation: int = 0) -> None:
    at = slots(*places)
    shard.forget(at)
    text = labels([key_of(block) for block in blocks], 1, generation)
    shard.commit(shard.records(at, text, np.arange(len(places), dtype=np.uint64)), shard.region)


def has(shard: Shard, place: int, block: int) -> bool:
    return bool(shard.expect(slots(place), [key_of(block)])[0][0])


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(str(tmp_path / "dddddddddddddddd"), *[getattr(PLACE, name) for name in PLACE.__slots__[1:]])


@pytest.fixture
def shard(place: Place) -> Iterator[Shard]:
    shard = Shard(place, 0, sync="never", direct=False)
    yield shard
    shard.close()


def fails(number: int) -> Callable[..., int]:
    def call(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    return call


def test_the_region_is_the_data_file(shard: Shard, place: Place) -> None:
    region = shard.region
    assert (region.kind, region.num_slots, region.slot_bytes) == ("file", 32, 4096)
    assert (region.planes[0].address, region.planes[0].stride) == (0, 4096)
    assert os.path.samestat(os.fstat(region.owner.fd), os.stat(place.data(0)))


def test_an_open_file_lives_as_long_as_somebody_has_the_region(shard: Shard) -> None:
    region = shard.region
    shard.reopen()
    assert shard.region is not region
    fd = region.owner.fd
    os.fstat(fd)
    del region
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


@pytest.mark.usefixtures("rows_by_pwrite")
def test_runs_of_slots_are_one_write(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[int, int]] = []
    real = os.pwrite

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        written.append((offset, len(data)))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    commit(shard, [7, 3, 4, 20, 5], [1, 2, 3, 4, 5])
    assert written == [(PAGE + 3 * 128, 3 * 128), (PAGE + 7 * 128, 128), (PAGE + 20 * 128, 128)]
    shard.forget(slots(9, 10))  # nothing was there
    assert len(written) == 3


def test_what_is_forgotten_does_not_come_back(shard: Shard, place: Place) -> None:
    commit(shard, [1, 2], [1, 2])
    shard.forget(slots(1))
    shard.reopen()
    assert not has(shard, 1, 1)
    assert has(shard, 2, 2)
    assert len(shard) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.usefixtures("rows_by_pwrite")
def test_an_index_that_cannot_be_written(shard: Shard, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(shard, [1, 2], [1, 2])
    at = slots(1, 3)
    records = shard.records(at, labels([key_of(5), key_of(6)]), np.zeros(2, dtype=np.uint64))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fails(number))
        for call in (lambda: shard.forget(at), lambda: shard.commit(records, shard.region), shard.probe):
            with pytest.raises(Broken, match="disk tier: cannot"):
                call()
    assert not has(shard, 1, 1)
    assert not has(shard, 1, 5)
    assert has(shard, 2, 2)
    shard.probe()
    # What is still on disk there is known to be: it goes before the slot is written.
    shard.forget(slots(1))
    shard.reopen()
    assert len(shard) == 1


def test_labels_of_another_generation_and_files_of_another_time(shard: Shard) -> None:
    records = shard.records(slots(1), labels([key_of(1)]), np.zeros(1, dtype=np.uint64))
    old = shard.region
    shard.clear(1)
    with pytest.raises(Misuse, match="another generation"):
        shard.commit(records, old)
    with pytest.raises(Misuse, match="generation 0"):
        shard.records(slots(1), labels([key_of(1)]), np.zeros(1, dtype=np.uint64))
    records = shard.records(slots(1), labels([key_of(1)], 1, 1), np.zeros(1, dtype=np.uint64))
    shard.reopen()
    with pytest.raises(Broken, match="opened anew"):
        shard.commit(records, old)
    assert len(shard) == 0


def test_slots_that_are_not_there(shard: Shard) -> None:
    for call in (
        lambda at: shard.forget(at),
        lambda at: shard.expect(at, [key_of(1)]),
        lambda at: shard.records(at, labels([key_of(1)]), np.zeros(1, dtype=np.uint64)),
    ):
        for slot in (-1, 32):
            with pytest.raises(Misuse, match="there are 32"):
                call(slots(slot))
    with pytest.raises(Misuse, match="1 slots, but 2 keys"):
        shard.expect(slots(1), [key_of(1)] * 2)


def test_a_bad_block_is_marked_for_good_until_its_slot_is_written(shard: Shard) -> None:
    commit(shard, [1, 2], [1, 2])
    _, found = shard.expect(slots(1), [key_of(1)])
    shard.quarantine(slots(1), found)
    for _ in range(2):
        assert (shard.bad_slots(), len(shard), shard.corrupt) == ([1], 1, 1)
        shard.reopen()
    commit(shard, [1], [9])
    assert (shard.bad_slots(), len(shard)) == ([], 2)
    shard.quarantine(slots(1), found)  # somebody read it before it was written again
    assert has(shard, 1, 9)


@pytest.mark.usefixtures("rows_by_pwrite")
def test_a_mark_that_cannot_be_written_is_no_error(
    shard: Shard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    commit(shard, [1], [1])
    _, found = shard.expect(slots(1), [key_of(1)])
    monkeypatch.setattr(os, "pwrite", fails(errno.EIO))
    shard.quarantine(slots(1), found)
    assert not has(shard, 1, 1)
    assert shard.bad_slots() == [1]
    assert "could not be marked" in caplog.text


# -- probe --


def test_a_folder_that_was_deleted_is_made_again(shard: Shard, place: Place) -> None:
    commit(shard, [1], [1])
    shard.probe()
    shutil.rmtree(place.folder)
    with pytest.raises(Broken, match="was deleted"):
        shard.probe()
    shard.reopen()
    shard.probe()
    assert len(shard) == 0
    commit(shard, [1], [1])


def test_a_file_that_was_replaced(shard: Shard, place: Place) -> None:
    shutil.copy(place.data(0), str(place.data(0)) + ".copy")
    os.rename(str(place.data(0)) + ".copy", place.data(0))
    with pytest.raises(Broken, match="replaced"):
        shard.probe()


@pytest.mark.parametrize("which", ["data", "index"])
def test_a_file_that_was_cut(shard: Shard, place: Place, which: str) -> None:
    commit(shard, [0, 30], [1, 2])
    path = place.data(0) if which == "data" else place.index(0)
    os.truncate(path, PAGE + 10 * 128)
    with pytest.raises(Broken, match="was cut from"):
        shard.probe()
    shard.reopen()
    shard.probe()
    assert has(shard, 0, 1)
    assert has(shard, 30, 2) == (which == "data")  # its bytes are gone, which a read finds out


def test_a_disk_that_forgets(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: len(data))
    with pytest.raises(Broken, match="does not come back"):
        shard.probe()


def test_a_damaged_header_begins_anew(shard: Shard, place: Place) -> None:
    commit(shard, [1], [1])
    os.pwrite(os.open(place.index(0), os.O_RDWR), b"?", 20)
    shard.reopen()
    assert len(shard) == 0
    shard.probe()


def test_a_link_is_not_followed(shard: Shard, place: Place, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"precious")
    place.data(0).unlink()
    place.data(0).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Broken):
        shard.reopen()
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"


def test_no_direct_io_is_a_warning(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.open

    def refuse(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    shard = Shard(place, 0, sync="never")
    assert "has no direct I/O" in caplog.text
    shard.probe()
    shard.close()


# -- sync --


def test_batches_are_synced_in_the_background_data_first(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    shard = Shard(place, 0, sync="batch", interval_s=0.01, direct=False)
    time.sleep(0.05)
    assert synced == []
    commit(shard, [1], [1])
    deadline = time.monotonic() + 30
    while len(synced) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert synced == [shard._data.fd, shard._index.fd]
    shard.close()


def test_a_sync_that_fails_is_logged_once_and_known(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shard = Shard(place, 0, sync="batch", interval_s=0.01, direct=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fails(errno.EIO))
        commit(shard, [1], [1])
        deadline = time.monotonic() + 30
        while shard.trouble is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert "EIO" in (shard.trouble or "") or "Input/output error" in (shard.trouble or "")
        assert [record.levelno for record in caplog.records].count(logging.WARNING) == 1
    while shard.trouble is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert shard.trouble is None
    shard.close()


def test_always_means_before_it_is_published(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = Shard(place, 0, sync="always", direct=False)
    synced: list[tuple[int, bool]] = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append((fd, shard._records["key_tail"][1] > 0)))
    commit(shard, [1], [1])
    assert [fd for fd, _ in synced] == [shard._data.fd, shard._index.fd]
    monkeypatch.setattr(os, "fdatasync", fails(errno.EIO))
    with pytest.raises(Broken):
        commit(shard, [2], [2])
    assert not has(shard, 2, 2)
    assert has(shard, 1, 1)
    shard.close()
