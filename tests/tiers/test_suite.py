"""The rules of tiers, kept by the disk, by other instances, by shared storage, and by a tier that is a dict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import msgspec
import numpy as np
import pytest

from kvbm.build.parts import Ground
from kvbm.build.place import Place
from kvbm.core.config import Settings
from kvbm.core.outcome import Outcome
from kvbm.link.messages import Result, ToTier
from kvbm.stores.objects.names import Names
from kvbm.testing.tiers import KEYS, TierRig, TierSuite
from kvbm.tiers.demote import Budget
from kvbm.tiers.disk.orders import Read, Write
from kvbm.tiers.host import Host
from kvbm.tiers.objects.orders import GetRun, PutRun, RankArena, Tried, TryStorage, decode_order, to_leader
from kvbm.tiers.objects.presence import KnownNames
from kvbm.tiers.objects.tier import Runs, SharedStorage
from kvbm.tiers.objects.traffic import Traffic
from kvbm.tiers.objects.uploads import UploadRules, Uploads
from kvbm.tiers.objects.warm import Warmth
from kvbm.tiers.peers.orders import Pull
from kvbm.tiers.tier import Offer, Record, Seeker
from tests.build.g9 import G9, Order
from tests.leader.roles import Stage

RANKS = 2
Make = Callable[..., Stage]


class Staged(TierRig):
    """Beside a real leader."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.ranks, self.g2 = stage, range(RANKS), stage.pool
        self.offers: list[Offer] = []

    def seeker(self, keys: Sequence[bytes]) -> Seeker:
        return Seeker("r", Record("r", 0), keys)

    def take(self, offer: Offer) -> bool:
        self.offers.append(offer)
        return True

    def offer(self, keys: Sequence[bytes]) -> Offer:
        self.tier.seek(self.seeker(keys), keys, 0, self.take)
        return self.offers[-1]

    def finds(self, keys: Sequence[bytes]) -> bool:
        if (known := self.tier.covers(keys)) is not None:
            return bool(known.any())
        return self.tier.seek(self.seeker(keys), keys, 0, self.take) is not None

    def heard(self, kind: type[Any]) -> list[int]:
        told = [[order.job for order in self.stage.hear(kind, rank)] for rank in self.ranks]
        assert all(each == told[0] for each in told), "every rank is told the same"
        return told[0]

    def fail_reads(self) -> None:
        """Until the tier is left alone."""
        keys = [b"bad".ljust(32)]
        while self.tier.problem is None:
            offer = self.offer(keys)
            offer.accept()
            raw = self.g2.allocate(1)
            assert raw is not None
            with raw.stage(tuple(keys)) as staged:
                job = offer.read(np.arange(1), staged, lambda passage: None)
                for rank in self.ranks:
                    assert self.tier.answer(Result(job, rank, bytes([Outcome.FAILED]), 0, 0.0, "[Errno 5]"))
            offer.drop()

    def lock(self) -> AbstractContextManager[object]:
        return self.stage.leader.core.below()

    def close(self) -> None:
        """The stage is closed by its fixture."""


class Disk(Staged):
    def __init__(self, stage: Stage) -> None:
        super().__init__(stage.add_disk())
        self.tier = stage.side

    def offer(self, keys: Sequence[bytes]) -> Offer:
        missing = [keys[at] for at in self.stage.disk.absent(keys)]
        if missing:
            self.stage.on_disk("there", keys)
            for rank in self.ranks:
                self.stage.hear(Write, rank)  # that was it
        return super().offer(keys)

    def jobs(self) -> list[int]:
        return self.heard(Write) + self.heard(Read)

    def lent(self) -> int:
        return self.stage.disk.statistics().active

    def break_down(self) -> None:
        self.fail_reads()

    def mend(self) -> None:
        self.stage.tick(1.0)
        if self.tier.problem is not None and not self.stage.tier.left:
            self.stage.probed()


class Others(Staged):
    writes = False

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage.add_peers())
        self.tier = stage.peers
        self.mend()

    def offer(self, keys: Sequence[bytes]) -> Offer:
        search = self.tier.seek(self.seeker(keys), keys, 0, self.take)
        assert search is not None
        assert self.stage.promise(search, len(keys))
        return self.offers[-1]

    def jobs(self) -> list[int]:
        return self.heard(Pull)

    def lent(self) -> int:
        over = sum(said.startswith("release") for said in self.stage.network.told)
        return sum(len(offer.keys) for offer in self.offers[over:])

    def break_down(self) -> None:
        self.stage.network.problem, self.stage.network.peers = "the directory is gone", ()

    def mend(self) -> None:
        self.stage.network.problem, self.stage.network.peers = None, ("other",)


