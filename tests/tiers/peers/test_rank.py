"""The part beside a worker, over a transport that the test plays."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from kvbm.abc.transport import Completion, Plan, Quiet, Transport
from kvbm.core.outcome import Outcome
from kvbm.core.region import Region, Slots
from kvbm.link.messages import Message, pack
from kvbm.stores.checksum import Words
from kvbm.stores.memory import Arena
from kvbm.tiers.peers.orders import Attach, Pull, Shared
from kvbm.tiers.peers.rank import PeerMemory
from kvbm.transfer.executor import Executor
from tests.link.orders import off_channel

SLOT = 4096


class Played(Transport):
    """Takes plans and ends none; its cancel takes as long as that of a peer which is frozen."""

    def __init__(self) -> None:
        self.restarts = 0
        self.registered = 0
        self.plans: list[Plan] = []
        self.cancelled: list[int] = []
        self.ends: list[Callable[[Completion], None]] = []
        self.connect: Callable[[bytes], str] = lambda metadata: metadata.decode()

    def reaches(self, source: Region, destination: Region) -> bool:
        return True

    def submit(self, plan: Plan, done: Callable[[Completion], None]) -> int:
        self.plans.append(plan)
        self.ends.append(done)
        return len(self.plans)

    def cancel(self, ticket: int) -> Quiet:
        time.sleep(0.2)
        self.cancelled.append(ticket)
        return Quiet.UNCERTAIN

    def alive(self) -> bool:
        return True

    def close(self) -> None:
        for number, done in enumerate(self.ends, 1):
            outcomes = np.full(len(self.plans[number - 1].source_slots), Outcome.FAILED, np.uint8)
            done(Completion(number, outcomes, "closed", 0.0, 0))

    def register(self, region: Region) -> None:
        self.registered += 1

    def metadata(self) -> bytes:
        return b"agent %d" % self.restarts

    def disconnect(self, peer: str) -> None:
        return


class Rank:
    """What a rank has for its tiers, too."""

    rank = 0

    def __init__(self) -> None:
        self.transport, self.said, self.ended = Played(), list[Shared](), list[tuple[int, Completion]]()
        self.arena = Arena(8 * SLOT)
        region = self.arena.region([SLOT], 8)
        transport: Any = self.transport
        side: Any = self
        self.memory = PeerMemory(transport, Executor([transport]), region, side, 0.05)

    def tell(self, message: Message) -> None:
        self.said.append(off_channel(message))

    def read(self, slots: Slots, job: int, completion: Completion, sums: Words) -> None:
        self.ended.append((job, completion))

    def pull(self, job: int, peer: str = "p") -> None:
        self.memory.pull(Pull(job, peer, pack([0, 1]), pack([2, 3]), np.zeros(2, np.uint64).tobytes()))

    def settle(self) -> None:
        """Waits for what has been asked of its thread."""
        done = threading.Event()
        self.memory.do(done.set)
        assert done.wait(5)


@pytest.fixture
def rank() -> Iterator[Rank]:
    rank = Rank()
    yield rank
    rank.memory.close(2.0)
    rank.arena.close()


def attach(peer: str = "p") -> Attach:
    return Attach(peer, b"agent", 1 << 40, SLOT, 8)


def test_giving_up_reads_of_a_frozen_peer_holds_nobody_up(rank: Rank) -> None:
    """`expire` is called in the engine's step."""
    rank.memory.attach(attach())
    for job in range(3):
        rank.pull(job)
    rank.settle()
    time.sleep(0.06)
    begun = time.monotonic()
    rank.memory.cancel([0, 1])
    for _ in range(100):
        rank.memory.expire()
    assert time.monotonic() - begun < 0.1
    rank.settle()
    assert set(rank.transport.cancelled) == {1, 2, 3}


def test_what_is_given_up_before_it_began_is_given_up(rank: Rank) -> None:
    rank.memory.attach(attach())
    held = threading.Event()
    rank.memory.do(held.wait)
    rank.pull(0)
    rank.memory.cancel([0])
    held.set()
    rank.settle()
    assert rank.transport.cancelled == [1]


def test_a_new_agent_is_announced_though_nothing_is_read(rank: Rank) -> None:
    """Else others could not read here any more."""
    rank.settle()
    assert [each.metadata for each in rank.said] == [b"agent 0"]
    rank.transport.restarts = 1
    rank.memory.expire()
    rank.memory.expire()
    rank.settle()
    rank.memory.expire()
    rank.settle()
    assert [each.metadata for each in rank.said] == [b"agent 0", b"agent 1"]
    assert rank.transport.registered == 2


def test_a_read_that_cannot_begin_ends(rank: Rank) -> None:
    def raises(metadata: bytes) -> str:
        raise OverflowError(metadata)

    rank.pull(0, "unknown")
    rank.memory.attach(attach())
    rank.transport.connect = raises
    rank.pull(1)
    rank.settle()
    assert [job for job, _ in rank.ended] == [0, 1]
    assert all((completion.outcomes == Outcome.FAILED).all() for _, completion in rank.ended)
