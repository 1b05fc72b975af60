"""The disk tier (G3) as the leader sees it: which block is in which slot, what is being moved, and whether it works.

Under the leader's lock. Bytes are moved by the workers, each its own file; they answer over the channel.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ClassVar, Protocol

import numpy as np

from kvbm.blocks import Pinned, Pool, Staged, Writable
from kvbm.core.errors import Broken, KvbmError
from kvbm.core.events import Fetched, Promoted
from kvbm.core.outcome import Outcome
from kvbm.core.region import Slots
from kvbm.link.channel import Link
from kvbm.link.messages import Cancel, Forget, Generation, Message, Probe, Probed, Read, Result, Write, pack
from kvbm.stores.disk.recovery import Recovered
from kvbm.tiers.disk.adopt import adopt
from kvbm.tiers.gate import Gate
from kvbm.tiers.moves import CANCELLED, Move

_SUSPECTS = 10_000
"""Blocks whose last read failed, that are remembered: the second time in a row a block counts as lost."""
_NOT_IT = (Outcome.CORRUPT, Outcome.MISSING)

log = logging.getLogger(__name__)

_CLEARING = "a new generation is being written down"
_FAILURES = 3
"""So many moves in a row that failed in one direction, and the tier is left alone until it answers a probe."""
_WATCH_EVERY = 5.0
"""Seconds between probes of a disk that works: files that were deleted can be written for ever."""
_PROBE_EVERY = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds before each probe; the last goes on."""


class Durable(Protocol):
    """What the leader needs of the folder on disk. Calls may wait for the disk, and raise Broken."""

    def clear(self, *, lasting: bool = True) -> int:
        """Begin a new generation and return its number. One that is not `lasting` ends with the process."""

    def restore(self) -> None:
        """Make again what was deleted or cut."""

    def recover(self) -> Recovered:
        """The blocks that are there."""

    def close(self) -> None:
        """Let others have it."""


