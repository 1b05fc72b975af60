"""Blocks by key, between an engine's memory, host memory, and what lies below: what is held, loaded and stored, and
which copies read the engine's blocks.

It knows keys and the engine's block numbers ("rows"), no requests and no steps. `Leader` (`leader/leader.py`) puts
these on top; an engine that keeps a tree of its own can sit on the core alone (`build.leader.build_core`). The caller
gets a ticket for each copy (`StepCopy`), sends it to the ranks, and hears how it ended (`Owner`).

Threads: `tick`, `pause`, `resume`, `isolate`, `attach`, `turn_off`, `quiesce`, `drain`, `below`, `in_flight` and
`close` may come from any and take the lock; all else is called under `lock`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from msgspec.structs import replace

from kvbm.blocks import Pinned, Pool, Staged, Writable
from kvbm.core.config import Settings
from kvbm.core.errors import Broken
from kvbm.core.events import Copied
from kvbm.core.outcome import Outcome
from kvbm.core.region import Slots
from kvbm.leader.copies import InFlight, Owner, StepCopy
from kvbm.leader.health import Health
from kvbm.leader.lower import LowerTiers
from kvbm.leader.observers import Observers
from kvbm.link.channel import Link
from kvbm.link.messages import Bye, FromTier, GiveUp, Message, Opened, Result, Sick
from kvbm.tiers.host import ENGINE, Host, Landing
from kvbm.tiers.stack import Stack
from kvbm.tiers.tier import Seeker, Wanted

log = logging.getLogger(__name__)

GRACE: Final = 5.0
"""Seconds past a copy's own deadline after which a silent worker counts as broken."""


class Room(NamedTuple):
    """How many blocks of host memory all requests may hold together, and how many they hold."""

    most: int
    held: int


class Outgoing(NamedTuple):
    """Blocks that are to be copied to host memory: their keys, the keys before them (`Writable.stage`), the engine's
    blocks, and which blocks of their prompt these are."""

    keys: Sequence[bytes]
    parent: bytes | tuple[bytes | None, ...] | None
    g1: Slots
    places: Slots


class Space(NamedTuple):
    """For blocks that are to be copied to host memory: slots for the first of those that it lacks, as many as may be
    copied now; where all that it lacks are; the keys of those that somebody else is bringing."""

    slots: Writable | None
    absent: list[int]
    coming: list[bytes]


@dataclass(slots=True)
class Counts:
    """Blocks that were handed out again before they were copied; times that blocks were not offloaded at once, because
    copies in flight or holds had filled their share; blocks that were not in host memory what had been written there,
    as their loads found."""

    dropped: int = 0
    deferred: int = 0
    corrupt: int = 0


