"""What every transport has to pass. Subclass `TransportSuite` in a test file and supply its two `make_` methods."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol, Self

import numpy as np
import numpy.typing as npt
import pytest
import xxhash

from kvbm.abc.transport import Completion, Plan, Quiet, Transport
from kvbm.core.errors import Misuse
from kvbm.core.outcome import Outcome
from kvbm.core.region import OpenFile, Plane, Region

PATIENCE_S: Final = 60.0
GUARD: Final = 0x5A


class Memory(Protocol):
    """A region whose bytes can be reached without the transport under test."""

    @property
    def region(self) -> Region: ...
    def get(self, slot: int) -> bytes:
        """The slot's rows, one after the other."""

    def put(self, slot: int, data: bytes) -> None:
        """Overwrite the slot's rows."""

    def guards_intact(self) -> bool:
        """Whether the bytes between and around the rows are what they were, True where there are none."""


class HostMemory:
    """Host memory for tests: a plane per row size with `gap` guard bytes around each row (an engine's layout)."""

    def __init__(
        self, row_bytes: Sequence[int], slots: int, *, gap: int = 64, name: str = "test", align: int = 1
    ) -> None:
        self._planes = [aligned((slots + 1, gap + rows), align) for rows in row_bytes]
        self._gap = gap
        planes = tuple(
            Plane(int(plane.ctypes.data) + gap, gap + rows, rows)
            for plane, rows in zip(self._planes, row_bytes, strict=True)
        )
        self.region = Region(name, "host", slots, planes, owner=self._planes)

    def get(self, slot: int) -> bytes:
        return b"".join(plane[slot, self._gap :].tobytes() for plane in self._planes)

    def put(self, slot: int, data: bytes) -> None:
        start = 0
        for plane in self._planes:
            rows = plane.shape[1] - self._gap
            plane[slot, self._gap :] = np.frombuffer(data[start : start + rows], dtype=np.uint8)
            start += rows

    def guards_intact(self) -> bool:
        return all((p[:, : self._gap] == GUARD).all() and (p[-1] == GUARD).all() for p in self._planes)


class FileMemory:
    """A file region for tests, laid out as `HostMemory`, in a new file at `path`; a context manager that closes it.

    The suite's own accesses go through the page cache, the region's with `flags` (`O_DIRECT`: rows and `gap` have to be
    multiples of 4096).
    """

    def __init__(
        self,
        path: Path,
        row_bytes: Sequence[int],
        slots: int,
        *,
        gap: int = 64,
        flags: int = os.O_RDWR,
        name: str = "file",
    ) -> None:
        self.path, self._gap = path, gap
        path.write_bytes(bytes([GUARD]) * sum((slots + 1) * (gap + rows) for rows in row_bytes))
        self._file = path.open("r+b", buffering=0)
        self._fd = os.open(path, flags)
        planes, start = [], 0
        for rows in row_bytes:
            planes.append(Plane(start + gap, gap + rows, rows))
            start += (slots + 1) * (gap + rows)
        self.region = Region(name, "file", slots, tuple(planes), OpenFile(self._fd))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        os.close(self._fd)

    def get(self, slot: int) -> bytes:
        fd = self._file.fileno()
        return b"".join(os.pread(fd, p.row_bytes, p.address + slot * p.stride) for p in self.region.planes)

    def put(self, slot: int, data: bytes) -> None:
        start = 0
        for p in self.region.planes:
            os.pwrite(self._file.fileno(), data[start : start + p.row_bytes], p.address + slot * p.stride)
            start += p.row_bytes

    def guards_intact(self) -> bool:
        rest = np.frombuffer(bytearray(self.path.read_bytes()), dtype=np.uint8)
        for plane in self.region.planes:
            for slot in range(self.region.num_slots):
                begin = plane.address + slot * plane.stride
                rest[begin : begin + plane.row_bytes] = GUARD
        return bool((rest == GUARD).all())


