"""Queues, deadlines, cancel and fences for copies, once, over whatever transports there are."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from kvbm.abc.transport import Completion, Plan, Quiet, Transport
from kvbm.core.errors import Misuse
from kvbm.core.region import Region

logger = logging.getLogger(__name__)

NO_TICKET: Final = 0
"""The ticket in the completion of a job that no transport took."""


@dataclass(slots=True, eq=False)
class _Job:
    done: Callable[[int, Completion], None]
    deadline: float
    transport: Transport
    ticket: int | None = None
    expired: bool = False


class Executor:
    """Runs jobs on the first living transport that reaches their pair of regions.

    Threads: every method may be called from any thread; `wait` and `close` not from inside a `done`. `done(job_id,
    completion)` runs on a transport's thread (on the submitter's if no transport takes the job), without a lock held.
    """

    def __init__(self, transports: Sequence[Transport], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._transports = tuple(transports)
        self._clock = clock
        self._changed = threading.Condition()
        self._jobs: dict[int, _Job] = {}
        self._closed = False

    def submit(self, job_id: int, plan: Plan, deadline_s: float, done: Callable[[int, Completion], None]) -> None:
        """Start a copy that may take `deadline_s` seconds from now; `done` is called exactly once.

        A pair that no living transport reaches ends `FAILED` at once. A `done` that raises is logged.

        Raises:
            Misuse: a plan no transport may touch (see `Transport.submit`), an id that is still pending, or a closed
                executor. Nothing was started and `done` is not called.
        """
        transport = self._transport(plan.source, plan.destination)
        job = _Job(done, self._clock() + deadline_s, transport) if isinstance(transport, Transport) else None
        try:
            with self._changed:
                if self._closed:
                    raise Misuse("this executor is closed")
                if job_id in self._jobs:
                    raise Misuse(f"job {job_id} is still pending")
                if job is not None:
                    self._jobs[job_id] = job
            if job is None:
                self._call(done, job_id, Completion.failed(NO_TICKET, len(plan.destination_slots), str(transport)))
                return
            ticket = job.transport.submit(plan, partial(self._finish, job_id, job))
        except BaseException:  # until a transport has the job, nobody may wait for it
            with self._changed:
                if job is not None and self._jobs.get(job_id) is job:
                    del self._jobs[job_id]
                    self._changed.notify_all()
            raise
        with self._changed:
            job.ticket = ticket

    def wait(self, job_ids: Collection[int], timeout_s: float) -> bool:
        """Block until these jobs are over and their `done` has returned; False if `timeout_s` passes first.

        Ids that are unknown or over count as complete: a fence names copies without knowing how far they are.
        """
        with self._changed:
            return self._changed.wait_for(lambda: self._jobs.keys().isdisjoint(job_ids), timeout_s)

    def pending(self) -> int:
        """Jobs whose `done` has not returned."""
        with self._changed:
            return len(self._jobs)

    def expire(self) -> None:
        """Cancel the jobs whose deadline has passed; what they did not copy ends `FAILED` with "deadline".

        To be called every now and then. A job whose transport cannot say that it is quiet stays pending until it is.
        """
        now = self._clock()
        with self._changed:
            late = [j for j in self._jobs.values() if j.deadline <= now and j.ticket is not None and not j.expired]
            for job in late:
                job.expired = True
        for job in late:
            if job.ticket is not None and job.transport.cancel(job.ticket) is Quiet.UNCERTAIN:
                logger.warning("a copy is past its deadline and may still be running: its memory stays held")

    def cancel(self, job_ids: Collection[int]) -> bool:
        """Give these jobs up: what has not been copied ends `FAILED`. True when their memory is quiet on return.

        A job that another thread is just submitting has nothing to cancel yet, so the answer is False.
        """
        with self._changed:
            jobs = [self._jobs[i] for i in job_ids if i in self._jobs]
        quiet = [job.ticket is not None and job.transport.cancel(job.ticket) is Quiet.QUIESCED for job in jobs]
        return all(quiet)

    def alive(self) -> bool:
        """Whether every transport is."""
        return all(transport.alive() for transport in self._transports)

    def lost(self, source: Region, destination: Region) -> bool:
        """Whether all transports that reach from one to the other have died."""
        reaching = [transport for transport in self._transports if transport.reaches(source, destination)]
        return bool(reaching) and not any(transport.alive() for transport in reaching)

    def close(self, timeout: float) -> None:
        """Take no more jobs, give the pending ones `timeout` seconds, then close the transports: the rest fails."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._jobs, timeout)
        for transport in self._transports:
            transport.close()

    def _transport(self, source: Region, destination: Region) -> Transport | str:
        """The transport to use, or why there is none."""
        reaching = [transport for transport in self._transports if transport.reaches(source, destination)]
        pair = f"from {source.kind} region {source.name!r} to {destination.kind} region {destination.name!r}"
        if not reaching:
            return f"no transport copies {pair}"
        return next((t for t in reaching if t.alive()), f"the transports that copy {pair} have died")

    def _finish(self, job_id: int, job: _Job, completion: Completion) -> None:
        if job.expired and completion.error is not None:
            completion = replace(completion, error="deadline")
        self._call(job.done, job_id, completion)
        with self._changed:
            if self._jobs.get(job_id) is job:  # its submission may have been interrupted
                del self._jobs[job_id]
            self._changed.notify_all()

    @staticmethod
    def _call(done: Callable[[int, Completion], None], job_id: int, completion: Completion) -> None:
        try:
            done(job_id, completion)
        except Exception:
            logger.exception("the completion of job %d was not processed", job_id)
