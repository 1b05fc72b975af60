import errno
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from kvbm.abc.transport import Plan, Quiet, Transport
from kvbm.core.errors import Broken, Misuse
from kvbm.core.outcome import Outcome
from kvbm.core.region import OpenFile, Plane, packed
from kvbm.testing.transport import (
    FileMemory,
    FileTransportSuite,
    HostMemory,
    Recorder,
    blocked,
    contents,
    fill,
    plan_of,
    run,
)
from kvbm.transfer import file
from kvbm.transfer.file import FileTransport, operations

ENGINES = ("io_uring", "threads")


class FileSuite(FileTransportSuite):
    """With one engine; a subclass for each."""

    engine = "threads"

    def make_transport(self) -> Transport:
        return FileTransport(1, 8, self.engine)  # type: ignore[arg-type]


class TestReads(FileSuite):
    pass


class TestWrites(FileSuite):
    write = True


class TestReadsWithIoUring(FileSuite):
    engine = "io_uring"


class TestWritesWithIoUring(FileSuite):
    engine = "io_uring"
    write = True


class TestDirectReads(FileSuite):
    row_bytes = (8192, 4096)
    direct = True


class TestDirectWrites(FileSuite):
    row_bytes = (8192, 4096)
    direct = True
    write = True


class TestDirectReadsWithIoUring(TestDirectReads):
    engine = "io_uring"


class TestDirectWritesWithIoUring(TestDirectWrites):
    engine = "io_uring"


ROW = 4096


@pytest.fixture(params=ENGINES)
def transport(request: pytest.FixtureRequest) -> Iterator[FileTransport]:
    transport = FileTransport(2, 4, request.param)
    yield transport
    transport.close()


@pytest.fixture
def memory() -> HostMemory:
    memory = HostMemory([ROW], 16, gap=0, align=ROW)
    fill(memory, 1)
    return memory


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[FileMemory]:
    with FileMemory(tmp_path / "stored", [ROW], 16, gap=0) as stored:
        fill(stored, 2)
        yield stored


def count(plan: Plan) -> int:
    """I/Os that a plan becomes."""
    write = plan.destination.kind == "file"
    slots = (plan.destination_slots, plan.source_slots) if write else (plan.source_slots, plan.destination_slots)
    return len(operations(plan, *slots, write=write).offsets)


@st.composite
def moves(draw: st.DrawFn) -> tuple[list[int], int, int, list[tuple[int, int]], bool]:
    rows = draw(st.lists(st.one_of(st.integers(1, 70), st.integers(4000, 4200)), min_size=1, max_size=4))
    gaps = draw(st.sampled_from([0, 0, 3])), draw(st.sampled_from([0, 0, 7]))
    destinations = draw(st.lists(st.integers(0, 11), unique=True, max_size=12))
    in_order = draw(st.booleans())
    pairs = [
        (d if in_order else draw(st.integers(0, 11)), d) for d in (sorted(destinations) if in_order else destinations)
    ]
    return rows, *gaps, pairs, draw(st.booleans())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves())
def test_any_plan_moves_what_an_oracle_moves(
    tmp_path: Path,
    transport: FileTransport,
    monkeypatch: pytest.MonkeyPatch,
    move: tuple[list[int], int, int, list[tuple[int, int]], bool],
) -> None:
    rows, here_gap, there_gap, pairs, write = move
    monkeypatch.setattr(file, "OPERATION_BYTES", 6000)  # so that rows are cut, and runs of slots are
    monkeypatch.setattr(file, "SEGMENTS", 5)
    here = HostMemory(rows, 12, gap=here_gap)
    with FileMemory(tmp_path / "random", rows, 12, gap=there_gap) as there:
        pair = (here, there) if write else (there, here)
        fill(pair[0], 1)
        fill(pair[1], 2)
        before, expected = contents(pair[0]), contents(pair[1])
        expected |= {d: before[s] for s, d in pairs}
        completion = run(transport, plan_of(pair, [s for s, _ in pairs], [d for _, d in pairs]))
        assert completion.outcomes.tolist() == [Outcome.DONE] * len(pairs)
        assert (completion.error, completion.nbytes) == (None, len(pairs) * sum(rows))
        assert contents(pair[0]) == before
        assert contents(pair[1]) == expected
        assert here.guards_intact()
        assert there.guards_intact()


