"""What a place below host memory is, beside the scheduler and on each rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvbm.abc.transport import Completion
from kvbm.blocks import Pool, Staged
from kvbm.core.region import Region, Slots
from kvbm.link.messages import FromTier, Result, Sick
from kvbm.stores.checksum import Words
from kvbm.tiers.gate import Gate
from kvbm.tiers.host import Landing
from kvbm.tiers.moves import Ended, Passage
from kvbm.transfer.executor import Executor

Mask = npt.NDArray[np.bool_]


@dataclass(slots=True)
class Record:
    """What `kvbm explain` tells."""

    request_id: str
    prompt_tokens: int
    when: float = field(default_factory=time.time)
    device_blocks: int = 0
    matched: int = 0
    staged: dict[str, int] = field(default_factory=dict)
    """Blocks that were read for it, by what JSON calls their tier (`observe.names.json_key`)."""
    gated: bool = False
    """Nothing more is read for it: computing was faster, or a read failed."""
    loaded: int = 0
    load: str = "none"
    load_ms: float | None = None
    outcome: str = "waiting"
    offloaded: int = 0
    why: list[str] = field(default_factory=list)

    def note(self, sentence: str) -> None:
        """Adds a sentence once; a request that retries every step must not grow its record."""
        if sentence not in self.why and len(self.why) < 32:
            self.why.append(sentence)


class Wanted(NamedTuple):
    """Blocks that a request needs in G2: in prompt order, or, where layer groups need different ones, what is not there
    first. Each that is read saves computing `worth` blocks of the prompt."""

    keys: Sequence[bytes]
    worth: float = 1.0


class Seeker(NamedTuple):
    """For whom blocks are looked for. `keys` are those of the prompt's blocks, in order; they may grow."""

    id: str
    record: Record
    keys: Sequence[bytes]
    pull_from: str | None = None
    """The instance that is to be asked, and no other: it computes them for this very request."""


class Offer(Protocol):
    """Blocks of one prompt that a tier keeps readable for us until `drop`."""

    @property
    def tier(self) -> str:
        """Its name."""

    @property
    def words(self) -> str:
        """As sentences call where they are: on ..."""

    @property
    def keys(self) -> Sequence[bytes]:
        """In prompt order."""

    @property
    def parents(self) -> Sequence[bytes | None]:
        """Of each, the key before it in the prompt, if it has one."""

    @property
    def terms(self) -> Sequence[tuple[int, float]]:
        """Of each, its priority, and when it ends by the leader's clock."""

    @property
    def cuts(self) -> Sequence[int] | None:
        """Where a read has to end, as places in `keys`, in order and the end among them: each of those parts comes as a
        whole. None: anywhere."""

    @property
    def gate(self) -> Gate:
        """How fast reads from there are."""

    @property
    def queue(self) -> object:
        """Reads of offers with the same one are done one after the other."""

    @property
    def keeps(self) -> bool:
        """Whether G2 keeps what has come once the request has its copy."""

    @property
    def places(self) -> Slots | None:
        """Of each, which block of its prompt it is, if that is known."""

    def accept(self) -> None:
        """Some of it is wanted, and will be read soon. Called once, before anything else, or never."""

    def failing(self) -> str | None:
        """Why nothing is to be read from there."""

    def read(self, at: Slots, into: Staged, ended: Ended) -> int:
        """Read those at these places in `keys` to slots of host memory; returns the passage's number."""

    def cancel(self, jobs: Collection[int]) -> None:
        """Nobody wants these passages any more. They end all the same."""

    def judge(self, at: Slots, passage: Passage) -> None:
        """How a read of these ended."""

    def drop(self) -> None:
        """Nothing is read any more."""


Give = Callable[[Offer], bool]
"""Takes an offer; False: nobody wants any of it, and it is to be dropped."""


class Search:
    """What a tier that knows no answer at once looks for. `until` is when its request has waited long enough, by the
    leader's clock."""

    def __init__(self, until: float) -> None:
        self.until = until
        self.ended = False
        """Nothing more comes, or nobody wants it."""


