"""Two processes over UCX on loopback: what arrives, and what happens when the other side dies or freezes."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection

import numpy as np
import pytest

from kvbm.abc.transport import Plan, Quiet
from kvbm.core.errors import Broken
from kvbm.core.outcome import Outcome
from kvbm.core.region import Region, packed
from kvbm.testing.transport import HostMemory, Recorder, contents, fill

pytest.importorskip("nixl_cu12", reason="NIXL is not installed")

from kvbm.transfer.nixl import NixlTransport, RemoteMemory, agent

pytestmark = [pytest.mark.timeout(120), pytest.mark.e2e]  # no engine, but processes and seconds of waiting
BLOCK, SLOTS = 1 << 20, 512


def serve(pipe: Connection) -> None:
    """A process whose memory others read and write: slot i is full of i % 251."""
    array = np.repeat((np.arange(SLOTS) % 251).astype(np.uint8), BLOCK).reshape(SLOTS, BLOCK)
    transport = NixlTransport()
    transport.register(packed("G2", array.ctypes.data, [BLOCK], SLOTS, owner=array))
    pipe.send((transport.metadata(), array.ctypes.data))
    with suppress(EOFError):
        while (question := pipe.recv()) is not None:
            pipe.send(array[question].tobytes() if question >= 0 else time.process_time())
    transport.close()


class Peer:
    """A process that serves, as `transport` sees it."""

    def __init__(self, transport: NixlTransport) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        self.metadata, address = self.pipe.recv()
        self.name = transport.connect(self.metadata)
        self.region = packed("peer", address, [BLOCK], SLOTS, kind="peer", owner=RemoteMemory(self.name))

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def close(self) -> None:
        self.process.kill()
        self.process.join()


class Here:
    """Memory of this process."""

    def __init__(self) -> None:
        self.array = np.zeros((SLOTS, BLOCK), dtype=np.uint8)
        self.region = packed("here", self.array.ctypes.data, [BLOCK], SLOTS, owner=self.array)


@pytest.fixture
def tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not through the kernel's copies between processes, which need nothing of a frozen one."""
    monkeypatch.setenv("UCX_TLS", "tcp")


