"""Shared storage on one rank: the lowest that stores moves runs for all, the others lend it their host memory."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Collection
from itertools import count
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from kvbm.abc.transport import Completion
from kvbm.core.errors import Broken, ConfigError
from kvbm.core.region import Region, packed
from kvbm.link.messages import Sick, unpack
from kvbm.stores.memory import Arena
from kvbm.stores.objects.probe import Fitness, probe, together
from kvbm.stores.objects.runs import Shape
from kvbm.tiers.objects.clerk import Clerk, Habits
from kvbm.tiers.objects.mover import Heard, Library, Mover, RunMoved, lanes
from kvbm.tiers.objects.orders import (
    TIER,
    Answer,
    AttachArenas,
    GetRun,
    Got,
    Leave,
    NoteSums,
    PutRun,
    RankArena,
    RunsPlace,
    Touch,
    TryStorage,
    decode_order,
    decode_place,
    to_leader,
)
from kvbm.tiers.tier import RankSide

log = logging.getLogger(__name__)


class CallLimits(NamedTuple):
    """Bytes on their way at once, seconds that a call may take, and calls that may hang before the storage is given
    up."""

    in_flight: int
    deadline_s: float
    most_lost: int


OpenLibrary = Callable[[RunsPlace, Shape], Library]
"""Makes a client of the storage, in this process, and connects to nothing. Raises ConfigError, Broken."""


class _Held(Protocol):
    """What keeps a rank's host memory: a file in memory."""

    @property
    def fd(self) -> int: ...

    @property
    def size(self) -> int: ...


