"""What the leader wants of a rank about other instances' memory, and what it hears of its own."""

from __future__ import annotations

from typing import Final

import msgspec

from kvbm.link.messages import FromTier, ToTier
from kvbm.observe.names import PEERS

TIER: Final = PEERS


class Attach(msgspec.Struct, frozen=True, tag=True):
    """Make the memory of the same rank of another instance reachable, under this name, in place of what was so before
    under `old`."""

    peer: str
    metadata: bytes
    address: int
    stride: int
    slots: int
    old: str | None = None


class Detach(msgspec.Struct, frozen=True, tag=True):
    """This peer is gone: forget its memory."""

    peer: str


class Pull(msgspec.Struct, frozen=True, tag=True):
    """Copy blocks from an attached peer's slots to ours; both int32 arrays. `sums` (uint64) are what they must be."""

    job: int
    peer: str
    theirs: bytes
    g2: bytes
    sums: bytes


class Shared(msgspec.Struct, frozen=True):
    """Where a rank's host memory is, for other instances: NIXL's metadata, address, bytes between slots. Said again
    when that changes; `problem` says why nobody can read it."""

    rank: int
    metadata: bytes = b""
    address: int = 0
    stride: int = 0
    slots: int = 0
    problem: str | None = None


Order = Attach | Detach | Pull

_encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(Order).decode
decode_answer = msgspec.msgpack.Decoder(Shared).decode


def to_rank(order: Order) -> ToTier:
    """As the channel carries it."""
    return ToTier(TIER, _encode(order))


def to_leader(answer: Shared) -> FromTier:
    """As the channel carries it."""
    return FromTier(TIER, _encode(answer))
