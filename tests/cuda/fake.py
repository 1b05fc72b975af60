"""The fake driver in this process, and memory of its devices for tests of transports."""

from __future__ import annotations

import ctypes as c
import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kvbm.core.errors import Broken
from kvbm.core.region import Plane, Region
from kvbm.native import Driver, Mark
from kvbm.testing.transport import GUARD
from kvbm.transfer.cuda import CudaDevice
from tests.cuda.build import fake

_ARGUMENTS: Final[dict[str, list[Any]]] = {
    "cuMemAlloc_v2": [c.c_void_p, c.c_size_t],
    "cuMemFree_v2": [c.c_uint64],
    "cuStreamCreate": [c.c_void_p, c.c_uint],
    "cuStreamDestroy_v2": [c.c_void_p],
    "cuStreamSynchronize": [c.c_void_p],
    "cuStreamWaitEvent": [c.c_void_p, c.c_void_p, c.c_uint],
    "cuEventCreate": [c.c_void_p, c.c_uint],
    "cuEventRecord": [c.c_void_p, c.c_void_p],
    "cuEventSynchronize": [c.c_void_p],
    "cuEventDestroy_v2": [c.c_void_p],
    "cuCtxSetCurrent": [c.c_void_p],
    "cuDevicePrimaryCtxRetain": [c.c_void_p, c.c_int],
    "fake_pace": [c.c_double, c.c_int64, c.c_int64],
    "fake_fail": [c.c_char_p, c.c_int, c.c_int],
    "fake_fail_copy": [c.c_int, c.c_int],
    "fake_hold": [c.c_int],
    "fake_capture": [c.c_int],
    "fake_spoiled": [],
    "fake_devices": [c.c_int, c.c_int],
    "fake_seed": [c.c_uint64],
    "fake_managed": [c.c_int],
    "fake_integrated": [c.c_int],
    "fake_access": [c.c_uint64, c.c_uint64, c.c_int],
    "fake_work": [c.c_void_p, c.c_void_p, c.c_void_p, c.c_void_p, c.c_uint64, c.c_int64],
    "fake_go": [c.c_void_p, c.c_int64],
    "fake_peek": [c.c_uint64, c.c_void_p, c.c_uint64],
    "fake_poke": [c.c_uint64, c.c_void_p, c.c_uint64],
    "fake_count": [c.c_void_p, c.c_char_p],
    "fake_reset": [],
}


@dataclass(frozen=True, slots=True)
class Counts:
    """What the fake has seen since `reset`: copy calls, rows, bytes, mistakes, most rows in a call, pieces of work."""

    calls: int
    rows: int
    nbytes: int
    mistakes: int
    most_rows: int
    work: int
    last: str


class Fake:
    """One of the fake drivers, in this process. `call` is the library; see `fake.c`."""

    def __init__(self, version: int = 13000) -> None:
        self.path = str(fake(version))
        self.call = c.CDLL(self.path)
        for name, arguments in _ARGUMENTS.items():
            function = getattr(self.call, name)
            function.argtypes = arguments
            function.restype = (
                None if name in ("fake_pace", "fake_hold", "fake_reset", "fake_count", "fake_capture") else c.c_int
            )
        self.driver = Driver(self.path)
        self.device = CudaDevice(self.driver, 0, lambda: 0)

    def use(self, device: int = 0) -> None:
        """As a framework does: this thread works with that device."""
        context = c.c_void_p()
        assert self.call.cuDevicePrimaryCtxRetain(c.byref(context), device) == 0
        assert self.call.cuCtxSetCurrent(context) == 0

    def stream(self) -> int:
        """A new stream, for an engine."""
        stream = c.c_void_p()
        self.use()
        assert self.call.cuStreamCreate(c.byref(stream), 1) == 0
        return stream.value or 0

    def work(self, stream: int, touched: Sequence[tuple[int, int, bool]], seconds: float | None) -> None:
        """The engine's work on its stream: pieces of memory (address, bytes, whether it writes), sorted and apart.
        None: it goes on until `go`."""
        self.use()
        addresses, sizes = (np.array([each[k] for each in touched], np.uint64) for k in (0, 1))
        writes = np.array([each[2] for each in touched], np.int32)
        pointers = [array.ctypes.data for array in (addresses, sizes, writes)]
        assert self.call.fake_work(stream, *pointers, len(touched), -1 if seconds is None else int(seconds * 1e9)) == 0

    def go(self, stream: int, seconds: float) -> None:
        """What waits for that ends after so long."""
        self.use()
        assert self.call.fake_go(stream, int(seconds * 1e9)) == 0

    def pace(self, bytes_per_s: float = 0, latency_s: float = 0, delay_s: float = 0) -> None:
        """What each copy takes: see `fake_pace`."""
        self.call.fake_pace(bytes_per_s, int(latency_s * 1e9), int(delay_s * 1e9))

    def fail(self, function: str, nth: int = 1, code: int = 2) -> None:
        """The nth call from now on answers so."""
        self.call.fake_fail(function.encode(), nth, code)

    def counts(self) -> Counts:
        numbers, last = (c.c_int64 * 6)(), c.create_string_buffer(256)
        self.call.fake_count(numbers, last)
        return Counts(*numbers, last=last.value.decode())

    def read(self, address: int, size: int) -> bytes:
        out = c.create_string_buffer(size)
        assert self.call.fake_peek(address, out, size) == 0
        return out.raw

    def write(self, address: int, data: bytes) -> None:
        assert self.call.fake_poke(address, data, len(data)) == 0


