"""G2's memory: one arena per rank that other processes can map."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Final

from kvbm.core.errors import Broken, Misuse
from kvbm.core.region import Region, packed
from kvbm.native import touch
from kvbm.stores.available import available_memory

SLICE_BYTES: Final = 64 << 20
"""What `Arena.touch` faults in between two looks at what is left."""
_HUGE: Final = 2 << 20
"""Huge pages: a disk may take each page of memory by itself, and an address in them is found faster."""
_MADV_COLLAPSE: Final = 25
"""Linux 6.1: make huge pages now, whatever `/sys/kernel/mm/transparent_hugepage` says about shared memory."""
_PROT_NONE: Final = 0
_MAP_FIXED: Final = 0x10
_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [*(ctypes.c_void_p, ctypes.c_size_t), *(ctypes.c_int,) * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Arena:
    """`size` bytes of zeroed shared memory (a memfd, private to this process until `fd` is passed on), or those of an
    arena of another process whose `fd` was passed on; it is this object's from now on.

    Nothing is really allocated before `touch`. Threads: any; `close` only after every transport that may use the
    memory is closed, since it is unmapped.
    """

    def __init__(self, size: int, fd: int | None = None) -> None:
        if size < 1:
            raise ValueError(f"an arena needs at least one byte, not {size}")
        self.size = size
        self.fd = os.memfd_create("kvbm-arena", os.MFD_CLOEXEC) if fd is None else fd
        self._close_fd = weakref.finalize(self, os.close, self.fd)
        try:
            if fd is None:
                os.ftruncate(self.fd, size)
            elif (theirs := os.fstat(fd).st_size) != size:
                raise OSError(f"the other process's arena has {theirs} bytes, not {size}")
            # A place to choose an aligned address in; the file then takes it over.
            room = _mapped(None, size + _HUGE, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
            self._unmap = weakref.finalize(self, _libc.munmap, room, size + _HUGE)
            self._unmap.atexit = False  # threads may still copy then
            access, aligned = mmap.PROT_READ | mmap.PROT_WRITE, -(-room // _HUGE) * _HUGE
            self.address = _mapped(aligned, size, access, mmap.MAP_SHARED | _MAP_FIXED, self.fd)
        except (OSError, OverflowError) as error:
            self._close_fd()
            raise Broken(f"cannot map {_gib(size)} of shared memory: {error}") from error

    def touch(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Allocate every page now, so that no copy waits for the kernel, or dies, later. Keeps what is written.

        Runs without the GIL, in slices; `progress(bytes done, total)` after each. What other processes take meanwhile
        is seen, as far as that is possible without a lock on the machine.

        Raises:
            Broken: the memory is not there. What was allocated stays so until `close`.
        """
        for start in range(0, self.size, SLICE_BYTES):
            length = min(SLICE_BYTES, self.size - start)
            missing = self.size - os.fstat(self.fd).st_blocks * 512
            available = available_memory()
            if missing > available:
                raise Broken(
                    f"host memory for the KV arena: {_gib(missing)} of {_gib(self.size)} are still to be allocated, "
                    f"{_gib(available)} are available to this process. Use a smaller arena or give it more memory."
                )
            self._make_huge(start, length)
            try:
                # Reserved first: a page that is refused here is an error, one refused to a write is SIGBUS.
                os.posix_fallocate(self.fd, start, length)
            except OSError as error:
                raise Broken(f"host memory for the KV arena: the kernel refused {_gib(self.size)}: {error}") from error
            touch(self.address + start, length)
            if progress is not None:
                progress(start + length, self.size)

    def _make_huge(self, start: int, length: int) -> None:
        """Have whole huge pages there, as far as there are any; what the kernel refuses stays in small ones."""
        end = (start + length) // _HUGE * _HUGE
        try:
            for at in range(start, end, _HUGE):
                os.posix_fallocate(self.fd, at, mmap.PAGESIZE)  # it collapses what has at least a page
        except OSError:
            return  # what comes next says why
        if end > start:
            _libc.madvise(self.address + start, end - start, _MADV_COLLAPSE)

    def region(
        self, row_bytes: Sequence[int], num_slots: int, *, stride: int = 0, name: str = "G2", offset: int = 0
    ) -> Region:
        """The part of the arena from `offset` as `num_slots` slots of one extent each, `stride` bytes apart (0: back to
        back). It keeps the arena alive.

        Raises:
            Misuse: it does not fit.
        """
        stride = stride or sum(row_bytes)
        if offset < 0 or offset + stride * num_slots > self.size:
            raise Misuse(f"{num_slots} slots of {stride} B from {offset} on do not fit into {self.size} B")
        return packed(name, self.address + offset, row_bytes, num_slots, stride=stride, owner=self)

    def close(self) -> None:
        """Unmap and give the memory back, unless another process maps it too. May be called again."""
        self._unmap()
        self._close_fd()


def _mapped(address: int | None, size: int, access: int, flags: int, fd: int) -> int:
    """The address of a new mapping. Raises OSError."""
    mapped = _libc.mmap(address, size, access, flags, fd, 0)
    if mapped == _FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(mapped)


def _gib(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.2f} GiB"
