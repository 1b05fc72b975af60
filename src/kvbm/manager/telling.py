"""What a worker says about its copies, and how they all end when something of KVBM raised.

The half of the worker (`manager/worker.py`) that any thread may call.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import numpy as np

from kvbm.abc.transport import Completion
from kvbm.core.config import Settings
from kvbm.core.errors import Broken
from kvbm.core.region import Slots
from kvbm.manager.channel import Link
from kvbm.manager.wire import Message, Result, Sick
from kvbm.transfer.executor import Executor

log = logging.getLogger(__name__)


class Telling:
    """See `Worker`. `sums_for_leader`: the leader hears the checksums of what was written to host memory."""

    def __init__(self, settings: Settings, rank: int, executor: Executor, *, sums_for_leader: bool) -> None:
        self._settings, self._rank, self._executor = settings, rank, executor
        self._sums_for_leader = sums_for_leader
        self._sums = np.zeros(0, np.uint64)
        """Of each host slot, the checksum of what left the engine, where somebody asks for it later."""
        self._link: Link | None = None
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
