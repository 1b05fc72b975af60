"""What one process does about the storage beside moving runs: tries it, lists it, finds the hottest runs, reads and
writes the feed, says what was read, collects, and deletes what is damaged. One thing after the other, on a thread that
may hang; trials are made beside that, on another one.
"""

from __future__ import annotations

import logging
import math
import random
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from itertools import chain, count
from typing import Final, NamedTuple

from msgspec.structs import replace

from kvbm.abc.store import Absent, Damaged, Denied, Listed
from kvbm.core.errors import Broken
from kvbm.stores.objects.blocks import address_of, sums_at
from kvbm.stores.objects.collector import sweep, take_lease
from kvbm.stores.objects.names import EPOCH_S, parse
from kvbm.stores.objects.probe import Fitness, Unfit, probe
from kvbm.tiers.objects.crew import Crew, Job
from kvbm.tiers.objects.feed import SharedFeed
from kvbm.tiers.objects.hot import HotRuns
from kvbm.tiers.objects.mover import Library
from kvbm.tiers.objects.orders import Answer, Hot, Known, Told, Tried, TryStorage

log = logging.getLogger(__name__)

_SLICE: Final = 1_000
"""Names in one message to the leader."""
_HEAD: Final = 8
LET_BE_S: Final = 3_600.0
"""How long a damaged run that cannot be deleted is left alone."""
_LIST_AGAIN: Final = 6
"""So many looks at the feed are between two listings at least."""
_SPREAD_S: Final = 30.0
"""Seconds over which instances try to become the collector of an epoch."""
_PATIENCE: Final = 3
"""Deadlines of one call that a chore may take between two calls."""


class Habits(NamedTuple):
    """Seconds between two looks at the feed; the bound on all objects, in bytes; the deadline of one call; how many
    of the hottest runs are found at the start."""

    feed_s: float
    bound: int
    deadline_s: float
    warm: int = 0


class StorageClock:
    """The storage's time, once it was tried; whether it may be written to; whether what is old may be deleted, also
    where there is no room: the time has to be the storage's."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()
        self._measured = self.known = self.writes = self.collects = False

    def set(self, fitness: Fitness) -> None:
        """As a trial found it."""
        if fitness.ahead_s is not None:
            # Steps of our own clock do not move it.
            self._offset, self._measured = time.time() + fitness.ahead_s - time.monotonic(), True
        self.known, self.writes = True, fitness.refusal is None
        self.collects = self._measured and (self.writes or fitness.full)

    def __call__(self) -> float:
        return time.monotonic() + self._offset


class DamagedRuns:
    """Runs that were not what they have to be. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: set[bytes] = set()
        self.let_be: dict[bytes, float] = {}
        """Damaged ones that could not be deleted, and until when they are left alone."""

    def __bool__(self) -> bool:
        return bool(self._found)

    def alone(self, digest: bytes) -> bool:
        """Whether it is damaged, cannot be deleted, and is left alone."""
        with self._lock:
            if self.let_be.get(digest, math.inf) < time.monotonic():
                del self.let_be[digest]
            return digest in self.let_be

    def count(self) -> int:
        """Those that are left alone."""
        return sum(self.alone(digest) for digest in [*self.let_be])

    def add(self, digest: bytes) -> None:
        if not self.alone(digest):
            with self._lock:
                self._found.add(digest)

    def take(self) -> set[bytes]:
        """Those that were found since the last call."""
        with self._lock:
            found, self._found = self._found, set()
        return found

    def leave(self, digest: bytes) -> None:
        """It cannot be deleted."""
        with self._lock:
            self.let_be[digest] = time.monotonic() + LET_BE_S


