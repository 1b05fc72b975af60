"""Copies in flight: one job runs on every rank and ends when the last rank has answered."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvbm.blocks import Pinned, Staged
from kvbm.core.outcome import Outcome
from kvbm.core.region import Slots
from kvbm.manager.requests import Request
from kvbm.manager.wire import Result


@dataclass(slots=True)
class Job:
    """`lease` holds the host slots until every rank is done: staged ones for a store, pinned ones for a load. A rank
    that has said nothing at `due`, `patience` seconds after it began, counts as broken."""

    id: int
    request: Request
    lease: Staged | Pinned
    g1: Slots
    ranks: set[int]
    patience: float
    due: float | None = None
    outcomes: npt.NDArray[np.uint8] = field(init=False)
    nbytes: int = 0
    seconds: float = 0.0
    error: str | None = None

    def __post_init__(self) -> None:
        self.outcomes = np.full(len(self.g1), Outcome.DONE, np.uint8)

    @property
    def is_store(self) -> bool:
        return isinstance(self.lease, Staged)

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
        self.seconds = max(self.seconds, result.seconds)
        self.error = self.error or result.error
        return not self.ranks

    @property
    def done(self) -> npt.NDArray[np.bool_]:
        done: npt.NDArray[np.bool_] = self.outcomes == Outcome.DONE
        return done
