"""A rank whose engine is on a GPU: a driver that is simulated (`tests/cuda`), real threads, and an engine's stream that
lags. The test plays the leader and the engine."""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvbm.core.config import Settings
from kvbm.core.errors import Broken
from kvbm.core.outcome import Outcome
from kvbm.link.channel import Link, listen
from kvbm.link.messages import Allot, Copy, Hello, Ready, Refused, Result, Step
from kvbm.testing.transport import fill
from kvbm.transfer.cuda import CudaDevice, CudaTransport
from kvbm.transfer.executor import Executor
from kvbm.worker.worker import Worker
from tests.cuda.fake import DeviceMemory, Fake

pytestmark = pytest.mark.e2e  # no engine, but short deadlines
ROWS, SLOTS, PATIENCE = [4096, 4096, 640], 8, 30.0
FAKE = Fake()


class Rank:
    """A worker, the engine's stream, and the leader's end of the channel."""

    def __init__(self, run_dir: Path, **settings: float) -> None:
        self.stream = FAKE.stream()
        self.g1 = DeviceMemory(FAKE, ROWS, SLOTS)
        fill(self.g1, 1)
        self.device = CudaDevice(FAKE.driver, 0, lambda: self.stream)
        region = replace(self.g1.region, owner=self.device)
        path = run_dir / "e.chan"
        with listen(path) as sock:
            executor = Executor(self.device.transports())
            self.worker = Worker(Settings(**settings), region, Hello(0, 1, "f", sum(ROWS)), path, executor)
            sock.settimeout(PATIENCE)
            self.link = Link(sock.accept()[0])
        assert self.link.wait(PATIENCE) == Hello(0, 1, "f", sum(ROWS))

    def allot(self) -> object:
        self.link.send(Allot(SLOTS))
        return self.link.wait(PATIENCE)

    def step(self, step: Step, work: float = 0.0, writes: tuple[int, ...] = ()) -> None:
        """One engine step, whose forward pass writes these blocks and takes so long on the stream."""
        self.worker.before_step(step)
        if writes:
            FAKE.work(self.stream, self.g1.touched(writes, writes=True), work)
        self.worker.before_forward(step)
        self.worker.after_forward(step)

    def result(self, seconds: float = PATIENCE) -> Result | None:
        message = self.link.wait(seconds)
        assert message is None or isinstance(message, Result)
        return message

    def collect(self) -> set[str]:
        """Requests whose loads ended, once there is one: the leader hears of it first."""
        deadline = time.monotonic() + PATIENCE
        while not (loaded := self.worker.collect(idle=True).loaded) and time.monotonic() < deadline:
            pass
        return loaded

    def g2(self, slot: int) -> bytes:
        region = self.worker.memory.g2
        assert region is not None
        return ctypes.string_at(region.planes[0].address + slot * region.slot_bytes, region.slot_bytes)

    def close(self) -> None:
        self.worker.close()
        self.link.close()


Make = Callable[..., Rank]


@pytest.fixture
def make_rank(tmp_path: Path) -> Iterator[Make]:
    ranks: list[Rank] = []

    def make(**settings: float) -> Rank:
        ranks.append(rank := Rank(tmp_path, **settings))
        return rank

    FAKE.call.fake_devices(2, 1)
    FAKE.call.fake_reset()
    yield make
    for rank in ranks:
        rank.close()
    seen = FAKE.counts()
    FAKE.call.fake_reset()
    assert seen.mistakes == 0, seen.last


@pytest.fixture
def rank(make_rank: Make) -> Rank:
    rank = make_rank(fence_ms=50)
    assert rank.allot() == Ready(0, SLOTS)
    return rank


def test_all_of_g2_is_there_and_pinned_before_the_engine_serves(rank: Rank) -> None:
    region = rank.worker.memory.g2
    assert region is not None
    assert rank.device.pinned(region) is not None


def test_a_refusal_to_pin_ends_the_start(make_rank: Make) -> None:
    rank = make_rank()
    FAKE.fail("cuMemHostRegister_v2")
    refused = rank.allot()
    assert isinstance(refused, Refused)
    assert refused.ends
    assert "cannot be pinned: cuMemHostRegister: CUDA_ERROR_OUT_OF_MEMORY" in refused.problem


def test_of_a_device_without_memory_of_its_own_it_says_what_copies_reach(
    make_rank: Make, caplog: pytest.LogCaptureFixture
) -> None:
    FAKE.call.fake_integrated(1)
    with caplog.at_level("WARNING", "kvbm"):
        assert make_rank().allot() == Ready(0, SLOTS)
    assert re.search(r"shares memory with the host.* run at \d+\.\d GB/s, to it at \d+\.\d", caplog.text)