class Clerk:
    """`tell` takes messages to the leader; `instance` is our name among instances; `stuck` counts other calls that do
    not return. `tick` is to be called every now and then. Any thread."""

    def __init__(
        self, library: Library, instance: str, habits: Habits, tell: Callable[[Answer], None], *, most_lost: int,
        broken: Callable[[str], None], stuck: Callable[[], int],
    ) -> None:  # fmt: skip
        self._library, self._habits, self._tell, self._stuck = library, habits, tell, stuck
        self._crew: Crew[None] = Crew("kvbm-g4", 2, lambda: None, most_lost=most_lost, broken=broken)
        self.feed = SharedFeed(library, instance, habits.bound, count(int.from_bytes(secrets.token_bytes(3))))
        self.suspects = DamagedRuns()
        self._clock = StorageClock()
        self._rota = Rota(habits.feed_s)
        self._hot: HotRuns | None = HotRuns(library, habits.warm) if habits.warm else None
        """Looked for once, after the first listing that ended."""
        self._listing = RunListing(_LIST_AGAIN * habits.feed_s)
        self._told = Told()

    def came(self, digest: bytes) -> None:
        """This process wrote a run."""
        self.feed.diary.tell([digest])
        if (lately := self._listing.lately) is not None:
            lately.append(digest)

    def touch(self, ends: Sequence[bytes]) -> None:
        """Requests asked for the runs that end with these keys."""
        self.feed.diary.touch([self._library.names.digest(end) for end in ends])

    def leave(self) -> None:
        """Do nothing more."""
        self._rota.over = True

    def try_storage(self, order: TryStorage) -> None:
        """Try the storage, and tell the leader."""
        library, number = self._library, order.number

        def run(job: Job[None], _: None) -> None:
            nbytes, fitness = library.envelope.size(library.format.plain_bytes), None
            try:
                fitness = probe(library.store, self.feed.instance, self.feed.numbers, nbytes)
            except (Unfit, Denied) as error:
                answer = Tried(number, str(error), off=True)
            except Broken as error:
                answer = Tried(number, str(error))
            else:
                answer = Tried(number, refusal=fitness.refusal)
            if not job.end():
                return  # what it found is old by now
            if fitness is not None:
                self._clock.set(fitness)
                if order.anew:
                    self._listing.anew()
            self._tell(answer)

        self._crew.do(Job(run, lambda why: self._tell(Tried(number, why)), self._due()))

    def _due(self) -> float:
        return time.monotonic() + _PATIENCE * self._habits.deadline_s

    def tick(self) -> None:
        """Do what is due, if nothing is being done."""
        self._crew.expire()
        rota = self._rota
        if not self._clock.known or rota.busy or rota.over:
            return
        if self._listing.at <= time.monotonic():
            self._begin(self._list)
        elif self.suspects:
            self._begin(self._judge)
        elif self._hot is not None and self._listing.ended:
            self._begin(self._warm)
        elif (due := rota.due(self._clock)) is not None:
            self._begin({"feed": self._look, "touch": self._touch, "collect": self._collect}[due])

    def _begin(self, do: Callable[[Job[None]], None]) -> None:
        rota = self._rota
        rota.busy = True

        def run(job: Job[None], _: None) -> None:
            try:
                do(job)
                rota.failing = False
            except Broken as error:
                log.log(logging.DEBUG if rota.failing else logging.WARNING, "KVBM: shared storage (G4): %s", error)
                rota.failing = True
            if job.end():
                rota.busy = False

        def failed(why: str) -> None:
            rota.busy = False

        self._crew.do(Job(run, failed, self._due()))

    def _goes_on(self, job: Job[None]) -> bool:
        """A call has returned: the next one may take as long. False: nobody wants any more of it."""
        job.due = self._due()
        return not (job.over or self._rota.over)

    # ------------------------------------------------------------------ on its thread

    def _list(self, job: Job[None]) -> None:
        """All runs of the namespace that there are. From its first page on what was known counts no more, but for what
        an attempt found that failed."""
        library, listing, now = self._library, self._listing, self._clock()
        lately = listing.begins()
        try:
            told = self._told_before(job, now)
            pages = iter(library.store.list(library.names.prefix))
            first = next(pages, ())
            if not self._goes_on(job):
                return
            if listing.counts_anew():
                self._tell(Known(anew=True))
            self._say(lately, [])
            if self._hot is not None:
                self._hot.begins()
            for page in chain([first], pages):
                if not self._goes_on(job):
                    return
                self._take(page)
        except Exception:
            if not job.over:
                listing.later()
            raise
        if not job.over:
            if told is not None:
                self.feed.skip(told, now)
            listing.ends()

    def _told_before(self, job: Job[None], now: float) -> dict[str, float] | None:
        """What was told until now, which a listing that ends knows better; what is told from now on counts."""
        try:
            return self.feed.notes(now, lambda: self._goes_on(job))
        except Broken as error:
            log.debug("KVBM: the feed of shared storage could not be read before the listing: %s", error)
            return None

    def _take(self, page: Sequence[Listed]) -> None:
        """A page of the listing."""
        ours = [(parse(each.name), each.modified) for each in page]
        runs = [(each.digest, written) for each, written in ours if each is not None and each.kind == "run"]
        self._say([digest for digest, _ in runs], [])
        if (hot := self._hot) is not None:
            for digest, written in runs:
                hot.listed(digest, written)

    def _warm(self, job: Job[None]) -> None:
        """Finds the next few of the hottest runs. Where that fails or hangs, no more are looked for."""
        hot, self._hot = self._hot, None
        assert hot is not None
        if runs := hot.more(lambda: self._goes_on(job)):
            self._tell(Hot(runs))
        if not (hot.over or job.over):
            self._hot = hot

    def _say(self, came: Sequence[bytes], went: Sequence[bytes]) -> None:
        """The leader hears of these, a slice at a time, but for what is left alone."""
        if self.suspects.let_be:
            came = [digest for digest in came if not self.suspects.alone(digest)]
        for at in range(0, max(len(came), len(went)), _SLICE):
            new, gone = (b"".join(each[:_HEAD] for each in these[at : at + _SLICE]) for these in (came, went))
            self._tell(Known(new, gone))

    def _look(self, job: Job[None]) -> None:
        """Tells the others what is new here, then hears what is new elsewhere."""
        if self._clock.writes:
            self.feed.write(self._clock())
        if (news := self.feed.read(self._clock(), lambda: self._goes_on(job))) is not None:
            self._say(news.came, news.went)
            if news.missing:
                self._listing.soon()
            stuck, undeletable = self._stuck() + self._crew.lost, self.suspects.count()
            self._tell(replace(self._told, stuck=stuck, undeletable=undeletable))

    def _touch(self, job: Job[None]) -> None:
        if self._clock.writes:
            self.feed.write_touched(self._clock())

    def _collect(self, job: Job[None]) -> None:
        """Once in an epoch, by the first that comes."""
        library, now = self._library, self._clock()
        if not self._clock.collects or not take_lease(library.store, library.envelope, self.feed.instance, now):
            return
        swept = sweep(library.store, library.envelope, self._habits.bound, now, lambda: not self._goes_on(job))
        gone = [digest for space, digest in swept.deleted if space == library.names.space]
        self._went(gone)
        if job.over:
            return  # not all was counted
        self._told = Told(
            swept.objects - len(swept.deleted), swept.total - swept.freed, swept.bound,
            self._told.deleted + len(swept.deleted),
        )  # fmt: skip

    def _went(self, gone: Sequence[bytes]) -> None:
        """These were deleted here."""
        self._say([], gone)
        self.feed.diary.tell(went=gone)

    def _judge(self, job: Job[None]) -> None:
        """Deletes what is damaged when it is read for the second time, too."""
        suspects = self.suspects.take()
        try:
            for digest in [*suspects]:
                damaged = self._damaged(digest)
                suspects.discard(digest)
                if damaged:
                    self._delete(digest)
                elif damaged is not None:
                    self._say([digest], [])
                if not self._goes_on(job):
                    break
        finally:
            for digest in suspects:  # another time
                self.suspects.add(digest)

    def _delete(self, digest: bytes) -> None:
        name = self._library.names.run(digest)
        try:
            self._library.store.delete([name])
        except Broken as error:
            log.warning("KVBM: run %s in shared storage is damaged and cannot be deleted: %s", name, error)
            self.suspects.leave(digest)
            self._say([], [digest])
        else:
            self._went([digest])

    def _damaged(self, digest: bytes) -> bool | None:
        """None: it is gone."""
        library = self._library
        name, shape = library.names.run(digest), library.format.shape
        try:
            plain = library.envelope.open(name, memoryview(library.store.get(name, library.most_bytes)).cast("B"))
            run = library.format.parse(plain)
        except Absent:
            return None
        except Damaged:
            return True
        if library.names.digest(run.keys[-1]) != digest:
            return True
        data = address_of(plain) + library.format.data_at(plain)
        return bool((sums_at(data, shape.block_bytes, shape.ranks * shape.blocks) != run.sums.reshape(-1)).any())

    def close(self, seconds: float) -> None:
        """Tell the others what is new, and wait so long at most for that."""
        if self._clock.known and self._clock.writes and not self._rota.over:
            self._begin(lambda job: self.feed.write(self._clock()))
        self._rota.over = True
        self._crew.close(seconds)


