"""Threads that may hang in a call, and what becomes of their work.

A mounted file system can keep a thread for ever, and no process ends while an ordinary pool of threads waits. So these
are daemon threads, each job has a deadline, and a thread whose job is overdue is written off: another takes its place,
and its memory stays where it is until the call returns.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

Hands = TypeVar("Hands")
_BEGINS, _RUNS, _COMMITS, _ENDED = range(4)


class Job(Generic[Hands]):
    """Something to do before `due`, by `time.monotonic`. `number` names it for `cancel`; `run` does it;
    `failed` is called instead of its end where it is given up, with the reason. One of both ends it, once."""

    def __init__(
        self,
        run: Callable[[Job[Hands], Hands], None],
        failed: Callable[[str], None],
        due: float = math.inf,
        number: int = 0,
    ) -> None:
        self.number, self.due = number, due
        self._run, self._failed = run, failed
        self._lock, self._state = threading.Lock(), _BEGINS

    def _step(self, *before: int, to: int) -> bool:
        with self._lock:
            if self._state not in before:
                return False
            self._state = to
            return True

    @property
    def over(self) -> bool:
        """Whether nobody wants its result any more."""
        return self._state == _ENDED

    def commit(self) -> bool:
        """From now on it is not given up, and ends or releases soon: it touches what others may have once it is given
        up. False: it was."""
        return self._step(_RUNS, to=_COMMITS)

    def release(self) -> None:
        """It may be given up again."""
        self._step(_COMMITS, to=_RUNS)

    @property
    def committed(self) -> bool:
        """Whether it may not be given up now."""
        return self._state == _COMMITS

    def end(self) -> bool:
        """It ends. False: it has."""
        return self._step(_RUNS, _COMMITS, to=_ENDED)

    def give_up(self, why: str) -> bool:
        """Nobody waits for it any more. False: it has ended, or is about to."""
        if not self._step(_BEGINS, _RUNS, to=_ENDED):
            return False
        self._failed(why)
        return True

    def work(self, hands: Hands) -> None:
        """On a thread."""
        if self._step(_BEGINS, to=_RUNS):
            try:
                self._run(self, hands)
            except BaseException as error:  # a panic of a library in Rust is no Exception
                log.exception("KVBM: a job of shared storage went wrong")
                if self.end():
                    self._failed(f"{type(error).__name__}: {error}")


class _Thread(Generic[Hands]):
    """One of a crew. `job` is what it does now; once it is `lost` it takes no other."""

    def __init__(self, hands: Hands) -> None:
        self.hands = hands
        self.job: Job[Hands] | None = None
        self.lost = False


class Crew(Generic[Hands]):
    """`size` threads, each with `hands` of its own (buffers, say). More than `most_lost` that were written off and have
    not come back, and `broken` is called, once."""

    def __init__(
        self, name: str, size: int, hands: Callable[[], Hands], *, most_lost: int, broken: Callable[[str], None]
    ) -> None:
        self._name, self._size, self._hands, self._most_lost, self._broken = name, size, hands, most_lost, broken
        self._wake = threading.Condition()
        self._queue: deque[Job[Hands]] = deque()
        self._hired: set[_Thread[Hands]] = set()
        self._idle = 0
        self._told = self._closed = False

    @property
    def lost(self) -> int:
        """Threads that were written off and have not come back."""
        return sum(each.lost for each in tuple(self._hired))

    @property
    def waiting(self) -> int:
        """Jobs that no thread has begun."""
        return len(self._queue)

    @property
    def busy(self) -> bool:
        """Whether anything is to be done or is being done that somebody waits for."""
        with self._wake:
            return bool(self._queue) or any(each.job is not None and not each.lost for each in self._hired)

    def do(self, job: Job[Hands]) -> None:
        """Behind what it was given before."""
        with self._wake:
            closed = self._closed
            if not closed:
                self._queue.append(job)
                self._start()
                self._wake.notify()
        if closed:
            job.give_up("it is being closed")

    def _start(self) -> None:
        """Another thread, if there may be one and none is idle. Under the lock."""
        working = sum(not each.lost for each in self._hired)
        if len(self._queue) > self._idle and working < self._size and self.lost <= self._most_lost:
            each = _Thread(self._hands())
            self._hired.add(each)
            threading.Thread(target=self._work, args=(each,), name=self._name, daemon=True).start()

    def _work(self, me: _Thread[Hands]) -> None:
        while True:
            with self._wake:
                self._idle += 1
                while not self._queue and not self._closed:
                    self._wake.wait()
                self._idle -= 1
                if not self._queue:
                    self._hired.discard(me)
                    return
                me.job = job = self._queue.popleft()
            job.work(me.hands)
            with self._wake:
                me.job = None
                if me.lost:
                    self._hired.discard(me)
                    return

    def cancel(self, numbers: Collection[int]) -> None:
        """Nobody wants these any more. One that waits for a call ends when the call returns, or late."""
        with self._wake:
            these = [job for job in self._queue if job.number in numbers]
            for job in these:
                self._queue.remove(job)
        for job in these:
            job.give_up("cancelled")

    def expire(self) -> None:
        """Give up what is overdue. To be called every now and then."""
        now = time.monotonic()
        with self._wake:
            late = [job for job in self._queue if job.due < now]
            for job in late:
                self._queue.remove(job)
            hanging = [each for each in self._hired if each.job is not None and each.job.due < now and not each.lost]
        for job in late:
            job.give_up("it was not begun within its deadline")
        for each in hanging:
            if (running := each.job) is not None and (running.give_up("no answer within its deadline") or running.over):
                with self._wake:
                    if each.job is running:
                        each.lost = True
                        self._start()
        if self.lost > self._most_lost and not self._told:
            self._told = True
            self._broken(f"{self.lost} calls to the storage do not return")

    def close(self, seconds: float) -> None:
        """Begin nothing more, and wait so long at most for what runs."""
        with self._wake:
            self._closed = True
            queued = list(self._queue)
            self._queue.clear()
            self._wake.notify_all()
        for job in queued:
            job.give_up("it is being closed")
        end = time.monotonic() + seconds
        while self.busy and time.monotonic() < end:
            time.sleep(0.005)
        for each in tuple(self._hired):
            while (running := each.job) is not None and not running.give_up("it is being closed") and running.committed:
                time.sleep(0.001)
