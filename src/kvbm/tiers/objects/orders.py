"""What the leader wants of the ranks about shared storage, and what it hears.

One rank's process talks to the storage for all ranks of the host, the lowest that stores. The others lend it their host
memory, and note the checksums of what came.
"""

from __future__ import annotations

from typing import Final

import msgspec

from kvbm.link.messages import FromTier, Open, ToTier
from kvbm.observe.names import OBJECTS

TIER: Final = OBJECTS


class RunsPlace(msgspec.Struct, frozen=True):
    """What is stored, and by whom: the namespace's fingerprint, what people call its model, blocks in a run, the ranks
    that store, our name among instances (16 hexadecimal digits). `warm` of the hottest runs are to be found. With
    `strict` the answer waits for a trial of the storage."""

    fingerprint: str
    model: str
    run_blocks: int
    ranks: list[int]
    instance: str
    warm: int = 0
    strict: bool = False


class RankArena(msgspec.Struct, frozen=True, tag=True):
    """Where a rank's host memory is: a file that process `pid` has open as `fd`, its bytes; bytes from one slot
    to the next. `host` tells machines apart."""

    rank: int
    pid: int = 0
    fd: int = 0
    nbytes: int = 0
    stride: int = 0
    host: str = ""


class AttachArenas(msgspec.Struct, frozen=True, tag=True):
    """The host memory of all ranks that store."""

    memories: list[RankArena]


class TryStorage(msgspec.Struct, frozen=True, tag=True):
    """Try whether the storage does what it has to. With `anew` it did not until now, and what is there is looked up
    again."""

    number: int
    anew: bool = True


class PutRun(msgspec.Struct, frozen=True, tag=True):
    """Write a run. `g2` (int32) are slots of its blocks, `sums` (uint64) what each rank's part of each must have as
    checksum, rank by rank; `parent` is the key before the first block, which is block `place` of its prompt."""

    job: int
    g2: bytes
    keys: list[bytes]
    parent: bytes | None
    place: int
    priorities: bytes
    sums: bytes


class GetRun(msgspec.Struct, frozen=True, tag=True):
    """Read blocks `at` (int32) of the run that ends with the key `end` to slots of host memory (int32); they must be
    those of `keys`."""

    job: int
    end: bytes
    at: bytes
    g2: bytes
    keys: list[bytes]


class NoteSums(msgspec.Struct, frozen=True, tag=True):
    """Blocks came to these slots (int32) of this rank's memory, and have these checksums (uint64); or not."""

    job: int
    g2: bytes
    outcomes: bytes
    sums: bytes
    error: str | None = None


class Touch(msgspec.Struct, frozen=True, tag=True):
    """Requests asked for the runs that end with these keys."""

    ends: list[bytes]


class Leave(msgspec.Struct, frozen=True, tag=True):
    """Nothing more is written to the storage."""


class Tried(msgspec.Struct, frozen=True, tag=True):
    """How that trial ended. `problem` says what is wrong; `off`: for good. `refusal` says why it can only be read."""

    number: int
    problem: str | None = None
    off: bool = False
    refusal: str | None = None


class Known(msgspec.Struct, frozen=True, tag=True):
    """Names of runs that came to the storage, and of those that went: 8 bytes of each. `anew`: what was known before
    counts no more."""

    came: bytes = b""
    went: bytes = b""
    anew: bool = False


class HotRun(msgspec.Struct, frozen=True):
    """Keys of a run, the key before them, and which block of its prompt the first is."""

    keys: list[bytes]
    parent: bytes | None
    place: int


class Hot(msgspec.Struct, frozen=True, tag=True):
    """These were asked for most, the most first, each behind those before it in its prompt."""

    runs: list[HotRun]


class Got(msgspec.Struct, frozen=True, tag=True):
    """A read ended: how, the checksums (uint64) of what came, rank by rank of those that store but the one that read,
    and the highest priority of what came."""

    job: int
    outcomes: bytes
    sums: list[bytes]
    error: str | None = None
    priority: int = 0


class Told(msgspec.Struct, frozen=True, tag=True):
    """What is known of the storage, for `kvbm status`: all objects of KVBM's and their bytes, of all namespaces, when
    they were counted last; the bound; what this engine's collector deleted; threads that wait for a call that does not
    return; runs that are damaged and cannot be deleted."""

    objects: int = 0
    nbytes: int = 0
    bound: int = 0
    deleted: int = 0
    stuck: int = 0
    undeletable: int = 0


Order = AttachArenas | TryStorage | PutRun | GetRun | NoteSums | Touch | Leave
Answer = RankArena | Tried | Known | Hot | Got | Told

_encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(Order).decode
decode_place = msgspec.msgpack.Decoder(RunsPlace).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode


def to_rank(order: Order) -> ToTier:
    """As the channel carries it."""
    return ToTier(TIER, _encode(order))


def to_open(place: RunsPlace) -> Open:
    """As the channel carries it."""
    return Open(TIER, _encode(place))


def to_leader(answer: Answer) -> FromTier:
    """As the channel carries it."""
    return FromTier(TIER, _encode(answer))
