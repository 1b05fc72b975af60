"""Blocks of a run between slots of host memory and one buffer, with their checksums made on the way."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import xxhash

from kvbm import native
from kvbm.core.region import Region, Slots
from kvbm.stores.checksum import Words


class Buffer:
    """Memory of our own for one object, on page boundaries."""

    def __init__(self, nbytes: int) -> None:
        self._map = mmap.mmap(-1, nbytes)
        self.view = memoryview(self._map)
        self.address = address_of(self.view)


def address_of(view: memoryview) -> int:
    """Where its bytes lie. The caller keeps it alive."""
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def gather(memory: Region, slots: Slots, into: int) -> Words:
    """Copy slots of a host region, each one extent, to the address `into`, one behind the other. Returns the checksums
    of what was copied. The caller has checked the slots, and that there is room."""
    plane, count = memory.planes[0], np.arange(len(slots), dtype=np.int64)
    return _copy(plane.address, plane.stride, into, memory.slot_bytes, memory.slot_bytes, slots, count)


def scatter(source: int, at: Slots, memory: Region, slots: Slots) -> Words:
    """Copy the blocks `at` of those that lie one behind the other from the address `source` on to slots of a host
    region. Returns the checksums of what was copied."""
    plane = memory.planes[0]
    return _copy(source, memory.slot_bytes, plane.address, plane.stride, memory.slot_bytes, at, slots)


def _copy(
    source: int, source_stride: int, target: int, target_stride: int, nbytes: int, from_: Slots, to: Slots
) -> Words:
    sums = np.zeros(len(from_), np.uint64)
    if not len(from_):
        return sums
    if nbytes < native.XXH3_FROM:
        for at, (one, other) in enumerate(zip(from_.tolist(), to.tolist(), strict=True)):
            data = ctypes.string_at(source + one * source_stride, nbytes)
            ctypes.memmove(target + other * target_stride, data, nbytes)
            sums[at] = xxhash.xxh3_64_intdigest(data)
        return sums
    planes = np.array([source, source_stride, target, target_stride, nbytes], np.int64)
    native.copy_rows(
        planes[0:1], planes[1:2], planes[2:3], planes[3:4], planes[4:5], np.ascontiguousarray(from_, np.int64),
        np.ascontiguousarray(to, np.int64), np.zeros(2, np.int64), len(from_), sums.view(np.int64),
    )  # fmt: skip
    return sums


def sums_at(source: int, nbytes: int, blocks: int) -> Words:
    """Checksums of blocks that lie one behind the other from this address on."""
    if nbytes < native.XXH3_FROM:
        return np.array(
            [xxhash.xxh3_64_intdigest(ctypes.string_at(source + at * nbytes, nbytes)) for at in range(blocks)],
            np.uint64,
        )
    sums = np.zeros(blocks, np.uint64)
    native.checksums(source, nbytes, nbytes, np.arange(blocks, dtype=np.int64), sums.view(np.int64))
    return sums
