"""What the leader wants of a rank's files, done: in the order in which it was asked for, waiting for nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import numpy as np

from kvbm.abc.transport import Completion
from kvbm.core.errors import Broken, Misuse
from kvbm.core.region import Slots
from kvbm.link.messages import Forget, Generation, Probe, Probed, Read, Sick, Write, unpack
from kvbm.stores.checksum import Words
from kvbm.stores.disk.disk import Disk
from kvbm.stores.disk.format import Labels

log = logging.getLogger(__name__)


class DiskWorker:
    """Of one rank. `sums` has the checksum of each slot of host memory. A write that ended is told to `report`, a read
    to `read` with its slots and their checksums, the answer to a probe to `tell`, as is that nothing can be copied any
    more (`lost`): once, before what fails of it. From threads of the transport, or its own. `safely` calls `report` and
    `read`, which may raise anything."""

    def __init__(
        self,
        disk: Disk,
        rank: int,
        sums: Words,
        deadline_s: float,
        *,
        report: Callable[[int, Completion], None],
        read: Callable[[Slots, int, Completion, Words], None],
        tell: Callable[[Probed | Sick], None],
        lost: Callable[[], bool],
        safely: Callable[[int, Completion, Callable[[], None]], None],
    ) -> None:
        self.disk, self._rank, self._sums, self._deadline_s = disk, rank, sums, deadline_s
        self._report, self._read, self._tell, self._lost, self._safely = report, read, tell, lost, safely
        self._looking, self._told = threading.Lock(), False
        self.chores = ThreadPoolExecutor(1, "kvbm-chores")
        """For what may wait for the disk and is no transfer, in order."""
        self._last_chore: Future[None] | None = None

    def take(self, message: Write | Read | Forget | Generation | Probe) -> None:
        """Do this. Returns at once."""
        match message:
            case Write() if self._last_chore is not None and not self._last_chore.done():
                # Behind the beginning of its generation, and before it nothing of its slots is forgotten any more.
                self._chore(self._write, message)
            case Write():
                self._write(message)
            case Read():
                g2 = unpack(message.g2)
                ended = partial(self._read_ended, g2)
                try:
                    self.disk.read(message.job, unpack(message.g3), g2, message.keys, self._deadline_s, ended)
                except Misuse as error:  # it is being closed
                    ended(
                        message.job, Completion.failed(message.job, len(g2), str(error)), np.zeros(len(g2), np.uint64)
                    )
            case Forget():
                self._chore(self._forget, unpack(message.g3), message.keys)
            case Generation():
                self._chore(self.disk.shard.clear, message.number)
            case Probe():
                self._chore(self._probe, message)

    def look(self) -> None:
        """Whether anything can still be copied. Any thread."""
        with self._looking:
            if not self._told and self._lost():
                self._told = True
                self._tell(Sick(self._rank, "a thread that copies to and from disk died", "g3"))

    def cancel(self, jobs: list[int]) -> None:
        """Nobody wants these any more."""
        self.disk.cancel(jobs)

    def close(self, seconds: float) -> None:
        """Wait so long at most for what is on its way, and do nothing more."""
        self.disk.close(seconds)
        self.chores.shutdown(wait=False, cancel_futures=True)

    def _chore(self, call: Callable[..., None], *args: object) -> None:
        with suppress(RuntimeError):  # closed: nobody waits for it any more
            self._last_chore = self.chores.submit(call, *args)

    def _write(self, message: Write) -> None:
        g2 = unpack(message.g2)
        labels = Labels(
            keys=message.keys,
            parents=[parent or b"" for parent in message.parents],
            priorities=np.frombuffer(message.priorities, np.int32),
            expires=np.frombuffer(message.expires, np.float64),
            sequence=message.sequence,
            generation=message.generation,
        )
        try:
            self.disk.write(
                message.job, g2, unpack(message.g3), labels, self._sums[g2], self._deadline_s,
                lambda job, completion, _: self._write_ended(job, completion),
            )  # fmt: skip
        except Misuse as error:  # it is being closed
            self._report(message.job, Completion.failed(message.job, len(g2), str(error)))

    def _write_ended(self, job: int, completion: Completion) -> None:
        if completion.error is not None:
            self.look()
        self._safely(job, completion, lambda: self._report(job, completion))

    def _read_ended(self, g2: Slots, job: int, completion: Completion, sums: Words) -> None:
        if completion.error is not None:
            self.look()
        self._safely(job, completion, lambda: self._read(g2, job, completion, sums))

    def _forget(self, slots: Slots, keys: list[bytes]) -> None:
        """Slots that hold another block by now are left alone."""
        try:
            same, _ = self.disk.shard.expect(slots, keys)
            self.disk.shard.forget(slots[same])
        except Broken as error:
            log.warning("KVBM: rank %d: %s", self._rank, error)

    def _probe(self, probe: Probe) -> None:
        problem = None
        try:
            if probe.reopen:
                self.disk.shard.reopen()
            self.disk.shard.probe()
        except Broken as error:
            problem = str(error)
        self._tell(Probed(self._rank, problem, probe.number))
