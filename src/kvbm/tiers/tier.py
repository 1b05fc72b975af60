"""Where blocks can be read from into host memory, as the promotion sees it. Under the leader's lock."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

from kvbm.blocks import Pinned, Staged
from kvbm.core.events import Fetched, Promoted
from kvbm.core.region import Slots
from kvbm.tiers.gate import Gate
from kvbm.tiers.moves import Move


class Hold(Protocol):
    """What keeps blocks where they are while they are read."""

    def drop(self) -> None:
        """They are not read any more."""


class Source(Protocol):
    """The disk, or a peer. `gate` knows how fast it is; `problem` why it is not to be read from."""

    name: ClassVar[str]
    """As sentences call it."""
    tier: ClassVar[str]
    """As records of requests call it."""
    event: ClassVar[type[Promoted] | type[Fetched]]
    """What is told of a read that ended."""
    gate: Gate
    keep: bool
    """Whether host memory keeps what came after the requests that waited for it got it."""

    @property
    def problem(self) -> str | None: ...

    def read(self, slots: Slots, into: Staged, ended: Callable[[Move], None]) -> int:
        """Copy slots to those of host memory; returns the move's number."""

    def cancel(self, jobs: Collection[int]) -> None:
        """Nobody wants these any more. They end all the same."""

    def judge(self, keys: Sequence[bytes], slots: Slots, move: Move) -> None:
        """How a read of these ended."""

    def arrived(self, blocks: Pinned) -> None:
        """These are in host memory now."""


@dataclass(slots=True)
class Record:
    """What `kvbm explain` tells."""

    request_id: str
    prompt_tokens: int
    when: float = field(default_factory=time.time)
    device_blocks: int = 0
    matched: int = 0
    staged: dict[str, int] = field(default_factory=dict)
    """Blocks that were read for it, by where they were: g3 (the disk), peer."""
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