def test_neighbours_in_the_file_become_one_operation(memory: HostMemory, stored: FileMemory) -> None:
    load, store = (stored, memory), (memory, stored)
    assert count(plan_of(load, range(16), range(16))) == 1
    assert count(plan_of(load, [3, 1, 2, 0], [3, 1, 2, 0])) == 1  # in whatever order they are named
    assert count(plan_of(store, [9, 2, 7], [4, 5, 6])) == 1  # and wherever their memory is
    assert count(plan_of(load, [0, 1, 3, 4, 7], [0, 1, 2, 3, 4])) == 3
    assert count(plan_of(load, [5, 5], [0, 1])) == 2
    scattered = operations(plan_of(store, [9, 2, 3], [4, 5, 6]), np.array([4, 5, 6]), np.array([9, 2, 3]), write=True)
    assert scattered.lengths.tolist() == [3 * ROW]
    assert scattered.first.tolist() == [0, 2]
    assert scattered.segments[1::2].tolist() == [ROW, 2 * ROW]


def test_large_slots_and_long_runs_are_cut() -> None:
    big = packed("G2", 0, [2 << 20], 4), packed("G3", 0, [2 << 20], 4, kind="file", owner=OpenFile(0))
    plan = Plan(big[1], np.arange(4), big[0], np.arange(4), True, "load")
    cut = operations(plan, plan.source_slots, plan.destination_slots, write=False)
    assert cut.lengths.tolist() == [1 << 20] * 8
    tiny = packed("G2", 0, [4096], 600), packed("G3", 0, [4096], 600, kind="file", owner=OpenFile(0))
    plan = Plan(tiny[0], np.arange(600), tiny[1], np.arange(600), True, "store")
    assert operations(plan, np.arange(600), np.arange(600), write=True).lengths.tolist() == [1 << 20] * 2 + [88 * 4096]


def test_several_files_at_once(transport: FileTransport, memory: HostMemory, tmp_path: Path) -> None:
    with ExitStack() as stack:
        files = [stack.enter_context(FileMemory(tmp_path / str(i), [ROW], 16)) for i in range(5)]
        recorders = [Recorder() for _ in files]
        for i, there in enumerate(files):
            transport.submit(plan_of((memory, there), [i, 5], [0, 15], urgent=i % 2 == 0), recorders[i])
        assert [recorder.wait().error for recorder in recorders] == [None] * 5
        assert [there.get(0) for there in files] == [memory.get(i) for i in range(5)]
        assert {there.get(15) for there in files} == {memory.get(5)}


@pytest.mark.parametrize("direct", [False, True])
def test_a_truncated_file_fails_only_the_blocks_it_lacks(
    transport: FileTransport, memory: HostMemory, tmp_path: Path, direct: bool
) -> None:
    flags = os.O_RDWR | (os.O_DIRECT if direct else 0)
    with FileMemory(tmp_path / "short", [ROW], 16, gap=0, flags=flags, name="G3") as short:
        fill(short, 3)
        os.truncate(short.path, 2 * ROW + 100)
        completion = run(transport, plan_of((short, memory), [3, 2, 1, 0, 9], [0, 1, 2, 3, 4]))
        assert completion.outcomes.tolist() == [Outcome.FAILED] * 2 + [Outcome.DONE] * 2 + [Outcome.FAILED]
        assert completion.error == f"reading from file region 'G3': the file is shorter than {4 * ROW} bytes"
        assert completion.nbytes == 2 * ROW
        assert [memory.get(slot) for slot in (2, 3)] == [short.get(1), short.get(0)]
        assert transport.alive()


