"""The transport for GPUs over a driver that is simulated (`tests/cuda`): copies on a GPU are another matter."""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvbm.abc.transport import Completion, Plan, Quiet, Transport
from kvbm.core.errors import Broken, Misuse
from kvbm.core.outcome import Outcome
from kvbm.core.region import Plane, Region
from kvbm.native import Driver
from kvbm.testing.transport import HostMemory, Memory, Recorder, TransportSuite, closing, contents, fill, plan_of, run
from kvbm.transfer.cuda import CudaDevice, CudaTransport, Registered
from kvbm.transfer.executor import Executor
from tests.cuda.fake import DeviceMemory, Fake, PinnedMemory

pytestmark = pytest.mark.e2e  # no engine, but short deadlines
FAKE = Fake()
ROWS = [4096] * 3


@pytest.fixture(autouse=True)
def fake() -> Iterator[Fake]:
    FAKE.use()
    FAKE.call.fake_devices(2, 1)
    FAKE.call.fake_reset()
    FAKE.pace(latency_s=20e-6)
    yield FAKE
    seen = FAKE.counts()
    FAKE.call.fake_reset()
    assert seen.mistakes == 0, seen.last


class TestStores(TransportSuite):
    def make_transport(self) -> Transport:
        return CudaTransport(FAKE.device, up=False)

    def make_regions(self, row_bytes: Sequence[int], slots: int) -> tuple[Memory, Memory]:
        return DeviceMemory(FAKE, row_bytes, slots), PinnedMemory(FAKE, row_bytes, slots)


class TestLoads(TransportSuite):
    def make_transport(self) -> Transport:
        return CudaTransport(FAKE.device, up=True)

    def make_regions(self, row_bytes: Sequence[int], slots: int) -> tuple[Memory, Memory]:
        return PinnedMemory(FAKE, row_bytes, slots), DeviceMemory(FAKE, row_bytes, slots)


Pair = tuple[DeviceMemory, PinnedMemory]


@pytest.fixture
def pair() -> Pair:
    pair = DeviceMemory(FAKE, ROWS, 32), PinnedMemory(FAKE, ROWS, 32)
    fill(pair[0], 1)
    fill(pair[1], 2)
    return pair


@pytest.fixture
def down() -> Iterator[CudaTransport]:
    with closing(transport := CudaTransport(FAKE.device, up=False)):
        yield transport


def test_it_reaches_one_way_and_pinned_memory_only(pair: Pair, down: CudaTransport) -> None:
    device, pinned = (each.region for each in pair)
    loose = HostMemory(ROWS, 32).region
    assert down.reaches(device, pinned)
    assert not down.reaches(pinned, device)
    assert not down.reaches(device, loose)
    assert not down.reaches(loose, pinned)
    assert not down.reaches(replace(device, planes=(Plane(0x1000, 4096, 4096),) * 3), pinned)
    with closing(CudaTransport(CudaDevice(FAKE.driver, 1, lambda: 0), up=False)) as other:
        assert not other.reaches(device, pinned)


def test_a_copy_without_a_mark_is_misuse(pair: Pair, down: CudaTransport) -> None:
    for after in (None, object(), 7):
        with pytest.raises(Misuse, match="mark"):
            down.submit(replace(plan_of(pair, [1], [1]), after=after), Recorder())


def test_a_copy_waits_for_its_mark_and_its_seconds_do_not_count_that(pair: Pair, down: CudaTransport) -> None:
    stream = FAKE.stream()
    engine = DeviceMemory(FAKE, ROWS, 32, stream=stream)
    fill(engine, 3)
    FAKE.work(stream, engine.touched([1, 2], writes=True), 0.2)
    recorder, begun = Recorder(), time.monotonic()
    down.submit(plan_of((engine, pair[1]), [1, 2], [1, 2]), recorder)
    assert time.monotonic() - begun < 0.1
    ended = recorder.wait()
    assert time.monotonic() - begun > 0.15
    assert ended.outcomes.tolist() == [Outcome.DONE] * 2
    assert ended.seconds < 0.1


def test_a_mark_of_another_stream_is_a_mistake_that_the_fake_sees(pair: Pair, down: CudaTransport) -> None:
    stream = FAKE.stream()
    FAKE.work(stream, pair[0].touched([1], writes=True), 0.1)
    run(down, plan_of(pair, [1], [1]))  # the pair's marks are those of the default stream
    assert "overlap" in FAKE.counts().last
    FAKE.call.cuStreamSynchronize(stream)
    FAKE.call.fake_reset()


def test_a_cancel_does_not_wait_for_the_engine(pair: Pair, down: CudaTransport) -> None:
    stream = FAKE.stream()
    engine = DeviceMemory(FAKE, ROWS, 32, stream=stream)
    FAKE.work(stream, [], 0.5)
    old = contents(pair[1])
    recorder, begun = Recorder(), time.monotonic()
    ticket = down.submit(plan_of((engine, pair[1]), [1, 2], [1, 2]), recorder)
    time.sleep(0.02)
    assert down.cancel(ticket) is Quiet.QUIESCED
    assert recorder.wait().outcomes.tolist() == [Outcome.FAILED] * 2
    assert time.monotonic() - begun < 0.3
    assert contents(pair[1]) == old


