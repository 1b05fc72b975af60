"""The copies between an engine's memory and host memory on one rank: how they begin and how they end.

What raises here turns KVBM off on this rank, and the leader hears of it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from functools import partial
from itertools import starmap

import numpy as np

from kvbm.abc.transport import Completion, Plan
from kvbm.core.config import Settings
from kvbm.core.region import Region, Slots
from kvbm.link.messages import Compare, Copy, FromTier, Result, Sick, unpack
from kvbm.stores.checksum import Words, sums_of, verified
from kvbm.transfer.executor import NO_TICKET, Executor
from kvbm.worker.compare import Comparisons
from kvbm.worker.fence import Fence
from kvbm.worker.memory import RankMemory
from kvbm.worker.voice import Voice

log = logging.getLogger(__name__)


class Copying:
    """Also what a rank has for its tiers (`tiers.tier.RankSide`). What says nothing else may be called by any
    thread."""

    def __init__(self, settings: Settings, executor: Executor, memory: RankMemory, voice: Voice) -> None:
        self.executor, self._memory, self._voice, self._settings = executor, memory, voice, settings
        self.fence = Fence(executor, settings.fence_ms / 1e3)
        self.comparisons = Comparisons(voice.rank, memory.g1.dtype, voice.tell)
        self._verifies = settings.g2_verify and memory.stores  # who stores has the checksums, and loads as well
        self._ended = threading.Condition()
        self._live: set[int] = set()
        """Jobs submitted and not ended. Guarded by `_ended`, as are `bad` and `_reading`."""
        self._reading: set[int] = set()
        """Reads of tiers that have not ended."""
        self.bad: dict[int, Completion] = {}
        """Loads that ended badly and have not been asked for."""

    # ------------------------------------------------------------------ what begins

    def mark(self) -> object | None:
        """What the engine has told its device until now, None where it has none: copies begin `after` that. On the
        engine's worker thread, once for all copies of a kind in a step. Raises Broken."""
        device = self._memory.device
        return device.mark() if device is not None else None

    def load(self, copy: Copy, after: object | None) -> None:
        """Copies blocks of host memory to the engine."""
        g1, g2 = copy.g1_slots(), copy.g2_slots()
        plan = Plan(self._host(), g2, self._memory.g1, g1, urgent=True, label="load", sums=self._verifies, after=after)
        self._submit(copy.job, plan, self._settings.load_deadline_s, partial(self._load_ended, g2))

    def store(self, copy: Copy, after: object | None) -> None:
        """Copies blocks of the engine to host memory."""
        g1, g2 = copy.g1_slots(), copy.g2_slots()
        sums = len(self._memory.sums) > 0
        plan = Plan(self._memory.g1, g1, self._host(), g2, urgent=False, label="store", sums=sums, after=after)
        self._submit(copy.job, plan, self._settings.store_deadline_s, partial(self._store_ended, g2))

    def compare(self, wanted: Compare, after: object | None) -> None:
        """Copies what was computed beside what is stored; the engine's blocks are not needed after that."""
        host, scratch = self._host(), unpack(wanted.scratch)
        g1 = self._memory.g1
        plan = Plan(g1, wanted.g1_slots(), host, scratch, urgent=False, label="store", after=after)

        def copied(job: int, completion: Completion) -> None:
            completion = self.fence.judged(job, completion)
            self._over(job)
            self.comparisons.start(wanted, host, completion)

        self._submit(wanted.job, plan, self._settings.store_deadline_s, copied)

    def refuse(self, job: int, blocks: int, why: str) -> None:
        """A load is not made."""
        failed = Completion.failed(job, blocks, why)
        self.report(job, failed)
        with self._ended:
            self.bad[job] = failed

    def _host(self) -> Region:
        assert self._memory.g2 is not None, "the engine stepped before KVBM's arena was ready"
        return self._memory.g2

    def _submit(self, job: int, plan: Plan, deadline_s: float, ended: Callable[[int, Completion], None]) -> None:
        """Has blocks copied, unless that was given up before."""
        with self._ended:
            self._live.add(job)
        if self.fence.condemned(job):
            self._heed(ended, job, Completion.failed(NO_TICKET, len(plan.source_slots), "given up"))
            return
        self.executor.submit(job, plan, deadline_s, partial(self._heed, ended))
        if self.fence.condemned(job):  # just now
            self.executor.cancel([job])

    # ------------------------------------------------------------------ what ends

    def _heed(self, ended: Callable[[int, Completion], None], job: int, completion: Completion) -> None:
        """Nobody hears of a copy whose end raised: neither may the engine wait for it, nor may it count."""
        try:
            ended(job, completion)
        except Exception as error:
            log.exception("KVBM: the end of a copy went wrong")
            with self._ended:
                self.bad[job] = Completion.failed(completion.ticket, len(completion.outcomes), str(error))
            self._over(job)
            self.turn_off(f"off until the engine is started anew: the end of a copy raised {error!r}")

    def _load_ended(self, slots: Slots, job: int, completion: Completion) -> None:
        completion, memory = self.fence.judged(job, completion), self._memory
        if self._verifies:
            assert memory.extents is not None
            completion = verified(completion, memory.extents, slots, memory.sums, memory.g1.slot_bytes)
        self.report(job, completion)
        if completion.outcomes.any():
            with self._ended:
                self.bad[job] = completion
        self._over(job)

    def _store_ended(self, slots: Slots, job: int, completion: Completion) -> None:
        completion, memory = self.fence.judged(job, completion), self._memory
        if len(memory.sums):
            assert memory.extents is not None
            memory.sums[slots] = sums_of(completion, memory.extents, slots, memory.g1.slot_bytes)
        self.report(job, completion, slots)
        self._over(job)

    def _over(self, job: int) -> None:
        with self._ended:
            self._live.discard(job)
            self._ended.notify_all()

    def report(self, job: int, completion: Completion, written: Slots | None = None) -> None:
        """The leader hears how a copy ended. `written` are the slots of host memory that have a new checksum."""
        if self._voice.off is not None:
            completion = Completion.failed(completion.ticket, len(completion.outcomes), self._voice.off)
        outcomes, memory = completion.outcomes.astype(np.uint8).tobytes(), self._memory
        sums = memory.sums[written].tobytes() if written is not None and memory.sums_for_leader else b""
        nbytes, seconds = completion.nbytes, completion.seconds
        self._voice.tell(Result(job, self._voice.rank, outcomes, nbytes, seconds, completion.error, sums))

    # ------------------------------------------------------------------ what the engine asks

    def ended(self, jobs: Collection[int]) -> set[int]:
        """Those of these copies that have ended."""
        with self._ended:
            return set(jobs) - self._live

    def take_bad(self, job: int) -> Completion | None:
        """How a load ended that ended badly; asked for once."""
        with self._ended:
            return self.bad.pop(job, None)

    def wait(self, jobs: Collection[int], *, waiting: bool) -> None:
        """A moment, until the next copy ends, where there are `jobs` and none has ended, where a tier reads, or where
        the leader is `waiting`."""
        with self._ended:
            if self._live.issuperset(jobs) and (jobs or self._reading or waiting):
                self._ended.wait(self._settings.idle_wait_ms / 1e3)

    def settle(self, jobs: list[int]) -> None:
        """Returns when these loads have ended; those that are late are cancelled."""
        patience = self._settings.load_deadline_s
        if not self.executor.wait(jobs, patience):
            while not self.executor.cancel(jobs) and not self.executor.wait(jobs, patience):
                log.error("KVBM: a load is late and may still write into the engine, which waits for it")
            # Cancelled copies are quiet, but their completions may still be on their way.
            self.executor.wait(jobs, patience)

    # ------------------------------------------------------------------ the end

    def give_up(self, jobs: list[int]) -> None:
        """The leader waits for these no longer."""
        self.fence.give_up(jobs)
        for job in sorted(self.ended(jobs)):  # the engine may take its time until they would begin
            self.report(job, Completion.failed(NO_TICKET, 0, "given up before it began"))

    def look(self) -> None:
        """Whether the threads that copy live."""
        g1, g2 = self._memory.g1, self._memory.g2
        if not self.executor.alive() and g2 is not None and any(starmap(self.executor.lost, ((g1, g2), (g2, g1)))):
            self._voice.sick("a copy thread died")

    def turn_off(self, why: str) -> None:
        """Something raised what nobody expected, here or beside the scheduler. From now on no copy counts, and those
        that touch the engine's blocks are given up."""
        if self._voice.turn_off(why):
            self.quiet()

    def quiet(self) -> bool:
        """Gives up what is being copied between the engine and host memory. Whether nothing touches the engine's blocks
        any more; waits a moment for that."""
        with self._ended:
            live = set(self._live)
        return self.executor.cancel(live) or self.executor.wait(live, self._settings.idle_wait_ms / 1e3)

    # ------------------------------------------------------------------ what tiers have and say (`RankSide`)

    @property
    def rank(self) -> int:
        """See `RankSide`, here and below."""
        return self._voice.rank

    @property
    def sums(self) -> Words:
        return self._memory.sums

    @property
    def slot_bytes(self) -> int:
        return self._memory.g1.slot_bytes

    def memory(self, name: str, slot_bytes: int = 0) -> Region:
        return self._memory.region(name, slot_bytes)

    def tell(self, message: FromTier | Sick) -> None:
        self._voice.tell(message)

    def reads(self, job: int) -> None:
        with self._ended:
            self._reading.add(job)

    def read(self, slots: Slots, job: int, completion: Completion, sums: Words) -> None:
        self._safely(job, completion, lambda: self.read_ended(slots, job, completion, sums))

    def written(self, job: int, completion: Completion) -> None:
        self._safely(job, completion, lambda: self.write_ended(job, completion))

    def read_ended(self, slots: Slots, job: int, completion: Completion, sums: Words) -> None:
        self._memory.sums[slots] = sums
        self.report(job, completion, slots)
        with self._ended:
            self._reading.discard(job)
            self._ended.notify_all()

    def write_ended(self, job: int, completion: Completion) -> None:
        self.report(job, completion)

    def _safely(self, job: int, completion: Completion, ended: Callable[[], None]) -> None:
        """What comes from below host memory, or goes there, touches no block of the engine's."""
        try:
            ended()
        except Exception as error:
            log.exception("KVBM: the end of a move went wrong")
            self.turn_off(f"off until the engine is started anew: the end of a move raised {error!r}")
            self.report(job, completion)  # as failed
