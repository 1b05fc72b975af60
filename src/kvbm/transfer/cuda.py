"""Between a GPU's memory and pinned host memory. This file has run on a driver that is simulated, never on a GPU.

A transport is one direction on one device, with one thread, so that loads never wait for stores. The thread enters the
C helper with a whole plan: chunks go on in there without Python (see `native/cuda.h`). What a plan has to wait for, a
mark on the engine's stream, is taken on the engine's thread by the submitter: only that thread's stream says which work
came before.
"""

from __future__ import annotations

import math
import mmap
import queue
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from kvbm.abc.transport import Completion, Device, Plan
from kvbm.core import cpus
from kvbm.core.errors import Broken, Misuse
from kvbm.core.region import Plane, Region, Slots
from kvbm.native import XXH3_FROM, CudaError, Driver, Lane, Mark
from kvbm.transfer.lanes import LaneJob, LaneTransport
from kvbm.transfer.plan import Rows, coalesce, slot_lists

LIBRARY: Final = "libcuda.so.1"
PCI_DEVICES: Final = Path("/sys/bus/pci/devices")
PIECE_BYTES: Final = 60 << 30
"""Host memory of one registration; a driver refuses one of 512 GiB (vLLM issue 51081)."""
TRIAL_BYTES: Final = 256 << 20
"""Enough to measure a device with."""
_TRIAL_SLOTS: Final = 64
_TRIAL_S: Final = 20.0
_INTEGRATED, _HOST_TABLES = 18, 100
"""Of CUdevice_attribute: see `CudaDevice.shares_memory`."""
PATIENCE_S: Final = 0.25
"""How long a cancel waits for the chunks that the device has: each takes 0.15 ms, unless something is wrong."""


@dataclass(frozen=True, slots=True)
class Registered:
    """Host memory from `address` on, registered `piece` bytes at a time; no copy crosses from one piece to the next."""

    address: int
    nbytes: int
    piece: int

    def holds(self, region: Region) -> bool:
        """Whether all of the region's slots are in there, and each in one piece."""
        stride = region.planes[0].stride
        first, last = min(p.address for p in region.planes), max(p.address + p.row_bytes for p in region.planes)
        begin, end = first - self.address, last - self.address + (region.num_slots - 1) * stride
        if begin < 0 or end > self.nbytes or any(plane.stride != stride for plane in region.planes):
            return False
        return end <= self.piece or (self.piece % stride == 0 and begin % stride + last - first <= stride)


