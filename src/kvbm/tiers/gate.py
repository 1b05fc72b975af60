"""Never slower than computing: what a load is measured to take, against what the engine is measured to take.

Nothing here is configured. What has not been measured yet is not held against a load: the first loads measure it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

_FADE = 0.8
"""What the past weighs at each new sample: about the last five count."""
_LEAST_TOKENS = 64
"""Steps of fewer tokens are decoding; they say nothing about how fast a prompt is computed."""
FORGET_S = 30.0
"""Seconds after the last block that was read when nothing is known of reads: or what was slow once, and so is given up
before a block arrives, would never be tried again."""


class Rate:
    """An amount per second over the last samples, each as long as it took."""

    __slots__ = ("_amount", "_seconds")

    def __init__(self) -> None:
        self._amount = self._seconds = 0.0

    def add(self, amount: float, seconds: float) -> None:
        self._amount = self._amount * _FADE + amount
        self._seconds = self._seconds * _FADE + max(seconds, 1e-9)

    def get(self) -> float | None:
        """None before the first sample."""
        return self._amount / self._seconds if self._seconds else None


class Lanes:
    """Reads of one tier that go on at once, at most `count`. What a single read measures says little of many; what they
    give together is at most what so many give one by one."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._going, self._size = 0, 0.0
        """Reads that have begun and not ended; blocks in one."""
        self._one = Rate()
        self._last = 0.0
        """When a read began last."""
        self._ended, self._gave, self._from = 0, 0, 0.0
        """Reads that have ended, the blocks that they gave, and since when: of the sample that is being taken."""

    def _begin(self, now: float) -> None:
        self._ended, self._gave, self._from = 0, 0, now

    def begins(self, now: float) -> None:
        if not self._going:
            self._begin(now)
        self._going, self._last = self._going + 1, now

    def ends(self, read: int, seconds: float, now: float) -> tuple[int, float] | None:
        """One gave `read` blocks in so many seconds. Blocks that all gave together, and in what time, once as many as
        there are lanes have ended while most lanes were in use: those that began at once end at once, so fewer say too
        much or too little."""
        enough = self.count == 1 or 2 * self._going >= self.count
        self._going -= 1
        if read and seconds > 0:
            self._one.add(read, seconds)
            self._size = read if not self._size else self._size * _FADE + read * (1 - _FADE)
        self._ended, self._gave = self._ended + 1, self._gave + read
        if enough and self._ended < self.count:
            return None
        sample = (self._gave, now - self._from) if enough else None
        self._begin(now)
        return sample

    def forget(self) -> None:
        """What reads through is another now."""
        self._one = Rate()

    def elapsed(self, now: float) -> float:
        """Seconds for which all reads have been going on, where there are several at once."""
        return now - self._last if self.count > 1 else 0.0

    def rate(self, together: float | None, blocks: int | None = None) -> float | None:
        """Blocks per second where so many are read (None: one read), if `together` is what was measured of all; None
        while nothing is known."""
        if self.count == 1 or (one := self._one.get()) is None:
            return together
        reads = 1 if blocks is None else math.ceil(blocks / max(1.0, self._size))
        apart = one * min(self.count, max(1, reads))
        return apart if together is None else min(apart, together)