@pytest.fixture
def transport() -> Iterator[NixlTransport]:
    # More pieces of all slots than may fly at once.
    transport = NixlTransport(stuck_s=4, piece_bytes=SLOTS * BLOCK // 16)
    yield transport
    transport.close()


@pytest.fixture
def start(transport: NixlTransport) -> Iterator[Callable[[], Peer]]:
    peers: list[Peer] = []

    def start() -> Peer:
        peers.append(Peer(transport))
        return peers[-1]

    yield start
    for peer in peers:
        peer.close()


def submit(transport: NixlTransport, source: Region, destination: Region, slots: range) -> tuple[int, Recorder]:
    recorder, numbers = Recorder(), np.array(slots)
    return transport.submit(Plan(source, numbers, destination, numbers, True, "load"), recorder), recorder


def test_blocks_cross_both_ways(transport: NixlTransport, start: Callable[[], Peer]) -> None:
    peer, here = start(), Here()
    _, recorder = submit(transport, peer.region, here.region, range(3, 100))
    assert (recorder.wait().outcomes == Outcome.DONE).all()
    assert [here.array[slot, -1] for slot in range(102)] == [slot if 3 <= slot < 100 else 0 for slot in range(102)]
    here.array[7] = 99
    _, recorder = submit(transport, here.region, peer.region, range(7, 9))
    assert recorder.wait().error is None
    peer.pipe.send(7)
    assert peer.pipe.recv() == bytes([99]) * BLOCK


@pytest.mark.usefixtures("tcp")
def test_a_peer_that_is_killed_fails_what_flies_and_everything_after(
    transport: NixlTransport, start: Callable[[], Peer]
) -> None:
    peer, here = start(), Here()
    submit(transport, peer.region, here.region, range(1))[1].wait()
    _, recorder = submit(transport, peer.region, here.region, range(SLOTS))
    peer.signal(signal.SIGKILL)
    begin = time.monotonic()
    completion = recorder.wait()
    assert time.monotonic() - begin < 5
    assert (completion.outcomes == Outcome.FAILED).any()
    assert completion.error is not None
    done = np.flatnonzero(completion.outcomes == Outcome.DONE)
    assert (here.array[done] == (done % 251)[:, None]).all()
    _, recorder = submit(transport, peer.region, here.region, range(1))
    assert "not connected any more" in str(recorder.wait().error)
    other = start()
    _, recorder = submit(transport, other.region, here.region, range(5))
    assert recorder.wait().error is None
    transport.disconnect(peer.name)
    assert transport.alive()


@pytest.mark.usefixtures("tcp")
def test_a_frozen_peer_holds_up_nobody_else_and_its_memory_stays_uncertain(
    transport: NixlTransport, start: Callable[[], Peer]
) -> None:
    frozen, other, here, elsewhere = start(), start(), Here(), Here()
    for peer in (frozen, other):
        submit(transport, peer.region, here.region, range(1))[1].wait()
    frozen.signal(signal.SIGSTOP)
    ticket, waiting = submit(transport, frozen.region, here.region, range(SLOTS))
    begin = time.monotonic()
    _, recorder = submit(transport, other.region, elsewhere.region, range(64))
    assert recorder.wait().error is None
    assert time.monotonic() - begin < 2
    assert transport.cancel(ticket) is Quiet.UNCERTAIN
    assert not waiting.completions
    frozen.signal(signal.SIGCONT)
    completion = waiting.wait()
    assert completion.error == "cancelled"
    done = np.flatnonzero(completion.outcomes == Outcome.DONE)
    assert (here.array[done] == (done % 251)[:, None]).all()
    assert transport.cancel(ticket) is Quiet.QUIESCED
    assert transport.restarts == 0


@pytest.mark.usefixtures("tcp")
def test_a_peer_that_is_left_may_still_write_until_what_flies_has_ended(
    transport: NixlTransport, start: Callable[[], Peer]
) -> None:
    """NIXL calls a transfer failed as soon as its agent is forgotten; its bytes land all the same."""
    peer, here = start(), Here()
    submit(transport, peer.region, here.region, range(1))[1].wait()
    peer.signal(signal.SIGSTOP)
    _, waiting = submit(transport, peer.region, here.region, range(SLOTS))
    time.sleep(0.1)
    transport.disconnect(peer.name)
    with pytest.raises(Broken, match="have not ended"):
        transport.connect(peer.metadata)
    time.sleep(0.5)
    assert not waiting.completions, "a plan ended while the peer could still write"
    peer.signal(signal.SIGCONT)
    assert waiting.wait().error == "the peer was disconnected"
    here.array[:] = 200
    time.sleep(1)
    assert (here.array == 200).all(), "bytes arrived after their plan had ended"
    assert transport.connect(peer.metadata) == peer.name
    _, recorder = submit(transport, peer.region, here.region, range(4))
    assert recorder.wait().error is None
    assert transport.restarts == 0


@pytest.mark.usefixtures("tcp")
@pytest.mark.parametrize("call", ["begin", "ended"])
def test_a_transfer_that_fails_halfway_writes_nothing_afterwards(
    transport: NixlTransport, start: Callable[[], Peer], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """NIXL gives up a transfer of many rows at the first that fails, and does not wait for the others."""
    peer, here = start(), Here()
    submit(transport, peer.region, here.region, range(1))[1].wait()
    peer.signal(signal.SIGSTOP)
    real = getattr(agent.Agent, call)

    def fails(self: agent.Agent, handle: object) -> bool:
        real(self, handle)
        raise Broken("one row cannot be posted")

    monkeypatch.setattr(agent.Agent, call, fails)
    _, recorder = submit(transport, peer.region, here.region, range(SLOTS))
    assert "one row" in str(recorder.wait().error)
    monkeypatch.undo()
    assert transport.restarts > 0
    here.array[:] = 200
    peer.signal(signal.SIGCONT)
    time.sleep(1)
    assert (here.array == 200).all(), "bytes arrived after their plan had ended"


@pytest.mark.usefixtures("tcp")
def test_what_never_ends_is_ended_by_a_new_agent(transport: NixlTransport, start: Callable[[], Peer]) -> None:
    peer, here = start(), Here()
    submit(transport, peer.region, here.region, range(1))[1].wait()
    peer.signal(signal.SIGSTOP)
    _, recorder = submit(transport, peer.region, here.region, range(SLOTS))
    completion = recorder.wait()
    assert "started anew" in str(completion.error)
    assert transport.restarts == 1
    here.array[:] = 200
    peer.signal(signal.SIGCONT)
    time.sleep(1)
    assert (here.array == 200).all(), "bytes arrived after their plan had ended"
    _, recorder = submit(transport, peer.region, here.region, range(1))
    assert recorder.wait().error is not None
    again = start()
    _, recorder = submit(transport, again.region, here.region, range(4))
    assert recorder.wait().error is None
    assert here.array[3, 0] == 3


def test_waiting_costs_next_to_nothing(transport: NixlTransport, start: Callable[[], Peer]) -> None:
    peer, here = start(), Here()
    submit(transport, peer.region, here.region, range(1))[1].wait()

    def used() -> float:
        peer.pipe.send(-1)
        return time.process_time() + float(peer.pipe.recv())

    before = used()
    time.sleep(3)
    assert used() - before < 2 * 3 * 0.02


def test_memory_the_peer_has_not_registered_is_not_reached(transport: NixlTransport, start: Callable[[], Peer]) -> None:
    peer, here = start(), Here()
    plane = peer.region.planes[0]
    beyond = packed("beyond", plane.address + (SLOTS << 21), [BLOCK], SLOTS, kind="peer", owner=peer.region.owner)
    _, recorder = submit(transport, beyond, here.region, range(1))
    assert recorder.wait().outcomes.tolist() == [Outcome.FAILED]
    _, recorder = submit(transport, peer.region, here.region, range(1))
    assert recorder.wait().error is None


def test_regions_are_forgotten(transport: NixlTransport) -> None:
    for seed in range(3):
        pair = HostMemory([4096], 8), HostMemory([4096], 8)
        fill(pair[0], seed)
        submit(transport, pair[0].region, pair[1].region, range(8))[1].wait()
        assert contents(pair[0]) == contents(pair[1])
        for memory in pair:
            transport.forget(memory.region)


def test_a_thread_that_dies_ends_every_plan(transport: NixlTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, gate = (HostMemory([4096], 8), HostMemory([4096], 8)), threading.Event()

    def dies(*_: object) -> None:
        gate.wait()
        raise MemoryError("on purpose")

    monkeypatch.setattr(agent.Agent, "prepare", dies)
    recorders = [submit(transport, pair[0].region, pair[1].region, range(8))[1] for _ in range(3)]
    gate.set()
    for recorder in recorders:
        assert "died" in str(recorder.wait().error)
    assert not transport.alive()
    assert "died" in str(submit(transport, pair[0].region, pair[1].region, range(8))[1].wait().error)
    with pytest.raises(Broken, match="died"):
        transport.metadata()


def test_without_nixl_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "WHEEL", "no-such-wheel")
    with pytest.raises(Broken, match="pip install --no-deps nixl-cu12"):
        NixlTransport()


def test_versions_that_lie_about_short_reads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.4.1")
    with pytest.raises(Broken, match=r"1\.4\.1 reports short reads"):
        NixlTransport()


def test_a_backend_that_is_not_there_is_named() -> None:
    with pytest.raises(Broken, match="MOONCAKE"):
        NixlTransport("MOONCAKE")
