"""What tests of the disk tier need: a transport without threads, memory, and blocks whose bytes follow from a key."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence

import numpy as np

from kvbm.abc.transport import Completion, Plan, Quiet, Transport
from kvbm.core.outcome import Outcome
from kvbm.core.region import Region, Slots
from kvbm.stores.format import Labels, Words, extents
from kvbm.stores.memory import Arena

PATIENCE_S = 30.0


class PlainTransport(Transport):
    """Copies between host and file regions with pread and pwrite, inside `submit`."""

    def __init__(self) -> None:
        self._tickets = itertools.count(1)

    def reaches(self, source: Region, destination: Region) -> bool:
        return {source.kind, destination.kind} == {"host", "file"}

    def submit(self, plan: Plan, done: Callable[[Completion], None]) -> int:
        outcomes, error, begin = np.full(len(plan.source_slots), Outcome.DONE, dtype=np.uint8), None, time.monotonic()
        host, file = (plan.source, plan.destination) if plan.source.kind == "host" else (plan.destination, plan.source)
        slots = [plan.source_slots, plan.destination_slots][:: 1 if host is plan.source else -1]
        size = file.slot_bytes
        for i, (view, slot) in enumerate(zip(extents(host, slots[0], size), slots[1].tolist(), strict=True)):
            try:
                move = os.pwritev if host is plan.source else os.preadv
                if move(file.owner.fd, [view], slot * size) != size:
                    outcomes[i], error = Outcome.CORRUPT, "short"
            except OSError as problem:
                outcomes[i], error = Outcome.FAILED, str(problem)
        ticket = next(self._tickets)
        nbytes = size * int((outcomes == Outcome.DONE).sum())
        done(Completion(ticket, outcomes, error, time.monotonic() - begin, nbytes))
        return ticket

    def cancel(self, ticket: int) -> Quiet:
        return Quiet.QUIESCED

    def alive(self) -> bool:
        return True

    def close(self) -> None:
        pass


class Memory:
    """`slots` slots of page-aligned host memory."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self._arena = Arena(slots * slot_bytes)
        self.region = self._arena.region([slot_bytes], slots)

    def get(self, slot: int, length: int | None = None) -> bytes:
        size = self.region.slot_bytes if length is None else length
        return bytes(next(extents(self.region, np.array([slot]), size)))

    def put(self, slot: int, data: bytes) -> None:
        next(extents(self.region, np.array([slot]), len(data)))[:] = data


class Result:
    """A `done` for `Disk` to wait for."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self.calls: list[tuple[int, Completion, Words]] = []

    def __call__(self, job: int, completion: Completion, sums: Words) -> None:
        self.calls.append((job, completion, sums))
        self._over.set()

    def wait(self) -> Completion:
        assert self._over.wait(PATIENCE_S), "done was not called"
        return self.calls[0][1]

    @property
    def outcomes(self) -> list[int]:
        return [int(outcome) for outcome in self.wait().outcomes]


def slots(*numbers: int) -> Slots:
    return np.array(numbers, dtype=np.int64)


def key_of(number: int) -> bytes:
    return number.to_bytes(32, "little")


def bytes_of(key: bytes, length: int) -> bytes:
    """The contents of a block, which follow from its key."""
    return np.random.default_rng(list(key)).bytes(length)


def labels(keys: Sequence[bytes], sequence: int = 1, generation: int = 0, expires: float = np.inf) -> Labels:
    count = len(keys)
    return Labels(keys, [b""] * count, np.zeros(count, dtype=np.int32), np.full(count, expires), sequence, generation)


def direct(transport: Transport) -> Callable[[int, Plan, float, Callable[[int, Completion], None]], None]:
    """A `submit` straight into a transport."""

    def submit(job: int, plan: Plan, deadline_s: float, done: Callable[[int, Completion], None]) -> None:
        transport.submit(plan, lambda completion: done(job, completion))

    return submit


def no_cancel(jobs: Collection[int]) -> bool:
    return True
