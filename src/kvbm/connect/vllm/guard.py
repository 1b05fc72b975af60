"""Around each call of the engine: what KVBM raises there costs hits, and never reaches the engine.

After the first exception nothing in KVBM is certain, so it is off until the engine is started anew. Each call then has
the answer that loses hits. What the engine was promised before is told to have failed, on every rank, from lists that
are kept here, before anything is called. Neither side publishes what was being copied.

Knows none of the engine's types. An exception that is no `Exception` (an interrupt, say) passes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from kvbm.worker.worker import Collected

if TYPE_CHECKING:
    import torch
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from kvbm.connect.vllm.stats import KvbmStats
    from kvbm.connect.vllm.translate import SchedulerSide, WorkerSide

log = logging.getLogger(__name__)

_MOMENT = 0.01
"""Seconds from one look at copies that do not end to the next."""

Answer = TypeVar("Answer")
Side = TypeVar("Side", bound="SchedulerSide | WorkerSide")
Blocks = dict[str, list[int]]
"""By request: the device blocks of a load inside the step; none of a load that the request waits for."""


class Promises(msgspec.Struct, frozen=True):
    """What the guard of the scheduler's side tells those of the workers with a step."""

    promised: Blocks = {}
    """Loads that the step contains."""
    lost: Blocks = {}
    """Loads that the engine takes to be in the step, and that are not."""
    off: str | None = None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Promises).decode


