from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

XXH3_FROM: int
"""The least bytes that checksums are made of here."""

Int64s: TypeAlias = npt.NDArray[np.int64] | Buffer

def copy_rows(
    src_address: Int64s,
    src_stride: Int64s,
    dst_address: Int64s,
    dst_stride: Int64s,
    row_bytes: Int64s,
    src_slots: Int64s,
    dst_slots: Int64s,
    control: Int64s = ...,
    chunk: int = ...,
    sums: Int64s = ...,
    /,
) -> int:
    """Copy row `p` of slot `src_slots[i]` to row `p` of slot `dst_slots[i]`, for every block `i` and plane `p`.

    Every buffer is contiguous int64: the first five one entry per plane (bytes), the two slot lists one per block.
    Returns the bytes copied by this call. The GIL is not held while copying; the caller keeps the memory alive and
    has checked the slots. Raises `ValueError`, before a byte is copied, for buffers that are not that.

    With `control` (writable int64 ``[next, stop]``, starting as ``[0, 0]``) and `chunk` (blocks), several threads may
    share one copy: each takes the next `chunk` blocks until none is left or `stop` is set, and finishes what it took.
    Once all calls have returned, exactly the first ``min(next, blocks)`` blocks are copied.

    `sums` (writable, one per block) gets the xxh3-64 of each copied block's bytes as they were read, row after row. For
    blocks of at least `XXH3_FROM` bytes.
    """

def prefer(way: int = ..., /) -> int:
    """How this process copies rows of 8 KiB and more: 0 from start to end, 1 up to four pages at once, -1: it is still
    measured. With a `way` that is set, for tests and measurements; -1 begins to measure anew. No copy may run then."""

def checksums(address: int, stride: int, nbytes: int, slots: Int64s, sums: Int64s, /) -> None:
    """The xxh3-64 of the first `nbytes` (at least `XXH3_FROM`) bytes of each of these slots, without the GIL.

    The caller keeps the memory alive and has checked the slots.
    """

def fill(fd: int, address: int, control: Int64s, wait: bool, /) -> int:
    """Allocate the memory of a file that is mapped at `address`, from its start, in huge pages as far as there are any.

    `control` is int64 ``[granted, done, over]``: goes on from `done` to `granted` bytes, 16 MiB at a time, says
    in it how far that is, and ends where `over` is set. With `wait` only then: it waits for more to be granted, so that
    a thread that hardly ever gets a processor never holds the GIL, which is not held here. Returns 0, or the `errno` of
    what the kernel refused: what is done is there all the same. Keeps what is written.
    """
