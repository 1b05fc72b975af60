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
    """Waits for copies, for `patience_s` at most: the engine stands still meanwhile, and what is given up costs no more
    than its next hit. In ten milliseconds host memory copies some 50 MB, so that of a copy that runs little is lost.
    `wait` belongs to the engine's worker thread, `judged` to any."""

    def __init__(self, executor: Executor, patience_s: float) -> None:
        self._executor, self._patience_s = executor, patience_s
        self._lock = threading.Lock()
        self._condemned: dict[int, str] = {}
        """Nothing counts of these, and why."""

    def wait(self, jobs: Sequence[int]) -> None:
        """What these jobs read may be overwritten from now on. Those that do not end in time are given up, but for what
        they have copied; of one that may go on reading nothing counts, whatever it says in the end."""
        if not jobs or self._executor.wait(jobs, self._patience_s):
            return
        late = [job for job in jobs if not self._executor.wait([job], 0)]
        reading = [job for job in late if not self._executor.cancel([job])]
        if reading:
            with self._lock:  # not before: what ended by now has read nothing but what was there
                self._condemned = dict.fromkeys(reading, _OVERWRITTEN) | self._condemned
            log.error("KVBM gave up copies %s, which may still run; it uses nothing that they copy", reading)
        else:
            log.debug("KVBM: a step needs what copies %s had not copied yet: they were given up", late)

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
