"""What moves bytes between two regions: memcpy, CUDA, files, peers. Implementations pass `kvbm.testing.transport`."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvbm.core.outcome import Outcome
from kvbm.core.region import Region, Slots


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Copy slot ``source_slots[i]`` of `source` to slot ``destination_slots[i]`` of `destination`, for every block i.

    Neither the slots nor the memory of a source slot may change before the completion. `urgent` is for what a request
    waits for. `label` ("load" or "store") names the direction for metrics and fault injection. `sums`: checksums are
    wanted, if they cost less here than afterwards. `after` is what has to be done first by who uses the memory, as its
    transport says it (a mark on an engine's stream); None: nothing.
    """

    source: Region
    source_slots: Slots
    destination: Region
    destination_slots: Slots
    urgent: bool
    label: str
    sums: bool = False
    after: object | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """How a plan ended. Nothing touches its memory any more.

    `outcomes` has an `Outcome` per block, in the plan's order; `error` says why some are not `DONE`. `seconds` runs
    from the first byte to the last (time in a queue is not in it); `nbytes` were moved. `sums`, where they were wanted
    and the transport makes some, has the xxh3-64 of each `DONE` block as it was read.
    """

    ticket: int
    outcomes: npt.NDArray[np.uint8]
    error: str | None
    seconds: float
    nbytes: int
    sums: npt.NDArray[np.uint64] | None = None

    @classmethod
    def failed(cls, ticket: int, blocks: int, error: str) -> Completion:
        """Of a plan of this many blocks, none of which was copied."""
        return cls(ticket, np.full(blocks, Outcome.FAILED, dtype=np.uint8), error, 0.0, 0)


class Device(ABC):
    """What an engine's memory lies on where only a driver may touch it; such a region's owner."""

    @abstractmethod
    def mark(self) -> object:
        """What the engine has told the device until now, for `Plan.after`. On the engine's thread. Raises Broken."""

    @abstractmethod
    def pin(self, address: int, nbytes: int, stride: int) -> None:
        """Register host memory, all of it touched, whose slots begin every `stride` bytes, so that the device copies to
        and from it.

        Raises:
            Broken: that is refused. Then nothing of it is registered.
        """

    @abstractmethod
    def unpin(self, address: int) -> None:
        """Take back what `pin` registered from there on, once its transports are closed.

        Raises:
            Broken: the device may still copy, or refuses: the memory has to stay as it is until the process ends.
        """

    @abstractmethod
    def cpus(self) -> frozenset[int]:
        """The processors nearest to it; empty where nothing says so."""

    def note(self, address: int, nbytes: int) -> str | None:
        """What its user has to know when the engine starts, if anything. So much host memory from `address` on is
        pinned and unused, and may be overwritten to find out."""
        return None

    @abstractmethod
    def transports(self) -> Sequence[Transport]:
        """What copies between the device and host memory that is pinned. Raises Broken."""


class Quiet(enum.Enum):
    """What is known about a plan's memory after a cancel."""

    QUIESCED = enum.auto()
    """Nothing reads or writes it any more."""
    UNCERTAIN = enum.auto()
    """It may still be written: not to be reused before the completion comes."""


class Transport(ABC):
    """Moves slots between regions it can reach, asynchronously.

    Threads: every method may be called from any thread, also from inside a `done`, except that `close` may not. No
    method waits for another plan's `done` to return. `done` runs on a thread of the transport, possibly before
    `submit` has returned; it is short, does not raise and does not wait for other plans.
    """

    @abstractmethod
    def reaches(self, source: Region, destination: Region) -> bool:
        """Whether plans from `source` to `destination` can be submitted here. Cheap; does not change while open."""

    @abstractmethod
    def submit(self, plan: Plan, done: Callable[[Completion], None]) -> int:
        """Queue a copy and return its ticket; `done` is called exactly once, also for an empty plan.

        A copy that fails is an outcome. Only `Misuse` is raised (a pair that is not reached, regions whose rows
        differ, slots out of range, a destination twice, a closed transport): then nothing was touched, and `done` is
        not called.
        """

    @abstractmethod
    def cancel(self, ticket: int) -> Quiet:
        """Stop a copy. Blocks that are not begun end `FAILED` with "cancelled"; a short copy that runs is waited for.

        `done` is still called, maybe after this returns. A ticket that is over is `QUIESCED`.
        """

    @abstractmethod
    def alive(self) -> bool:
        """False once a helper thread or process has died or after `close`; plans then end `FAILED`."""

    @abstractmethod
    def close(self) -> None:
        """End what is queued as `FAILED`, wait for what runs and for every `done`, and stop. May be called again."""
