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
from kvbm.tiers.disk.rank import DiskWorker
from kvbm.transfer.executor import NO_TICKET, Executor
from kvbm.worker.fence import Fence

log = logging.getLogger(__name__)


class Telling:
    """See `Worker`. `sums_for_leader`: the leader hears the checksums of what was written to host memory."""

    def __init__(
        self, settings: Settings, rank: int, executor: Executor, g1: Region, *, sums_for_leader: bool
    ) -> None:  # fmt: skip
        self._settings, self._rank, self._executor = settings, rank, executor
        self._g1 = g1
        self._g2: Region | None = None
        self._disk: DiskWorker | None = None
        self._sums_for_leader = sums_for_leader
        self._sums = np.zeros(0, np.uint64)
        """Of each host slot, the checksum of what left the engine, where somebody asks for it later."""
        self._fence = Fence(executor, settings.fence_ms / 1e3)
        self._link: Link | None = None
        self._sick = False
        """Whether the leader knows that nothing can be copied between the two any more."""
        self._closing = threading.Event()
        self._ended = threading.Condition()
        self._live: set[int] = set()
        """Jobs submitted and not ended. Guarded by `_ended`, as is `_bad`."""
        self._bad: dict[int, Completion] = {}
        """Loads that ended badly and have not been collected."""
        self.off: str | None = None
        """Why nothing is copied any more, until the engine is started anew."""

    def _report(self, job: int, completion: Completion, written: Slots | None = None) -> None:
        """`written` are the slots of host memory that have a new checksum."""
        if self.off is not None:
            completion = Completion.failed(completion.ticket, len(completion.outcomes), self.off)
        outcomes = completion.outcomes.astype(np.uint8).tobytes()
        sums = self._sums[written].tobytes() if written is not None and self._sums_for_leader else b""
        self._tell(Result(job, self._rank, outcomes, completion.nbytes, completion.seconds, completion.error, sums))

    def _tell(self, message: Message) -> None:
        try:
            if self._link is not None:
                self._link.send(message)
        except Broken as error:
            if not self._closing.is_set():
                log.error("KVBM: rank %d: %s", self._rank, error)

    def _look(self) -> None:
        """Whether the threads that copy live. Without those of the disk, the rest goes on."""
        copies = self._executor.alive()
        if self._disk is not None and not (copies and self._disk.disk.alive()):
            self._disk.look()
        if not copies and self._g2 is not None and not self._sick and self._executor.lost(self._g1, self._g2):
            self._sick = True
            self._tell(Sick(self._rank, "a copy thread died"))

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

    def _start(self, job: int, plan: Plan, deadline_s: float, ended: Callable[[int, Completion], None]) -> None:
        """Has blocks copied between the engine and host memory, unless that was given up before."""
        if self._fence.condemned(job):
            self._heed(ended, job, Completion.failed(NO_TICKET, len(plan.source_slots), "given up"))
            return
        self._executor.submit(job, plan, deadline_s, partial(self._heed, ended))
        if self._fence.condemned(job):  # just now
            self._executor.cancel([job])

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
            log.error("KVBM: rank %d copies nothing any more: %s", self._rank, why)
            self._tell(Sick(self._rank, why))
            self.quiet()

    def quiet(self) -> bool:
        """Gives up what is being copied between the engine and host memory. Whether nothing touches the engine's blocks
        any more; waits a moment for that."""
        with self._ended:
            live = set(self._live)
        return self._executor.cancel(live) or self._executor.wait(live, self._settings.idle_wait_ms / 1e3)
