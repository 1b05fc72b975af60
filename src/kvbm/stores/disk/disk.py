"""Blocks to and from a shard, checked: what is published is complete, and what is read is what was written.

The bytes are moved by a transport, behind `submit`. What goes around that (index, checksums, encryption) is done by
threads of this module: a transport's completions have to be short, and the caller's thread may be the engine's.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Final, final

import numpy as np

from kvbm.abc.transport import Completion, Plan
from kvbm.core.errors import KvbmError, Misuse
from kvbm.core.outcome import Outcome
from kvbm.core.region import Region, Slots
from kvbm.stores.checksum import Words, extents
from kvbm.stores.disk.cipher import Cipher
from kvbm.stores.disk.format import PAGE, Labels
from kvbm.stores.disk.jobs import Bounce, DiskJob, DiskRead, DiskWrite, Done, Sides
from kvbm.stores.disk.shard import Shard

logger = logging.getLogger(__name__)

Submit = Callable[[int, Plan, float, Callable[[int, Completion], None]], None]
"""`Executor.submit`: job, plan, seconds it may take, what to call."""

Cancel = Callable[[Collection[int]], bool]
"""`Executor.cancel`: whether the memory of these jobs is quiet on return."""

BOUNCE_BYTES: Final = 64 << 20
"""Memory for encrypted blocks on their way, in two halves: one is on its way while the other is worked on."""


@final
class Disk:
    """Reads and writes blocks of a shard from and to the slots of `memory`, host memory of one extent per slot.

    With a `cipher`, blocks are encrypted on their way, through `bounce_bytes` of memory. Jobs that wait for a turn are
    begun in order, reads before writes. Threads: any; `done` runs on a thread of the disk's or of the transport's, and
    must not wait for other jobs. Nothing here waits for the disk on the caller's thread but `close`. A thread in which
    something was raised that nobody caught has died: all jobs end as `FAILED`, pending ones and those to come.
    """

    def __init__(
        self,
        shard: Shard,
        memory: Region,
        submit: Submit,
        cancel: Cancel,
        *,
        cipher: Cipher | None = None,
        bounce_bytes: int = BOUNCE_BYTES,
        threads: int = 2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`memory`'s slots have the shard's size. Raises Misuse: they have not."""
        if memory.slot_bytes != shard.place.slot_bytes:
            raise Misuse(f"slots of {memory.slot_bytes} B in memory, of {shard.place.slot_bytes} B on disk")
        next(extents(memory, np.zeros(1, dtype=np.int64), memory.slot_bytes))
        self.shard, self.memory = shard, memory
        self._sides = Sides(shard, memory, cipher)
        self._submit, self._cancel, self._clock = submit, cancel, clock
        self._lock = threading.Condition()
        self._jobs: dict[int, DiskJob] = {}
        self._work = queue.PriorityQueue[tuple[int, int, Callable[[], None] | None]]()
        self._order = itertools.count()
        self._ids = itertools.count(-1, -1)
        slots = max(1, bounce_bytes // 2 // (memory.slot_bytes + PAGE))
        self._bounces = [Bounce(memory.slot_bytes, slots) for _ in range(2)] if cipher else []
        self._waiting: list[tuple[int, int, DiskJob]] = []
        self._closed = False
        self._dead: str | None = None
        names = [f"kvbm-disk-{i}" for i in range(threads)]
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def write(
        self,
        job: int,
        memory_slots: Slots,
        disk_slots: Slots,
        labels: Labels,
        sums: Words | None,
        deadline_s: float,
        done: Done,
    ) -> None:
        """Write blocks and publish those that are completely there.

        `sums` are the checksums they got when they left the engine; None: made now. From the call on what was in
        `disk_slots` is lost. Outcomes are `DONE` and `FAILED`; with `sync="always"` what is done survives a loss of
        power. Raises Misuse: a job that is pending, or a closed disk; then `done` is not called.
        """
        self._begin(
            DiskWrite(self._sides, job, memory_slots, disk_slots, self._clock() + deadline_s, done, labels, sums)
        )

    def read(
        self,
        job: int,
        disk_slots: Slots,
        memory_slots: Slots,
        keys: Sequence[bytes],
        deadline_s: float,
        done: Done,
        *,
        urgent: bool = True,
    ) -> None:
        """Read the blocks of these keys.

        `DONE`: every byte is what was written. `MISSING`: that slot does not hold that key's block. `CORRUPT`: it held
        it and it is damaged; it is gone now, its slot in `shard.bad_slots()`. Raises as `write`.
        """
        self._begin(
            DiskRead(self._sides, job, memory_slots, disk_slots, self._clock() + deadline_s, done, keys, urgent)
        )

    def cancel(self, jobs: Collection[int]) -> bool:
        """End what has not begun as `FAILED` with "cancelled". True when the jobs' memory is quiet on return."""
        with self._lock:
            found = [self._jobs[job] for job in jobs if job in self._jobs]
            for job in found:
                job.error = job.error or "cancelled"
            moving = [job.moving for job in found if job.moving is not None]
            quiet = not any(job.busy for job in found)
        # A job that is neither in a step nor at the transport does nothing more: its next step sees the error.
        return (not moving or self._cancel(moving)) and quiet

    def pending(self) -> int:
        """Jobs whose `done` has not returned."""
        with self._lock:
            return len(self._jobs)

    def wait(self, jobs: Collection[int], timeout_s: float) -> bool:
        """Block until these jobs are over and their `done` has returned; False if `timeout_s` passes first."""
        with self._lock:
            return self._lock.wait_for(lambda: self._jobs.keys().isdisjoint(jobs), timeout_s)

    def alive(self) -> bool:
        """Whether no thread has died. Else nothing is read or written any more."""
        return self._dead is None and (self._closed or all(thread.is_alive() for thread in self._threads))

    def close(self, timeout_s: float) -> None:
        """Take no more jobs, give the pending ones `timeout_s` seconds, cancel the rest and stop; then close the shard.

        What a transport does not give back in as much time again is left to it and not published.
        """
        with self._lock:
            self._closed = True
            self._lock.wait_for(lambda: not self._jobs, timeout_s)
            rest = list(self._jobs)
        self.cancel(rest)
        if not self.wait(rest, timeout_s):
            logger.warning("disk tier: %d transfers do not end; they are left to themselves", self.pending())
        for _ in self._threads:
            self._work.put((9, next(self._order), None))
        for thread in self._threads:
            thread.join(timeout_s)
        self.shard.close()

    def _begin(self, job: DiskJob) -> None:
        if len(job.memory_slots) != len(job.disk_slots):
            raise Misuse(f"{len(job.disk_slots)} slots on disk, {len(job.memory_slots)} in memory")
        with self._lock:
            if self._closed:
                raise Misuse("this disk is closed")
            if job.number in self._jobs:
                raise Misuse(f"job {job.number} is still pending")
            self._jobs[job.number] = job
            job.error = self._dead
        self._later(job, lambda: self._start(job))

    def _later(self, job: DiskJob, step: Callable[[], None]) -> None:
        self._work.put((job.rank, next(self._order), lambda: self._step(job, step)))

    def _run(self) -> None:
        """A thread's life. What nobody caught stops all jobs, but somebody has to say that they failed."""
        while True:
            try:
                while (step := self._work.get()[2]) is not None:
                    step()
                return
            except BaseException as error:
                if self._die(f"a thread of the disk tier died: {error!r}"):
                    logger.exception("a thread of the disk tier died: nothing is read or written any more")

    def _die(self, why: str) -> bool:
        """Stop all jobs. Whether that is new."""
        with self._lock:
            first, self._dead = self._dead is None, self._dead or why
            jobs = list(self._jobs.values())
            for job in jobs:
                job.error = job.error or why
            moving = [job.moving for job in jobs if job.moving is not None]
            # The others end with the step that they are in, or that comes when they are not moved any more.
            idle = [job for job in jobs if job.moving is None and not job.busy]
        self._cancel(moving)
        for job in idle:
            self._end(job, job.error)
        return first

    def _step(self, job: DiskJob, step: Callable[[], None]) -> None:
        """One step of a job; whatever it raises ends the job, with the blocks it has not done `FAILED`."""
        with self._lock:
            if job.over:
                return
            job.busy += 1
            error = job.error
        try:
            step() if error is None else self._end(job, error)
        except KvbmError as error:
            self._end(job, str(error))
        except Exception as error:
            logger.exception("disk tier: job %d failed", job.number)
            self._end(job, f"{type(error).__name__}: {error}")
        finally:
            with self._lock:
                job.busy -= 1

    def _start(self, job: DiskJob) -> None:
        job.prepare()
        self._next(job)

    def _next(self, job: DiskJob) -> None:
        """Have the job's next blocks moved: all, or as many as fit into a bounce buffer once there is one."""
        with self._lock:
            if len(job.left) and job.deadline <= self._clock():
                job.error = job.error or "deadline"
            over = job.error is not None or not len(job.left)
            if not over and self._sides.cipher and job.bounce is None:
                if not self._bounces:
                    heapq.heappush(self._waiting, (job.rank, next(self._order), job))
                    return
                job.bounce = self._bounces.pop()
        if over:
            self._end(job, job.error)
            return
        count = job.bounce.region.num_slots if job.bounce else len(job.left)
        job.piece, job.left = job.left[:count], job.left[count:]
        plan = job.plan()
        with self._lock:
            # A job's own number where it is one transfer, so that others can follow it.
            job.moving = moving = next(self._ids) if self._sides.cipher else job.number
        try:
            self._submit(moving, plan, job.deadline - self._clock(), lambda _, completion: self._moved(job, completion))
        except BaseException:  # nothing was started
            with self._lock:
                job.moving = None
            raise
        with self._lock:
            cancelled = job.error is not None
        if cancelled:  # in between, when there was nothing to cancel yet
            self._cancel([moving])

    def _moved(self, job: DiskJob, completion: Completion) -> None:
        """On the transport's thread."""
        with self._lock:
            job.moving = None
        self._later(job, lambda: self._take(job, completion))

    def _take(self, job: DiskJob, completion: Completion) -> None:
        job.seconds += completion.seconds
        job.nbytes += completion.nbytes
        job.outcomes[job.piece] = completion.outcomes
        job.why = job.why or completion.error
        # Not even a transport that is wrong about itself may have a block served that it did not move.
        here = job.piece[completion.outcomes == Outcome.DONE]
        job.outcomes[here] = Outcome.FAILED
        job.arrived(here)
        self._next(job)

    def _end(self, job: DiskJob, error: str | None) -> None:
        waiting: DiskJob | None = None
        with self._lock:
            if job.over:
                return
            job.over = True
            if job.bounce is not None:
                self._bounces.append(job.bounce)
                job.bounce = None
                while self._waiting and (waiting is None or waiting.over):
                    waiting = heapq.heappop(self._waiting)[2]
        try:
            if waiting is not None:
                self._later(waiting, lambda: self._next(waiting))
            all_done = bool((job.outcomes == Outcome.DONE).all())
            why = None if all_done else error or job.why or "some blocks are not there or damaged"
            job.done(job.number, Completion(0, job.outcomes, why, job.seconds, job.nbytes), job.sums)
        except Exception:
            logger.exception("disk tier: the completion of job %d was not processed", job.number)
        finally:
            with self._lock:
                del self._jobs[job.number]
                self._lock.notify_all()
