from typing import Final, TypeAlias, final

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

Int64s: TypeAlias = npt.NDArray[np.int64] | Buffer

class CudaError(RuntimeError):
    """What the driver answered: a sentence with the call and the error's name, and the driver's number for it (-1: no
    error of the driver's)."""

@final
class Mark:
    """What one stream had been told at one moment; see `Driver.mark`."""

@final
class Lane:
    """One direction on one device, for one thread at a time: `RuntimeError` for a second one, and after `close`."""

    @property
    def dead(self) -> bool:
        """Whether nothing will be copied here any more: the device's context is lost, a copy was given up (then the
        device may still copy), or it is closed."""

    def copy(
        self,
        src_address: Int64s,
        src_stride: Int64s,
        dst_address: Int64s,
        dst_stride: Int64s,
        row_bytes: Int64s,
        src_slots: Int64s,
        dst_slots: Int64s,
        control: Int64s,
        mark: Mark,
        pinned: int,
        piece: int,
        chunk_bytes: int,
        sums: Int64s | None,
        /,
    ) -> tuple[int, int, int, int]:
        """Copy row `p` of slot `src_slots[i]` to row `p` of slot `dst_slots[i]`, in order from block ``control[0]`` on.

        Begins when the mark's stream has done what the mark stands for. Host memory is pinned from `pinned` on in
        registrations of `piece` bytes. `control` is writable int64 ``[next block, stop]``: a stop of 1 ends the call
        once what the device has is copied, 2 at once (the lane is dead then). When the call returns or raises, the
        blocks before ``control[0]`` are copied, the others are not with the device unless the lane is dead. Chunks have
        `chunk_bytes` (0: as many as take 0.15 ms, 2 to 64 MiB). `sums` (writable, one per block of at least 241 bytes)
        gets the xxh3-64 of each copied block as it lies in host memory.

        The GIL is not held. The caller keeps the memory alive and has checked the slots. Returns descriptors and chunks
        that were submitted, and nanoseconds spent in the driver for that and waiting for the mark.

        Raises:
            CudaError: the driver refused something, or lost the context.
            ValueError: buffers that are not that. Nothing was submitted.
        """

    def close(self) -> None:
        """Give the streams back. What the device has of a lane that is dead may still be copied."""

@final
class Driver:
    """NVIDIA's driver, opened at run time from `library`; where the process has it open already, the same. It stays
    open until the process ends, and does not survive a fork: `CudaError` in a child. Any thread; the GIL is not held.

    Raises:
        CudaError: there is none, it lacks a function, or it finds no device.
    """

    version: Final[int]
    """Of CUDA, as 13000 for 13.0."""
    call: Final[str]
    """What copies: "cuMemcpyBatchAsync_v2" (13.0), "cuMemcpyBatchAsync" (12.8), "cuMemcpyAsync" (before)."""

    def __init__(self, library: str, newest: int = ...) -> None:
        """`newest` is the version of CUDA of which functions are called at most (13000 for 13.0)."""

    def devices(self) -> int:
        """How many this process sees."""

    def describe(self, device: int, /) -> tuple[str, str]:
        """Its name, and where it is on the PCI bus (0000:0a:00.0)."""

    def attribute(self, device: int, number: int, /) -> int:
        """One of ``CUdevice_attribute``."""

    def device_of(self, address: int, /) -> int | None:
        """The device whose memory this is; None for host memory, and for memory that is managed."""

    def alloc(self, device: int, nbytes: int, /) -> int:
        """Device memory for a trial; the calling thread works with that device from then on."""

    def free(self, device: int, address: int, /) -> None:
        """Give that back."""

    def pin(self, device: int, address: int, nbytes: int, piece: int, /) -> None:
        """Register host memory, for all devices, `piece` bytes at a time.

        Raises:
            CudaError: part of it is refused; then none of it is registered.
        """

    def unpin(self, address: int, /) -> None:
        """Take back what the `pin` with this address registered."""

    def mark(self, device: int, stream: int, /) -> Mark:
        """Mark what the stream (a CUstream) has been told until now; to be called on the thread that tells it.

        Raises:
            CudaError: also where the stream is being captured into a graph.
        """

    def lane(self, device: int, to_device: bool, /) -> Lane:
        """Open a lane to (or from) this device."""