class Recorder:
    """A `done` that keeps every call, with the thread it came on, and can block."""

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.completions: list[Completion] = []
        self.threads: list[int] = []
        self._gate = gate
        self._called = threading.Event()

    def __call__(self, completion: Completion) -> None:
        self.threads.append(threading.get_ident())
        self.completions.append(completion)
        self._called.set()
        if self._gate is not None:
            assert self._gate.wait(PATIENCE_S)

    def wait(self) -> Completion:
        """The first completion."""
        assert self._called.wait(PATIENCE_S), "done was not called"
        return self.completions[0]


class TransportSuite:
    """The contract in `kvbm.abc.transport` as tests."""

    row_bytes: Sequence[int] = (4096, 1, 700, 65)
    slots: int = 16
    plans: int = 40
    """That each of several threads submits; fewer where a plan takes long."""

    def make_transport(self) -> Transport:
        """A fresh transport that runs one `done` at a time; the suite closes it."""
        raise NotImplementedError

    def make_regions(self, row_bytes: Sequence[int], slots: int) -> tuple[Memory, Memory]:
        """A source and a destination that it reaches, with these rows; contents are the suite's business.

        `HostMemory` and `FileMemory` are there for it.
        """
        raise NotImplementedError

    def make_unreachable(self) -> Region:
        """A region that it reaches neither as source nor as destination."""
        return Region("nowhere", "nowhere", self.slots, (Plane(0, 1 << 20, sum(self.row_bytes)),))

    @pytest.fixture
    def transport(self) -> Iterator[Transport]:
        with closing(self.make_transport()) as transport:
            yield transport

    @pytest.fixture
    def pair(self) -> tuple[Memory, Memory]:
        source, destination = self.make_regions(self.row_bytes, self.slots)
        fill(source, 1)
        fill(destination, 2)
        return source, destination

    def test_the_named_bytes_land_and_nothing_else_changes(
        self, transport: Transport, pair: tuple[Memory, Memory]
    ) -> None:
        source, destination = pair
        before, old = contents(source), contents(destination)
        plan = plan_of(pair, [3, 0, 15, 7], [5, 15, 0, 2])
        assert transport.reaches(source.region, destination.region)
        recorder = Recorder()
        ticket = transport.submit(plan, recorder)
        completion = recorder.wait()
        assert (completion.ticket, completion.error) == (ticket, None)
        assert completion.outcomes.tolist() == [Outcome.DONE] * 4
        assert completion.nbytes == 4 * source.region.slot_bytes
        assert completion.seconds >= 0
        expected = old | {d: before[s] for s, d in ((3, 5), (0, 15), (15, 0), (7, 2))}
        assert contents(destination) == expected
        assert contents(source) == before
        assert source.guards_intact()
        assert destination.guards_intact()

    def test_checksums_if_it_makes_any_are_those_of_the_blocks(
        self, transport: Transport, pair: tuple[Memory, Memory]
    ) -> None:
        assert run(transport, plan_of(pair, [2], [2])).sums is None
        sums = run(transport, replace(plan_of(pair, [3, 15, 0], [0, 3, 9]), sums=True)).sums
        if sums is not None:
            assert sums.tolist() == [xxhash.xxh3_64_intdigest(pair[0].get(slot)) for slot in (3, 15, 0)]

    def test_one_source_may_feed_two_destinations(self, transport: Transport, pair: tuple[Memory, Memory]) -> None:
        run(transport, plan_of(pair, [4, 4], [1, 9]))
        assert pair[1].get(1) == pair[1].get(9) == pair[0].get(4)

    def test_an_empty_plan_completes(self, transport: Transport, pair: tuple[Memory, Memory]) -> None:
        completion = run(transport, plan_of(pair, [], []))
        assert completion.outcomes.tolist() == []
        assert (completion.error, completion.nbytes) == (None, 0)

    def test_done_comes_once_from_a_thread_of_the_transport(
        self, transport: Transport, pair: tuple[Memory, Memory]
    ) -> None:
        recorders = [Recorder() for _ in range(8)]
        for urgent, recorder in enumerate(recorders):
            transport.submit(plan_of(pair, [1, 2], [3, 4], urgent=urgent % 2 == 0), recorder)
        transport.close()
        assert [len(recorder.completions) for recorder in recorders] == [1] * 8
        assert threading.get_ident() not in {thread for recorder in recorders for thread in recorder.threads}

    def test_many_threads_submit_at_once(self, transport: Transport, pair: tuple[Memory, Memory]) -> None:
        tickets: list[int] = []
        recorders = [[Recorder() for _ in range(self.plans)] for _ in range(4)]

        def submit(mine: int) -> None:
            for i, recorder in enumerate(recorders[mine]):
                slots = list(range(4 * mine, 4 * mine + 4))
                tickets.append(transport.submit(plan_of(pair, slots, slots[::-1], urgent=i % 3 == 0), recorder))

        threads = [threading.Thread(target=submit, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        completions = [recorder.wait() for group in recorders for recorder in group]
        assert len(set(tickets)) == 4 * self.plans
        assert sorted(c.ticket for c in completions) == sorted(tickets)
        assert all((c.outcomes == Outcome.DONE).all() for c in completions)
        assert all(pair[1].get(i ^ 3) == pair[0].get(i) for i in range(16))

    def test_done_may_submit_and_cancel(self, transport: Transport, pair: tuple[Memory, Memory]) -> None:
        second = Recorder()

        def done(first: Completion) -> None:
            assert transport.cancel(first.ticket) is Quiet.QUIESCED
            transport.submit(plan_of(pair, [1], [1]), second)

        transport.submit(plan_of(pair, [0], [0]), done)
        assert second.wait().outcomes.tolist() == [Outcome.DONE]

    def test_a_cancelled_plan_ends_quiet_and_says_what_was_copied(
        self, transport: Transport, pair: tuple[Memory, Memory]
    ) -> None:
        old, new = contents(pair[1]), contents(pair[0])
        with blocked(transport, pair):
            recorder = Recorder()
            ticket = transport.submit(plan_of(pair, list(range(8)), list(range(8))), recorder)
            quiet = transport.cancel(ticket)
            seen = contents(pair[1])
        completion = recorder.wait()
        assert set(completion.outcomes.tolist()) <= {Outcome.DONE, Outcome.FAILED}
        assert (completion.error is None) == bool((completion.outcomes == Outcome.DONE).all())
        assert completion.error in (None, "cancelled")
        for slot, outcome in enumerate(completion.outcomes):
            assert outcome == Outcome.FAILED or contents(pair[1])[slot] == new[slot]
            assert seen[slot] in (old[slot], new[slot])
        assert quiet is Quiet.UNCERTAIN or contents(pair[1]) == seen
        assert transport.cancel(ticket) is Quiet.QUIESCED
        assert transport.cancel(ticket + 1000) is Quiet.QUIESCED

    def test_urgent_plans_overtake(self, transport: Transport, pair: tuple[Memory, Memory]) -> None:
        order: list[str] = []
        recorders = {name: Recorder() for name in ("background", "urgent")}

        def note(name: str) -> Callable[[Completion], None]:
            def done(completion: Completion) -> None:
                order.append(name)
                recorders[name](completion)

            return done

        with blocked(transport, pair):
            transport.submit(plan_of(pair, [0], [0], urgent=False), note("background"))
            transport.submit(plan_of(pair, [1], [1], urgent=True), note("urgent"))
        for recorder in recorders.values():
            recorder.wait()
        assert order == ["urgent", "background"]

    def test_close_ends_everything(self, transport: Transport, pair: tuple[Memory, Memory]) -> None:
        recorders = [Recorder() for _ in range(20)]
        for i, recorder in enumerate(recorders):
            transport.submit(plan_of(pair, [i % 16], [i % 16], urgent=i % 2 == 0), recorder)
        assert transport.alive()
        transport.close()
        assert not transport.alive()
        for recorder in recorders:
            assert len(recorder.completions) == 1
            completion = recorder.completions[0]
            assert (completion.error is None) == (completion.outcomes.tolist() == [Outcome.DONE])
        with pytest.raises(Misuse):
            transport.submit(plan_of(pair, [0], [0]), Recorder())
        transport.close()

    def test_misuse_touches_nothing(self, transport: Transport, pair: tuple[Memory, Memory]) -> None:
        source, destination = pair
        old = contents(destination)
        nowhere, good = self.make_unreachable(), plan_of(pair, [0, 1], [2, 3])
        assert not transport.reaches(source.region, nowhere)
        assert not transport.reaches(nowhere, destination.region)
        (other, _) = self.make_regions([*self.row_bytes, 8], self.slots)
        recorder = Recorder()
        for plan in (
            plan_of(pair, [0, 1], [3, 3]),
            plan_of(pair, [0, 16], [2, 3]),
            plan_of(pair, [0, 1], [2, 16]),
            plan_of(pair, [-1, 1], [2, 3]),
            plan_of(pair, [0, 1], [2, -1]),
            plan_of(pair, [0, 1], [2]),
            replace(good, source_slots=np.array([0.0, 1.0])),
            replace(good, source_slots=np.array([[0], [1]])),
            replace(good, source=other.region),
            replace(good, source=nowhere),
            replace(good, destination=nowhere),
        ):
            with pytest.raises(Misuse):
                transport.submit(plan, recorder)
        run(transport, plan_of(pair, [], []))
        assert recorder.completions == []
        assert contents(destination) == old


class FileTransportSuite(TransportSuite):
    """The contract between host memory and files, one way; `make_transport` is still to be supplied."""

    write = False
    direct = False
    """With `O_DIRECT`: `row_bytes` have to be multiples of 4096."""

    @pytest.fixture(autouse=True)
    def _files(self, tmp_path: Path) -> Iterator[None]:
        with ExitStack() as self._open:
            self._folder = tmp_path
            yield

    def make_regions(self, row_bytes: Sequence[int], slots: int) -> tuple[Memory, Memory]:
        flags, gap = (os.O_RDWR | os.O_DIRECT, 4096) if self.direct else (os.O_RDWR, 5)
        path = self._folder / f"{len(list(self._folder.iterdir()))}"
        there = self._open.enter_context(FileMemory(path, row_bytes, slots, gap=gap, flags=flags))
        here = HostMemory(row_bytes, slots, gap=gap, align=4096)
        return (here, there) if self.write else (there, here)


def aligned(shape: tuple[int, int], align: int) -> npt.NDArray[np.uint8]:
    """An array full of guard bytes whose first byte's address is a multiple of `align`."""
    memory = np.full(shape[0] * shape[1] + align, GUARD, dtype=np.uint8)
    return memory[-int(memory.ctypes.data) % align :][: shape[0] * shape[1]].reshape(shape)


@contextmanager
def closing(transport: Transport) -> Iterator[Transport]:
    try:
        yield transport
    finally:
        transport.close()


@contextmanager
def blocked(transport: Transport, pair: tuple[Memory, Memory], threads: int = 1) -> Iterator[None]:
    """Keep `threads` of the transport's threads inside a `done` (which no other caller may do) until the block ends."""
    gate = threading.Event()
    recorders = [Recorder(gate) for _ in range(threads)]
    try:
        for recorder in recorders:
            transport.submit(plan_of(pair, [], []), recorder)
        for recorder in recorders:
            recorder.wait()
        yield
    finally:
        gate.set()


def plan_of(
    pair: tuple[Memory, Memory], source: Sequence[int], destination: Sequence[int], *, urgent: bool = True
) -> Plan:
    """A plan between a pair's regions. A memory with a method `mark` says what its copies have to wait for."""
    slots: list[npt.NDArray[np.int64]] = [np.array(side, dtype=np.int64) for side in (source, destination)]
    after = next((memory.mark() for memory in pair if hasattr(memory, "mark")), None)
    label = "load" if urgent else "store"
    return Plan(pair[0].region, slots[0], pair[1].region, slots[1], urgent, label, after=after)


def run(transport: Transport, plan: Plan) -> Completion:
    """Submit a plan and wait for its end."""
    recorder = Recorder()
    transport.submit(plan, recorder)
    return recorder.wait()


def fill(memory: Memory, seed: int) -> None:
    """Give every slot contents of its own."""
    random = np.random.default_rng(seed)
    for slot in range(memory.region.num_slots):
        memory.put(slot, random.bytes(memory.region.slot_bytes))


def contents(memory: Memory) -> dict[int, bytes]:
    """Every slot's bytes."""
    return {slot: memory.get(slot) for slot in range(memory.region.num_slots)}
