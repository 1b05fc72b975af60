"""Shadow verification: some hits are declined, so that the engine computes what is stored, and the two are compared.

Everything else that guards a block (checksums, fingerprints) guards its bytes. This asks the question that matters: is
what is stored under this key what this engine computes for this prompt now? Under the leader's lock.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvbm.blocks import Pinned
from kvbm.core.outcome import Outcome
from kvbm.core.region import Slots
from kvbm.leader.copies import Owner, StepCopy
from kvbm.leader.core import Core
from kvbm.leader.requests import Request
from kvbm.link.messages import Compare, pack
from kvbm.observe.names import json_key
from kvbm.tiers.host import ENGINE, Landing

log = logging.getLogger(__name__)

_KEEP = 60.0
"""Seconds that stored blocks are held for a request of which nothing more is computed."""
_SHARE, _MOST = 8, 1024
"""All comparisons together hold at most this part of host memory, and so many blocks; the copies of what was computed
as much again."""
_PATIENCE = 300.0
"""Seconds that comparing what was copied may take: it is nobody's hurry, and no reason to call a worker silent."""


@dataclass(slots=True, eq=False)
class _Sample:
    """Blocks of one request, the first of them its block `first`."""

    request: Request
    first: int
    hold: Pinned
    origins: list[dict[str, Any]]
    """Of each, where it came from and how old it is."""
    done: int = 0
    """Blocks that were given to a comparison, or left out."""
    jobs: set[int] = field(default_factory=set)
    until: float = 0.0
    over: bool = False
    void: bool = False
    """A new generation began: what is found out says nothing any more."""


class Origins:
    """Where the blocks of host memory come from, and how old they are. A listener of the host."""

    def __init__(self, slots: int) -> None:
        self._since = np.full(slots, np.nan)
        self._from = np.zeros(slots, np.uint8)
        self._places = [ENGINE]
        """What a number in `_from` means."""

    def landing(self, slots: Slots, keys: Sequence[bytes], how: Landing) -> None:
        """See `tiers.host.Listener`."""

    def landed(self, blocks: Pinned, how: Landing) -> None:
        """These slots have new blocks: from the engine, or a tier."""
        if how.origin not in self._places:
            self._places.append(how.origin)
        slots = blocks.slots
        self._since[slots], self._from[slots] = time.time(), self._places.index(how.origin)

    def of(self, slots: Slots) -> list[dict[str, Any]]:
        """For JSON."""
        ages = time.time() - self._since[slots]
        return [
            {"from": json_key(self._places[origin]), "age_s": None if np.isnan(age) else round(float(age), 3)}
            for origin, age in zip(self._from[slots].tolist(), ages, strict=True)
        ]

    def own(self, slots: Slots) -> int:
        """How many of these, from the first on, this process has computed."""
        foreign = np.flatnonzero(self._from[slots])
        return int(foreign[0]) if len(foreign) else len(slots)


@dataclass(slots=True)
class Compared:
    """Requests that were declined a hit; blocks that were compared; of these, those that differ; blocks that could not
    be compared."""

    sampled: int = 0
    compared: int = 0
    mismatched: int = 0
    skipped: int = 0