def test_an_urgent_plan_does_not_wait_for_one_that_waits_for_the_engine(pair: Pair, down: CudaTransport) -> None:
    stream = FAKE.stream()
    engine = DeviceMemory(FAKE, ROWS, 32, stream=stream)
    FAKE.work(stream, [], 0.3)
    late, urgent = Recorder(), Recorder()
    down.submit(plan_of((engine, pair[1]), [1], [1], urgent=False), late)
    time.sleep(0.02)
    down.submit(plan_of(pair, [2], [2]), urgent)
    assert urgent.wait().outcomes.tolist() == [Outcome.DONE]
    assert not late.completions
    assert late.wait().outcomes.tolist() == [Outcome.DONE]


def test_directions_do_not_wait_for_each_other(pair: Pair, down: CudaTransport) -> None:
    FAKE.pace(latency_s=0.1)
    with closing(CudaTransport(FAKE.device, up=True)) as up:
        store, load = Recorder(), Recorder()
        begun = time.monotonic()
        down.submit(plan_of(pair, [0], [0]), store)
        up.submit(plan_of(pair[::-1], [5], [5]), load)
        store.wait(), load.wait()
        assert time.monotonic() - begun < 0.18


def test_submitting_does_not_wait_for_the_copy(pair: Pair, down: CudaTransport) -> None:
    FAKE.pace(latency_s=0.2)
    recorder, begun = Recorder(), time.monotonic()
    down.submit(plan_of(pair, list(range(32)), list(range(32))), recorder)
    assert time.monotonic() - begun < 0.1
    assert recorder.wait().outcomes.tolist() == [Outcome.DONE] * 32


def test_a_copy_that_hangs_is_uncertain_until_it_is_over(pair: Pair, down: CudaTransport) -> None:
    FAKE.call.fake_hold(1)
    recorder = Recorder()
    ticket = down.submit(plan_of(pair, [1, 2], [1, 2]), recorder)
    while not FAKE.counts().calls:
        time.sleep(0.001)
    assert down.cancel(ticket) is Quiet.UNCERTAIN
    assert recorder.completions == []
    assert down.alive()
    FAKE.call.fake_hold(0)
    assert recorder.wait().outcomes.tolist() == [Outcome.DONE] * 2
    assert down.cancel(ticket) is Quiet.QUIESCED


def test_a_close_gives_up_a_device_that_hangs(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaTransport, "close_s", 0.1)
    transport = CudaTransport(FAKE.device, up=False)
    FAKE.call.fake_hold(1)
    recorder = Recorder()
    transport.submit(plan_of(pair, [1, 2], [1, 2]), recorder)
    while not FAKE.counts().calls:
        time.sleep(0.001)
    transport.close()
    assert transport.abandoned
    assert recorder.wait().outcomes.tolist() == [Outcome.FAILED] * 2
    FAKE.call.fake_hold(0)
    time.sleep(0.05)


def test_a_close_that_nothing_holds_up_abandons_nothing(pair: Pair) -> None:
    transport = CudaTransport(FAKE.device, up=False)
    run(transport, plan_of(pair, [1], [1]))
    transport.close()
    assert not transport.abandoned


def test_a_lost_context_fails_everything_and_the_transport_is_dead(pair: Pair) -> None:
    transport = CudaTransport(FAKE.device, up=False)
    mark = pair[0].mark()
    old = contents(pair[1])
    FAKE.call.fake_fail_copy(1, 700)
    executor = Executor([transport])
    ended, seen = threading.Event(), list[Completion]()

    def done(job: int, completion: Completion) -> None:
        seen.append(completion)
        ended.set()

    plan = plan_of(pair, [1, 2], [1, 2])
    executor.submit(1, plan, 5, done)
    assert ended.wait(5)
    assert seen[0].outcomes.tolist() == [Outcome.FAILED] * 2
    assert "ILLEGAL_ADDRESS" in (seen[0].error or "")
    assert {slot: data for slot, data in contents(pair[1]).items() if slot not in (1, 2)} == {
        slot: data for slot, data in old.items() if slot not in (1, 2)
    }
    assert not transport.alive()
    assert executor.lost(plan.source, plan.destination)
    executor.submit(2, replace(plan, after=mark), 5, done)
    assert "died" in (seen[1].error or "")
    with pytest.raises(Broken, match=r"cannot be marked: .*ILLEGAL_ADDRESS"):
        FAKE.device.mark()
    executor.close(1)


