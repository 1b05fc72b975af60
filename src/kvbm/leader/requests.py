"""What the leader remembers of a request: while it lives, and of the last thousand for `kvbm explain`."""

from __future__ import annotations

import reprlib
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvbm.blocks import Pinned
from kvbm.core.config import Settings
from kvbm.link.messages import Adapter
from kvbm.tiers.tier import Record, Seeker

PARAMS_KEY = "kvbm"
"""Under this name a request's `kv_transfer_params` may carry our parameters."""

_LONGEST_TTL = 1e9
_MOST_TOKENS = 1_000_000_000
_LONGEST_NAME = 100
_MOST_SAID = 8
"""Sentences about one request's parameters; what a client sends must not grow what is kept of it."""
ALL = 1 << 62
"""Of a request's blocks: as many as it has."""


@dataclass(frozen=True, slots=True)
class RequestParams:
    """What a request may ask for: `{"kvbm": {"load": false, "save": false, "save_answer": false, "save_tokens": n,
    "priority": 0..100, "ttl": seconds, "pull_from": "name"}}`.

    load: whether its prompt may come from KVBM. save: whether its blocks may be kept. save_answer: whether those with
    generated tokens may, too. save_tokens: only blocks of the first so many tokens are kept. priority: blocks of lower
    priority are evicted first. ttl: seconds after which its blocks are no longer matched. pull_from: the instance that
    computes its prompt at this moment, whose blocks it waits for. None: as the settings say.
    """

    load: bool = True
    save: bool = True
    priority: int = 0
    ttl: float | None = None
    pull_from: str | None = None
    save_answer: bool | None = None
    save_tokens: int | None = None

    def kept_tokens(self, settings: Settings, prompt_tokens: int) -> int:
        """Of how many tokens of such a request blocks are worth keeping."""
        answer = settings.save_answers if self.save_answer is None else self.save_answer
        most = settings.save_tokens if self.save_tokens is None else self.save_tokens
        return min(ALL if answer else prompt_tokens, ALL if most is None else most)

    @classmethod
    def parse(cls, params: Mapping[str, Any] | None) -> tuple[RequestParams, list[str]]:
        """The parameters, and a sentence for each that is wrong and therefore ignored (a request is never failed)."""
        if params is not None and not isinstance(params, Mapping):
            return cls(), [f"kv_transfer_params must be an object, not {_short(params)}: ignored"]
        ours = (params or {}).get(PARAMS_KEY)
        if ours is None:
            return cls(), []
        if not isinstance(ours, Mapping):
            return cls(), [f'kv_transfer_params["{PARAMS_KEY}"] must be an object, not {_short(ours)}: ignored']
        good: dict[str, Any] = {}
        wrong: list[str] = []
        for name, value in ours.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            match name:
                case "load" | "save" | "save_answer" if isinstance(value, bool):
                    good[name] = value
                case "priority" if isinstance(value, int) and number and 0 <= value <= 100:
                    good[name] = value
                case "ttl" if number and 0 < value <= _LONGEST_TTL:
                    good[name] = float(value)
                case "save_tokens" if isinstance(value, int) and number and 0 <= value <= _MOST_TOKENS:
                    good[name] = value
                case "pull_from" if isinstance(value, str) and 0 < len(value) <= _LONGEST_NAME:
                    good[name] = value
                case _ if len(wrong) < _MOST_SAID:
                    where = f'kv_transfer_params["{PARAMS_KEY}"][{_short(name)}]'
                    wrong.append(f"{where} = {_short(value)} is not understood: ignored")
        return cls(**good), wrong


def _short(value: object) -> str:
    """What it looks like, in a few characters, whatever a client sent."""
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a huge number"
    return reprlib.repr(value)


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
class Request:
    """A living request. `keys` grows as blocks fill; `g1` are its blocks in the engine, in order, `others` those in the
    second and further layer groups."""

    id: str
    keys: Sequence[bytes]
    params: RequestParams
    record: Record
    g1: list[int] = field(default_factory=list)
    others: list[list[int]] = field(default_factory=list)
    offered: int = 0
    awaited: list[bytes] = field(default_factory=list)
    """Keys of blocks that were on their way to G2 when they were offered: somebody else brings them."""
    # Of its table (`leader/provenance.py`):
    placement: int = 0
    """The number of its table: each new one has another."""
    found: int = 0
    """Blocks that the engine had or KVBM loads."""
    proven: int = 0
    """Blocks that are known to carry this request's keys."""
    traced: bool = False
    """Whether `found` blocks have been looked at."""
    settled: int = 0
    """Blocks with which a step has nothing more to do."""
    late: bool = False
    """Whether what a step computes carries its keys is known only after the step."""
    confirmed: int = 0
    """Then: blocks of which it is known."""
    expected: int = 0
    """Blocks that are found, or that a step computes of which that is not known yet."""
    hold: Pinned | None = None
    short: bool = False
    """What host memory had of it was too little for a load."""
    admitted: bool = False
    stale: bool = False
    """It began before a reset: its KV may belong to the old generation."""
    barred: str | None = None
    """Why nothing is loaded or stored for it."""
    worth: int = ALL
    """Blocks that are worth keeping, from its first on."""
    asked: int = ALL
    """Blocks of its prompt alone."""
    variant: Variant | None = None
    """Its adapter, if it has one. Its keys are known once the adapter's digest is."""
    loading: bytes | None = None
    """First key of the load it started and has not been scheduled with yet; others that want it wait."""
    computed: int = 0
    """Tokens that were computed before this step."""
    coverage: object = None
    """What the leader's coverage (`leader/coverage.py`) remembers of it."""

    @property
    def tables(self) -> list[list[int]]:
        """Its blocks in the engine, by layer group."""
        return [self.g1, *self.others]

    @property
    def seeker(self) -> Seeker:
        """What tiers know of it."""
        return Seeker(self.id, self.record, self.keys, self.params.pull_from)

    @property
    def family(self) -> bytes:
        """The same for requests with the same adapter."""
        return self.variant.digest if self.variant is not None else b""


class Requests:
    """The living requests of one leader, by id, and the records of the last ones (`kept` of them). Also which of them
    load what: others that want the same blocks wait, if the engine `shares` its blocks between requests."""

    def __init__(self, kept: int, *, shares: bool) -> None:
        self.living: dict[str, Request] = {}
        self.records: OrderedDict[str, Record] = OrderedDict()
        self._kept, self._shares = kept, shares
        self.loading: dict[bytes, str] = {}
        """First key of a load -> its request."""

    def record(self, request: str, prompt_tokens: int, notes: Sequence[str]) -> Record:
        """A new one."""
        record = self.records[request] = Record(request, prompt_tokens, why=list(notes))
        while len(self.records) > self._kept:
            self.records.popitem(last=False)
        return record

    def loader(self, key: bytes, request: Request) -> str | None:
        """Another request that loads this block, if there is one to wait for."""
        owner = self.loading.get(key) if self._shares else None
        return None if owner == request.id else owner

    def loads(self, request: Request, key: bytes) -> None:
        """It loads blocks from this one on."""
        request.loading = key
        self.loading[key] = request.id

    def loaded(self, request: Request) -> None:
        """It does not any more."""
        if request.loading is not None and self.loading.get(request.loading) == request.id:
            del self.loading[request.loading]
        request.loading = None

    def strays(self) -> bool:
        """Whether a block counts as being loaded by a request that does not load it."""
        living = self.living
        owners = {living[name].loading if name in living else None for name in self.loading.values()}
        return owners != set(self.loading)
