"""What goes on whether or not the engine steps: answers of the workers, health, what operators want.

The half of the leader (`leader/leader.py`) that any thread may call.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any

from msgspec.structs import replace

from kvbm.abc.observer import Observer
from kvbm.blocks import Pinned, Pool, Staged, Writable
from kvbm.core.config import Settings
from kvbm.core.errors import Broken
from kvbm.core.events import Copied, Event
from kvbm.core.outcome import Outcome
from kvbm.core.region import Slots
from kvbm.leader.copies import InFlight
from kvbm.leader.earlier import Earlier
from kvbm.leader.growing import Growing
from kvbm.leader.invariants import Audit
from kvbm.leader.pace import Answers, Pace
from kvbm.leader.provenance import Provenance
from kvbm.leader.reports import Reports
from kvbm.leader.requests import Request
from kvbm.leader.shadow import Shadow
from kvbm.leader.variants import Variants
from kvbm.link.channel import Link
from kvbm.link.messages import Bye, Foreseen, FromTier, Opened, Result, Sick, Touched, Unlike, Used
from kvbm.observe.recent import Recent
from kvbm.tiers.gate import Gate
from kvbm.tiers.host import ENGINE, Host, Landing
from kvbm.tiers.stack import Stack
from kvbm.tiers.tier import Record

log = logging.getLogger(__name__)

_REST = 60.0
_BROKEN = "an invariant does not hold"


class Housekeeping:
    """See `Leader` for the arguments. What a subclass adds is under the same lock."""

    def __init__(
        self,
        settings: Settings,
        pool: Pool,
        links: dict[int, Link],
        *,
        null: int | None,
        gate: Gate,
        observers: Iterable[Observer],
        clock: Callable[[], float],
        lasting: Sequence[str],
    ) -> None:
        self.pool, self.host = pool, Host(pool)
        self.host.listen(self)
        self.problems: list[str] = []
        self.paused = not settings.enabled
        self.requests: dict[str, Request] = {}
        self.records: OrderedDict[str, Record] = OrderedDict()
        self.links = links
        self._observers = list(observers)
        self._lock = threading.RLock()
        self._copies = InFlight(links, clock)
        self.next_job = self._copies.next_id
        self.dropped = 0
        """Blocks that were handed out again before they were copied."""
        self.answers = Answers()
        self.provenance = Provenance(self.next_job, null)
        """What the engine's blocks are."""
        self._held = 0
        self.off: str | None = None
        """Why nothing is done any more, until the engine is started anew."""
        self._ending = False
        """The engine is shutting down its workers in good order."""
        self.absent: dict[str, str] = {}
        """Tiers that were asked for and are not there, and why."""
        self.shared = list(lasting)
        """Tiers that were asked for and outlive this process, or are shared with others."""
        self.isolated: str | None = None
        """Why none of those is used until the engine is started anew."""
        self.opened: dict[str, dict[int, Opened]] = {}
        """What ranks said about their parts of tiers."""
        self._early: list[FromTier | Sick] = []
        """What ranks said about their memory or files before there was anybody who uses them."""
        self.lower: Stack | None = None
        """What is below host memory, if there is anything."""
        self.growing: Growing | None = None
        """What of host memory is still to come."""
        self.earlier: Earlier | None = None
        """What is to be said to it of what was here before it."""
        self.gate = gate
        self.corrupt = 0
        """Blocks that were not in host memory what had been written there, as their loads found."""
        self.shadow: Shadow | None = None
        """What compares stored blocks with computed ones, if that is wanted."""
        self.quarantined: str | None = None
        """Why nothing that is stored can be trusted, until an operator resumes."""
        self.reports: Reports | None = None
        """Where what is found wrong is written down."""
        self.recent = Recent()
        """What happened last."""
        self._observers.append(self.recent)
        pool.add_observer(self.recent)
        self.pace = Pace(settings.slow_step_ms / 1e3)
        """How long the engine waits for KVBM."""
        self.audit = Audit(self._accounting, clock)
        """Whether invariants hold."""
        self.ticked = time.monotonic()
        """When housekeeping was done last."""
        self._clock = clock
        self._variants = Variants(links, clock, self._seek, self._unlike, self.confirm)
        """Which adapters requests are computed with."""
        self._resting: tuple[str, float] | None = None
        """Why KVBM stands aside for a while, and until when."""

    # ------------------------------------------------------------------ answers

    def _drain(self) -> None:
        heard = False
        for rank, link in self.links.items():
            try:
                messages = link.take()
            except Broken as error:
                messages = []
                self._sick(f"rank {rank}: {error}")
            heard |= bool(messages)
            for message in messages:
                match message:
                    case Bye():
                        self._ending = True
                    case Result() if self.off is not None:
                        self._disbelieve(message)
                    case _ if self.off is not None:
                        pass
                    case Result() | FromTier() if self.lower is not None and self.lower.take(message):
                        pass
                    case Sick(tier=tier) if tier and self.lower is not None:
                        self.lower.take(message)
                    case Result():
                        self._answer(message)
                    case Opened():
                        self.opened.setdefault(message.tier, {})[message.rank] = message
                    case Touched() if self.growing is not None:
                        self.growing.take(message)
                    case FromTier():
                        self._early.append(message)
                    case Sick(tier=tier) if tier:
                        self._early.append(message)
                    case Used() | Foreseen() | Unlike():
                        self._variants.take(message, self.requests)
                    case Sick(rank=sick, problem=problem):
                        self.turn_off(f"rank {sick}: {problem}")
                    case _:
                        log.warning("KVBM: unexpected %s from rank %d", type(message).__name__, rank)
            if not link.open and not self._ending:
                self._sick(f"the worker of rank {rank} is gone")
        if heard:
            self._pump()

    def _pump(self) -> None:
        if self.lower is None:
            return
        if self.standing_aside() is None:
            self.lower.pump()
        else:
            self.lower.stand_aside()

    def _disbelieve(self, result: Result) -> None:
        """Takes an answer about a copy, and does not believe it."""
        if (job := self._copies.answer(result)) is not None:
            if isinstance(job.lease, Pinned):
                self._held -= len(job.lease)
            job.lease.drop()
        elif self.lower is not None:
            self.lower.take(replace(result, outcomes=bytes([Outcome.FAILED]) * len(result.outcomes)))

    def _answer(self, result: Result) -> None:
        job = self._copies.answer(result)
        if job is None:
            return
        if isinstance(job.lease, Writable):
            if self.shadow is not None and (wrong := self.shadow.answered(job)) is not None:
                self._quarantine(wrong)
            return
        if isinstance(job.lease, Staged):
            self._variants.copied(job)
        failed = int((~job.done).sum()) - job.dropped
        record = job.request.record
        if failed and job.fenced:  # nothing is wrong: the engine is short of blocks
            record.note(f"not offloaded: the engine needed {failed} blocks again before they were copied")
            self.dropped += failed
            failed = 0
        if isinstance(job.lease, Staged):
            with self.host.land(job.lease, job.done, Landing(ENGINE, job.places, job.sums)) as stored:
                if (places := job.places[job.done]).max(initial=-1) >= job.request.asked:
                    self._answered(job.request, stored.keys, places)
            record.offloaded += int(job.done.sum())
            self.emit(Copied("g1", "g2", int(job.done.sum()), failed, job.nbytes, job.seconds))
        else:
            self._held -= len(job.lease)
            good = job.done
            self.provenance.arrived(job.g1[good], [*compress(job.lease.keys, good.tolist())], job.id)
            self.provenance.forget(job.g1[~good])
            self.corrupt += int((job.outcomes == Outcome.CORRUPT).sum())
            if failed:
                bad = ~job.done
                if job.request.variant is not None and job.request.variant.refused is not None:
                    bad = (
                        job.outcomes == Outcome.CORRUPT
                    )  # of another adapter than the workers': what is stored is right
                self.pool.discard(key for key, wrong in zip(job.lease.keys, bad.tolist(), strict=True) if wrong)
            job.lease.drop()
            record.loaded = len(job.g1) - failed
            record.load_ms = job.seconds * 1e3
            if record.outcome == "loading":
                record.outcome = "computing" if not failed else "load failed, computed instead"
            self.emit(Copied("g2", "g1", len(job.g1) - failed, failed, job.nbytes, job.seconds))
        if failed:
            way = "be offloaded" if job.is_store else "load"
            record.note(f"{failed} blocks failed to {way}: {job.error}")
            log.warning("KVBM: %d blocks of request %.100s failed to %s: %s", failed, job.request.id, way, job.error)

    def landing(self, slots: Slots, keys: Sequence[bytes], how: Landing) -> None:
        """See `tiers.host.Listener`."""
        if self.lower is not None:
            self.lower.landing(slots, keys, how)
        if self.earlier is not None and how.origin == ENGINE:
            self.earlier.landing(slots, keys, how)

    def landed(self, blocks: Pinned, how: Landing) -> None:
        """See `tiers.host.Listener`."""
        if self.lower is not None:
            self.lower.landed(blocks.keys, how)

    def _answered(self, request: Request, keys: Sequence[bytes], places: Slots) -> None:
        """Blocks were stored, some of them of an answer, of which nobody knows whether they are asked for again."""
        if (places == request.asked).any():
            first = max(0, request.asked - 1)
            around = request.keys[first : request.asked + 1]  # a session may have taken some back
            if len(around) == request.asked + 1 - first:
                self.answers.given(around[0] if request.asked else None, around[-1])
        if self.answers.rarely_asked:
            self.pool.doubt([*compress(keys, (places >= request.asked).tolist())])

    # ------------------------------------------------------------------ health

    def _sick(self, problem: str) -> None:
        """KVBM stops matching and offloading; the engine goes on by computing."""
        if problem not in self.problems:
            self.problems.append(problem)
            log.error("KVBM is unhealthy and stands aside, the engine goes on without it: %s", problem)

    def turn_off(self, why: str) -> None:
        """Something raised what nobody expected, so nothing is certain. Until the engine is started anew nothing is
        matched, stored or moved, and nothing that is being copied is published. Any thread."""
        with self._lock:
            if self.off is None:
                self.off = why
                self._sick(why)
                if self.lower is not None:
                    self.lower.stand_aside()

    def _quarantine(self, found: dict[str, Any]) -> None:
        """Blocks are stored that are not what their keys say. Which others are is not known: nothing that is stored is
        served any more, in no tier and to nobody, and nothing new is stored, until `resume`."""
        if self.quarantined is not None:
            return
        where = self.reports.save("shadow", found) if self.reports is not None else None
        self.quarantined = (
            f"quarantined: {len(found['differ'])} stored blocks are not what the engine computes for request "
            f"{found['request_id']}{f', see {where}' if where else ''}"
        )
        self._sick(self.quarantined)
        self._clear()

    def _rest(self, why: str) -> None:
        """KVBM stands aside for a minute: it costs the engine more than it can be worth."""
        if self._resting is None:
            self._resting = why, self._clock() + _REST
            self._sick(why)

    def _accounting(self) -> list[str]:
        """What is wrong in the leader's books."""
        raise NotImplementedError

    def _seek(self, request: Request) -> None:
        """A request's keys are known: what is below host memory starts to move."""
        raise NotImplementedError

    def confirm(self, request_id: str, complete: int) -> None:
        """See `Leader`."""
        raise NotImplementedError

    def _unlike(self, request: Request) -> None:
        """Its keys are not those of what it computes."""
        if self.shadow is not None:
            self.shadow.finished(request)

    def _broken(self, problems: list[str]) -> None:
        """An invariant does not hold: whatever is decided from now on may be wrong."""
        if problems and not any(problem.startswith(_BROKEN) for problem in self.problems):
            found = {"problems": problems, "events": self.recent.listed()}
            where = self.reports.save("check", found) if self.reports is not None else None
            self._sick(f"{_BROKEN}: {'; '.join(problems)}{f', see {where}' if where else ''}")

    def check(self, seconds: float) -> dict[str, Any]:
        """Looks at the books and at all slots of all pools, for so long at most; what is wrong, for JSON. Any thread;
        nobody waits for it longer than for a slice."""
        begun, looked = time.monotonic(), dict[str, bool]()
        with self._lock:
            problems, pools = self.audit.books(), self._pools()
        for name, pool in pools.items():
            passes = self.audit.passes.get(name, 0)
            self.audit.begin(name)
            while not (done := self.audit.passes.get(name, 0) > passes) and time.monotonic() - begun < seconds:
                with self._lock:
                    problems += self.audit.look(name, pool)
            looked[name] = done
        with self._lock:
            self._broken(problems)
        return {"problems": problems, "complete": all(looked.values()), "violations": self.audit.violations}

    def _pools(self) -> dict[str, Pool]:
        return {"g2": self.pool} | (self.lower.pools() if self.lower is not None else {})

    def emit(self, event: Event) -> None:
        """Tell the observers. Under the lock."""
        for observer in tuple(self._observers):
            try:
                observer.on_event(event)
            except Exception:
                log.exception("KVBM: an observer failed and is removed")
                self._observers.remove(observer)

    def standing_aside(self) -> str | None:
        """Why KVBM does nothing, if so."""
        if self.problems:
            return f"KVBM is not healthy: {self.problems[0]}"
        if self._ending:
            return "the engine is shutting down"
        return "KVBM is paused" if self.paused else None

    # ------------------------------------------------------------------ operators

    def tick(self) -> None:
        """Housekeeping, a few times a second, also while the engine sleeps: takes results, notices silent workers. What
        it raises turns KVBM off, whoever asked for it: what it had taken is lost."""
        try:
            self._tick()
        except Exception as error:
            log.exception("KVBM: housekeeping went wrong")
            self.turn_off(f"off until the engine is started anew: housekeeping raised {error!r}")

    def _tick(self) -> None:
        with self._lock:
            self._drain()
            if self.off is not None:
                self.ticked = time.monotonic()
                return
            if (job := self._copies.overdue()) is not None:
                self._sick(f"no answer about a copy from rank {min(job.ranks)} within its deadline")
            if self.lower is not None:
                self.lower.tick()
            if self.shadow is not None:
                self.shadow.tick()
            self._pump()
            self._look()

    def _look(self) -> None:
        """Whether KVBM itself is as it should be."""
        self.ticked = time.monotonic()
        if self._resting is not None and self._clock() > self._resting[1]:
            self.problems.remove(self._resting[0])
            self._resting = None
        idle = not self.requests and self._copies.count() == (0, 0)
        self._broken(self.audit.tick(self._pools(), idle=idle))

    def reset(self) -> None:
        """A new generation: nothing stored so far is ever matched again. Requests that live now may carry KV of the old
        one (other weights), so none of their blocks is offloaded any more. Copies that no worker has begun are dropped;
        those that have, end (see `quiesce`)."""
        with self._lock:
            self._drain()
            self._clear()

    def _clear(self) -> None:
        self.pool.clear()
        self.provenance.clear()
        self.earlier = None
        if self.lower is not None:
            self.lower.clear()
        if self.shadow is not None:
            self.shadow.clear()
        for request in self.requests.values():
            request.stale = True

    def attach(self, lower: Stack) -> bool:
        """There is something below host memory from now on. False: nobody wants it any more."""
        with self._lock:
            if self._ending or self.isolated is not None:
                return False
            self.lower = lower
            for message in self._early:
                lower.take(message)
            self._early.clear()
            if self.pool.statistics().generation:
                lower.clear()  # it came too late for that
        return True

    def tell_earlier(self) -> bool:
        """Tells what is below host memory, as of new blocks, of some that were here before it. Whether there are more.
        To be called again and again: in between the engine goes on."""
        with self._lock:
            if self.earlier is not None and (self.lower is None or not self.earlier.tell(self.lower)):
                self.earlier = None
            self._pump()
            return self.earlier is not None

    def isolate(self, why: str) -> None:
        """From now on the content of the weights is not known: all that outlives this process or is shared with others
        stands aside until the engine is started anew. Host memory goes on. Said once; may be called again."""
        with self._lock:
            if self.isolated is not None:
                return
            self.isolated = why
            if self.shared:
                log.warning("KVBM: %s: nothing is stored on disk, shared with others, or read from there", why)
            if self.lower is not None:
                self.lower.isolate(why)

    def bar(self, request_id: str, reason: str) -> None:
        """Load and store nothing more for a request: its keys may not be those of what it computes."""
        with self._lock:
            if (request := self.requests.get(request_id)) is not None:
                request.barred = reason
                if self.shadow is not None:
                    self.shadow.finished(request)  # what it computes proves nothing

    def pause(self) -> None:
        """From now on the engine works as if KVBM were not there. Copies in flight end."""
        with self._lock:
            self.paused = True

    def resume(self) -> None:
        """Undoes `pause`, and ends a quarantine: what was stored before it stays gone."""
        with self._lock:
            self.paused = False
            if self.quarantined is not None:
                self.problems.remove(self.quarantined)
                self.quarantined = None
                log.warning("KVBM: the quarantine is over by an operator's word")

    @contextmanager
    def below(self) -> Iterator[Stack | None]:
        """What is below host memory, which nobody else uses meanwhile."""
        with self._lock:
            yield self.lower

    def in_flight(self) -> tuple[int, int]:
        """(store, load) jobs that some rank has not answered."""
        with self._lock:
            return self._copies.count()

    def degraded(self) -> dict[str, str]:
        """Tiers that are left alone, or are not there, and why. The engine does without them."""
        if self.isolated is not None:
            return dict.fromkeys(self.shared, self.isolated)
        return self.absent | (self.lower.problems() if self.lower is not None else {})

    def smaller(self) -> dict[str, str]:
        """Tiers that are used and stay smaller than they were to be, and why."""
        shortage = self.growing.shortage() if self.growing is not None else None
        return {} if shortage is None else {"g2": shortage}

    def drain(self, seconds: float) -> None:
        """Writes to what lasts what only host memory has, for so long at most, while the engine may go on."""
        begun = time.monotonic()
        with self._lock:
            tiers = self.lower.drains() if self.lower is not None else []
            if not tiers or seconds <= 0 or self.off is not None:
                return
            self._drain()
            for tier in tiers:
                tier.drain()
            self._pump()
        while not all(tier.drained for tier in tiers) and time.monotonic() - begun < seconds:
            if self.standing_aside() is not None:
                break
            time.sleep(0.002)
            self.tick()
        for tier in tiers:
            with self._lock:
                total = self.pool.statistics().registered
                with self.pool.candidates(total) as hold:  # not what requests or writes still hold
                    mask = tier.covers(hold.keys)
                    there = 0 if mask is None else int(mask.sum())
            log.info(
                "KVBM: %d of %d blocks of host memory are on %s, after %.1f s",
                there, total, tier.words, time.monotonic() - begun,
            )  # fmt: skip

    def channels(self) -> list[Link]:
        """What to watch beside a clock: when something arrives, `tick` is due at once. Empty where it can wait."""
        return [link for link in self.links.values() if link.open] if self.lower is not None else []

    def close(self) -> None:
        """Says goodbye to the workers. Blocks stay where they are; the process is about to end."""
        with self._lock:
            self._ending = True
            for link in self.links.values():
                if link.open:
                    try:
                        link.send(Bye())
                    except Broken as error:
                        log.debug("KVBM: %s", error)
                link.close()
            if self.lower is not None:
                self.lower.close()
