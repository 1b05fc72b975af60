"""The leader: which request holds, loads and offloads which blocks. Runs beside the engine's scheduler.

It speaks of requests, keys and block numbers only; an adapter in `connect` turns an engine's calls into these. One
engine step looks like this: any number of `match` and `place` calls, `advance` for each request that will compute
something, then `seal`, whose `Step` goes to every worker.

Threads: `check` and `reset`, and what the core allows (`leader/core.py`), may come from any; all else belongs to the
engine's scheduler thread. The core's lock covers all of it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np

from kvbm.blocks import Writable
from kvbm.core.config import Settings
from kvbm.core.events import Admitted, Unread
from kvbm.core.keys import group_of
from kvbm.leader.core import Core, Outgoing
from kvbm.leader.coverage import Coverage
from kvbm.leader.detour import Detour
from kvbm.leader.endings import Endings
from kvbm.leader.invariants import Invariants
from kvbm.leader.pace import Pace, paced
from kvbm.leader.provenance import Provenance
from kvbm.leader.reports import Reports
from kvbm.leader.requests import Request, RequestParams, Requests, Variant
from kvbm.leader.shadow import Shadow
from kvbm.leader.variants import Variants
from kvbm.link.messages import Compare, Copy, Foreseen, Step, Unlike, Used
from kvbm.tiers.gate import Gate
from kvbm.tiers.stack import Stack
from kvbm.tiers.tier import Record

_FOREIGN: Final = "KVBM offloaded nothing more: the engine holds a block that KVBM has neither seen computed nor loaded"
_BROKEN: Final = "an invariant does not hold"


class Draft:
    """The step that is being described."""

    def __init__(self) -> None:
        self.loads: list[Copy] = []
        self.stores: list[Copy] = []
        self.compares: list[Compare] = []
        self.fence: set[int] = set()
        self.waiting: list[Request] = []
        """Requests that hold a match made in this step and may not get their blocks."""

    def undo(self, number: int) -> None:
        """A copy is not part of it after all."""
        self.stores = [copy for copy in self.stores if copy.job != number]
        self.compares = [copy for copy in self.compares if copy.job != number]


class Leader:
    """See the module. `coverage` says which blocks of a prompt are needed and stored; `shares_device_blocks`, whether a
    request can use blocks another one has just loaded (the engine's own prefix cache is on); `reports` are where what
    is found wrong is written down."""

    def __init__(
        self, settings: Settings, core: Core, coverage: Coverage, gate: Gate, *, shares_device_blocks: bool,
        reports: Reports | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.core, self._settings, self._coverage = core, settings, coverage
        self.book = Requests(settings.explain_requests, shares=shares_device_blocks)
        self.provenance = Provenance(core.copies.next_id, coverage.null)
        self.variants = Variants(core.links, clock, self._seek, self._unlike, self.confirm)
        self.shadow: Shadow | None = None
        """What compares stored blocks with computed ones, if that is wanted."""
        if settings.shadow_every or settings.prove_first:
            patience, prove = core.limits.store_s, settings.prove_first
            self.shadow = Shadow(settings.shadow_every, core, patience, clock, prove=prove)
            core.often(self.shadow.tick)
        self._endings = Endings(core, self.provenance, self.variants, self.shadow, self._quarantine, self._undo)
        self.detour = Detour(settings, gate, self.book.living, core.emit, clock)
        core.observers.add(self.detour)
        self.pace = Pace(settings.slow_step_ms / 1e3)
        """How long the engine waits for KVBM."""
        self.invariants = Invariants(self._accounting, clock, reports)
        core.observers.add(self.invariants.recent)
        core.pool.add_observer(self.invariants.recent)
        self._step = Draft()
        core.hears((Used, Foreseen, Unlike), self._heard)
        core.often(self._look)

    @property
    def requests(self) -> dict[str, Request]:
        """Those that live, by id."""
        return self.book.living

    @property
    def records(self) -> OrderedDict[str, Record]:
        """Of the last requests, by id, for `kvbm explain`."""
        return self.book.records

    @property
    def gate(self) -> Gate:
        """How fast the engine computes, and how fast blocks are read."""
        return self.detour.gate

    # ------------------------------------------------------------------ a request arrives

    @paced
    def begin(
        self, request_id: str, keys: Sequence[bytes], params: RequestParams, prompt_tokens: int,
        variant: Variant | None = None, barred: str | None = None, notes: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """A request exists from now on. `keys` is a view: it may grow while the request generates, and with an adapter
        (`variant`) is empty until it is known which that is. `barred`: nothing is loaded or stored for it, for this
        reason. `notes` are shown by `kvbm explain`."""
        with self.core.lock:
            tokens = self.gate.block_tokens
            request = Request(
                request_id, keys, params, self.book.record(request_id, prompt_tokens, notes),
                late=variant is not None, variant=variant, barred=barred,
                worth=params.kept_tokens(self._settings, prompt_tokens) // tokens,
                asked=prompt_tokens // tokens, coverage=self._coverage.state(),
            )  # fmt: skip
            self.requests[request_id] = request
            if variant is None:
                self._seek(request)
            else:
                self.variants.begin(request, variant, found_elsewhere=self.core.lower.stack is not None)

    def _seek(self, request: Request) -> None:
        """A request's keys are known: what is below host memory starts to move."""
        stack = self.core.lower.stack
        if request.barred is None and stack is not None and self.core.health.aside() is None:
            keys = request.keys[: (request.record.prompt_tokens - 1) // stack.block_tokens]
            wants = self._coverage.wants(request, keys, stack)
            stack.begin(request.seeker, *wants, loads=request.params.load)

    @paced
    def match(self, request_id: str, computed: int, limit: int) -> int | None:
        """How many blocks after the first `computed` can be loaded, at most up to block `limit`; None: ask again.

        What is found is held until `seal`; `place` turns it into a load. May be called any number of times.
        """
        with self.core.lock:
            self.core.hear()
            request = self.requests.get(request_id)
            if request is None:
                return 0
            self._release(request)
            request.g1, request.others = [], []  # one that is looked up holds nothing: it is new, or was preempted
            record = request.record
            record.device_blocks = computed
            if (reason := self._no_load(request)) is not None:
                record.note(reason)
                return 0
            if request.variant is not None and not (ready := self.variants.ready(request)):
                return ready if ready is None else 0
            keys = request.keys[:limit]
            if computed >= len(keys):
                record.note("KVBM had nothing to load: the engine itself holds all blocks but that of the last token")
                return 0
            if (owner := self.book.loader(keys[computed], request)) is not None:
                record.note(f"the request waited for request {owner}, which loads the same blocks")
                return None
            return self._hold(request, keys, computed)

    def _hold(self, request: Request, keys: Sequence[bytes], computed: int) -> int | None:
        found = self._coverage.match(request, keys, computed, self.core.room, self.core.lower.stack)
        if found is None:
            return None
        if found.hold is not None:
            request.hold = self.core.keep(found.hold)
            self._step.waiting.append(request)
        if found.blocks and self.detour.refuses(request, found.blocks):
            self._release(request)
            return 0
        if self.shadow is None or request.hold is None:
            return found.blocks
        allowed = self.shadow.allows(request, computed, request.hold)
        if allowed < len(request.hold):
            request.record.note("KVBM declined the hit, to compare what the engine computes with what is stored")
            self.core.narrow(request.hold, allowed)
        return allowed

    def _no_load(self, request: Request) -> str | None:
        if (reason := self.core.health.aside()) is not None:
            return reason
        return request.barred or (None if request.params.load else "the request may not read, or opted out of loading")

    @paced
    def place(
        self, request_id: str, g1: Sequence[int], count: int, tokens: Admitted, others: Sequence[Sequence[int]] = ()
    ) -> Admitted:
        """The engine gave the request its blocks `g1` and wants the first `count` blocks of its match loaded.

        `count` may be 0: whatever was matched is let go. `tokens` is what the engine knows; what they really are is
        returned, and counted the first time a request is placed.
        `others` are, here and below, its blocks in the second and further layer groups.
        """
        with self.core.lock:
            request = self.requests.get(request_id)
            if request is None:
                return tokens
            self._end_loading(request)
            had = set[int]().union(*request.tables)
            request.g1, request.others = list(g1), [list(table) for table in others]
            self.provenance.placed(request, request.record.device_blocks + count)
            if self.shadow is not None:
                self.shadow.placed(request)  # before what was read for it is let go
            if (stack := self.core.lower.stack) is not None:
                tokens = self._placed(stack, request, tokens)
            if count == 0 or request.hold is None or self.core.health.aside() is not None:  # a quarantine in between
                # Another connector may fill what is new before any step of this request.
                for table in request.tables:
                    new = table[request.record.device_blocks :]
                    self.reuse([block for block in new if block not in had] if had else new)
                self._release(request)
            else:
                self._load(request, count)
            return self._admit(request, tokens)

    def _placed(self, stack: Stack, request: Request, tokens: Admitted) -> Admitted:
        block = self._coverage.tokens_each(request, tokens.g2_tokens) or float(stack.block_tokens)
        if not stack.kept(request.record):
            # Or what is not to be kept would be offloaded again.
            request.offered = max(request.offered, (tokens.device_tokens + tokens.g2_tokens) // stack.block_tokens)
        return stack.placed(request.seeker, tokens, block)

    def _load(self, request: Request, count: int) -> None:
        """Starts to copy the first `count` blocks of what the request holds."""
        hold, record = request.hold, request.record
        assert hold is not None
        matched = len(hold)
        targets, places = self._coverage.aim(request, hold, count)
        request.hold = None
        self.core.held += len(hold) - matched
        record.load, record.outcome = self._settings.onboard, "loading"
        self.book.loads(request, request.keys[record.device_blocks])
        self.detour.begins(request.id, len(hold))
        self.reuse(targets.tolist())
        copy = self.core.load(hold, targets, places, self._endings.of(request))
        self._step.loads.append(Copy.of(copy.id, request.id, targets, hold.slots))
        if request.variant is not None:
            before = record.device_blocks
            self.variants.loading(request, copy.id, sound=self.provenance.carried(request, before) == before)
        self.provenance.expect(targets, copy.id)
        if self._settings.onboard == "sync":  # the step that computes from it fails with it
            self.provenance.arrived(targets, hold.keys, copy.id)

    def expects(self, key: bytes, at: int) -> bool:
        """Whether a living request is going to compute and store this block, block `at` of its prompt. Under the
        lock."""
        return any(
            len(each.keys) > at and each.keys[at] == key and each.params.save and at < each.worth
            for each in self.requests.values()
        )

    def loads(self, request_id: str) -> bool:
        """Whether a load has been started for a request that has been placed just now."""
        request = self.requests.get(request_id)
        return request is not None and request.loading is not None

    def _admit(self, request: Request, tokens: Admitted) -> Admitted:
        """Counts a prompt once, however often the request is preempted and placed again."""
        if not request.admitted:
            request.admitted = True
            reads = request.params.load and request.barred is None
            self.core.emit(tokens if reads else Unread())
        return tokens

    # ------------------------------------------------------------------ the engine steps

    def grow(
        self, request_id: str, g1: Sequence[int], *,
        replace: bool, found: int = 0, others: Sequence[Sequence[int]] = (),
    ) -> None:  # fmt: skip
        """The engine gave a request more blocks, or (`replace`) a new table, which it does not compute the first
        `found` blocks of."""
        with self.core.lock:
            if (request := self.requests.get(request_id)) is None:
                return
            if replace:
                request.g1, request.others = list(g1), [list(table) for table in others]
                self.provenance.placed(request, found)
            else:
                request.g1.extend(g1)
                for table, more in zip(request.others, others, strict=True):
                    table.extend(more)

    def go_on(self, request_id: str, g1: Sequence[int], first: int, others: Sequence[Sequence[int]] = ()) -> None:
        """A request that was computed with the blocks it has goes on from within its block `first`; other tokens may
        follow there than before. It may have more blocks now."""
        with self.core.lock:
            if (request := self.requests.get(request_id)) is not None:
                request.g1, request.others = list(g1), [list(table) for table in others]
                self.provenance.take_back(request, first)

    def reuse(self, g1: Iterable[int]) -> None:
        """This step may overwrite these blocks of the engine: copies that still read them are waited for first."""
        with self.core.lock:
            self._step.fence |= self.core.overwritten(g1)
            self.provenance.forget(g1)

    @paced
    def advance(self, request_id: str, complete: int, computed: int = 0) -> None:
        """After this step's forward pass the request's first `complete` blocks are final and may be offloaded; before
        it, its first `computed` tokens were computed. To be called in the order in which the engine gave requests their
        blocks: one may have found another's."""
        request = self.requests.get(request_id)
        if request is None:
            return
        request.computed = computed
        if request.record.outcome == "waiting":
            request.record.outcome = "computing"
        self.detour.computes(request_id)
        if request.variant is not None:
            self._with_adapter(request, complete)
        if request.loading is None and complete <= request.settled and not request.awaited:
            return
        with self.core.lock:
            self._end_loading(request)
            if request.late:
                self._offer_early(request, complete)
                if request.confirmed:  # else not even its keys may be known
                    self._computed(request, request.confirmed)
                self.provenance.computing(request, complete)
            else:
                self._computed(request, complete)
            hopeless = request.variant is not None and request.variant.refused is not None
            if complete <= request.offered and (hopeless or not request.late or request.confirmed >= complete):
                request.settled = complete

    def _with_adapter(self, request: Request, complete: int) -> None:
        with self.core.lock:
            if not self.variants.describing:
                self.core.hear()  # what the last step was computed with may be known by now
            self.variants.computing(request, complete)

    def confirm(self, request_id: str, complete: int) -> None:
        """Of a `late` request: what was computed of its first `complete` blocks has its keys. What was not offered of
        them is with the next step that the request is part of, or at its end: between steps the engine may hand them
        out."""
        with self.core.lock:
            if (request := self.requests.get(request_id)) is not None:
                request.confirmed = complete
                self.provenance.computed(request, complete)

    def redo(self, request_id: str, first: int) -> None:
        """The engine computes this request again from its block `first` on; what is there carries no key."""
        with self.core.lock:
            if (request := self.requests.get(request_id)) is not None:
                self.provenance.redo(request, first)

    def forget(self, g1: Iterable[int]) -> None:
        """These blocks of the engine are not what they seemed to be."""
        with self.core.lock:
            self.provenance.forget(g1)

    @paced
    def seal(self, *, tokens: int) -> Step:
        """Ends the description of a step that computes so many tokens. Matches that got no blocks are let go."""
        with self.core.lock:
            self.core.hear()
            if tokens:
                self.gate.step_begins(tokens)
            for request in self._step.waiting:
                self._release(request)
            self.detour.seal()
            if (slow := self.pace.step()) is not None:
                self.core.health.rest(slow)
            draft, self._step = self._step, Draft()
            stack = self.core.lower.stack
            return Step(
                loads=draft.loads,
                stores=draft.stores,
                fence=self.core.seal(draft.fence),
                idle=not tokens,
                waiting=stack is not None and stack.waiting,
                sync=self._settings.onboard == "sync" and bool(draft.loads),
                compares=draft.compares,
                adapters=self.variants.seal(),
            )

    def stepped(self) -> None:
        """The oldest step that computed something is over."""
        with self.core.lock:
            self.gate.step_ends()

    @paced
    def finish(self, request_id: str, g1: Sequence[int], complete: int, others: Sequence[Sequence[int]] = ()) -> None:
        """The request is over, and the engine may hand out its blocks at once (see `reuse`). Offers its last blocks,
        unless it still waits for a load: then what the engine calls computed may never have arrived."""
        with self.core.lock:
            self.core.hear()
            request = self.requests.pop(request_id, None)
            if request is None:
                return
            self._release(request)
            self.variants.finished(request)
            loading = request.loading is not None
            self._end_loading(request)
            request.g1, request.others = list(g1), [list(table) for table in others]
            if not loading:
                self._offer_last(request, min(complete, len(request.g1)))
            if self.shadow is not None:
                self.shadow.finished(request)
            request.record.outcome = "finished"
            # Its blocks became idle run by run, the first run first; together, its leaf goes before its root.
            self.core.pool.touch(blocks := self._coverage.in_order(request))
            if (stack := self.core.lower.stack) is not None:
                stack.finished(request.seeker, blocks)

    def _release(self, request: Request) -> None:
        if request.hold is not None:
            self.core.let_go(request.hold)
            request.hold = None

    def _end_loading(self, request: Request) -> None:
        if request.loading is not None:
            self.core.hear()  # whether it ended well was said before the engine heard that it ended
            self.book.loaded(request)
            self.detour.ends(request.id)

    # ------------------------------------------------------------------ down

    def _computed(self, request: Request, complete: int) -> None:
        """What was computed of the request's first `complete` blocks has its keys."""
        self.provenance.computed(request, complete)
        known = complete if request.stale else min(complete, request.proven)
        self._compare(request, known)
        self._look_again(request)
        if known > request.offered:
            self._offer(request, known)
        if known < complete and known <= request.offered:
            request.record.note(_FOREIGN)
            request.offered = max(request.offered, complete)

    def _offer_early(self, request: Request, complete: int) -> None:
        """Offers what this step computes of a request with an adapter, under keys that are not yet certain: by then a
        layer group may not have the block any more. What is copied is published if they were right."""
        variant = request.variant
        if variant is None or not variant.digest or complete <= request.offered:
            return
        if variant.refused is not None or self.provenance.begun(request):
            self._offer(request, complete)

    def _offer_last(self, request: Request, complete: int) -> None:
        """The request is over, after so many blocks."""
        if not request.late:
            self.provenance.computed(request, complete)
        if not request.stale:
            complete = min(complete, request.proven)
        self._compare(request, complete)
        self._look_again(request)
        if self._coverage.ends(request, complete):
            self._offer(request, complete)

    def _compare(self, request: Request, complete: int) -> None:
        """Has what the engine computed compared with what is stored, where it was declined that."""
        if self.shadow is not None:
            compare = self.shadow.compare(request, complete, self._endings.of(request))
            if compare is not None:
                self._step.compares.append(compare)

    def _offer(self, request: Request, complete: int) -> None:
        """Starts offloading what G2 does not have of its first `complete` blocks and was not offered yet."""
        if (reason := self._no_store(request)) is not None:
            request.record.note(f"KVBM offloaded nothing more: {reason}")
            self._coverage.skip(request, complete)
            return
        if request.worth < complete:
            request.record.note(f"KVBM offloads only the first {request.worth} blocks: the others are not worth it")
        ready = self._coverage.ready(request, complete, min(request.worth, complete))
        self._want(request, complete, ready.prompt)
        slots, absent, coming = self.core.space(ready.keys)
        request.awaited += coming
        taken, left = ([], absent) if slots is None else (absent[: len(slots)], absent[len(slots) :])
        if slots is not None:
            self._store(request, ready.take(taken), slots)
        elif absent:
            request.record.note("KVBM did not offload some blocks at once: copies or held blocks filled their share")
        self._coverage.offered(request, complete, ready, taken, left)

    def _store(self, request: Request, blocks: Outgoing, slots: Writable) -> None:
        """Starts to copy blocks of a request out of the engine."""
        params = request.params
        owner = self._endings.of(request)
        copy = self.core.store(slots, blocks, owner, priority=params.priority, ttl=params.ttl)
        if request.variant is not None:
            self.variants.storing(copy.id)
        self._step.stores.append(Copy.of(copy.id, request.id, copy.g1, copy.lease.slots))

    def _want(self, request: Request, complete: int, keys: Sequence[bytes]) -> None:
        """Of its blocks [offered, complete) G2 may have `keys`, which are its prompt's: others' answers may be among
        them, that the engine itself has found."""
        if request.offered < request.asked:
            self._endings.answers.prompted(request.keys[request.offered : min(complete, request.asked)])
            self.core.pool.want(keys)

    def _look_again(self, request: Request) -> None:
        """Has blocks offered again that others were bringing to G2 when they were offered, and that did not arrive."""
        if not (keys := request.awaited):
            return
        there, lost = self.core.pool.present(keys), self.core.pool.absent(keys)
        request.awaited = [keys[at] for at in np.flatnonzero(~there).tolist()]
        if lost:
            left = {group_of(key)[0] for key in request.awaited}
            places = (place for place, key in enumerate(request.keys[: request.offered]) if key in left)
            request.offered, request.awaited = next(places, request.offered), []

    def _no_store(self, request: Request) -> str | None:
        if (reason := self.core.health.aside()) is not None:
            return reason
        if request.barred is not None:
            return request.barred
        if not request.params.save:
            return "the request opted out of saving"
        if request.variant is not None and request.variant.refused is not None:
            return request.variant.refused
        return "the cache was reset while it ran" if request.stale else None

    # ------------------------------------------------------------------ what is heard, and what is wrong

    def _heard(self, message: Used | Foreseen | Unlike) -> None:
        self.variants.take(message, self.requests)

    def _undo(self, number: int) -> None:
        self._step.undo(number)

    def _unlike(self, request: Request) -> None:
        """Its keys are not those of what it computes."""
        if self.shadow is not None:
            self.shadow.finished(request)

    def bar(self, request_id: str, reason: str) -> None:
        """Load and store nothing more for a request: its keys may not be those of what it computes."""
        with self.core.lock:
            if (request := self.requests.get(request_id)) is not None:
                request.barred = reason
                self._unlike(request)  # what it computes proves nothing

    def _quarantine(self, found: dict[str, Any]) -> None:
        """Blocks are stored that are not what their keys say. Which others are is not known: nothing that is stored is
        served any more, in no tier and to nobody, and nothing new is stored, until `resume`."""
        if self.core.health.quarantined is not None:
            return
        where = self.invariants.report("shadow", found)
        self.core.health.quarantine(
            f"quarantined: {len(found['differ'])} stored blocks are not what the engine computes for request "
            f"{found['request_id']}{where}"
        )
        self._clear()

    def reset(self) -> None:
        """A new generation: nothing stored so far is ever matched again. Requests that live now may carry KV of the old
        one (other weights), so none of their blocks is offloaded any more. Copies that no worker has begun are dropped;
        those that have, end (see `Core.quiesce`)."""
        with self.core.lock:
            self.core.hear()
            self._clear()

    def _clear(self) -> None:
        self.core.clear()
        self.provenance.clear()
        if self.shadow is not None:
            self.shadow.clear()
        for request in self.requests.values():
            request.stale = True
        self.core.drop_unsent()

    def _look(self) -> None:
        """Whether KVBM itself is as it should be."""
        idle = not self.requests and self.core.copies.count() == (0, 0)
        self._broken(self.invariants.tick(self.core.pools(), idle=idle))

    def _broken(self, problems: list[str]) -> None:
        """An invariant does not hold: whatever is decided from now on may be wrong."""
        health = self.core.health
        if problems and not any(problem.startswith(_BROKEN) for problem in health.problems):
            where = self.invariants.report("check", {"problems": problems, "events": self.invariants.recent.listed()})
            health.sick(f"{_BROKEN}: {'; '.join(problems)}{where}")

    def check(self, seconds: float) -> dict[str, Any]:
        """Looks at the books and at all slots of all pools, for so long at most; what is wrong, for JSON. Any thread;
        nobody waits for it longer than for a slice."""
        begun, looked, books = time.monotonic(), dict[str, bool](), self.invariants
        with self.core.lock:
            problems, pools = books.books(), self.core.pools()
        for name, pool in pools.items():
            passes = books.passes.get(name, 0)
            books.begin(name)
            while not (done := books.passes.get(name, 0) > passes) and time.monotonic() - begun < seconds:
                with self.core.lock:
                    problems += books.look(name, pool)
            looked[name] = done
        with self.core.lock:
            self._broken(problems)
        return {"problems": problems, "complete": all(looked.values()), "violations": books.violations}

    def _accounting(self) -> list[str]:
        """What is wrong in the leader's books."""
        core = self.core
        now, (stored, loaded, scratch) = core.pool.statistics(), core.copies.blocks()
        held = loaded + sum(len(request.hold) for request in self.requests.values() if request.hold is not None)
        found = {
            f"{core.held} blocks of G2 count as held by requests, {held} are": core.held != held,
            f"{stored} blocks are being stored, {now.staged} are staged": stored > now.staged,
            f"{scratch} blocks are being compared, {now.writable} are writable": scratch > now.writable,
            f"{core.copies.blocks_read} blocks of the engine are read by {stored + scratch}": (
                core.copies.blocks_read > stored + scratch
            ),
            "a block counts as being loaded by a request that does not load it": self.book.strays(),
        }
        return [text for text, wrong in found.items() if wrong]