class Gate:
    """One for each tier that is slower than host memory, and that is read `lanes` reads at once, together at most
    `most` blocks (None: as many as its reader likes). Under the leader's lock."""

    def __init__(
        self, block_tokens: int, clock: Callable[[], float] = time.monotonic, *, lanes: int = 1, most: int | None = None
    ) -> None:
        self.block_tokens, self._clock, self._lanes, self.most = block_tokens, clock, Lanes(lanes), most
        self.computed, self.read = Rate(), Rate()
        self._steps: deque[tuple[int, float]] = deque(maxlen=8)
        self._stepped = -1.0
        self._took: deque[float] = deque(maxlen=8)
        self.reading = 0
        """Blocks whose read has begun and not ended."""
        self.since = 0.0
        """When the last read ended; or began, where none was running."""
        self.measured = 0.0
        """When a block was read last, or nothing was known any more."""

    def beside(self, lanes: int = 1, most: int | None = None) -> Gate:
        """One for another tier of the same engine: what it computes is measured once."""
        other = Gate(self.block_tokens, self._clock, lanes=lanes, most=most)
        other.computed = self.computed
        return other

    # ------------------------------------------------------------------ measuring

    def step_begins(self, tokens: int) -> None:
        """The engine is about to compute so many tokens in one step."""
        self._steps.append((tokens, self._clock()))

    def step_ends(self) -> None:
        """The oldest step that has not ended ended. An engine that schedules ahead begins the next one before."""
        if self._steps:
            tokens, begun = self._steps.popleft()
            now = self._clock()
            self._took.append(now - max(begun, self._stepped))
            if tokens >= _LEAST_TOKENS:
                self.computed.add(tokens, self._took[-1])
            self._stepped = now

    @property
    def step_s(self) -> float | None:
        """The shortest of the last steps; None before there were some."""
        return min(self._took) if len(self._took) == self._took.maxlen else None

    def read_begins(self, blocks: int) -> None:
        if not self.reading:
            self.since = self._clock()
            if self._stale:
                self.forget_reads()
        self.reading += blocks
        self._lanes.begins(self._clock())

    def read_ends(self, blocks: int, read: int, seconds: float = 0.0) -> None:
        """`read` of them were read. The others took their time too, but say nothing of a speed. `seconds` is how long
        this read took by itself, where several are read at once."""
        now = self._clock()
        if (sample := self._lanes.ends(read, seconds, now)) is not None:
            self.read.add(*sample)
        self.since = now
        if read:
            self.measured = now
        self.reading -= blocks

    def forget_reads(self) -> None:
        """What reads through is another now."""
        self.read, self.measured = Rate(), self._clock()
        self._lanes.forget()

    @property
    def _stale(self) -> bool:
        return not self.reading and self._clock() - self.measured > FORGET_S

    # ------------------------------------------------------------------ deciding

    def loading_s(self, blocks: int, ahead: int = 0) -> float:
        """Seconds until so many blocks are read, after `ahead` others; 0 while nothing is known."""
        wanted, now = blocks + ahead, self._clock()
        rate, silent = self._lanes.rate(self.read.get(), wanted), now - self.since
        if self._stale:
            return 0.0
        seconds = 0.0
        if rate is not None:
            seconds = wanted / rate if rate else math.inf
            if wanted <= self.reading:  # all of it is on its way
                seconds = max(0.0, seconds - self._lanes.elapsed(now))
        if self.reading and silent > 0:
            # What has been silent for long is not as fast as it was.
            seconds = max(seconds, wanted * silent / self.reading)
        return seconds

    def soon(self, seconds: float) -> int | None:
        """Blocks that are read in so long, at least one; None while nothing is known."""
        rate = None if self._stale else self.read.get()
        return max(1, int(rate * seconds)) if rate else None

    def computing_s(self, blocks: float) -> float | None:
        """Seconds in which the engine computes so many blocks; None while that is not known."""
        rate = self.computed.get()
        return blocks * self.block_tokens / rate if rate else None

    def objection(self, blocks: int, ahead: int = 0, worth: float = 1.0) -> str | None:
        """Why loading these would be slower than computing what they replace, `worth` blocks each; None where it is
        not."""
        computing = self.computing_s(blocks * worth)
        if computing is None or (loading := self.loading_s(blocks, ahead)) <= computing:
            return None
        takes = f"take {loading * 1e3:.0f} ms" if loading < math.inf else "not end: none came of the last reads"
        return f"loading {blocks} blocks would {takes}, computing them takes {computing * 1e3:.0f} ms"

    def rates(self) -> dict[str, float | None]:
        """Tokens computed and blocks read per second, as measured so far."""
        read = self._lanes.rate(self.read.get())
        return {"computed_tokens_per_s": self.computed.get(), "read_blocks_per_s": read}
