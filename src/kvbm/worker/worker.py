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
from typing import Final

import numpy as np

from kvbm.abc.transport import Completion
from kvbm.core import cpus
from kvbm.core.config import Settings
from kvbm.core.errors import Broken, Unsupported
from kvbm.core.outcome import Outcome
from kvbm.core.region import Region
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
    Message,
    Open,
    Opened,
    Ready,
    Refused,
    Step,
    ToTier,
)  # fmt: skip
from kvbm.tiers.tier import RankSide, RankTier
from kvbm.transfer.executor import Executor
from kvbm.worker.copying import Copying
from kvbm.worker.memory import RankMemory
from kvbm.worker.residents import AdapterHolder, Residents
from kvbm.worker.voice import Voice

log = logging.getLogger(__name__)

_TIER_END: Final = 2.0
_WAKE_S: Final = 0.5
"""Seconds from one look at late copies to the next, where the engine does not step."""

MakeTier = Callable[[RankSide], RankTier]
"""Makes a tier's part on a rank."""


class Worker:
    """See the module. `g1` is the engine's KV cache of this rank; `hello` is what the rank says to its leader, which
    listens at `address`. A rank without `stores` has the same KV as rank 0, and loads it from that rank's host
    memory."""

    def __init__(
        self, settings: Settings, g1: Region, hello: Hello, address: Path, executor: Executor,
        tiers: Mapping[str, MakeTier] | None = None, *, stores: bool = True, adapters: AdapterHolder | None = None,
    ) -> None:  # fmt: skip
        self._settings = settings
        self.voice = Voice(hello.rank)
        self.memory = RankMemory(
            g1, self.voice, stores=stores, strict=settings.strict, verifies=settings.g2_verify
        )  # fmt: skip
        self.copying = Copying(settings, executor, self.memory, self.voice)
        self._loads: dict[str, int] = {}
        """Request -> its asynchronous load that has not been collected."""
        self._bad_blocks: set[int] = set()
        self._spoiled = False
        """Whether this step computes from a load that failed."""
        self._residents = Residents(adapters, hello.rank, self.voice.tell)
        self.tiers = {name: make(self.copying) for name, make in (tiers or {}).items()}
        """What this rank has of each tier, by name."""
        run = partial(self._run, hello, address)
        self._thread = threading.Thread(target=run, name="kvbm-worker", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ one engine step

    def before_step(self, step: Step) -> None:
        """Before anything of this step is overwritten: waits for the copies that still read what it will overwrite,
        then starts asynchronous loads (their blocks are nobody else's, so they run beside the forward pass)."""
        self.copying.fence.wait(step.fence)
        self._expire()
        self._residents.before_step(step.adapters)
        if not step.sync:
            refused = self._residents.before_loads(step)
            after = self.copying.mark() if step.loads else None
            for copy in step.loads:
                self._loads[copy.request] = copy.job
                self._load(copy, refused, after)

    def _expire(self) -> None:
        self.copying.executor.expire()
        for tier in self.tiers.values():
            tier.expire()

    def _load(self, copy: Copy, refused: set[int], after: object | None) -> None:
        if copy.job in refused:
            self.copying.refuse(copy.job, len(copy.g1_slots()), "a worker holds another adapter")
        else:
            self.copying.load(copy, after)

    def before_forward(self, step: Step) -> None:
        """Loads that this step's forward pass needs: returns when they ended, well or not."""
        if not step.sync:
            return
        refused = self._residents.before_loads(step)
        after = self.copying.mark() if step.loads else None
        for copy in step.loads:
            self._load(copy, refused, after)
        jobs = [copy.job for copy in step.loads]
        self.copying.settle(jobs)
        ended = self.copying.ended(jobs)
        for copy in step.loads:
            if copy.job not in ended:
                self._bad_blocks.update(copy.g1_slots().tolist())
            elif (completion := self.copying.take_bad(copy.job)) is not None:
                self._bad_blocks.update(copy.g1_slots()[completion.outcomes != Outcome.DONE].tolist())
        self._spoiled = bool(self._bad_blocks)

    def after_forward(self, step: Step) -> None:
        """Starts to offload what this step's forward pass completed. If it ran on a failed load, what it computed is
        not the KV of these keys, and none of it is stored."""
        self._residents.after_forward(step.adapters)
        wanted: list[Copy | Compare] = [*step.stores, *step.compares]
        after = self.copying.mark() if wanted else None
        for copy in wanted:
            blocks = len(copy.g1_slots())
            if self._spoiled:
                self.copying.report(copy.job, Completion.failed(copy.job, blocks, "computed from a load that failed"))
            elif not self.memory.stores:
                # Its word counts all the same: had it computed with a load that failed, so had the rank that stores.
                self.copying.report(copy.job, Completion(copy.job, np.zeros(blocks, np.uint8), None, 0.0, 0))
            elif isinstance(copy, Compare):
                self.copying.compare(copy, after)
            else:
                self.copying.store(copy, after)
        self._spoiled = False

    def collect(self, *, idle: bool, waiting: bool = False) -> Collected:
        """What ended. An idle step waits a moment for the next copy to end, or, where the leader is `waiting`, for what
        it waits for, instead of letting the engine spin."""
        self._look()
        out = Collected()
        self._gather(out)
        if idle and not out.loaded:
            self.copying.wait(self._loads.values(), waiting=waiting)
            self._gather(out)
        return out

    def _gather(self, out: Collected) -> None:
        ended = self.copying.ended(self._loads.values()) if self._loads else ()
        for request, job in list(self._loads.items()):
            if job in ended:
                del self._loads[request]
                out.loaded.add(request)
                differs = self._residents.differs(request)
                if self.copying.take_bad(job) is not None or differs:
                    out.failed.add(request)

    def take_bad_blocks(self) -> set[int]:
        """Engine blocks whose synchronous load failed in this step."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def _look(self) -> None:
        """Whether the threads that copy live. Without those of a tier, the rest goes on."""
        for tier in self.tiers.values():
            tier.look()
        self.copying.look()

    # ------------------------------------------------------------------ the channel

    def _run(self, hello: Hello, address: Path) -> None:
        link: Link | None = None
        voice = self.voice
        cpus.spread("kvbm-worker")  # and what it starts: threads of the disk and of peers
        try:
            link = connect(address, self._settings.init_timeout_s, voice.closing.is_set)
            link.send(hello)
            looked = time.monotonic()
            while not voice.closing.is_set():
                if time.monotonic() - looked > _WAKE_S:
                    looked = time.monotonic()
                    self._expire()  # the engine may sleep
                    self._look()
                message = link.wait(_WAKE_S)
                if isinstance(message, Bye):
                    break
                if message is not None:
                    self._heed(link, message)
        except (Broken, OSError) as error:
            if not voice.closing.is_set():
                log.warning("KVBM: rank %d lost its leader: %s", voice.rank, error)
        except Exception as error:
            log.exception("KVBM: rank %d does not hear its leader any more", voice.rank)
            self.turn_off(f"off until the engine is started anew: the channel raised {error!r}")
        finally:
            if link is not None and link is not voice.link:
                link.close()

    def _heed(self, link: Link, message: Message) -> None:
        match message:
            case Allot():
                self._allot(link, message)
            case Hurry():
                self.memory.hurry()
            case Open(tier=name, body=body):
                self.voice.tell(Opened(self.voice.rank, name, self._open(name, body)))
            case ToTier(tier=name, body=body):
                assert name in self.tiers, f"the leader uses a tier {name} that this rank does not have"
                self.tiers[name].take(body)
            case Cancel(jobs=jobs):
                for tier in self.tiers.values():
                    tier.cancel(jobs)
            case GiveUp(jobs=jobs):
                self.copying.give_up(jobs)
            case Foresee():
                self._residents.foresee(message)
            case _:
                log.warning("KVBM: unexpected %s from the leader", type(message).__name__)

    def _allot(self, link: Link, allot: Allot) -> None:
        try:
            usable, shared = self.memory.make(allot, link.take_file)
        except (Broken, Unsupported) as error:
            link.send(Refused(self.voice.rank, str(error), ends=isinstance(error, Unsupported)))
            return
        self.voice.link = link
        link.send(Ready(self.voice.rank, usable), shared)
        if usable == allot.num_slots:
            self._all_there()
        else:
            self.memory.touch_rest(self._all_there)

    # ------------------------------------------------------------------ tiers

    def _all_there(self) -> None:
        for tier in self.tiers.values():
            tier.ready()

    def _open(self, name: str, body: bytes) -> str | None:
        """Opens this rank's part of a tier; returns why that cannot be done."""
        if name not in self.tiers:
            return f"this rank has no tier {name}: were leader and worker given the same settings?"
        try:
            self.tiers[name].open(body)
        except Broken as error:
            return str(error)
        return None

    # ------------------------------------------------------------------ the end

    def turn_off(self, why: str) -> None:
        """Something raised what nobody expected, here or beside the scheduler. From now on no copy counts, and those
        that touch the engine's blocks are given up. Any thread."""
        self.copying.turn_off(why)

    def quiet(self) -> bool:
        """Gives up what is being copied between the engine and host memory. Whether nothing touches the engine's blocks
        any more; waits a moment for that."""
        return self.copying.quiet()

    def outlast_leader(self, seconds: float) -> None:
        """Returns when the leader has said goodbye or is gone, or after so many seconds."""
        self._thread.join(seconds)

    def close(self) -> None:
        """Waits briefly for copies in flight and gives the memory back. The engine must not step any more."""
        self.voice.closing.set()
        self.memory.stop_touching()
        for tier in reversed(self.tiers.values()):
            tier.close(_TIER_END)
        self.copying.executor.close(5.0)
        self.copying.comparisons.close()
        if self.voice.link is not None:
            self.voice.tell(Bye())
            self.voice.link.close()
        self._thread.join(2.0)
        self.memory.close()


@dataclass(slots=True)
class Collected:
    """What ended since the last step, on this rank."""

    loaded: set[str] = field(default_factory=set)
    """Requests whose asynchronous load ended, well or not."""
    failed: set[str] = field(default_factory=set)
    """Those of `loaded` that must be computed instead."""
