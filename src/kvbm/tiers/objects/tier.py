"""Shared storage (G4) as a tier: what comes from there, and what goes there. Under the leader's lock.

SharedStorage are runs of consecutive blocks, found by the key of their last block. Whether one is there is looked up in
memory; the read is the truth.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress, islice, repeat
from typing import Any, ClassVar, Final

import numpy as np

from kvbm.blocks import Pinned, Staged
from kvbm.core.outcome import Outcome
from kvbm.core.region import Slots
from kvbm.link.messages import Result
from kvbm.stores.objects.names import Names
from kvbm.tiers.gate import Gate
from kvbm.tiers.host import Landing
from kvbm.tiers.moves import Ended, Passage
from kvbm.tiers.objects.orders import (
    TIER,
    AttachArenas,
    Got,
    Hot,
    Known,
    RankArena,
    Told,
    Touch,
    Tried,
    TryStorage,
    decode_answer,
)
from kvbm.tiers.objects.presence import Heads, KnownNames
from kvbm.tiers.objects.traffic import Traffic
from kvbm.tiers.objects.trials import Trials
from kvbm.tiers.objects.uploads import Candidate, Uploads
from kvbm.tiers.objects.warm import Warmth
from kvbm.tiers.sums import Sums, bound
from kvbm.tiers.tier import Give, Mask, Record, Seeker

log = logging.getLogger(__name__)

_MOST_ENDS: Final = 200_000
"""Ends of runs whose names are remembered: a name is a hash, and is made once for each prompt."""
_TOUCH_EVERY_S: Final = 30.0
_MOST_TOUCHED: Final = 20_000
_FOREVER: Final = (0, float("inf"))


class Runs:
    """Which keys end runs, by what names, and which of these are there."""

    def __init__(self, names: Names, run: int, presence: KnownNames) -> None:
        self.run, self.presence, self._names = run, presence, names
        self._heads: dict[bytes, int] = {}
        """Of keys that end runs, the heads of their names, the oldest first."""

    def note(self, keys: Sequence[bytes]) -> list[bytes]:
        """Those of a prompt, from its first block on, that end runs."""
        ends = list(keys[self.run - 1 :: self.run])
        self.note_ends(ends)
        return ends

    def note_ends(self, ends: Sequence[bytes]) -> None:
        """These end runs."""
        known = self._heads
        if new := [end for end in ends if end not in known]:
            known.update(zip(new, self._names.heads(new).tolist(), strict=True))
            if len(known) > _MOST_ENDS:
                for end in [*islice(known, len(known) - _MOST_ENDS // 2)]:
                    del known[end]

    def heads(self, ends: Sequence[bytes]) -> Heads:
        """Of the names of the runs that end with these keys."""
        self.note_ends(ends)
        return self._known(ends)

    def _known(self, keys: Sequence[bytes]) -> Heads:
        return np.fromiter(map(self._heads.get, keys, repeat(0)), np.uint64, len(keys))

    def there(self, keys: Sequence[bytes]) -> list[tuple[int, bytes]]:
        """Of these, in prompt order, the positions of ends of runs that are there, and their keys."""
        return [(at, keys[at]) for at in np.flatnonzero(self.presence.among(self._known(keys))).tolist()]

    def known(self, ends: Sequence[bytes]) -> Mask:
        """Which of the runs that end with these keys are there."""
        return self.presence.among(self.heads(ends))


@dataclass(slots=True, eq=False)
class ObjectsOffer:
    """Runs that a prompt wants (`Offer`). `ends` has, for each block, the last key of its run; `within` its place
    there."""

    tier: ClassVar[str] = TIER
    words: ClassVar[str] = "shared storage"
    keeps: ClassVar[bool] = True

    objects: SharedStorage
    keys: Sequence[bytes]
    parents: Sequence[bytes | None]
    places: Slots | None
    ends: Sequence[bytes]
    within: Slots
    cuts: Sequence[int]
    """Where reads end: behind the last block of each run."""
    terms: Sequence[tuple[int, float]] = field(init=False)

    def __post_init__(self) -> None:
        self.terms = [_FOREVER] * len(self.keys)

    @property
    def gate(self) -> Gate:
        return self.objects.traffic.gate

    @property
    def queue(self) -> object:
        return self.objects

    def accept(self) -> None:
        """Nothing is held there: what is deleted meanwhile is missing."""

    def failing(self) -> str | None:
        return self.objects.problem

    def read(self, at: Slots, into: Staged, ended: Ended) -> int:
        return self.objects.traffic.get(self.ends[int(at[0])], self.within[at], into, ended)

    def cancel(self, jobs: Collection[int]) -> None:
        self.objects.traffic.cancel(jobs)

    def judge(self, at: Slots, passage: Passage) -> None:
        if ((passage.outcomes == Outcome.MISSING) | (passage.outcomes == Outcome.CORRUPT)).any():
            self.objects.forget(self.ends[int(at[0])])

    def drop(self) -> None:
        """Nothing is held."""


class AskedRuns:
    """Last keys of runs that requests asked for and nobody was told of."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ends: dict[bytes, None] = {}
        self._next = clock() + _TOUCH_EVERY_S

    def add(self, ends: Iterable[bytes]) -> None:
        """These were asked for. Of too many, the last are left out."""
        self._ends.update(zip(islice(ends, _MOST_TOUCHED - len(self._ends)), repeat(None)))

    def due(self) -> list[bytes]:
        """What is to be told now."""
        if self._clock() <= self._next:
            return []
        ends, self._next = [*self._ends], self._clock() + _TOUCH_EVERY_S
        self._ends.clear()
        return ends

    def clear(self) -> None:
        """Nobody is to be told."""
        self._ends.clear()


