"""A plan made ready for copying: checked, its planes coalesced. Pure arithmetic, nothing is touched here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvbm.abc.transport import Plan
from kvbm.core.errors import Misuse
from kvbm.core.region import Region, Slots


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What of one slot is contiguous on both sides: one entry per run of planes, in bytes."""

    source_address: npt.NDArray[np.int64]
    source_stride: npt.NDArray[np.int64]
    destination_address: npt.NDArray[np.int64]
    destination_stride: npt.NDArray[np.int64]
    row_bytes: npt.NDArray[np.int64]


def coalesce(source: Region, destination: Region) -> Rows:
    """The rows to copy per slot, with planes that follow each other on both sides merged into one."""
    here, there = _planes(source), _planes(destination)
    rows = here[:, 2]
    joined = np.ones(len(rows) - 1, dtype=bool)
    for planes in (here, there):
        joined &= planes[1:, 0] == planes[:-1, 0] + rows[:-1]
        joined &= planes[1:, 1] == planes[:-1, 1]
    first = np.flatnonzero(np.concatenate(([True], ~joined)))
    return Rows(
        here[first, 0], here[first, 1], there[first, 0], there[first, 1], np.add.reduceat(rows, first, dtype=np.int64)
    )


def checked_slots(plan: Plan) -> tuple[Slots, Slots]:
    """Private copies of the plan's two slot lists.

    Raises:
        Misuse: rows that do not fit, lists that differ in length, a slot out of range, a destination twice, or a slot
            that is both read and written.
    """
    if not plan.source.fits(plan.destination):
        raise Misuse(f"rows of region {plan.source.name!r} are not those of {plan.destination.name!r}")
    return slot_lists(plan)


def slot_lists(plan: Plan) -> tuple[Slots, Slots]:
    """The same of a plan whose regions are known to fit."""
    source = _slots(plan.source, plan.source_slots)
    destination = _slots(plan.destination, plan.destination_slots)
    if len(source) != len(destination):
        raise Misuse(f"{len(source)} source slots for {len(destination)} destination slots")
    if len(np.unique(destination)) != len(destination):
        raise Misuse(f"a slot of region {plan.destination.name!r} is the destination of two blocks")
    if plan.source == plan.destination and len(np.intersect1d(source, destination)):
        raise Misuse(f"a slot of region {plan.source.name!r} is source and destination at once")
    return source, destination


def chunk_blocks(slot_bytes: int, chunk_bytes: int) -> int:
    """How many blocks make a chunk of about `chunk_bytes`: at least one."""
    return max(1, chunk_bytes // slot_bytes)


def _planes(region: Region) -> npt.NDArray[np.int64]:
    return np.array([(p.address, p.stride, p.row_bytes) for p in region.planes], dtype=np.int64)


def _slots(region: Region, slots: Slots) -> Slots:
    if slots.ndim != 1 or slots.dtype.kind not in "iu":
        raise Misuse(f"slots of region {region.name!r} must be a list of whole numbers")
    if len(slots) and (slots.min() < 0 or slots.max() >= region.num_slots):
        raise Misuse(
            f"slots {slots.min()}..{slots.max()} are not all in region {region.name!r} of {region.num_slots} slots"
        )
    return np.array(slots, dtype=np.int64, order="C")
