"""What a worker says about its copies, and how they all end when something of KVBM raised.

The half of the worker (`worker/worker.py`) that any thread may call.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial

import numpy as np

from kvbm.abc.transport import Completion, Plan
from kvbm.core.config import Settings
from kvbm.core.errors import Broken
from kvbm.core.region import Region, Slots
from kvbm.link.channel import Link
from kvbm.link.messages import Message, Result, Sick
from kvbm.stores.checksum import Words
from kvbm.tiers.tier import RankTier
from kvbm.transfer.executor import NO_TICKET, Executor
from kvbm.worker.fence import Fence

log = logging.getLogger(__name__)


class Telling:
    """See `Worker`."""

    def __init__(self, settings: Settings, rank: int, executor: Executor, g1: Region) -> None:
        self._settings, self.rank, self.executor = settings, rank, executor
        self.slot_bytes = g1.slot_bytes
        self._g1 = g1
        self._g2: Region | None = None
        self._tiers: dict[str, RankTier] = {}
        self._sums_for_leader = False
        """Whether the leader hears the checksums of what was written to host memory."""
        self.sums = np.zeros(0, np.uint64)
        """Of each host slot, the checksum of what left the engine, where somebody asks for it later."""
        self._fence = Fence(executor, settings.fence_ms / 1e3)
        self._link: Link | None = None
        self._sick = False
        """Whether the leader knows that nothing can be copied between the two any more."""
        self._closing = threading.Event()
        self._ended = threading.Condition()
        self._live: set[int] = set()
        """Jobs submitted and not ended. Guarded by `_ended`, as are `_bad` and `_reading`."""
        self._reading: set[int] = set()
        """Reads of tiers that have not ended."""
        self._bad: dict[int, Completion] = {}
        """Loads that ended badly and have not been collected."""
        self.off: str | None = None
        """Why nothing is copied any more, until the engine is started anew."""

    def _report(self, job: int, completion: Completion, written: Slots | None = None) -> None:
        """`written` are the slots of host memory that have a new checksum."""
        if self.off is not None:
            completion = Completion.failed(completion.ticket, len(completion.outcomes), self.off)
        outcomes = completion.outcomes.astype(np.uint8).tobytes()
        sums = self.sums[written].tobytes() if written is not None and self._sums_for_leader else b""
        self.tell(Result(job, self.rank, outcomes, completion.nbytes, completion.seconds, completion.error, sums))

    def tell(self, message: Message) -> None:
        """The leader hears of this."""
        try:
            if self._link is not None:
                self._link.send(message)
        except Broken as error:
            if not self._closing.is_set():
                log.error("KVBM: rank %d: %s", self.rank, error)

    def _look(self) -> None:
        """Whether the threads that copy live. Without those of a tier, the rest goes on."""
        copies = self.executor.alive()
        for tier in self._tiers.values():
            tier.look()
        if not copies and self._g2 is not None and not self._sick and self.executor.lost(self._g1, self._g2):
            self._sick = True
            self.tell(Sick(self.rank, "a copy thread died"))

    def _over(self, job: int) -> None:
        with self._ended:
            self._live.discard(job)
            self._ended.notify_all()

    def _heed(self, ended: Callable[[int, Completion], None], job: int, completion: Completion) -> None:
        """Nobody hears of a copy whose end raised: neither may the engine wait for it, nor may it count."""
        try:
            ended(job, completion)
        except Exception as error:
            log.exception("KVBM: the end of a copy went wrong")
            with self._ended:
                self._bad[job] = Completion.failed(completion.ticket, len(completion.outcomes), str(error))
            self._over(job)
            self.turn_off(f"off until the engine is started anew: the end of a copy raised {error!r}")

    def _safely(self, job: int, completion: Completion, ended: Callable[[], None]) -> None:
        """The same for what comes from below host memory, or goes there, and touches no block of the engine's."""
        try:
            ended()
        except Exception as error:
            log.exception("KVBM: the end of a move went wrong")
            self.turn_off(f"off until the engine is started anew: the end of a move raised {error!r}")
            self._report(job, completion)  # as failed

    # ------------------------------------------------------------------ what tiers say (`tiers.tier.RankSide`)

    def reads(self, job: int) -> None:
        """A tier begins a read: an idle step waits a moment for its end."""
        with self._ended:
            self._reading.add(job)

    def read(self, slots: Slots, job: int, completion: Completion, sums: Words) -> None:
        """It ended; `sums` are the checksums of what these slots of host memory hold now."""
        self._safely(job, completion, partial(self._read_ended, slots, job, completion, sums))

    def _read_ended(self, slots: Slots, job: int, completion: Completion, sums: Words) -> None:
        self.sums[slots] = sums
        self._report(job, completion, slots)
        with self._ended:
            self._reading.discard(job)
            self._ended.notify_all()

    def written(self, job: int, completion: Completion) -> None:
        """A write of a tier ended."""
        self._safely(job, completion, partial(self._write_ended, job, completion))

    def _write_ended(self, job: int, completion: Completion) -> None:
        self._report(job, completion)

    # ------------------------------------------------------------------ the end

    def _start(self, job: int, plan: Plan, deadline_s: float, ended: Callable[[int, Completion], None]) -> None:
        """Has blocks copied between the engine and host memory, unless that was given up before."""
        if self._fence.condemned(job):
            self._heed(ended, job, Completion.failed(NO_TICKET, len(plan.source_slots), "given up"))
            return
        self.executor.submit(job, plan, deadline_s, partial(self._heed, ended))
        if self._fence.condemned(job):  # just now
            self.executor.cancel([job])

    def _give_up(self, jobs: list[int]) -> None:
        """The leader waits for these no longer."""
        self._fence.give_up(jobs)
        with self._ended:
            idle = set(jobs) - self._live
        for job in sorted(idle):  # the engine may take its time until they would begin
            self._report(job, Completion.failed(NO_TICKET, 0, "given up before it began"))

    def turn_off(self, why: str) -> None:
        """Something raised what nobody expected, here or beside the scheduler. From now on no copy counts, and those
        that touch the engine's blocks are given up. Any thread."""
        if self.off is None:
            self.off = why
            log.error("KVBM: rank %d copies nothing any more: %s", self.rank, why)
            self.tell(Sick(self.rank, why))
            self.quiet()

    def quiet(self) -> bool:
        """Gives up what is being copied between the engine and host memory. Whether nothing touches the engine's blocks
        any more; waits a moment for that."""
        with self._ended:
            live = set(self._live)
        return self.executor.cancel(live) or self.executor.wait(live, self._settings.idle_wait_ms / 1e3)
