"""Which adapter a request's blocks were computed with, as the leader knows it.

An engine loads adapters in its workers, lazily: what a request will be computed with is known for certain only when it
was. So a request looks blocks up under the adapter that is expected, a load fails where a worker holds another one, and
a block counts as computed once every rank has said which adapter it held in each step of the request.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from kvbm.core.errors import Broken
from kvbm.core.outcome import Outcome
from kvbm.link.channel import Link
from kvbm.link.messages import Adapter, Adapters, Expected, Foresee, Foreseen, Unlike, Used

if TYPE_CHECKING:
    from kvbm.leader.copies import Job
    from kvbm.leader.requests import Request

log = logging.getLogger(__name__)

_PATIENCE = 2.0
"""Seconds that a request waits to hear which adapter it would be computed with."""
_PAUSES = (4.0, 600.0)
"""Seconds until a question that nobody has answered is asked again, each time twice as many: at first, at most. Whoever
is stuck with it may be so each time."""
_REMEMBERED = 4096
"""Adapters whose expected digest is kept."""
_THIS = -1
"""The step that is being described."""
_UNSTEADY = "a request has its adapter read again at every step"
_UNKNOWN = "no worker can say which adapter it holds, or they hold different ones"


class KeysUnder(Protocol):
    """A request's keys, which are known once the adapter's digest is."""

    def under(self, digest: bytes) -> None:
        """From now on these are the keys of its blocks with this adapter."""


@dataclass(slots=True)
class Variant:
    """The adapter of one request. `files` is what changes when the adapter's files do, as far as can be seen. `refused`
    says why nothing is loaded or stored for it."""

    adapter: Adapter
    files: Hashable
    keys: KeysUnder
    unsteady: bool = False
    """The engine reads it again at every step."""
    refused: str | None = None
    digest: bytes = b""
    """What the keys are of; empty while that is not known."""
    until: float | None = None
    """How long the request waits to hear it."""
    loads: bool = False
    """It loads blocks under this digest, or has."""
    begun: bool = False
    """A step computes with it."""
    seen: bool = False
    """A step was computed with it."""


@dataclass(slots=True)
class _Question:
    """What a worker was asked: an adapter's number and files; who waits for the answer, and until when. It is asked
    again at the earliest at `again`, under the same number: then the first answer is as good as the last."""

    about: tuple[int, Hashable]
    pause: float = _PAUSES[0]
    until: float = 0.0
    again: float = 0.0
    waiting: list[Request] = field(default_factory=list)


@dataclass(slots=True)
class _Sent:
    """A step whose adapters some rank has not named yet."""

    used: list[int]
    ranks: set[int]
    requests: list[tuple[Request, int, int]] = field(default_factory=list)
    digests: list[bytes] | None = None


class Variants:
    """Of all requests of a leader; under its lock. `seek` starts to look for what a request wants, once its keys are
    known; `changed` is told of a request whose keys are no longer those under which it was looked up, `confirm` of the
    first blocks of one that are known to be computed under its keys."""

    def __init__(
        self, links: Mapping[int, Link], clock: Callable[[], float],
        seek: Callable[[Request], None], changed: Callable[[Request], None], confirm: Callable[[str, int], None],
    ) -> None:  # fmt: skip
        self._links, self._clock = links, clock
        self._seek, self._changed, self._confirm = seek, changed, confirm
        self._expected: OrderedDict[int, tuple[Hashable, bytes]] = OrderedDict()
        """Number -> the files that a request came with, and the digest that workers held then, if that can be known."""
        self._asked: dict[int, _Question] = {}
        self._sent: dict[int, _Sent] = {}
        self._draft: list[tuple[Request, int, int]] = []
        self._scheduled: set[int] = set()
        self._loads: dict[int, Expected] = {}
        self._stores: dict[int, int] = {}
        """Job that copies blocks of a request with an adapter -> its step."""
        self._awaited: dict[str, tuple[int, bytes]] = {}
        """Requests that load, or loaded and were not computed since, and with which adapter they must be."""
        self._unsteady: Counter[int] = Counter()
        self._alive: Counter[int] = Counter()
        """Number -> requests that have begun to compute with it."""
        self._said: set[str] = set()
        self._last = 0
        self.stored = False
        """Whether any block was stored with an adapter."""

    # ------------------------------------------------------------------ what is expected

    def begin(self, request: Request, variant: Variant, *, found_elsewhere: bool) -> None:
        """A request arrives. Where nothing can have been stored with an adapter, here or (`found_elsewhere`) below host
        memory, nobody is asked."""
        number = variant.adapter.number
        if variant.unsteady:
            self._unsteady[number] += 1
            self._refuse(request, _UNSTEADY)
        if variant.refused is not None:
            self._say(variant, variant.refused)
            return
        files, digest = self._expected.get(number, (None, b""))
        if files != variant.files:
            if found_elsewhere or self.stored:
                self._ask(request, variant)
        elif digest:
            self._under(request, variant, digest)

    def _ask(self, request: Request, variant: Variant) -> None:
        now, about = self._clock(), (variant.adapter.number, variant.files)
        number, question = next((each for each in self._asked.items() if each[1].about == about), (0, _Question(about)))
        if now >= question.again:
            if not number:
                self._last += 1
                number = self._last
                self._asked[number] = question
            question.until, question.again, question.waiting = now + _PATIENCE, now + question.pause, []
            question.pause = min(2 * question.pause, _PAUSES[1])
            try:
                self._links[min(self._links)].send(Foresee(number, variant.adapter))
            except Broken as error:
                log.debug("KVBM: %s", error)  # it is noticed elsewhere that the worker is gone
        if now < question.until:
            variant.until = question.until
            question.waiting.append(request)

    def _under(self, request: Request, variant: Variant, digest: bytes) -> None:
        variant.digest, variant.until = digest, None
        variant.keys.under(digest)
        self._seek(request)

    def _expect(self, number: int, files: Hashable, digest: bytes) -> None:
        self._expected.pop(number, None)
        self._expected[number] = files, digest
        while len(self._expected) > _REMEMBERED:
            self._expected.popitem(last=False)

    def ready(self, request: Request) -> bool | None:
        """Whether blocks may be loaded for the request; None: not yet known."""
        variant, record = request.variant, request.record
        assert variant is not None
        if variant.refused is None and self._unsteady[variant.adapter.number]:
            record.note(f"nothing loaded: {_UNSTEADY}")
            return False
        if variant.refused is not None:
            record.note(f"nothing loaded: {variant.refused}")
            return False
        if variant.digest:
            return True
        if variant.until is not None and self._clock() < variant.until:
            record.note("waited: a worker looks which adapter it would be computed with")
            return None
        record.note("nothing loaded: nothing is known to be stored with its adapter")
        variant.until = None
        return False

    # ------------------------------------------------------------------ a step

    def loading(self, request: Request, job: int, *, sound: bool) -> None:
        """Blocks are loaded for the request, in the step that is being described. Where what the engine has before them
        is of another adapter (not `sound`), the load is to fail: the engine would compute them from that."""
        variant = request.variant
        assert variant is not None
        variant.loads = True
        self._loads[job] = Expected(variant.adapter, variant.digest if sound else b"")
        self._awaited[request.id] = variant.adapter.number, variant.digest

    @property
    def describing(self) -> bool:
        """Whether the step that is being described computes with adapters."""
        return bool(self._scheduled)

    def computing(self, request: Request, complete: int) -> None:
        """This step computes the request's blocks, up to so many whole ones."""
        variant = request.variant
        assert variant is not None
        variant.until = None  # what is heard from now on comes too late
        self._scheduled.add(variant.adapter.number)
        if not variant.begun:
            variant.begun = True
            self._alive[variant.adapter.number] += 1
        if self._unsteady[variant.adapter.number]:
            self._refuse(request, _UNSTEADY)
        if variant.refused is None:
            self._draft.append((request, request.placement, complete))

    def storing(self, job: int) -> None:
        """Blocks of a request with an adapter are copied after this step."""
        self._stores[job] = _THIS
        self.stored = True

    def dropped(self, job: int) -> None:
        """Such a copy is not made after all."""
        self._stores.pop(job, None)

    def seal(self) -> Adapters | None:
        """What the workers are to know of this step."""
        self._last += 1
        for job in [job for job, step in self._stores.items() if step == _THIS]:
            self._stores[job] = self._last
        draft, self._draft = self._draft, []
        scheduled, self._scheduled = sorted(self._scheduled), set()
        loads, self._loads = self._loads, {}
        awaited = sorted(set(self._awaited.values()))
        if not (draft or loads or awaited or self._alive):
            return None
        used = sorted({request.variant.adapter.number for request, _, _ in draft if request.variant is not None})
        if draft:
            self._sent[self._last] = _Sent(used, set(self._links), draft)
        for request, _, _ in draft:
            self._awaited.pop(request.id, None)
        needed = sorted({*self._alive, *(number for number, _ in awaited)})
        return Adapters(self._last, used, loads, awaited, needed, scheduled)

    def finished(self, request: Request) -> None:
        """The request is over."""
        self._awaited.pop(request.id, None)
        if (variant := request.variant) is not None:
            self._unsteady -= Counter([variant.adapter.number] * variant.unsteady)
            self._alive -= Counter([variant.adapter.number] * variant.begun)

    # ------------------------------------------------------------------ what workers say

    def take(self, message: Used | Foreseen | Unlike, requests: Mapping[str, Request]) -> None:
        """A worker has looked at its adapters."""
        match message:
            case Used():
                self._used(message, requests)
            case Foreseen(question=question, digest=digest):
                if (asked := self._asked.pop(question, None)) is None:
                    return
                number, files = asked.about
                known, held = self._expected.get(number, (None, b""))
                if known == files:  # a step has been computed with it meanwhile
                    digest = held
                else:
                    self._expect(number, files, digest)
                for request in asked.waiting:
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
                        self._expect(variant.adapter.number, variant.files, digest)
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
                    if self._same(request, held) and new and requests.get(request.id) is request:
                        self._confirm(request.id, complete)

    def _same(self, request: Request, held: Mapping[int, bytes]) -> bool:
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
            self._expect(variant.adapter.number, variant.files, digest)
            if variant.seen or variant.loads or request.offered:
                self._refuse(request, "its adapter changed while it ran")
                return False
            self._changed(request)
            variant.digest = digest
            variant.keys.under(digest)
        variant.seen = True
        return True

    def copied(self, job: Job) -> None:
        """A copy of blocks of a request has ended on every rank: those that were not computed under its keys count as
        failed. A rank says what it computed with before it copies, so all have, of every step up to the copy's."""
        variant, step = job.request.variant, self._stores.pop(job.id, 0)
        if variant is None:
            return
        silent = (sent for number, sent in self._sent.items() if number <= step)
        unsaid = any(job.request is each for sent in silent for each, _, _ in sent.requests)
        if variant.refused is not None or unsaid or not variant.seen:
            job.outcomes[job.places >= job.request.confirmed] = Outcome.FAILED
            job.error = job.error or "computed with another adapter"

    def _refuse(self, request: Request, why: str) -> None:
        variant = request.variant
        assert variant is not None
        if variant.refused is None:
            variant.refused, variant.until = why, None
            request.record.note(f"nothing more loaded or stored: {why}")
            self._changed(request)

    def _say(self, variant: Variant, why: str) -> None:
        """Once per adapter."""
        if variant.adapter.name not in self._said:
            self._said.add(variant.adapter.name)
            log.warning("KVBM: nothing of adapter %s is loaded or stored: %s", variant.adapter.name, why)
