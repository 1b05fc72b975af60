"""One rank's files of a namespace on disk: which block is in which slot, written down so that a kill cannot lie.

A write is: forget what was in the slots (on disk, too), let a transport write the bytes, then commit their records.
At any instant a slot whose bytes are half overwritten has no record, and a slot with a record has all its bytes. The
index is read and written like any file, never mapped: a mapped file that is cut from outside would kill the process.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal, final

import numpy as np

from kvbm.core.errors import Broken, Misuse
from kvbm.core.region import Plane, Region, Slots
from kvbm.stores.checksum import Words
from kvbm.stores.disk.files import opened, reported, write_all, write_rows
from kvbm.stores.disk.format import PAGE, RECORD, Labels, Mask, Records, Seal, is_empty, marks, pack, packed_keys, parse
from kvbm.stores.disk.meta import DiskPlace
from kvbm.stores.disk.recovery import read_records

logger = logging.getLogger(__name__)

Sync = Literal["never", "batch", "always"]
"""When the disk is told to keep what was written even through a loss of power (docs/disk.md)."""

_STRETCH: Final = 1 << 16


@final
class ShardFile:
    """A file descriptor that lives as long as somebody refers to it, and so as long as any transfer that uses it."""

    def __init__(self, path: Path, flags: int) -> None:
        self.path = path
        self.fd = opened(path, flags)
        weakref.finalize(self, os.close, self.fd).atexit = False

    def fileno(self) -> int:
        """The descriptor."""
        return self.fd


@final
class Shard:
    """The blocks one rank has on disk.

    Slots are the leader's: it never has a slot written that is being read or written, and tells which. Threads: any.
    Calls may wait for the disk. After an error the shard is as before, but for slots named in that call, which are
    empty; `probe` says whether it works again.
    """

    def __init__(
        self,
        place: DiskPlace,
        rank: int,
        *,
        sync: Sync = "batch",
        interval_s: float = 1.0,
        direct: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open a rank's files, making what is missing. `direct`: bytes bypass the page cache where that is possible.

        Raises:
            Broken: the files cannot be used.
        """
        self.place, self.rank, self.sync = place, rank, sync
        self._direct, self._clock = direct, clock
        self._seal = Seal(place.fingerprint)
        self._lock = threading.Lock()
        self._unsynced = False
        self._trouble: str | None = None
        self.corrupt = 0
        """Blocks that turned out to be damaged since the start."""
        self.reopen()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if sync == "batch":
            self._thread = threading.Thread(target=self._sync_often, args=(interval_s,), name="kvbm-sync", daemon=True)
            self._thread.start()

    @property
    def region(self) -> Region:
        """The data file, for transports; its `owner` has the `fd`. Another one after `reopen`."""
        return self._region

    @property
    def trouble(self) -> str | None:
        """Why the last sync in the background failed, None if it did not."""
        return self._trouble

    def bad_slots(self) -> list[int]:
        """Slots in which a damaged block was found and that have not been written since."""
        with self._lock:
            return [int(slot) for slot in np.flatnonzero(self._bad)]

    def __len__(self) -> int:
        """Blocks that are there."""
        with self._lock:
            return int((self._records["key_tail"] > 0).sum())

    def expect(self, slots: Slots, keys: Sequence[bytes]) -> tuple[Mask, Records]:
        """Which of `slots` hold the block of their key, and every slot's record.

        Raises:
            Misuse: a key no block can have, or a slot that is not there.
        """
        self._check(slots)
        words, tails = packed_keys(keys)
        if len(words) != len(slots):
            raise Misuse(f"{len(slots)} slots, but {len(words)} keys")
        with self._lock:
            records = self._records[slots]
        return (records["key"] == words).all(axis=1) & (records["key_tail"] == tails), records

    def forget(self, slots: Slots) -> None:
        """Have these slots empty, on disk as well; before they are overwritten, or for good.

        Raises:
            Broken: the index cannot be written. The slots are empty as far as this process goes.
        """
        self._check(slots)
        with self._lock:
            self._put(slots, np.zeros(len(slots), dtype=RECORD))

    def records(self, slots: Slots, labels: Labels, checksums: Words) -> Records:
        """The records of blocks that are about to be written into `slots`.

        Raises:
            Misuse: labels that do not fit, or of another generation than this one.
        """
        self._check(slots)
        if labels.generation != self.place.generation:
            raise Misuse(f"blocks of generation {labels.generation}, it is now {self.place.generation}")
        return pack(slots, labels, checksums, self.place.block_bytes, self._clock())

    def commit(self, records: Records, region: Region) -> None:
        """Publish blocks whose bytes are completely in their slots of `region`.

        With `sync="always"` they survive a loss of power from now on.

        Raises:
            Misuse: blocks of another generation than this one.
            Broken: the index cannot be written, or the disk not synced, or the files were opened anew since the bytes
                were written. The slots are empty.
        """
        slots = records["slot"].astype(np.int64)
        self._seal.close(records)
        if self.sync == "always":
            with reported(f"sync {self._data.path}"):
                os.fdatasync(self._data.fd)
        with self._lock:
            if region is not self._region:
                raise Broken(f"disk tier: the files in {self.place.folder} were opened anew during a write")
            if (records["generation"] != self.place.generation).any():
                raise Misuse(f"blocks of another generation than {self.place.generation}")
            self._put(slots, records)
        if self.sync == "always":
            try:
                with reported(f"sync {self._index.path}"):
                    os.fdatasync(self._index.fd)
            except Broken:
                with self._lock:
                    self._records[slots] = np.zeros((), dtype=RECORD)
                raise

    def quarantine(self, slots: Slots, found: Records) -> None:
        """Note that the blocks `found` in these slots are damaged: unless rewritten since, they are gone, and marked.

        An index that cannot be written is logged: the next start would find the damage again.
        """
        with self._lock:
            self.corrupt += len(slots)
            same = (self._records["check"][slots] == found["check"]) & (found["key_tail"] > 0)
            slots = slots[same]
            records = marks(slots, self.place.generation, self._clock())
            self._seal.close(records)
            try:
                self._put(slots, records)
            except Broken as error:
                logger.warning("disk tier: bad blocks in slots %s could not be marked: %s", slots.tolist(), error)
            self._bad[slots] = True

    def clear(self, generation: int) -> None:
        """Forget everything, because the leader has begun a new generation."""
        with self._lock:
            self.place = replace(self.place, generation=generation)
            self._records[:] = np.zeros((), dtype=RECORD)
            self._bad[:] = False

    def probe(self) -> None:
        """Try whether the files can be used: they are the ones others see, whole, can be written and read back.

        Raises:
            Broken: they cannot; `reopen` may help.
        """
        with reported(f"use the files of rank {self.rank} in {self.place.folder}"):
            for file, size in ((self._data, self.place.data_bytes), (self._index, self.place.index_bytes)):
                try:
                    seen = os.stat(file.path)
                except FileNotFoundError:
                    raise Broken(f"disk tier: {file.path} was deleted") from None
                if not os.path.samestat(seen, os.fstat(file.fd)):
                    raise Broken(f"disk tier: {file.path} was replaced by another file")
                if seen.st_size < size:
                    raise Broken(f"disk tier: {file.path} was cut from {size:,} to {seen.st_size:,} bytes")
            self._try(self._index.fd, 0, self.place.header(self.rank))
            self._try(self._data.fd, self.place.data_bytes - PAGE, os.urandom(PAGE))
        if self.sync != "never":
            self._synced()

    def reopen(self) -> None:
        """Open the files anew, making what is missing, and read the index. Blocks are those that are in it.

        Not while transfers run that are to be committed. Raises Broken.
        """
        place = self.place
        with reported(f"open the files of rank {self.rank} in {place.folder}"):
            place.prepare(self.rank)
            flags = os.O_RDWR | (os.O_DIRECT if self._direct else 0)
            try:
                data = ShardFile(place.data(self.rank), flags)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                logger.warning("disk tier: %s has no direct I/O: the page cache is used", place.folder)
                data = ShardFile(place.data(self.rank), os.O_RDWR)
            index = ShardFile(place.index(self.rank), os.O_RDWR)
            records = np.zeros(place.num_slots, dtype=RECORD)
            bad = np.zeros(place.num_slots, dtype=np.bool_)
            blank = np.zeros(place.num_slots, dtype=np.bool_)
            for first in range(0, place.num_slots, _STRETCH):
                stretch = slice(first, first + _STRETCH)
                read_records(index.fd, first, records[stretch])
                parsed = parse(records[stretch], first, self._seal, place.generation, place.block_bytes)
                records[stretch][~parsed.blocks] = np.zeros((), dtype=RECORD)
                bad[stretch], blank[stretch] = parsed.bad, parsed.empty
        with self._lock:
            self._data, self._index = data, index
            self._records, self._bad, self._blank = records, bad, blank
            plane = Plane(0, place.slot_bytes, place.slot_bytes)
            self._region = Region(f"G3 rank {self.rank}", "file", place.num_slots, (plane,), owner=data)

    def close(self) -> None:
        """Sync, unless that is never done, and stop. May be called again. Transfers may still end, unpublished."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        if self.sync != "never":
            try:
                self._synced()
            except Broken as error:
                logger.warning("%s", error)

    def _check(self, slots: Slots) -> None:
        if len(slots) and not (slots.min() >= 0 and slots.max() < self.place.num_slots):
            raise Misuse(f"slots {slots.min()} to {slots.max()}: there are {self.place.num_slots}")

    def _put(self, slots: Slots, records: Records) -> None:
        """Write records, each run of slots at once. Lock held. Slots are empty if that fails."""
        self._records[slots] = np.zeros((), dtype=RECORD)
        self._bad[slots] = False
        blank = is_empty(records)
        needed = np.flatnonzero(~(blank & self._blank[slots]))
        needed = needed[np.argsort(slots[needed], kind="stable")]
        self._unsynced = True
        self._blank[slots[needed]] = False
        with reported(f"write {self._index.path}"):
            write_rows(self._index.fd, records[needed], slots[needed], PAGE)
        self._blank[slots] = blank
        self._records[slots[records["key_tail"] > 0]] = records[records["key_tail"] > 0]

    def _try(self, fd: int, offset: int, content: bytes) -> None:
        page = mmap.mmap(-1, PAGE)  # on a page's boundary, as direct I/O wants it
        page[:] = content
        write_all(fd, memoryview(page), offset)
        page[:] = bytes(PAGE)
        if os.preadv(fd, [page], offset) != PAGE or page[:] != content:
            raise Broken(f"disk tier: what is written in {self.place.folder} does not come back")

    def _synced(self) -> None:
        """Data before index, so that a record that is kept has its bytes."""
        self._unsynced = False
        with reported(f"sync {self.place.folder}"):
            os.fdatasync(self._data.fd)
            os.fdatasync(self._index.fd)
        self._trouble = None

    def _sync_often(self, interval_s: float) -> None:
        while not self._closed.wait(interval_s):
            if self._unsynced:
                try:
                    self._synced()
                except Broken as error:
                    self._unsynced = True
                    if self._trouble is None:
                        logger.warning("%s", error)
                    self._trouble = str(error)
