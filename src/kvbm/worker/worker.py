"""The worker: memory and copies of one rank. Runs beside the engine's model runner.

Per engine step: `before_step` (fence, asynchronous loads), `before_forward` (loads this forward pass needs),
`after_forward` (offload what it wrote), `collect` (what ended). These belong to the engine's worker thread. Copies run
on the transport's threads and report to the leader themselves, over the channel, the moment they end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from kvbm.abc.transport import Completion, Plan
from kvbm.core import cpus
from kvbm.core.config import Settings
from kvbm.core.errors import Broken
from kvbm.core.outcome import Outcome
from kvbm.core.region import Region, Slots
from kvbm.link.channel import Link, connect
from kvbm.link.messages import (
    Allot,
    Bye,
    Cancel,
    Compare,
    Copy,
    Foresee,
    GiveUp,
    Hello,
    Hurry,
    Open,
    Opened,
    Ready,
    Refused,
    Step,
    ToTier,
    Touched,
    unpack,
)  # fmt: skip
from kvbm.stores.checksum import sums_of, verified
from kvbm.stores.memory import Arena
from kvbm.tiers.tier import RankSide, RankTier
from kvbm.transfer.executor import Executor
from kvbm.worker.compare import Comparisons
from kvbm.worker.residents import AdapterHolder, Residents
from kvbm.worker.telling import Telling

log = logging.getLogger(__name__)

_TOUCH_LOG = 2.0
_TOUCH_REPORT = 0.2
"""Seconds from one word on slots that can be used to the next: the leader stops for each."""
_TOUCH_END = 0.8
_TIER_END = 2.0
_LOOK_S = 0.5
"""Seconds from one look at late copies to the next, where the engine does not step."""

MakeTier = Callable[[RankSide], RankTier]
"""Makes a tier's part on a rank."""


