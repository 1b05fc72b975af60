"""The leader: which block is where, who holds it, what moves next. Runs beside the engine's scheduler.

It speaks of requests, keys and block numbers only; an adapter in `connect` turns an engine's calls into these. One
engine step looks like this: any number of `match` and `place` calls, `advance` for each request that will compute
something, then `seal`, whose `Step` goes to every worker.

Threads: `match`, `place`, `advance`, `seal`, `finish` belong to the engine's scheduler thread; `tick`, `status`,
`explain`, `pause`, `resume`, `reset` (`leader/health.py`) may come from any. One lock covers all of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from kvbm.abc.observer import Observer
from kvbm.blocks import Pool
from kvbm.core.config import Settings
from kvbm.core.events import Admitted, Unread
from kvbm.leader.coverage import Coverage, Prefix, Room
from kvbm.leader.detour import Detour
from kvbm.leader.offload import GRACE, Draft, Offloading
from kvbm.leader.pace import paced
from kvbm.leader.requests import Request, RequestParams
from kvbm.leader.shadow import Shadow
from kvbm.leader.variants import Variant
from kvbm.link.channel import Link
from kvbm.link.messages import Copy, Step
from kvbm.tiers.gate import Gate
from kvbm.tiers.stack import Stack
from kvbm.tiers.tier import Record


class Leader(Offloading):
    """See the module. `links` are the connected workers by rank; `coverage` says which blocks of a prompt are needed
    and stored (`Prefix` where nothing else is given); `shares_device_blocks` says whether a request can use
    blocks another one has just loaded (the engine's own prefix cache is on); `lasting` are tiers that were asked for
    and outlive this process, or are shared with others."""

    def __init__(
        self,
        settings: Settings,
        pool: Pool,
        links: dict[int, Link],
        *,
        coverage: Coverage | None = None,
        slot_bytes: int,
        gate: Gate,
        shares_device_blocks: bool,
        observers: Iterable[Observer] = (),
        clock: Callable[[], float] = time.monotonic,
        lasting: Sequence[str] = (),
    ) -> None:
        super().__init__(
            settings,
            pool,
            links,
            coverage=coverage or Prefix(pool),
            slot_bytes=slot_bytes,
            gate=gate,
            observers=observers,
            clock=clock,
            lasting=lasting,
        )
        if settings.shadow_every or settings.prove_first:
            patience, prove = settings.store_deadline_s + GRACE, settings.prove_first
            self.shadow = Shadow(settings.shadow_every, pool, patience, clock, prove=prove)
            self.host.listen(self.shadow)
        self._shares = shares_device_blocks
        self.detour = Detour(settings, gate, self.requests, self.emit, clock)
        self._observers.append(self.detour)
        self._loading: dict[bytes, str] = {}
        self._waiting: list[Request] = []
        """Requests that hold a match made in this step and may not get their blocks."""

    # ------------------------------------------------------------------ a request arrives

    @paced
    def begin(
        self, request_id: str, keys: Sequence[bytes], params: RequestParams, prompt_tokens: int,
        variant: Variant | None = None, barred: str | None = None, notes: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """A request exists from now on. `keys` is a view: it may grow while the request generates, and with an adapter
        (`variant`) is empty until it is known which that is. `barred`: nothing is loaded or stored for it, for this
        reason. `notes` are for who asks what happened to it."""
        with self._lock:
            record = Record(request_id, prompt_tokens, why=list(notes))
            self.records[request_id] = record
            while len(self.records) > self._settings.explain_requests:
                self.records.popitem(last=False)
            request = Request(
                request_id, keys, params, record, late=variant is not None, variant=variant, barred=barred,
                worth=params.kept_tokens(self._settings, prompt_tokens) // self.gate.block_tokens,
                asked=prompt_tokens // self.gate.block_tokens, coverage=self._coverage.state(),
            )  # fmt: skip
            self.requests[request_id] = request
            if variant is None:
                self._seek(request)
            else:
                self._variants.begin(request, variant, found_elsewhere=self.lower is not None)

    def _seek(self, request: Request) -> None:
        if request.barred is None and self.lower is not None and self.standing_aside() is None:
            keys = request.keys[: (request.record.prompt_tokens - 1) // self.lower.block_tokens]
            wants = self._coverage.wants(request, keys, self.lower)
            self.lower.begin(request.seeker, *wants, loads=request.params.load)

    @paced
    def match(self, request_id: str, computed: int, limit: int) -> int | None:
        """How many blocks after the first `computed` can be loaded, at most up to block `limit`; None: ask again.

        What is found is held until `seal`; `place` turns it into a load. May be called any number of times.
        """
        with self._lock:
            self._drain()
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
            if request.variant is not None and not (ready := self._variants.ready(request)):
                return ready if ready is None else 0
            keys = request.keys[:limit]
            if computed >= len(keys):
                record.note("nothing to load: the engine itself holds all but the block of the last token")
                return 0
            owner = self._loading.get(keys[computed])
            if self._shares and owner is not None and owner != request_id:
                record.note(f"waited for request {owner}, which loads the same blocks")
                return None
            found = self._hold(request, keys, computed)
            if found and self.detour.refuses(request, found):
                self._release(request)
                return 0
            if self.shadow is None or request.hold is None:
                return found
            allowed = self.shadow.allows(request, computed, request.hold)
            if allowed < len(request.hold):
                record.note("declined: the engine computes it, to be compared with what is stored")
                self._held -= len(request.hold) - allowed
                request.hold.narrow(allowed)
            return allowed

    def _hold(self, request: Request, keys: Sequence[bytes], computed: int) -> int | None:
        room = Room(max(1, int(self.pool.total * self._settings.held_share)), self._held)
        found = self._coverage.match(request, keys, computed, room, self.lower)
        if found is None:
            return None
        if found.hold is not None:
            request.hold = found.hold
            self._held += len(found.hold)
            self._waiting.append(request)
        return found.blocks

    def _no_load(self, request: Request) -> str | None:
        if (reason := self.standing_aside()) is not None:
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
        with self._lock:
            request = self.requests.get(request_id)
            if request is None:
                return tokens
            self._end_loading(request)
            had = set[int]().union(*request.tables)
            request.g1, request.others = list(g1), [list(table) for table in others]
            self.provenance.placed(request, request.record.device_blocks + count)
            if self.shadow is not None:
                self.shadow.placed(request)  # before what was read for it is let go
            if self.lower is not None:
                tokens = self._placed(self.lower, request, tokens)
            hold = request.hold
            if count == 0 or hold is None or self.standing_aside() is not None:  # a quarantine in between, say
                # Another connector may fill what is new before any step of this request.
                for table in request.tables:
                    self.reuse([block for block in table[request.record.device_blocks :] if block not in had])
                self._release(request)
                return self._admit(request, tokens)
            matched = len(hold)
            targets, places = self._coverage.aim(request, hold, count)
            request.hold = None
            self._held += len(hold) - matched
            record = request.record
            record.load, record.outcome = self._settings.onboard, "loading"
            request.loading = request.keys[record.device_blocks]
            self._loading[request.loading] = request_id
            self.detour.begins(request_id, len(hold))
            self.reuse(targets.tolist())
            job = self._copies.start(request, hold, targets, places, self._settings.load_deadline_s + GRACE)
            self._step.loads.append(Copy.of(job.id, request_id, targets, hold.slots))
            if request.variant is not None:
                before = record.device_blocks
                self._variants.loading(request, job.id, sound=self.provenance.carried(request, before) == before)
            self.provenance.expect(targets, job.id)
            if self._settings.onboard == "sync":  # the step that computes from it fails with it
                self.provenance.arrived(targets, hold.keys, job.id)
            return self._admit(request, tokens)

    def _placed(self, lower: Stack, request: Request, tokens: Admitted) -> Admitted:
        block = self._coverage.tokens_each(request, tokens.g2_tokens) or float(lower.block_tokens)
        if not lower.kept(request.record):
            # Or what is not to be kept would be offloaded again.
            request.offered = max(request.offered, (tokens.device_tokens + tokens.g2_tokens) // lower.block_tokens)
        return lower.placed(request.seeker, tokens, block)

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
            self.emit(tokens if reads else Unread())
        return tokens

    # ------------------------------------------------------------------ the engine steps

    def grow(
        self, request_id: str, g1: Sequence[int], *,
        replace: bool, found: int = 0, others: Sequence[Sequence[int]] = (),
    ) -> None:  # fmt: skip
        """The engine gave a request more blocks, or (`replace`) a new table, which it does not compute the first
        `found` blocks of."""
        with self._lock:
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
        with self._lock:
            if (request := self.requests.get(request_id)) is not None:
                request.g1, request.others = list(g1), [list(table) for table in others]
                self.provenance.take_back(request, first)

    def reuse(self, g1: Iterable[int]) -> None:
        """This step may overwrite these blocks of the engine: copies that still read them are waited for first. A copy
        that no worker has heard of would read what is written there next: it is dropped for these blocks."""
        with self._lock:
            # Now, not in `seal`: a block may become the source of another copy in this very step.
            reading = self._copies.reading(g1)
            for job in self._copies.unsent(reading):
                self.dropped += self._drop(job, g1)
                reading.discard(job)
            self._step.fence |= reading
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
        with self._lock:
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
        with self._lock:
            if not self._variants.describing:
                self._drain()  # what the last step was computed with may be known by now
            self._variants.computing(request, complete)

    def confirm(self, request_id: str, complete: int) -> None:
        """Of a `late` request: what was computed of its first `complete` blocks has its keys. What was not offered of
        them is with the next step that the request is part of, or at its end: between steps the engine may hand them
        out."""
        with self._lock:
            if (request := self.requests.get(request_id)) is not None:
                request.confirmed = complete
                self.provenance.computed(request, complete)

    def redo(self, request_id: str, first: int) -> None:
        """The engine computes this request again from its block `first` on; what is there carries no key."""
        with self._lock:
            if (request := self.requests.get(request_id)) is not None:
                self.provenance.redo(request, first)

    def forget(self, g1: Iterable[int]) -> None:
        """These blocks of the engine are not what they seemed to be."""
        with self._lock:
            self.provenance.forget(g1)

    @paced
    def seal(self, *, tokens: int) -> Step:
        """Ends the description of a step that computes so many tokens. Matches that got no blocks are let go."""
        with self._lock:
            self._drain()
            if tokens:
                self.gate.step_begins(tokens)
            for request in self._waiting:
                self._release(request)
            self._waiting.clear()
            self._copies.seal()
            self.detour.seal()
            if (slow := self.pace.step()) is not None:
                self._rest(slow)
            draft, self._step = self._step, Draft()
            return Step(
                loads=draft.loads,
                stores=draft.stores,
                fence=self._copies.fence(draft.fence),
                idle=not tokens,
                waiting=self.lower is not None and self.lower.waiting,
                sync=self._settings.onboard == "sync" and bool(draft.loads),
                compares=draft.compares,
                adapters=self._variants.seal(),
            )

    def stepped(self) -> None:
        """The oldest step that computed something is over."""
        with self._lock:
            self.gate.step_ends()

    @paced
    def finish(self, request_id: str, g1: Sequence[int], complete: int, others: Sequence[Sequence[int]] = ()) -> None:
        """The request is over, and the engine may hand out its blocks at once (see `reuse`). Offers its last blocks,
        unless it still waits for a load: then what the engine calls computed may never have arrived."""
        with self._lock:
            self._drain()
            request = self.requests.pop(request_id, None)
            if request is None:
                return
            self._release(request)
            self._variants.finished(request)
            loading = request.loading is not None
            self._end_loading(request)
            request.g1, request.others = list(g1), [list(table) for table in others]
            if not loading:
                if not request.late:
                    self.provenance.computed(request, min(complete, len(request.g1)))
                complete = min(complete, len(request.g1))
                if not request.stale:
                    complete = min(complete, request.proven)
                self._compare(request, complete)
                self._look_again(request)
                if self._coverage.ends(request, complete):
                    self._offer(request, complete)
            if self.shadow is not None:
                self.shadow.finished(request)
            request.record.outcome = "finished"
            # Its blocks became idle run by run, the first run first; together, its leaf goes before its root.
            self.pool.touch(blocks := self._coverage.in_order(request))
            if self.lower is not None:
                self.lower.finished(request.id, blocks)

    def _accounting(self) -> list[str]:
        now, (stored, loaded, scratch) = self.pool.statistics(), self._copies.blocks()
        held = loaded + sum(len(request.hold) for request in self.requests.values() if request.hold is not None)
        owners = {self.requests[name].loading if name in self.requests else None for name in self._loading.values()}
        found = {
            f"{self._held} blocks of G2 count as held by requests, {held} are": self._held != held,
            f"{stored} blocks are being stored, {now.staged} are staged": stored > now.staged,
            f"{scratch} blocks are being compared, {now.writable} are writable": scratch > now.writable,
            f"{self._copies.blocks_read} blocks of the engine are read by {stored + scratch}": (
                self._copies.blocks_read > stored + scratch
            ),
            "a block counts as being loaded by a request that does not load it": owners != set(self._loading),
        }
        return [text for text, wrong in found.items() if wrong]

    def _release(self, request: Request) -> None:
        if request.hold is not None:
            self._held -= len(request.hold)
            request.hold.drop()
            request.hold = None

    def _end_loading(self, request: Request) -> None:
        if request.loading is not None:
            self._drain()  # whether it ended well was said before the engine heard that it ended
            if self._loading.get(request.loading) == request.id:
                del self._loading[request.loading]
            request.loading = None
            self.detour.ends(request.id)
