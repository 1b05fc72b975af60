"""The disk tier (G3) as the leader sees it: which block is in which slot, what is being moved, and whether it works.

Under the leader's lock. Bytes are moved by the workers, each its own file; they answer over the channel.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import ClassVar

import numpy as np

from kvbm.blocks import Pinned, Pool, Staged, Writable
from kvbm.core.errors import Broken
from kvbm.core.outcome import Outcome
from kvbm.core.region import Slots
from kvbm.link.channel import Link
from kvbm.link.messages import Result, pack
from kvbm.stores.disk.recovery import Recovered
from kvbm.tiers.breaker import Breaker
from kvbm.tiers.disk.adopt import adopt
from kvbm.tiers.disk.folder import Chores, Generations
from kvbm.tiers.disk.orders import TIER, Forget, Generation, Order, Probe, Probed, Read, Write, decode_answer, to_rank
from kvbm.tiers.gate import Gate
from kvbm.tiers.moves import Ended, Moves, Passage

log = logging.getLogger(__name__)

_CLEARING = "a new generation is being written down"
_FAILURES = 3
"""So many moves in a row that failed in one direction, and the tier is left alone until it answers a probe."""
_WATCH_EVERY = 5.0
"""Seconds between probes of a disk that works: files that were deleted can be written for ever."""
_PROBE_EVERY = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds before each probe; the last goes on."""


class Probes:
    """The last question whether the disk works. Every rank answers it once."""

    def __init__(self) -> None:
        self._number = 0
        self._answers: dict[int, Probed] = {}

    def ask(self, *, reopen: bool) -> Probe:
        """A new question: answers to earlier ones count no more."""
        self._number += 1
        self._answers.clear()
        return Probe(reopen, self._number)

    def take(self, answer: Probed, ranks: int) -> list[Probed] | None:
        """Takes one rank's answer; those of all `ranks` once the last has come."""
        if answer.number != self._number:
            return None
        self._answers[answer.rank] = answer
        if len(self._answers) < ranks:
            return None
        self._number += 1  # what comes now has come twice
        return list(self._answers.values())


