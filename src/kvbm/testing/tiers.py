"""What every tier has to pass. Subclass `TierSuite` in a test file and supply `rig`."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import pytest

from kvbm.blocks import Pinned, Pool
from kvbm.core.outcome import Outcome
from kvbm.link.messages import Result
from kvbm.tiers.host import ENGINE, Host, Landing
from kvbm.tiers.moves import Passage
from kvbm.tiers.tier import Offer, Tier

DONE, CORRUPT, FAILED = Outcome.DONE, Outcome.CORRUPT, Outcome.FAILED
KEYS: Final = tuple(bytes([number]) * 32 for number in range(1, 7))
PATIENCE_S: Final = 10.0
COMPUTED: Final = Landing(ENGINE)


class TierRig(ABC):
    """A tier whose ranks are played by the suite. `ranks` have to answer, `g2` is host memory, all of it free."""

    tier: Tier
    ranks: Sequence[int]
    g2: Pool
    writes: bool = True
    """Whether blocks are written there, whatever they are."""
    lends: bool = True
    """Whether what is offered is kept readable until the offer is dropped."""

    @abstractmethod
    def offer(self, keys: Sequence[bytes]) -> Offer:
        """The tier has these blocks, one after the other in a prompt, on every rank, and offers them."""

    @abstractmethod
    def finds(self, keys: Sequence[bytes]) -> bool:
        """Whether a request that comes now would get some of these from there, or would have them looked for."""

    @abstractmethod
    def jobs(self) -> list[int]:
        """Numbers of the reads and writes that every rank was told to begin since the last call."""

    @abstractmethod
    def lent(self) -> int:
        """Blocks that the tier keeps readable for somebody."""

    @abstractmethod
    def break_down(self) -> None:
        """The place fails until `mend`: moves that fail, for example. The tier notices."""

    @abstractmethod
    def mend(self) -> None:
        """The place works again, and the tier has had time to notice: probes are answered, the clock goes on."""

    @abstractmethod
    def lock(self) -> AbstractContextManager[object]:
        """The leader's."""

    @abstractmethod
    def close(self) -> None:
        """Take it down; everything has ended."""


@dataclass
class Read:
    """One read of an offer, its slots in host memory, and how often it ended."""

    job: int
    blocks: int
    ends: list[Passage] = field(default_factory=list)


