"""Beside each worker: this rank's host memory for other instances, theirs for this rank. Bytes over NIXL.

Everything of it happens on one thread of its own, in the order in which it was asked for; that thread also compares
checksums, while the next blocks are on their way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Final

import numpy as np

from kvbm.abc.transport import Completion, Plan
from kvbm.core.errors import Broken, KvbmError, Misuse
from kvbm.core.outcome import Outcome
from kvbm.core.region import Region, Slots, packed
from kvbm.link.messages import Attach, Mine, Pull, unpack
from kvbm.stores.checksum import Words, checksums
from kvbm.transfer.executor import Executor
from kvbm.transfer.nixl.agent import RemoteMemory
from kvbm.transfer.nixl.transport import NixlTransport

log = logging.getLogger(__name__)

_CLOSE_S: Final = 2.0

Ended = Callable[[int, Completion, Words], None]
"""Number, how it ended, and the checksum of each block as it is now."""


class PeerMemory:
    """`memory` is the host memory, a slot one extent; `tell` says to the leader where it is. Any thread.

    `executor` reads over `transport`; it is this object's own from now on."""

    def __init__(
        self, transport: NixlTransport, executor: Executor, memory: Region, rank: int,
        tell: Callable[[Mine], None], deadline_s: float,
    ) -> None:  # fmt: skip
        self._transport, self._memory, self._rank, self._tell = transport, memory, rank, tell
        self._deadline_s = deadline_s
        self._executor = executor
        self._thread = ThreadPoolExecutor(1, "kvbm-peers")
        self._known: dict[str, Attach] = {}
        self._regions: dict[str, Region] = {}
        self._expiring = False
        self._agents = -1
        """How many agents there were before the one that all this is registered with."""
        self._do(self._announce)

    def attach(self, message: Attach) -> None:
        """Make a peer's memory reachable. What goes wrong is what reads of it then fail with."""
        self._do(partial(self._attach, message))

    def detach(self, peer: str) -> None:
        """A peer is gone."""
        self._do(partial(self._detach, peer))

    def pull(self, message: Pull, ended: Ended) -> None:
        """Read blocks; `ended` is called once, when nothing writes to their slots any more."""
        self._do(partial(self._pull, message, ended))

    def cancel(self, jobs: list[int]) -> None:
        """Nobody wants these any more."""
        self._do(partial(self._executor.cancel, jobs))  # behind what it is about; and it may take a moment

    def expire(self) -> None:
        """To be called every now and then, waits for nothing: ends what takes too long."""
        if not self._expiring:
            self._expiring = True
            self._do(self._expire)

    def close(self) -> None:
        """Wait briefly for what is on its way."""
        self._executor.close(_CLOSE_S)
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _do(self, call: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # closed: nobody waits for it any more
            self._thread.submit(call)

    # ------------------------------------------------------------------ on the thread

    def _expire(self) -> None:
        self._expiring = False
        self._executor.expire()
        if self._transport.restarts != self._agents:
            self._announce()  # or nobody could read here before we read from somebody

    def _announce(self) -> None:
        """Register our memory and say where it is; again after the agent was replaced, which forgot all peers, too."""
        self._agents = self._transport.restarts
        self._regions.clear()
        try:
            self._transport.register(self._memory)
            metadata = self._transport.metadata()
        except KvbmError as error:
            self._tell(Mine(self._rank, problem=str(error)))
            return
        plane = self._memory.planes[0]
        self._tell(Mine(self._rank, metadata, plane.address, plane.stride, self._memory.num_slots))

    def _attach(self, message: Attach) -> None:
        if message.old is not None:
            self._detach(message.old)
        self._known[message.peer] = message

    def _detach(self, peer: str) -> None:
        self._known.pop(peer, None)
        if (region := self._regions.pop(peer, None)) is not None:
            with suppress(Broken):
                self._transport.disconnect(region.owner.agent)

    def _region(self, peer: str) -> Region:
        """A peer's memory, connected when it is first read. Raises Broken."""
        if self._transport.restarts != self._agents:
            self._announce()
        if (known := self._regions.get(peer)) is not None:
            return known
        if (attach := self._known.get(peer)) is None:
            raise Broken("the peer's memory is not attached any more")
        agent = self._transport.connect(attach.metadata)
        region = self._regions[peer] = packed(
            f"G2 of {peer}", attach.address, [self._memory.slot_bytes], attach.slots, stride=attach.stride,
            kind="peer", owner=RemoteMemory(agent),
        )  # fmt: skip
        return region

    def _pull(self, message: Pull, ended: Ended) -> None:
        theirs, ours = unpack(message.theirs), unpack(message.g2)
        wanted = np.frombuffer(message.sums, np.uint64)
        try:
            plan = Plan(self._region(message.peer), theirs, self._memory, ours, urgent=True, label="fetch")
            self._executor.submit(
                message.job, plan, self._deadline_s,
                lambda job, completion: self._do(partial(self._check, ours, wanted, ended, job, completion)),
            )  # fmt: skip
        except Exception as error:  # or its slots would never come back
            if not isinstance(error, Broken | Misuse):
                log.exception("KVBM: a read from a peer could not begin")
            ended(message.job, Completion.failed(message.job, len(ours), str(error)), np.zeros(len(ours), np.uint64))

    def _check(self, ours: Slots, wanted: Words, ended: Ended, job: int, completion: Completion) -> None:
        """What has come has to be what was promised."""
        there = completion.outcomes == Outcome.DONE
        sums = np.zeros(len(ours), np.uint64)
        sums[there] = checksums(self._memory, ours[there], self._memory.slot_bytes)
        wrong = there & (sums != wanted)
        completion.outcomes[wrong] = Outcome.CORRUPT
        ended(job, completion, sums)
