"""What goes from host memory (G2) to a tier below it, and when. Under the leader's lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from kvbm.abc.policy import Admission, tags_of
from kvbm.blocks import Pinned, Pool
from kvbm.core.events import Copied
from kvbm.tiers.moves import Ended, Passage


class Budget:
    """`nbytes` that may be written in `seconds`, and saved up for as long. Unlimited where they are None."""

    def __init__(self, nbytes: float | None, seconds: float, clock: Callable[[], float]) -> None:
        self._rate, self._clock = None if nbytes is None else nbytes / seconds, clock
        self._left = self._most = nbytes or 0.0
        self._then = clock()

    def left(self) -> float:
        """Share of it that is left, at most 1; below a half only hot blocks are worth a write."""
        if self._rate is None:
            return 1.0
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._then) * self._rate)
        self._then = now
        return self._left / self._most

    def spend(self, nbytes: int) -> None:
        self._left -= nbytes


class Written(Protocol):
    """What a tier is to this: it can be written to."""

    @property
    def name(self) -> str:
        """What events call it."""

    @property
    def problem(self) -> str | None:
        """Why it is left alone."""

    def absent(self, keys: Sequence[bytes]) -> list[int]:
        """Positions of those that are neither there nor on their way there."""

    def write(self, blocks: Pinned, ended: Ended) -> int:
        """Begin to write the first of these, which the caller holds and which have one set of terms; how many of them
        (`blocks` are no others then)."""


class Rules(NamedTuple):
    """Which blocks are written to a tier, and how many at once. `hot` says which blocks are asked for again and again;
    it counts them, whatever `admission` does. With `exclusive` only what is about to leave G2 is written."""

    admission: Admission
    hot: Admission
    budget: Budget
    exclusive: bool
    block_bytes: int
    """Of a block over all ranks."""
    batch: int
    """Blocks in one move."""


class Demotion:
    """Copies what is new in G2 (write-through), or what is about to leave it (exclusive), as far as the rules and the
    bound on what is in flight (`most` blocks) allow. What leaves G2 before its write began is not written."""

    def __init__(
        self, tier: Written, g2: Pool, rules: Rules, *, most: Callable[[], int], emit: Callable[[Copied], None]
    ) -> None:
        self._tier, self._g2 = tier, g2
        self.rules = rules._replace(batch=max(1, rules.batch))
        self._in_flight_most, self._emit = most, emit
        self.queue: deque[Sequence[bytes]] = deque()
        self.queued: set[bytes] = set()
        """Blocks that wait to be written, run by run, and all of them."""
        self.in_flight = 0
        self._draining = False
        self.cancelled = self.refused = 0
        """Blocks that were gone before their write began; that admission, the budget or a full tier did not let pass,
        each time."""

    @property
    def _most(self) -> int:
        return max(1, self._in_flight_most())

    @property
    def _reserve(self) -> int:
        """Slots of G2 that exclusive demotion keeps free, so that what has to go was written before."""
        return max(1, min(self._g2.total // 8, 2 * self._most))

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing is being written."""
        return not self.queue and not self.in_flight

    def used(self, keys: Sequence[bytes]) -> None:
        """A request asked for these."""
        tags = tags_of(keys)
        self.rules.admission.use(tags)
        self.rules.hot.use(tags)
        if self._tier.problem is None:
            # What was not worth a write when it was new may be by now.
            near = self._g2.present(keys)
            self.offer([keys[at] for at in self._tier.absent(keys) if near[at]])

    def offer(self, keys: Sequence[bytes]) -> None:
        """These are in G2, in prompt order, and may not be in the tier."""
        new = [key for key in keys if key not in self.queued]
        if self.rules.exclusive or not new:
            return
        self.queue.append(new)
        self.queued.update(new)
        while len(self.queued) > self._g2.total:
            oldest = self.queue.popleft()
            self.queued.difference_update(oldest)
            self.cancelled += len(oldest)

    def clear(self) -> None:
        """A new generation: what waits is of the old one."""
        self.queue.clear()
        self.queued.clear()

    def drain(self) -> None:
        """From now on write all that G2 has and the tier does not, the hottest first, whatever admission says."""
        self.clear()
        self._draining = True
        with self._g2.candidates(self._g2.total) as hold:
            self.queue.extend(hold.keys[at : at + self.rules.batch] for at in range(0, len(hold), self.rules.batch))
            self.queued.update(hold.keys)

    def pump(self) -> None:
        """Start what may start now."""
        while self.queue and self._room() and self._tier.problem is None:
            keys, room = self.queue.popleft(), self._room()
            if later := keys[room:]:
                self.queue.appendleft(later)
            now = keys[:room]
            self.queued.difference_update(now)
            hold, _ = self._g2.scan(now)
            self.cancelled += len(now) - len(hold)
            with hold:
                self._write(hold)
        if self.rules.exclusive and not self._draining and self._tier.problem is None:
            self._make_room()

    def _room(self) -> int:
        return min(self.rules.batch, self._most - self.in_flight)

    def _make_room(self) -> None:
        """Exclusive: what would be evicted next is written before it has to go."""
        while (room := self._room()) > 0:
            wanted = self._reserve - self._g2.statistics().free - self.in_flight
            if wanted <= 0:
                return
            with self._g2.candidates(min(wanted, room)) as victims:
                if not self._write(victims, evict=True):
                    return

    def _write(self, hold: Pinned, *, evict: bool = False) -> bool:
        """Write what is worth it of these blocks, which the caller holds; false where nothing came of it.

        With `evict` they leave G2: when they are written, or now where they are not going to be.
        """
        wanted = self._worth(hold)
        keys, (priorities, left) = hold.keys, hold.terms
        changed = evict and len(wanted) < len(hold)
        if changed:
            kept = set(wanted)
            self._g2.discard([key for at, key in enumerate(keys) if at not in kept])
        runs: dict[tuple[int, float], list[bytes]] = {}  # each is staged on one set of terms
        for at in wanted:
            runs.setdefault((int(priorities[at]), float(left[at])), []).append(keys[at])
        for run in runs.values():
            started = self.start(run, evict=evict)
            changed |= started > 0
            if not evict:
                self.refused += len(run) - started
        return changed

    def start(self, keys: Sequence[bytes], *, evict: bool) -> int:
        """Begin to write these, as many as there is room for; returns how many."""
        hold, _ = self._g2.scan(keys)

        def ended(move: Passage) -> None:
            self.in_flight -= move.blocks
            if evict:
                hold.select(np.flatnonzero(move.done).tolist()).evict()
            else:
                hold.drop()
            failed = int((~move.done).sum())
            self._emit(Copied("g2", self._tier.name, move.blocks - failed, failed, move.nbytes, move.seconds))

        if not (count := self._tier.write(hold, ended)):
            hold.drop()
        self.in_flight += count
        self.rules.budget.spend(count * self.rules.block_bytes)
        return count

    def _worth(self, hold: Pinned) -> list[int]:
        """Positions of the blocks that the tier does not have and should."""
        absent = self._tier.absent(hold.keys)
        if self._draining or not absent:
            return absent
        missing = np.zeros(len(hold), np.bool_)
        missing[absent] = True
        tags = tags_of(hold.keys)
        mask = self.rules.admission.admit(tags, ~missing) & missing
        left = self.rules.budget.left()
        if left < 0.5:
            mask &= self.rules.hot.admit(tags, ~missing)
        if left <= 0:
            mask[:] = False
        self.refused += int(missing.sum() - mask.sum())
        return [int(at) for at in np.flatnonzero(mask)]