class CudaDevice(Device):
    """A device by its number in this process. `stream` says which of its streams the engine uses at the moment. `keep`
    is kept alive, and `folder` is where Linux describes PCI devices.

    Threads: any, but that `mark` belongs to the engine's.
    """

    def __init__(
        self, driver: Driver, ordinal: int, stream: Callable[[], int], *, keep: object = None,
        folder: Path = PCI_DEVICES,
    ) -> None:  # fmt: skip
        self.driver, self.ordinal, self.keep = driver, ordinal, keep
        self._stream, self._folder = stream, folder
        self._pinned: tuple[Registered, ...] = ()
        self._transports: list[CudaTransport] = []

    @classmethod
    def of(cls, address: int, stream: Callable[[], int], *, keep: object = None, library: str = LIBRARY) -> CudaDevice:
        """The device whose memory this is. Raises Broken."""
        try:
            driver = Driver(library)
        except CudaError as error:
            raise Broken(f"NVIDIA's driver cannot be used: {error.args[0]}") from error
        if (ordinal := driver.device_of(address)) is None:
            raise Broken(f"NVIDIA's driver knows no device memory at {address:#x} (managed memory is not served)")
        return cls(driver, ordinal, stream, keep=keep)

    def mark(self) -> Mark:
        try:
            return self.driver.mark(self.ordinal, self._stream())
        except CudaError as error:
            raise Broken(f"the engine's stream cannot be marked: {error.args[0]}") from error

    def pin(self, address: int, nbytes: int, stride: int) -> None:
        """Takes 0.02 to 0.05 s per GB, and holds a lock of the driver's meanwhile that the engine needs, too."""
        whole = math.lcm(stride, mmap.PAGESIZE)  # no page belongs to two pieces
        pinned = Registered(address, nbytes, max(1, PIECE_BYTES // whole) * whole)
        try:
            self.driver.pin(self.ordinal, address, nbytes, pinned.piece)
        except CudaError as error:
            raise Broken(
                f"{nbytes / 1e9:.1f} GB of host memory cannot be pinned: {error.args[0]}. Set g2_gb to less{_wsl()}."
            ) from error
        self._pinned += (pinned,)

    def unpin(self, address: int) -> None:
        if any(transport.abandoned for transport in self._transports):
            raise Broken("a copy was given up, and the device may go on with it")
        self._pinned = tuple(each for each in self._pinned if each.address != address)
        try:
            self.driver.unpin(address)
        except CudaError as error:
            raise Broken(f"host memory stays pinned: {error.args[0]}") from error

    def cpus(self) -> frozenset[int]:
        """Of its NUMA node; in virtual machines that is often not known."""
        with suppress(CudaError, OSError, ValueError):
            here = self._folder / self.driver.describe(self.ordinal)[1].lower()
            if int((here / "numa_node").read_text()) >= 0:
                return cpus.listed((here / "local_cpulist").read_text())
        return frozenset()

    def note(self, address: int, nbytes: int) -> str | None:
        says = "this GPU shares memory with the host, so keeping blocks in host memory may gain nothing"
        try:
            if not self.shares_memory():
                return None
            down, up = self.rates(address, min(nbytes, TRIAL_BYTES))
        except (CudaError, Broken) as error:
            return f"{says} (no copy could be tried: {error.args[0]})"
        return f"{says}: copies from it run at {down / 1e9:.1f} GB/s, to it at {up / 1e9:.1f}"

    def shares_memory(self) -> bool:
        """Whether it has no memory of its own, or reaches the host's through the host's own page tables. Raises
        CudaError."""
        return any(self.driver.attribute(self.ordinal, each) for each in (_INTEGRATED, _HOST_TABLES))

    def rates(self, address: int, nbytes: int) -> tuple[float, float]:
        """Bytes per second from the device and to it, measured with so many bytes of pinned host memory from `address`
        on, which are overwritten, and as many of the device's, which are allocated for that.

        Raises:
            Broken: a copy failed.
            CudaError: the device has no memory to spare.
        """
        row = nbytes // _TRIAL_SLOTS
        with ExitStack() as undo:
            there = self.driver.alloc(self.ordinal, nbytes)
            undo.callback(self.driver.free, self.ordinal, there)
            host, device = (
                Region(kind, kind, _TRIAL_SLOTS, (Plane(at, row, row),), owner=self)
                for kind, at in (("host", address), ("cuda", there))
            )
            down, up = self.transports()
            undo.callback(down.close)
            undo.callback(up.close)
            for _ in range(2):  # the first ones take longer
                rates = self._timed(down, device, host), self._timed(up, host, device)
        return rates

    def _timed(self, transport: CudaTransport, source: Region, destination: Region) -> float:
        ended: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        slots = np.arange(_TRIAL_SLOTS)
        transport.submit(Plan(source, slots, destination, slots, True, "trial", after=self.mark()), ended.put)
        try:
            completion = ended.get(timeout=_TRIAL_S)
        except queue.Empty:
            raise Broken(
                f"a copy of {source.slot_bytes * _TRIAL_SLOTS / 1e6:.0f} MB has not ended after {_TRIAL_S:g} s"
            ) from None
        if completion.error is not None:
            raise Broken(completion.error)
        return completion.nbytes / max(completion.seconds, 1e-9)

    def transports(self) -> list[CudaTransport]:
        made = [CudaTransport(self, up=up) for up in (False, True)]
        self._transports += made
        return made

    def pinned(self, region: Region) -> Registered | None:
        """Where the region's memory is registered, if all of it is."""
        return next((each for each in self._pinned if each.holds(region)), None)

    def owns(self, region: Region) -> bool:
        """Whether its memory is this device's."""
        return region.kind == "cuda" and self.driver.device_of(region.planes[0].address) == self.ordinal


def _wsl() -> str:
    with suppress(OSError):
        if "microsoft" in Path("/proc/version").read_text().lower():
            return " (WSL2 pins about 1 GB at most)"
    return ""


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two regions that have copies between them. They are kept, so that no other region gets their place."""

    source: Region
    destination: Region
    rows: Rows
    pinned: Registered


@dataclass(slots=True, eq=False, kw_only=True)
class _Copy(LaneJob):
    """Its parts are blocks, which are copied in order."""

    lane: Lane
    pair: _Pair
    source: Slots
    destination: Slots
    copied: int = 0
    problem: str | None = None

    def move(self, thread: int) -> None:
        rows, pinned, mark = self.pair.rows, self.pair.pinned, self.plan.after
        assert isinstance(mark, Mark)
        try:
            *_, waited_ns = self.lane.copy(
                rows.source_address,
                rows.source_stride,
                rows.destination_address,
                rows.destination_stride,
                rows.row_bytes,
                self.source,
                self.destination,
                self.control,
                mark,
                pinned.address,
                pinned.piece,
                0,
                None if self.sums is None else self.sums.view(np.int64),
            )
            self.started += waited_ns / 1e9  # that was the engine's time
            self.copied = self.begun
        except CudaError as error:
            self.problem = error.args[0]
            self.copied, self.control[0] = self.begun, self.parts  # no thread takes another part
            if self.lane.dead:
                raise

    def moved(self) -> tuple[npt.NDArray[np.bool_], str | None]:
        return np.arange(self.parts) < self.copied, self.problem


class CudaTransport(LaneTransport):
    """Copies from pinned host memory to a device (`up`), or from there, on a thread of its own.

    `Plan.after` is a mark of this device's: the copy begins when the marked stream has done what it had been told, and
    nothing on that stream ever waits for a copy. A plan without one is a misuse. A cancel waits for the chunks that the
    device has, and is `UNCERTAIN` where they take longer than 0.25 s; the completion then comes when they have ended. A
    context that is lost ends the transport. `close` gives the device up where it takes longer than 5 s: `abandoned`
    says so from then on, and host memory must stay pinned and mapped.

    Raises:
        Broken: the driver refuses streams.
    """

    close_s = 5.0

    def __init__(self, device: CudaDevice, *, up: bool) -> None:
        self._device, self._up = device, up
        self._pairs: dict[tuple[int, int], _Pair] = {}
        try:
            self._lane = device.driver.lane(device.ordinal, up)
        except CudaError as error:
            raise Broken(f"no copies to and from device {device.ordinal}: {error.args[0]}") from error
        self.abandoned = False
        super().__init__("cuda-up" if up else "cuda-down", 1, background=1, patience_s=PATIENCE_S)

    def reaches(self, source: Region, destination: Region) -> bool:
        return self._pair(source, destination) is not None

    def close(self) -> None:
        closed = self._closed
        super().close()
        if not closed:
            stuck = any(thread.is_alive() for thread in self._threads)  # in a call of the driver's
            self.abandoned = stuck or self._lane.dead
            if not stuck:
                self._lane.close()

    def _pair(self, source: Region, destination: Region) -> _Pair | None:
        if (pair := self._pairs.get((id(source), id(destination)))) is None:
            host, device = (source, destination) if self._up else (destination, source)
            if host.kind != "host" or not self._device.owns(device) or not source.fits(destination):
                return None
            if (pinned := self._device.pinned(host)) is None:
                return None
            pair = _Pair(source, destination, coalesce(source, destination), pinned)
            self._pairs[id(source), id(destination)] = pair
        return pair

    def _job(self, plan: Plan, done: Callable[[Completion], None]) -> LaneJob:
        if (pair := self._pair(plan.source, plan.destination)) is None:
            raise Misuse(
                f"{self._name} does not reach from {plan.source.kind} region {plan.source.name!r} to "
                f"{plan.destination.kind} region {plan.destination.name!r}"
            )
        if not isinstance(plan.after, Mark):
            raise Misuse("a copy of device memory has to wait for what the engine does with it: `after` is no mark")
        source, destination = slot_lists(plan)
        return _Copy(
            plan,
            done,
            parts=len(source),
            step=max(1, len(source)),
            lane=self._lane,
            pair=pair,
            source=source,
            destination=destination,
            sums=np.zeros(len(source), np.uint64) if plan.sums and plan.source.slot_bytes >= XXH3_FROM else None,
        )