class Guard(Generic[Side]):
    """Of one side."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.off: str | None = None
        """Why the side is not called any more."""
        self._closed = False

    def ask(self, otherwise: Answer, call: Callable[..., Answer], *args: Any) -> Answer:
        """What the side answers to this call, or else `otherwise`."""
        return self.insist(otherwise, call, *args) if self.off is None else otherwise

    def insist(self, otherwise: Answer, call: Callable[..., Answer], *args: Any) -> Answer:
        """The same of what has to be done also where the side is off."""
        try:
            return call(*args)
        except Exception as error:
            name, said = getattr(call, "__name__", "a call"), type(error).__name__
            with suppress(Exception):  # of one that cannot even be written down, or for want of memory
                log.exception("KVBM: %s went wrong", name)
                said = repr(error)
            if self.off is None:
                self._end(f"off until the engine is started anew: {name} raised {said}")
        return otherwise

    def _end(self, why: str) -> None:
        self.off = why
        try:
            self.side.turn_off(why)
        except Exception:
            log.exception("KVBM could not switch itself off in good order")

    def close(self) -> None:
        """The side is not needed any more. May be called again."""
        if self._closed:
            return
        self._closed = True
        try:
            self.side.close()
        except Exception:
            log.exception("KVBM could not close in good order")


class SchedulerGuard(Guard["SchedulerSide"]):
    """Of the scheduler's side."""

    def __init__(self, side: SchedulerSide) -> None:
        super().__init__(side)
        self._matched: dict[str, tuple[int, bool]] = {}
        """Request -> where the load begins that it was offered, and whether it would wait for it."""
        self._promised: Blocks = {}
        self._lost: Blocks = {}

    def bind(self, pool: BlockPool) -> None:
        self.ask(None, self.side.bind, pool)

    def on_new_request(self, request: Request) -> None:
        self.side.tables.begin(request)
        self.ask(None, self.side.on_new_request, request)

    def match(self, request: Request, computed: int) -> tuple[int | None, bool]:
        nothing: tuple[int | None, bool] = 0, False
        tokens, waits = self.ask(nothing, self.side.match, request, computed)
        if tokens:
            self._matched[request.request_id] = computed, waits
        return tokens, waits

    def place(self, request: Request, blocks: KVCacheBlocks, tokens: int) -> None:
        if tokens:
            # Also where KVBM is off by now: the engine was promised it before.
            first, waits = self._matched.pop(request.request_id, (0, True))
            block = self.side.tables.block
            inside = [] if waits else blocks.get_block_ids()[0][first // block : (first + tokens) // block]
            self._lost[request.request_id] = inside
        if self.ask(False, self.side.place, request, blocks, tokens) and tokens:
            self._promised[request.request_id] = self._lost.pop(request.request_id)

    def step(self, output: SchedulerOutput) -> tuple[bytes, bytes]:
        """The step, and what the guards of the workers must know of it; nothing where there is nothing to know."""
        self.side.tables.seal()
        payload = self.ask(b"", self.side.step, output)
        if self.off is None:
            self.off = self.side.off
        if not (self._promised or self._lost or self.off):
            return payload, b""
        promises = Promises(self._promised, self._lost, self.off)
        self._promised, self._lost = {}, {}
        return b"" if self.off else payload, _encode(promises)

    def not_loaded(self, blocks: set[int], manager: KVCacheManager) -> None:
        """Loads inside the step that is over did not fill these. The engine must do what follows in any case."""
        tables = self.side.tables
        found = self.insist(None, tables.not_loaded, blocks, manager)
        if found is None:  # some of it may be done, and nobody knows of what
            self.insist(None, tables.nothing_counts, manager)
        else:
            self.ask(None, self.side.not_loaded, *found)

    def stepped(self) -> None:
        self.ask(None, self.side.stepped)

    def finish(self, request: Request, blocks: Sequence[int], others: Sequence[Sequence[int]] = ()) -> None:
        self._matched.pop(request.request_id, None)
        self.side.tables.end(request.request_id, blocks)
        self.ask(None, self.side.finish, request, blocks, others)

    def take_events(self) -> Iterable[KVCacheEvent]:
        return self.ask([], self._take_events)

    def _take_events(self) -> list[KVCacheEvent]:
        return list(self.side.take_events())

    def reset(self) -> bool:
        """True also where KVBM is off: what was stored is not served any more, also not after a restart."""
        self.ask(None, self.side.reset)
        if self.off is not None:
            try:
                self.side.forget()
            except Exception:
                log.exception(
                    "KVBM could not clear the disk tier: a restart may be served what was stored before the reset"
                )
        return True

    def stats(self) -> KvbmStats | None:
        return self.ask(None, self.side.stats)


class WorkerGuard(Guard["WorkerSide"]):
    """Of a worker's side. Off from the start of a step whose scheduler's side is off."""

    def __init__(self, side: WorkerSide) -> None:
        super().__init__(side)
        self._absent = True
        """The scheduler's side did not come up: there is nobody to step with."""
        self._waiting: set[str] = set()
        """Requests that wait for a load; the engine must hear from this rank that it ended, once."""
        self._inside: set[int] = set()
        """Device blocks that loads inside this step are to fill."""
        self._lost: set[str] = set()
        self._lost_inside: set[int] = set()
        """Loads that the engine takes to be in this step, and that are not: requests that wait for them, and blocks."""

    def register(self, caches: dict[str, torch.Tensor]) -> None:
        """Part of the start: what it raises ends it."""
        self.side.register(caches)

    def before_step(self, payload: bytes, promises: bytes) -> None:
        self._absent = not payload and not promises
        if self._absent:  # and ever will be
            self.close()
        if promises:
            self._note(_decode(promises))
        if payload:
            self.ask(None, self.side.before_step, payload)

    def _note(self, told: Promises) -> None:
        for request, blocks in told.promised.items():
            self._inside.update(blocks) if blocks else self._waiting.add(request)
        for request, blocks in told.lost.items():
            self._lost_inside.update(blocks) if blocks else self._lost.add(request)
        if told.off is not None and self.off is None:
            self._end(told.off)

    def before_forward(self) -> None:
        if not self._absent:
            self.ask(None, self.side.before_forward)

    def after_forward(self) -> None:
        if not self._absent:
            self.ask(None, self.side.after_forward)

    def results(self) -> Collected:
        """What ended, or will never end."""
        if self._absent:
            return Collected()
        ended = self.ask(None, self.side.results)
        if ended is None:
            if not (self._waiting or self._lost) or not self._quiet():
                return Collected()
            ended = Collected(self._waiting, set(self._waiting))
            self._waiting = set()
        self._waiting -= ended.loaded
        if self._lost:
            ended.loaded |= self._lost
            ended.failed |= self._lost
            self._lost = set()
        return ended

    def bad_blocks(self) -> set[int]:
        """Device blocks that a load inside this step did not fill."""
        if self._absent:
            return set()
        bad = self.ask(self._inside, self.side.bad_blocks) | self._lost_inside
        self._inside, self._lost_inside = set(), set()
        if bad and self.off is not None:
            self.quiesce()
        return bad

    def quiesce(self) -> None:
        """Returns when no copy touches the engine's blocks any more, however long that takes."""
        if not self._absent and not self._quiet():
            log.error("KVBM: a copy of blocks of the engine has not ended, so the engine waits for it")
            while not self._quiet():
                time.sleep(_MOMENT)

    def _quiet(self) -> bool:
        """Whether no copy touches the engine's blocks any more; may wait a moment for that. Before, no request may be
        told that its load failed: the engine would compute what a late copy then overwrites."""
        try:
            return self.side.quiet()
        except Exception:
            log.exception("KVBM does not know whether copies have ended")
            time.sleep(_MOMENT)
            return False
