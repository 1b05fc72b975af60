"""Runs on their way between host memory and shared storage, as the leader sees them. Under the leader's lock."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Final

from kvbm.blocks import Staged
from kvbm.core.region import Slots
from kvbm.link.channel import Link
from kvbm.link.messages import Result, pack
from kvbm.tiers.gate import Gate
from kvbm.tiers.moves import Ended, Moves, Passage
from kvbm.tiers.objects.orders import GetRun, Got, Leave, NoteSums, Order, PutRun, to_rank
from kvbm.tiers.objects.uploads import Candidate


class Traffic:
    """`links` lead to the ranks that store. The lowest moves runs for all of them; the others answer about a read once
    they have noted the checksums of what came. Each has to answer within `patience` seconds."""

    def __init__(
        self,
        links: Mapping[int, Link],
        gate: Gate,
        next_id: Callable[[], int],
        clock: Callable[[], float],
        patience: float,
    ) -> None:
        self.gate = gate
        self.ranks: Final = sorted(links)
        mover = self.ranks[0]
        self._up = Moves(links, next_id, clock, patience=patience, judge=self._over)
        self._down = Moves({mover: links[mover]}, next_id, clock, patience=patience, judge=self._over)
        self._slots: dict[int, bytes] = {}
        """Of reads that the other ranks have not been told of: slots of host memory."""
        self._judges: list[Callable[[Passage], None]] = []

    def listen(self, judge: Callable[[Passage], None]) -> None:
        """Tell this of each passage that has ended, before anybody else hears of it."""
        self._judges.append(judge)

    def _over(self, passage: Passage) -> None:
        for judge in self._judges:
            judge(passage)

    def tell(self, order: Order) -> None:
        """The rank that moves hears this."""
        self._down.tell(to_rank(order))

    def put(self, run: Candidate, slots: Slots, priorities: bytes, sums: bytes, ended: Ended) -> None:
        """Write a run from these slots."""
        passage = self._down.write(len(slots), ended)
        self.tell(PutRun(passage.id, pack(slots), list(run.keys), run.parent, run.place, priorities, sums))

    def get(self, end: bytes, within: Slots, into: Staged, ended: Ended) -> int:
        """Read these blocks of a run to slots of host memory, which the caller holds; the passage's number."""
        passage = self._up.read(len(within), ended, self.gate)
        slots = pack(into.slots)
        if len(self.ranks) > 1:
            self._slots[passage.id] = slots
        self.tell(GetRun(passage.id, end, pack(within), slots, list(into.keys)))
        return passage.id

    def got(self, got: Got) -> None:
        """A read ended on the rank that moves: the others note what came to their memory, and answer after that."""
        self._up.ranked(got.job, got.priority)
        slots = self._slots.pop(got.job, None)
        if slots is not None:
            for rank, sums in zip(self.ranks[1:], got.sums, strict=True):
                self._up.tell_rank(rank, to_rank(NoteSums(got.job, slots, got.outcomes, sums, got.error)))

    def cancel(self, jobs: Collection[int]) -> None:
        """Nobody wants these reads any more. They end all the same."""
        self._up.cancel(jobs)

    def cancel_all(self) -> None:
        """Nobody wants any read any more."""
        self._up.cancel_all()

    def leave(self) -> None:
        """Nothing that is on its way counts, and nothing more is written."""
        self._down.leave()
        self._up.leave()
        self.tell(Leave())

    def answer(self, result: Result) -> bool:
        """Takes one rank's result; False where it is about none of these."""
        return self._up.answer(result) or self._down.answer(result)

    def late(self) -> bool:
        """Whether a rank has not answered in time."""
        return self._up.late() or self._down.late()

    @property
    def reading(self) -> int:
        """Reads that some rank has not answered."""
        return self._up.count()[1]
