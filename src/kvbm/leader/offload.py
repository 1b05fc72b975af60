"""Down: which of a request's blocks are copied to host memory, and when.

The part of the leader (`leader/leader.py`) that looks at what a step computes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from kvbm.abc.observer import Observer
from kvbm.blocks import Pool, Writable
from kvbm.core.config import Settings
from kvbm.core.errors import Broken
from kvbm.core.keys import group_of
from kvbm.leader.coverage import Coverage, Outgoing
from kvbm.leader.health import Housekeeping
from kvbm.leader.requests import Request
from kvbm.link.channel import Link
from kvbm.link.messages import Compare, Copy, GiveUp
from kvbm.tiers.gate import Gate

log = logging.getLogger(__name__)

GRACE = 5.0
"""Seconds past a copy's own deadline after which a silent worker counts as broken."""
_FOREIGN = "not offloaded: the engine holds a block of it that KVBM has neither seen computed nor loaded"


class Offloading(Housekeeping):
    """See `Leader` for the arguments."""

    def __init__(
        self,
        settings: Settings,
        pool: Pool,
        links: dict[int, Link],
        *,
        coverage: Coverage,
        slot_bytes: int,
        gate: Gate,
        observers: Iterable[Observer],
        clock: Callable[[], float],
        lasting: Sequence[str],
    ) -> None:
        super().__init__(
            settings, pool, links, null=coverage.null, gate=gate, observers=observers, clock=clock, lasting=lasting
        )
        self._coverage = coverage
        self.deferred = 0
        """Times that blocks were not offloaded at once, because copies in flight or holds had filled their share."""
        self._settings, self._slot_bytes = settings, slot_bytes
        self._step = Draft()

    def _computed(self, request: Request, complete: int) -> None:
        """What was computed of the request's first `complete` blocks has its keys."""
        self.provenance.computed(request, complete)
        known = complete if request.stale else min(complete, request.proven)
        self._compare(request, known)
        self._look_again(request)
        if known > request.offered:
            self._offer(request, known)
        if known < complete and known <= request.offered:
            request.record.note(_FOREIGN)
            request.offered = max(request.offered, complete)

    def _offer_early(self, request: Request, complete: int) -> None:
        """Offers what this step computes of a request with an adapter, under keys that are not yet certain: by then a
        layer group may not have the block any more. What is copied is published if they were right."""
        variant = request.variant
        if variant is None or not variant.digest or complete <= request.offered:
            return
        if variant.refused is not None or self.provenance.begun(request):
            self._offer(request, complete)

    def _compare(self, request: Request, complete: int) -> None:
        """Has what the engine computed compared with what is stored, where it was declined that."""
        if self.shadow is not None and (compare := self.shadow.compare(request, complete, self._copies)) is not None:
            self._step.compares.append(compare)

    def _offer(self, request: Request, complete: int) -> None:
        """Starts offloading what G2 does not have of its first `complete` blocks and was not offered yet."""
        if (reason := self._no_store(request)) is not None:
            request.record.note(f"not offloaded: {reason}")
            self._coverage.skip(request, complete)
            return
        ready = self._coverage.ready(request, complete, self._worth(request, complete))
        self._wanted(request, complete, ready.prompt)
        slots, absent = self._room(request, ready.keys)
        taken, left = ([], absent) if slots is None else (absent[: len(slots)], absent[len(slots) :])
        if slots is not None:
            self._store(request, slots, ready.take(taken))
        self._coverage.offered(request, complete, ready, taken, left)

    def _look_again(self, request: Request) -> None:
        """Has blocks offered again that others were bringing to G2 when they were offered, and that did not arrive."""
        if not (keys := request.awaited):
            return
        there, lost = self.pool.present(keys), self.pool.absent(keys)
        request.awaited = [keys[at] for at in np.flatnonzero(~there).tolist()]
        if lost:
            left = {group_of(key)[0] for key in request.awaited}
            places = (place for place, key in enumerate(request.keys[: request.offered]) if key in left)
            request.offered, request.awaited = next(places, request.offered), []

    def _wanted(self, request: Request, complete: int, keys: Sequence[bytes]) -> None:
        """Of its blocks [offered, complete) G2 may have `keys`, which are its prompt's: others' answers may be among
        them, that the engine itself has found."""
        if request.offered < request.asked:
            self.answers.prompted(request.keys[request.offered : min(complete, request.asked)])
            self.pool.want(keys)

    @staticmethod
    def _worth(request: Request, complete: int) -> int:
        """How many of the request's first `complete` blocks are worth keeping."""
        if request.worth < complete:
            request.record.note(f"not offloaded: what follows its first {request.worth} blocks is not worth keeping")
        return min(request.worth, complete)

    def _room(self, request: Request, keys: Sequence[bytes]) -> tuple[Writable | None, list[int]]:
        """Slots for the first of those `keys` that G2 lacks, as many as may be copied now, and where all these are."""
        absent = self.pool.absent(keys)
        if len(absent) < len(keys):
            self.pool.touch(keys)
            there = self.pool.present(keys)
            there[absent] = True
            request.awaited += [keys[at] for at in np.flatnonzero(~there).tolist()]
        most = max(1, self._settings.store_inflight_mb * 1_000_000 // self._slot_bytes)
        pool = self.pool.statistics()
        count = min(len(absent), max(0, min(most - self._copies.blocks_read, pool.free + pool.inactive)))
        slots = self.pool.allocate(count) if count else None
        if slots is None and absent:
            self.deferred += 1
            request.record.note("some blocks were not offloaded at once: copies in flight or holds filled their share")
        return slots, absent

    def _store(self, request: Request, slots: Writable, blocks: Outgoing) -> None:
        """Starts to copy blocks of a request out of the engine."""
        params = request.params
        staged = slots.stage(blocks.keys, parent=blocks.parent, priority=params.priority, ttl=params.ttl)
        patience = self._settings.store_deadline_s + GRACE
        job = self._copies.start(request, staged, blocks.g1, blocks.places, patience)
        if request.variant is not None:
            self._variants.storing(job.id)
        self._step.stores.append(Copy.of(job.id, request.id, blocks.g1, staged.slots))

    def _drop(self, number: int, g1: Iterable[int] | None) -> int:
        """Has a copy that no worker has heard of leave out these blocks (None: all); how many it would have copied."""
        job, count = self._copies.drop(number, g1)
        if not job.done.any():
            self._variants.dropped(number)
            self._step.stores = [copy for copy in self._step.stores if copy.job != number]
            self._step.compares = [copy for copy in self._step.compares if copy.job != number]
            if isinstance(job.lease, Writable) and self.shadow is not None:
                self.shadow.answered(job)
            else:
                job.lease.drop()
        return count

    def quiesce(self, seconds: float) -> None:
        """Returns when the copies that are in flight now are over, or given up. After so many seconds, longer than any
        deadline, only those are left that no worker has begun, or that cannot be stopped: none of them begins any more
        and none counts. Where workers do not even answer that, KVBM is off."""
        with self._lock:
            copies = self._copies.ids()
        if not (left := self._await(copies, seconds)):
            return
        log.error("KVBM: %d copies did not end within %.0f s of a reset and are given up", _count(left), seconds)
        for rank, jobs in left.items():
            try:
                self.links[rank].send(GiveUp(jobs))
            except Broken as error:  # it is noticed elsewhere that the worker is gone
                log.debug("KVBM: %s", error)
        if left := self._await(copies, GRACE):
            why = f"off until the engine is started anew: {_count(left)} copies may go on after a reset"
            self.turn_off(why)

    def _await(self, copies: set[int], seconds: float) -> dict[int, list[int]]:
        """Waits for copies, for so long at most. By rank, which of them it has not answered by then."""
        end = time.monotonic() + seconds
        while True:
            with self._lock:
                self._drain()
                there = [rank for rank, link in self.links.items() if link.open]
                left = {rank: jobs for rank in there if (jobs := self._copies.unanswered(copies, rank))}
            if not left or time.monotonic() >= end:
                return left
            time.sleep(0.001)

    def _clear(self) -> None:
        super()._clear()
        for number in self._copies.unsent(job.id for job in self._copies.stores()):
            self._drop(number, None)

    def _no_store(self, request: Request) -> str | None:
        if (reason := self.standing_aside()) is not None:
            return reason
        if request.barred is not None:
            return request.barred
        if not request.params.save:
            return "the request opted out of saving"
        if request.variant is not None and request.variant.refused is not None:
            return request.variant.refused
        return "the cache was reset while it ran" if request.stale else None


def _count(left: Mapping[int, Sequence[int]]) -> int:
    return len({job for jobs in left.values() for job in jobs})


class Draft:
    """The step being described."""

    def __init__(self) -> None:
        self.loads: list[Copy] = []
        self.stores: list[Copy] = []
        self.compares: list[Compare] = []
        self.fence: set[int] = set()