class DeviceMemory:
    """A plane per row size in a device's memory, with guards. Who touches it without the driver dies, as with a GPU."""

    _GAP = 256

    def __init__(self, fake: Fake, row_bytes: Sequence[int], slots: int, *, stream: int = 0) -> None:
        self._fake, self._stream = fake, stream
        fake.use()
        planes, self._ranges = [], []
        for rows in row_bytes:
            size, address = (slots + 1) * (self._GAP + rows), c.c_uint64()
            assert fake.call.cuMemAlloc_v2(c.byref(address), size) == 0
            fake.write(address.value, bytes([GUARD]) * size)
            planes.append(Plane(address.value + self._GAP, self._GAP + rows, rows))
            self._ranges.append((address.value, size))
        self.region = Region("g1", "cuda", slots, tuple(planes), owner=fake.device)

    def mark(self) -> Mark:
        """What its stream has been told."""
        return self._fake.driver.mark(0, self._stream)

    def get(self, slot: int) -> bytes:
        return b"".join(self._fake.read(p.address + slot * p.stride, p.row_bytes) for p in self.region.planes)

    def put(self, slot: int, data: bytes) -> None:
        for p in self.region.planes:
            self._fake.write(p.address + slot * p.stride, data[: p.row_bytes])
            data = data[p.row_bytes :]

    def guards_intact(self) -> bool:
        for (address, size), p in zip(self._ranges, self.region.planes, strict=True):
            rest = np.frombuffer(bytearray(self._fake.read(address, size)), np.uint8)
            for slot in range(self.region.num_slots):
                begin = self._GAP + slot * p.stride
                rest[begin : begin + p.row_bytes] = GUARD
            if not (rest == GUARD).all():
                return False
        return True

    def free(self) -> None:
        """Nothing is there any more."""
        self._fake.use()
        for address, _ in self._ranges:
            assert self._fake.call.cuMemFree_v2(address) == 0

    def touched(self, slots: Sequence[int], *, writes: bool) -> list[tuple[int, int, bool]]:
        """Work on these slots, for `Fake.work`."""
        rows = [(p.address + slot * p.stride, p.row_bytes, writes) for p in self.region.planes for slot in slots]
        return sorted(rows)


def _unpin(device: CudaDevice, address: int) -> None:
    with suppress(Broken):  # a context that is lost gives nothing back
        device.unpin(address)


class PinnedMemory:
    """One extent per slot, with guards between slots, pinned for the fake's device."""

    _GAP = 32

    def __init__(self, fake: Fake, row_bytes: Sequence[int], slots: int) -> None:
        self._stride, self._slot = sum(row_bytes) + self._GAP, sum(row_bytes)
        self._bytes = np.frombuffer(mmap.mmap(-1, slots * self._stride), np.uint8)
        self._bytes[:] = GUARD
        address, planes = int(self._bytes.ctypes.data), []
        fake.device.pin(address, len(self._bytes), self._stride)
        weakref.finalize(self, _unpin, fake.device, address)
        for rows in row_bytes:
            planes.append(Plane(address, self._stride, rows))
            address += rows
        self.region = Region("g2", "host", slots, tuple(planes), owner=self)

    def _at(self, slot: int) -> slice:
        return slice(slot * self._stride, slot * self._stride + self._slot)

    def get(self, slot: int) -> bytes:
        return self._bytes[self._at(slot)].tobytes()

    def put(self, slot: int, data: bytes) -> None:
        self._bytes[self._at(slot)] = np.frombuffer(data, np.uint8)

    def guards_intact(self) -> bool:
        rest = self._bytes.copy()
        for slot in range(self.region.num_slots):
            rest[self._at(slot)] = GUARD
        return bool((rest == GUARD).all())
