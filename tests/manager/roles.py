"""A real leader whose engine and workers are played by the test."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from kvbm.blocks import Pool
from kvbm.core.config import Settings
from kvbm.core.events import Admitted, Event
from kvbm.core.outcome import Outcome
from kvbm.manager.channel import Link
from kvbm.manager.gate import Gate
from kvbm.manager.leader import Leader
from kvbm.manager.requests import RequestParams
from kvbm.manager.wire import Copy, Message, Result, Step
from kvbm.policy.lru import LRU
from kvbm.testing.clock import ManualClock

BLOCK_BYTES = 1_000_000
BLOCK_TOKENS = 32
DONE, FAILED = Outcome.DONE, Outcome.FAILED


def keys_of(name: str, count: int) -> list[bytes]:
    """The keys of a prompt's blocks."""
    return [hashlib.sha256(f"{name} {i}".encode()).digest() for i in range(count)]


class Stage:
    """`workers` are the other ends of the leader's links. G1 blocks are whatever numbers the test gives."""

    def __init__(self, slots: int = 64, *, ranks: int = 1, shares: bool = True, **settings: Any) -> None:
        ends = {rank: socket.socketpair() for rank in range(ranks)}
        self.workers = {rank: Link(ours) for rank, (ours, _) in ends.items()}
        self.clock = ManualClock()
        self.events: list[Event] = []
        self.pool = Pool(slots, order=LRU(slots), clock=self.clock)
        self.leader = Leader(
            Settings(**settings),
            self.pool,
            {rank: Link(theirs) for rank, (_, theirs) in ends.items()},
            slot_bytes=BLOCK_BYTES,
            gate=Gate(BLOCK_TOKENS, self.clock),
            shares_device_blocks=shares,
            observers=[self],
            clock=self.clock,
        )

    def on_event(self, event: Event) -> None:
        self.events.append(event)

    # ------------------------------------------------------------------ the engine

    def begin(self, name: str, keys: Sequence[bytes], **params: Any) -> None:
        self.leader.begin(name, keys, RequestParams(**params), len(keys) * BLOCK_TOKENS)

    def place(self, name: str, g1: Sequence[int], count: int = 0) -> None:
        """The engine gives a request its blocks and has the first `count` of its match loaded."""
        self.leader.place(name, g1, count, Admitted(len(g1) * BLOCK_TOKENS, 0, count * BLOCK_TOKENS))

    def step(self, complete: Mapping[str, int] | None = None, *, reuse: Sequence[int] = ()) -> Step:
        """One step in which the requests named get as far as `complete` says."""
        self.leader.reuse(reuse)
        for name, blocks in (complete or {}).items():
            self.leader.advance(name, blocks)
        return self.leader.seal(tokens=BLOCK_TOKENS * len(complete or ()))

    def compute(self, name: str, keys: Sequence[bytes], g1: Sequence[int], **params: Any) -> Step:
        """A new request that computes all of its blocks in one step."""
        self.begin(name, keys, **params)
        assert self.leader.match(name, 0, len(keys)) == 0
        self.place(name, g1)
        return self.step({name: len(keys)}, reuse=g1)

    def load(self, name: str, keys: Sequence[bytes], g1: Sequence[int], *, begin: bool = True) -> Copy:
        """A request that loads whatever of `keys` is in G2."""
        if begin:
            self.begin(name, keys)
        found = self.leader.match(name, 0, len(keys))
        assert found
        self.place(name, g1, found)
        (copy,) = self.step(reuse=g1).loads
        return copy

    def keep(self, name: str, keys: Sequence[bytes], **params: Any) -> None:
        """Puts `keys` into G2 by way of a request that ends."""
        g1 = range(10_000, 10_000 + len(keys))
        for copy in self.compute(name, keys, list(g1), **params).stores:
            self.answer(copy)
        assert not self.leader.finish(name, list(g1), len(keys))

    # ------------------------------------------------------------------ the workers

    def answer(self, copy: Copy, *outcomes: Outcome, rank: int | None = None) -> None:
        """A copy ended with these outcomes (DONE for each block if there are none), on one rank or on all."""
        blocks = len(copy.g1_slots())
        bytes_ = bytes(outcomes or [DONE] * blocks)
        for one in self.workers if rank is None else [rank]:
            error = None if not any(bytes_) else "injected"
            self.say(Result(copy.job, one, bytes_, blocks * BLOCK_BYTES, 0.001, error), one)

    def say(self, message: Message, rank: int = 0) -> None:
        self.workers[rank].send(message)

    def matchable(self, keys: Sequence[bytes]) -> int:
        self.leader.tick()
        return self.pool.peek(keys)

    # ------------------------------------------------------------------ the end

    def close(self) -> None:
        """Proves that nothing but copies in flight held a block."""
        for job in self.leader._copies._jobs.values():
            job.lease.drop()
        self.leader._copies._jobs.clear()
        self.leader.seal(tokens=0)
        self.leader.close()
        for link in self.workers.values():
            link.close()
        self.pool.check()
        now = self.pool.statistics()
        assert (now.active, now.staged, now.writable, now.orphaned) == (0, 0, 0, 0)
