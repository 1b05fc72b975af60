"""Which runs are to be written to shared storage, and when. Under the leader's lock.

A run is written from host memory once all its blocks are there, in however many steps or turns they came: when its last
block lands, the others are found through their parents. Where one is gone, the run waits for the next request that has
it there, and nothing behind it in that prompt is written before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from kvbm.blocks import Pinned, Pool
from kvbm.core.events import Copied
from kvbm.tiers.demote import Budget
from kvbm.tiers.moves import Ended, Passage
from kvbm.tiers.tier import Mask, Record

Admission = Literal["all", "second-use", "evicted"]
"""Which runs are written: all, those that were asked for before, those that are about to leave host memory."""


class Candidate(NamedTuple):
    """A run: its keys, the key before the first, and which block of its prompt that is."""

    keys: tuple[bytes, ...]
    parent: bytes | None
    place: int


class Shelf(Protocol):
    """Where runs go."""

    @property
    def name(self) -> str:
        """What events call it."""

    @property
    def writes(self) -> bool:
        """Whether anything may be written there now."""

    def known(self, ends: Sequence[bytes]) -> Mask:
        """Which of the runs that end with these keys are there, as far as is known."""

    def put(self, run: Candidate, blocks: Pinned, ended: Ended) -> bool:
        """Begin to write it; the caller holds the blocks. False: it cannot be."""


class UploadRules(NamedTuple):
    """`run` blocks of `run_bytes` make a run. At most `in_flight` runs are being written, and `most` wait; of more, the
    last are not written."""

    admission: Admission
    budget: Budget
    run: int
    run_bytes: int
    in_flight: int
    most: int


class Uploads:
    """What goes from host memory to a shelf, by these rules."""

    def __init__(self, shelf: Shelf, g2: Pool, rules: UploadRules, emit: Callable[[Copied], None]) -> None:
        self._shelf, self._g2, self._rules, self._emit = shelf, g2, rules, emit
        self._queue: OrderedDict[bytes, Candidate] = OrderedDict()
        """What waits to be written, by last key."""
        self._writing: set[bytes] = set()
        self._noted: OrderedDict[bytes, int] = OrderedDict()
        """Last keys of runs that admission needs to remember: with `evicted` which block of its prompt each is."""
        self.refused = self.cancelled = 0
        """Runs that the budget or the length of the queue did not let pass; that had lost a block before their write
        began."""

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing is being written."""
        return not self._queue and not self._writing

    @property
    def waiting(self) -> int:
        """Runs that wait to be written."""
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        """Runs that are being written."""
        return len(self._writing)

    def clear(self) -> None:
        """What waits is not wanted any more."""
        self._queue.clear()
        self._noted.clear()

    # ------------------------------------------------------------------ what may be written

    def landed(self, keys: Sequence[bytes], places: Sequence[int]) -> None:
        """These are in host memory from now on, and are those blocks of their prompts."""
        for key, place in zip(keys, places, strict=True):
            if (place + 1) % self._rules.run:
                continue
            if self._rules.admission == "evicted":
                self._note(key, place)
            elif self._rules.admission == "all" and not self._knows(key):
                self._consider(key, place)

    def _consider(self, end: bytes, place: int) -> None:
        """Queues the run that ends with this block, block `place` of its prompt, if host memory has it and what is
        before it is written before."""
        if (run := self._chain(end, place)) is not None and (run.parent is None or self._knows(run.parent)):
            self._add(run)

    def _chain(self, end: bytes, place: int) -> Candidate | None:
        """The run, as far as host memory has all of it."""
        keys, key = list[bytes](), end
        for left in reversed(range(self._rules.run)):
            block = self._g2.look(key)
            if block is None or (block.parent is None and (left or place >= self._rules.run)):
                return None
            keys.append(key)
            key = block.parent or b""
        return Candidate(tuple(reversed(keys)), key or None, place - self._rules.run + 1)

    def _knows(self, end: bytes) -> bool:
        return end in self._queue or end in self._writing or bool(self._shelf.known([end])[0])

    def _add(self, run: Candidate) -> None:
        if len(self._queue) < self._rules.most:
            self._queue[run.keys[-1]] = run
        else:
            self.refused += 1

    def _note(self, end: bytes, place: int = 0) -> bool:
        """Whether it is known by now that this run was asked for, or where it is."""
        known = end in self._noted
        self._noted[end] = place
        self._noted.move_to_end(end)
        if len(self._noted) > max(self._rules.most, self._g2.total):
            self._noted.popitem(last=False)
        return known

    def over(self, keys: Sequence[bytes], record: Record) -> None:
        """A request ended. `keys` are those of its first blocks; what was not written of them may be whole now."""
        if self._rules.admission == "evicted":
            return
        if len(keys) < self._rules.run:
            record.note(f"KVBM writes {self._rules.run} blocks at once to shared storage, and the request filled fewer")
        ends = keys[self._rules.run - 1 :: self._rules.run]
        for at, (end, there) in enumerate(zip(ends, self._shelf.known(ends).tolist(), strict=True)):
            if there or end in self._queue or end in self._writing:
                continue
            if self._rules.admission == "second-use" and not self._note(end):
                continue
            first = at * self._rules.run
            run = tuple(keys[first : first + self._rules.run])
            if not self._g2.present(run).all():
                return  # nothing behind it is written before
            if any((block := self._g2.look(key)) is not None and block.expires is not None for key in run):
                record.note("KVBM wrote none of the blocks to shared storage: they have a time to live")
                return
            self._add(Candidate(run, keys[first - 1] if first else None, first))

    # ------------------------------------------------------------------ writing

    def pump(self) -> None:
        """Start what may start now."""
        if self._rules.admission == "evicted" and self._shelf.writes:
            self._take_leaving()
        while self._queue and len(self._writing) < self._rules.in_flight and self._shelf.writes:
            end, run = self._queue.popitem(last=False)
            if self._shelf.known([end])[0]:
                continue
            if not (run.parent is None or self._knows(run.parent) or self._rules.admission == "evicted"):
                continue  # what is before it will not be there, and nobody would find it; what leaves is a leaf first
            if self._rules.budget.left() <= 0:
                self.refused += 1
                continue
            self._write(end, run)

    def _write(self, end: bytes, run: Candidate) -> None:
        hold, _ = self._g2.scan(run.keys)
        lost = len(hold) < len(run.keys)
        self.cancelled += lost
        if lost or np.isfinite(hold.terms[1]).any():  # what has a time to live would outlive it
            hold.drop()
            return

        def ended(move: Passage) -> None:
            self._writing.discard(end)
            if self._rules.admission == "evicted":
                hold.evict()
            else:
                hold.drop()
            failed = int((~move.done).sum())
            self._emit(Copied("g2", self._shelf.name, move.blocks - failed, failed, move.nbytes, move.seconds))

        if not self._shelf.put(run, hold, ended):
            hold.drop()
            return
        self._writing.add(end)
        self._rules.budget.spend(self._rules.run_bytes)

    def _take_leaving(self) -> None:
        """What would be evicted next is written before it has to go."""
        reserve = max(1, min(self._g2.total // 8, 2 * self._rules.in_flight * self._rules.run))
        wanted = reserve - self._g2.statistics().free - self._rules.run * (len(self._writing) + len(self._queue))
        if wanted <= 0:
            return
        with self._g2.candidates(wanted) as victims:
            coming = set[bytes]()
            for key in victims.keys:
                waits = key in self._noted and not self._knows(key)
                if waits and (run := self._chain(key, self._noted[key])) is not None:
                    self._add(run)
                    coming.update(run.keys)
            # The others leave now: they are there, or are not going to be.
            victims.select([at for at, key in enumerate(victims.keys) if key not in coming]).evict()
