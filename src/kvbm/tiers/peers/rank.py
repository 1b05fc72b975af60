"""Beside each worker: this rank's host memory for other instances, theirs for this rank. Bytes over NIXL.

Everything of it happens on one thread of its own, in the order in which it was asked for; that thread also compares
checksums, while the next blocks are on their way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import numpy as np

from kvbm.abc.transport import Completion, Plan
from kvbm.core.errors import Broken, KvbmError, Misuse
from kvbm.core.outcome import Outcome
from kvbm.core.region import Region, Slots, packed
from kvbm.link.messages import unpack
from kvbm.stores.checksum import Words, checksums
from kvbm.tiers.peers.orders import Attach, Detach, Pull, Shared, decode_order, to_leader
from kvbm.tiers.tier import RankSide
from kvbm.transfer.executor import Executor
from kvbm.transfer.nixl.agent import RemoteMemory
from kvbm.transfer.nixl.transport import NixlTransport

log = logging.getLogger(__name__)


OpenMemory = Callable[[RankSide], "PeerMemory"]
"""Opens a rank's host memory to other instances; raises Broken."""


class PeerMemory:
    """`memory` is the host memory, a slot one extent. `executor` reads over `transport`; it is this object's own from
    now on. Any thread."""

    def __init__(
        self, transport: NixlTransport, executor: Executor, memory: Region, side: RankSide, deadline_s: float
    ) -> None:
        self._transport, self.memory, self.side = transport, memory, side
        self._deadline_s = deadline_s
        self._executor = executor
        self._thread = ThreadPoolExecutor(1, "kvbm-peers")
        self.known: dict[str, Attach] = {}
        self.regions: dict[str, Region] = {}
        """Peers' memories that may be read, by name, and those of them that are attached."""
        self._expiring = False
        self._agents = -1
        """How many agents there were before the one that all this is registered with."""
        self.do(self._announce)

    def attach(self, message: Attach) -> None:
        """Make a peer's memory reachable. What goes wrong is what reads of it then fail with."""
        self.do(partial(self._attach, message))

    def detach(self, peer: str) -> None:
        """A peer is gone."""
        self.do(partial(self._detach, peer))

    def pull(self, message: Pull) -> None:
        """Read blocks; the rank hears of their end when nothing writes to their slots any more."""
        self.do(partial(self._pull, message))

    def cancel(self, jobs: Collection[int]) -> None:
        """Nobody wants these any more."""
        self.do(partial(self._executor.cancel, [*jobs]))  # behind what it is about; and it may take a moment

    def expire(self) -> None:
        """To be called every now and then, waits for nothing: ends what takes too long."""
        if not self._expiring:
            self._expiring = True
            self.do(self._expire)

    def close(self, seconds: float) -> None:
        """Wait so long at most for what is on its way."""
        self._executor.close(seconds)
        self._thread.shutdown(wait=True, cancel_futures=True)

    def do(self, call: Callable[[], object]) -> None:
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
        self.regions.clear()
        try:
            self._transport.register(self.memory)
            metadata = self._transport.metadata()
        except KvbmError as error:
            self.side.tell(to_leader(Shared(self.side.rank, problem=str(error))))
            return
        plane = self.memory.planes[0]
        self.side.tell(to_leader(Shared(self.side.rank, metadata, plane.address, plane.stride, self.memory.num_slots)))

    def _attach(self, message: Attach) -> None:
        if message.old is not None:
            self._detach(message.old)
        self.known[message.peer] = message

    def _detach(self, peer: str) -> None:
        self.known.pop(peer, None)
        if (region := self.regions.pop(peer, None)) is not None:
            with suppress(Broken):
                self._transport.disconnect(region.owner.agent)

    def _region(self, peer: str) -> Region:
        """A peer's memory, connected when it is first read. Raises Broken."""
        if self._transport.restarts != self._agents:
            self._announce()
        if (known := self.regions.get(peer)) is not None:
            return known
        if (attach := self.known.get(peer)) is None:
            raise Broken("the peer's memory is not attached any more")
        agent = self._transport.connect(attach.metadata)
        region = self.regions[peer] = packed(
            f"G2 of {peer}", attach.address, [self.memory.slot_bytes], attach.slots, stride=attach.stride,
            kind="peer", owner=RemoteMemory(agent),
        )  # fmt: skip
        return region

    def _pull(self, message: Pull) -> None:
        theirs, ours = unpack(message.theirs), unpack(message.g2)
        wanted = np.frombuffer(message.sums, np.uint64)
        try:
            plan = Plan(self._region(message.peer), theirs, self.memory, ours, urgent=True, label="fetch")
            self._executor.submit(
                message.job, plan, self._deadline_s,
                lambda job, completion: self.do(partial(self._check, ours, wanted, job, completion)),
            )  # fmt: skip
        except Exception as error:  # or its slots would never come back
            if not isinstance(error, Broken | Misuse):
                log.exception("KVBM: a read from a peer could not begin")
            failed = Completion.failed(message.job, len(ours), str(error))
            self.side.read(ours, message.job, failed, np.zeros(len(ours), np.uint64))

    def _check(self, ours: Slots, wanted: Words, job: int, completion: Completion) -> None:
        """What has come has to be what was promised."""
        there = completion.outcomes == Outcome.DONE
        sums = np.zeros(len(ours), np.uint64)
        sums[there] = checksums(self.memory, ours[there], self.memory.slot_bytes)
        wrong = there & (sums != wanted)
        completion.outcomes[wrong] = Outcome.CORRUPT
        self.side.read(ours, job, completion, sums)


class PeerRank:
    """Of one rank. Until its memory is open to others it reads nothing of theirs either."""

    def __init__(self, side: RankSide, open_memory: OpenMemory) -> None:
        self.side, self._open_memory = side, open_memory
        self.memory: PeerMemory | None = None

    def open(self, body: bytes) -> None:
        """It is not told where anything is."""

    def ready(self) -> None:
        """To register memory may pin it, so that it would be allocated there and then."""
        try:
            self.memory = self._open_memory(self.side)
        except Broken as error:
            self.side.tell(to_leader(Shared(self.side.rank, problem=str(error))))

    def take(self, body: bytes) -> None:
        memory, message = self.memory, decode_order(body)
        match message:
            case Pull():
                self.side.reads(message.job)
                if memory is not None:
                    memory.pull(message)
                else:
                    ours = unpack(message.g2)
                    failed = Completion.failed(message.job, len(ours), "this rank shares nothing")
                    self.side.read(ours, message.job, failed, np.zeros(len(ours), np.uint64))
            case Attach() if memory is not None:
                memory.attach(message)
            case Detach() if memory is not None:
                memory.detach(message.peer)

    def cancel(self, jobs: Collection[int]) -> None:
        if self.memory is not None:
            self.memory.cancel(jobs)

    def expire(self) -> None:
        if self.memory is not None:
            self.memory.expire()

    def look(self) -> None:
        """A thread that died is seen by what does not come."""

    def close(self, seconds: float) -> None:
        if self.memory is not None:
            self.memory.close(seconds)