class Worker(Telling):
    """See the module. `g1` is the engine's KV cache of this rank; `make_executor` builds the copy machinery. A rank
    without `stores` has the same KV as rank 0, and loads it from that rank's host memory."""

    def __init__(
        self,
        settings: Settings,
        g1: Region,
        *,
        rank: int,
        world: int,
        fingerprint: str,
        facts: Mapping[str, str] | None = None,
        began: int = 0,
        address: Path,
        make_executor: Callable[[], Executor],
        tiers: Mapping[str, MakeTier] | None = None,
        stores: bool = True,
        adapters: AdapterHolder | None = None,
    ) -> None:
        super().__init__(settings, rank, make_executor(), g1)
        self._stores = stores
        self._verifies = settings.g2_verify and stores  # who stores has the checksums, and loads as well
        self._hello = Hello(rank, world, fingerprint, g1.slot_bytes, dict(facts or {}), began)
        self._address = address
        self._arena: Arena | None = None
        self._toucher: threading.Thread | None = None
        self._hurry = threading.Event()
        """Whether touching takes its share of the processors."""
        self._stride = 0
        """Bytes from one slot of host memory to the next."""
        self._there = 0
        """Slots of it that there are."""
        self._extents: Region | None = None
        """The same slots, one extent each, where somebody asks for their checksums."""
        self._loads: dict[str, int] = {}
        """Request -> its asynchronous load that has not been collected."""
        self._bad_blocks: set[int] = set()
        self._spoiled = False
        self._comparisons = Comparisons(rank, g1.dtype, self.tell)
        self._residents = Residents(adapters, rank, self.tell)
        self._tiers = {name: make(self) for name, make in (tiers or {}).items()}
        self._thread = threading.Thread(target=self._run, name="kvbm-worker", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ one engine step

    def before_step(self, step: Step) -> None:
        """Before anything of this step is overwritten: waits for the copies that still read what it will overwrite,
        then starts asynchronous loads (their blocks are nobody else's, so they run beside the forward pass)."""
        self._fence.wait(step.fence)
        self._expire()
        self._residents.before_step(step.adapters)
        if not step.sync:
            refused = self._residents.before_loads(step)
            for copy in step.loads:
                self._loads[copy.request] = copy.job
                self._load(copy, refused)

    def _expire(self) -> None:
        self.executor.expire()
        for tier in self._tiers.values():
            tier.expire()

    def before_forward(self, step: Step) -> None:
        """Loads that this step's forward pass needs: returns when they ended, well or not."""
        if not step.sync:
            return
        refused = self._residents.before_loads(step)
        for copy in step.loads:
            self._load(copy, refused)
        jobs, patience = [copy.job for copy in step.loads], self._settings.load_deadline_s
        if not self.executor.wait(jobs, patience):
            while not self.executor.cancel(jobs) and not self.executor.wait(jobs, patience):
                log.error("KVBM: a load is late and may still write into the engine, which waits for it")
            # Cancelled copies are quiet, but their completions may still be on their way.
            self.executor.wait(jobs, patience)
        with self._ended:
            for copy in step.loads:
                if copy.job in self._live:
                    self._bad_blocks.update(copy.g1_slots().tolist())
                elif (completion := self._bad.pop(copy.job, None)) is not None:
                    self._bad_blocks.update(copy.g1_slots()[completion.outcomes != Outcome.DONE].tolist())
        self._spoiled = bool(self._bad_blocks)

    def after_forward(self, step: Step) -> None:
        """Starts to offload what this step's forward pass completed. If it ran on a failed load, what it computed is
        not the KV of these keys, and none of it is stored."""
        self._residents.after_forward(step.adapters)
        wanted: list[Copy | Compare] = [*step.stores, *step.compares]
        for copy in wanted:
            if self._spoiled:
                blocks = len(copy.g1_slots())
                self._report(copy.job, Completion.failed(copy.job, blocks, "computed from a load that failed"))
            elif not self._stores:
                # Its word counts all the same: had it computed with a load that failed, so had the rank that stores.
                self._report(copy.job, Completion(copy.job, np.zeros(len(copy.g1_slots()), np.uint8), None, 0.0, 0))
            elif isinstance(copy, Compare):
                self._compare(copy)
            else:
                self._submit(copy, is_load=False)
        self._spoiled = False

    def collect(self, *, idle: bool, waiting: bool = False) -> Collected:
        """What ended. An idle step waits a moment for the next copy to end, or, where the leader is `waiting`, for what
        it waits for, instead of letting the engine spin."""
        self._look()
        out = Collected()
        with self._ended:
            self._gather(out)
            if idle and not out.loaded and (self._loads or self._reading or waiting):
                self._ended.wait(self._settings.idle_wait_ms / 1e3)
                self._gather(out)
        return out

    def _gather(self, out: Collected) -> None:
        for request, job in list(self._loads.items()):
            if job not in self._live:
                del self._loads[request]
                out.loaded.add(request)
                differs = self._residents.differs(request)
                if self._bad.pop(job, None) is not None or differs:
                    out.failed.add(request)

    def take_bad_blocks(self) -> set[int]:
        """Engine blocks whose synchronous load failed in this step."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    # ------------------------------------------------------------------ copies

    def _load(self, copy: Copy, refused: set[int]) -> None:
        if copy.job in refused:
            failed = Completion.failed(copy.job, len(copy.g1_slots()), "a worker holds another adapter")
            self._report(copy.job, failed)
            self._bad[copy.job] = failed
        else:
            self._submit(copy, is_load=True)

    def _submit(self, copy: Copy, *, is_load: bool) -> None:
        assert self._g2 is not None, "the engine stepped before KVBM's arena was ready"
        with self._ended:
            self._live.add(copy.job)
        g1, g2 = copy.g1_slots(), copy.g2_slots()
        if is_load:
            plan = Plan(self._g2, g2, self._g1, g1, urgent=True, label="load", sums=self._verifies)
        else:
            plan = Plan(self._g1, g1, self._g2, g2, urgent=False, label="store", sums=len(self.sums) > 0)
        deadline = self._settings.load_deadline_s if is_load else self._settings.store_deadline_s
        ended = partial(self._load_ended if is_load else self._store_ended, g2)
        self._start(copy.job, plan, deadline, ended)

    def _compare(self, wanted: Compare) -> None:
        """Copies what was computed beside what is stored; the engine's blocks are not needed after that."""
        assert self._g2 is not None, "the engine stepped before KVBM's arena was ready"
        with self._ended:
            self._live.add(wanted.job)
        plan = Plan(self._g1, wanted.g1_slots(), self._g2, unpack(wanted.scratch), urgent=False, label="store")

        def copied(job: int, completion: Completion) -> None:
            completion = self._fence.judged(job, completion)
            self._over(job)
            self._comparisons.start(wanted, plan.destination, completion)

        self._start(wanted.job, plan, self._settings.store_deadline_s, copied)

    def _load_ended(self, slots: Slots, job: int, completion: Completion) -> None:
        completion = self._fence.judged(job, completion)
        if self._verifies:
            assert self._extents is not None
            completion = verified(completion, self._extents, slots, self.sums, self._g1.slot_bytes)
        self._report(job, completion)
        if completion.outcomes.any():
            with self._ended:
                self._bad[job] = completion
        self._over(job)

    def _store_ended(self, slots: Slots, job: int, completion: Completion) -> None:
        completion = self._fence.judged(job, completion)
        if len(self.sums):
            assert self._extents is not None
            self.sums[slots] = sums_of(completion, self._extents, slots, self._g1.slot_bytes)
        self._report(job, completion, slots)
        self._over(job)

    # ------------------------------------------------------------------ the channel

    def _run(self) -> None:
        link: Link | None = None
        cpus.spread("kvbm-worker")  # and what it starts: threads of the disk and of peers
        try:
            link = connect(self._address, self._settings.init_timeout_s, self._closing.is_set)
            link.send(self._hello)
            looked = time.monotonic()
            while not self._closing.is_set():
                if time.monotonic() - looked > _LOOK_S:
                    looked = time.monotonic()
                    self._expire()  # the engine may sleep
                    self._look()
                match link.wait(_LOOK_S):
                    case Allot() as message:
                        self._allot(link, message)
                    case Hurry():
                        self._hurry.set()
                    case Open(tier=name, body=body):
                        self.tell(Opened(self.rank, name, self._open(name, body)))
                    case ToTier(tier=name, body=body):
                        assert name in self._tiers, f"the leader uses a tier {name} that this rank does not have"
                        self._tiers[name].take(body)
                    case Cancel(jobs=jobs):
                        for tier in self._tiers.values():
                            tier.cancel(jobs)
                    case GiveUp(jobs=jobs):
                        self._give_up(jobs)
                    case Foresee() as message:
                        self._residents.foresee(message)
                    case Bye():
                        break
                    case None:
                        pass
                    case message:
                        log.warning("KVBM: unexpected %s from the leader", type(message).__name__)
        except (Broken, OSError) as error:
            if not self._closing.is_set():
                log.warning("KVBM: rank %d lost its leader: %s", self.rank, error)
        except Exception as error:
            log.exception("KVBM: rank %d does not hear its leader any more", self.rank)
            self.turn_off(f"off until the engine is started anew: the channel raised {error!r}")
        finally:
            if link is not None and link is not self._link:
                link.close()

    def _allot(self, link: Link, allot: Allot) -> None:
        """Makes the arena, or maps that of the rank that stores. With `strict` all of it is touched here; else a first
        part, and the rest while the engine serves. A rank that stores nothing uses what the other has touched."""
        slots, last = allot.num_slots, time.monotonic()

        def progress(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last > _TOUCH_LOG:
                last = time.monotonic()
                log.info("KVBM: rank %d prepared %.1f of %.1f GB of host memory", self.rank, done / 1e9, total / 1e9)

        try:
            stride = allot.stride or self._g1.slot_bytes
            arena = Arena(slots * stride, None if self._stores else link.take_file())
            if self._settings.strict:
                arena.touch(progress=progress)
            elif self._stores:
                arena.touch(stride)
        except Broken as error:
            link.send(Refused(self.rank, str(error)))
            return
        self._arena = arena
        self._g2 = arena.region([plane.row_bytes for plane in self._g1.planes], slots, stride=stride)
        self._link = link
        self._stride, self._there = stride, slots
        self._sums_for_leader = allot.sums == "told"
        if allot.sums or self._settings.g2_verify:
            self.sums = np.zeros(slots, np.uint64)
            self._extents = self.memory("G2 for checksums")
        if allot.hurry:
            self._hurry.set()
        usable = arena.touched // stride if self._stores else slots
        link.send(Ready(self.rank, usable), arena.fd if allot.shared else None)
        if usable == slots:
            self._all_there()
        else:
            toucher = threading.Thread(target=self._touch, args=(arena, slots, stride), name="kvbm-memory", daemon=True)
            toucher.start()
            self._toucher = toucher  # `close` may look at any moment

    def _touch(self, arena: Arena, slots: int, stride: int) -> None:
        """What of the arena is missing, while the engine serves."""
        told, last, problem = 0, time.monotonic(), None

        def progress(done: int) -> None:
            nonlocal told, last
            if done // stride > told and time.monotonic() - last > _TOUCH_REPORT:
                told, last = done // stride, time.monotonic()
                self.tell(Touched(self.rank, told))

        try:
            arena.touch_beside(self._closing, self._hurry, progress)
        except Broken as error:
            problem = str(error)
        except Exception as error:
            log.exception("KVBM: host memory cannot be touched")
            problem = repr(error)
        if not self._closing.is_set():
            usable = arena.touched // stride
            self.tell(Touched(self.rank, usable, problem))
            self._there = usable
            self._all_there()

    # ------------------------------------------------------------------ tiers

    def _all_there(self) -> None:
        for tier in self._tiers.values():
            tier.ready()

    def _open(self, name: str, body: bytes) -> str | None:
        """Opens this rank's part of a tier; returns why that cannot be done."""
        if name not in self._tiers:
            return f"this rank has no tier {name}: were leader and worker given the same settings?"
        try:
            self._tiers[name].open(body)
        except Broken as error:
            return str(error)
        return None

    def memory(self, name: str, slot_bytes: int = 0) -> Region:
        """See `RankSide`."""
        assert self._arena is not None, "a tier wants host memory before the leader said how much there is"
        return self._arena.region([slot_bytes or self._stride], self._there, stride=self._stride, name=name)

    def outlast_leader(self, seconds: float) -> None:
        """Returns when the leader has said goodbye or is gone, or after so many seconds."""
        self._thread.join(seconds)

    def close(self) -> None:
        """Waits briefly for copies in flight and gives the memory back. The engine must not step any more."""
        self._closing.set()
        if self._toucher is not None:
            self._toucher.join(_TOUCH_END)
        for tier in reversed(self._tiers.values()):
            tier.close(_TIER_END)
        self.executor.close(5.0)
        self._comparisons.close()
        if self._link is not None:
            self.tell(Bye())
            self._link.close()
        self._thread.join(2.0)
        if self._arena is not None:
            self._arena.close()


@dataclass(slots=True)
class Collected:
    """What ended since the last step, on this rank."""

    loaded: set[str] = field(default_factory=set)
    """Requests whose asynchronous load ended, well or not."""
    failed: set[str] = field(default_factory=set)
    """Those of `loaded` that must be computed instead."""