class DiskTier:
    """`sequence` numbers the next block that is written: higher than that of any block on disk."""

    name: ClassVar[str] = TIER

    def __init__(
        self,
        pool: Pool,
        links: Mapping[int, Link],
        generations: Generations,
        gate: Gate,
        *,
        sequence: int,
        patience: float,
        next_id: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pool, self.gate, self.clock = pool, gate, clock
        self.corrupt = 0
        """Blocks that were read and were not what had been written."""
        self.chores = Chores()
        self._generations, self._sequence = generations, sequence
        self.moves = Moves(links, next_id, clock, patience=patience, judge=self._judge)
        self._breaker = Breaker(_PROBE_EVERY, clock, most=_FAILURES, watch=_WATCH_EVERY)
        """Reads and writes fail each for itself: where nothing can be written any more, reads may go well for long."""
        self._lost = False
        """Whether the files were made anew and have not been looked into."""
        self._probes = Probes()

    @property
    def problem(self) -> str | None:
        """Why it is left alone; None while it works."""
        return self._breaker.problem

    # ------------------------------------------------------------------ moving

    def absent(self, keys: Sequence[bytes]) -> list[int]:
        """See `demote.Written`."""
        return self.pool.absent(keys)

    def write(self, hold: Pinned, ended: Ended) -> int:
        """See `demote.Written`."""
        now = self.pool.statistics()
        room = min(len(hold), now.free + now.inactive)
        if (raw := self.pool.allocate(room) if room else None) is None:
            return 0
        hold.narrow(room)
        keys, parents = hold.keys, hold.parents
        priorities, left = hold.terms
        ttl = None if left[0] == np.inf else max(float(left[0]), 1e-3)
        staged = raw.stage(keys, parent=parents, priority=int(priorities[0]), ttl=ttl)

        def there(passage: Passage) -> None:
            staged.register(passage.done).drop()
            ended(passage)

        move = self.moves.write(len(keys), there)
        self._order(
            Write(
                move.id, pack(hold.slots), pack(staged.slots), list(keys), list(parents),
                priorities.astype(np.int32).tobytes(), (time.time() + left).tobytes(), self._sequence,
                self._generations.number,
            )
        )  # fmt: skip
        self._sequence += len(keys)
        return len(keys)

    def read(self, source: Slots, keys: Sequence[bytes], into: Staged | Writable, ended: Ended) -> int:
        """Copy slots to those of host memory, both of which the caller holds; returns the move's number."""
        move = self.moves.read(len(keys), ended, self.gate)
        self._order(Read(move.id, pack(source), pack(into.slots), list(keys)))
        return move.id

    def cancel(self, jobs: Collection[int]) -> None:
        """Nobody wants these any more. They end all the same."""
        self.moves.cancel(jobs)

    def in_flight(self) -> tuple[int, int]:
        """Passages (down, up) that some rank has not answered."""
        return self.moves.count()

    # ------------------------------------------------------------------ answers

    def answer(self, result: Result) -> bool:
        """Takes one rank's result; False where it is about no passage of this tier."""
        return self.moves.answer(result)

    def _judge(self, passage: Passage) -> None:
        self.corrupt += int((passage.outcomes == Outcome.CORRUPT).sum())
        if not (passage.outcomes >= Outcome.FAILED).any():
            self._breaker.worked(passage.down)
        elif passage.wanted:
            log.warning("KVBM: %s disk failed: %s", "writing to" if passage.down else "reading from", passage.error)
            if self._breaker.failed(passage.down):
                self.fail(passage.error or "moves fail")

    def fail(self, problem: str) -> None:
        """Leave the tier alone until a probe says that it works."""
        if not self.left and self._breaker.trip(problem):
            log.error("KVBM: the disk tier (G3) is left alone, the engine goes on without it: %s", problem)

    def leave(self, why: str) -> None:
        """Leave the tier alone for good: nothing that is being moved counts. A new generation is still written down."""
        self.moves.leave()
        self._breaker.trip(why)

    @property
    def left(self) -> bool:
        """Whether it is left alone for good."""
        return self.moves.left

    def tick(self) -> None:
        """A few times a second: notices silent workers, tries whether a broken disk works again."""
        for problem in self.chores.end():
            if not self.left:
                self._breaker.trip(problem)
        if self.left and not self.clearing:
            return
        if self.problem is None and self.moves.late():
            self.fail("no answer about a move within its deadline")
        elif (self.problem is None or not self.chores.busy) and self._breaker.due():
            if self.clearing:
                self._renew()
            else:
                self._order(self._probes.ask(reopen=False))

    def hear(self, body: bytes) -> None:
        """One rank's answer to a probe. When all are well a tier that was left alone is used again."""
        answer = decode_answer(body)
        if self.clearing or self.left:
            return
        if (answers := self._probes.take(answer, len(self.moves.links))) is None:
            return
        problems = [f"rank {each.rank}: {each.problem}" for each in answers if each.problem]
        if problems:
            self.fail(problems[0])
            if self.moves.count() == (0, 0) and not self.chores.busy:
                self.chores.do(self._restore)
        elif self._lost:
            self.chores.do(self._recover)
        elif self.problem is not None:
            self._resume()

    def _restore(self) -> Callable[[], None]:
        self._generations.folder.restore()
        return self._restored

    def _restored(self) -> None:
        """The files are there again, whatever is in them."""
        self.pool.clear()
        self._lost = True
        self._order(self._probes.ask(reopen=True))

    def _recover(self) -> Callable[[], None]:
        found = self._generations.folder.recover()
        return lambda: self._recovered(found)

    def _recovered(self, found: Recovered) -> None:
        if self.clearing or self.left:  # found before the generation ended, say
            return
        adopt(self.pool, found)
        self._lost = False
        self._resume()

    def _resume(self) -> None:
        self._breaker.mend()
        self.gate.forget_reads()
        self.moves.wait_again()
        log.warning("KVBM: the disk tier (G3) works again and holds %d blocks", self.pool.statistics().registered)

    # ------------------------------------------------------------------ un-publishing

    def discard(self, keys: Sequence[bytes]) -> None:
        """These are not to be served, also not after a restart."""
        hold, _ = self.pool.scan(list(dict.fromkeys(keys)))
        if len(hold):
            self._order(Forget(pack(hold.slots), list(hold.keys)))
        self.pool.discard(hold.keys)
        hold.drop()

    def clear(self, *, lasting: bool = True) -> None:
        """A new generation: nothing on disk is served any more. With `lasting` False nothing that is written from now
        on outlives the process: the weights may no longer be those of the namespace."""
        if self._generations.lasting and not lasting:
            log.warning("KVBM: after a reset KVBM serves newly written blocks on disk only until the engine ends")
        self._generations.lasting &= lasting
        self.pool.clear()
        self.moves.cancel_all()
        if not self.clearing:  # else that has not happened yet, and nothing was written since
            self._renew()

    def _renew(self) -> None:
        """Write the new generation down. Until that is done the tier is not used, or a restart would serve the old."""
        now = self._generations
        now.stale = True
        if self.problem is None:
            self._breaker.trip(_CLEARING)

        def clear() -> Callable[[], None]:
            lasting = now.lasting
            number = now.folder.clear(lasting=lasting)
            return lambda: self._renewed(number, lasting)

        self.chores.do(clear)

    def _renewed(self, number: int, lasting: bool) -> None:
        if lasting and not self._generations.lasting:
            self._renew()
            return
        self._generations.number, self._generations.stale = number, False
        self._order(Generation(number))
        if self.problem == _CLEARING:  # else a probe has to say that it works
            self._breaker.mend()

    @property
    def clearing(self) -> bool:
        """Whether a new generation has not been written down yet."""
        return self._generations.stale

    def close(self) -> None:
        """The process is about to end."""
        self.chores.close()
        folder = self._generations.folder
        if self.clearing:
            try:
                folder.clear(lasting=self._generations.lasting)
            except Broken as error:
                log.error("KVBM: a restart may find blocks from before the last reset on disk: %s", error)
        folder.close()

    def _order(self, order: Order) -> None:
        self.moves.tell(to_rank(order))
