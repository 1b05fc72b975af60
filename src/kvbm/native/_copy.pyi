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

def checksums(address: int, stride: int, nbytes: int, slots: Int64s, sums: Int64s, /) -> None:
    """The xxh3-64 of the first `nbytes` (at least `XXH3_FROM`) bytes of each of these slots, without the GIL.

    The caller keeps the memory alive and has checked the slots.
    """

def touch(address: int, nbytes: int, /) -> None:
    """Make every page of writable memory present, without changing its content and without the GIL."""