class DiskTier:
    """`sequence` numbers the next block that is written: higher than that of any block on disk."""

    def __init__(
        self,
        pool: Pool,
        links: Mapping[int, Link],
        folder: Durable,
        gate: Gate,
        *,
        generation: int,
        sequence: int,
        patience: float,
        next_id: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pool, self.gate = pool, gate
        self.problem: str | None = None
        """Why it is left alone; None while it works."""
        self.corrupt = 0
        """Blocks that were read and were not what had been written."""
        self._links, self._folder, self._clock = links, folder, clock
        self._generation, self._sequence = generation, sequence
        self._patience, self._next_id = patience, next_id
        self._moves: dict[int, Move] = {}
        self._failures = [0, 0]
        """In a row: reads, writes."""
        self._stale = False
        """Whether a new generation has not been written down yet."""
        self._lasting = True
        """Whether another process may find what is written."""
        self._left = False
        """Whether it is left alone for good."""
        self._lost = False
        """Whether the files were made anew and have not been looked into."""
        self._chores = ThreadPoolExecutor(1, "kvbm-folder")
        self._waited: deque[Future[Callable[[], None]]] = deque()
        self._probes, self._next_probe = 0, clock() + _WATCH_EVERY
        self._asked = 0
        self._probed: dict[int, Probed] = {}

    # ------------------------------------------------------------------ moving

    def write(self, hold: Pinned, staged: Staged, ended: Callable[[Move], None]) -> None:
        """Copy the held blocks of host memory to the staged slots. Both stay the caller's."""
        keys, parents = hold.keys, hold.parents
        priorities, left = hold.terms
        move = self._begin(len(keys), ended, down=True)
        self._send(
            Write(
                move.id, pack(hold.slots), pack(staged.slots), list(keys), list(parents),
                priorities.astype(np.int32).tobytes(), (time.time() + left).tobytes(), self._sequence,
                self._generation,
            )
        )  # fmt: skip
        self._sequence += len(keys)

    def read(self, source: Slots, keys: Sequence[bytes], into: Staged | Writable, ended: Callable[[Move], None]) -> int:
        """Copy slots to those of host memory, both of which the caller holds; returns the move's number."""
        move = self._begin(len(keys), ended, down=False)
        self.gate.read_begins(len(keys))
        self._send(Read(move.id, pack(source), pack(into.slots), list(keys)))
        return move.id

    def _begin(self, blocks: int, ended: Callable[[Move], None], *, down: bool) -> Move:
        move = Move(
            id=self._next_id(), ranks=set(self._links), blocks=blocks, patience=self._patience, down=down, ended=ended
        )
        move.due = self._clock() + self._patience
        self._moves[move.id] = move
        return move

    def cancel(self, jobs: Collection[int]) -> None:
        """Nobody wants these any more. They end all the same."""
        live = [job for job in sorted(jobs) if (move := self._moves.get(job)) is not None and move.wanted]
        for job in live:
            self._moves[job].wanted = False
        if live:
            self._send(Cancel(live))

    def in_flight(self) -> tuple[int, int]:
        """Moves (down, up) that some rank has not answered."""
        down = sum(move.down for move in self._moves.values())
        return down, len(self._moves) - down

    # ------------------------------------------------------------------ answers

    def answer(self, result: Result) -> bool:
        """Takes one rank's result; False where it is about no move of this tier."""
        move = self._moves.get(result.job)
        if move is None:
            return False
        if move.answer(result):
            del self._moves[move.id]
            move.wanted &= move.error != CANCELLED
            self.corrupt += int((move.outcomes == Outcome.CORRUPT).sum())
            if self._left:
                move.outcomes[:] = Outcome.FAILED
            if not move.down:
                self.gate.read_ends(move.blocks, int((move.outcomes < Outcome.FAILED).sum()))
            self._judge(move)
            move.ended(move)
        return True

    def _judge(self, move: Move) -> None:
        if not (move.outcomes >= Outcome.FAILED).any():
            self._failures[move.down] = 0
        elif move.wanted:
            # Each for itself: where nothing can be written any more, reads may go well for long.
            self._failures[move.down] += 1
            log.warning("KVBM: %s disk failed: %s", "writing to" if move.down else "reading from", move.error)
            if self._failures[move.down] >= _FAILURES:
                self.fail(move.error or "moves fail")

    def fail(self, problem: str) -> None:
        """Leave the tier alone until a probe says that it works."""
        if self._left:
            return
        if self.problem is None:
            log.error("KVBM: the disk tier (G3) is left alone, the engine goes on without it: %s", problem)
            self._probes, self._next_probe = 0, self._clock() + _PROBE_EVERY[0]
        self.problem = problem

    def leave(self, why: str) -> None:
        """Leave the tier alone for good: nothing that is being moved counts. A new generation is still written down."""
        self.cancel(list(self._moves))
        self.problem, self._left = why, True

    @property
    def left(self) -> bool:
        """Whether it is left alone for good."""
        return self._left

    def tick(self) -> None:
        """A few times a second: notices silent workers, tries whether a broken disk works again."""
        now = self._clock()
        while self._waited and self._waited[0].done():
            try:
                self._waited.popleft().result()()
            except KvbmError as error:
                if not self._left:
                    self.problem = str(error)
        if self._left and not self._stale:
            return
        if self.problem is None:
            if any(move.due is not None and now > move.due for move in self._moves.values()):
                self.fail("no answer about a move within its deadline")
            elif now >= self._next_probe:
                self._next_probe = now + _WATCH_EVERY
                self._ask()
        elif now >= self._next_probe and not self._waited:
            self._probes += 1
            self._next_probe = now + _PROBE_EVERY[min(self._probes, len(_PROBE_EVERY) - 1)]
            if self._stale:
                self._renew()
            else:
                self._ask()

    def _do(self, call: Callable[[], Callable[[], None]]) -> None:
        """Have `call` wait for the disk on a thread of its own; what it returns is called under the lock."""
        self._waited.append(self._chores.submit(call))

    def _ask(self, *, reopen: bool = False) -> None:
        self._asked += 1
        self._probed.clear()
        self._send(Probe(reopen, self._asked))

    def probed(self, answer: Probed) -> None:
        """One rank's answer to a probe. When all are well a tier that was left alone is used again."""
        if answer.number != self._asked or self._stale or self._left:
            return
        self._probed[answer.rank] = answer
        if len(self._probed) < len(self._links):
            return
        self._asked += 1  # what comes now has come twice
        problems = [f"rank {each.rank}: {each.problem}" for each in self._probed.values() if each.problem]
        if problems:
            self.fail(problems[0])
            if not self._moves and not self._waited:
                self._do(self._restore)
        elif self._lost:
            self._do(self._recover)
        elif self.problem is not None:
            self._resume()

    def _restore(self) -> Callable[[], None]:
        self._folder.restore()
        return self._restored

    def _restored(self) -> None:
        """The files are there again, whatever is in them."""
        self.pool.clear()
        self._lost = True
        self._ask(reopen=True)

    def _recover(self) -> Callable[[], None]:
        found = self._folder.recover()
        return lambda: self._recovered(found)

    def _recovered(self, found: Recovered) -> None:
        if self._stale or self._left:  # found before the generation ended, say
            return
        adopt(self.pool, found)
        self._lost = False
        self._resume()

    def _resume(self) -> None:
        self.problem, self._failures = None, [0, 0]
        self.gate.forget_reads()
        for move in self._moves.values():
            move.due = self._clock() + self._patience
        log.warning("KVBM: the disk tier (G3) works again and holds %d blocks", self.pool.statistics().registered)

    # ------------------------------------------------------------------ un-publishing

    def discard(self, keys: Sequence[bytes]) -> None:
        """These are not to be served, also not after a restart."""
        hold, _ = self.pool.scan(list(dict.fromkeys(keys)))
        if len(hold):
            self._send(Forget(pack(hold.slots), list(hold.keys)))
        self.pool.discard(hold.keys)
        hold.drop()

    def clear(self, *, lasting: bool = True) -> None:
        """A new generation: nothing on disk is served any more. With `lasting` False nothing that is written from now
        on outlives the process: the weights may no longer be those of the namespace."""
        if self._lasting and not lasting:
            log.warning("KVBM: a reset: what is written to disk from now on is served until the engine ends, no longer")
        self._lasting &= lasting
        self.pool.clear()
        self.cancel(list(self._moves))
        if not self._stale:  # else that has not happened yet, and nothing was written since
            self._renew()

    def _renew(self) -> None:
        """Write the new generation down. Until that is done the tier is not used, or a restart would serve the old."""
        self._stale = True
        if self.problem is None:
            self.problem = _CLEARING
            self._next_probe = self._clock() + _PROBE_EVERY[0]

        def clear() -> Callable[[], None]:
            lasting = self._lasting
            number = self._folder.clear(lasting=lasting)
            return lambda: self._renewed(number, lasting)

        self._do(clear)

    def _renewed(self, number: int, lasting: bool) -> None:
        if lasting and not self._lasting:
            self._renew()
            return
        self._generation, self._stale = number, False
        self._send(Generation(number))
        if self.problem == _CLEARING:  # else a probe has to say that it works
            self.problem = None

    @property
    def clearing(self) -> bool:
        """Whether a new generation has not been written down yet."""
        return self._stale

    def close(self) -> None:
        """The process is about to end."""
        self._chores.shutdown(wait=False, cancel_futures=True)
        if self._stale:
            try:
                self._folder.clear(lasting=self._lasting)
            except Broken as error:
                log.error("KVBM: a restart may find blocks from before the last reset on disk: %s", error)
        self._folder.close()

    def _send(self, message: Message) -> None:
        for link in self._links.values():
            try:
                link.send(message)
            except Broken as error:  # the leader notices when it looks for results
                log.debug("KVBM: %s", error)


class DiskSource:
    """The disk tier. With `exclusive` a block is there no more once it is in host memory."""

    name: ClassVar[str] = "disk"
    tier: ClassVar[str] = "g3"
    event: ClassVar[type[Promoted] | type[Fetched]] = Promoted

    def __init__(self, tier: DiskTier, *, exclusive: bool) -> None:
        self._tier, self._exclusive = tier, exclusive
        self.gate, self.pool, self.keep = tier.gate, tier.pool, True
        self._suspects: set[bytes] = set()

    @property
    def problem(self) -> str | None:
        return self._tier.problem

    def read(self, slots: Slots, into: Staged, ended: Callable[[Move], None]) -> int:
        return self._tier.read(slots, into.keys, into, ended)

    def cancel(self, jobs: Collection[int]) -> None:
        self._tier.cancel(jobs)

    def arrived(self, blocks: Pinned) -> None:
        if self._exclusive:
            self.pool.discard(blocks.keys)

    def judge(self, keys: Sequence[bytes], slots: Slots, move: Move) -> None:
        """What is not what was written is lost at once; what could not be read, the second time."""
        lost: dict[bytes, int] = {}
        for key, slot, outcome in zip(keys, slots.tolist(), move.outcomes.tolist(), strict=True):
            if outcome in _NOT_IT or (outcome != Outcome.DONE and move.wanted and key in self._suspects):
                lost[key] = slot
            elif outcome != Outcome.DONE and move.wanted and len(self._suspects) < _SUSPECTS:
                self._suspects.add(key)
            elif outcome == Outcome.DONE:
                self._suspects.discard(key)
        self._suspects.difference_update(lost)
        # Not what was written since, in another generation: that lies elsewhere, for this slot is still held.
        there = [key for key, slot in lost.items() if (block := self.pool.look(key)) and block.slot == slot]
        if there:
            self._tier.discard(there)
