import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from kvbm.abc.transport import Quiet, Transport
from kvbm.core.outcome import Outcome
from kvbm.testing.faults import FaultTransport, build, follow, inject, injected
from kvbm.testing.transport import HostMemory, Memory, Recorder, TransportSuite, blocked, contents, fill, plan_of, run
from kvbm.transfer.memcpy import MemcpyTransport

SLOTS = list(range(8))
LONG = 3600.0


class TestHarmless(TransportSuite):
    def make_transport(self) -> Transport:
        return FaultTransport(MemcpyTransport(1))

    def make_regions(self, row_bytes: Sequence[int], slots: int) -> tuple[Memory, Memory]:
        return HostMemory(row_bytes, slots), HostMemory(row_bytes, slots)


class Faulty:
    """Makes fault transports over one memcpy and closes them."""

    def __init__(self) -> None:
        self.made: list[Transport] = []

    def __call__(self, **options: float) -> FaultTransport:
        self.made.append(transport := FaultTransport(MemcpyTransport(1), **options))
        return transport


@pytest.fixture
def faulty() -> Iterator[Faulty]:
    faulty = Faulty()
    yield faulty
    for transport in faulty.made:
        transport.close()


@pytest.fixture
def pair() -> tuple[Memory, Memory]:
    pair = HostMemory([64, 8], 8), HostMemory([64, 8], 8)
    fill(pair[0], 1)
    fill(pair[1], 2)
    return pair


def test_a_delayed_copy_reads_its_source_late_and_does_not_hold_up_others(
    faulty: Faulty, pair: tuple[Memory, Memory]
) -> None:
    transport = faulty(store_delay=0.05)
    store, load = Recorder(), Recorder()
    transport.submit(plan_of(pair, [0], [0], urgent=False), store)
    assert run(transport, plan_of(pair, [1], [1])).error is None
    assert store.completions == []
    pair[0].put(0, bytes(72))
    assert store.wait().error is None
    assert pair[1].get(0) == bytes(72)
    transport.submit(plan_of(pair, [2], [2]), load)
    assert load.wait().error is None


def test_delays_overlap_unless_serial(faulty: Faulty, pair: tuple[Memory, Memory]) -> None:
    overlapping, serial = faulty(delay=LONG), faulty(delay=LONG, serial=1)
    for transport in (overlapping, serial):
        for slot in range(3):
            transport.submit(plan_of(pair, [slot], [slot]), Recorder())
    due = [sorted(at for at, _ in transport._timers) for transport in (overlapping, serial)]
    assert due[0][2] - due[0][0] < LONG / 2
    assert np.diff(due[1]).tolist() == pytest.approx([LONG, LONG])


def test_a_delayed_copy_can_be_cancelled(faulty: Faulty, pair: tuple[Memory, Memory]) -> None:
    transport, recorder, old = faulty(delay=LONG), Recorder(), contents(pair[1])
    ticket = transport.submit(plan_of(pair, SLOTS, SLOTS), recorder)
    assert transport.cancel(ticket) is Quiet.QUIESCED
    assert recorder.wait().error == "cancelled"
    assert recorder.wait().outcomes.tolist() == [Outcome.FAILED] * 8
    assert contents(pair[1]) == old


def test_close_ends_delayed_copies(faulty: Faulty, pair: tuple[Memory, Memory]) -> None:
    transport, recorder = faulty(delay=LONG), Recorder()
    transport.submit(plan_of(pair, SLOTS, SLOTS), recorder)
    transport.close()
    assert recorder.completions[0].error == "the transport was closed"


def test_failures_copy_nothing(faulty: Faulty, pair: tuple[Memory, Memory]) -> None:
    transport, old = faulty(load_fail=1), contents(pair[1])
    completion = run(transport, plan_of(pair, [0, 1], [2, 3]))
    assert (completion.error, completion.outcomes.tolist()) == ("injected", [Outcome.FAILED] * 2)
    assert contents(pair[1]) == old
    assert run(transport, plan_of(pair, [0], [0], urgent=False)).error is None


def test_a_probability_and_a_seed(faulty: Faulty, pair: tuple[Memory, Memory]) -> None:
    def failures(seed: int) -> list[bool]:
        transport = faulty(fail=0.5, seed=seed)
        return [run(transport, plan_of(pair, [0], [0])).error is not None for _ in range(40)]

    assert failures(1) == failures(1) != failures(2)
    assert 5 < sum(failures(1)) < 35


def test_flips_are_one_bit_per_block_and_silent(faulty: Faulty, pair: tuple[Memory, Memory]) -> None:
    completion = run(faulty(flip=1), plan_of(pair, [0, 1, 2], [5, 6, 7]))
    assert (completion.error, completion.outcomes.tolist()) == (None, [Outcome.DONE] * 3)
    for source, destination in ((0, 5), (1, 6), (2, 7)):
        here, there = (int.from_bytes(m.get(s)) for m, s in ((pair[0], source), (pair[1], destination)))
        assert (here ^ there).bit_count() == 1
    assert pair[1].guards_intact()  # type: ignore[attr-defined]


