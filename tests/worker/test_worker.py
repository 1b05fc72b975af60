"""Memory and copies of one rank, with real copies; the test plays the leader over the socket, and the engine."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbm.abc.transport import Completion, Plan, Quiet
from kvbm.core.config import Settings
from kvbm.core.errors import Broken
from kvbm.core.outcome import Outcome
from kvbm.link.channel import Link, listen
from kvbm.link.messages import Allot, Bye, Copy, GiveUp, Hello, Message, Ready, Refused, Result, Sick, Step, Touched
from kvbm.stores import memory
from kvbm.testing.faults import FaultTransport
from kvbm.testing.transport import HostMemory
from kvbm.tiers.peers.orders import Shared
from kvbm.tiers.peers.rank import PeerMemory, PeerRank
from kvbm.tiers.tier import RankSide
from kvbm.transfer.executor import Executor
from kvbm.transfer.memcpy import MemcpyTransport
from kvbm.worker.worker import Collected, MakeTier, Worker
from tests.link.orders import off_channel

ROWS = (4096, 4096, 640)
SLOTS = 8
FOREVER = 1e6
PATIENCE = 30.0


class Rank:
    """A worker over numpy memory, and its leader's end of the channel."""

    def __init__(
        self, run_dir: Path, faults: dict[str, float], tiers: Mapping[str, MakeTier] | None = None, **settings: float
    ) -> None:
        self.g1 = HostMemory(ROWS, SLOTS, name="g1")
        random = np.random.default_rng(1)
        for slot in range(SLOTS):
            self.g1.put(slot, random.bytes(sum(ROWS)))
        self.before = self.contents()
        path = run_dir / "e.chan"
        with listen(path) as sock:
            self.worker = Worker(
                Settings(**settings),
                self.g1.region,
                Hello(3, 4, "f", sum(ROWS)),
                path,
                Executor([FaultTransport(MemcpyTransport(2), **faults)]),
                tiers,
            )
            sock.settimeout(PATIENCE)
            self.link = Link(sock.accept()[0])

    def hear(self) -> Message:
        message = self.link.wait(PATIENCE)
        assert message is not None
        return message

    def result(self) -> Result:
        message = self.hear()
        assert isinstance(message, Result)
        return message

    def contents(self) -> dict[int, bytes]:
        return {slot: self.g1.get(slot) for slot in range(SLOTS)}

    def g2(self, slot: int) -> bytes:
        region = self.worker.memory.g2
        assert region is not None
        return ctypes.string_at(region.planes[0].address + slot * region.slot_bytes, region.slot_bytes)

    def step(self, step: Step) -> set[int]:
        """One engine step; returns the engine's bad blocks."""
        self.worker.before_step(step)
        self.worker.before_forward(step)
        self.worker.after_forward(step)
        return self.worker.take_bad_blocks()

    def collect(self) -> Collected:
        """What ended, once something has."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            out = self.worker.collect(idle=True)
            if out.loaded:
                return out
        raise AssertionError("nothing ended")

    def store(self, job: int, g1: Sequence[int], g2: Sequence[int]) -> None:
        """Puts blocks into G2."""
        self.step(Step(stores=[Copy.of(job, "before", g1, g2)]))
        assert self.result().outcomes == bytes(len(g1))

    def close(self) -> None:
        self.worker.close()
        self.link.close()
        assert self.g1.guards_intact()


@pytest.fixture
def make_rank(tmp_path: Path) -> Iterator[Callable[..., Rank]]:
    ranks: list[Rank] = []

    def make(faults: dict[str, float] | None = None, *, allot: int = SLOTS, **settings: float) -> Rank:
        ranks.append(rank := Rank(tmp_path, faults or {}, **settings))
        assert rank.hear() == Hello(3, 4, "f", sum(ROWS))
        if allot:
            rank.link.send(Allot(allot))
            assert rank.hear() == Ready(3, allot)
        return rank

    yield make
    for rank in ranks:
        rank.close()


Make = Callable[..., Rank]

# ---------------------------------------------------------------------- the arena


def test_an_arena_that_cannot_be_had(make_rank: Make) -> None:
    rank = make_rank(allot=0)
    rank.link.send(Allot(1 << 40))
    refused = rank.hear()
    assert isinstance(refused, Refused)
    assert refused.rank == 3
    assert refused.problem
    rank.link.send(Allot(2))
    assert rank.hear() == Ready(3, 2)


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that are touched in one go: of four blocks, but for a bit of the last."""
    monkeypatch.setattr(memory, "SLICE_BYTES", 4 * sum(ROWS) - 1)
    monkeypatch.setattr(memory, "_LOOK_S", 0.01)
    return 4 * sum(ROWS) - 1


