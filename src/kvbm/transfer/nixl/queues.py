"""Plans that are on their way in pieces: which piece goes next, and how many may fly to each peer. Under a lock."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvbm.abc.transport import Completion, Plan
from kvbm.core.region import Slots

WINDOW: Final = 8
"""Pieces on their way to or from one agent; half as many that are not urgent, and only while no urgent one is. A frozen
one has no more."""


@dataclass(slots=True, eq=False)
class NixlJob:
    """One plan."""

    plan: Plan
    source: Slots
    destination: Slots
    done: Callable[[Completion], None]
    ticket: int
    outcomes: npt.NDArray[np.uint8]
    step: int
    """Blocks of a piece."""
    next: int = 0
    """The first block that is in no piece yet."""
    flying: int = 0
    """Pieces that have been taken and have not settled."""
    error: str | None = None
    started: float = 0.0
    ended: float = 0.0

    @property
    def open(self) -> bool:
        """Whether another piece of it is to be posted."""
        return self.error is None and self.next < len(self.source)

    @property
    def peer(self) -> str:
        """The agent on the other side; empty if it is ours."""
        for region in (self.plan.source, self.plan.destination):
            if region.kind == "peer":
                return str(region.owner.agent)
        return ""


@dataclass(slots=True, eq=False)
class Flight:
    """One piece of a job, and NIXL's handle of it once it is posted."""

    job: NixlJob
    blocks: slice
    begun: float
    handle: Any = None


class Queues:
    """Urgent plans, the others, and what flies."""

    def __init__(self) -> None:
        self._urgent: deque[NixlJob] = deque()
        self._background: deque[NixlJob] = deque()
        self._window = Counter[tuple[str, bool]]()
        """Pieces that fly, by peer and by whether they are urgent."""

    def add(self, job: NixlJob) -> None:
        """A job whose pieces are to be posted."""
        (self._urgent if job.plan.urgent else self._background).append(job)

    def ready(self) -> NixlJob | None:
        """The job whose piece goes next, None where none may go now."""
        for queue in (self._urgent, self._background):
            while queue and not queue[0].open:
                queue.popleft()
            for job in queue:
                if job.open and self._room(job):
                    return job
        return None

    def take(self, job: NixlJob) -> Flight:
        """The job's next piece, which flies from now on."""
        blocks = slice(job.next, min(job.next + job.step, len(job.source)))
        job.next = blocks.stop
        job.flying += 1
        job.started = job.started or time.perf_counter()
        self._window[job.peer, job.plan.urgent] += 1
        return Flight(job, blocks, time.monotonic())

    def settled(self, job: NixlJob) -> None:
        """One of the job's pieces does not fly any more."""
        job.flying -= 1
        job.ended = time.perf_counter()
        self._window -= Counter([(job.peer, job.plan.urgent)])  # which leaves no zeros

    def _room(self, job: NixlJob) -> bool:
        urgent, background = (self._window[job.peer, kind] for kind in (True, False))
        return urgent + background < WINDOW if job.plan.urgent else not urgent and background < WINDOW // 2
