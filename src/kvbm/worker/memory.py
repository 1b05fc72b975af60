"""Host memory of one rank, once the leader has said how much there is to be."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvbm.abc.transport import Device
from kvbm.core import cpus
from kvbm.core.errors import Broken, Unsupported
from kvbm.core.region import Region
from kvbm.link.messages import Allot, Touched
from kvbm.stores.checksum import Words
from kvbm.stores.memory import Arena
from kvbm.worker.voice import Voice

log = logging.getLogger(__name__)

_LOG_S: Final = 2.0
_REPORT_S: Final = 0.2
"""Seconds from one word on slots that can be used to the next: the leader stops for each."""
_END_S: Final = 0.8
_KEPT: Final[list[Arena]] = []
"""Memory that a device may still use."""


@dataclass(slots=True)
class _Slots:
    """The arena, bytes from one slot to the next, and slots that there are."""

    arena: Arena
    stride: int
    there: int


class RankMemory:
    """`g1` is the engine's memory, whose blocks the slots take. A rank that `stores` makes the arena; others map that
    of the rank that does. With `strict` all of it is touched at once; else a first part, and the rest while the engine
    serves. For an engine on a device it is all touched and pinned at once, by every rank for itself: pinning holds a
    lock that the engine needs. `verifies`: checksums are wanted in any case."""

    def __init__(self, g1: Region, voice: Voice, *, stores: bool, strict: bool, verifies: bool) -> None:
        self.g1, self.stores = g1, stores
        self.g2: Region | None = None
        self.extents: Region | None = None
        """The same slots, one extent each, where somebody asks for their checksums."""
        self.sums: Words = np.zeros(0, np.uint64)
        """Of each slot, the checksum of what left the engine, where somebody asks for it later."""
        self.sums_for_leader = False
        """Whether the leader hears these."""
        self._voice, self._strict, self._verifies = voice, strict, verifies
        self._slots: _Slots | None = None
        self._toucher: threading.Thread | None = None
        self._hurry = threading.Event()
        """Whether touching takes its share of the processors."""

    @property
    def device(self) -> Device | None:
        """What the engine's memory lies on, if that is no memory of this process."""
        return self.g1.owner if isinstance(self.g1.owner, Device) else None

    def make(self, allot: Allot, take_file: Callable[[], int]) -> tuple[int, int | None]:
        """Makes what the leader wants; returns how many slots can be used at once, and what others are to map. A rank
        that does not store gets the arena's file by `take_file`.

        Raises:
            Broken: the memory is not there.
            Unsupported: the device cannot use it.
        """
        slots, last = allot.num_slots, time.monotonic()

        def progress(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last > _LOG_S:
                last, rank = time.monotonic(), self._voice.rank
                log.info("KVBM: rank %d prepared %.1f of %.1f GB of host memory", rank, done / 1e9, total / 1e9)

        stride = allot.stride or self.g1.slot_bytes
        arena = Arena(slots * stride, None if self.stores else take_file())
        if (device := self.device) is not None:
            self._touch_and_pin(device, arena, stride, progress)
        elif self._strict:
            arena.touch(progress=progress)
        elif self.stores:
            arena.touch(stride)
        self._slots = _Slots(arena, stride, slots)
        self.g2 = arena.region([plane.row_bytes for plane in self.g1.planes], slots, stride=stride)
        self.sums_for_leader = allot.sums == "told"
        if allot.sums or self._verifies:
            self.sums = np.zeros(slots, np.uint64)
            self.extents = self.region("G2 for checksums")
        if allot.hurry:
            self.hurry()
        # A rank that stores nothing uses what the other has touched.
        return arena.touched // stride if self.stores else slots, arena.fd if allot.shared else None

    def _touch_and_pin(
        self, device: Device, arena: Arena, stride: int, progress: Callable[[int, int], None]
    ) -> None:  # fmt: skip
        """On the processors next to the device: what a thread touches first lies in the memory next to the thread."""
        thread = threading.current_thread().name
        cpus.spread(thread, device.cpus())
        try:
            arena.touch(progress=progress)
        finally:
            cpus.spread(thread)
        try:
            device.pin(arena.address, arena.size, stride)
        except Broken as error:
            raise Unsupported(f"{error} KVBM copies between a GPU and pinned host memory only.") from error
        if self.stores and (note := device.note(arena.address, arena.size)) is not None:
            log.warning("KVBM: %s", note)

    def region(self, name: str, slot_bytes: int = 0) -> Region:
        """All of it that there is, a slot one extent of this many bytes; 0: up to the next one."""
        assert self._slots is not None, "a tier wants host memory before the leader said how much there is"
        arena, stride, there = self._slots.arena, self._slots.stride, self._slots.there
        return arena.region([slot_bytes or stride], there, stride=stride, name=name)

    def hurry(self) -> None:
        """What is still to be touched is needed."""
        self._hurry.set()

    def touch_rest(self, ended: Callable[[], None]) -> None:
        """Has the rest touched by a thread, which calls `ended` when all that there will be is there."""
        toucher = threading.Thread(target=self._touch, args=(ended,), name="kvbm-memory", daemon=True)
        toucher.start()
        self._toucher = toucher  # `close` may look at any moment

    def _touch(self, ended: Callable[[], None]) -> None:
        assert self._slots is not None
        arena, stride, voice = self._slots.arena, self._slots.stride, self._voice
        told, last, problem = 0, time.monotonic(), None

        def progress(done: int) -> None:
            nonlocal told, last
            if done // stride > told and time.monotonic() - last > _REPORT_S:
                told, last = done // stride, time.monotonic()
                voice.tell(Touched(voice.rank, told))

        try:
            arena.touch_beside(voice.closing, self._hurry, progress)
        except Broken as error:
            problem = str(error)
        except Exception as error:
            log.exception("KVBM could not prepare host memory")
            problem = repr(error)
        if not voice.closing.is_set():
            usable = arena.touched // stride
            voice.tell(Touched(voice.rank, usable, problem))
            self._slots.there = usable
            ended()

    def stop_touching(self) -> None:
        """Waits a moment for the thread that touches; the process is about to end."""
        if self._toucher is not None:
            self._toucher.join(_END_S)

    def close(self) -> None:
        """Gives the memory back. Nothing may copy any more; where a device may do so all the same, it stays until the
        process ends."""
        if self._slots is None:
            return
        arena, device = self._slots.arena, self.device
        try:
            if device is not None:
                device.unpin(arena.address)
        except Broken as error:
            _KEPT.append(arena)
            log.error("KVBM: host memory stays there until this process ends: %s", error)
        else:
            arena.close()