def test_the_error_and_the_file_are_named(transport: FileTransport, memory: HostMemory, stored: FileMemory) -> None:
    def text(fd: int, *, write: bool) -> str | None:
        region = packed("G3", 0, [ROW], 16, kind="file", owner=OpenFile(fd))
        pair = (memory.region, region) if write else (region, memory.region)
        completion = run(transport, Plan(pair[0], np.arange(4), pair[1], np.arange(4), True, "load"))
        assert completion.outcomes.tolist() == [Outcome.FAILED] * 4
        assert completion.nbytes == 0
        return completion.error

    old = contents(memory)
    readonly, full = os.open(stored.path, os.O_RDONLY), os.open("/dev/full", os.O_RDWR)
    closed = os.dup(readonly)
    os.close(closed)
    there = "file region 'G3'"
    assert text(readonly, write=True) == f"writing to {there}: EBADF, {os.strerror(errno.EBADF)}"
    assert text(full, write=True) == f"writing to {there}: ENOSPC, {os.strerror(errno.ENOSPC)}"
    for number in (closed, -1):
        assert text(number, write=False) == f"reading from {there}: EBADF, {os.strerror(errno.EBADF)}"
    pipe = os.pipe()
    assert text(pipe[0], write=False) == f"reading from {there}: ESPIPE, {os.strerror(errno.ESPIPE)}"
    for fd in (readonly, full, *pipe):
        os.close(fd)
    assert contents(memory) == old
    assert transport.alive()


