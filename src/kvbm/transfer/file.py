"""Between host memory and files: direct I/O with a deep queue, a whole plan per C call.

What follows each other in the file is one operation, wherever its memory lies (an operation has a list of memory
segments), up to a size at which several operations in flight do better than one.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from kvbm.abc.transport import Completion, Plan
from kvbm.core.errors import Broken, Misuse
from kvbm.core.region import Region, Slots
from kvbm.native import Ring, run_io
from kvbm.transfer.lanes import LaneJob, LaneTransport
from kvbm.transfer.plan import checked_slots, coalesce

logger = logging.getLogger(__name__)

OPERATION_BYTES: Final = 1 << 20
"""A longer range of the file becomes several operations, each less than twice this (this, if slots divide it)."""
SEGMENTS: Final = 1024
"""Pieces of memory in one operation; the kernel takes no more."""
ALIGNMENT: Final = 4096
"""What direct I/O needs of offsets, addresses, strides and rows, on any device."""
PATIENCE_S: Final = 0.05
"""How long a cancel waits for operations in flight; a slow disk can take seconds for one."""
LAST_OFFSET: Final = 1 << 62
NOT_RUN: Final = np.iinfo(np.int64).min
REFUSALS: Final = {
    errno.ENOSYS: "this kernel has none, or one from before Linux 5.6",
    errno.EPERM: "a seccomp filter (as containers have) or kernel.io_uring_disabled forbids it",
    errno.ENOMEM: "no memory for it within the limit on locked memory",
}


@dataclass(frozen=True, slots=True, eq=False)
class Operations:
    """A plan as I/O: what `Ring.run` takes, and how to find the blocks again in its results.

    Arrays are int64. A *piece* is what is contiguous on both sides, of one block. `end_in_operation[i]` are the bytes
    its operation has moved once piece `i` is complete.
    """

    offsets: Slots
    first: Slots
    segments: Slots
    results: Slots
    lengths: Slots
    block: Slots
    operation: Slots
    end_in_operation: Slots

    def complete(self, blocks: int) -> npt.NDArray[np.bool_]:
        """Which of the plan's blocks have every piece in place."""
        lacking = self.results[self.operation] < self.end_in_operation
        whole = np.ones(blocks, dtype=bool)
        whole[self.block[lacking]] = False
        return whole


