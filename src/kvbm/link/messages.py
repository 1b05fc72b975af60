"""What leader and workers say to each other. msgpack, never pickle.

`Step` rides on the engine's own per-step metadata and carries only copies that belong to that step; everything else
goes over the channel (`link/channel.py`).
"""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from kvbm.core.region import Slots


def pack(slots: npt.ArrayLike) -> bytes:
    """Slot numbers as messages carry them."""
    return np.asarray(slots, np.int32).tobytes()


def unpack(slots: bytes) -> Slots:
    """The slot numbers of a message."""
    return np.frombuffer(slots, np.int32).astype(np.int64)


class Copy(msgspec.Struct, frozen=True, array_like=True):
    """Blocks between the engine's memory (g1) and host memory (g2); both are int32 arrays of equal length."""

    job: int
    request: str
    g1: bytes
    g2: bytes

    @staticmethod
    def of(job: int, request: str, g1: npt.ArrayLike, g2: npt.ArrayLike) -> Copy:
        return Copy(job, request, pack(g1), pack(g2))

    def g1_slots(self) -> Slots:
        return unpack(self.g1)

    def g2_slots(self) -> Slots:
        return unpack(self.g2)


class Compare(msgspec.Struct, frozen=True, array_like=True):
    """Blocks that the engine has computed (g1) and what is stored of them (stored, in host memory): are they the same?
    `scratch` are slots of host memory to copy the former to. int32 arrays of equal length."""

    job: int
    request: str
    g1: bytes
    scratch: bytes
    stored: bytes

    def g1_slots(self) -> Slots:
        return unpack(self.g1)


class Adapter(msgspec.Struct, frozen=True, array_like=True):
    """An adapter of a request: the number that the engine's workers hold it under, its name for people, and what the
    engine itself loads it by."""

    number: int
    name: str
    request: bytes


class Expected(msgspec.Struct, frozen=True, array_like=True):
    """The adapter that a worker must hold for a load, and its digest."""

    adapter: Adapter
    digest: bytes


class Adapters(msgspec.Struct, frozen=True):
    """What a step has to do with adapters."""

    step: int
    used: list[int] = []
    """Numbers of those that it computes with, in order. Each rank answers with `Used`."""
    loads: dict[int, Expected] = {}
    """Of the step's loads, by job."""
    awaited: list[tuple[int, bytes]] = []
    """Number and digest of those whose blocks were loaded by requests that were not computed since, or are."""
    needed: list[int] = []
    """Numbers that living requests are computed with, or will be."""
    scheduled: list[int] = []
    """Numbers that this step computes with, whether or not anything is stored of them."""


class Step(msgspec.Struct, frozen=True):
    """One engine step, the same for every rank."""

    loads: list[Copy] = []
    stores: list[Copy] = []
    fence: list[int] = []
    """Store jobs whose source blocks this step overwrites: wait for them first."""
    idle: bool = False
    """Nothing is computed in this step: waiting a moment for a copy costs nobody anything."""
    waiting: bool = False
    """A request waits for blocks that come from elsewhere: an idle step waits a moment."""
    sync: bool = False
    """The loads must be complete before this step's forward pass."""
    compares: list[Compare] = []
    """What this step's forward pass computed although it is stored, to be compared."""
    adapters: Adapters | None = None


class Hello(msgspec.Struct, frozen=True, tag=True):
    rank: int
    world: int
    fingerprint: str
    slot_bytes: int
    facts: dict[str, str] = {}
    """Of the namespace, what only this rank knows: its layers, their bytes."""
    began: int = 0
    """When nothing of this rank's weights had been read yet, in nanoseconds since 1970; 0: unknown."""