def test_death_fails_the_waiting_the_running_and_the_later(faulty: Faulty, pair: tuple[Memory, Memory]) -> None:
    transport = faulty(store_die_after=2, store_delay=LONG)
    waiting, running, fatal = Recorder(), Recorder(), Recorder()
    transport.submit(plan_of(pair, [0], [0], urgent=False), waiting)
    with blocked(transport._inner, pair):
        transport.submit(plan_of(pair, [1], [1]), running)
        assert transport.alive()
        transport.submit(plan_of(pair, [2], [2], urgent=False), fatal)
        assert not transport.alive()
    for recorder in (waiting, running, fatal):
        assert recorder.wait().error == "the transport died (injected)"
        assert recorder.wait().outcomes.tolist() == [Outcome.FAILED]
    assert run(transport, plan_of(pair, [3], [3])).error == "the transport died (injected)"


def test_a_label_s_own_option_wins(faulty: Faulty, pair: tuple[Memory, Memory]) -> None:
    transport = faulty(fail=1, load_fail=0)
    assert run(transport, plan_of(pair, [0], [0])).error is None
    assert run(transport, plan_of(pair, [0], [0], urgent=False)).error == "injected"


def test_a_wrapped_transport_that_refuses_is_a_failure(faulty: Faulty, pair: tuple[Memory, Memory]) -> None:
    transport = faulty()
    transport._inner.close()
    assert run(transport, plan_of(pair, [0], [0])).error == "this transport is closed"
    assert not transport.alive()


def test_build_reads_a_query_for_one_rank() -> None:
    inner = MemcpyTransport(1)
    assert build(inner, 0, "store_delay=0.2&rank=1") is inner
    wrapped = build(inner, 1, "store_delay=0.2&rank=1")
    assert isinstance(wrapped, FaultTransport)
    assert wrapped._options == {"store_delay": 0.2}
    wrapped.close()
    everywhere = build(MemcpyTransport(1), 3, "")
    assert isinstance(everywhere, FaultTransport)
    everywhere.close()


def test_some_are_delayed_and_all_is_counted(faulty: Faulty, pair: tuple[Memory, Memory]) -> None:
    transport = faulty(load_delay=LONG, delayed=0.5, store_fail=1)
    recorders = [Recorder() for _ in range(40)]
    for recorder in recorders:
        transport.submit(plan_of(pair, [0, 1], [0, 1]), recorder)
    late = len(transport._timers)
    assert 5 < late < 35
    assert transport.injected == {"load_delay": 2 * late}
    run(transport, plan_of(pair, [2], [2], urgent=False))
    assert transport.injected["store_fail"] == 1


def test_faults_of_a_running_transport_can_be_changed(pair: tuple[Memory, Memory], tmp_path: Path) -> None:
    path = tmp_path / "faults"
    inject(path, "load_fail=1&rank=1", "disk=1&store_fail=1", "peer=1&fetch_flip=1")
    here, there = (follow(MemcpyTransport(1), rank, str(path)) for rank in (0, 1))
    assert run(here, plan_of(pair, [0], [0])).error is None
    assert run(there, plan_of(pair, [0, 1], [0, 1])).error == "injected"
    assert run(there, plan_of(pair, [0], [0], urgent=False)).error is None
    inject(path, "store_fail=1")
    assert run(there, plan_of(pair, [0], [0])).error is None
    assert run(here, plan_of(pair, [0], [0], urgent=False)).error == "injected"
    inject(path)
    assert run(here, plan_of(pair, [0], [0], urgent=False)).error is None
    assert injected(path) == {"memory_load_fail": 2, "memory_store_fail": 1}
    with pytest.raises(ValueError, match="unknown fault option"):
        inject(path, "lod_fail=1")
    for transport in (here, there):
        transport.close()


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("dely=1", "unknown fault option 'dely'"),
        ("save_delay=1", "unknown fault option"),
        ("fail=often", "not a number"),
        ("fail=1.5", "out of range"),
        ("delay=-1", "out of range"),
        ("fail=1&fail=0", "given twice"),
        ("fail", "bad query field"),
    ],
)
def test_bad_options_are_named_and_leave_no_thread(query: str, reason: str) -> None:
    inner, before = MemcpyTransport(1), threading.active_count()
    with pytest.raises(ValueError, match=reason):
        build(inner, 0, query)
    assert threading.active_count() == before
    inner.close()


def test_outcomes_of_flipped_blocks_need_host_memory(faulty: Faulty, pair: tuple[Memory, Memory]) -> None:
    completion = run(faulty(flip=1), plan_of(pair, [], []))
    assert completion.outcomes.dtype == np.uint8
