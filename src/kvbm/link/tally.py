"""What the ranks answered about one copy."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvbm.core.outcome import Outcome
from kvbm.link.messages import Result


@dataclass(slots=True, kw_only=True)
class Tally:
    """What the ranks have answered about a job so far. A rank that has said nothing at `due`, `patience` seconds after
    it began, counts as broken."""

    id: int
    ranks: set[int]
    blocks: int
    patience: float
    due: float | None = None
    outcomes: npt.NDArray[np.uint8] = field(init=False)
    nbytes: int = 0
    seconds: float = 0.0
    error: str | None = None
    sums: dict[int, bytes] = field(default_factory=dict)
    """By rank, the checksums it has sent."""
    errors: dict[int, bytes] = field(default_factory=dict)
    """By rank, how far it found blocks apart that it compared."""

    def __post_init__(self) -> None:
        self.outcomes = np.full(self.blocks, Outcome.DONE, np.uint8)

    def answer(self, result: Result) -> bool:
        """Takes one rank's result; the worst outcome of a block counts. True when it was the last rank."""
        if result.rank not in self.ranks:
            return False
        self.ranks.discard(result.rank)
        theirs = np.frombuffer(result.outcomes, np.uint8)
        if len(theirs) != len(self.outcomes):
            theirs = np.full(len(self.outcomes), Outcome.FAILED, np.uint8)
        np.maximum(self.outcomes, theirs, out=self.outcomes)
        self.nbytes += result.nbytes
        if result.sums:
            self.sums[result.rank] = result.sums
        if len(result.errors) == 4 * len(self.outcomes):
            self.errors[result.rank] = result.errors
        self.seconds = max(self.seconds, result.seconds)
        self.error = self.error or result.error
        return not self.ranks

    @property
    def done(self) -> npt.NDArray[np.bool_]:
        done: npt.NDArray[np.bool_] = self.outcomes == Outcome.DONE
        return done
