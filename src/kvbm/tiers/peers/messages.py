"""What instances say to each other, over an authenticated `session`. msgpack, never pickle."""

from __future__ import annotations

import msgspec

PROTOCOL = 1
"""Changes when one of these does. Others are refused."""


class Slab(msgspec.Struct, frozen=True):
    """One rank's host memory: what NIXL needs in order to reach it, and where its slots are."""

    metadata: bytes
    address: int
    stride: int
    slots: int


class Join(msgspec.Struct, frozen=True, tag=True):
    """An instance that wants to read. `namespace` is the fingerprint of what it runs, `version` that of KVBM."""

    name: str
    incarnation: int
    namespace: str
    version: str


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """It may. The name of the instance that answers."""

    name: str
    incarnation: int


class Declined(msgspec.Struct, frozen=True, tag="Refused"):
    """It may not, and why."""

    reason: str


class Reserve(msgspec.Struct, frozen=True, tag=True):
    """Hold the longest prefix of `keys`, blocks `start` and following of a prompt, that is there. If none is, wait so
    many seconds for those that are on their way; with `expected` also for those that a request computes or is about to.
    `search` is the same for all that is asked for one request."""

    id: int
    search: int
    keys: list[bytes]
    start: int
    wait_s: float
    expected: bool = False


class Promise(msgspec.Struct, frozen=True, tag=True):
    """The first blocks of what was asked for are held in these slots (int32) for `seconds`, under the number `lease`
    (0: none are). `sums` has per rank the checksum of each block, made one with its key (uint64). `priorities` (uint8)
    and `ttls` (float64, seconds) are the blocks' own. `coming` says that the next one is on its way. `memory` numbers
    what `Describe` answers."""

    id: int
    lease: int
    slots: bytes
    sums: list[bytes]
    priorities: bytes
    ttls: bytes
    seconds: float
    coming: bool
    memory: int

    @property
    def count(self) -> int:
        """Blocks that are held."""
        return len(self.slots) // 4


class Release(msgspec.Struct, frozen=True, tag=True):
    """A lease is not needed any more."""

    lease: int


class Done(msgspec.Struct, frozen=True, tag=True):
    """Nothing more is asked for this search."""

    search: int


class Describe(msgspec.Struct, frozen=True, tag=True):
    """Say where your memory is."""

    id: int


class Memory(msgspec.Struct, frozen=True, tag=True):
    """Each rank's memory, as of `number`."""

    id: int
    number: int
    slabs: list[Slab]


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Are you there?"""

    id: int


class Pong(msgspec.Struct, frozen=True, tag=True):
    """Yes."""

    id: int


Said = Join | Welcome | Declined | Reserve | Promise | Release | Done | Describe | Memory | Ping | Pong

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Said).decode