@pytest.mark.parametrize("told", [True, False])
def test_before_the_engines_memory_is_unmapped_copies_end(make_rank: Make, told: bool) -> None:
    """vLLM's sleep; without a word of it a copy would meet memory that is gone."""
    rank = make_rank()
    assert rank.allot() == Ready(0, SLOTS)
    FAKE.pace(latency_s=0.2)
    rank.step(Step(stores=[Copy.of(1, "a", [0, 1], [5, 6])], loads=[]), 0.05, (0, 1))
    while not FAKE.counts().calls:
        time.sleep(0.001)
    if told:
        while not rank.worker.quiet():
            pass
    rank.g1.free()
    result = rank.result()
    assert result is not None
    assert (FAKE.counts().mistakes == 0) == told
    if not told:
        FAKE.call.fake_reset()


def test_blocks_go_and_come_after_what_the_engine_was_told(rank: Rank) -> None:
    before = {slot: rank.g1.get(slot) for slot in range(SLOTS)}
    rank.step(Step(stores=[Copy.of(1, "a", [0, 1, 2], [5, 6, 7])]), 0.5, (0, 1, 2))
    assert rank.result(0.02) is None  # the engine still writes them
    assert rank.result().outcomes == bytes(3)  # type: ignore[union-attr]
    assert [rank.g2(slot) for slot in (5, 6, 7)] == [before[slot] for slot in (0, 1, 2)]
    # The step before may still read and write the blocks that a load is given.
    FAKE.work(rank.stream, rank.g1.touched([3, 4], writes=True), 0.2)
    rank.step(Step(loads=[Copy.of(2, "b", [3, 4], [5, 7])]), 0.0, (6,))
    assert rank.result().outcomes == bytes(2)  # type: ignore[union-attr]
    assert [rank.g1.get(slot) for slot in (3, 4)] == [before[0], before[2]]
    assert rank.collect() == {"b"}


def test_one_mark_is_taken_for_all_copies_of_a_kind(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[object] = []
    mark = rank.device.mark
    monkeypatch.setattr(rank.device, "mark", lambda: marks.append(made := mark()) or made)
    stores = [Copy.of(job, "a", [job], [job]) for job in range(1, 4)]
    loads = [Copy.of(job + 10, str(job), [job + 4], [job]) for job in range(1, 4)]
    rank.step(Step(stores=stores))
    assert len(marks) == 1
    for _ in stores:
        assert rank.result().outcomes == bytes(1)  # type: ignore[union-attr]
    rank.step(Step(loads=loads))
    assert len(marks) == 2
    for _ in loads:
        assert rank.result().outcomes == bytes(1)  # type: ignore[union-attr]
    rank.step(Step())
    assert len(marks) == 2


def test_of_a_store_that_hangs_nothing_counts_and_its_slots_stay_held(rank: Rank) -> None:
    FAKE.call.fake_hold(1)
    rank.step(Step(stores=[Copy.of(1, "a", [0, 1], [0, 1])]))
    while not FAKE.counts().calls:
        time.sleep(0.001)
    begun = time.monotonic()
    rank.worker.before_step(Step(fence=[1]))  # the engine wants its blocks, and gives up waiting
    assert time.monotonic() - begun < 2
    assert rank.result(0.1) is None  # the leader hears nothing, and keeps the slots
    FAKE.call.fake_hold(0)
    ended = rank.result()
    assert ended is not None
    assert ended.outcomes == bytes([Outcome.FAILED] * 2)
    assert "overwritten" in (ended.error or "")


def test_a_load_that_hangs_is_neither_loaded_nor_failed(make_rank: Make) -> None:
    rank = make_rank(load_deadline_s=0.05)
    assert rank.allot() == Ready(0, SLOTS)
    rank.step(Step(stores=[Copy.of(1, "a", [0], [0])]))
    assert rank.result() is not None
    FAKE.call.fake_hold(2)
    rank.step(Step(loads=[Copy.of(2, "b", [3], [0])]))
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:  # far longer than it may take
        rank.worker.before_step(Step())
        assert rank.worker.collect(idle=True).loaded == set()
    assert rank.result(0.01) is None
    FAKE.call.fake_hold(0)
    assert rank.result() is not None
    assert rank.collect() == {"b"}


def test_a_stream_that_cannot_be_marked_is_no_reason_to_copy(rank: Rank) -> None:
    FAKE.fail("cuEventRecord")
    with pytest.raises(Broken, match="cannot be marked"):
        rank.step(Step(stores=[Copy.of(1, "a", [0], [0])]))
    assert FAKE.counts().calls == 0


def test_memory_that_a_device_may_still_use_stays(make_rank: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaTransport, "close_s", 0.1)
    rank = make_rank()
    assert rank.allot() == Ready(0, SLOTS)
    FAKE.call.fake_hold(1)
    rank.step(Step(stores=[Copy.of(1, "a", [0, 1], [0, 1])]))
    while not FAKE.counts().calls:
        time.sleep(0.001)
    monkeypatch.setattr(Executor, "close", _at_once(Executor.close))
    rank.worker.close()
    assert rank.g2(0) is not None  # it can still be read
    FAKE.call.fake_hold(0)
    time.sleep(0.05)


def _at_once(close: Callable[[Executor, float], None]) -> Callable[[Executor, float], None]:
    return lambda executor, seconds: close(executor, 0.1)
