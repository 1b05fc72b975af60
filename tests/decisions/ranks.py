"""The workers of a history: what they are told waits until the dice let it end, in any order, well or not."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import numpy as np

from kvbm.core.outcome import Outcome
from tests.decisions.words import ANSWERS, Told, Words, told
from tests.leader.roles import Stage

DONE, MISSING, CORRUPT, FAILED = Outcome.DONE, Outcome.MISSING, Outcome.CORRUPT, Outcome.FAILED
ANSWERED = {"copy", "compare", "write", "read", "pull", "probe", "foresee"}
DIGESTS = [bytes([number]) * 32 for number in (1, 2, 3)]


class Pending(NamedTuple):
    """What one rank has not answered."""

    rank: int
    told: Told


class Ranks:
    """`mood` is how many of a hundred blocks end badly. `ended` hears of a copy that the last rank has answered, and
    the worst outcome of each of its blocks. `held` are the digests of the adapters that each rank has."""

    def __init__(
        self, stage: Stage, words: Words, log: Callable[[str], None], dice: Random, mood: int,
        ended: Callable[[int, list[Outcome]], None], *, sums: bool,
    ) -> None:  # fmt: skip
        self.stage, self.words, self._log, self._dice, self.mood = stage, words, log, dice, mood
        self._ended, self._sums = ended, sums
        self.pending: list[Pending] = []
        self.held = [{1: DIGESTS[0], 2: DIGESTS[1]} for _ in stage.workers]
        self.probes: str | None = None
        """What probes find wrong."""
        self.broken: set[str] = set()
        """Kinds of moves that fail, whatever the mood is."""
        self._given_up: set[int] = set()
        self._open: dict[int, tuple[int, list[Outcome]]] = {}
        """Of each copy, how many ranks have to answer, and what those said that have."""

    # ------------------------------------------------------------------ hearing

    def step(self, step: Any) -> None:
        """What a step has for them. A load or store begins with it."""
        expected = step.adapters.loads if step.adapters is not None else {}
        for each in [*step.loads, *step.stores, *step.compares]:
            one = told(each)
            one.fields["expected"] = expected.get(each.job)
            self._put(one)
            self._open[each.job] = (len(self.stage.workers), [DONE] * len(each.g1_slots()))
        if step.adapters is not None and step.adapters.used:
            self._put(Told("used", {"step": step.adapters.step, "used": step.adapters.used}))

    def _put(self, message: Told) -> None:
        self.pending += [Pending(rank, message) for rank in self.stage.workers]

    def hear(self) -> None:
        """What came over the channels."""
        for rank in self.stage.workers:
            for message in self.stage.hear(object, rank):
                self._log(f"  rank {rank} < {self.words.said(message)}")
                one = told(message)
                if one.kind in ("cancel", "give up"):
                    self._given_up.update(one.fields["jobs"])
                if one.kind in ANSWERED:
                    self.pending.append(Pending(rank, one))

    # ------------------------------------------------------------------ answering

    def some(self, most: int) -> None:
        """Some of what waits ends."""
        for _ in range(min(most, len(self.pending))):
            self.one(self._dice.randrange(len(self.pending)))

    def all(self) -> None:
        """All of it ends, in any order, and what comes of that."""
        for _ in range(100):
            self.some(len(self.pending))
            self.stage.tick()
            self.hear()
            if not self.pending:
                return

    def of(self, job: int) -> None:
        """A copy ends, on every rank."""
        for at in reversed([at for at, each in enumerate(self.pending) if each.told.fields.get("job") == job]):
            self.one(at)

    def one(self, at: int) -> None:
        """This one ends."""
        each = self.pending[at]
        if each.told.kind == "used":  # a rank speaks of its steps in order
            at = next(
                at for at, other in enumerate(self.pending) if other.rank == each.rank and other.told.kind == "used"
            )
        rank, (kind, fields) = self.pending.pop(at)
        match kind:
            case "used":
                digests = [self.held[rank].get(number, b"") for number in fields["used"]]
                self.say(rank, "used", fields["step"], digests if self._dice.random() < 0.97 else [])
            case "foresee":
                number = fields["adapter"].number
                self.say_only("foreseen", fields["question"], self._dice.choice([self.held[rank][number], b""]))
            case "probe":
                self.say(rank, "probed", self.probes, fields["number"])
            case _:
                self._end(rank, kind, fields)

    def say(self, rank: int, kind: str, *fields: Any) -> None:
        """A rank says this of itself."""
        self._log(f"rank {rank} > {kind} {fields}")
        if self.stage.workers[rank].open:
            self.stage.say(ANSWERS[kind](rank, *fields), rank)

    def say_only(self, kind: str, *fields: Any) -> None:
        """The first rank says this, without its number."""
        self._log(f"rank 0 > {kind} {fields}")
        if self.stage.workers[0].open:
            self.stage.say(ANSWERS[kind](*fields))

    def _end(self, rank: int, kind: str, fields: dict[str, Any]) -> None:
        job, count = fields["job"], len(fields["g2"] if "g2" in fields else fields["stored"]) // 4
        cancelled = job in self._given_up and self._dice.random() < 0.8
        outcomes = [FAILED] * count if cancelled else [self._outcome(kind) for _ in range(count)]
        if kind == "copy" and (expected := fields.get("expected")) is not None and self._unlike(rank, fields, expected):
            outcomes = [FAILED] * count
        if not cancelled and self._dice.random() < 0.01:
            outcomes = outcomes[:-1]  # what cannot be
        more: dict[str, Any] = {"error": "cancelled"} if cancelled else {}
        if (self._sums and kind == "copy" and self._dice.random() < 0.95) or kind == "pull":
            more["sums"] = np.arange(count, dtype=np.uint64).tobytes()
        if kind == "compare" and self._dice.random() < 0.9:
            more["errors"] = np.full(count, 0.5, np.float32).tobytes()
        seconds = round(count * self._dice.choice([0.0001, 0.001, 0.05]), 6)
        self._log(f"rank {rank} > {kind} {self.words.job(job)} {[int(each) for each in outcomes]} {sorted(more)}")
        times = 2 if self._dice.random() < 0.02 else 1  # said twice, it counts once
        for _ in range(times if self.stage.workers[rank].open else 0):
            self.stage.reply(job, rank, outcomes, seconds, **more)
        if job in self._open:
            left, worst = self._open.pop(job)
            theirs = outcomes if len(outcomes) == count else [FAILED] * count
            self._open[job] = (left - 1, worst := list(map(max, worst, theirs)))
            if left == 1:
                del self._open[job]
                self._ended(job, worst)

    def _unlike(self, rank: int, fields: dict[str, Any], expected: Any) -> bool:
        """Whether the rank holds another adapter than a load is for."""
        held = self.held[rank].get(expected.adapter.number, b"")
        if held == expected.digest:
            return False
        self.say(rank, "unlike", fields["request"], held)
        return True

    def _outcome(self, kind: str) -> Outcome:
        if kind in self.broken:
            return FAILED
        if self._dice.randrange(100) >= self.mood:
            return DONE
        if kind in ("write", "copy") and self._dice.random() < 0.8:
            return FAILED
        return self._dice.choice([MISSING, CORRUPT, FAILED])
