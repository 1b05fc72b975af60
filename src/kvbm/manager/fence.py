"""Copies that nobody waits for any longer: before a step overwrites the engine's blocks that they read, at a reset."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from kvbm.abc.transport import Completion
from kvbm.transfer.executor import Executor

log = logging.getLogger(__name__)

_OVERWRITTEN = "its source may have been overwritten while it ran"


class Fence:
    """Waits at most `patience_s` for copies. `wait` belongs to the engine's worker thread, the rest to any."""

    def __init__(self, executor: Executor, patience_s: float) -> None:
        self._executor, self._patience_s = executor, patience_s
        self._lock = threading.Lock()
        self._condemned: dict[int, str] = {}
        """Nothing counts of these, and why."""

    def wait(self, jobs: Sequence[int]) -> None:
        """What these jobs read may be overwritten from now on. Those that do not end in time are given up; of one that
        may go on reading nothing counts, whatever it says in the end."""
        if not jobs or self._executor.wait(jobs, self._patience_s):
            return
        late = [job for job in jobs if not self._executor.wait([job], 0)]
        with self._lock:  # before they are cancelled: one may end at any moment
            self._condemned = dict.fromkeys(late, _OVERWRITTEN) | self._condemned
        quiet = {job for job in late if self._executor.cancel([job])}
        with self._lock:
            for job in quiet:
                if self._condemned.get(job) == _OVERWRITTEN:  # not what a reset gave up
                    del self._condemned[job]
        log.error(
            "KVBM: copies %s did not end in time and are given up; %d of them may go on, and nothing they copy is used",
            late, len(late) - len(quiet),
        )  # fmt: skip

    def give_up(self, jobs: Sequence[int]) -> None:
        """None of these is to begin any more, and nothing counts of those that have."""
        with self._lock:
            self._condemned |= dict.fromkeys(jobs, "it was given up at a reset")
        self._executor.cancel(jobs)

    def condemned(self, job: int) -> bool:
        """Whether nothing of it will count."""
        with self._lock:
            return job in self._condemned

    def judged(self, job: int, completion: Completion) -> Completion:
        """What is to be believed of a copy that ended."""
        with self._lock:
            if (why := self._condemned.pop(job, None)) is None:
                return completion
        return Completion.failed(completion.ticket, len(completion.outcomes), why)
