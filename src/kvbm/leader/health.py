"""Whether KVBM works, and if not, why it stands aside."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

_REST: Final = 60.0


class Health:
    """What stops KVBM from matching, storing and moving. Changed under the leader's lock; what is asked may be asked by
    any thread."""

    def __init__(self, *, paused: bool, clock: Callable[[], float]) -> None:
        self.problems: list[str] = []
        """Sentences. While there is one KVBM stands aside."""
        self.paused = paused
        self.off: str | None = None
        """Why nothing is done any more, until the engine is started anew."""
        self.quarantined: str | None = None
        """Why nothing that is stored can be trusted, until an operator resumes."""
        self.ending = False
        """The engine is shutting down its workers in good order."""
        self.ticked = time.monotonic()
        """When housekeeping was done last."""
        self._clock = clock
        self._resting: tuple[str, float] | None = None
        """Why KVBM stands aside for a while, and until when."""

    def aside(self) -> str | None:
        """Why KVBM does nothing, if so."""
        if self.problems:
            return f"KVBM is not healthy: {self.problems[0]}"
        if self.ending:
            return "the engine is shutting down"
        return "KVBM is paused" if self.paused else None

    def sick(self, problem: str) -> None:
        """KVBM stops matching and offloading; the engine goes on by computing."""
        if problem not in self.problems:
            self.problems.append(problem)
            log.error("KVBM is unhealthy and stands aside, the engine goes on without it: %s", problem)

    def turn_off(self, why: str) -> bool:
        """Nothing is certain any more. False where that was so before."""
        if self.off is not None:
            return False
        self.off = why
        self.sick(why)
        return True

    def quarantine(self, why: str) -> None:
        """What is stored cannot be trusted."""
        self.quarantined = why
        self.sick(why)

    def resume(self) -> None:
        """Ends a pause and a quarantine."""
        self.paused = False
        if self.quarantined is not None:
            self.problems.remove(self.quarantined)
            self.quarantined = None
            log.warning("KVBM: an operator ended the quarantine")

    def rest(self, why: str) -> None:
        """KVBM stands aside for a minute: it costs the engine more than it can be worth."""
        if self._resting is None:
            self._resting = why, self._clock() + _REST
            self.sick(why)

    def tick(self) -> None:
        """Housekeeping is done. A rest may be over."""
        self.ticked = time.monotonic()
        if self._resting is not None and self._clock() > self._resting[1]:
            self.problems.remove(self._resting[0])
            self._resting = None
