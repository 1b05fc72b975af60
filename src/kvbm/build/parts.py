"""How a tier is put together: what each module of a tier in this folder provides."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from kvbm.abc.transport import Transport
from kvbm.build.place import Place
from kvbm.core.config import Settings
from kvbm.core.errors import Broken
from kvbm.core.keys import Namespace
from kvbm.leader.core import Core
from kvbm.link.channel import Link
from kvbm.link.messages import Open
from kvbm.tiers.gate import Gate
from kvbm.tiers.promote import Promotion
from kvbm.tiers.tier import RankSide, RankTier, Tier

Wrap = Callable[[Transport], Transport]
"""What a transport is put into (`transport_wrapper`)."""

_TICK_S: Final = 0.005
MOVE_BYTES: Final = 32 << 20
"""Bytes that are moved between host memory and a tier at once, over all ranks: what has arrived can be used while the
rest is on its way. Each move has work of its own, which costs a fast disk up to a tenth with half of this."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a tier wants of host memory; see `link.messages.Allot`."""

    stride: int = 0
    sums: Literal["", "made", "told"] = ""
    hurry: bool = False


@dataclass(frozen=True, slots=True)
class Ground:
    """What a tier is put on. `slot_bytes` are those of a block on one rank; `links` lead to the ranks that store."""

    settings: Settings
    place: Place
    core: Core
    gate: Gate
    links: Mapping[int, Link]
    slot_bytes: int
    expects: Callable[[bytes, int], bool] = lambda key, at: False
    """Whether a living request is going to compute and store a block, by key and place in its prompt."""

    grouped: bool = False
    """Whether not all layers need all blocks of a prompt."""

    @property
    def block_bytes(self) -> int:
        """Of a block over all ranks."""
        return self.slot_bytes * len(self.links)


class Claim(Protocol):
    """A tier that is wanted, until it is known what the weights contain."""

    def open(self, namespace: Namespace, promotion: Promotion, nearer: Sequence[Tier]) -> Tier:
        """It is known now. `nearer` are the tiers above it. Raises Broken, ConfigError."""

    def close(self) -> None:
        """It is not to be. Also called after an `open` that raised."""


class Part(Protocol):
    """One tier, as `build_leader` and `build_worker` know it."""

    @property
    def name(self) -> str:
        """The tier's."""

    @property
    def large(self) -> bool:
        """Host memory need only pass blocks on to it, where nobody says how large that is."""

    @property
    def drains(self) -> bool:
        """Whether it takes what is worth keeping when the process ends (`g3_drain_s`)."""

    @property
    def without(self) -> str:
        """What is said where it cannot be had, before the reason."""

    def wanted(self, settings: Settings) -> bool:
        """Whether there is to be one."""

    def check(self, settings: Settings) -> None:
        """Raises ConfigError for what cannot be used, before anything is waited for or touched."""

    def needs(self, slot_bytes: int) -> Needs:
        """Of host memory, where it is wanted."""

    def transports(self, settings: Settings) -> list[Transport]:
        """What moves its bytes beside the engine's copies, on each rank."""

    def on_rank(self, settings: Settings, wrapped: Wrap, side: RankSide) -> RankTier:
        """Its part on one rank."""

    def claim(self, ground: Ground) -> Claim:
        """At the start of a leader. Raises Broken."""


def open_ranks(ground: Ground, message: Open) -> None:
    """Has every rank that stores open its part of a tier, and waits for the answers. Raises Broken."""
    core, ranks = ground.core, [*ground.links]
    opened = core.lower.open(message.tier)
    for rank in ranks:
        core.links[rank].send(message)
    deadline = time.monotonic() + ground.settings.init_timeout_s
    while len(opened) < len(ranks):
        core.tick()
        if time.monotonic() > deadline or not all(core.links[rank].open for rank in ranks):
            raise Broken("not every rank said whether its part is open")
        time.sleep(_TICK_S)
    if problem := next((each.problem for each in opened.values() if each.problem), None):
        raise Broken(problem)
