import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import xxhash

from kvbm.abc.transport import Quiet, Transport
from kvbm.core.errors import Misuse
from kvbm.core.outcome import Outcome
from kvbm.core.region import Plane, Region
from kvbm.stores.memory import Arena
from kvbm.testing.transport import HostMemory, Memory, Recorder, TransportSuite, blocked, contents, fill, plan_of, run
from kvbm.transfer import memcpy
from kvbm.transfer.memcpy import MemcpyTransport

ROWS = [256] * 4


class TestMemcpy(TransportSuite):
    def make_transport(self) -> Transport:
        return MemcpyTransport(1)

    def make_regions(self, row_bytes: Sequence[int], slots: int) -> tuple[Memory, Memory]:
        return HostMemory(row_bytes, slots), HostMemory(row_bytes, slots, gap=3)


@pytest.fixture
def pair() -> tuple[Memory, Memory]:
    pair = HostMemory(ROWS, 32), HostMemory(ROWS, 32)
    fill(pair[0], 1)
    return pair


@pytest.fixture
def transport(request: pytest.FixtureRequest) -> Iterator[MemcpyTransport]:
    transport = MemcpyTransport(getattr(request, "param", 2))
    yield transport
    transport.close()


class Gate:
    """Stands in for the C helper: copies block by block, and only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, chunk: int = 1) -> None:
        self.changed = threading.Condition()
        self.inside = self.most = self.allowed = 0
        self.entered: list[int] = []
        self._real = memcpy.copy_rows
        monkeypatch.setattr(memcpy, "copy_rows", self)
        monkeypatch.setattr(memcpy, "CHUNK_BYTES", chunk * sum(ROWS))

    def __call__(self, *arguments: np.ndarray) -> int:
        slots, control = arguments[5], arguments[7]
        with self.changed:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.entered.append(len(slots))
            self.changed.notify_all()
            while control[0] < len(slots) and not control[1]:
                control[0] += 1  # this chunk is begun
                assert self.changed.wait_for(lambda: self.allowed, 30)
                self.allowed -= 1
                self.changed.notify_all()
            self.inside -= 1
            self.changed.notify_all()
        return 0

    def allow(self, chunks: int) -> None:
        with self.changed:
            self.allowed += chunks
            self.changed.notify_all()

    def wait(self, inside: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.inside == inside, 30)


def test_urgent_work_uses_every_thread_and_background_only_one(
    monkeypatch: pytest.MonkeyPatch, transport: MemcpyTransport, pair: tuple[Memory, Memory]
) -> None:
    gate, slots = Gate(monkeypatch), list(range(6))
    first, second = Recorder(), Recorder()
    transport.submit(plan_of(pair, slots, slots, urgent=False), first)
    transport.submit(plan_of(pair, slots, slots, urgent=False), second)
    gate.wait(1)
    gate.allow(12)
    first.wait()
    second.wait()
    assert gate.most == 1
    urgent = Recorder()
    transport.submit(plan_of(pair, slots, slots), urgent)
    gate.wait(2)
    gate.allow(6)
    assert urgent.wait().error is None


@pytest.mark.parametrize("transport", [1], indirect=True)
def test_urgent_work_interrupts_background_work_which_is_resumed(
    monkeypatch: pytest.MonkeyPatch, transport: MemcpyTransport, pair: tuple[Memory, Memory]
) -> None:
    gate = Gate(monkeypatch)
    background, urgent = Recorder(), Recorder()
    transport.submit(plan_of(pair, list(range(6)), list(range(6)), urgent=False), background)
    gate.wait(1)
    transport.submit(plan_of(pair, [7, 8], [7, 8]), urgent)
    gate.allow(3)  # one chunk of the background, then both of the urgent plan
    assert urgent.wait().error is None
    assert background.completions == []
    gate.allow(5)
    completion = background.wait()
    assert completion.outcomes.tolist() == [Outcome.DONE] * 6
    assert gate.entered == [6, 2, 6]


def test_a_cancel_waits_for_the_chunk_at_hand_and_no_longer(
    monkeypatch: pytest.MonkeyPatch, transport: MemcpyTransport, pair: tuple[Memory, Memory]
) -> None:
    entered, quiet, recorder = threading.Event(), list[Quiet](), Recorder()

    def copy_one_chunk(*arguments: np.ndarray) -> int:
        arguments[7][0] += 1
        entered.set()
        while not arguments[7][1]:
            time.sleep(0.001)
        assert quiet == []
        return 0

    monkeypatch.setattr(memcpy, "copy_rows", copy_one_chunk)
    ticket = transport.submit(plan_of(pair, list(range(6)), list(range(6)), urgent=False), recorder)
    assert entered.wait(30)
    quiet.append(transport.cancel(ticket))
    completion = recorder.wait()
    assert quiet == [Quiet.QUIESCED]
    assert completion.error == "cancelled"
    assert completion.outcomes.tolist() == [Outcome.DONE] + [Outcome.FAILED] * 5
    assert completion.nbytes == sum(ROWS)
    assert transport.alive()


def test_background_work_that_was_queued_is_cancelled_untouched(
    transport: MemcpyTransport, pair: tuple[Memory, Memory]
) -> None:
    old, recorder = contents(pair[1]), Recorder()
    with blocked(transport, pair, threads=2):
        ticket = transport.submit(plan_of(pair, [0], [0], urgent=False), recorder)
        assert transport.cancel(ticket) is Quiet.QUIESCED
    completion = recorder.wait()
    assert (completion.outcomes.tolist(), completion.error) == ([Outcome.FAILED], "cancelled")
    assert (completion.nbytes, completion.seconds) == (0, 0.0)
    assert contents(pair[1]) == old


@pytest.mark.parametrize("where", ["copy", "done"])
def test_a_thread_that_dies_fails_what_is_queued_and_later(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    transport: MemcpyTransport,
    pair: tuple[Memory, Memory],
    where: str,
) -> None:
    def breaks(*_: object) -> int:
        raise MemoryError("none left")

    queued = [Recorder() for _ in range(6)]
    with blocked(transport, pair, threads=2):
        if where == "copy":
            monkeypatch.setattr(memcpy, "copy_rows", breaks)
        else:
            transport.submit(plan_of(pair, [], []), breaks)
        for i, recorder in enumerate(queued):
            transport.submit(plan_of(pair, [i], [i], urgent=i % 2 == 0), recorder)
    if where == "copy":
        for recorder in queued:
            completion = recorder.wait()
            assert completion.outcomes.tolist() == [Outcome.FAILED]
            assert completion.error == "a memcpy thread died: MemoryError('none left')"
    for recorder in queued:
        recorder.wait()
    deadline = time.monotonic() + 30
    while transport.alive():  # the other thread may have finished all that was queued before this one has died
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert run(transport, plan_of(pair, [9], [9])).outcomes.tolist() == [Outcome.FAILED]
    transport.close()
    assert "a memcpy thread died" in caplog.text


def test_what_a_thread_that_died_had_begun_does_not_count(
    monkeypatch: pytest.MonkeyPatch, transport: MemcpyTransport, pair: tuple[Memory, Memory]
) -> None:
    """It takes a part, and then copies it."""

    def breaks(*args: Any) -> int:
        args[-2][0] += args[-1]  # the counter
        raise MemoryError("none left")

    monkeypatch.setattr(memcpy, "copy_rows", breaks)
    completion = run(transport, plan_of(pair, [0, 1], [0, 1]))
    assert completion.outcomes.tolist() == [Outcome.FAILED] * 2
    assert completion.error is not None
    transport.close()


def test_real_chunks_of_an_arena_and_an_engine_shaped_cache(transport: MemcpyTransport) -> None:
    rows = [40_000] * 30
    engine, arena = HostMemory(rows, 12), Arena(12 * sum(rows))
    g2 = arena.region(rows, 12)
    random = np.random.default_rng(3)
    there, back = random.permutation(12), random.permutation(12)
    fill(engine, 1)
    before = contents(engine)

    class G2:
        region = g2

    down, up = (engine, G2), (G2, engine)
    stored = run(transport, replace(plan_of(down, list(range(12)), there, urgent=False), sums=True))  # type: ignore[arg-type]
    completion = run(transport, replace(plan_of(up, there, back), sums=True))  # type: ignore[arg-type]
    assert (stored.error, completion.error, completion.nbytes) == (None, None, arena.size)
    for sums in (stored.sums, completion.sums):
        assert sums is not None
        assert sums.tolist() == [xxhash.xxh3_64_intdigest(before[slot]) for slot in range(12)]
    assert completion.seconds > 0
    assert contents(engine) == {int(back[i]): before[i] for i in range(12)}
    assert engine.guards_intact()
    transport.close()
    arena.close()


def test_threads_leave_the_core_their_creator_is_bound_to(pair: tuple[Memory, Memory]) -> None:
    mine = os.sched_getaffinity(0)
    seen: list[set[int]] = []
    os.sched_setaffinity(0, {min(mine)})
    try:
        transport = MemcpyTransport(1)
        transport.submit(plan_of(pair, [], []), lambda _: seen.append(os.sched_getaffinity(0)))
        transport.close()
    finally:
        os.sched_setaffinity(0, mine)
    assert seen[0] == mine


def test_an_affinity_that_cannot_be_set_is_no_reason_to_stop(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, pair: tuple[Memory, Memory]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("not here")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    transport = MemcpyTransport(1)
    assert run(transport, plan_of(pair, [0], [0])).error is None
    transport.close()
    assert "not here" in caplog.text


def test_other_kinds_of_memory_and_no_threads_are_refused(
    transport: MemcpyTransport, pair: tuple[Memory, Memory]
) -> None:
    cuda = Region("G1", "cuda", 32, tuple(Plane(0, 256, 256) for _ in ROWS))
    assert not transport.reaches(cuda, pair[1].region)
    with pytest.raises(Misuse, match="memcpy does not reach"):
        transport.submit(replace(plan_of(pair, [0], [0]), source=cuda), Recorder())
    with pytest.raises(ValueError, match="at least one thread"):
        MemcpyTransport(0)