class Storage(Staged):
    """Runs of three blocks, which one rank moves."""

    writes = lends = False  # what is written is a run, and is not kept for anybody

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self.ranks, core = [0], stage.leader.core
        traffic = Traffic({0: core.links[0]}, stage.leader.gate.beside(4), core.copies.next_id, stage.clock, 60.0)
        runs = Runs(Names(b"n"), 3, KnownNames(1_000))
        rules = UploadRules("all", Budget(None, 1.0, stage.clock), 3, 1_000, 2, 8)
        self.tier: SharedStorage = SharedStorage(
            traffic, runs, core.lower.sums(1, core.pool.capacity),
            lambda shelf: Uploads(shelf, core.pool, rules, lambda event: None),
            Warmth(Host(core.pool), traffic, 0, lambda event: None), stage.clock, "file:///kv",
        )  # fmt: skip
        runs.presence.add(runs.heads(KEYS[2::3]))
        self.tier.hear(to_leader(RankArena(0)).body)
        self._tried()

    def _orders(self) -> list[Any]:
        return [decode_order(each.body) for each in self.stage.hear(ToTier, 0)]

    def _tried(self) -> None:
        """The rank has tried the storage, and it works."""
        for order in self._orders():
            if isinstance(order, TryStorage):
                self.tier.hear(to_leader(Tried(order.number)).body)

    def seeker(self, keys: Sequence[bytes]) -> Seeker:
        return super().seeker(KEYS)

    def jobs(self) -> list[int]:
        return [order.job for order in self._orders() if isinstance(order, (GetRun, PutRun))]

    def lent(self) -> int:
        return 0

    def break_down(self) -> None:
        while self.tier.problem is None:
            offer = self.offer(KEYS[3:6])
            raw = self.g2.allocate(1)
            assert raw is not None
            with raw.stage(KEYS[3:4]) as staged:
                job = offer.read(np.arange(1), staged, lambda passage: None)
                assert self.tier.answer(Result(job, 0, bytes([Outcome.FAILED]), 0, 0.0, "no answer"))

    def mend(self) -> None:
        self.stage.clock.advance(40.0)
        self.tier.tick()
        self._tried()


class Dict(Staged):
    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        ground = Ground(
            Settings(), Place("e", RANKS), stage.leader.core, stage.leader.gate, stage.leader.core.links, 4096
        )
        self.tier: G9 = G9(ground, stage.clock)

    def offer(self, keys: Sequence[bytes]) -> Offer:
        self.tier.known |= {key: (before, 0, float("inf")) for key, before in zip(keys, [None, *keys], strict=False)}
        return super().offer(keys)

    def jobs(self) -> list[int]:
        told = []
        for rank in self.ranks:
            orders = [msgspec.msgpack.decode(each.body, type=Order) for each in self.stage.hear(ToTier, rank)]
            told.append([order.job for order in orders if order.job is not None])
        assert told[0] == told[1]
        return told[0]

    def lent(self) -> int:
        return self.tier.lent

    def break_down(self) -> None:
        self.fail_reads()

    def mend(self) -> None:
        self.jobs()
        self.stage.clock.advance(1.0)
        self.tier.tick()
        for job in self.jobs():  # whether it works
            for rank in self.ranks:
                self.tier.answer(Result(job, rank, b"", 0, 0.0))


class TestDisk(TierSuite):
    @pytest.fixture
    def rig(self, make_stage: Make) -> TierRig:
        return Disk(make_stage(ranks=RANKS))


class TestPeers(TierSuite):
    @pytest.fixture
    def rig(self, make_stage: Make) -> TierRig:
        return Others(make_stage(ranks=RANKS))


class TestStorage(TierSuite):
    @pytest.fixture
    def rig(self, make_stage: Make) -> TierRig:
        return Storage(make_stage(ranks=RANKS))


class TestDict(TierSuite):
    @pytest.fixture
    def rig(self, make_stage: Make) -> TierRig:
        return Dict(make_stage(ranks=RANKS))
