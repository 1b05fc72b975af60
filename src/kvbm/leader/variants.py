"""Which adapter a request's blocks were computed with, as the leader knows it.

An engine loads adapters in its workers, lazily: what a request will be computed with is known for certain only when it
was. So a request looks blocks up under the adapter that is expected, a load fails where a worker holds another one, and
a block counts as computed once every rank has said which adapter it held in each step of the request.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count

from kvbm.core.outcome import Outcome
from kvbm.leader.copies import StepCopy
from kvbm.leader.outlook import Outlook
from kvbm.leader.requests import Request, Variant
from kvbm.link.channel import Link
from kvbm.link.messages import Adapters, Expected, Foreseen, Unlike, Used

log = logging.getLogger(__name__)

_THIS = -1
"""The step that is being described."""
_UNSTEADY = "a request has its adapter read again at every step"
_UNKNOWN = "no worker can say which adapter it holds, or they hold different ones"


@dataclass(slots=True)
class _Sent:
    """A step whose adapters some rank has not named yet."""

    used: list[int]
    ranks: set[int]
    requests: list[tuple[Request, int, int]] = field(default_factory=list)
    digests: list[bytes] | None = None


@dataclass(slots=True)
class _Draft:
    """The step that is being described: the requests that compute in it, each with its placement and blocks; the
    numbers of all adapters that it computes with; which adapter each of its loads is of."""

    requests: list[tuple[Request, int, int]] = field(default_factory=list)
    scheduled: set[int] = field(default_factory=set)
    loads: dict[int, Expected] = field(default_factory=dict)


@dataclass(slots=True)
class _Living:
    """By an adapter's number, the requests that have it read again at every step, and those that have begun to compute
    with it."""

    unsteady: Counter[int] = field(default_factory=Counter)
    begun: Counter[int] = field(default_factory=Counter)


class Variants:
    """Of all requests of a leader; under its lock. `seek` starts to look for what a request wants, once its keys are
    known; `changed` is told of a request whose keys are no longer those under which it was looked up, `confirm` of the
    first blocks of one that are known to be computed under its keys."""

    def __init__(
        self, links: Mapping[int, Link], clock: Callable[[], float],
        seek: Callable[[Request], None], changed: Callable[[Request], None], confirm: Callable[[str, int], None],
    ) -> None:  # fmt: skip
        self._numbers = count(1)
        """Of questions and steps."""
        self.outlook = Outlook(links, clock, self._numbers)
        self._seek, self._changed, self._confirm = seek, changed, confirm
        self._step = _Draft()
        self._sent: dict[int, _Sent] = {}
        self._stores: dict[int, int] = {}
        """Job that copies blocks of a request with an adapter -> its step."""
        self._awaited: dict[str, tuple[int, bytes]] = {}
        """Requests that load, or loaded and were not computed since, and with which adapter they must be."""
        self._living = _Living()
        self._said: set[str] = set()
        self.stored = False
        """Whether any block was stored with an adapter."""

    # ------------------------------------------------------------------ what is expected

    def begin(self, request: Request, variant: Variant, *, found_elsewhere: bool) -> None:
        """A request arrives. Where nothing can have been stored with an adapter, here or (`found_elsewhere`) below host
        memory, nobody is asked."""
        number = variant.adapter.number
        if variant.unsteady:
            self._living.unsteady[number] += 1
            self._refuse(request, _UNSTEADY)
        if variant.refused is not None:
            self._say(variant, variant.refused)
            return
        files, digest = self.outlook.of(number)
        if files != variant.files:
            if found_elsewhere or self.stored:
                self.outlook.ask(request, variant)
        elif digest:
            self._under(request, variant, digest)

    def _under(self, request: Request, variant: Variant, digest: bytes) -> None:
        variant.digest, variant.until = digest, None
        variant.keys.under(digest)
        self._seek(request)

    def ready(self, request: Request) -> bool | None:
        """Whether blocks may be loaded for the request; None: not yet known."""
        variant, record = request.variant, request.record
        assert variant is not None
        if variant.refused is None and self._living.unsteady[variant.adapter.number]:
            record.note(f"KVBM loaded nothing: {_UNSTEADY}")
            return False
        if variant.refused is not None:
            record.note(f"KVBM loaded nothing: {variant.refused}")
            return False
        if variant.digest:
            return True
        if self.outlook.waits(variant):
            record.note("the request waited: a worker looks which adapter it would be computed with")
            return None
        record.note("KVBM loaded nothing: it knows of no block that was computed with the request's adapter")
        variant.until = None
        return False

    # ------------------------------------------------------------------ a step

    def loading(self, request: Request, job: int, *, sound: bool) -> None:
        """Blocks are loaded for the request, in the step that is being described. Where what the engine has before them
        is of another adapter (not `sound`), the load is to fail: the engine would compute them from that."""
        variant = request.variant
        assert variant is not None
        variant.loads = True
        self._step.loads[job] = Expected(variant.adapter, variant.digest if sound else b"")
        self._awaited[request.id] = variant.adapter.number, variant.digest

    @property
    def describing(self) -> bool:
        """Whether the step that is being described computes with adapters."""
        return bool(self._step.scheduled)

    def computing(self, request: Request, complete: int) -> None:
        """This step computes the request's blocks, up to so many whole ones."""
        variant = request.variant
        assert variant is not None
        variant.until = None  # what is heard from now on comes too late
        self._step.scheduled.add(variant.adapter.number)
        if not variant.begun:
            variant.begun = True
            self._living.begun[variant.adapter.number] += 1
        if self._living.unsteady[variant.adapter.number]:
            self._refuse(request, _UNSTEADY)
        if variant.refused is None:
            self._step.requests.append((request, request.placement, complete))

    def storing(self, job: int) -> None:
        """Blocks of a request with an adapter are copied after this step."""
        self._stores[job] = _THIS
        self.stored = True

    def dropped(self, job: int) -> None:
        """Such a copy is not made after all."""
        self._stores.pop(job, None)

    def seal(self) -> Adapters | None:
        """What the workers are to know of this step."""
        number, draft = next(self._numbers), self._step
        if not (
            self._stores or self._awaited or self._living.begun or draft.requests or draft.loads or draft.scheduled
        ):
            return None  # as where there are no adapters
        for job in [job for job, step in self._stores.items() if step == _THIS]:
            self._stores[job] = number
        self._step = _Draft()
        awaited = sorted(set(self._awaited.values()))
        if not (draft.requests or draft.loads or awaited or self._living.begun):
            return None
        computing = (request.variant for request, _, _ in draft.requests)
        used = sorted({variant.adapter.number for variant in computing if variant is not None})
        if draft.requests:
            self._sent[number] = _Sent(used, set(self.outlook.links), draft.requests)
        for request, _, _ in draft.requests:
            self._awaited.pop(request.id, None)
        needed = sorted({*self._living.begun, *(each for each, _ in awaited)})
        return Adapters(number, used, draft.loads, awaited, needed, sorted(draft.scheduled))

    def finished(self, request: Request) -> None:
        """The request is over."""
        self._awaited.pop(request.id, None)
        if (variant := request.variant) is not None:
            self._living.unsteady -= Counter([variant.adapter.number] * variant.unsteady)
            self._living.begun -= Counter([variant.adapter.number] * variant.begun)

    # ------------------------------------------------------------------ what workers say

    def take(self, message: Used | Foreseen | Unlike, requests: Mapping[str, Request]) -> None:
        """A worker has looked at its adapters."""
        match message:
            case Used():
                self._used(message, requests)
            case Foreseen():
                waiting, digest = self.outlook.answered(message)
                for request in waiting:
                    variant = request.variant
                    if variant is None or variant.until is None or requests.get(request.id) is not request:
                        continue
                    variant.until = None
                    if digest:
                        self._under(request, variant, digest)
            case Unlike(request=name, digest=digest):
                loading = requests.get(name)
                if loading is not None and (variant := loading.variant) is not None:
                    if digest:
                        self.outlook.expect(variant.adapter.number, variant.files, digest)
                    self._awaited.pop(name, None)
                    self._refuse(loading, "a worker holds another adapter than the one its blocks were found under")

    def _used(self, message: Used, requests: Mapping[str, Request]) -> None:
        for number, sent in list(self._sent.items()):
            if number > message.step or message.rank not in sent.ranks:
                continue
            sent.ranks.discard(message.rank)
            # A rank speaks of its steps in order: of one that it left out it will say nothing.
            theirs = message.digests if number == message.step else []
            if len(theirs) != len(sent.used):
                theirs = [b""] * len(sent.used)
            mine = theirs if sent.digests is None else sent.digests
            sent.digests = [one if one == other else b"" for one, other in zip(mine, theirs, strict=True)]
            if not sent.ranks:
                del self._sent[number]
                held = dict(zip(sent.used, sent.digests, strict=True))
                for request, placement, complete in sent.requests:
                    new = placement == request.placement and complete > request.confirmed
                    if self.same(request, held) and new and requests.get(request.id) is request:
                        self._confirm(request.id, complete)

    def same(self, request: Request, held: Mapping[int, bytes]) -> bool:
        """Whether a step of the request was computed with its adapter, as the ranks `held` this."""
        variant = request.variant
        assert variant is not None
        if variant.refused is not None:
            return False
        digest = held[variant.adapter.number]
        if not digest:
            self._refuse(request, _UNKNOWN)
            self._say(variant, _UNKNOWN)
            return False
        if digest != variant.digest:
            self.outlook.expect(variant.adapter.number, variant.files, digest)
            if variant.seen or variant.loads or request.offered:
                self._refuse(request, "its adapter changed while it ran")
                return False
            self._changed(request)
            variant.digest = digest
            variant.keys.under(digest)
        variant.seen = True
        return True

    def copied(self, request: Request, job: StepCopy) -> None:
        """A copy of blocks of the request has ended on every rank: those that were not computed under its keys count as
        failed. A rank says what it computed with before it copies, so all have, of every step up to the copy's."""
        variant, step = request.variant, self._stores.pop(job.id, 0)
        if variant is None:
            return
        silent = (sent for number, sent in self._sent.items() if number <= step)
        unsaid = any(request is each for sent in silent for each, _, _ in sent.requests)
        if variant.refused is not None or unsaid or not variant.seen:
            job.outcomes[job.places >= request.confirmed] = Outcome.FAILED
            job.error = job.error or "computed with another adapter"

    def _refuse(self, request: Request, why: str) -> None:
        variant = request.variant
        assert variant is not None
        if variant.refused is None:
            variant.refused, variant.until = why, None
            request.record.note(f"KVBM loaded and stored nothing more: {why}")
            self._changed(request)

    def _say(self, variant: Variant, why: str) -> None:
        """Once per adapter."""
        if variant.adapter.name not in self._said:
            self._said.add(variant.adapter.name)
            log.warning("KVBM loads and stores nothing of adapter %s: %s", variant.adapter.name, why)
