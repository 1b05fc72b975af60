"""Which engine gets a request: who has seen its prefix, who is busy, who is down. No I/O, one thread."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Final

PIECES: Final = 65_536
"""How many pieces of prompts are remembered of each engine; some 10 MB, when they are that many."""
IMBALANCE: Final = 8
"""An engine with this many more requests in flight than another is not chosen for its prefix."""
BACK_OFF_S: Final = (1.0, 30.0)
"""How long an engine that failed is left out: at first, and at most. Each further failure doubles it."""


class Engine:
    """An engine, and what is known of it. Only Choice changes it, except `away`, which belongs to who logs."""

    def __init__(self, name: str, url: str) -> None:
        self.name, self.url = name, url
        self.in_flight = 0
        self.failures = 0
        self.retry_at = 0.0
        self.away = False
        """A line in the log said so."""
        self._seen: OrderedDict[int, None] = OrderedDict()

    def known(self, keys: Sequence[int]) -> int:
        """How many of `keys`, from the first one on, were sent there."""
        return next((count for count, key in enumerate(keys) if key not in self._seen), len(keys))

    def remember(self, keys: Sequence[int]) -> None:
        """The pieces with these keys are there from now on, until others push them out."""
        # From the last to the first, so that the end of a prompt is forgotten before what it builds on.
        for key in reversed(keys):
            self._seen[key] = None
            self._seen.move_to_end(key)
        while len(self._seen) > PIECES:
            self._seen.popitem(last=False)


class Choice:
    """The engines of one role. `last_resort`: where all are down, one of them is chosen nevertheless."""

    def __init__(
        self, engines: Sequence[Engine], *, last_resort: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.engines = tuple(engines)
        self._last_resort = last_resort
        self._clock = clock
        self._turn = 0

    def begin(self, keys: Sequence[int] = (), without: Collection[Engine] = ()) -> Engine | None:
        """The engine for a prompt with these keys; None where there is none. `end` must follow.

        Longest known prefix, then fewest requests in flight, then the next in turn.
        """
        now = self._clock()
        allowed = [engine for engine in self.engines if engine not in without]
        up = [engine for engine in allowed if engine.retry_at <= now]
        if not up and self._last_resort and allowed:
            up = [min(allowed, key=lambda engine: engine.retry_at)]
        if not up:
            return None
        most = min(engine.in_flight for engine in up) + IMBALANCE
        chosen = min(
            (engine for engine in up if engine.in_flight <= most),
            key=lambda engine: (-engine.known(keys), engine.in_flight, self._place(engine)),
        )
        self._turn = self.engines.index(chosen) + 1
        chosen.in_flight += 1
        chosen.remember(keys)
        return chosen

    def end(self, engine: Engine) -> None:
        """What `begin` began has ended, however."""
        engine.in_flight -= 1

    def failed(self, engine: Engine) -> None:
        """It could not be reached: it is left out for a while."""
        now = self._clock()
        if now >= engine.retry_at:  # or requests that failed together would count as many failures
            first, most = BACK_OFF_S
            engine.retry_at = now + min(most, first * 2.0 ** min(engine.failures, 16))
            engine.failures += 1

    def reached(self, engine: Engine) -> None:
        """It answered: nothing is held against it any more."""
        engine.failures, engine.retry_at = 0, 0.0

    def wait_s(self, engine: Engine) -> float:
        """For how long it is still left out."""
        return max(0.0, engine.retry_at - self._clock())

    def _place(self, engine: Engine) -> int:
        return (self.engines.index(engine) - self._turn) % len(self.engines)
