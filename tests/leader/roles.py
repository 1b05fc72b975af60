"""A real leader whose engine and workers are played by the test."""

from __future__ import annotations

import hashlib
import itertools
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from kvbm.blocks import LayerGroup, Pool
from kvbm.control.disk import DiskCommands
from kvbm.core.config import Settings
from kvbm.core.errors import Broken
from kvbm.core.events import Admitted, Event
from kvbm.core.outcome import Outcome
from kvbm.leader.core import Core, Limits
from kvbm.leader.coverage import Prefix
from kvbm.leader.groups import Groups
from kvbm.leader.health import Health
from kvbm.leader.leader import Leader
from kvbm.leader.lower import LowerTiers
from kvbm.leader.observers import Observers
from kvbm.leader.reports import Reports
from kvbm.leader.requests import RequestParams, Variant
from kvbm.link.channel import Link
from kvbm.link.messages import Adapter, Copy, Message, Result, Step, pack
from kvbm.policy import admission
from kvbm.policy.admissions import Frequency
from kvbm.policy.lru import LRU
from kvbm.stores.disk.format import heads, packed_keys
from kvbm.stores.disk.recovery import Recovered
from kvbm.testing.clock import ManualClock
from kvbm.tiers.demote import Budget, Demotion, Rules
from kvbm.tiers.disk import folder
from kvbm.tiers.disk.adopt import adopt
from kvbm.tiers.disk.orders import Probe, Probed, Read, Write
from kvbm.tiers.disk.side import DiskSide
from kvbm.tiers.disk.tier import DiskTier
from kvbm.tiers.gate import Gate
from kvbm.tiers.host import Host
from kvbm.tiers.peers.messages import Memory, Promise, Reserve, Slab
from kvbm.tiers.peers.orders import Shared
from kvbm.tiers.peers.published import Published
from kvbm.tiers.peers.serving import Around, Serving
from kvbm.tiers.peers.tier import Patience, Peers
from kvbm.tiers.promote import Promotion
from kvbm.tiers.stack import Stack
from tests.leader.played import Chores, Keys, Others
from tests.link.orders import off_channel, on_channel

BLOCK_BYTES = 1_000_000
BLOCK_TOKENS = 32
DONE, FAILED = Outcome.DONE, Outcome.FAILED


def keys_of(name: str, count: int) -> list[bytes]:
    """The keys of a prompt's blocks."""
    return [hashlib.sha256(f"{name} {i}".encode()).digest() for i in range(count)]


def recovered(keys: Sequence[bytes], parents: Sequence[bytes | None], slots: Sequence[int], **given: Any) -> Recovered:
    """What a folder would say of these blocks, the oldest write first."""
    count, (words, tails) = len(keys), packed_keys(keys)
    above = heads(*packed_keys([key or bytes(8) for key in parents]))
    parts: dict[str, Any] = {
        "slots": np.array(slots, np.int64),
        "keys": words,
        "tails": tails,
        "parents": np.where([key is None for key in parents], np.uint64(0), above),
        "sequences": np.arange(count, dtype=np.uint64),
        "priorities": np.zeros(count, np.int32),
        "expires": np.full(count, np.inf),
        "written_at": np.zeros(len(slots)),
        "next_sequence": count,
        "damaged": 0,
        "bad": 0,
    }
    return Recovered(**parts | given)


class FakeFolder:
    """A folder on disk; `problem` is what every call fails with."""

    def __init__(self) -> None:
        self.generation = 0
        self.problem: str | None = None
        self.calls: list[str] = []
        self.found = recovered([], [], [])

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.problem is not None:
            raise Broken(self.problem)

    def clear(self, *, lasting: bool = True) -> int:
        self._call("clear" if lasting else "clear for now")
        self.generation += 1
        self.found = recovered([], [], [])
        return self.generation

    def restore(self) -> None:
        self._call("restore")

    def recover(self) -> Recovered:
        self._call("recover")
        return self.found

    def close(self) -> None:
        self.calls.append("close")


