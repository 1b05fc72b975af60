"""What the leader wants of a rank's files, done: in the order in which it was asked for, waiting for nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import numpy as np

from kvbm.abc.transport import Completion
from kvbm.core.errors import Broken, Misuse
from kvbm.core.region import Slots
from kvbm.link.messages import Sick, unpack
from kvbm.stores.checksum import Words
from kvbm.stores.disk.disk import Disk
from kvbm.stores.disk.format import Labels
from kvbm.stores.disk.meta import DiskPlace
from kvbm.tiers.disk.orders import (
    TIER,
    Forget,
    Generation,
    Probe,
    Probed,
    Read,
    Write,
    decode_order,
    decode_place,
    to_leader,
)
from kvbm.tiers.tier import RankSide

log = logging.getLogger(__name__)

OpenDisk = Callable[[DiskPlace, RankSide], Disk]
"""Opens a rank's file; raises Broken."""


class DiskRank:
    """Of one rank. That nothing can be copied any more is told before what fails of it."""

    def __init__(self, side: RankSide, open_disk: OpenDisk, deadline_s: float) -> None:
        self._side, self._open_disk, self._deadline_s = side, open_disk, deadline_s
        self._opened: Disk | None = None
        self._looking, self._told = threading.Lock(), False
        self.chores = ThreadPoolExecutor(1, "kvbm-chores")
        """For what may wait for the disk and is no transfer, in order."""
        self._last_chore: Future[None] | None = None

    def open(self, body: bytes) -> None:
        self._opened = self._open_disk(decode_place(body), self._side)

    def ready(self) -> None:
        """Its memory need not be there before it is used."""

    @property
    def disk(self) -> Disk:
        """Its files, once they are open."""
        assert self._opened is not None, "the leader uses a disk tier that this rank does not have"
        return self._opened

    def take(self, body: bytes) -> None:
        disk = self.disk  # before anything of it is promised
        match message := decode_order(body):
            case Write() if self._last_chore is not None and not self._last_chore.done():
                # Behind the beginning of its generation, and before it nothing of its slots is forgotten any more.
                self._chore(self._write, message)
            case Write():
                self._write(message)
            case Read():
                self._side.reads(message.job)
                g2 = unpack(message.g2)
                ended = partial(self._read_ended, g2)
                try:
                    disk.read(message.job, unpack(message.g3), g2, message.keys, self._deadline_s, ended)
                except Misuse as error:  # it is being closed
                    ended(
                        message.job, Completion.failed(message.job, len(g2), str(error)), np.zeros(len(g2), np.uint64)
                    )
            case Forget():
                self._chore(self._forget, unpack(message.g3), message.keys)
            case Generation():
                self._chore(disk.shard.clear, message.number)
            case Probe():
                self._chore(self._probe, message)

    def look(self) -> None:
        copies, disk = self._side.executor, self._opened
        if disk is None or (copies.alive() and disk.alive()):
            return
        with self._looking:
            lost = not disk.alive() or copies.lost(disk.shard.region, disk.memory)
            if lost and not self._told:
                self._told = True
                self._side.tell(Sick(self._side.rank, "a thread that copies to and from disk died", TIER))

    def cancel(self, jobs: Collection[int]) -> None:
        if self._opened is not None:
            self._opened.cancel(jobs)

    def expire(self) -> None:
        """The rank's own copies end late ones."""

    def close(self, seconds: float) -> None:
        if self._opened is not None:
            self._opened.close(seconds)
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
                message.job, g2, unpack(message.g3), labels, self._side.sums[g2], self._deadline_s,
                lambda job, completion, _: self._write_ended(job, completion),
            )  # fmt: skip
        except Misuse as error:  # it is being closed
            self._side.written(message.job, Completion.failed(message.job, len(g2), str(error)))

    def _write_ended(self, job: int, completion: Completion) -> None:
        if completion.error is not None:
            self.look()
        self._side.written(job, completion)

    def _read_ended(self, g2: Slots, job: int, completion: Completion, sums: Words) -> None:
        if completion.error is not None:
            self.look()
        self._side.read(g2, job, completion, sums)

    def _forget(self, slots: Slots, keys: list[bytes]) -> None:
        """Slots that hold another block by now are left alone."""
        try:
            same, _ = self.disk.shard.expect(slots, keys)
            self.disk.shard.forget(slots[same])
        except Broken as error:
            log.warning("KVBM: rank %d: %s", self._side.rank, error)

    def _probe(self, probe: Probe) -> None:
        problem = None
        try:
            if probe.reopen:
                self.disk.shard.reopen()
            self.disk.shard.probe()
        except Broken as error:
            problem = str(error)
        self._side.tell(to_leader(Probed(self._side.rank, problem, probe.number)))