class Limits(NamedTuple):
    """Blocks that stores may read at once; the part of host memory that may be held; seconds that a rank may take to
    answer about a load, and about a store."""

    storing: int
    share: float
    load_s: float
    store_s: float

    @classmethod
    def of(cls, settings: Settings, slot_bytes: int) -> Limits:
        """`slot_bytes` are those of a block over all ranks."""
        storing = max(1, settings.store_inflight_mb * 1_000_000 // slot_bytes)
        return cls(storing, settings.held_share, settings.load_deadline_s + GRACE, settings.store_deadline_s + GRACE)


class Core:
    """See the module. `links` are the connected workers by rank."""

    def __init__(
        self, host: Host, links: Mapping[int, Link], lower: LowerTiers, health: Health, observers: Observers,
        limits: Limits, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.host, self.links, self.lower, self.health, self.observers = host, links, lower, health, observers
        self.limits = limits
        self.lock = threading.RLock()
        self.copies = InFlight(links, clock)
        self.held = 0
        """Blocks that requests hold, or load."""
        self.counts = Counts()
        self._hears: dict[type[Message], Callable[[Any], None]] = {}
        self._chores: list[Callable[[], None]] = []
        host.listen(lower)

    @property
    def pool(self) -> Pool:
        """Host memory's."""
        return self.host.pool

    def emit(self, event: Any) -> None:
        """Tell the observers."""
        self.observers.emit(event)

    def hears(self, kinds: Iterable[type[Message]], hear: Callable[[Any], None]) -> None:
        """Have this called with messages of these kinds, which are about neither copies nor tiers."""
        self._hears.update(dict.fromkeys(kinds, hear))

    def often(self, chore: Callable[[], None]) -> None:
        """Have this called at every `tick` while KVBM is not off."""
        self._chores.append(chore)

    # ------------------------------------------------------------------ up

    @property
    def room(self) -> Room:
        """For holds."""
        return Room(max(1, int(self.pool.total * self.limits.share)), self.held)

    def seek(self, seeker: Seeker) -> None:
        """A prompt arrives: what host memory lacks of it starts to come from below."""
        if self.lower.stack is not None and self.health.aside() is None:
            self.lower.stack.begin(seeker, seeker.keys, Wanted(seeker.keys), loads=True)

    def comes(self, seeker: Seeker, first: int) -> bool:
        """Whether blocks of the prompt, from its block `first` on, are still on their way from below, and worth waiting
        for."""
        stack, rest = self.lower.stack, seeker.keys[first : first + self.room.most]
        return stack is not None and self.health.aside() is None and stack.waits(seeker, Wanted(rest), first)

    def over(self, seeker: Seeker) -> None:
        """Nobody wants the prompt any more. Of its blocks, the last is to be evicted before the first."""
        self.pool.touch(seeker.keys)
        if self.lower.stack is not None:
            self.lower.stack.finished(seeker, seeker.keys)

    def hold(self, keys: Sequence[bytes], first: int = 0) -> Pinned | None:
        """The blocks of a prompt from its block `first` on that can be loaded now, as many as may be held; None: there
        are none, or KVBM stands aside. They are held until `load` or `let_go`."""
        if self.health.aside() is not None:
            return None
        hold, (most, held) = self.pool.match(keys, first), self.room
        if len(hold) > max(0, most - held):
            hold.narrow(max(0, most - held))
        if not len(hold):
            hold.drop()
            return None
        return self.keep(hold)

    def keep(self, hold: Pinned) -> Pinned:
        """Somebody else held these for a request: they count from now on."""
        self.held += len(hold)
        return hold

    def narrow(self, hold: Pinned, count: int) -> None:
        """Lets go of all but the first `count`."""
        self.held -= len(hold) - count
        hold.narrow(count)

    def let_go(self, hold: Pinned) -> None:
        """They are not loaded."""
        self.held -= len(hold)
        hold.drop()

    def load(self, hold: Pinned, g1: Slots, places: Slots, owner: Owner) -> StepCopy:
        """Begins to copy what is held into these rows. The hold is the copy's from now on: nothing but its end, on
        every rank, lets go of it."""
        return self.copies.start(owner, hold, g1, places, self.limits.load_s)

    # ------------------------------------------------------------------ down

    def space(self, keys: Sequence[bytes]) -> Space:
        """For blocks that are complete in the engine. The caller has seen that KVBM does not stand aside
        (`Health.aside`)."""
        absent, coming = self.pool.absent(keys), list[bytes]()
        if len(absent) < len(keys):
            self.pool.touch(keys)
            there = self.pool.present(keys)
            there[absent] = True
            coming = [keys[at] for at in np.flatnonzero(~there).tolist()]
        pool = self.pool.statistics()
        count = min(len(absent), max(0, min(self.limits.storing - self.copies.blocks_read, pool.free + pool.inactive)))
        slots = self.pool.allocate(count) if count else None
        self.counts.deferred += slots is None and bool(absent)
        return Space(slots, absent, coming)

    def store(
        self, slots: Writable, blocks: Outgoing, owner: Owner, *, priority: int = 0, ttl: float | None = None
    ) -> StepCopy:
        """Begins to copy blocks out of the engine. They are found once every rank has copied them."""
        staged = slots.stage(blocks.keys, parent=blocks.parent, priority=priority, ttl=ttl)
        return self.copies.start(owner, staged, blocks.g1, blocks.places, self.limits.store_s)

    def compare(self, slots: Writable, g1: Slots, places: Slots, owner: Owner, patience: float) -> StepCopy:
        """Begins to copy blocks of the engine beside what is stored."""
        return self.copies.start(owner, slots, g1, places, patience)

    def overwritten(self, g1: Iterable[int]) -> set[int]:
        """The engine hands these rows out: copies that still read them, and have to end first. A copy that no worker
        has heard of would read what is written there next: it is dropped for these rows."""
        # Now, not when the step is complete: a row may become the source of another copy in this very step.
        rows = g1 if isinstance(g1, Sequence) else list(g1)
        reading = self.copies.reading(rows)
        for number in self.copies.unsent(reading):
            self.counts.dropped += self._drop(number, rows)
            reading.discard(number)
        return reading

    def _drop(self, number: int, g1: Iterable[int] | None) -> int:
        """Has a copy that no worker has heard of leave out these rows (None: all); how many it would have copied."""
        copy, count = self.copies.drop(number, g1)
        if not copy.done.any():
            copy.owner.dropped(copy)
            if not isinstance(copy.lease, Writable):
                copy.lease.drop()
        return count

    def seal(self, fence: set[int]) -> list[int]:
        """The copies that were begun since the last call are sent to the ranks now. Those of `fence` that have not
        ended: the ranks wait for them before anything else."""
        self.copies.seal()
        return self.copies.fence(fence)

    # ------------------------------------------------------------------ answers

    def hear(self) -> None:
        """Takes what ranks have said."""
        heard = False
        for rank, link in self.links.items():
            try:
                messages = link.take()
            except Broken as error:
                messages = []
                self.health.sick(f"rank {rank}: {error}")
            heard |= bool(messages)
            for message in messages:
                self._take(rank, message)
            if not link.open and not self.health.ending:
                self.health.sick(f"the worker of rank {rank} is gone")
        if heard:
            self.pump()

    def _take(self, rank: int, message: Message) -> None:
        match message:
            case Bye():
                self.health.ending = True
            case Result() if self.health.off is not None:
                self._disbelieve(message)
            case _ if self.health.off is not None:
                pass
            case Result():
                if not self.lower.answer(message):
                    self._answer(message)
            case Opened() | FromTier():
                self.lower.take(message)
            case Sick(tier=tier) if tier:
                self.lower.take(message)
            case Sick(rank=sick, problem=problem):
                self.turn_off(f"rank {sick}: {problem}")
            case _ if (hear := self._hears.get(type(message))) is not None:
                hear(message)
            case _:
                log.warning("KVBM: unexpected %s from rank %d", type(message).__name__, rank)

    def _disbelieve(self, result: Result) -> None:
        """Takes an answer about a copy, and does not believe it."""
        if (copy := self.copies.answer(result)) is not None:
            if isinstance(copy.lease, Pinned):
                self.let_go(copy.lease)
            else:
                copy.lease.drop()
        else:
            self.lower.answer(replace(result, outcomes=bytes([Outcome.FAILED]) * len(result.outcomes)))

    def _answer(self, result: Result) -> None:
        copy = self.copies.answer(result)
        if copy is None:
            return
        if isinstance(copy.lease, Staged):
            self._stored(copy, copy.lease)
        elif isinstance(copy.lease, Pinned):
            self._loaded(copy, copy.lease)
        else:
            copy.owner.compared(copy)

    def _stored(self, copy: StepCopy, staged: Staged) -> None:
        copy.owner.judge(copy)
        failed, late = int((~copy.done).sum()) - copy.dropped, 0
        if failed and copy.fenced:  # nothing is wrong: the engine is short of blocks
            failed, late = 0, failed
            self.counts.dropped += late
        with self.host.land(staged, copy.done, Landing(ENGINE, copy.places, copy.sums)) as there:
            copy.owner.stored(copy, there, failed, late)
        self.emit(Copied("g1", "g2", int(copy.done.sum()), failed, copy.nbytes, copy.seconds))

    def _loaded(self, copy: StepCopy, hold: Pinned) -> None:
        failed = int((~copy.done).sum())
        wrong = copy.owner.loaded(copy, failed)
        self.counts.corrupt += int((copy.outcomes == Outcome.CORRUPT).sum())
        if failed:
            self.pool.discard(key for key, bad in zip(hold.keys, wrong.tolist(), strict=True) if bad)
        self.let_go(hold)
        self.emit(Copied("g2", "g1", len(copy.g1) - failed, failed, copy.nbytes, copy.seconds))

    # ------------------------------------------------------------------ always

    def tick(self) -> None:
        """A few times a second, also while the engine sleeps: takes results, notices silent workers. What it raises
        turns KVBM off, whatever called it: what it had taken is lost."""
        try:
            with self.lock:
                self._tick()
        except Exception as error:
            log.exception("KVBM: housekeeping went wrong")
            self.turn_off(f"off until the engine is started anew: housekeeping raised {error!r}")

    def _tick(self) -> None:
        self.hear()
        if self.health.off is not None:
            self.health.ticked = time.monotonic()
            return
        if (copy := self.copies.overdue()) is not None:
            self.health.sick(f"no answer about a copy from rank {min(copy.ranks)} within its deadline")
        if self.lower.stack is not None:
            self.lower.stack.tick()
        for chore in self._chores:
            chore()
        self.pump()
        self.health.tick()

    def pump(self) -> None:
        """Starts the moves between host memory and what lies below that can start now."""
        if (stack := self.lower.stack) is None:
            return
        if self.health.aside() is None:
            stack.pump()
        else:
            stack.stand_aside()

    @contextmanager
    def below(self) -> Iterator[Stack | None]:
        """What is below host memory, which nobody else uses meanwhile."""
        with self.lock:
            yield self.lower.stack

    def pools(self) -> dict[str, Pool]:
        """By tier, as far as the leader chooses slots."""
        return {"g2": self.pool} | self.lower.pools()

    def in_flight(self) -> tuple[int, int]:
        """(store, load) copies that some rank has not answered."""
        with self.lock:
            return self.copies.count()

    def channels(self) -> list[Link]:
        """What to watch beside a clock: when something arrives, `tick` is due at once. Empty where it can wait."""
        return [link for link in self.links.values() if link.open] if self.lower.stack is not None else []

    # ------------------------------------------------------------------ what lies below

    def attach(self, stack: Stack) -> bool:
        """There is something below host memory from now on. False: nobody wants it any more."""
        with self.lock:
            if self.health.ending or self.lower.isolated is not None:
                return False
            self.lower.attach(stack, cleared=self.pool.statistics().generation > 0)
        return True

    def tell_earlier(self) -> bool:
        """Tells what is below host memory of some blocks that were here before it. Whether there are more. To be called
        again and again: in between the engine goes on."""
        with self.lock:
            more = self.lower.tell_earlier()
            self.pump()
            return more

    def isolate(self, why: str) -> None:
        """From now on the content of the weights is not known: all that outlives this process or is shared with others
        stands aside until the engine is started anew. Host memory goes on."""
        with self.lock:
            self.lower.isolate(why)

    def drain(self, seconds: float) -> None:
        """Writes to what lasts what only host memory has, for so long at most, while the engine may go on."""
        begun = time.monotonic()
        with self.lock:
            tiers = self.lower.stack.drains() if self.lower.stack is not None else []
            if not tiers or seconds <= 0 or self.health.off is not None:
                return
            self.hear()
            for tier in tiers:
                tier.drain()
            self.pump()
        while not all(tier.drained for tier in tiers) and time.monotonic() - begun < seconds:
            if self.health.aside() is not None:
                break
            time.sleep(0.002)
            self.tick()
        for tier in tiers:
            with self.lock:
                total = self.pool.statistics().registered
                with self.pool.candidates(total) as hold:  # not what requests or writes still hold
                    mask = tier.covers(hold.keys)
                    there = 0 if mask is None else int(mask.sum())
            log.info(
                "KVBM: %d of %d blocks of host memory are on %s, after %.1f s",
                there, total, tier.words, time.monotonic() - begun,
            )  # fmt: skip

    # ------------------------------------------------------------------ operators, and the end

    def pause(self) -> None:
        """From now on the engine works as if KVBM were not there. Copies in flight end."""
        with self.lock:
            self.health.paused = True

    def resume(self) -> None:
        """Undoes `pause`, and ends a quarantine: what was stored before it stays gone."""
        with self.lock:
            self.health.resume()

    def clear(self) -> None:
        """A new generation: nothing stored so far is ever found again."""
        self.pool.clear()
        self.lower.clear()

    def drop_unsent(self) -> None:
        """Stores that no worker has begun are not made."""
        for number in self.copies.unsent(copy.id for copy in self.copies.stores()):
            self._drop(number, None)

    def turn_off(self, why: str) -> None:
        """Something raised what nobody expected, so nothing is certain. Until the engine is started anew nothing is
        matched, stored or moved, and nothing that is being copied is published. Any thread."""
        with self.lock:
            if self.health.turn_off(why) and self.lower.stack is not None:
                self.lower.stack.stand_aside()

    def quiesce(self, seconds: float) -> None:
        """Returns when the copies that are in flight now are over, or given up. After so many seconds, longer than any
        deadline, only those are left that no worker has begun, or that cannot be stopped: none of them begins any more
        and none counts. Where workers do not even answer that, KVBM is off."""
        with self.lock:
            copies = self.copies.ids()
        if not (left := self._await(copies, seconds)):
            return
        log.error("KVBM gave up %d copies that did not end within %.0f s of a reset", _count(left), seconds)
        for rank, numbers in left.items():
            try:
                self.links[rank].send(GiveUp(numbers))
            except Broken as error:  # it is noticed elsewhere that the worker is gone
                log.debug("KVBM: %s", error)
        if left := self._await(copies, GRACE):
            self.turn_off(f"off until the engine is started anew: {_count(left)} copies may go on after a reset")

    def _await(self, copies: set[int], seconds: float) -> dict[int, list[int]]:
        """Waits for copies, for so long at most. By rank, which of them it has not answered by then."""
        end = time.monotonic() + seconds
        while True:
            with self.lock:
                self.hear()
                there = [rank for rank, link in self.links.items() if link.open]
                left = {rank: numbers for rank in there if (numbers := self.copies.unanswered(copies, rank))}
            if not left or time.monotonic() >= end:
                return left
            time.sleep(0.001)

    def close(self) -> None:
        """Says goodbye to the workers. Blocks stay where they are; the process is about to end."""
        with self.lock:
            self.health.ending = True
            for link in self.links.values():
                if link.open:
                    try:
                        link.send(Bye())
                    except Broken as error:
                        log.debug("KVBM: %s", error)
                link.close()
            if self.lower.stack is not None:
                self.lower.stack.close()


def _count(left: Mapping[int, Sequence[int]]) -> int:
    return len({number for numbers in left.values() for number in numbers})
