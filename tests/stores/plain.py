"""A transport between memory and files without threads."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable

import numpy as np

from kvbm.abc.transport import Completion, Plan, Quiet, Transport
from kvbm.core.outcome import Outcome
from kvbm.core.region import Region
from kvbm.stores.checksum import extents


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
