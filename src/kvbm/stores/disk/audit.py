"""Every block of a rank read and checked, without an engine; for people who want to know (``kvbm disk verify``)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import numpy as np
import xxhash

from kvbm.stores.disk.cipher import TAG_BYTES, Cipher
from kvbm.stores.disk.files import opened, read_up_to, reported, write_all
from kvbm.stores.disk.format import PAGE, RECORD, Records, Seal, marks, parse
from kvbm.stores.disk.meta import DiskPlace
from kvbm.stores.disk.recovery import open_index, read_records

_STRETCH: Final = 1 << 14
_TOLD_BYTES: Final = 32 << 20
"""Bytes of blocks between two words about how far it is."""


@dataclass(frozen=True, slots=True)
class Audit:
    """What one rank has: whole blocks, slots of blocks that are not, slots of records that are not intact."""

    whole: int
    bad: tuple[int, ...]
    damaged: tuple[int, ...]


def audit(
    place: DiskPlace,
    rank: int,
    cipher: Cipher | None,
    *,
    repair: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Audit:
    """Read all blocks of a rank; `progress` is told how many slots were looked at. The caller has the folder's lock.

    `repair` marks the slots of blocks that are not whole, and empties records that are not intact. Blocks that are
    encrypted are whole if `cipher` says so.

    Raises:
        Broken: a file cannot be read, or written for the repair.
    """
    seal, whole, bad, damaged = Seal(place.fingerprint), 0, list[int](), list[int]()
    often = max(1, _TOLD_BYTES // place.block_bytes)
    with ExitStack() as stack, reported(f"read what rank {rank} has in {place.folder}"):
        index = open_index(place, rank, stack, os.O_RDWR if repair else os.O_RDONLY)
        if index is None:
            return Audit(0, (), ())
        data = opened(place.data(rank), os.O_RDONLY)
        stack.callback(os.close, data)
        os.posix_fadvise(data, 0, 0, os.POSIX_FADV_DONTNEED)  # what is on the disk, not what is remembered of it
        for first in range(0, place.num_slots, _STRETCH):
            records = np.zeros(min(_STRETCH, place.num_slots - first), dtype=RECORD)
            read_records(index, first, records)
            parsed = parse(records, first, seal, place.generation, place.block_bytes)
            damaged += (first + np.flatnonzero(parsed.damaged)).tolist()
            told = 0
            for count, at in enumerate(np.flatnonzero(parsed.blocks).tolist(), 1):
                if _is_whole(place, data, records[at : at + 1], cipher):
                    whole += 1
                else:
                    bad.append(first + at)
                if progress is not None and count % often == 0:
                    progress(at + 1 - told)
                    told = at + 1
            if progress is not None:
                progress(len(records) - told)
        if repair:
            _mark(place, seal, index, bad, damaged)
    return Audit(whole, tuple(bad), tuple(damaged))


def _is_whole(place: DiskPlace, data: int, record: Records, cipher: Cipher | None) -> bool:
    block = memoryview(bytearray(place.block_bytes + TAG_BYTES))
    plain = block[: place.block_bytes]
    if read_up_to(data, plain, int(record["slot"][0]) * place.slot_bytes) < len(plain):
        return False
    if cipher is not None:
        plain = memoryview(bytearray(place.block_bytes))
        if not cipher.decrypt(block, plain, record, place.fingerprint):
            return False
    return xxhash.xxh3_64_intdigest(plain) == int(record["checksum"][0])


def _mark(place: DiskPlace, seal: Seal, index: int, bad: list[int], damaged: list[int]) -> None:
    found = marks(np.array(bad, dtype=np.int64), place.generation, time.time())
    seal.close(found)
    for slot, record in [*zip(bad, found, strict=True), *((slot, np.zeros((), dtype=RECORD)) for slot in damaged)]:
        write_all(index, record.tobytes(), PAGE + slot * RECORD.itemsize)
    os.fsync(index)
