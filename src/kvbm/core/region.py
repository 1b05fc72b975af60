"""Memory as KVBM sees it: slots of one size, each made of rows in one or more planes.

A *plane* is where one row of every slot lies: slot ``i`` has its row at ``address + i * stride``. An engine's KV cache
is a region with a plane per layer (two where K and V lie apart); the host arena is a region whose planes are the same
rows, one after the other inside one extent per block. A transfer is therefore always "these slots of that region to
those slots of this region", whatever the engine's layout is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.int64]
"""Slot numbers of one region, in the order of a transfer."""


@dataclass(frozen=True, slots=True)
class Plane:
    """One row of every slot. `address` and `stride` in bytes; `row_bytes` are contiguous."""

    address: int
    stride: int
    row_bytes: int


@dataclass(frozen=True, slots=True)
class Region:
    """Described once, registered once with every transport that can reach it.

    `kind` is "host" (CPU memory of this process), "cuda" (memory of a GPU, which only its driver may touch), "file" or
    "peer". `owner` keeps the memory alive. A
    file region's planes have their `address` in the file, and its owner has the open file as `fd: int`; an `OpenFile`
    does. The file stays open while the region is in use. The owner of a "cuda" region is its `Device`.
    """

    name: str
    kind: str
    num_slots: int
    planes: tuple[Plane, ...]
    owner: Any = field(default=None, repr=False, compare=False)
    dtype: str = field(default="", compare=False)
    """The numbers that rows are made of (float32, bfloat16, ...), for comparisons; empty: not known, or other
    things lie between them."""

    def __post_init__(self) -> None:
        if self.num_slots < 1 or not self.planes:
            raise ValueError(f"region {self.name!r} needs at least one slot and one plane")
        for plane in self.planes:
            if plane.row_bytes < 1 or abs(plane.stride) < plane.row_bytes:
                raise ValueError(f"region {self.name!r}: rows of {plane.row_bytes} B overlap at stride {plane.stride}")

    @property
    def slot_bytes(self) -> int:
        """Bytes one slot holds, over all planes."""
        return sum(plane.row_bytes for plane in self.planes)

    def fits(self, other: Region) -> bool:
        """Whether slots can be copied between the two: the same rows in the same order."""
        return [p.row_bytes for p in self.planes] == [p.row_bytes for p in other.planes]


@dataclass(frozen=True, slots=True)
class OpenFile:
    """Owner of a file region: a file descriptor that somebody else opened and closes."""

    fd: int


def packed(
    name: str,
    address: int,
    row_bytes: Sequence[int],
    num_slots: int,
    *,
    stride: int = 0,
    kind: str = "host",
    owner: Any = None,
) -> Region:
    """A region whose slots are one extent each: the rows one after the other, a slot every `stride` bytes from
    `address` (0: back to back)."""
    stride = stride or sum(row_bytes)
    planes, offset = [], 0
    for rows in row_bytes:
        planes.append(Plane(address + offset, stride, rows))
        offset += rows
    return Region(name, kind, num_slots, tuple(planes), owner)
