"""What leader and workers say to each other. msgpack, never pickle.

`Step` rides on the engine's own per-step metadata and carries only copies that belong to that step; everything else
goes over the channel (`manager/channel.py`).
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from kvbm.core.region import Slots


class Copy(msgspec.Struct, frozen=True, array_like=True):
    """Blocks between the engine's memory (g1) and host memory (g2); both are int32 arrays of equal length."""

    job: int
    request: str
    g1: bytes
    g2: bytes

    @staticmethod
    def of(job: int, request: str, g1: npt.ArrayLike, g2: npt.ArrayLike) -> Copy:
        return Copy(job, request, np.asarray(g1, np.int32).tobytes(), np.asarray(g2, np.int32).tobytes())

    def g1_slots(self) -> Slots:
        return np.frombuffer(self.g1, np.int32).astype(np.int64)

    def g2_slots(self) -> Slots:
        return np.frombuffer(self.g2, np.int32).astype(np.int64)


class Step(msgspec.Struct, frozen=True):
    """One engine step, the same for every rank."""

    loads: list[Copy] = []
    stores: list[Copy] = []
    fence: list[int] = []
    """Store jobs whose source blocks this step overwrites: wait for them first."""
    finishing: dict[str, list[int]] = {}
    """Finished requests whose blocks the engine keeps until these store jobs ended."""
    idle: bool = False
    """Nothing is computed in this step: waiting a moment for a copy costs nobody anything."""
    sync: bool = False
    """The loads must be complete before this step's forward pass."""


class Hello(msgspec.Struct, frozen=True, tag=True):
    rank: int
    world: int
    fingerprint: str
    slot_bytes: int


class Allot(msgspec.Struct, frozen=True, tag=True):
    """Make the host arena this large."""

    num_slots: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    rank: int


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The arena could not be made."""

    rank: int
    problem: str


class Result(msgspec.Struct, frozen=True, tag=True):
    """A copy ended on one rank. `outcomes` holds one `Outcome` byte per block."""

    job: int
    rank: int
    outcomes: bytes
    nbytes: int
    seconds: float
    error: str | None = None


class Sick(msgspec.Struct, frozen=True, tag=True):
    """A worker can no longer copy."""

    rank: int
    problem: str


class Bye(msgspec.Struct, frozen=True, tag=True):
    """The sender ends in good order."""


Message = Hello | Allot | Ready | Refused | Result | Sick | Bye

encode = msgspec.msgpack.Encoder().encode
decode_message = msgspec.msgpack.Decoder(Message).decode
decode_step = msgspec.msgpack.Decoder(Step).decode
