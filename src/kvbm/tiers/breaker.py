"""Whether something that may fail is used, and when it is asked next whether it works."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


class Breaker:
    """What failed `most` times in a row, of one kind, is to be left alone (`trip`), and asked whether it works: after
    the first of `pauses`, then after the next, the last of which goes on. While it is used it is asked every `watch`
    seconds. With `anew` the pauses begin again each time that it is left alone, and each question is followed by a
    longer one. Else each failure is, until something `worked`: what answers, and does nothing else, is asked ever less
    often.

    State and times only: its owner asks. Any thread; what two of them say at once may count once.
    """

    def __init__(
        self, pauses: Sequence[float], clock: Callable[[], float], *, most: int = 1, watch: float = math.inf,
        anew: bool = True,
    ) -> None:  # fmt: skip
        self.problem: str | None = None
        """Why it is left alone; None while it is used."""
        self._pauses, self._clock, self._most, self._watch, self._anew = pauses, clock, most, watch, anew
        self._row: dict[object, int] = {}
        self._steps = 0
        self._next = clock() + watch

    @property
    def pause(self) -> float:
        """Seconds before it is asked next."""
        return self._pauses[min(self._steps, len(self._pauses) - 1)]

    def failed(self, kind: object = None) -> bool:
        """It did not do what was wanted, or did not answer. Whether that was once too often."""
        if not self._anew:
            self._steps += 1
        self._row[kind] = count = self._row.get(kind, 0) + 1
        return count >= self._most

    def worked(self, kind: object = None) -> None:
        """It did what was wanted."""
        if not self._anew:
            self._steps = 0
        self._row[kind] = 0

    def trip(self, problem: str) -> bool:
        """Leave it alone. Whether it was used until now."""
        used, self.problem = self.problem is None, problem
        if used:
            self._steps = 0 if self._anew else self._steps
            self._next = self._clock() + self.pause
        return used

    def due(self) -> bool:
        """Whether to ask it now. If so, it is asked next after another pause."""
        if self._clock() < self._next:
            return False
        if self.problem is not None:
            self._steps += 1
        self._next = self._clock() + (self._watch if self.problem is None else self.pause)
        return True

    def mend(self) -> None:
        """Use it again."""
        self.problem, self._row = None, {}
