"""What goes from host memory (G2) to disk (G3), and when. Under the leader's lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from kvbm.abc.policy import Admission, Tags
from kvbm.blocks import Pinned, Pool
from kvbm.core.events import Demoted
from kvbm.manager.disk import DiskTier, Move


class Budget:
    """Bytes that may be written: `per_second` of them, saved up for an hour at most. Unlimited where it is None."""

    _HOUR = 3600.0

    def __init__(self, per_second: float | None, clock: Callable[[], float]) -> None:
        self._rate, self._clock = per_second, clock
        self._left = self._most = (per_second or 0.0) * self._HOUR
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


class Demotion:
    """Copies what is new in G2 (write-through), or what is about to leave it (exclusive), as far as admission, budget
    and the bound on what is in flight allow. What leaves G2 before its write began is not written.

    `hot` says which blocks are asked for again and again; it counts them, whatever `admission` does.
    """

    def __init__(
        self,
        tier: DiskTier,
        g2: Pool,
        *,
        admission: Admission,
        hot: Admission,
        exclusive: bool,
        budget: Budget,
        block_bytes: int,
        most: int,
        batch: int,
        emit: Callable[[Demoted], None],
    ) -> None:
        self._tier, self._g2 = tier, g2
        self._admission, self._hot, self._budget = admission, hot, budget
        self._exclusive, self._block_bytes = exclusive, block_bytes
        self._most, self._batch = max(1, most), max(1, min(batch, most))
        self._reserve = max(1, min(g2.statistics().total // 8, 2 * self._most))
        """Slots of G2 that exclusive demotion keeps free, so that what has to go was written before."""
        self._emit = emit
        self._queue: deque[Sequence[bytes]] = deque()
        self._queued = self._in_flight = 0
        self._draining = False
        self.cancelled = self.refused = 0
        """Blocks that were gone before their write began; that admission or the budget did not let pass."""

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing is being written."""
        return not self._queue and not self._in_flight

    def used(self, keys: Sequence[bytes]) -> None:
        """A request asked for these."""
        tags = _tags(keys)
        self._admission.use(tags)
        self._hot.use(tags)

    def offer(self, keys: Sequence[bytes]) -> None:
        """These are new in G2, in prompt order."""
        if not self._exclusive and len(keys):
            self._queue.append(keys)
            self._queued += len(keys)
            while self._queued > self._g2.statistics().total:
                self._drop_oldest()

    def _drop_oldest(self) -> None:
        gone = len(self._queue.popleft())
        self._queued -= gone
        self.cancelled += gone

    def clear(self) -> None:
        """A new generation: what waits is of the old one."""
        self._queue.clear()
        self._queued = 0

    def drain(self) -> None:
        """From now on write all that G2 has and the disk does not, the hottest first, whatever admission says."""
        self.clear()
        self._draining = True
        with self._g2.candidates(self._g2.statistics().total) as hold:
            self._queue.extend(hold.keys[at : at + self._batch] for at in range(0, len(hold), self._batch))
        self._queued = sum(map(len, self._queue))

    def pump(self) -> None:
        """Start what may start now."""
        while self._queue and self._room() and self._tier.problem is None:
            keys = self._queue.popleft()
            now, later = keys[: self._room()], keys[self._room() :]
            if later:
                self._queue.appendleft(later)
            self._queued -= len(now)
            hold, _ = self._g2.scan(list(dict.fromkeys(now)))
            self.cancelled += len(now) - len(hold)
            with hold:
                self._write(hold)
        if self._exclusive and not self._draining and self._tier.problem is None:
            self._make_room()

    def _room(self) -> int:
        return min(self._batch, self._most - self._in_flight)

    def _make_room(self) -> None:
        """Exclusive: what would be evicted next is written before it has to go."""
        while (room := self._room()) > 0:
            wanted = self._reserve - self._g2.statistics().free - self._in_flight
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
        if evict and len(wanted) < len(hold):
            self._g2.discard(set(hold.keys) - {hold.keys[at] for at in wanted})
        priorities, left = hold.terms
        started = evict and len(wanted) < len(hold)
        while wanted:  # a run is staged on one set of terms
            first = wanted[0]
            same = [at for at in wanted if priorities[at] == priorities[first] and left[at] == left[first]]
            wanted = [at for at in wanted if at not in same] if len(same) < len(wanted) else []
            if not self._start([hold.keys[at] for at in same], int(priorities[first]), float(left[first]), evict=evict):
                return started
            started = True
        return started

    def _start(self, keys: Sequence[bytes], priority: int, left: float, *, evict: bool) -> bool:
        pool = self._tier.pool
        now = pool.statistics()
        raw = pool.allocate(min(len(keys), now.free + now.inactive)) if now.free + now.inactive else None
        if raw is None:
            return False
        hold, _ = self._g2.scan(keys[: len(raw)])
        ttl = None if left == np.inf else max(left, 1e-3)
        staged = raw.stage(hold.keys, parent=hold.parents, priority=priority, ttl=ttl)
        self._in_flight += len(hold)
        self._budget.spend(len(hold) * self._block_bytes)

        def ended(move: Move) -> None:
            self._in_flight -= move.blocks
            staged.register(move.done).drop()
            if evict:
                hold.select(np.flatnonzero(move.done).tolist()).evict()
            else:
                hold.drop()
            failed = int((~move.done).sum())
            self._emit(Demoted(move.blocks - failed, failed, move.nbytes, move.seconds))

        self._tier.write(hold, staged, ended)
        return True

    def _worth(self, hold: Pinned) -> list[int]:
        """Positions of the blocks that the disk does not have and should."""
        absent = self._tier.pool.absent(hold.keys)
        if self._draining or not absent:
            return absent
        missing = np.zeros(len(hold), np.bool_)
        missing[absent] = True
        tags = _tags(hold.keys)
        mask = self._admission.admit(tags, ~missing) & missing
        left = self._budget.left()
        if left < 0.5:
            mask &= self._hot.admit(tags, ~missing)
        if left <= 0:
            mask[:] = False
        self.refused += int(missing.sum() - mask.sum())
        return [int(at) for at in np.flatnonzero(mask)]


def _tags(keys: Sequence[bytes]) -> Tags:
    return np.fromiter(map(hash, keys), np.int64, len(keys))
