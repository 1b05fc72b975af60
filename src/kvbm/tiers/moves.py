"""Reads and writes of a tier that some rank has not answered. Under the leader's lock."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from kvbm.core.errors import Broken
from kvbm.core.outcome import Outcome
from kvbm.link.channel import Link
from kvbm.link.messages import Cancel, Message, Result
from kvbm.link.tally import Tally
from kvbm.tiers.gate import Gate

log = logging.getLogger(__name__)

CANCELLED = "cancelled"
"""The error of a passage that was given up."""


@dataclass(slots=True, kw_only=True)
class Passage(Tally):
    """Blocks between host memory and somewhere below it. `ended` is called once every rank has answered."""

    down: bool
    ended: Callable[[Passage], None]
    gate: Gate | None = None
    """What measures how fast reads are."""
    priority: int = 0
    """What comes is to have this one at least, where only its reader could say so."""
    wanted: bool = True
    """False once its failure says nothing of where it went: it was given up."""


Ended = Callable[[Passage], None]


class Moves:
    """All passages of one tier. `links` lead to the ranks that move its blocks; each has to answer within `patience`
    seconds. `judge` hears of each that has ended before anybody else does."""

    def __init__(
        self,
        links: Mapping[int, Link],
        next_id: Callable[[], int],
        clock: Callable[[], float],
        *,
        patience: float = math.inf,
        judge: Ended = lambda passage: None,
    ) -> None:
        self.links = links
        self._next_id, self._clock, self._patience, self._judge = next_id, clock, patience, judge
        self.passages: dict[int, Passage] = {}
        """Those that some rank has not answered, by number."""
        self.left = False
        """Whether the tier is left alone for good: whatever ends from now on has failed."""

    def write(self, blocks: int, ended: Ended) -> Passage:
        """So many go down. Nothing is sent."""
        return self._begin(blocks, ended, None)

    def read(self, blocks: int, ended: Ended, gate: Gate) -> Passage:
        """So many come up. Nothing is sent."""
        gate.read_begins(blocks)
        return self._begin(blocks, ended, gate)

    def _begin(self, blocks: int, ended: Ended, gate: Gate | None) -> Passage:
        passage = Passage(
            id=self._next_id(), ranks=set(self.links), blocks=blocks, patience=self._patience, down=gate is None,
            ended=ended, gate=gate,
        )  # fmt: skip
        passage.due = self._clock() + self._patience
        self.passages[passage.id] = passage
        return passage

    def cancel(self, jobs: Collection[int]) -> None:
        """Nobody wants these any more. They end all the same, when nothing touches their slots any more."""
        live = [job for job in sorted(jobs) if (passage := self.passages.get(job)) is not None and passage.wanted]
        for job in live:
            self.passages[job].wanted = False
        if live:
            self.tell(Cancel(live))

    def ranked(self, job: int, priority: int) -> None:
        """What this read brings has a priority."""
        if (passage := self.passages.get(job)) is not None:
            passage.priority = priority

    def cancel_all(self) -> None:
        """Nobody wants any of them any more."""
        self.cancel(list(self.passages))

    def leave(self) -> None:
        """The tier is left alone for good: what is on its way counts for nothing, whatever ranks say."""
        self.cancel_all()
        self.left = True

    def answer(self, result: Result) -> bool:
        """Takes one rank's result; False where it is about no passage of this tier."""
        passage = self.passages.get(result.job)
        if passage is None:
            return False
        if passage.answer(result):
            del self.passages[passage.id]
            passage.wanted &= passage.error != CANCELLED
            self._judge(passage)
            if self.left:
                passage.outcomes[:] = Outcome.FAILED
            if passage.gate is not None:
                read = int((passage.outcomes < Outcome.FAILED).sum())
                passage.gate.read_ends(passage.blocks, read, passage.seconds)
            passage.ended(passage)
        return True

    def late(self) -> bool:
        """Whether a rank has not answered in time."""
        now = self._clock()
        return any(passage.due is not None and now > passage.due for passage in self.passages.values())

    def wait_again(self) -> None:
        """What has not been answered may take as long again."""
        for passage in self.passages.values():
            passage.due = self._clock() + self._patience

    def count(self) -> tuple[int, int]:
        """Passages (down, up) that some rank has not answered."""
        down = sum(passage.down for passage in self.passages.values())
        return down, len(self.passages) - down

    def tell(self, message: Message) -> None:
        """Say this to every rank."""
        for rank in self.links:
            self.tell_rank(rank, message)

    def tell_rank(self, rank: int, message: Message) -> None:
        """Say this to one."""
        try:
            self.links[rank].send(message)
        except Broken as error:  # the leader notices when it looks for results
            log.debug("KVBM: %s", error)