def operations(plan: Plan, file_slots: Slots, memory_slots: Slots, *, write: bool) -> Operations:
    """The plan's pieces in the order of the file, merged into operations."""
    rows = coalesce(plan.source, plan.destination)
    sides = [(rows.source_address, rows.source_stride), (rows.destination_address, rows.destination_stride)]
    file, memory = sides[::-1] if write else sides
    offset = (file[0] + file_slots[:, None] * file[1]).ravel()
    address = (memory[0] + memory_slots[:, None] * memory[1]).ravel()
    length = np.tile(rows.row_bytes, len(file_slots))
    block = np.repeat(np.arange(len(file_slots)), len(rows.row_bytes))

    cuts = -(-length // OPERATION_BYTES)
    if len(cuts) and cuts.max() > 1:
        piece = np.repeat(np.arange(len(cuts)), cuts)
        begin = (np.arange(len(piece)) - np.repeat(np.cumsum(cuts) - cuts, cuts)) * OPERATION_BYTES
        offset, address, block = offset[piece] + begin, address[piece] + begin, block[piece]
        length = np.minimum(length[piece] - begin, OPERATION_BYTES)

    order = np.argsort(offset, kind="stable")
    offset, address, length, block = offset[order], address[order], length[order], block[order]
    number = np.arange(len(offset))
    run = _starts(offset[1:] != offset[:-1] + length[:-1])
    first_of_run = np.flatnonzero(run)[np.cumsum(run) - 1]
    cut = np.stack(((offset - offset[first_of_run]) // OPERATION_BYTES, (number - first_of_run) // SEGMENTS))
    starts = run | _starts((cut[:, 1:] != cut[:, :-1]).any(axis=0))
    operation = np.cumsum(starts) - 1
    joins = starts | _starts(address[1:] != address[:-1] + length[:-1])
    ends = np.cumsum(length)
    lengths = _sums(length, starts)
    return Operations(
        offsets=offset[starts],
        first=np.append(np.flatnonzero(starts[joins]), joins.sum()).astype(np.int64),
        segments=np.stack((address[joins], _sums(length, joins)), axis=1).ravel(),
        results=np.full(len(lengths), NOT_RUN),
        lengths=lengths,
        block=block,
        operation=operation,
        end_in_operation=ends - (ends - length)[starts][operation],
    )


def _starts(differs: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Where groups begin, given where an element does not continue the one before it."""
    return np.concatenate((np.ones(1, dtype=bool), differs))


def _sums(values: Slots, starts: npt.NDArray[np.bool_]) -> Slots:
    return np.add.reduceat(values, np.flatnonzero(starts), dtype=np.int64)


@dataclass(slots=True, eq=False, kw_only=True)
class _Transfer(LaneJob):
    """Its parts are operations. It has a descriptor of its own: the region's may be closed, and its number reused."""

    file: Region
    write: bool
    blocks: int
    io: Operations
    rings: list[Ring] | None
    fd: int = -1

    def acquire(self) -> str | None:
        try:
            self.fd = os.dup(self.file.owner.fd)
            os.lseek(self.fd, 0, os.SEEK_CUR)  # what has no offsets, such as a pipe, could wait for bytes for ever
        except OSError as error:
            return self._text(error.errno or errno.EBADF)
        return None

    def release(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def move(self, thread: int) -> None:
        run, io = self.rings[thread].run if self.rings else run_io, self.io
        run(self.fd, self.write, io.offsets, io.first, io.segments, io.results, self.control)

    def moved(self) -> tuple[npt.NDArray[np.bool_], str | None]:
        io = self.io
        bad = np.flatnonzero((io.results != NOT_RUN) & (io.results < io.lengths))
        problem = None
        if len(bad):
            result, end = int(io.results[bad[0]]), int(io.offsets[bad[0]] + io.lengths[bad[0]])
            problem = self._text(-result) if result < 0 else self._says(f"the file is shorter than {end} bytes")
        return io.complete(self.blocks), problem

    def _text(self, number: int) -> str:
        name = errno.errorcode.get(number, f"errno {number}")
        return self._says(f"{name}, {os.strerror(number)}")

    def _says(self, problem: str) -> str:
        return f"{'writing to' if self.write else 'reading from'} file region {self.file.name!r}: {problem}"


class FileTransport(LaneTransport):
    """Moves slots between host regions and file regions on `threads` daemon threads.

    `engine` is "io_uring" (each thread keeps up to `depth` operations in flight), "threads" (each has one at a time,
    `preadv` or `pwritev`), or "auto": io_uring where the kernel lets us, else threads, and a line in the log says why.
    `self.engine` is the one in use. Urgent plans go before the others, which leave one thread free for them (if there
    is more than one). With io_uring, plans that wait are begun on other threads: while one ring drains at the end of a
    plan, the others are full. A plan of fewer operations than `depth` does not fill its ring.

    A file opened with `O_DIRECT` needs everything in both regions to be a multiple of 4096: other pairs are not
    reached. `cancel` is `UNCERTAIN` if operations in flight take longer than 50 ms. `DONE` means that every byte was
    handed to the kernel, not that it outlives a crash: who needs that syncs the file. A file may be closed while a
    plan runs.

    Raises:
        Broken: "io_uring" was asked for and is refused.
    """

    def __init__(self, threads: int, depth: int, engine: Literal["auto", "io_uring", "threads"] = "auto") -> None:
        if engine not in ("auto", "io_uring", "threads"):
            raise ValueError(f"there is no engine {engine!r}: auto, io_uring, threads")
        self._rings: list[Ring] | None = None
        if engine != "threads":
            try:
                self._rings = [Ring(depth) for _ in range(threads)]
            except OSError as error:
                reason = REFUSALS.get(error.errno or 0, str(error))
                if engine == "io_uring":
                    raise Broken(f"io_uring is refused: {reason}") from error
                logger.warning("files are read and written with %d threads, without io_uring: %s", threads, reason)
        self.engine: Final = "io_uring" if self._rings is not None else "threads"
        spread = self._rings is not None  # a ring drains at a plan's end; a thread without one goes straight on
        super().__init__("file", threads, background=max(1, threads - 1), spread=spread, patience_s=PATIENCE_S)

    def reaches(self, source: Region, destination: Region) -> bool:
        return source.fits(destination) and _obstacle(source, destination) is None

    def _job(self, plan: Plan, done: Callable[[Completion], None]) -> LaneJob:
        if (obstacle := _obstacle(plan.source, plan.destination)) is not None:
            raise Misuse(obstacle)
        source, destination = checked_slots(plan)
        write = plan.destination.kind == "file"
        file = plan.destination if write else plan.source
        if len(source) == 0:
            io = _NOTHING
        else:
            io = operations(plan, *((destination, source) if write else (source, destination)), write=write)
            if io.offsets[0] < 0 or io.offsets[-1] > LAST_OFFSET:
                raise Misuse(f"file region {file.name!r} has rows where no file can have bytes")
        return _Transfer(
            plan, done, parts=len(io.offsets), file=file, write=write, blocks=len(source), io=io, rings=self._rings
        )


_NOTHING: Final = Operations(*(np.zeros(0, dtype=np.int64) for _ in range(8)))


def _obstacle(source: Region, destination: Region) -> str | None:
    """Why no bytes can go from one to the other, apart from rows that differ."""
    if {source.kind, destination.kind} != {"host", "file"}:
        return f"a file transport does not reach from {source.kind!r} to {destination.kind!r}"
    file = source if source.kind == "file" else destination
    fd = getattr(file.owner, "fd", None)
    if not isinstance(fd, int) or fd >= 1 << 31:
        return f"file region {file.name!r} has no open file: its owner has no fd"
    if not _direct(fd):
        return None
    for region in (source, destination):
        for plane in region.planes:
            if any(n % ALIGNMENT for n in (plane.address, plane.stride, plane.row_bytes)):
                return f"region {region.name!r} is not aligned to {ALIGNMENT} bytes, as direct I/O needs it"
    return None


def _direct(fd: int) -> bool:
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
    except (OSError, ValueError):
        return False  # closed: a plan will say so
