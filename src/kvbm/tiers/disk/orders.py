"""What the leader wants of a rank's files, and what it hears of them."""

from __future__ import annotations

from typing import Final

import msgspec

from kvbm.link.messages import FromTier, Open, ToTier
from kvbm.observe.names import DISK
from kvbm.stores.disk.meta import DiskPlace

TIER: Final = DISK


class Write(msgspec.Struct, frozen=True, tag=True):
    """Copy blocks from host memory to disk. One entry per block, in prompt order; `g2` and `g3` are int32 arrays,
    `priorities` int32, `expires` float64 in Unix seconds. `sequence` numbers the last block, the others upwards."""

    job: int
    g2: bytes
    g3: bytes
    keys: list[bytes]
    parents: list[bytes | None]
    priorities: bytes
    expires: bytes
    sequence: int
    generation: int


class Read(msgspec.Struct, frozen=True, tag=True):
    """Copy blocks from disk to host memory; they must be those of `keys`."""

    job: int
    g3: bytes
    g2: bytes
    keys: list[bytes]


class Forget(msgspec.Struct, frozen=True, tag=True):
    """These slots on disk (int32) are not to be served, also after a restart, if they still hold these keys."""

    g3: bytes
    keys: list[bytes]


class Generation(msgspec.Struct, frozen=True, tag=True):
    """What is on disk belongs to an older generation from now on."""

    number: int


class Probe(msgspec.Struct, frozen=True, tag=True):
    """Try whether the disk works again; with `reopen` the files were made anew and are to be opened first."""

    reopen: bool = False
    number: int = 0


class Probed(msgspec.Struct, frozen=True):
    """The answer to the probe of this number; `problem` says why the disk does not work."""

    rank: int
    problem: str | None = None
    number: int = 0


Order = Write | Read | Forget | Generation | Probe

_encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(Order).decode
decode_place = msgspec.msgpack.Decoder(DiskPlace).decode
decode_answer = msgspec.msgpack.Decoder(Probed).decode


def to_rank(order: Order) -> ToTier:
    """As the channel carries it."""
    return ToTier(TIER, _encode(order))


def to_open(place: DiskPlace) -> Open:
    """As the channel carries it."""
    return Open(TIER, _encode(place))


def to_leader(answer: Probed) -> FromTier:
    """As the channel carries it."""
    return FromTier(TIER, _encode(answer))
