"""What transports with threads of their own share: jobs in two lanes, cancel, reports, and what a dead thread means.

A thread takes a job and is in C with it, without the GIL, until nothing is left to take or the job's flag is set.
Several threads can be in one job: its parts come off a shared counter.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt

from kvbm.abc.transport import Completion, Plan, Quiet, Transport
from kvbm.core import cpus
from kvbm.core.errors import Misuse
from kvbm.core.outcome import Outcome
from kvbm.core.region import Slots

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class LaneJob:
    """One plan. Everything but the counter in `control` is written under the transport's lock.

    A kind of job moves the next `step` of its `parts` at a time, and says in `moved` which blocks it has moved.
    """

    plan: Plan
    done: Callable[[Completion], None]
    ticket: int = 0
    control: Slots = field(default_factory=lambda: np.zeros(2, dtype=np.int64))
    running: int = 0
    error: str | None = None
    lost: bool = False
    """A thread died in it: what it moved is not known."""
    started: float = 0.0
    ended: float = 0.0

    parts: int = 0
    step: int = 1
    sums: npt.NDArray[np.uint64] | None = None
    """Checksums of the blocks, where this kind of job makes some."""

    @property
    def begun(self) -> int:
        """Parts that some thread has taken; all of them have ended once `running` is 0."""
        return min(int(self.control[0]), self.parts)

    @property
    def open(self) -> bool:
        """Whether a thread could still take a part."""
        return self.error is None and self.begun < self.parts

    def acquire(self) -> str | None:
        """Called once, under the lock, before the job is queued: take what it needs, or say why it has to fail."""
        return None

    def release(self) -> None:
        """Called once after `acquire`, when no thread is in the job any more."""

    @abstractmethod
    def move(self, thread: int) -> None:
        """Move parts until none is left or somebody stops this job; several threads may be in here."""

    @abstractmethod
    def moved(self) -> tuple[npt.NDArray[np.bool_], str | None]:
        """Which blocks have been moved, and what went wrong with others, if something did. No thread is in `move`."""

    def report(self) -> None:
        """Tell the submitter."""
        moved, problem = self.moved()
        moved &= not self.lost
        self.release()
        outcomes = np.where(moved, np.uint8(Outcome.DONE), np.uint8(Outcome.FAILED))
        error = None if moved.all() else problem or self.error
        nbytes = int(moved.sum()) * self.plan.source.slot_bytes
        self.done(Completion(self.ticket, outcomes, error, self.ended - self.started, nbytes, self.sums))


class LaneTransport(Transport):
    """Runs jobs on `threads` daemon threads.

    Urgent plans go before the others, which at most `background` threads work on and leave when urgent ones come.
    Within each of the two lanes plans start in order. If `spread`, a free thread begins the next plan before it helps
    with one that another is in; otherwise it helps, so that plans end in order. `cancel` waits `patience_s` (None: as
    long as it takes) for the parts at hand. `close` waits `close_s` for them (None: as long as it takes), then sets
    their flag to 2: a lane that can leave what is out of its hands leaves it. It waits as long for that, and no longer.
    """

    close_s: ClassVar[float | None] = None

    def __init__(
        self, name: str, threads: int, *, background: int, spread: bool = False, patience_s: float | None = None
    ) -> None:
        if threads < 1:
            raise ValueError(f"a {name} transport needs at least one thread, not {threads}")
        lock = threading.Lock()
        self._work = threading.Condition(lock)
        self._quiet = threading.Condition(lock)
        self._name, self._background_threads, self._spread = name, background, spread
        self._patience_s: Final = patience_s
        self._urgent: deque[LaneJob] = deque()
        self._background: deque[LaneJob] = deque()
        self._in_background = 0
        self._over: deque[LaneJob] = deque()
        self._jobs: dict[int, LaneJob] = {}
        self._tickets = 0
        self._closed = False
        self._dead: str | None = None
        self._threads = [
            threading.Thread(target=self._run, args=(i,), name=f"kvbm-{name}-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @abstractmethod
    def _job(self, plan: Plan, done: Callable[[Completion], None]) -> LaneJob:
        """The plan made ready, or `Misuse`. Nothing is touched and nothing kept."""

    def submit(self, plan: Plan, done: Callable[[Completion], None]) -> int:
        job = self._job(plan, done)
        with self._work:
            if self._closed:
                raise Misuse("this transport is closed")
            self._tickets += 1
            job.ticket = self._tickets
            self._jobs[job.ticket] = job
            acquired = job.acquire()
            job.error = self._dead or acquired
            if not job.open:
                self._end(job)
            elif plan.urgent:
                self._urgent.append(job)
                for other in self._background:
                    if other.running:
                        other.control[1] = 1  # its threads leave, help, and resume it where they left off
                self._work.notify(-(-job.parts // job.step))
            else:
                self._background.append(job)
                self._work.notify(min(-(-job.parts // job.step), self._background_threads))
            return job.ticket

    def cancel(self, ticket: int) -> Quiet:
        with self._quiet:
            job = self._jobs.get(ticket)
            if job is not None:
                self._fail(job, "cancelled")
                if not self._quiet.wait_for(lambda: not job.running, self._patience_s):
                    return Quiet.UNCERTAIN
        return Quiet.QUIESCED

    def alive(self) -> bool:
        return not self._closed and self._dead is None and all(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        with self._work:
            self._closed = True
            self._fail_all("the transport was closed")
            self._work.notify_all()
        for thread in self._threads:
            thread.join(self.close_s)
        with self._work:
            for job in self._jobs.values():
                job.control[1] = 2
        for thread in self._threads:
            thread.join(self.close_s)

    def _run(self, thread: int) -> None:
        """A thread's life. An unexpected exception stops all copying, but somebody has to say that plans failed."""
        cpus.spread(threading.current_thread().name)
        while True:
            try:
                return self._serve(thread)
            except BaseException as error:
                self._die(error)
                logger.exception("a %s thread died: this transport copies no more", self._name)

    def _serve(self, thread: int) -> None:
        while True:
            with self._work:
                while (work := self._next(thread)) is None:
                    if self._closed:
                        return
                    self._work.wait()
            work()

    def _next(self, thread: int) -> Callable[[], None] | None:
        """What a free thread does next, in order of urgency. Lock held."""
        if self._over:
            return self._over.popleft().report
        if (job := self._choose(self._urgent)) is None:
            if self._in_background >= self._background_threads or (job := self._choose(self._background)) is None:
                return None
            self._in_background += 1
            job.control[1] = 0
        job.running += 1
        job.started = job.started or time.perf_counter()
        return partial(self._move, job, thread)

    def _choose(self, lane: deque[LaneJob]) -> LaneJob | None:
        while lane and not lane[0].open and not lane[0].running:
            lane.popleft()
        jobs = (job for job in lane if job.open)
        if not self._spread:
            return next(jobs, None)
        first = next(jobs, None)
        if first is None or not first.running:
            return first
        return next((job for job in jobs if not job.running), first)

    def _move(self, job: LaneJob, thread: int) -> None:
        try:
            job.move(thread)
        except BaseException as error:
            job.lost = True
            self._die(error)  # before the job is reported
            raise
        finally:
            with self._work:
                job.running -= 1
                self._in_background -= not job.plan.urgent
                job.ended = time.perf_counter()
                if not job.open:
                    self._end(job)
                if not job.running:
                    self._quiet.notify_all()

    def _die(self, error: BaseException) -> None:
        with self._work:
            self._dead = self._dead or f"a {self._name} thread died: {error!r}"
            self._fail_all(self._dead)

    def _fail_all(self, reason: str) -> None:
        for job in list(self._jobs.values()):
            self._fail(job, reason)

    def _fail(self, job: LaneJob, reason: str) -> None:
        """Let no thread take another part of this job. Lock held."""
        job.error = job.error or reason
        job.control[1] = 1
        self._end(job)

    def _end(self, job: LaneJob) -> None:
        """Have the job reported, once, if no thread is in it any more. Lock held."""
        if not job.running and job.ticket in self._jobs:
            del self._jobs[job.ticket]
            self._over.append(job)
            self._work.notify()