def test_what_the_driver_refuses_is_an_outcome_and_the_next_plan_works(pair: Pair, down: CudaTransport) -> None:
    FAKE.fail("cuMemcpyBatchAsync_v2")
    failed = run(down, plan_of(pair, [1], [1]))
    assert (failed.outcomes.tolist(), "OUT_OF_MEMORY" in (failed.error or "")) == ([Outcome.FAILED], True)
    assert run(down, plan_of(pair, [1], [1])).outcomes.tolist() == [Outcome.DONE]
    assert pair[1].get(1) == pair[0].get(1)


def test_what_cannot_be_pinned_is_not_pinned_at_all(pair: Pair) -> None:
    device, memory = CudaDevice(FAKE.driver, 0, lambda: 0), np.zeros(1 << 16, np.uint8)
    address = int(memory.ctypes.data)
    FAKE.fail("cuMemHostRegister_v2")
    with pytest.raises(Broken, match=r"0\.0 GB of host memory cannot be pinned: cuMemHostRegister: CUDA_ERROR_OUT"):
        device.pin(address, memory.nbytes, 4096)
    region = Region("g2", "host", 4, (Plane(address, 4096, 4096),))
    assert device.pinned(region) is None
    device.pin(address, memory.nbytes, 4096)
    assert device.pinned(region) is not None
    device.unpin(address)
    assert device.pinned(region) is None


def test_memory_is_pinned_where_every_slot_lies_in_one_piece() -> None:
    pinned = Registered(1 << 20, 64 << 10, 16 << 10)

    def slots(address: int, stride: int, rows: int, number: int) -> Region:
        return Region("g2", "host", number, (Plane((1 << 20) + address, stride, rows),))

    assert pinned.holds(slots(0, 4096, 4096, 16))
    assert pinned.holds(slots(100, 4096, 3000, 16))
    assert not pinned.holds(slots(0, 4096, 4096, 17))
    assert pinned.holds(slots(2048, 4096, 4096, 2))  # inside one piece
    assert not pinned.holds(slots(2048, 4096, 4096, 5))
    assert not pinned.holds(slots(0, 5000, 5000, 4))
    assert not pinned.holds(slots(-4096, 4096, 4096, 2))


def test_rows_that_are_far_apart_are_copied_one_by_one(down: CudaTransport) -> None:
    """More than 2 GiB from layer to layer: drivers promise no rectangle that large."""
    far, row, slots = 5 << 29, 4096, 2
    address = FAKE.driver.alloc(0, 2 * far + slots * row)  # nothing of it is there before it is written
    planes = tuple(Plane(address + at * far, row, row) for at in range(3))
    g1 = Region("g1", "cuda", slots, planes, owner=FAKE.device)
    g2 = PinnedMemory(FAKE, [row] * 3, slots)
    for at, plane in enumerate(planes):
        FAKE.write(plane.address + row, bytes([at + 1]) * row)
    ended: queue.SimpleQueue[Completion] = queue.SimpleQueue()
    one, mark = np.array([1]), FAKE.driver.mark(0, 0)
    down.submit(Plan(g1, one, g2.region, np.array([0]), False, "store", after=mark), ended.put)
    assert ended.get(timeout=20).error is None
    assert g2.get(0) == b"".join(bytes([at + 1]) * row for at in range(3))
    FAKE.driver.free(0, address)


@pytest.mark.parametrize(("newest", "call"), [(12080, "cuMemcpyBatchAsync"), (12040, "cuMemcpyAsync")])
def test_a_driver_can_be_told_what_it_may_call(newest: int, call: str) -> None:
    assert Driver(FAKE.path).call == "cuMemcpyBatchAsync_v2"
    assert Driver(FAKE.path, newest).call == call


def test_a_device_is_found_by_its_memory(pair: Pair) -> None:
    on_device, on_host = (each.region.planes[0].address for each in pair)
    assert CudaDevice.of(on_device, lambda: 0, library=FAKE.path).ordinal == 0
    with pytest.raises(Broken, match="knows no device memory"):
        CudaDevice.of(on_host, lambda: 0, library=FAKE.path)
    FAKE.call.fake_managed(1)
    with pytest.raises(Broken, match="managed memory is not served"):
        CudaDevice.of(on_device, lambda: 0, library=FAKE.path)
    FAKE.call.fake_managed(0)
    with pytest.raises(Broken, match="cannot be used: /nowhere"):
        CudaDevice.of(0, lambda: 0, library="/nowhere/libcuda.so.1")


@pytest.mark.parametrize(("node", "found"), [("1\n", {0, 1, 2, 7}), ("-1\n", set())])
def test_processors_near_the_device_are_those_of_its_node(tmp_path: Path, node: str, found: set[int]) -> None:
    here = tmp_path / "0000:0a:00.0"
    here.mkdir()
    (here / "numa_node").write_text(node)
    (here / "local_cpulist").write_text("0-2,7\n")
    assert CudaDevice(FAKE.driver, 0, lambda: 0, folder=tmp_path).cpus() == found
    assert CudaDevice(FAKE.driver, 1, lambda: 0, folder=tmp_path).cpus() == set()
