"""G2's memory: one arena per rank that other processes can map."""

from __future__ import annotations

import array
import ctypes
import fcntl
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from kvbm.core.errors import Broken, Misuse
from kvbm.core.region import Region, packed
from kvbm.native import fill
from kvbm.stores.available import available_memory

SLICE_BYTES: Final = 64 << 20
"""What is allocated in between two looks at what is left."""
RESERVE_BYTES: Final = 1 << 30
"""Of available memory, what G2 never takes: the engine itself still grows."""
_LOOK_S: Final = 0.25
"""Seconds from one look at what is left to the next, beside an engine: each takes the GIL from it for a moment."""
_MOST_AHEAD: Final = 1 << 30
"""What may be allocated in between."""
_END_S: Final = 0.5
_HUGE: Final = 2 << 20
"""Huge pages: a disk may take each page of memory by itself, and an address in them is found faster."""
_NAME: Final = "kvbm-arena"
_GRANTED, _DONE, _OVER = range(3)
_PROT_NONE: Final = 0
_MAP_FIXED: Final = 0x10
_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [*(ctypes.c_void_p, ctypes.c_size_t), *(ctypes.c_int,) * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


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
        self.fd = os.memfd_create(_NAME, os.MFD_CLOEXEC) if fd is None else fd
        self._close_fd = weakref.finalize(self, os.close, self.fd)
        self._control = array.array("q", (0, 0, 0))
        self._filler: threading.Thread | None = None
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

    @property
    def touched(self) -> int:
        """Bytes, from the start, whose memory is there."""
        return self._control[_DONE]

    def touch(self, end: int | None = None, progress: Callable[[int, int], None] | None = None) -> None:
        """Allocate every page up to the end of the slice with byte `end - 1` now (None: all), so that no copy waits for
        the kernel, or dies, later. Keeps what is written.

        Runs without the GIL, in slices; `progress(bytes done, total)` after each. What other processes take meanwhile
        is seen, as far as that is possible without a lock on the machine.

        Raises:
            Broken: the memory is not there. What was allocated stays so until `close`.
        """
        end = self.size if end is None else min(-(-end // SLICE_BYTES) * SLICE_BYTES, self.size)
        self._claim()
        while self.touched < end:
            self._grant(min(self.touched + SLICE_BYTES, end))
            self._heed(fill(self.fd, self.address, self._control, False))
            if progress is not None:
                progress(self.touched, self.size)
        self._unclaim()

    def touch_beside(self, over: threading.Event, hurry: threading.Event, progress: Callable[[int], None]) -> None:
        """`touch` what is left, on a thread that gets a processor only where nobody else wants it, until `hurry` is
        set. Returns when all is there, or soon after `over` is set; `progress(bytes done)` every now and then.

        Raises:
            Broken: no more memory is there. What is `touched` stays so.
        """
        ended: list[int] = []
        idle, ahead = not hurry.is_set(), SLICE_BYTES
        self._claim()
        self._filler = self._start_filling(ended, idle=idle)
        try:
            while not over.is_set() and self.touched < self.size and self._filler.is_alive():
                if idle and hurry.is_set():
                    idle = False
                    self._stop_filling()  # only root may take it out of its class: another goes on
                    self._heed(ended.pop())
                    self._filler = self._start_filling(ended, idle=idle)
                if self.touched == self._control[_GRANTED]:
                    ahead = min(2 * ahead, _MOST_AHEAD)
                self._grant(min(self.touched + ahead, self.size))
                over.wait(_LOOK_S)
                progress(self.touched)
            if ended:
                self._heed(ended[0])
        finally:
            self._stop_filling(_END_S)
            self._unclaim(done=True)

    def _start_filling(self, ended: list[int], *, idle: bool) -> threading.Thread:
        def fill_on() -> None:
            if idle:
                with suppress(OSError):  # it is a courtesy
                    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            ended.append(fill(self.fd, self.address, self._control, True))

        self._control[_OVER] = 0
        thread = threading.Thread(target=fill_on, name="kvbm-touch", daemon=True)
        thread.start()
        return thread

    def _stop_filling(self, seconds: float | None = None) -> None:
        assert self._filler is not None
        self._control[_OVER] = 1
        self._filler.join(seconds)

    def _grant(self, end: int) -> None:
        """Have it allocated up to there, if that can be had: beside an engine with what is left to it, else with all
        that is missing. Raises Broken."""
        missing = self.size - (allocated := os.fstat(self.fd).st_blocks * 512)
        available = available_memory()
        if available < (missing if self._filler is None else end - allocated + RESERVE_BYTES):
            kept = "" if self._filler is None else f", {_gib(RESERVE_BYTES)} of which are left to the engine"
            raise Broken(
                f"host memory for the KV arena: {_gib(missing)} of {_gib(self.size)} are still to be allocated, "
                f"{_gib(available)} are available to this process{kept}. Use a smaller arena or give it more memory."
            )
        self._control[_GRANTED] = end

    def _heed(self, error: int) -> None:
        if error:
            raise Broken(
                f"host memory for the KV arena: the kernel refused {_gib(self.size)}: {os.strerror(error)}"
            )  # fmt: skip

    def _claim(self) -> None:
        """Others see from now on that what is missing is going to be allocated (`promised`)."""
        fcntl.flock(self.fd, fcntl.LOCK_EX)

    def _unclaim(self, *, done: bool = False) -> None:
        if done or self.touched == self.size:
            fcntl.flock(self.fd, fcntl.LOCK_UN)

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
        """Unmap and give the memory back, unless another process maps it too. May be called again. What is being
        touched this very moment stays mapped until the process ends."""
        if self._filler is not None and self._filler.is_alive():
            self._unmap.detach()
            self._close_fd.detach()
            return
        self._unmap()
        self._close_fd()


def _mapped(address: int | None, size: int, access: int, flags: int, fd: int) -> int:
    """The address of a new mapping. Raises OSError."""
    mapped = _libc.mmap(address, size, access, flags, fd, 0)
    if mapped == _FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(mapped)


def promised() -> int:
    """Bytes that arenas of this user's processes are being touched for, and that are not allocated yet: who takes them
    now takes them from those. Of processes that this one cannot see nothing is known."""
    missing: dict[tuple[int, int], int] = {}
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # it is gone, or another user's
            if os.readlink(descriptor).startswith(f"/memfd:{_NAME}"):
                with descriptor.open("rb") as file:
                    seen = os.fstat(file.fileno())
                    try:
                        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    except BlockingIOError:
                        missing[seen.st_dev, seen.st_ino] = max(0, seen.st_size - seen.st_blocks * 512)
    return sum(missing.values())


def _gib(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.2f} GiB"
