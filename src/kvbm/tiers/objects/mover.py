"""Runs between the storage and the host memory of all ranks, in the process of one.

Nothing of the storage's client ever touches a slot: a run is copied, with its checksums, into a buffer before it is
written, and out of the client's buffer after it has come. So what a call does that nobody waits for any more hurts
nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvbm.abc.store import Absent, Damaged, ObjectStore
from kvbm.abc.transport import Completion
from kvbm.core.errors import Broken
from kvbm.core.outcome import Outcome
from kvbm.core.region import Region
from kvbm.link.messages import unpack
from kvbm.stores.checksum import Words
from kvbm.stores.objects.blocks import Buffer, address_of, gather, scatter
from kvbm.stores.objects.envelope import PLAIN_AT, Envelope
from kvbm.stores.objects.names import Names
from kvbm.stores.objects.runs import Run, RunFormat
from kvbm.tiers.objects.crew import Crew, Job
from kvbm.tiers.objects.orders import GetRun, PutRun

_GETS: Final = 16
_PUTS: Final = 4
_CHANGED: Final = "blocks in host memory changed"


def lanes(in_flight_bytes: int, run_bytes: int) -> tuple[int, int]:
    """Gets and puts at once, where so much may be on its way."""
    gets = max(1, min(_GETS, in_flight_bytes // run_bytes))
    return gets, max(1, min(_PUTS, gets // 2))


class Library(NamedTuple):
    """How one namespace's runs lie in a store."""

    store: ObjectStore
    envelope: Envelope
    names: Names
    format: RunFormat

    @property
    def most_bytes(self) -> int:
        """Of a run as it is stored."""
        return self.envelope.size(self.format.most_bytes)


