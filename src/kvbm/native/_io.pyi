from typing import TypeAlias, final

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

Int64s: TypeAlias = npt.NDArray[np.int64] | Buffer

def run_io(
    fd: int,
    write: bool,
    offsets: Int64s,
    first: Int64s,
    segments: Int64s,
    results: Int64s,
    control: Int64s,
    /,
) -> int:
    """Read from or write to the file `fd` with one `preadv` or `pwritev` after the other; returns how many ended here.

    Operation `i` moves the file's bytes from `offsets[i]` on to or from the memory of segments `first[i]` to
    `first[i + 1]`, a pair ``address, bytes`` each, at most 1024 (contiguous int64 buffers; the last three writable).
    Once it has ended, `results[i]` is the bytes moved, fewer than its segments have only where a file ends, or minus
    an errno; the results of the others are left as they are. `segments` is consumed: a short read or write goes on
    behind what it moved.

    Operations are taken one by one off `control` (int64 ``[next, stop]``, starting as ``[0, 0]``), which several
    threads may share, until none is left or `stop` is set; what was taken is ended. The GIL is not held meanwhile.
    When a call returns, the kernel no longer touches the memory of the operations it took. The caller keeps that
    memory and the file open. A pipe or socket is no file: it can make the call wait for ever.

    Raises:
        ValueError: buffers that are not that. Nothing was taken.
    """

@final
class Ring:
    """An io_uring of one thread, the first to run something on it, that keeps up to `depth` operations in flight.

    Raises:
        OSError: the kernel refuses: `ENOSYS` before Linux 5.6, `EPERM` under a seccomp filter or
            ``kernel.io_uring_disabled``, `ENOMEM` over a limit on locked memory.
        ValueError: a depth that is not 1 to 4096.
    """

    def __init__(self, depth: int) -> None: ...
    def run(
        self,
        fd: int,
        write: bool,
        offsets: Int64s,
        first: Int64s,
        segments: Int64s,
        results: Int64s,
        control: Int64s,
        /,
    ) -> int:
        """As `run_io`, with up to `depth` operations at once.

        Raises:
            OSError: the ring broke, or is another thread's (`EEXIST`). What it had taken has ended with that error, the
                rest is as it was.
            RuntimeError: another thread is in here, or this is a child of the process that made the ring.
        """