class Tier(Protocol):
    """A place below host memory. Under the leader's lock. No call waits; none raises for the place's sake: what fails
    is an outcome of a block, or `problem`."""

    @property
    def name(self) -> str:
        """Spelled once, in its folder."""

    @property
    def words(self) -> str:
        """As sentences call it: waited for ..."""

    @property
    def keeps(self) -> bool:
        """See `Offer`."""

    @property
    def problem(self) -> str | None:
        """Why it is left alone; None while it is used."""

    @property
    def pool(self) -> Pool | None:
        """What keeps account of its slots, where the leader chooses them."""

    # What a request does.

    def covers(self, keys: Sequence[bytes]) -> Mask | None:
        """Which of these are there; None: that is not known without asking (`seek`)."""

    def seek(self, seeker: Seeker, keys: Sequence[bytes], first: int | None, give: Give) -> Search | None:
        """Offer what is there of these keys of a prompt, in its order. A tier that `covers` keys is asked for what it
        has, with `first` None, and gives at once. Others are asked for keys that follow each other from block `first`
        of the prompt on; they return a search and give later, taking the lock; None: they look for nothing."""

    def asked(self, keys: Sequence[bytes]) -> None:
        """A request asked for these."""

    def over(self, keys: Sequence[bytes], record: Record) -> None:
        """It ended. Of its blocks, the last is to leave before the first. `record` is what `explain` tells of it."""

    # What host memory does.

    def landing(self, slots: Slots, keys: Sequence[bytes], how: Landing) -> None:
        """See `host.Listener`."""

    def landed(self, keys: Sequence[bytes], how: Landing) -> None:
        """See `host.Listener`. A private namespace hears of it, too."""

    # What is moved.

    def answer(self, result: Result) -> bool:
        """Takes one rank's result; False where it is about no passage of this tier."""

    def hear(self, body: bytes) -> None:
        """What its part on a rank says, in words of its own."""

    def sick(self, why: str) -> None:
        """Its part on a rank does not work any more, for good."""

    def pump(self) -> None:
        """Start what may start now. Only while KVBM does not stand aside."""

    def tick(self) -> None:
        """A few times a second, always."""

    # Its end.

    def clear(self, *, lasting: bool) -> None:
        """A new generation: nothing that is there now is served any more. With `lasting` False nothing that comes from
        now on outlives the process: the weights may be others."""

    def leave(self, why: str) -> None:
        """Nothing is read from there any more, nothing written; what is on its way counts for nothing."""

    @property
    def drains(self) -> bool:
        """Whether it takes what is worth keeping when the process ends."""

    def drain(self) -> None:
        """The process ends soon. Only where it `drains`."""

    @property
    def drained(self) -> bool:
        """Whether that is done."""

    def stop(self) -> None:
        """Without the lock: may wait for threads that take it."""

    def close(self) -> None:
        """After `stop`. The process is about to end."""

    # What is told.

    def counts(self) -> Mapping[str, int]:
        """What is counted and is no copy, for metrics."""

    def status(self) -> Mapping[str, Any]:
        """For `kvbm status`, beside `counts`: what only this tier has. Tiers that have ways of their own
        (`observe.names.WAYS`) add, under the name of a way, what is not counted of its copies."""

    def limits(self) -> str | None:
        """What it does not do although it is used, and why."""

    def namesakes(self) -> tuple[str, ...]:
        """Why blocks of the same model that are there are not found."""


class RankTier(Protocol):
    """A tier's part on one rank. Each read and write is answered once (`RankSide`), cancelled ones too. What says
    nothing else belongs to the channel's thread, `close` to the engine's."""

    def open(self, body: bytes) -> None:
        """It is known now where this rank's part is. Raises Broken."""

    def ready(self) -> None:
        """All of host memory that there will be is there. Called once, maybe by another thread."""

    def take(self, body: bytes) -> None:
        """Do what the leader wants, in words of the tier's own. Returns at once."""

    def cancel(self, jobs: Collection[int]) -> None:
        """Nobody wants these any more. Others' are among them."""

    def expire(self) -> None:
        """To be called every now and then, waits for nothing: ends what takes too long. Any thread."""

    def look(self) -> None:
        """Whether what moves bytes lives; the leader is told once where it does not. Any thread."""

    def close(self, seconds: float) -> None:
        """Wait so long at most for what is on its way, and do nothing more."""


class RankSide(Protocol):
    """What a rank has for its tiers. Any thread."""

    @property
    def rank(self) -> int: ...

    @property
    def executor(self) -> Executor:
        """What copies beside the engine."""

    @property
    def sums(self) -> Words:
        """The checksum of each slot of host memory."""

    @property
    def slot_bytes(self) -> int:
        """What a block has on this rank."""

    def memory(self, name: str, slot_bytes: int = 0) -> Region:
        """All of host memory, a slot one extent of this many bytes; 0: up to the next one. After `RankTier.ready` only
        what is there."""

    def tell(self, message: FromTier | Sick) -> None:
        """The leader hears of this."""

    def reads(self, job: int) -> None:
        """A read has begun: an engine that has nothing to do waits a moment for its end."""

    def read(self, slots: Slots, job: int, completion: Completion, sums: Words) -> None:
        """It ended. `sums` are the checksums of what these slots of host memory hold now."""

    def written(self, job: int, completion: Completion) -> None:
        """A write ended."""
