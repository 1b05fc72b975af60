"""Host to host copies on threads of our own.

A chunk cannot be a Python call: beside a busy Python thread each call would wait up to 5 ms to get the GIL back, ten
times what the copy takes. So a thread enters the C helper with the whole plan; in there chunks are taken off a shared
counter (several threads can join one plan), and a flag makes everybody leave after the chunk at hand.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np

from kvbm.abc.transport import Completion, Plan, Quiet, Transport
from kvbm.core.errors import Misuse
from kvbm.core.outcome import Outcome
from kvbm.core.region import Region, Slots
from kvbm.native import copy_rows
from kvbm.transfer.plan import Rows, checked_slots, chunk_blocks, coalesce

logger = logging.getLogger(__name__)

CHUNK_BYTES: Final = 4 << 20
"""Bytes that are copied without looking up: half a millisecond, the longest a cancel or an urgent plan waits."""


@dataclass(slots=True, eq=False)
class _Job:
    """One plan. Everything but the counter in `control` is written under the transport's lock."""

    ticket: int
    plan: Plan
    done: Callable[[Completion], None]
    rows: Rows
    source: Slots
    destination: Slots
    control: Slots = field(default_factory=lambda: np.zeros(2, dtype=np.int64))
    running: int = 0
    error: str | None = None
    started: float = 0.0
    ended: float = 0.0

    @property
    def begun(self) -> int:
        """Blocks that some thread has taken; all of them are copied once `running` is 0."""
        return min(int(self.control[0]), len(self.source))

    @property
    def chunk(self) -> int:
        return chunk_blocks(self.plan.source.slot_bytes, CHUNK_BYTES)

    @property
    def open(self) -> bool:
        """Whether a thread could still take a chunk."""
        return self.error is None and self.begun < len(self.source)

    def copy(self) -> None:
        """Copy chunks until none is left or somebody stops this job; several threads may be in here."""
        rows = self.rows
        copy_rows(
            rows.source_address,
            rows.source_stride,
            rows.destination_address,
            rows.destination_stride,
            rows.row_bytes,
            self.source,
            self.destination,
            self.control,
            self.chunk,
        )

    def report(self) -> None:
        """Tell the submitter."""
        outcomes = np.full(len(self.source), Outcome.FAILED, dtype=np.uint8)
        outcomes[: self.begun] = Outcome.DONE
        error = self.error if self.begun < len(self.source) else None
        nbytes = self.begun * self.plan.source.slot_bytes
        self.done(Completion(self.ticket, outcomes, error, self.ended - self.started, nbytes))


class MemcpyTransport(Transport):
    """Copies between host regions on `threads` daemon threads.

    Urgent plans go first, on as many threads as they have chunks for; the others on one thread at a time, so that they
    leave memory bandwidth to the engine's forward pass. Within each of the two lanes plans start in order. `cancel`
    waits for the chunks at hand, so it is always `QUIESCED`.
    """

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"a memcpy transport needs at least one thread, not {threads}")
        lock = threading.Lock()
        self._work = threading.Condition(lock)
        self._quiet = threading.Condition(lock)
        self._urgent: deque[_Job] = deque()
        self._background: deque[_Job] = deque()
        self._over: deque[_Job] = deque()
        self._jobs: dict[int, _Job] = {}
        self._tickets = 0
        self._closed = False
        self._dead: str | None = None
        self._threads = [threading.Thread(target=self._run, name=f"kvbm-copy-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def reaches(self, source: Region, destination: Region) -> bool:
        return source.kind == destination.kind == "host" and source.fits(destination)

    def submit(self, plan: Plan, done: Callable[[Completion], None]) -> int:
        if not plan.source.kind == plan.destination.kind == "host":
            raise Misuse(f"memcpy does not reach from {plan.source.kind!r} to {plan.destination.kind!r}")
        slots = checked_slots(plan)
        rows = coalesce(plan.source, plan.destination)
        with self._work:
            if self._closed:
                raise Misuse("this transport is closed")
            self._tickets += 1
            job = _Job(self._tickets, plan, done, rows, *slots)
            self._jobs[job.ticket] = job
            job.error = self._dead
            if not job.open:
                self._end(job)
            elif plan.urgent:
                self._urgent.append(job)
                if self._background:
                    self._background[0].control[1] = 1  # its thread leaves, helps, and resumes it where it left off
                self._work.notify(-(-len(job.source) // job.chunk))
            else:
                self._background.append(job)
                self._work.notify()
            return job.ticket

    def cancel(self, ticket: int) -> Quiet:
        with self._quiet:
            job = self._jobs.get(ticket)
            if job is not None:
                self._fail(job, "cancelled")
                self._quiet.wait_for(lambda: not job.running)
        return Quiet.QUIESCED

    def alive(self) -> bool:
        return not self._closed and self._dead is None and all(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        with self._work:
            self._closed = True
            self._fail_all("the transport was closed")
            self._work.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        """A thread's life. An unexpected exception stops all copying, but somebody has to say that plans failed."""
        try:
            # An engine pins its worker's main thread to one core, and threads inherit that.
            os.sched_setaffinity(0, range(os.cpu_count() or 1))
        except OSError as error:
            logger.warning("copy threads keep the CPU affinity they inherited: %s", error)
        while True:
            try:
                return self._serve()
            except BaseException as error:
                logger.exception("a copy thread died: copies between host regions have stopped")
                with self._work:
                    self._dead = self._dead or f"a copy thread died: {error!r}"
                    self._fail_all(self._dead)

    def _serve(self) -> None:
        while True:
            with self._work:
                while (work := self._next()) is None:
                    if self._closed:
                        return
                    self._work.wait()
            work()

    def _next(self) -> Callable[[], None] | None:
        """What a free thread does next, in order of urgency. Lock held."""
        if self._over:
            return self._over.popleft().report
        while self._urgent and not self._urgent[0].open:
            self._urgent.popleft()
        while self._background and not self._background[0].open and not self._background[0].running:
            self._background.popleft()
        if self._urgent:
            job = self._urgent[0]
        elif self._background and not self._background[0].running:
            job = self._background[0]
            job.control[1] = 0
        else:
            return None
        job.running += 1
        job.started = job.started or time.perf_counter()
        return partial(self._copy, job)

    def _copy(self, job: _Job) -> None:
        try:
            job.copy()
        finally:
            with self._work:
                job.running -= 1
                job.ended = time.perf_counter()
                if not job.open:
                    self._end(job)
                if not job.running:
                    self._quiet.notify_all()

    def _fail_all(self, reason: str) -> None:
        for job in list(self._jobs.values()):
            self._fail(job, reason)

    def _fail(self, job: _Job, reason: str) -> None:
        """Let no thread begin another chunk of this job. Lock held."""
        job.error = job.error or reason
        job.control[1] = 1
        self._end(job)

    def _end(self, job: _Job) -> None:
        """Have the job reported, once, if no thread is in it any more. Lock held."""
        if not job.running and job.ticket in self._jobs:
            del self._jobs[job.ticket]
            self._over.append(job)
            self._work.notify()