class TierSuite(ABC):
    """The rules that a tier keeps (`kvbm.tiers.tier`)."""

    @pytest.fixture(autouse=True)
    def threads_before(self) -> set[threading.Thread]:
        """Those that lived before the rig was made."""
        return set(threading.enumerate())

    @pytest.fixture
    @abstractmethod
    def rig(self) -> TierRig:
        """A new one for each test. The fixture closes it."""

    # ------------------------------------------------------------------ what the suite does

    @staticmethod
    def read(rig: TierRig, offer: Offer, at: Sequence[int]) -> tuple[Read, Callable[[Passage], Pinned]]:
        """Begins to read these places of an offer. The second is to be called with how it ended, and lands it."""
        raw = rig.g2.allocate(len(at))
        assert raw is not None
        staged = raw.stage(tuple(offer.keys[place] for place in at), parent=tuple(offer.parents[place] for place in at))
        read = Read(0, len(at))
        read.job = offer.read(np.array(at), staged, read.ends.append)
        host = Host(rig.g2)
        return read, lambda passage: host.land(staged, passage.done, Landing(rig.tier.name, None, passage.sums))

    @staticmethod
    def answer(rig: TierRig, read: Read, *outcomes: Outcome, rank: int | None = None, error: str = "injected") -> None:
        """One rank's answer, or that of every rank. Without outcomes all went well."""
        said = bytes(outcomes or [DONE] * read.blocks)
        for one in rig.ranks if rank is None else [rank]:
            sums = np.arange(read.blocks, dtype=np.uint64).tobytes()
            assert rig.tier.answer(Result(read.job, one, said, 0, 0.001, error if any(said) else None, sums))

    @staticmethod
    def lends(rig: TierRig, blocks: int) -> bool:
        """Whether so many are kept readable, where any are."""
        return rig.lent() == blocks * rig.lends

    # ------------------------------------------------------------------ reads

    def test_a_read_ends_once_when_the_last_rank_has_answered(self, rig: TierRig) -> None:
        offer = rig.offer(KEYS[:4])
        offer.accept()
        read, land = self.read(rig, offer, [0, 1])
        for rank in rig.ranks:
            assert not read.ends
            self.answer(rig, read, rank=rank)
        (passage,) = read.ends
        assert passage.done.all()
        assert not passage.down
        land(passage).drop()
        offer.judge(np.array([0, 1]), passage)
        assert rig.g2.peek(KEYS[:4]) == 2
        assert not rig.tier.answer(Result(read.job, rig.ranks[0], b"\0\0", 0, 0.0)), "it is not of this tier any more"
        offer.drop()

    def test_a_cancelled_read_ends_once_and_not_before_all_have_answered(self, rig: TierRig) -> None:
        """Until then its slots may be written to."""
        offer = rig.offer(KEYS[:4])
        offer.accept()
        read, land = self.read(rig, offer, [0, 1, 2])
        offer.cancel([read.job])
        offer.cancel([read.job])
        rig.tier.tick()
        assert not read.ends
        assert self.lends(rig, 4), "where it is read from must not be reused either"
        for rank in rig.ranks:
            assert not read.ends
            self.answer(rig, read, DONE, FAILED, FAILED, rank=rank, error="cancelled")
        (passage,) = read.ends
        assert not passage.wanted, "its failure says nothing of the place"
        land(passage).drop()
        offer.judge(np.arange(3), passage)
        assert offer.failing() is None
        assert rig.g2.statistics().staged == 0
        offer.drop()

    def test_others_jobs_are_nobodys(self, rig: TierRig) -> None:
        assert not rig.tier.answer(Result(1 << 40, rig.ranks[0], b"\0", 0, 0.0))

    def test_an_offer_gives_back_what_was_kept_for_it(self, rig: TierRig) -> None:
        offer = rig.offer(KEYS[:4])
        assert self.lends(rig, 4)
        offer.drop()
        assert self.lends(rig, 0)

    def test_what_is_kept_for_it_stays_while_it_is_read(self, rig: TierRig) -> None:
        offer = rig.offer(KEYS[:2])
        offer.accept()
        read, land = self.read(rig, offer, [0, 1])
        rig.tier.tick()
        assert self.lends(rig, 2)
        self.answer(rig, read)
        land(read.ends[0]).drop()
        offer.judge(np.arange(2), read.ends[0])
        offer.drop()
        assert self.lends(rig, 0)

    def test_what_is_not_what_it_was_is_not_offered_again(self, rig: TierRig) -> None:
        offer = rig.offer(KEYS[:3])
        offer.accept()
        read, land = self.read(rig, offer, [0, 1, 2])
        self.answer(rig, read, DONE, CORRUPT, DONE)
        there = land(read.ends[0])
        assert there.keys == (KEYS[0], KEYS[2])
        there.drop()
        offer.judge(np.arange(3), read.ends[0])
        offer.drop()
        known = rig.tier.covers([KEYS[1]])
        assert offer.failing() is not None if known is None else not known.any()

    # ------------------------------------------------------------------ writes

    def test_what_is_written_is_there_once_all_ranks_have_it(self, rig: TierRig) -> None:
        if not rig.writes:
            pytest.skip("nothing is written there")
        self.compute(rig, KEYS[:3])
        rig.tier.pump()
        (job,) = rig.jobs()
        write = Read(job, 3)
        for rank in rig.ranks:
            assert not self.there(rig, KEYS[:3])
            self.answer(rig, write, DONE, DONE, FAILED, rank=rank)
        assert self.there(rig, KEYS[:3]) == 2
        assert not rig.tier.answer(Result(job, rig.ranks[0], bytes(3), 0, 0.0))

    @staticmethod
    def compute(rig: TierRig, keys: Sequence[bytes], how: Landing = COMPUTED) -> None:
        """These are in host memory from now on, and the tier is told how they came there."""
        raw = rig.g2.allocate(len(keys))
        assert raw is not None
        raw.stage(tuple(keys)).register().drop()
        rig.tier.landed(keys, how)

    @staticmethod
    def there(rig: TierRig, keys: Sequence[bytes]) -> int:
        """How many of these the tier says that it has."""
        mask = rig.tier.covers(keys)
        assert mask is not None
        return int(mask.sum())

    def test_what_came_from_there_is_not_written_there(self, rig: TierRig) -> None:
        if not rig.writes:
            pytest.skip("nothing is written there")
        self.compute(rig, KEYS[:3], Landing(rig.tier.name))
        rig.tier.pump()
        assert rig.jobs() == []
        rig.tier.landed(KEYS[:3], COMPUTED)
        rig.tier.pump()
        (job,) = rig.jobs()  # the control
        self.answer(rig, Read(job, 3))
        rig.tier.landed(KEYS[:3], COMPUTED)
        rig.tier.pump()
        assert rig.jobs() == [], "it is there"

    # ------------------------------------------------------------------ its health, and its end

    def test_a_problem_heals(self, rig: TierRig) -> None:
        assert rig.tier.problem is None
        rig.break_down()
        assert rig.tier.problem is not None
        if rig.writes:
            rig.jobs()
            self.compute(rig, KEYS[3:6])
            rig.tier.pump()
            assert not rig.jobs(), "nothing is written meanwhile"
        rig.mend()
        assert rig.tier.problem is None
        rig.jobs()
        offer = rig.offer(KEYS[:2])
        offer.accept()
        assert offer.failing() is None
        read, land = self.read(rig, offer, [0, 1])
        self.answer(rig, read)
        there = land(read.ends[0])
        assert there.keys == KEYS[:2]
        there.drop()
        offer.judge(np.arange(2), read.ends[0])
        offer.drop()

    def test_a_clear_publishes_nothing_of_before(self, rig: TierRig) -> None:
        offer = rig.offer(KEYS[:3])
        offer.accept()
        read, land = self.read(rig, offer, [0, 1, 2])
        if rig.writes:
            self.compute(rig, KEYS[3:6])
            rig.tier.pump()
        jobs = [job for job in rig.jobs() if job != read.job]
        assert len(jobs) == rig.writes
        rig.g2.clear()
        rig.tier.clear(lasting=False)
        self.answer(rig, read)
        for job in jobs:
            self.answer(rig, Read(job, 3))
        assert len(land(read.ends[0])) == 0
        offer.judge(np.arange(3), read.ends[0])
        offer.drop()
        assert rig.g2.peek(KEYS) == 0
        assert not rig.finds(KEYS)
        assert self.lends(rig, 0)

    def test_after_it_was_left_nothing_counts(self, rig: TierRig) -> None:
        offer = rig.offer(KEYS[:3])
        offer.accept()
        read, land = self.read(rig, offer, [0, 1, 2])
        if rig.writes:
            self.compute(rig, KEYS[3:6])
            rig.tier.pump()
        jobs = [job for job in rig.jobs() if job != read.job]
        assert len(jobs) == rig.writes
        rig.tier.leave("other weights came")
        assert rig.tier.problem == "other weights came"
        assert not read.ends
        self.answer(rig, read)  # all went well, and too late
        for job in jobs:
            self.answer(rig, Read(job, 3))
        (passage,) = read.ends
        assert len(land(passage)) == 0
        offer.judge(np.arange(3), passage)
        offer.drop()
        assert self.lends(rig, 0)
        assert not rig.finds(KEYS[3:6])
        self.compute(rig, KEYS[:3])
        rig.tier.pump()
        assert not rig.jobs(), "nothing is written there any more"
        rig.mend()
        assert rig.tier.problem == "other weights came"

    def test_its_threads_end_without_the_lock(self, rig: TierRig, threads_before: set[threading.Thread]) -> None:
        """Somebody else may have it until they have ended. After `stop` none is left."""
        ended = threading.Thread(target=rig.tier.stop, daemon=True)
        with rig.lock():
            ended.start()
            ended.join(PATIENCE_S)
            assert not ended.is_alive()
        left = {thread.name for thread in set(threading.enumerate()) - threads_before}
        assert not {name for name in left if name.startswith("kvbm-")}