class Allot(msgspec.Struct, frozen=True, tag=True):
    """Make the host arena this large. A rank that stores nothing itself gets the file of the arena with it."""

    num_slots: int
    shared: bool = False
    """Answer with the file of the arena: other ranks load from it."""
    stride: int = 0
    """Bytes from one block to the next, where a tier wants more than a block has. 0: what a block has."""
    sums: Literal["", "made", "told"] = ""
    """Whether a tier wants checksums of what leaves the engine: on the rank, or beside the scheduler, too."""
    hurry: bool = False
    """Touching it takes its share of the processors from the beginning: a tier waits for its end."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The arena is there, and so is the memory of its first `slots` slots. Where others are missing, `Touched` says
    when they can be used."""

    rank: int
    slots: int


class Touched(msgspec.Struct, frozen=True, tag=True):
    """The memory of the first `slots` slots is there; `problem` says why there will be no more."""

    rank: int
    slots: int
    problem: str | None = None


class Hurry(msgspec.Struct, frozen=True, tag=True):
    """What there is of G2 is full: its memory is not to wait any longer until nobody else wants the processor."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The arena could not be made. `ends`: the engine is not to run without it either."""

    rank: int
    problem: str
    ends: bool = False


class Open(msgspec.Struct, frozen=True, tag=True):
    """Open this rank's part of a tier: it is known now where that is. `body` is the tier's own."""

    tier: str
    body: bytes


class Opened(msgspec.Struct, frozen=True, tag=True):
    """The answer; `problem` says why it is not open."""

    rank: int
    tier: str
    problem: str | None = None


class ToTier(msgspec.Struct, frozen=True, tag=True):
    """What a tier wants of its part on a rank, in words of its own (`tiers/*/orders.py`). A read or write that it
    begins is answered with `Result` and may be ended with `Cancel`."""

    tier: str
    body: bytes


class FromTier(msgspec.Struct, frozen=True, tag=True):
    """What a tier's part on a rank has to say, in words of the tier's own."""

    tier: str
    body: bytes


class Result(msgspec.Struct, frozen=True, tag=True):
    """A copy ended on one rank. `outcomes` holds one `Outcome` byte per block."""

    job: int
    rank: int
    outcomes: bytes
    nbytes: int
    seconds: float
    error: str | None = None
    sums: bytes = b""
    """Where instances share blocks: the checksum of each block as it is in host memory now (uint64)."""
    errors: bytes = b""
    """Of a comparison: how far the two are apart, per block (float32, see `worker/compare.py`)."""


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Nobody wants these reads or writes any more. Each is still answered."""

    jobs: list[int]


class GiveUp(msgspec.Struct, frozen=True, tag=True):
    """Nobody waits for these copies of the engine's blocks any longer: none of them begins any more, and nothing counts
    of those that have. Each is still answered."""

    jobs: list[int]


class Foresee(msgspec.Struct, frozen=True, tag=True):
    """Which digest would this adapter have, once the engine holds it? If it holds one under this number, of that."""

    question: int
    adapter: Adapter


class Foreseen(msgspec.Struct, frozen=True, tag=True):
    """The answer to the question of this number; no digest where it cannot be known."""

    question: int
    digest: bytes = b""


class Used(msgspec.Struct, frozen=True, tag=True):
    """What a rank held under each of the numbers `Adapters.used` while it computed this step."""

    rank: int
    step: int
    digests: list[bytes]


class Unlike(msgspec.Struct, frozen=True, tag=True):
    """A load of this request fails, because the rank holds an adapter of another digest, or none."""

    rank: int
    request: str
    digest: bytes


class Sick(msgspec.Struct, frozen=True, tag=True):
    """A worker can no longer copy: what the engine has, or, where a tier is named, to and from that one."""

    rank: int
    problem: str
    tier: str = ""


class Bye(msgspec.Struct, frozen=True, tag=True):
    """The sender ends in good order."""


Message = (
    Hello
    | Allot
    | Ready
    | Touched
    | Hurry
    | Refused
    | Open
    | Opened
    | ToTier
    | FromTier
    | Result
    | Cancel
    | GiveUp
    | Foresee
    | Foreseen
    | Used
    | Unlike
    | Sick
    | Bye
)

encode = msgspec.msgpack.Encoder().encode
decode_message = msgspec.msgpack.Decoder(Message).decode
decode_step = msgspec.msgpack.Decoder(Step).decode
