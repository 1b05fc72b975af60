"""A tier that is a dict in each rank's process: what a stranger would write to put a place of their own below host
memory. It uses what modules offer and changes none."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np

from kvbm.abc.transport import Completion, Transport
from kvbm.blocks import Pinned, Staged
from kvbm.build.parts import Ground, Needs, Wrap
from kvbm.core.config import Settings
from kvbm.core.keys import Namespace
from kvbm.core.outcome import Outcome
from kvbm.core.region import Region, Slots
from kvbm.link.messages import Result, Sick, ToTier, pack, unpack
from kvbm.policy import admission
from kvbm.stores.checksum import checksums
from kvbm.tiers.breaker import Breaker
from kvbm.tiers.demote import Budget, Demotion, Rules
from kvbm.tiers.gate import Gate
from kvbm.tiers.host import ENGINE, Landing
from kvbm.tiers.moves import Ended, Moves, Passage
from kvbm.tiers.promote import Promotion
from kvbm.tiers.tier import Give, Mask, RankSide, Record, Seeker, Tier

NAME = "g9"


class Order(msgspec.Struct, frozen=True):
    """Put these slots of host memory under these keys, or (`up`) the other way round; with no job, forget the keys."""

    job: int | None
    up: bool
    slots: bytes
    keys: list[bytes]


class G9Rank:
    """Of one rank. Each order takes `delay` seconds. `bad` keys have other bytes than they had. While a file
    `fails` is in `faults` nothing works; once a file `dies` is there nothing ever will."""

    def __init__(self, side: RankSide, delay: float, bad: Collection[bytes], faults: Path) -> None:
        self._side, self._delay, self._bad, self._faults = side, delay, bad, faults
        self._said = False
        self._blocks: dict[bytes, tuple[bytes, int]] = {}
        self._thread = ThreadPoolExecutor(1, NAME)
        self._cancelled: set[int] = set()

    def open(self, body: bytes) -> None:
        """It is nowhere."""

    def ready(self) -> None:
        """A dict needs no memory of ours."""

    def take(self, body: bytes) -> None:
        order = msgspec.msgpack.decode(body, type=Order)
        if order.job is not None and order.up:
            self._side.reads(order.job)
        self._thread.submit(self._do, order)

    def _do(self, order: Order) -> None:
        if order.job is None:
            for key in order.keys:
                self._blocks.pop(key, None)
            return
        time.sleep(self._delay)
        slots, begun = unpack(order.slots), time.monotonic()
        outcomes = np.full(len(slots), Outcome.FAILED, np.uint8)
        error: str | None = "cancelled"
        if order.job in self._cancelled:
            pass
        elif (self._faults / "fails").exists():
            error = "[Errno 5] the dict fails"
        else:
            memory = self._side.memory(NAME, self._side.slot_bytes)
            move = self._up if order.up else self._down
            for at, (slot, key) in enumerate(zip(slots.tolist(), order.keys, strict=True)):
                outcomes[at] = move(memory, slot, key)
            error = None if not outcomes.any() else "g9 does not have it as it was"
        moved = int((outcomes == Outcome.DONE).sum()) * self._side.slot_bytes
        completion = Completion(order.job, outcomes, error, time.monotonic() - begun, moved)
        if order.up:
            sums = np.array([self._blocks.get(key, (b"", 0))[1] for key in order.keys], np.uint64)
            self._side.read(slots, order.job, completion, sums)
        else:
            self._side.written(order.job, completion)

    def _down(self, memory: Region, slot: int, key: bytes) -> Outcome:
        plane = memory.planes[0]
        data = ctypes.string_at(plane.address + slot * plane.stride, memory.slot_bytes)
        self._blocks[key] = data, int(self._side.sums[slot])
        return Outcome.DONE

    def _up(self, memory: Region, slot: int, key: bytes) -> Outcome:
        if (block := self._blocks.get(key)) is None:
            return Outcome.MISSING
        plane = memory.planes[0]
        ctypes.memmove(plane.address + slot * plane.stride, block[0], memory.slot_bytes)
        whole = int(checksums(memory, np.array([slot]), memory.slot_bytes)[0]) == block[1]
        return Outcome.DONE if whole and key not in self._bad else Outcome.CORRUPT

    def cancel(self, jobs: Collection[int]) -> None:
        self._cancelled.update(jobs)

    def expire(self) -> None:
        """Nothing is late."""

    def look(self) -> None:
        if not self._said and (self._faults / "dies").exists():
            self._said = True
            self._side.tell(Sick(self._side.rank, "the dict died", NAME))

    def close(self, seconds: float) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)


class G9Offer:
    tier: ClassVar[str] = NAME
    words: ClassVar[str] = "a dict"
    keeps: ClassVar[bool] = True
    places: ClassVar[Slots | None] = None
    cuts: ClassVar[None] = None

    def __init__(self, g9: G9, keys: Sequence[bytes]) -> None:
        self._g9, self.keys = g9, keys
        g9.lent += len(keys)
        self.parents = [g9.known[key][0] for key in keys]
        self.terms = [g9.known[key][1:] for key in keys]

    @property
    def gate(self) -> Gate:
        return self._g9.gate

    @property
    def queue(self) -> object:
        return self._g9

    def accept(self) -> None:
        """It is a dict."""

    def failing(self) -> str | None:
        return self._g9.problem

    def read(self, at: Slots, into: Staged, ended: Ended) -> int:
        return self._g9.read([self.keys[place] for place in at.tolist()], into.slots, ended)

    def cancel(self, jobs: Collection[int]) -> None:
        self._g9.cancel(jobs)

    def judge(self, at: Slots, passage: Passage) -> None:
        lost = [self.keys[place] for place, good in zip(at.tolist(), passage.done.tolist(), strict=True) if not good]
        if passage.wanted:
            self._g9.forget(lost)

    def drop(self) -> None:
        self._g9.lent -= len(self.keys)


class G9:
    """Beside the scheduler: which keys each rank's dict has."""

    name: ClassVar[str] = NAME
    words: ClassVar[str] = "a dict"
    keeps: ClassVar[bool] = True

    def __init__(self, ground: Ground, clock: Callable[[], float] = time.monotonic) -> None:
        core = ground.core
        self.gate = ground.gate.beside()
        self.known: dict[bytes, tuple[bytes | None, int, float]] = {}
        """Key -> the key before it, its priority, and when it ends."""
        self.corrupt = self.lent = 0
        self._clock = clock
        self._breaker = Breaker((0.5,), clock, most=2)
        self._moves = Moves(ground.links, core.copies.next_id, clock, judge=self._judge)
        self._coming: set[bytes] = set()
        rules = Rules(
            admission("all", 1), admission("all", 1), Budget(None, 1.0, clock), exclusive=False,
            block_bytes=ground.block_bytes, batch=4,
        )  # fmt: skip
        self._demotion = Demotion(self, core.pool, rules, most=lambda: 64, emit=core.emit)

    pool: ClassVar[None] = None

    @property
    def problem(self) -> str | None:
        return self._breaker.problem

    # ------------------------------------------------------------------ what goes there

    def absent(self, keys: Sequence[bytes]) -> list[int]:
        return [at for at, key in enumerate(keys) if key not in self.known and key not in self._coming]

    def write(self, blocks: Pinned, ended: Ended) -> int:
        keys, parents, (priorities, left) = blocks.keys, blocks.parents, blocks.terms
        ends = self._clock() + left
        self._coming.update(keys)

        def there(passage: Passage) -> None:
            self._coming.difference_update(keys)
            for at, (key, good) in enumerate(zip(keys, passage.done.tolist(), strict=True)):
                if good and passage.wanted:
                    self.known[key] = parents[at], int(priorities[at]), float(ends[at])
            ended(passage)

        self._say(Order(self._moves.write(len(keys), there).id, False, pack(blocks.slots), list(keys)))
        return len(keys)

    def read(self, keys: Sequence[bytes], slots: Slots, ended: Ended) -> int:
        passage = self._moves.read(len(keys), ended, self.gate)
        self._say(Order(passage.id, True, pack(slots), list(keys)))
        return passage.id

    def cancel(self, jobs: Collection[int]) -> None:
        self._moves.cancel(jobs)

    def forget(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.known.pop(key, None)
        self._say(Order(None, False, b"", list(keys)))

    def _say(self, order: Order) -> None:
        self._moves.tell(ToTier(NAME, msgspec.msgpack.encode(order)))

    def _judge(self, passage: Passage) -> None:
        self.corrupt += int((passage.outcomes == Outcome.CORRUPT).sum())
        if passage.wanted and passage.error is not None and not (passage.outcomes < Outcome.FAILED).any():
            if self._breaker.failed():
                self._breaker.trip(passage.error)
        elif passage.wanted:
            self._breaker.worked()

    # ------------------------------------------------------------------ the contract

    def covers(self, keys: Sequence[bytes]) -> Mask:
        return np.array([key in self.known for key in keys], np.bool_)

    def seek(self, seeker: Seeker, keys: Sequence[bytes], first: int | None, give: Give) -> None:
        offer = G9Offer(self, list(keys))
        if not give(offer):
            offer.drop()

    def asked(self, keys: Sequence[bytes]) -> None:
        self._demotion.used(keys)

    def over(self, keys: Sequence[bytes], record: Record) -> None:
        """Nothing leaves a dict."""

    def landing(self, slots: Slots, keys: Sequence[bytes], how: Landing) -> None:
        """Its ranks know checksums."""

    def landed(self, keys: Sequence[bytes], how: Landing) -> None:
        if how.origin == ENGINE:
            self._demotion.offer(keys)

    def answer(self, result: Result) -> bool:
        return self._moves.answer(result)

    def hear(self, body: bytes) -> None:
        """Ranks say nothing else."""

    def sick(self, why: str) -> None:
        self.leave(why)

    def pump(self) -> None:
        self._demotion.pump()

    def tick(self) -> None:
        if self.problem is not None and not self._moves.left and self._breaker.due():
            probe = self._moves.write(0, lambda passage: None if passage.error else self._breaker.mend())
            self._say(Order(probe.id, False, b"", []))

    def clear(self, *, lasting: bool) -> None:
        self._demotion.clear()
        self._moves.cancel_all()
        self.forget(list(self.known))

    def leave(self, why: str) -> None:
        self._demotion.clear()
        self._moves.leave()
        self._breaker.trip(why)

    drains: ClassVar[bool] = False

    def drain(self) -> None:
        """It ends with the process."""

    drained: ClassVar[bool] = True

    def stop(self) -> None:
        """It has no thread here."""

    def close(self) -> None:
        """It holds nothing."""

    def counts(self) -> Mapping[str, int]:
        return {"g9_blocks": len(self.known)}

    def status(self) -> Mapping[str, Any]:
        return {}

    def limits(self) -> str | None:
        return None

    def namesakes(self) -> tuple[str, ...]:
        return ()


class G9Part:
    """What `build_leader` and `build_worker` are given."""

    name: ClassVar[str] = NAME
    large: ClassVar[bool] = False
    drains: ClassVar[bool] = False
    without: ClassVar[str] = "there is no dict"

    def __init__(self, faults: Path, delay: float = 0.0, bad: Collection[bytes] = ()) -> None:
        self._faults, self._delay, self._bad = faults, delay, frozenset(bad)

    def wanted(self, settings: Settings) -> bool:
        return True

    def check(self, settings: Settings) -> None:
        """Nothing can be wrong with it."""

    def needs(self, slot_bytes: int) -> Needs:
        return Needs(sums="made")

    def transports(self, settings: Settings) -> list[Transport]:
        return []

    def on_rank(self, settings: Settings, wrapped: Wrap, side: RankSide) -> G9Rank:
        return G9Rank(side, self._delay, self._bad, self._faults)

    def claim(self, ground: Ground) -> G9Claim:
        return G9Claim(ground)


class G9Claim:
    def __init__(self, ground: Ground) -> None:
        self._ground = ground

    def open(self, namespace: Namespace, promotion: Promotion, nearer: Sequence[Tier]) -> G9:
        return G9(self._ground)

    def close(self) -> None:
        """Nothing was taken."""
