"""Checksums of blocks in memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import xxhash

from kvbm import native
from kvbm.abc.transport import Completion
from kvbm.core.errors import Misuse
from kvbm.core.outcome import Outcome
from kvbm.core.region import Plane, Region, Slots

Words = npt.NDArray[np.uint64]


def sums_of(completion: Completion, region: Region, slots: Slots, length: int) -> Words:
    """Checksums of the blocks of a copy to or from these slots; of those that were not copied they mean nothing."""
    if completion.sums is not None:
        return completion.sums
    sums = np.zeros(len(slots), np.uint64)
    there = completion.outcomes == Outcome.DONE
    sums[there] = checksums(region, slots[there], length)
    return sums


def verified(completion: Completion, region: Region, slots: Slots, sums: Words, length: int) -> Completion:
    """How a copy out of these slots ended: what does not have its checksum any more (`sums`, by slot) is corrupt."""
    changed = sums_of(completion, region, slots, length) != sums[slots]
    bad = np.flatnonzero(changed & (completion.outcomes == Outcome.DONE))
    if not len(bad):
        return completion
    outcomes = completion.outcomes.copy()
    outcomes[bad] = Outcome.CORRUPT
    return replace(completion, outcomes=outcomes, error=completion.error or f"{len(bad)} blocks in host memory changed")


def extents(region: Region, slots: Slots, length: int) -> Iterator[memoryview]:
    """The first `length` bytes of each slot of a host region whose slots are one extent each.

    Raises:
        Misuse: a region that is not so, or a slot it does not have.
    """
    first = _extent(region, slots, length)
    span = (region.num_slots - 1) * first.stride + region.slot_bytes
    memory = memoryview((ctypes.c_uint8 * span).from_address(first.address)).cast("B")
    for slot in slots.tolist():
        yield memory[slot * first.stride : slot * first.stride + length]


def _extent(region: Region, slots: Slots, length: int) -> Plane:
    """Where the slots begin. Raises Misuse, see `extents`."""
    if len(slots) and not (slots.min() >= 0 and slots.max() < region.num_slots):
        raise Misuse(f"slots {slots.min()} to {slots.max()}: region {region.name!r} has {region.num_slots}")
    first, end = region.planes[0], region.planes[0].address
    for plane in region.planes:
        if region.kind != "host" or (plane.address, plane.stride) != (end, first.stride) or length > region.slot_bytes:
            raise Misuse(f"region {region.name!r} does not have {length} contiguous bytes of host memory per slot")
        end += plane.row_bytes
    return first


def checksums(region: Region, slots: Slots, length: int) -> Words:
    """xxh3-64 of the first `length` bytes of each of these slots of a host region (see `extents`)."""
    if length < native.XXH3_FROM:
        return np.array([xxhash.xxh3_64_intdigest(each) for each in extents(region, slots, length)], np.uint64)
    first, sums = _extent(region, slots, length), np.empty(len(slots), np.uint64)
    native.checksums(first.address, first.stride, length, np.ascontiguousarray(slots, np.int64), sums.view(np.int64))
    return sums