def test_slots_can_be_used_as_they_are_touched(make_rank: Make, slices: int) -> None:
    rank = make_rank(allot=0)
    rank.link.send(Allot(SLOTS))
    assert rank.hear() == Ready(3, 3)
    rank.store(1, [0, 1, 2], [0, 1, 2])
    heard = [rank.hear()]
    while heard[-1] != Touched(3, SLOTS):
        assert isinstance(heard[-1], Touched)
        assert heard[-1].problem is None
        heard.append(rank.hear())
    rank.store(2, [6, 7], [6, 7])
    assert rank.g2(7) == rank.before[7]


def test_with_strict_all_is_touched_at_once(make_rank: Make, slices: int) -> None:
    assert make_rank(strict=True).link.wait(0.1) is None


def test_memory_that_ends_on_the_way(make_rank: Make, slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter([1 << 40, 0])
    monkeypatch.setattr(memory, "available_memory", lambda: next(left))
    rank = make_rank(allot=0)
    rank.link.send(Allot(SLOTS))
    assert rank.hear() == Ready(3, 3)
    said = rank.hear()
    assert isinstance(said, Touched)
    assert (said.slots, "are still to be allocated" in str(said.problem)) == (3, True)
    rank.store(1, [0, 1, 2], [0, 1, 2])


@pytest.mark.parametrize(("available", "slots"), [(1 << 40, SLOTS), (0, 3)])
def test_others_read_it_once_all_is_touched(
    make_rank: Make, slices: int, monkeypatch: pytest.MonkeyPatch, available: int, slots: int
) -> None:
    """Or as much as there will be: to register memory may allocate it."""
    left, opened = iter([1 << 40]), list[int]()
    monkeypatch.setattr(memory, "available_memory", lambda: next(left, available))

    def open_memory(side: RankSide) -> PeerMemory:
        opened.append(side.memory("G2 for peers").num_slots)
        raise Broken("no NIXL")

    rank = make_rank(allot=0, tiers={"peers": lambda side: PeerRank(side, open_memory)})
    rank.link.send(Allot(SLOTS))
    heard = [off_channel(rank.hear())]
    while not isinstance(heard[-1], Shared):
        heard.append(off_channel(rank.hear()))
    assert heard[0] == Ready(3, 3)
    assert isinstance(heard[-2], Touched)
    assert (heard[-2].slots, heard[-1], opened) == (slots, Shared(3, problem="no NIXL"), [slots])


def test_memory_that_is_not_there_at_the_start(make_rank: Make, slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 2 * slices - 10)
    rank = make_rank(allot=0)
    rank.link.send(Allot(SLOTS))
    assert isinstance(rank.hear(), Refused)


def test_the_end_does_not_wait_for_what_is_touched(
    make_rank: Make, slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_LOOK_S", 3600.0)
    rank = make_rank(allot=0)
    rank.link.send(Allot(64))
    assert rank.hear() == Ready(3, 3)
    begun = time.monotonic()
    rank.worker.close()
    assert time.monotonic() - begun < 1


def test_a_leader_that_never_comes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(
        Settings(init_timeout_s=0.05),
        HostMemory(ROWS, SLOTS).region,
        Hello(0, 1, "f", sum(ROWS)),
        tmp_path / "e.chan",
        Executor([MemcpyTransport(1)]),
    )
    worker.outlast_leader(PATIENCE)
    worker.close()
    assert "rank 0 lost its leader" in caplog.text


def test_a_leader_that_goes_does_not_stop_the_engine(make_rank: Make, caplog: pytest.LogCaptureFixture) -> None:
    rank = make_rank()
    rank.link.close()
    rank.worker.outlast_leader(PATIENCE)
    rank.step(Step(stores=[Copy.of(1, "a", [0], [0])]))
    rank.step(Step(fence=[1]))
    assert rank.g2(0) == rank.before[0]


def test_goodbye(make_rank: Make) -> None:
    rank = make_rank()
    rank.link.send(Ready(0, 1))
    rank.link.send(Bye())
    begun = time.monotonic()
    rank.worker.outlast_leader(PATIENCE)
    assert time.monotonic() - begun < PATIENCE
    rank.worker.close()
    assert rank.hear() == Bye()


# ---------------------------------------------------------------------- bytes


def test_stores_and_loads_move_exactly_the_named_blocks(make_rank: Make) -> None:
    rank = make_rank()
    rank.step(Step(stores=[Copy.of(1, "a", [6, 0, 3], [2, 7, 5])]))
    result = rank.result()
    assert (result.job, result.rank, result.outcomes, result.error) == (1, 3, bytes(3), None)
    assert result.nbytes == 3 * sum(ROWS)
    empty = bytes(sum(ROWS))
    expected = [empty, empty, rank.before[6], empty, empty, rank.before[3], empty, rank.before[0]]
    assert [rank.g2(slot) for slot in range(SLOTS)] == expected
    assert rank.contents() == rank.before
    assert rank.step(Step(loads=[Copy.of(2, "b", [4, 1], [5, 2])])) == set()
    assert rank.result().outcomes == bytes(2)
    assert rank.contents() == rank.before | {4: rank.before[3], 1: rank.before[6]}


def test_a_step_without_copies_says_nothing(make_rank: Make) -> None:
    rank = make_rank()
    assert rank.step(Step()) == set()
    assert rank.worker.collect(idle=True) == Collected()
    assert rank.link.take() == []


# ---------------------------------------------------------------------- fences


def test_a_step_waits_for_the_copies_that_read_what_it_overwrites(make_rank: Make) -> None:
    rank = make_rank({"store_delay": 0.2}, fence_ms=1e3 * PATIENCE)
    rank.step(Step(stores=[Copy.of(1, "a", [0], [0])]))
    rank.worker.before_step(Step(fence=[1, 77]))
    rank.g1.put(0, bytes(sum(ROWS)))
    assert rank.g2(0) == rank.before[0]
    assert [message.job for message in rank.link.take() if isinstance(message, Result)] == [1]


def test_a_copy_that_does_not_end_is_given_up_in_milliseconds(
    make_rank: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Before its block is overwritten."""
    rank = make_rank({"store_delay": FOREVER})
    rank.step(Step(stores=[Copy.of(1, "a", [0], [0])]))
    begun = time.monotonic()
    rank.worker.before_step(Step(fence=[1]))
    assert 0.005 < time.monotonic() - begun < 1  # the deadline is 30 s
    assert rank.result().outcomes == bytes([Outcome.FAILED])
    assert rank.g2(0) == bytes(sum(ROWS))
    assert not caplog.records  # nothing is wrong


class Stubborn(MemcpyTransport):
    """Cannot say that a cancelled copy is quiet: it goes on, `go` ends it, and all of it has been copied then."""

    def __init__(self) -> None:
        super().__init__(2)
        self.held: list[Callable[[], None]] = []
        self.cancels = 0

    def submit(self, plan: Plan, done: Callable[[Completion], None]) -> int:
        return super().submit(plan, lambda completion: self.held.append(lambda: done(completion)))

    def cancel(self, ticket: int) -> Quiet:
        self.cancels += 1
        return Quiet.UNCERTAIN

    def go(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.held and time.monotonic() < deadline:
            time.sleep(0.001)
        self.held.pop()()


def _instead(rank: Rank, transport: Stubborn) -> Stubborn:
    rank.worker.copying.executor._transports[0].close()
    rank.worker.copying.executor._transports = (transport,)
    return transport


def test_a_copy_that_may_go_on_reading_is_condemned(make_rank: Make, caplog: pytest.LogCaptureFixture) -> None:
    """It says in the end that all is well. Its source was overwritten meanwhile."""
    rank = make_rank()
    transport = _instead(rank, Stubborn())
    rank.step(Step(stores=[Copy.of(1, "a", [0, 1], [0, 1])]))
    rank.worker.before_step(Step(fence=[1]))
    assert transport.cancels >= 1
    assert "gave up copies [1], which may still run" in caplog.text
    assert rank.link.take() == []  # its host memory may still be written
    transport.go()
    result = rank.result()
    assert result.outcomes == bytes([Outcome.FAILED] * 2)
    assert result.error == "its source may have been overwritten while it ran"
    rank.step(Step(stores=[Copy.of(2, "a", [0], [0])]))  # nothing is held against the next one
    transport.go()
    assert rank.result().outcomes == bytes(1)


class Halved(Stubborn):
    """Has copied the first block of a plan when it is cancelled, and is quiet then."""

    def submit(self, plan: Plan, done: Callable[[Completion], None]) -> int:
        def ended(completion: Completion) -> None:
            done(
                Completion(completion.ticket, np.asarray([Outcome.DONE, Outcome.FAILED], np.uint8), "cancelled", 0.1, 9)
            )

        return super().submit(plan, ended)

    def cancel(self, ticket: int) -> Quiet:
        self.go()
        return Quiet.QUIESCED


def test_what_had_been_copied_when_a_step_needed_the_rest_counts(make_rank: Make) -> None:
    rank = make_rank()
    _instead(rank, Halved())
    rank.step(Step(stores=[Copy.of(1, "a", [0, 1], [0, 1])]))
    rank.worker.before_step(Step(fence=[1]))
    assert rank.result().outcomes == bytes([Outcome.DONE, Outcome.FAILED])


@pytest.mark.parametrize("sync", [True, False])
def test_a_late_load_is_not_reported_while_it_may_write(make_rank: Make, sync: bool) -> None:
    rank = make_rank(load_deadline_s=0.05)
    transport = _instead(rank, Stubborn())
    step = Step(loads=[Copy.of(1, "a", [0], [0])], sync=sync)
    if sync:
        over = threading.Thread(target=rank.step, args=(step,))
        over.start()
        over.join(0.3)
        assert over.is_alive()  # it computes nothing on what may still be written
        assert transport.cancels > 1
    else:
        rank.step(step)
        time.sleep(0.1)
        for _ in range(2):
            rank.worker.before_step(Step())
            assert rank.worker.collect(idle=False) == Collected()
        assert transport.cancels == 1
    assert rank.link.take() == []
    transport.go()
    if sync:
        over.join(PATIENCE)
        assert rank.worker.take_bad_blocks() == set()
    else:
        assert rank.collect() == Collected(loaded={"a"})
    assert rank.result().outcomes == bytes(1)


def test_copies_past_their_deadline_end(make_rank: Make) -> None:
    rank = make_rank({"delay": FOREVER}, store_deadline_s=1e-6, load_deadline_s=1e-6)
    rank.step(Step(stores=[Copy.of(1, "a", [0], [0])], loads=[Copy.of(2, "b", [1], [1])]))
    rank.worker.before_step(Step())
    assert {(result.job, result.error) for result in (rank.result(), rank.result())} == {
        (1, "deadline"),
        (2, "deadline"),
    }
    assert rank.collect() == Collected(loaded={"b"}, failed={"b"})
    assert rank.contents() == rank.before


def test_copies_past_their_deadline_end_also_while_the_engine_sleeps(make_rank: Make) -> None:
    rank = make_rank({"store_delay": FOREVER}, store_deadline_s=1e-6)
    rank.step(Step(stores=[Copy.of(1, "a", [0], [0])]))
    assert rank.result().error == "deadline"


# ---------------------------------------------------------------------- given up


def test_copies_that_have_begun_are_given_up(make_rank: Make) -> None:
    rank = make_rank({"delay": FOREVER}, store_deadline_s=1000.0, load_deadline_s=1000.0)
    rank.step(Step(stores=[Copy.of(1, "a", [0], [0])], loads=[Copy.of(2, "b", [1], [1])]))
    rank.link.send(GiveUp([1, 2]))
    results = [rank.result(), rank.result()]
    assert {result.job for result in results} == {1, 2}
    assert all(result.outcomes == bytes([Outcome.FAILED]) for result in results)
    assert rank.collect() == Collected(loaded={"b"}, failed={"b"})
    assert rank.contents() == rank.before


@pytest.mark.parametrize("is_load", [False, True])
def test_a_copy_that_cannot_be_stopped_does_not_count(make_rank: Make, is_load: bool) -> None:
    """It ends well, later."""
    rank = make_rank()
    transport = _instead(rank, Stubborn())
    copies = [Copy.of(1, "a", [0], [0])]
    rank.step(Step(loads=copies) if is_load else Step(stores=copies))
    rank.link.send(GiveUp([1]))
    deadline = time.monotonic() + PATIENCE
    while not transport.cancels:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert rank.link.take() == [], "its memory is not free before"
    transport.go()
    result = rank.result()
    assert (result.outcomes, result.error) == (bytes([Outcome.FAILED]), "it was given up at a reset")
    if is_load:
        assert rank.collect().failed == {"a"}
    assert not rank.worker.copying.fence.condemned(1)


@pytest.mark.parametrize("sync", [False, True])
def test_copies_that_were_given_up_never_begin(make_rank: Make, monkeypatch: pytest.MonkeyPatch, sync: bool) -> None:
    """Their step is sent, and the forward pass of the one before takes its time."""
    rank = make_rank()
    step = Step(stores=[Copy.of(1, "a", [0], [0])], loads=[Copy.of(2, "b", [1], [1])], sync=sync)
    rank.link.send(GiveUp([1, 2]))
    results = [rank.result(), rank.result()]
    assert {result.job for result in results} == {1, 2}
    assert {result.outcomes for result in results} == {b""}, "which counts as failed"
    monkeypatch.setattr(rank.worker.copying.executor, "submit", lambda *_: pytest.fail("it began"))
    assert rank.step(step) == ({1} if sync else set())
    if not sync:
        assert rank.collect() == Collected(loaded={"b"}, failed={"b"})
    assert all(result.outcomes == bytes([Outcome.FAILED]) for result in (rank.result(), rank.result()))
    assert rank.contents() == rank.before
    assert rank.g2(0) == bytes(sum(ROWS))


def test_a_copy_that_is_given_up_while_it_is_submitted(make_rank: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = make_rank({"store_delay": FOREVER})
    submit = rank.worker.copying.executor.submit

    def late(job: int, *args: Any) -> None:
        rank.worker.copying.give_up([job])
        submit(job, *args)

    monkeypatch.setattr(rank.worker.copying.executor, "submit", late)
    rank.step(Step(stores=[Copy.of(1, "a", [0], [0])]))
    assert rank.result().error == "it was given up at a reset"


# ---------------------------------------------------------------------- asynchronous loads


def test_asynchronous_loads_are_collected_once(make_rank: Make) -> None:
    rank = make_rank()
    rank.store(1, [0, 1], [0, 1])
    rank.step(Step(loads=[Copy.of(2, "a", [2], [0]), Copy.of(3, "b", [3], [1])], idle=True))
    loaded: set[str] = set()
    while loaded != {"a", "b"}:
        out = rank.collect()
        assert not out.failed
        assert not out.loaded & loaded
        loaded |= out.loaded
    assert rank.worker.collect(idle=True) == Collected()


def test_a_failed_asynchronous_load_is_named_after_the_leader_knows(make_rank: Make) -> None:
    rank = make_rank({"load_fail": 1})
    rank.step(Step(loads=[Copy.of(1, "a", [2, 3], [0, 1])]))
    assert rank.collect() == Collected(loaded={"a"}, failed={"a"})
    (result,) = rank.link.take()
    assert isinstance(result, Result)
    assert (result.outcomes, result.error) == (bytes([Outcome.FAILED] * 2), "injected")
    assert rank.worker.collect(idle=True) == Collected()
    assert rank.worker.take_bad_blocks() == set()
    assert rank.worker.copying.bad == {}


def test_a_busy_step_does_not_wait(make_rank: Make) -> None:
    rank = make_rank({"load_delay": FOREVER}, idle_wait_ms=1000.0)
    rank.step(Step(loads=[Copy.of(1, "a", [0], [0])]))
    before = time.monotonic()
    assert rank.worker.collect(idle=False) == Collected()
    assert time.monotonic() - before < 1.0
    rank.worker.copying.executor.cancel([1])


# ---------------------------------------------------------------------- loads inside a step


def test_a_synchronous_load_is_there_before_the_forward_pass(make_rank: Make) -> None:
    rank = make_rank({"load_delay": 0.05})
    rank.store(1, [0], [0])
    step = Step(loads=[Copy.of(2, "a", [5], [0])], stores=[Copy.of(3, "a", [5], [3])], sync=True)
    rank.worker.before_step(step)
    assert rank.g1.get(5) == rank.before[5]
    rank.worker.before_forward(step)
    assert rank.g1.get(5) == rank.before[0]
    rank.worker.after_forward(step)
    assert rank.worker.take_bad_blocks() == set()
    assert [rank.result().outcomes, rank.result().outcomes] == [bytes(1)] * 2
    assert rank.worker.collect(idle=False) == Collected()


def test_a_failed_synchronous_load_spoils_what_its_step_stores(make_rank: Make) -> None:
    rank = make_rank({"load_fail": 1})
    step = Step(
        loads=[Copy.of(1, "a", [4, 5], [0, 1])],
        stores=[Copy.of(2, "a", [6], [2]), Copy.of(3, "b", [7], [3])],
        sync=True,
    )
    assert rank.step(step) == {4, 5}
    results = [rank.result() for _ in range(3)]
    assert [result.outcomes for result in results] == [bytes([Outcome.FAILED] * n) for n in (2, 1, 1)]
    assert results[2].error == "computed from a load that failed"
    assert [rank.g2(slot) for slot in (2, 3)] == [bytes(sum(ROWS))] * 2
    assert rank.worker.take_bad_blocks() == set()
    rank.store(4, [6], [2])
    assert rank.worker.copying.bad == {}


def test_a_late_synchronous_load_is_cancelled_and_bad(make_rank: Make) -> None:
    rank = make_rank({"load_delay": FOREVER}, load_deadline_s=0.05)
    step = Step(loads=[Copy.of(1, "a", [4], [0])], stores=[Copy.of(2, "a", [6], [2])], sync=True)
    assert rank.step(step) == {4}
    assert {rank.result().error, rank.result().error} == {"cancelled", "computed from a load that failed"}
    assert rank.contents() == rank.before


def test_a_load_whose_end_cannot_be_seen_is_bad(make_rank: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = make_rank({"load_delay": FOREVER}, load_deadline_s=0.01)
    with monkeypatch.context() as patch:
        patch.setattr(rank.worker.copying.executor, "cancel", lambda jobs: False)
        assert rank.step(Step(loads=[Copy.of(1, "a", [4], [0])], sync=True)) == {4}
    rank.worker.copying.executor.cancel([1])


# ---------------------------------------------------------------------- what breaks


def test_a_dead_transport_is_told_once(make_rank: Make) -> None:
    rank = make_rank({"die_after": 2})
    rank.store(1, [0], [0])
    rank.step(Step(stores=[Copy.of(2, "a", [1], [1])], loads=[Copy.of(3, "b", [2], [0])]))
    results = [rank.result(), rank.result()]
    assert {result.job for result in results} == {2, 3}
    assert all(result.outcomes == bytes([Outcome.FAILED]) for result in results)
    out = rank.collect()
    assert (out.loaded, out.failed) == ({"b"}, {"b"})
    rank.worker.collect(idle=False)
    assert rank.link.take() == [Sick(3, "a copy thread died")]
    assert rank.contents() == rank.before


@pytest.mark.parametrize("down", [True, False])
def test_one_direction_that_is_lost_is_told(make_rank: Make, monkeypatch: pytest.MonkeyPatch, down: bool) -> None:
    """Each may have a transport of its own."""
    rank = make_rank({})
    rank.store(1, [0], [0])
    executor, g1 = rank.worker.copying.executor, rank.worker.memory.g1
    monkeypatch.setattr(executor, "alive", lambda: False)
    monkeypatch.setattr(executor, "lost", lambda source, destination: (source if down else destination) is g1)
    rank.worker.collect(idle=False)
    assert rank.link.take() == [Sick(3, "a copy thread died")]


def test_closing_ends_what_is_in_flight(make_rank: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = make_rank({"store_delay": FOREVER})
    monkeypatch.setattr(
        rank.worker.copying.executor, "close", lambda _, close=rank.worker.copying.executor.close: close(0.0)
    )
    rank.step(Step(stores=[Copy.of(1, "a", [0], [0])]))
    rank.worker.close()
    assert rank.result().error == "the transport was closed"
    assert rank.hear() == Bye()
    assert not any(thread.name == "kvbm-worker" for thread in threading.enumerate())