class ObjectsRank:
    """Of one rank. `open_library` is called on the rank that moves."""

    def __init__(self, side: RankSide, open_library: OpenLibrary, limits: CallLimits, habits: Habits) -> None:
        self._side, self._open_library, self._limits, self._habits = side, open_library, limits, habits
        self._place: RunsPlace | None = None
        self._mover: Mover | None = None
        self._clerk: Clerk | None = None

    def open(self, body: bytes) -> None:
        self._place = decode_place(body)
        side = self._side
        if self._place.strict and side.rank == min(self._place.ranks):
            self._try(self._place)
        region = side.memory("G2 for shared storage", side.slot_bytes)
        self._say(_memory(self._side.rank, region))

    def _shape(self, place: RunsPlace) -> Shape:
        return Shape(place.run_blocks, len(place.ranks), self._side.slot_bytes)

    def _try(self, place: RunsPlace) -> None:
        """The start waits for the storage. Raises Broken."""

        def call() -> Fitness:
            library = self._open_library(place, self._shape(place))
            return probe(library.store, place.instance, count(), library.envelope.size(library.format.plain_bytes))

        try:
            together([call], 3 * self._limits.deadline_s)
        except ConfigError as error:
            raise Broken(str(error)) from None

    def ready(self) -> None:
        """Its memory is used as the leader says, slot by slot."""

    def take(self, body: bytes) -> None:
        match message := decode_order(body):
            case AttachArenas():
                self._attach(message)
            case NoteSums():
                self._note(message)
            case GetRun():
                self._side.reads(message.job)
                if self._mover is not None:
                    self._mover.get(message)
                else:
                    self._got(message, RunMoved.badly(len(message.keys), "shared storage is not open"))
            case PutRun():
                if self._mover is not None:
                    self._mover.put(message)
                else:
                    self._put(message, RunMoved.badly(len(message.keys), "shared storage is not open"))
            case TryStorage() if self._clerk is not None:
                self._clerk.try_storage(message)
            case Touch(ends=ends) if self._clerk is not None:
                self._clerk.touch(ends)
            case Leave() if self._clerk is not None:
                self._clerk.leave()

    def cancel(self, jobs: Collection[int]) -> None:
        if self._mover is not None:
            self._mover.cancel(jobs)

    def expire(self) -> None:
        if self._mover is not None and self._clerk is not None:
            self._mover.expire()
            self._clerk.tick()

    def look(self) -> None:
        """Threads that hang are counted, and none of them dies."""

    def close(self, seconds: float) -> None:
        if self._mover is not None and self._clerk is not None:
            self._mover.close(seconds / 2)
            self._clerk.close(seconds / 2)

    # ------------------------------------------------------------------ the rank that moves

    def _attach(self, message: AttachArenas) -> None:
        """All memories are known: this rank opens the storage, or says why not."""
        place, side = self._place, self._side
        assert place is not None, "the leader attaches before it opens"
        try:
            library = self._open_library(place, self._shape(place))
            memories = [_region(each, side) for each in sorted(message.memories, key=lambda each: each.rank)]
        except (Broken, ConfigError) as error:
            self._broken(str(error))
            return
        limits = self._limits
        gets, puts = lanes(limits.in_flight, library.format.shape.data_bytes)
        clerk = self._clerk = Clerk(
            library, place.instance, self._habits._replace(warm=place.warm), self._say, most_lost=limits.most_lost,
            broken=self._broken, stuck=lambda: 0 if self._mover is None else self._mover.lost,
        )  # fmt: skip
        self._mover = Mover(
            library, memories, Heard(self._put, self._got, clerk.came, clerk.suspects.add, clerk.suspects.alone),
            puts=puts, gets=gets, deadline_s=limits.deadline_s, most_lost=limits.most_lost,
            broken=self._broken,
        )  # fmt: skip

    def _broken(self, why: str) -> None:
        self._side.tell(Sick(self._side.rank, why, TIER))

    def _say(self, answer: Answer) -> None:
        self._side.tell(to_leader(answer))

    def _put(self, order: PutRun, moved: RunMoved) -> None:
        self._side.written(order.job, moved.completion(order.job))

    def _got(self, order: GetRun, moved: RunMoved) -> None:
        place = self._place
        assert place is not None
        slots, zeros = unpack(order.g2), np.zeros(len(order.keys), np.uint64)
        sums = dict(zip(sorted(place.ranks), moved.sums, strict=True)) if moved.sums else {}
        own = sums.pop(self._side.rank, zeros)
        if len(place.ranks) > 1 or moved.priority:  # the others answer after that, with what they noted
            others = [sums.get(rank, zeros).tobytes() for rank in sorted(place.ranks) if rank != self._side.rank]
            self._say(Got(order.job, moved.outcomes.tobytes(), others, moved.error, moved.priority))
        self._side.read(slots, order.job, moved.completion(order.job), own)

    # ------------------------------------------------------------------ the others

    def _note(self, note: NoteSums) -> None:
        """Blocks came to this rank's memory, by another rank's hands."""
        self._side.reads(note.job)
        outcomes = np.frombuffer(note.outcomes, np.uint8).copy()
        completion = Completion(note.job, outcomes, note.error, 0.0, 0)
        self._side.read(unpack(note.g2), note.job, completion, np.frombuffer(note.sums, np.uint64))


def _memory(rank: int, region: Region) -> RankArena:
    """Where a rank's memory is, for another process of the same user."""
    held: _Held = region.owner
    return RankArena(rank, os.getpid(), held.fd, held.size, region.planes[0].stride, _host())


def _host() -> str:
    """Tells machines apart, and containers that do not see each other's processes."""
    space = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {os.readlink(space) if space.exists() else ''}"


def _region(memory: RankArena, side: RankSide) -> Region:
    """A rank's memory in this process. Raises Broken."""
    if memory.rank == side.rank:
        return side.memory("G2 for shared storage", side.slot_bytes)
    if memory.host != _host():
        raise Broken(
            f"ranks {side.rank} and {memory.rank} run on different hosts or in containers that do not see each other, "
            "and shared storage needs all ranks of an engine on one"
        )
    try:
        descriptor = os.open(f"/proc/{memory.pid}/fd/{memory.fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise Broken(f"the host memory of rank {memory.rank} cannot be mapped: {error.strerror}") from None
    arena = Arena(memory.nbytes, descriptor)
    slots = memory.nbytes // memory.stride
    return packed("G2 of another rank", arena.address, [side.slot_bytes], slots, stride=memory.stride, owner=arena)