class RunListing:
    """When all runs are listed. `pause_s` are at least between two. Any thread."""

    def __init__(self, pause_s: float) -> None:
        self._pause_s, self._begun, self._lock = pause_s, 0.0, threading.Lock()
        self._counts_anew = True
        self.at = 0.0
        """When it is to be done."""
        self.ended = False
        """Whether the last one that began has ended."""
        self.lately: list[bytes] | None = None
        """What this process has written since it began."""

    def begins(self) -> list[bytes]:
        """It is done now; `lately` is what this process writes meanwhile."""
        with self._lock:
            self._begun, self.ended, self.lately = time.monotonic(), False, []
            return self.lately

    def counts_anew(self) -> bool:
        """Whether what was known before counts no more: not where an attempt has failed after its first page."""
        with self._lock:
            anew, self._counts_anew = self._counts_anew, False
            return anew

    def ends(self) -> None:
        """It was done, unless it is to be done again meanwhile."""
        with self._lock:
            self.ended, self.lately = True, None
            if self.at <= self._begun:
                self.at = math.inf

    def anew(self) -> None:
        """At once."""
        with self._lock:
            self.at, self._counts_anew = time.monotonic(), True

    def soon(self) -> None:
        """What was listed is not what there is."""
        with self._lock:
            self.at, self._counts_anew = min(self.at, self._begun + self._pause_s), True

    def later(self) -> None:
        """It failed."""
        with self._lock:
            self.at = time.monotonic() + self._pause_s


class Rota:
    """What is done again and again, and when next. `feed_s` are the seconds from one look at the feed to the next."""

    def __init__(self, feed_s: float) -> None:
        self._feed_s, now = feed_s, time.monotonic()
        self._next = {"feed": 0.0, "touch": now + EPOCH_S, "collect": now + random.uniform(0, _SPREAD_S)}
        self.busy = self.over = False
        """Whether something is being done, and nothing is to be done any more."""
        self.failing = False
        """Whether the last of it failed, which was said then."""

    def due(self, clock: Callable[[], float]) -> str | None:
        """What is due now, if anything; then it is due later again. `clock` is the storage's."""
        now = time.monotonic()
        due = next((name for name, when in self._next.items() if when <= now), None)
        if due is not None:
            left = EPOCH_S - clock() % EPOCH_S
            seconds = {"feed": self._feed_s, "touch": float(EPOCH_S), "collect": left + random.uniform(0, _SPREAD_S)}
            self._next[due] = now + seconds[due]
        return due