class Hands:
    """What one thread has: room for a run as it is stored, and, where it is sealed, for what it says. Made when it is
    first needed."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._whole: Buffer | None = None
        self._plain: Buffer | None = None

    @property
    def whole(self) -> Buffer:
        if self._whole is None:
            self._whole = Buffer(self._library.envelope.size(self._library.format.plain_bytes))
        return self._whole

    @property
    def plain(self) -> Buffer | None:
        if self._plain is None and self._library.envelope.sealed:
            self._plain = Buffer(self._library.format.plain_bytes)
        return self._plain


@dataclass(frozen=True, slots=True)
class RunMoved:
    """How a put or get ended: of each block, its outcome; by rank, in their order, the checksums of what came; the
    highest priority of these blocks."""

    outcomes: npt.NDArray[np.uint8]
    error: str | None = None
    seconds: float = 0.0
    nbytes: int = 0
    sums: Sequence[Words] = field(default_factory=list)
    priority: int = 0

    @classmethod
    def badly(cls, blocks: int, error: str, outcome: Outcome = Outcome.FAILED) -> RunMoved:
        """None of these blocks moved."""
        return cls(np.full(blocks, outcome, np.uint8), error)

    def completion(self, job: int) -> Completion:
        """As ranks report it."""
        return Completion(job, self.outcomes, self.error, self.seconds, self.nbytes)


class Heard(NamedTuple):
    """These hear how a put or a get ended, of a run (its name's digest) that is there now, and of one that was not
    what it has to be; `alone` says whether one is damaged and cannot be replaced. Any thread."""

    put: Callable[[PutRun, RunMoved], None]
    get: Callable[[GetRun, RunMoved], None]
    came: Callable[[bytes], None]
    suspect: Callable[[bytes], None]
    alone: Callable[[bytes], bool]


class Mover:
    """`memories` are the host memories of the ranks that store, in their order; a slot is one extent of a block's
    bytes. So many puts and gets run at once, and each ends within `deadline_s`; `broken` is called where more than
    `most_lost` calls do not return."""

    def __init__(
        self, library: Library, memories: Sequence[Region], heard: Heard, *,
        puts: int, gets: int, deadline_s: float, most_lost: int, broken: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._library, self._memories, self._heard, self._deadline_s = library, memories, heard, deadline_s

        def crew(name: str, size: int) -> Crew[Hands]:
            return Crew(name, size, lambda: Hands(library), most_lost=most_lost, broken=broken)

        self._puts, self._gets = crew("kvbm-g4-put", puts), crew("kvbm-g4-get", gets)

    @property
    def lost(self) -> int:
        """Calls that do not return, and that nobody waits for any more."""
        return self._puts.lost + self._gets.lost

    def put(self, order: PutRun) -> None:
        """Write a run. It ends once, by `Heard.put`."""

        def end(moved: RunMoved) -> None:
            self._heard.put(order, moved)

        self._hand_over(self._puts, order.job, len(order.keys), end, lambda job, hands: self._put(order, job, hands))

    def get(self, order: GetRun) -> None:
        """Read blocks of a run. It ends once, by `Heard.get`."""

        def end(moved: RunMoved) -> None:
            self._heard.get(order, moved)

        self._hand_over(self._gets, order.job, len(order.keys), end, lambda job, hands: self._get(order, job, hands))

    def _hand_over(
        self, crew: Crew[Hands], number: int, blocks: int, end: Callable[[RunMoved], None],
        move: Callable[[Job[Hands], Hands], RunMoved | None],
    ) -> None:  # fmt: skip
        def run(job: Job[Hands], hands: Hands) -> None:
            begun = time.monotonic()
            try:
                moved = move(job, hands)
            except Broken as error:
                moved = RunMoved.badly(blocks, str(error))
            if moved is not None and job.end():
                end(_timed(moved, time.monotonic() - begun))

        def failed(why: str) -> None:
            end(RunMoved.badly(blocks, why))

        crew.do(Job(run, failed, time.monotonic() + self._deadline_s, number))

    def cancel(self, jobs: Collection[int]) -> None:
        """Nobody wants these any more. They end all the same."""
        self._puts.cancel(jobs)
        self._gets.cancel(jobs)

    def expire(self) -> None:
        """End what takes too long."""
        self._puts.expire()
        self._gets.expire()

    def close(self, seconds: float) -> None:
        """Wait so long at most for what is on its way."""
        self._puts.close(seconds / 2)
        self._gets.close(seconds / 2)

    # ------------------------------------------------------------------ on their threads

    def _put(self, order: PutRun, job: Job[Hands], hands: Hands) -> RunMoved | None:
        library, slots = self._library, unpack(order.g2)
        shape, blocks = library.format.shape, len(order.keys)
        digest = library.names.digest(order.keys[-1])
        if self._heard.alone(digest):
            return RunMoved.badly(blocks, "a damaged run is in its place and cannot be deleted", Outcome.MISSING)
        whole, plain = hands.whole, hands.plain
        room = whole.view[PLAIN_AT : PLAIN_AT + library.format.plain_bytes] if plain is None else plain.view
        wanted = np.frombuffer(order.sums, np.uint64).reshape(shape.ranks, blocks)
        data = address_of(room) + library.format.header_bytes
        part = blocks * shape.block_bytes
        wrong = np.zeros(blocks, np.bool_)
        if not job.commit():
            return None
        for at, memory in enumerate(self._memories):
            wrong |= gather(memory, slots, data + at * part) != wanted[at]
        job.release()
        if wrong.any():
            return RunMoved(np.where(wrong, Outcome.CORRUPT, Outcome.FAILED).astype(np.uint8), _CHANGED)
        run = Run(tuple(order.keys), order.parent, order.place, order.priorities, wanted)
        header = library.format.header(run)
        room[: len(header)] = header
        name = library.names.run(digest)
        library.envelope.close(name, whole.view, room)
        library.store.put(name, whole.view)  # where there is one already, it says the same, or is found not to
        self._heard.came(digest)
        return RunMoved(np.full(blocks, Outcome.DONE, np.uint8), nbytes=shape.data_bytes)

    def _get(self, order: GetRun, job: Job[Hands], hands: Hands) -> RunMoved | None:
        library, blocks = self._library, len(order.keys)
        digest = library.names.digest(order.end)
        name = library.names.run(digest)
        try:
            whole = memoryview(library.store.get(name, library.most_bytes)).cast("B")
            plain, run = self._opened(name, whole, hands)
            _same(run, order)
            if not job.commit():
                return None
            outcomes, sums = self._land(order, plain, run)
        except Absent as error:
            return RunMoved.badly(blocks, str(error), Outcome.MISSING)
        except Damaged as error:
            self._heard.suspect(digest)
            return RunMoved.badly(blocks, f"run {name} is damaged: {error}", Outcome.CORRUPT)
        if (bad := int((outcomes == Outcome.CORRUPT).sum())) == 0:
            priority = max(run.priorities[at] for at in unpack(order.at).tolist())
            return RunMoved(outcomes, nbytes=library.format.shape.data_bytes, sums=sums, priority=priority)
        self._heard.suspect(digest)
        return RunMoved(outcomes, f"{bad} blocks of run {name} are damaged", sums=sums)

    def _opened(self, name: str, whole: memoryview, hands: Hands) -> tuple[memoryview, Run]:
        library, room = self._library, hands.plain
        plain = library.envelope.open(name, whole, room.view if room is not None else None)
        return plain, library.format.parse(plain)

    def _land(self, order: GetRun, plain: memoryview, run: Run) -> tuple[npt.NDArray[np.uint8], list[Words]]:
        """Copies what is wanted into its slots, and looks whether it is that."""
        shape, slots, at = self._library.format.shape, unpack(order.g2), unpack(order.at)
        data, part = address_of(plain) + self._library.format.data_at(plain), shape.blocks * shape.block_bytes
        outcomes, sums = np.full(len(slots), Outcome.DONE, np.uint8), list[Words]()
        for rank, memory in enumerate(self._memories):
            came = scatter(data + rank * part, at, memory, slots)
            outcomes[came != run.sums[rank, at]] = Outcome.CORRUPT
            sums.append(came)
        return outcomes, sums


def _same(run: Run, order: GetRun) -> None:
    """Raises Damaged where a run is another one than its name says."""
    at = unpack(order.at)
    if run.keys[-1] != order.end or [run.keys[place] for place in at.tolist()] != order.keys:
        raise Damaged("it is another run")


def _timed(moved: RunMoved, seconds: float) -> RunMoved:
    return replace(moved, seconds=seconds)
