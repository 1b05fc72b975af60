"""Copies in flight: one copy runs on every rank and ends when the last rank has answered."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvbm.blocks import Pinned, Staged, Writable
from kvbm.core.outcome import Outcome
from kvbm.core.region import Slots
from kvbm.link.messages import Result
from kvbm.link.tally import Tally


class Owner(Protocol):
    """What asked for a copy. Each copy ends with one call of `stored`, `loaded`, `compared` or `dropped`; where KVBM
    was turned off before its end, with none (`Health.off`)."""

    def judge(self, copy: StepCopy) -> None:
        """Every rank has answered about a store. Outcomes that are to count as failed may still be changed."""

    def stored(self, copy: StepCopy, there: Pinned, failed: int, late: int) -> None:
        """A store ended. `there` are the blocks that are found from now on; they are held meanwhile. `failed` blocks
        were not copied, and `late` ones because the engine needed them again."""

    def loaded(self, copy: StepCopy, failed: int) -> npt.NDArray[np.bool_]:
        """A load ended. `failed` blocks did not arrive. Returns which blocks are not in host memory what their keys
        say, and are not found any more."""

    def compared(self, copy: StepCopy) -> None:
        """A comparison ended. Drops the lease."""

    def dropped(self, copy: StepCopy) -> None:
        """No worker will hear of the copy: the engine handed its blocks out before."""


@dataclass(slots=True, kw_only=True)
class StepCopy(Tally):
    """A copy between the engine's memory and host memory. `lease` holds the host slots until every rank is done: staged
    ones for a store, pinned ones for a load, writable ones for a comparison."""

    owner: Owner
    lease: Staged | Pinned | Writable
    g1: Slots
    places: Slots
    """Which blocks of its prompt these are."""
    dropped: int = 0
    """Blocks that were handed out before the copy could begin."""
    fenced: bool = False
    """A step that overwrites what it reads waits for it, a moment."""

    @property
    def is_store(self) -> bool:
        """Whether it reads the engine's blocks."""
        return not isinstance(self.lease, Pinned)


class InFlight:
    """The copies that some rank has not answered, and which engine blocks stores still read. Under the leader's
    lock."""

    def __init__(self, ranks: Iterable[int], clock: Callable[[], float]) -> None:
        self._ranks, self._clock = frozenset(ranks), clock
        self.jobs: dict[int, StepCopy] = {}
        """Copies that some rank has not answered, by number."""
        self.sources: dict[int, int | tuple[int, ...]] = {}
        """G1 block that is being copied from -> the store that reads it, or several. Not a tuple for each: so many
        would set off the garbage collector, which takes longer than all else that a step does here."""
        self._last = 0
        self._sealed = (0, 0)
        """The last copy of the step before the last, and of the last."""

    def next_id(self) -> int:
        """A number no other job of this leader has."""
        self._last += 1
        return self._last

    def start(
        self, owner: Owner, lease: Staged | Pinned | Writable, g1: Slots, places: Slots, patience: float
    ) -> StepCopy:
        """A copy that every rank will answer."""
        job = StepCopy(
            id=self.next_id(), ranks=set(self._ranks), blocks=len(g1), patience=patience, owner=owner, lease=lease,
            g1=g1, places=places,
        )  # fmt: skip
        self.jobs[job.id] = job
        if job.is_store:
            read: dict[int, int | tuple[int, ...]] = dict.fromkeys(g1.tolist(), job.id)
            for block in read.keys() & self.sources.keys():
                read[block] = (*self._readers(block), job.id)
            self.sources.update(read)
        return job

    def _readers(self, block: int) -> tuple[int, ...]:
        readers = self.sources.get(block, ())
        return readers if isinstance(readers, tuple) else (readers,)

    def answer(self, result: Result) -> StepCopy | None:
        """Takes one rank's result; the job if that was the last one it waited for."""
        job = self.jobs.get(result.job)
        if job is None or not job.answer(result):
            return None
        del self.jobs[job.id]
        self._read(job, job.g1)
        return job

    def _read(self, job: StepCopy, g1: Slots) -> None:
        """The job does not read these blocks any more."""
        for block in g1.tolist() if job.is_store else ():
            readers = self.sources.get(block)
            if readers == job.id or readers == (job.id,):
                del self.sources[block]
            elif isinstance(readers, tuple):
                self.sources[block] = tuple(each for each in readers if each != job.id)

    def reading(self, g1: Iterable[int]) -> set[int]:
        """Store jobs that still read any of these blocks."""
        return {job for block in self.sources.keys() & set(g1) for job in self._readers(block)}

    def unsent(self, jobs: Iterable[int]) -> list[int]:
        """Those of `jobs` that no worker has heard of: they belong to the step that is being described."""
        return sorted(job for job in jobs if job > self._sealed[1])

    def drop(self, number: int, g1: Iterable[int] | None) -> tuple[StepCopy, int]:
        """A job that no worker has heard of does not copy these blocks (None: any): they end as failed, whatever the
        copy does. If none is left of it, or it is a comparison, it is over. Also says how many these are."""
        job = self.jobs[number]
        every = g1 is None or isinstance(job.lease, Writable)
        lost = job.done & (every or np.isin(job.g1, list(g1 or ())))
        job.outcomes[lost] = Outcome.FAILED
        job.dropped += (count := int(lost.sum()))
        self._read(job, job.g1[lost])
        if not job.done.any():
            del self.jobs[number]
        return job, count

    def stores(self) -> list[StepCopy]:
        """Those that read the engine's blocks."""
        return [job for job in self.jobs.values() if job.is_store]

    def ids(self) -> set[int]:
        """All of them."""
        return set(self.jobs)

    def fence(self, jobs: set[int]) -> list[int]:
        """Those of `jobs` that have not ended, in order: a step waits for them."""
        for job in (left := self.still(jobs)):
            self.jobs[job].fenced = True
        return left

    def still(self, jobs: set[int]) -> list[int]:
        """Those of `jobs` that have not ended, in order."""
        return sorted(jobs & self.jobs.keys()) if jobs else []

    def unanswered(self, jobs: set[int], rank: int) -> list[int]:
        """Those of `jobs` that this rank has not answered, in order."""
        return [each for each in self.still(jobs) if rank in self.jobs[each].ranks]

    def seal(self) -> None:
        """A step is complete. Starts the clock of copies that every worker has begun: they begin after the forward pass
        of their step, and however long that takes, it is over when the step after the next is sealed (the engine may be
        one ahead)."""
        begun, self._sealed = self._sealed[0], (self._sealed[1], self._last)
        for job in self.jobs.values():
            if job.id <= begun and job.due is None:
                job.due = self._clock() + job.patience

    def overdue(self) -> StepCopy | None:
        """A job whose ranks have been silent for too long."""
        now = self._clock()
        return next((job for job in self.jobs.values() if job.due is not None and now > job.due), None)

    @property
    def blocks_read(self) -> int:
        """Engine blocks that stores still read."""
        return len(self.sources)

    def count(self) -> tuple[int, int]:
        """(stores, loads)."""
        stores = sum(job.is_store for job in self.jobs.values())
        return stores, len(self.jobs) - stores

    def blocks(self) -> tuple[int, int, int]:
        """Slots of host memory that are being written by stores, read by loads, written for comparisons."""
        kinds = (Staged, Pinned, Writable)
        return tuple(sum(len(job.lease) for job in self.jobs.values() if isinstance(job.lease, kind)) for kind in kinds)  # type: ignore[return-value]
