"""What a place below host memory is, beside the scheduler and on each rank."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

from kvbm.abc.transport import Completion
from kvbm.blocks import Staged
from kvbm.core.region import Region, Slots
from kvbm.link.messages import FromTier, Sick
from kvbm.stores.checksum import Words
from kvbm.tiers.gate import Gate
from kvbm.tiers.moves import Ended, Passage
from kvbm.transfer.executor import Executor


class Hold(Protocol):
    """What keeps blocks where they are while they are read."""

    def drop(self) -> None:
        """They are not read any more."""


class Source(Protocol):
    """The disk, or a peer. `gate` knows how fast it is; `problem` why it is not to be read from."""

    name: ClassVar[str]
    """As sentences call it."""
    tier: ClassVar[str]
    """Its tier's."""
    gate: Gate
    keep: bool
    """Whether host memory keeps what came after the requests that waited for it got it."""

    @property
    def problem(self) -> str | None: ...

    def read(self, slots: Slots, into: Staged, ended: Ended) -> int:
        """Copy slots to those of host memory; returns the move's number."""

    def cancel(self, jobs: Collection[int]) -> None:
        """Nobody wants these any more. They end all the same."""

    def judge(self, keys: Sequence[bytes], slots: Slots, move: Passage) -> None:
        """How a read of these ended."""

    def places(self, keys: Sequence[bytes]) -> Slots | None:
        """Which blocks of their prompt these are, if that is known."""


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
        """All of host memory, a slot one extent of so many bytes; 0: up to the next one. After `RankTier.ready` only
        what is there."""

    def tell(self, message: FromTier | Sick) -> None:
        """The leader hears of this."""

    def reads(self, job: int) -> None:
        """A read has begun: an engine that has nothing to do waits a moment for its end."""

    def read(self, slots: Slots, job: int, completion: Completion, sums: Words) -> None:
        """It ended. `sums` are the checksums of what these slots of host memory hold now."""

    def written(self, job: int, completion: Completion) -> None:
        """A write ended."""