class Shadow:
    """One of `every` requests with a hit is declined it; none where that is 0. `prove`: to each family of requests
    (those with the same adapter) what comes from another process is declined until some of it agreed."""

    def __init__(
        self, every: int, core: Core, patience: float, clock: Callable[[], float], *, prove: bool = False
    ) -> None:
        self._core, self._patience, self._clock = core, patience + _PATIENCE, clock
        seed = random.SystemRandom().getrandbits(64)
        # The answer for a request is always the same.
        self._drawn: Callable[[str], bool] = lambda request: bool(every) and not hash((seed, request)) % every
        self._prove, self.proven = prove, set[bytes]()
        self.origins = Origins(core.pool.capacity)
        self._declined: dict[str, tuple[int, tuple[bytes, ...]]] = {}
        self.samples: dict[str, _Sample] = {}
        """Declined hits that are being compared, by request."""
        self._jobs: dict[int, _Sample] = {}
        self.held = 0
        """Blocks of host memory that comparisons hold."""
        self.counts = Compared()
        core.host.listen(self.origins)

    @property
    def _most(self) -> int:
        return max(1, min(_MOST, self._core.pool.total // _SHARE))

    # ------------------------------------------------------------------ a request

    def allows(self, request: Request, first: int, hold: Pinned) -> int:
        """How many of the blocks that a request matched, from its block `first` on, it may load. The others it is to
        compute; as far as there is room they are compared."""
        allowed, room = self._trusted(request, hold.slots), max(0, self._most - self.held)
        if allowed == len(hold):
            if not self._drawn(request.id) or not room:
                return allowed
            allowed = 0
        if room:
            self._declined[request.id] = (first + allowed, tuple(hold.keys[allowed : allowed + room]))
        return allowed

    def _trusted(self, request: Request, slots: Slots) -> int:
        """How many of these, from the first on, are this process's own, or of a kind that was compared."""
        if not self._prove or request.family in self.proven:
            return len(slots)
        return self.origins.own(slots)

    def placed(self, request: Request) -> None:
        """The request got its blocks: what it was declined is held from now on, until it is compared."""
        if (declined := self._declined.pop(request.id, None)) is None or request.id in self.samples:
            return
        first, keys = declined[0], declined[1][: max(0, self._most - self.held)]  # others may have been faster
        hold = self._core.pool.scan(keys)[0]
        if hold.keys != keys or not len(hold):  # evicted meanwhile
            hold.drop()
            return
        self.counts.sampled += 1
        self.held += len(hold)
        self.samples[request.id] = _Sample(
            request, first, hold, self.origins.of(hold.slots), until=self._clock() + _KEEP
        )  # fmt: skip

    def compare(self, request: Request, complete: int, owner: Owner) -> Compare | None:
        """The request's first `complete` blocks are computed after this step: what of them is to be compared then."""
        sample = self.samples.get(request.id)
        if sample is None or sample.over:
            return None
        if request.stale:
            self._end(sample)
            return None
        begin, end = sample.done, min(complete - sample.first, len(sample.hold))
        if end <= begin:
            return None
        sample.done, sample.until = end, self._clock() + _KEEP
        places = np.arange(sample.first + begin, sample.first + end)
        scratch = self._core.pool.allocate(end - begin) if int(places[-1]) < len(request.g1) else None
        if scratch is None:
            self.counts.skipped += end - begin
            self._settle(sample)
            return None
        sources = np.asarray([request.g1[place] for place in places.tolist()], np.int64)
        job = self._core.compare(scratch, sources, places, owner, self._patience)
        sample.jobs.add(job.id)
        self._jobs[job.id] = sample
        return Compare(job.id, request.id, pack(sources), pack(scratch.slots), pack(sample.hold.slots[begin:end]))

    def finished(self, request: Request) -> None:
        """The request is over: nothing more of it will be computed."""
        self._declined.pop(request.id, None)
        if (sample := self.samples.get(request.id)) is not None:
            self._end(sample)

    # ------------------------------------------------------------------ answers

    def answered(self, job: StepCopy) -> dict[str, Any] | None:
        """A comparison ended on every rank; what is to be reported, if blocks differ."""
        sample = self._jobs.pop(job.id)
        job.lease.drop()
        sample.jobs.discard(job.id)
        looked = job.outcomes <= Outcome.CORRUPT
        wrong = np.flatnonzero(job.outcomes == Outcome.CORRUPT)
        report = None
        if not sample.void:
            self.counts.compared += int(looked.sum())
            self.counts.skipped += int((~looked).sum())
            self.counts.mismatched += len(wrong)
            if looked.all() and not len(wrong):
                self._agrees(sample, job)
            if len(wrong):
                report = self._report(sample, job, wrong)
        self._settle(sample)
        return report

    def _agrees(self, sample: _Sample, job: StepCopy) -> None:
        """All that could be compared is right."""
        foreign = any(sample.origins[at - sample.first]["from"] != ENGINE for at in job.places.tolist())
        if self._prove and foreign and sample.request.family not in self.proven:
            self.proven.add(sample.request.family)
            log.info("KVBM: request %.100s computed the same blocks that another process had stored", sample.request.id)

    def _report(self, sample: _Sample, job: StepCopy, wrong: Slots) -> dict[str, Any]:
        by_rank = {rank: np.frombuffer(errors, np.float32) for rank, errors in sorted(job.errors.items())}
        blocks = []
        for at in wrong.tolist():
            of = int(job.places[at]) - sample.first
            apart = {str(rank): float(errors[at]) for rank, errors in by_rank.items()}
            blocks.append(
                {
                    "key": sample.hold.keys[of].hex(),
                    "block_of_prompt": int(job.places[at]),
                    "tier": "g2",
                    "slot": int(sample.hold.slots[of]),
                    **sample.origins[of],
                    "distance_by_rank": {rank: value if np.isfinite(value) else None for rank, value in apart.items()},
                }
            )
        record = sample.request.record
        return {
            "request_id": sample.request.id,
            "prompt_tokens": record.prompt_tokens,
            "held_by_engine_blocks": sample.first,
            "staged_for_it": dict(record.staged),
            "compared": len(job.outcomes),
            "differ": blocks,
        }

    # ------------------------------------------------------------------ the end of a sample

    def _end(self, sample: _Sample) -> None:
        """Compare nothing more of it."""
        if not sample.void:
            self.counts.skipped += len(sample.hold) - sample.done
        sample.done, sample.over = len(sample.hold), True
        self._settle(sample)

    def _settle(self, sample: _Sample) -> None:
        """Let go of a sample of which everything was compared."""
        if sample.done < len(sample.hold) or sample.jobs:
            return
        if self.samples.get(sample.request.id) is sample:
            del self.samples[sample.request.id]
            self.held -= len(sample.hold)
            sample.hold.drop()

    def tick(self) -> None:
        """Let go of what no request gets to."""
        now = self._clock()
        for sample in [each for each in self.samples.values() if now > each.until and not each.over]:
            self._end(sample)

    def clear(self) -> None:
        """A new generation."""
        self._declined.clear()
        self.proven.clear()
        for sample in list(self.samples.values()):
            sample.void = True
            self._end(sample)
