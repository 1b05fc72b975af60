"""Whether shared storage is used, and when it is tried. Under the leader's lock."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Final

from kvbm.core.outcome import Outcome
from kvbm.tiers.breaker import Breaker
from kvbm.tiers.moves import Passage
from kvbm.tiers.objects.orders import Tried

log = logging.getLogger(__name__)

_FAILURES: Final = 3
_PROBE_EVERY: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
WRITES_AGAIN_S: Final = 60.0
"""Seconds after which storage that can only be read is tried again."""
_SILENT: Final = "the storage has not answered yet"


class Trials:
    """Whether the storage is used, and when it is tried next. `ask` has it tried, by number."""

    def __init__(self, where: str, ask: Callable[[int], None], clock: Callable[[], float]) -> None:
        self._where, self._ask, self._clock = where, ask, clock
        self._breaker = Breaker(_PROBE_EVERY, clock, most=_FAILURES)
        self._breaker.trip(_SILENT)
        self._number, self._trying = 0, False
        self.off: str | None = None
        """Why it is not used any more until the engine is started anew."""
        self.refusal: str | None = None
        """Why nothing can be written, though it is used."""
        self._again = math.inf

    @property
    def problem(self) -> str | None:
        return self.off or self._breaker.problem

    def judge(self, passage: Passage) -> None:
        """Something was moved, or not."""
        if not (passage.outcomes == Outcome.FAILED).any():
            self._breaker.worked(passage.down)
        elif passage.wanted and self.off is None:
            log.warning("KVBM: %s failed: %s", "a write to shared storage" if passage.down else "a read", passage.error)
            if self._breaker.failed(passage.down):
                self.fail(passage.error or "moves fail")

    def fail(self, why: str) -> None:
        """Leave it alone until a trial goes well."""
        if self.off is None and self._breaker.trip(why):
            log.error("KVBM: shared storage (G4) is left alone, the engine goes on without it: %s", why)

    def begin(self) -> None:
        """It can be tried now."""
        self._number, self._trying = self._number + 1, True
        self._ask(self._number)

    def tick(self) -> None:
        if self.off is not None or not self._number or self._trying:
            return
        if self._breaker.due() if self._breaker.problem is not None else self._clock() > self._again:
            self.begin()

    def take(self, tried: Tried) -> bool:
        """How a trial ended. Whether the storage is used anew."""
        if tried.number != self._number or self.off is not None:
            return False
        self._trying = False
        if tried.problem is not None:
            why = f"{self._where}: {tried.problem}"
            if tried.off:
                log.error("KVBM: shared storage (G4) is not used: %s", why)
                self.off = why
            elif self._breaker.problem == _SILENT:
                log.warning("KVBM: shared storage (G4) does not answer, and is tried again: %s", why)
            self._breaker.trip(why)
            return False
        if self.refusal is None and tried.refusal is not None:
            log.warning("KVBM: shared storage (G4) is read, and nothing is written to it: %s", tried.refusal)
        self.refusal, anew = tried.refusal, self._breaker.problem is not None
        self._again = math.inf if tried.refusal is None else self._clock() + WRITES_AGAIN_S
        if anew:
            log.info("KVBM: shared storage (G4) %s: %s", "is used" if tried.refusal else "works", self._where)
            self._breaker.mend()
        return anew