class SharedStorage:
    """See the module, and `Tier`. `uploads` makes what decides about writes; `where` is the address, for people."""

    name: ClassVar[str] = TIER
    words: ClassVar[str] = "shared storage"
    keeps: ClassVar[bool] = True
    pool: ClassVar[None] = None

    def __init__(
        self, traffic: Traffic, runs: Runs, sums: Sums, uploads: Callable[[SharedStorage], Uploads],
        warmth: Warmth, clock: Callable[[], float], where: str,
    ) -> None:  # fmt: skip
        self.traffic, self.runs, self._sums, self._where = traffic, runs, sums, where
        self.trials = Trials(where, self._try, clock)
        traffic.listen(self._judge)
        self._arenas: dict[int, RankArena] = {}
        self._touched = AskedRuns(clock)
        self.corrupt = 0
        """Blocks that came and were not what they had to be."""
        self.told = Told()
        self.uploads, self.warmth = uploads(self), warmth

    # ------------------------------------------------------------------ whether it works

    def _try(self, number: int) -> None:
        self.traffic.tell(TryStorage(number, anew=self.trials.problem is not None))

    @property
    def problem(self) -> str | None:
        return self.trials.problem

    @property
    def writes(self) -> bool:
        """See `Shelf`."""
        return self.trials.refusal is None and self.problem is None

    def _close(self, why: str) -> None:
        """It is not used any more."""
        self.trials.off = self.trials.off or why
        self._drop()
        self.traffic.leave()

    def _drop(self) -> None:
        """Nothing that is known of it counts."""
        self.uploads.clear()
        self.warmth.end()
        self.runs.presence.clear()
        self._touched.clear()

    def _judge(self, passage: Passage) -> None:
        self.corrupt += int((passage.outcomes == Outcome.CORRUPT).sum())
        self.trials.judge(passage)

    def hear(self, body: bytes) -> None:
        match answer := decode_answer(body):
            case RankArena():
                self._arenas[answer.rank] = answer
                if len(self._arenas) == len(self.traffic.ranks):
                    self.traffic.tell(AttachArenas([self._arenas[rank] for rank in self.traffic.ranks]))
                    self.trials.begin()
            case Tried():
                if self.trials.take(answer):
                    self.traffic.gate.forget_reads()
                elif answer.off:
                    self._close(answer.problem or "")
            case Known(came=came, went=went, anew=anew) if self.trials.off is None:
                if anew:
                    self.runs.presence.clear()
                self.runs.presence.hear(came, went)
            case Hot(runs=hot):
                self.warmth.hear(hot)
            case Got():
                self.traffic.got(answer)
            case Told():
                self.told = answer

    def sick(self, why: str) -> None:
        if self.trials.off is None:
            log.error("KVBM: shared storage (G4) is left alone until the engine is started anew: %s", why)
            self._close(why)

    # ------------------------------------------------------------------ what a request does

    def covers(self, keys: Sequence[bytes]) -> Mask:
        mask = np.zeros(len(keys), np.bool_)
        for at, _ in self.runs.there(keys):
            mask[max(0, at - self.runs.run + 1) : at + 1] = True
        return mask

    def known(self, ends: Sequence[bytes]) -> Mask:
        """See `Shelf`."""
        return self.runs.known(ends)

    def seek(self, seeker: Seeker, keys: Sequence[bytes], first: int | None, give: Give) -> None:
        before = dict(zip(seeker.keys[1:], enumerate(seeker.keys), strict=False))
        place = {key: at for at, key in enumerate(seeker.keys)}
        end_of: dict[bytes, tuple[bytes, int]] = {}
        for _, end in self.runs.there(seeker.keys):
            last = place[end]
            for at in range(max(0, last - self.runs.run + 1), last + 1):
                end_of[seeker.keys[at]] = end, at - last + self.runs.run - 1
        wanted = [key for key in keys if key in end_of]
        ends = [end_of[key][0] for key in wanted]
        cuts = [at + 1 for at in range(len(ends)) if at + 1 == len(ends) or ends[at + 1] != ends[at]]
        offer = ObjectsOffer(
            self, wanted, [before[key][1] if key in before else None for key in wanted],
            np.array([place[key] for key in wanted], np.int64), ends,
            np.array([end_of[key][1] for key in wanted], np.int64), cuts,
        )  # fmt: skip
        if not wanted or not give(offer):
            offer.drop()

    def asked(self, keys: Sequence[bytes]) -> None:
        ends = self.runs.note(keys)
        self._touched.add(compress(ends, self.runs.known(ends)))

    def over(self, keys: Sequence[bytes], record: Record) -> None:
        if self.trials.off is None:
            self.runs.note(keys)
            self.uploads.over(keys, record)

    # ------------------------------------------------------------------ what host memory does

    def landing(self, slots: Slots, keys: Sequence[bytes], how: Landing) -> None:
        self._sums.note(slots, keys, how.sums)

    def landed(self, keys: Sequence[bytes], how: Landing) -> None:
        if how.origin != TIER and how.places is not None and self.trials.off is None:
            self.uploads.landed(keys, how.places.tolist())

    # ------------------------------------------------------------------ what is moved

    def put(self, run: Candidate, blocks: Pinned, ended: Ended) -> bool:
        """See `Shelf`."""
        slots = blocks.slots
        if self._sums.known(slots) < len(slots):
            return False
        sums = [bound(np.frombuffer(row, np.uint64), run.keys) for row in self._sums.of(slots)]
        priorities = blocks.terms[0].astype(np.uint8).tobytes()
        end = run.keys[-1]

        def there(passage: Passage) -> None:
            if passage.done.all() and self.trials.off is None:
                self.runs.presence.add(self.runs.heads([end]))
            ended(passage)

        self.traffic.put(run, slots, priorities, b"".join(each.tobytes() for each in sums), there)
        return True

    def forget(self, end: bytes) -> None:
        """The run that ends with this key is not there, or is damaged."""
        self.runs.presence.discard(self.runs.heads([end]))

    def answer(self, result: Result) -> bool:
        return self.traffic.answer(result)

    def pump(self) -> None:
        self.uploads.pump()
        if self.problem is None:
            self.warmth.pump()

    def tick(self) -> None:
        if self.trials.off is not None:
            return
        if self.traffic.late():
            self.trials.fail("no answer about a move within its deadline")
        self.trials.tick()
        if ends := self._touched.due():
            self.traffic.tell(Touch(ends))

    # ------------------------------------------------------------------ its end

    def clear(self, *, lasting: bool) -> None:
        """A new generation. Whether others have begun it too is not known, so this process uses the storage no more;
        with `lasting` nothing that was known counts, and what comes is written. Nothing is deleted there."""
        if not lasting:
            if self.trials.off is None:
                log.warning("KVBM: after a reset this engine does not use shared storage until it is restarted")
            self._close("a reset began a new generation")
            return
        self._drop()
        self.traffic.cancel_all()

    def leave(self, why: str) -> None:
        self._close(why)

    @property
    def drains(self) -> bool:
        return self.writes

    def drain(self) -> None:
        """What waits is written; nothing is added."""

    @property
    def drained(self) -> bool:
        return self.uploads.idle or not self.writes

    def stop(self) -> None:
        self.runs.presence.close()

    def close(self) -> None:
        """Its rank says the rest."""

    # ------------------------------------------------------------------ what is told

    def counts(self) -> dict[str, int]:
        uploads = self.uploads
        return {
            "refused": uploads.refused, "cancelled": uploads.cancelled, "corrupt": self.corrupt,
            "runs": len(self.runs.presence), "stuck": self.told.stuck, "warmed": self.warmth.warmed,
        }  # fmt: skip

    def status(self) -> Mapping[str, Any]:
        told = self.told
        return {
            "url": self._where, "writes": self.trials.refusal is None, "run_blocks": self.runs.run,
            "objects": told.objects, "bytes": told.nbytes, "bound_bytes": told.bound, "deleted": told.deleted,
            "undeletable": told.undeletable, "waiting": self.uploads.waiting,
            "in_flight": {"put": self.uploads.in_flight, "get": self.traffic.reading},
            "rates": self.traffic.gate.rates(),
        }  # fmt: skip

    def namesakes(self) -> tuple[str, ...]:
        return ()

    def limits(self) -> str | None:
        sentences = []
        if (why := self.trials.refusal) is not None:
            sentences.append(f"{self._where} is read, and nothing is written to it: {why}")
        if left := self.told.undeletable:
            sentences.append(
                f"{left} damaged runs cannot be deleted from {self._where} by this engine, which computes their "
                "blocks; with credentials that may delete: kvbm store verify --repair"
            )
        return "; ".join(sentences) or None