class Stage:
    """`workers` are the other ends of the leader's links. G1 blocks are whatever numbers the test gives."""

    def __init__(
        self,
        slots: int = 64,
        *,
        ranks: int = 1,
        shares: bool = True,
        groups: Sequence[LayerGroup] = (),
        most_doubted: float = 1.0,
        reports: Reports | None = None,
        **settings: Any,
    ) -> None:
        ends = {rank: socket.socketpair() for rank in range(ranks)}
        self.workers = {rank: Link(ours) for rank, (ours, _) in ends.items()}
        self.clock = ManualClock()
        self.events: list[Event] = []
        self.pool = Pool(slots, order=LRU(slots), most_doubted=most_doubted, clock=self.clock)
        given = Settings(**settings)
        core = Core(
            Host(self.pool), {rank: Link(theirs) for rank, (_, theirs) in ends.items()}, LowerTiers(),
            Health(paused=not given.enabled, clock=self.clock), Observers([self]), Limits.of(given, BLOCK_BYTES),
            self.clock,
        )  # fmt: skip
        coverage = Groups(self.pool, groups, given.checkpoint_tokens) if groups else Prefix(self.pool)
        gate = Gate(BLOCK_TOKENS, self.clock)
        self.leader = Leader(
            given, core, coverage, gate, shares_device_blocks=shares, reports=reports, clock=self.clock
        )  # fmt: skip
        self.heard: dict[int, list[Any]] = {rank: [] for rank in range(ranks)}

    def on_event(self, event: Event) -> None:
        self.events.append(event)

    # ------------------------------------------------------------------ the engine

    def begin(self, name: str, keys: Sequence[bytes], *, tokens: int | None = None, **params: Any) -> None:
        tokens = len(keys) * BLOCK_TOKENS if tokens is None else tokens
        self.leader.begin(name, keys, RequestParams(**params), tokens)

    def begin_with(
        self, name: str, keys: Keys, tokens: int, number: int, files: str, *, unsteady: bool = False, **params: Any
    ) -> None:
        """A request with an adapter arrives."""
        variant = Variant(Adapter(number, f"name{number}", b""), files, keys, unsteady=unsteady)
        self.leader.begin(name, keys, RequestParams(**params), tokens, variant)

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
        (copy,) = self.step(reuse=g1[found:]).loads
        return copy

    def keep(self, name: str, keys: Sequence[bytes], **params: Any) -> None:
        """Puts `keys` into G2 by way of a request that ends."""
        g1 = range(10_000, 10_000 + len(keys))
        for copy in self.compute(name, keys, list(g1), **params).stores:
            self.answer(copy)
        self.leader.finish(name, list(g1), len(keys))

    # ------------------------------------------------------------------ the workers

    def answer(self, copy: Copy, *outcomes: Outcome, rank: int | None = None, seconds: float = 0.001) -> None:
        """A copy ended with these outcomes (DONE for each block if there are none), on one rank or on all."""
        blocks = len(copy.g1_slots())
        bytes_ = bytes(outcomes or [DONE] * blocks)
        for one in self.workers if rank is None else [rank]:
            error = None if not any(bytes_) else "injected"
            self.say(Result(copy.job, one, bytes_, blocks * BLOCK_BYTES, seconds, error), one)

    def say(self, message: Message | Probed | Shared, rank: int = 0) -> None:
        self.workers[rank].send(on_channel(message))

    def reply(self, job: int, rank: int, outcomes: Sequence[Outcome], seconds: float, **more: Any) -> None:
        """One rank's answer about a copy or a move."""
        nbytes = list(outcomes).count(DONE) * BLOCK_BYTES
        error = more.pop("error", "injected") if any(outcomes) else None
        self.say(Result(job, rank, bytes(outcomes), nbytes, seconds, error, **more), rank)

    def matchable(self, keys: Sequence[bytes]) -> int:
        self.leader.core.tick()
        return self.pool.peek(keys)

    # ------------------------------------------------------------------ the disk

    def add_disk(
        self,
        slots: int = 64,
        *,
        exclusive: bool = False,
        admit: str = "all",
        write_bytes: float | None = None,
        in_flight: int = 64,
        batch: int = 4,
        most: int = 32,
        patience: float = 10.0,
        block_tokens: int = BLOCK_TOKENS,
        found: Recovered | None = None,
        chores: Chores | None = None,
    ) -> Stage:
        """Puts a disk tier below, with what was `found` there; sizes in blocks. `chores` are its thread's."""
        leader, core = self.leader, self.leader.core
        self.folder = FakeFolder()
        self.disk = Pool(slots, order=LRU(slots), tier="g3", clock=self.clock)
        self.tier = DiskTier(
            self.disk, core.links, folder.Generations(self.folder, 0), leader.gate,
            sequence=found.next_sequence if found is not None else 0, patience=patience,
            next_id=core.copies.next_id, clock=self.clock,
        )  # fmt: skip
        if found is not None:
            adopt(self.disk, found)
        if chores is not None:
            self.tier.chores = folder.Chores(chores)
        rules = Rules(
            admission(admit, slots), Frequency(slots), Budget(write_bytes, 3600, self.clock), exclusive=exclusive,
            block_bytes=BLOCK_BYTES, batch=batch,
        )  # fmt: skip
        self.demotion = Demotion(self.tier, self.pool, rules, most=lambda: in_flight, emit=core.emit)
        self.promotion = Promotion(
            core.host, most=lambda: most, in_flight=in_flight, batch=batch, unmeasured=batch,
            emit=core.emit, clock=self.clock,
        )  # fmt: skip
        self.side = DiskSide(self.tier, self.demotion, exclusive=exclusive)
        core.lower.stack = Stack(self.promotion, block_tokens, [self.side], self.clock)
        return self

    def hear(self, kind: type[Any], rank: int = 0) -> list[Any]:
        """What the leader has told a rank of this kind since the test asked last."""
        for one, link in self.workers.items():
            self.heard[one] += map(off_channel, link.take())
        said = [message for message in self.heard[rank] if isinstance(message, kind)]
        self.heard[rank] = [message for message in self.heard[rank] if not isinstance(message, kind)]
        return said

    def moved(
        self, move: Read | Write, *outcomes: Outcome, rank: int | None = None, error: str | None = "injected"
    ) -> None:
        """A move ended with these outcomes (DONE for each block if there are none), on one rank or on all."""
        bytes_ = bytes(outcomes or [DONE] * len(move.keys))
        for one in self.workers if rank is None else [rank]:
            nbytes = bytes_.count(DONE) * BLOCK_BYTES
            self.say(Result(move.job, one, bytes_, nbytes, 0.001, error if any(bytes_) else None), one)

    def tick(self, seconds: float = 0.0) -> None:
        self.clock.advance(seconds)
        self.leader.core.tick()

    def settle(self) -> None:
        """Lets the folder's thread end what it does, and the leader hear of it."""
        while self.tier.chores.busy:
            self.tier.chores.wait(10)
            self.leader.core.tick()

    def probed(self, *problems: str | None, reopen: bool = False) -> None:
        """Every rank answers the last probe; rank by rank what it says, None for the others."""
        for rank in self.workers:
            probe = self.hear(Probe, rank)[-1]
            assert probe.reopen == reopen
            problem = problems[rank] if rank < len(problems) else None
            self.say(Probed(rank, problem, probe.number), rank)
        self.leader.core.tick()

    def write_all(self, *, fails: bool = False) -> list[Write]:
        """Lets the leader write until it wants no more, and answers; returns what was written."""
        writes: list[Write] = []
        while True:
            self.leader.core.tick()
            if not (new := self.hear(Write)):
                return writes
            for write in new:
                self.moved(write, *([FAILED] * len(write.keys) if fails else []))
            writes += new

    def on_disk(self, name: str, keys: Sequence[bytes], **params: Any) -> None:
        """Puts `keys` on disk alone."""
        self.keep(name, keys, **params)
        self.write_all()
        self.pool.discard(keys)
        assert self.disk.peek(keys) == len(keys)

    def disk_commands(self) -> DiskCommands:
        """What operators ask of the disk tier."""
        stack = self.leader.core.lower.stack
        if stack is not None and "g3" in stack.tiers:
            self.side.folder = Path("nowhere")
        return DiskCommands(self.leader.core)

    def purge(self) -> None:
        """They empty the engine's part of the folder."""
        assert self.leader.core.lower.stack is not None
        self.leader.core.lower.stack.purge("g3")

    def fail_disk(self, why: str) -> None:
        """The disk tier is left alone until it answers a probe."""
        self.tier.fail(why)

    # ------------------------------------------------------------------ other instances

    def add_peers(
        self, *, keep: bool = True, held: int = 8, lease_s: float = 10.0, deadline_s: float = 2.0,
        patience_s: float = 60.0, most: int = 32, in_flight: int = 64, batch: int = 4,
    ) -> Stage:  # fmt: skip
        """Shares blocks with other instances; sizes in blocks. Below there is the disk tier, if that was added."""
        leader, core = self.leader, self.leader.core
        nearer = [] if core.lower.stack is None else [*core.lower.stack]
        if core.lower.stack is None:
            self.promotion = Promotion(
                core.host, most=lambda: most, in_flight=in_flight, batch=batch, unmeasured=batch,
                emit=core.emit, clock=self.clock,
            )  # fmt: skip
        total = self.pool.statistics().total
        sums = core.lower.sums(len(self.workers), total)
        around = Around(
            lambda seeker, wanted: self.promotion.begin(seeker, wanted, nearer), self.promotion.drop,
            self.promotion.coming, leader.expects, core.health.aside,
        )  # fmt: skip
        serving = Serving(self.pool, sums, around, most=lambda: held, seconds=lease_s, clock=self.clock)
        pools = [self.pool, *(tier.pool for tier in nearer if tier.pool is not None)]
        published = Published(lambda key: any(pool.peek([key]) for pool in pools))
        for pool in pools:
            pool.add_observer(published)
        self.network: Any = Others()
        self.peers = Peers(
            self.network, serving, published,
            Patience(leader.gate, self.clock, deadline_s=deadline_s, pull_s=patience_s), core.links,
            keeps=keep, next_id=core.copies.next_id, lock=core.below,
        )  # fmt: skip
        core.lower.stack = Stack(self.promotion, BLOCK_TOKENS, [*nearer, self.peers], self.clock)
        self._numbers = itertools.count(1)
        return self

    def promise(self, search: Any, count: int, *, at: int = 0, peer: str = "other", **changes: Any) -> bool:
        """Another instance promises `count` of the blocks that are looked for, from their `at`-th on. Whether anybody
        wants them."""
        number = next(self._numbers)
        said = {
            "slots": pack(range(100 + at, 100 + at + count)),
            "sums": [np.arange(count, dtype=np.uint64).tobytes() for _ in self.workers],
            "priorities": bytes(count), "ttls": np.full(count, np.inf).tobytes(), "seconds": 10.0,
        } | changes  # fmt: skip
        promise = Promise(id=number, lease=number, coming=False, memory=1, **said)
        memory = Memory(number, 1, [Slab(b"there", 4096, BLOCK_BYTES, 1000) for _ in self.workers])
        client, start = self.network.client(peer), search.start + at
        return bool(search.found(search, client, promise, memory, start))

    def reserve(self, keys: Sequence[bytes]) -> Promise:
        """Another instance asks for these."""
        return self.peers.serving.reserve(Reserve(1, 1, list(keys), 0, 0.0), 1)

    def comes(self, search: str, keys: Sequence[bytes], at: int, *, expected: bool) -> bool:
        """It asks whether the first of them is on its way."""
        return self.peers.serving.comes(search, keys, at, expected)

    def release(self, lease: int) -> None:
        """It has what it was promised."""
        self.peers.serving.release(lease)

    def searched(self, search: str) -> None:
        """It asks for nothing more of what it searched."""
        self.peers.serving.done(search)

    def publish(self, *, heard: bool = True) -> tuple[Collection[bytes], Collection[bytes], bool]:
        """The directory is told what was published and withdrawn; `heard`: it takes that."""
        said = self.peers.published.take()
        (self.peers.published.told if heard else self.peers.published.again)()
        return said

    def known(self, keys: Sequence[bytes]) -> int:
        """Of how many of the first of these checksums are known for others."""
        blocks = [block for key in keys if (block := self.pool.look(key)) is not None]
        return self.peers.serving.sums.known(np.array([block.slot for block in blocks], np.int64))

    # ------------------------------------------------------------------ what is below comes late

    def expect(self) -> None:
        """Nobody knows yet what may be below host memory."""
        self.leader.core.lower.expect(self.pool, len(self.workers), "nobody knows yet")

    def attach(self) -> bool:
        """What `add_disk` and `add_peers` made is there only now."""
        core = self.leader.core
        stack, core.lower.stack = core.lower.stack, None
        assert stack is not None
        return core.attach(stack)

    def rates(self) -> dict[str, float | None]:
        """What the gate has measured."""
        return self.leader.gate.rates()

    def counts(self) -> dict[str, int]:
        """What is counted, and is no copy."""
        shadow, stack = self.leader.shadow, self.leader.core.lower.stack
        counts = asdict(self.leader.core.counts) | (asdict(shadow.counts) if shadow is not None else {})
        below = stack.counts().values() if stack is not None else ()
        return counts | {name: count for tier in below for name, count in tier.items()}

    def measure(self, *, computed: float | None = None, read: float | None = None) -> None:
        """Has the gate know tokens computed and blocks read per second."""
        if computed is not None:
            self.leader.gate.computed.add(int(computed), 1.0)
        if read is not None:
            self.leader.gate.read.add(int(read), 1.0)
            self.leader.gate.since = self.leader.gate.measured = self.clock()

    # ------------------------------------------------------------------ the end

    def close(self) -> None:
        """Proves that nothing but copies in flight held a block."""
        core = self.leader.core
        for job in core.copies.jobs.values():
            job.lease.drop()
        core.copies.jobs.clear()
        pools = [self.pool]
        disk = core.lower.stack.tiers.get("g3") if core.lower.stack is not None else None
        if core.lower.stack is not None:
            if disk is not None:
                self.settle()
            for name in list(self.leader.requests):
                self.leader.finish(name, [], 0)
            self.promotion.clear()
        if disk is not None:
            for move in list(self.tier.moves.passages.values()):
                for rank in tuple(move.ranks):
                    self.tier.answer(Result(move.id, rank, b"", 0, 0.0, "cancelled"))
            assert not self.demotion.in_flight
            assert not self.leader.gate.reading
            pools.append(self.disk)
        if core.lower.stack is not None:
            assert not self.promotion.stagings
            assert not self.promotion.waiting
        self.leader.seal(tokens=0)
        core.close()
        for link in self.workers.values():
            link.close()
        for pool in pools:
            pool.check()
            now = pool.statistics()
            assert (now.active, now.staged, now.writable, now.orphaned) == (0, 0, 0, 0)
