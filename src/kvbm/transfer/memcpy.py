"""Host to host copies on threads of our own.

A chunk cannot be a Python call: beside a busy Python thread each call would wait up to 5 ms to get the GIL back, ten
times what the copy takes. So a thread enters the C helper with the whole plan; in there chunks are taken off a shared
counter (several threads can join one plan), and a flag makes everybody leave after the chunk at hand. Checksums are
made in there, too, while a block's bytes are in the cache: afterwards they would be read from memory once more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kvbm.abc.transport import Completion, Plan
from kvbm.core.errors import Misuse
from kvbm.core.region import Region, Slots
from kvbm.native import XXH3_FROM, copy_rows
from kvbm.transfer.lanes import LaneJob, LaneTransport
from kvbm.transfer.plan import Rows, checked_slots, chunk_blocks, coalesce

CHUNK_BYTES: Final = 4 << 20
"""Bytes that are copied without looking up: half a millisecond, the longest a cancel or an urgent plan waits."""


@dataclass(slots=True, eq=False, kw_only=True)
class _Copy(LaneJob):
    """Its parts are blocks."""

    rows: Rows
    source: Slots
    destination: Slots

    def move(self, thread: int) -> None:
        rows = self.rows
        copy_rows(
            rows.source_address,
            rows.source_stride,
            rows.destination_address,
            rows.destination_stride,
            rows.row_bytes,
            self.source,
            self.destination,
            self.control,
            self.step,
            *(() if self.sums is None else (self.sums.view(np.int64),)),
        )

    def moved(self) -> tuple[npt.NDArray[np.bool_], str | None]:
        return np.arange(self.parts) < self.begun, None


class MemcpyTransport(LaneTransport):
    """Copies between host regions on `threads` daemon threads.

    Urgent plans go first, on as many threads as they have chunks for; the others on one thread at a time, so that they
    leave memory bandwidth to the engine's forward pass. Within each of the two lanes plans start in order. `cancel`
    waits for the chunks at hand, so it is always `QUIESCED`.
    """

    def __init__(self, threads: int) -> None:
        super().__init__("memcpy", threads, background=1)

    def reaches(self, source: Region, destination: Region) -> bool:
        return source.kind == destination.kind == "host" and source.fits(destination)

    def _job(self, plan: Plan, done: Callable[[Completion], None]) -> LaneJob:
        if not plan.source.kind == plan.destination.kind == "host":
            raise Misuse(f"memcpy does not reach from {plan.source.kind!r} to {plan.destination.kind!r}")
        source, destination = checked_slots(plan)
        return _Copy(
            plan,
            done,
            parts=len(source),
            step=chunk_blocks(plan.source.slot_bytes, CHUNK_BYTES),
            rows=coalesce(plan.source, plan.destination),
            source=source,
            destination=destination,
            sums=np.zeros(len(source), np.uint64) if plan.sums and plan.source.slot_bytes >= XXH3_FROM else None,
        )