def test_a_write_that_ends_short_is_not_published(
    transport: FileTransport, memory: HostMemory, stored: FileMemory
) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * ROW + 100, old[1]))
    try:
        completion = run(transport, plan_of((memory, stored), [0, 1, 2, 3], [0, 1, 2, 3]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert completion.error is not None
    assert "EFBIG" in completion.error
    assert set(completion.outcomes[2:].tolist()) == {Outcome.FAILED}
    for slot in np.flatnonzero(completion.outcomes == Outcome.DONE):
        assert stored.get(slot) == memory.get(slot)


def test_a_file_may_be_closed_and_its_number_reused_while_a_plan_waits(
    transport: FileTransport, memory: HostMemory, stored: FileMemory, tmp_path: Path
) -> None:
    pair, other, recorder = (memory, stored), tmp_path / "other", Recorder()
    fd = os.open(stored.path, os.O_RDWR)
    region = replace(stored.region, owner=OpenFile(fd))
    with blocked(transport, pair, threads=2):
        transport.submit(Plan(memory.region, np.array([1]), region, np.array([2]), True, "store"), recorder)
        os.close(fd)
        reused = os.open(other, os.O_RDWR | os.O_CREAT)
        assert reused == fd
    assert recorder.wait().error is None
    assert stored.get(2) == memory.get(1)
    assert other.stat().st_size == 0
    os.close(reused)


def test_descriptors_are_given_back(transport: FileTransport, memory: HostMemory, stored: FileMemory) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        run(transport, plan_of((memory, stored), [0], [0]))
        run(transport, plan_of((memory, stored), [], []))
    recorder = Recorder()
    with blocked(transport, (memory, stored), threads=2):
        transport.cancel(transport.submit(plan_of((memory, stored), [0], [0]), recorder))
    recorder.wait()
    assert len(os.listdir("/proc/self/fd")) == before


def test_direct_io_that_is_not_aligned_is_misuse(transport: FileTransport, tmp_path: Path) -> None:
    flags = os.O_RDWR | os.O_DIRECT
    with (
        FileMemory(tmp_path / "aligned", [ROW], 4, gap=0, flags=flags) as good,
        FileMemory(tmp_path / "gaps", [ROW], 4, gap=8, flags=flags) as gaps,
        FileMemory(tmp_path / "rows", [512], 4, gap=ROW - 512, flags=flags) as rows,
    ):
        aligned = HostMemory([ROW], 4, gap=0, align=ROW)
        odd = replace(aligned.region, planes=(replace(aligned.region.planes[0], address=8),))
        small = HostMemory([512], 4, gap=ROW - 512, align=ROW).region
        assert transport.reaches(good.region, aligned.region)
        for source, destination in (
            (gaps.region, aligned.region),
            (good.region, odd),
            (odd, good.region),
            (rows.region, small),
        ):
            assert not transport.reaches(source, destination)
            with pytest.raises(Misuse, match="not aligned to 4096"):
                transport.submit(Plan(source, np.array([0]), destination, np.array([0]), True, "load"), Recorder())


def test_regions_without_a_file_or_with_impossible_offsets_are_misuse(
    transport: FileTransport, memory: HostMemory, stored: FileMemory
) -> None:
    zero = np.array([0])
    for region, reason in (
        (replace(stored.region, owner=None), "has no fd"),
        (replace(stored.region, owner=OpenFile(1 << 40)), "has no fd"),
        (replace(stored.region, planes=(Plane(-8192, ROW, ROW),)), "no file can have"),
        (replace(stored.region, planes=(Plane((1 << 63) - 1, ROW, ROW),)), "no file can have"),
        (replace(memory.region, kind="cuda"), "does not reach"),
        (memory.region, "does not reach from 'host' to 'host'"),
    ):
        with pytest.raises(Misuse, match=reason):
            transport.submit(Plan(region, zero, memory.region, zero, True, "load"), Recorder())
    assert run(transport, plan_of((stored, memory), [0], [0])).error is None


class Gate:
    """Stands in for the C helper: ends an operation, as if it were done, only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.changed = threading.Condition()
        self.inside = 0
        self.allowed = {True: 0, False: 0}
        """Operations that may end: writes, reads."""
        self.entered: list[bool] = []
        monkeypatch.setattr(file, "run_io", self)

    def __call__(self, fd: int, write: bool, *arrays: np.ndarray) -> int:
        results, control = arrays[3:]
        with self.changed:
            self.inside += 1
            self.entered.append(write)
            self.changed.notify_all()
            while control[0] < len(results) and not control[1]:
                op, control[0] = control[0], control[0] + 1
                assert self.changed.wait_for(lambda: self.allowed[write], 30)
                self.allowed[write] -= 1
                results[op] = ROW
            self.inside -= 1
            self.changed.notify_all()
        return 0

    def allow(self, operations: int, *, write: bool) -> None:
        with self.changed:
            self.allowed[write] += operations
            self.changed.notify_all()

    def wait(self, inside: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.inside == inside, 30)


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Gate, FileTransport]]:
    gate, transport = Gate(monkeypatch), FileTransport(2, 4, "threads")
    yield gate, transport
    gate.allow(1000, write=True)
    gate.allow(1000, write=False)
    transport.close()


def test_a_cancel_does_not_wait_for_a_slow_disk(
    gated: tuple[Gate, FileTransport], memory: HostMemory, stored: FileMemory
) -> None:
    gate, transport = gated
    recorder = Recorder()
    ticket = transport.submit(plan_of((stored, memory), [0, 2, 4], [0, 2, 4], urgent=False), recorder)
    gate.wait(1)
    assert transport.cancel(ticket) is Quiet.UNCERTAIN
    assert recorder.completions == []
    gate.allow(1, write=False)
    completion = recorder.wait()
    assert completion.outcomes.tolist() == [Outcome.DONE, Outcome.FAILED, Outcome.FAILED]
    assert (completion.error, completion.nbytes) == ("cancelled", ROW)
    assert transport.cancel(ticket) is Quiet.QUIESCED


def test_reads_that_are_waited_for_do_not_wait_for_writes(
    gated: tuple[Gate, FileTransport], memory: HostMemory, stored: FileMemory
) -> None:
    gate, transport = gated
    background, more, urgent = Recorder(), Recorder(), Recorder()
    transport.submit(plan_of((memory, stored), [0, 2, 4], [0, 2, 4], urgent=False), background)
    transport.submit(plan_of((memory, stored), [6], [6], urgent=False), more)
    gate.wait(1)  # one thread is left for what is urgent
    transport.submit(plan_of((stored, memory), [1, 3], [1, 3]), urgent)
    gate.wait(2)
    gate.allow(1, write=True)  # the one at hand, whose thread then may help with the reads
    gate.allow(2, write=False)
    assert urgent.wait().error is None
    assert background.completions == []
    gate.allow(3, write=True)
    assert background.wait().error is None
    assert more.wait().error is None
    assert gate.entered[:2] == [True, False]


def test_plans_are_spread_over_threads(
    gated: tuple[Gate, FileTransport], memory: HostMemory, stored: FileMemory
) -> None:
    gate, transport = gated
    recorders = [Recorder(), Recorder()]
    with blocked(transport, (stored, memory), threads=2):
        for recorder in recorders:
            transport.submit(plan_of((stored, memory), [0, 2], [0, 2]), recorder)
    gate.wait(2)
    gate.allow(4, write=False)
    assert [recorder.wait().error for recorder in recorders] == [None, None]
    assert len(gate.entered) >= 2


def test_a_cancel_in_the_middle_says_what_was_moved(
    transport: FileTransport, memory: HostMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = 1 << 20
    big = HostMemory([row], 24, gap=0, align=ROW)
    with FileMemory(tmp_path / "big", [row], 24, gap=0, flags=os.O_RDWR | os.O_DIRECT) as there:
        fill(there, 4)
        for _ in range(5):
            recorder = Recorder()
            ticket = transport.submit(plan_of((there, big), range(24), range(24)), recorder)
            quiet = transport.cancel(ticket)
            before = contents(big) if quiet is Quiet.QUIESCED else None
            completion = recorder.wait()
            assert before in (None, contents(big))
            assert completion.error in (None, "cancelled")
            for slot in np.flatnonzero(completion.outcomes == Outcome.DONE):
                assert big.get(int(slot)) == there.get(int(slot))


def test_eight_threads_submit_reads_and_writes(
    transport: FileTransport, memory: HostMemory, stored: FileMemory
) -> None:
    recorders: list[Recorder] = []

    def submit(mine: int) -> None:
        for i in range(20):
            recorder = Recorder()
            recorders.append(recorder)
            pair, slots = ((memory, stored), [2 * mine]) if i % 2 else ((stored, memory), [2 * mine + 1])
            transport.submit(plan_of(pair, slots, slots, urgent=i % 3 == 0), recorder)

    threads = [threading.Thread(target=submit, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {recorder.wait().error for recorder in recorders} == {None}
    assert len(recorders) == 160
    assert contents(memory) == contents(stored)


def test_a_thread_that_dies_fails_what_is_queued_and_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, memory: HostMemory, stored: FileMemory
) -> None:
    def breaks(*_: object) -> int:
        raise OSError(errno.EBADF, "the ring is gone")

    monkeypatch.setattr(file, "run_io", breaks)
    transport = FileTransport(2, 4, "threads")
    before = len(os.listdir("/proc/self/fd"))
    recorders = [Recorder() for _ in range(4)]
    for recorder in recorders:
        transport.submit(plan_of((stored, memory), [0], [0]), recorder)
    for recorder in recorders:
        completion = recorder.wait()
        assert completion.outcomes.tolist() == [Outcome.FAILED]
        assert "a file thread died" in (completion.error or "")
    assert not transport.alive()
    transport.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_refused_io_uring_is_said_and_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, memory: HostMemory, stored: FileMemory
) -> None:
    def refuse(depth: int) -> None:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(file, "Ring", refuse)
    with pytest.raises(Broken, match="io_uring is refused: a seccomp filter"):
        FileTransport(2, 4, "io_uring")
    transport = FileTransport(2, 4)
    assert transport.engine == "threads"
    assert "without io_uring: a seccomp filter" in caplog.text
    assert run(transport, plan_of((stored, memory), [3], [4])).error is None
    assert memory.get(4) == stored.get(3)
    transport.close()


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="no engine"):
        FileTransport(1, 1, "aio")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="depth of 1"):
        FileTransport(1, 0)
    with pytest.raises(ValueError, match="at least one thread"):
        FileTransport(0, 1, "threads")
