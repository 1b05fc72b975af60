"""Holders that die, freeze, come back, lie; a directory that does. What is asked of KVBM meanwhile is answered in time
and never with other bytes (`Engine.serve` compares each)."""

from __future__ import annotations

import asyncio
import ctypes
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from valkey import Valkey

from kvbm import __version__
from kvbm.core.errors import Broken
from kvbm.tiers.breaker import Breaker
from kvbm.tiers.peers.client import Client, Identity
from kvbm.tiers.peers.directory import Instance, entry
from kvbm.tiers.peers.messages import Ping, Pong
from kvbm.tiers.peers.serving import Serving
from tests.build.whole import Engine
from tests.leader.roles import keys_of
from tests.tiers.peers.conftest import Start, know_each_other, peers_of, published
from tests.valkey import Server

pytestmark = pytest.mark.e2e  # no engine, but processes and seconds of waiting

Hold = Callable[..., subprocess.Popen[str]]
DEADLINE = 2.0


@pytest.fixture
def hold(tmp_path: Path, valkey: Server, secret: Path) -> Iterator[Hold]:
    """Starts holders of the first blocks of a prompt."""
    processes: list[subprocess.Popen[str]] = []

    def make(name: str = "h", prompt: str = "p", blocks: int = 6) -> subprocess.Popen[str]:
        path = tmp_path / f"{name}{len(processes)}"
        path.mkdir()
        command = [
            sys.executable,
            "-m",
            "tests.tiers.peers.holder",
            path,
            name,
            valkey.url,
            secret,
            "127.0.0.1",
            prompt,
            blocks,
        ]
        process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield make
    for process in processes:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.communicate()


def until(engine: Engine, what: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        engine.leader.core.tick()
        assert time.monotonic() < deadline, (peers_of(engine).network.peers, peers_of(engine).problem)
        time.sleep(0.01)


def knows(engine: Engine, count: int) -> None:
    until(engine, lambda: len(peers_of(engine).network.peers) == count and peers_of(engine).network.server.slabs[0])


def timed(engine: Engine, name: str, count: int) -> tuple[int, float]:
    begun = time.monotonic()
    found = engine.serve(keys_of(name, count))
    return found, time.monotonic() - begun


def clean(engine: Engine) -> None:
    """Nothing is held for anybody once all that flew has ended."""
    until(engine, lambda: engine.leader.core.pool.statistics().staged == 0, 60.0)
    until(engine, lambda: peers_of(engine).in_flight() == 0 and not peers_of(engine).serving.held)
    engine.leader.core.pool.check()
    now = engine.leader.core.pool.statistics()
    assert (now.active, now.staged, now.writable, now.orphaned) == (0, 0, 0, 0)


def test_a_holder_in_another_process(start: Start, hold: Hold) -> None:
    hold(blocks=20)
    reader = start("r", g2_blocks=64)
    knows(reader, 1)
    assert timed(reader, "p", 20)[0] == 20
    clean(reader)


def test_a_killed_holder_costs_at_most_the_deadline_once(start: Start, hold: Hold) -> None:
    holder, reader = hold(), start("r")
    knows(reader, 1)
    holder.kill()
    holder.wait()
    found, seconds = timed(reader, "p", 6)
    assert found == 0
    assert seconds < DEADLINE + 0.5
    reader.leader.core.pool.clear()
    assert timed(reader, "p", 6)[1] < 0.3  # nobody asks it again
    until(reader, lambda: not peers_of(reader).network.peers)  # its lease is over
    clean(reader)


def test_a_frozen_holder_is_left_alone_and_used_again_when_it_answers(start: Start, hold: Hold) -> None:
    holder, reader = hold(), start("r")
    knows(reader, 1)
    holder.send_signal(signal.SIGSTOP)
    found, seconds = timed(reader, "p", 6)
    assert found == 0
    assert seconds < DEADLINE + 0.5
    reader.leader.core.pool.clear()
    assert timed(reader, "p", 6)[1] < 0.3
    holder.send_signal(signal.SIGCONT)
    reader.leader.core.pool.clear()

    def served() -> bool:
        reader.leader.core.pool.clear()
        return reader.serve(keys_of("p", 6)) == 6

    until(reader, served)
    clean(reader)


def test_a_holder_that_is_out_of_memory_costs_at_most_the_deadline(start: Start, hold: Hold) -> None:
    holder, reader = hold(), start("r")
    knows(reader, 1)
    assert holder.stdin is not None
    assert holder.stdout is not None
    holder.stdin.write("starve\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == "starved\n"
    time.sleep(0.5)
    found, seconds = timed(reader, "p", 6)
    assert found == 0  # it cannot even answer
    assert seconds < DEADLINE + 0.5
    reader.leader.core.pool.clear()
    assert timed(reader, "p", 6)[1] < 0.3
    holder.kill()
    holder.wait()
    hold()
    until(reader, lambda: timed(reader, "p", 6)[0] == 6 or reader.leader.core.pool.clear())
    clean(reader)


def test_who_is_gone_is_forgotten(start: Start, hold: Hold) -> None:
    holder, reader = hold("one"), start("r")
    knows(reader, 1)
    assert timed(reader, "p", 6)[0] == 6
    memory = reader.workers[0].tiers["peers"].memory
    assert memory is not None
    assert memory.known
    assert set(peers_of(reader).peers) == {"one"}
    holder.kill()
    holder.wait()
    until(reader, lambda: not (memory.known or memory.regions or peers_of(reader).peers))
    hold("two")
    reader.leader.core.pool.clear()
    until(reader, lambda: timed(reader, "p", 6)[0] == 6 or reader.leader.core.pool.clear())
    assert set(peers_of(reader).peers) == {"two"}
    clean(reader)


def test_strangers_take_no_place_from_instances(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kvbm.tiers.peers.server.READERS", 4)
    monkeypatch.setattr("kvbm.tiers.peers.server.HANDSHAKE_S", 1.0)
    holder, reader = start("h"), start("r")
    know_each_other(holder, reader)
    holder.serve(keys_of("p", 6))
    published(holder, 6)
    port = peers_of(holder).network.port
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]
    server = peers_of(holder).network.server
    until(holder, lambda: server.strangers == 4)  # the others are sent away
    until(holder, lambda: server.strangers == 0)
    until(reader, lambda: timed(reader, "p", 6)[0] == 6 or reader.leader.core.pool.clear())
    more = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]
    until(holder, lambda: server.strangers == 4)
    reader.leader.core.pool.clear()
    assert timed(reader, "p", 6)[0] == 6  # who is connected stays so
    for each in (*strangers, *more):
        each.close()
    clean(reader)


def test_a_holder_that_came_back_under_its_name_is_another(start: Start, hold: Hold) -> None:
    holder, reader = hold(), start("r")
    knows(reader, 1)
    assert timed(reader, "p", 6)[0] == 6
    holder.kill()
    holder.wait()
    hold(prompt="q")
    until(reader, lambda: timed(reader, "q", 6)[0] == 6 or reader.leader.core.pool.clear())
    clean(reader)


def test_a_holder_that_promises_the_wrong_slots_is_found_out(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    holder, reader = start("h"), start("r")
    know_each_other(holder, reader)
    holder.serve(keys_of("p", 6))
    holder.serve(keys_of("q", 6))
    published(holder, 12)
    monkeypatch.setattr(Serving, "reserve", _swapped(Serving.reserve))
    assert reader.serve(keys_of("p", 6)) == 0
    assert peers_of(reader).corrupt == 6
    assert "not what it promised" in caplog.text
    monkeypatch.undo()
    until(reader, lambda: reader.serve(keys_of("q", 6)) == 6 or reader.leader.core.pool.clear())
    clean(reader)


def _swapped(reserve: Callable[..., object]) -> Callable[..., object]:
    def wrong(serving: Serving, asked: object, memory: int) -> object:
        promise = reserve(serving, asked, memory)
        slots = promise.slots  # type: ignore[attr-defined]
        return msgspec.structs.replace(promise, slots=slots[4:] + slots[:4])

    return wrong


def test_flipped_bits_in_a_holders_memory_are_found(start: Start) -> None:
    holder, reader = start("h"), start("r")
    know_each_other(holder, reader)
    keys = keys_of("p", 6)
    holder.serve(keys)
    published(holder, 6)
    block = holder.leader.core.pool.look(keys[3])
    assert block is not None
    region = holder.workers[0].memory.g2
    assert region is not None
    plane = region.planes[0]
    at = ctypes.c_uint8.from_address(plane.address + block.slot * plane.stride + 99)
    at.value ^= 16
    found = reader.serve(keys)
    assert found == 3
    assert peers_of(reader).corrupt == 1
    clean(reader)


def test_a_dead_directory_costs_nothing_and_comes_back_empty(start: Start, valkey: Server) -> None:
    holder, reader = start("h"), start("r")
    know_each_other(holder, reader)
    holder.serve(keys_of("p", 6))
    published(holder, 6)
    valkey.kill()
    until(reader, lambda: peers_of(reader).problem is not None)
    until(holder, lambda: peers_of(holder).problem is not None)
    assert reader.leader.core.lower.degraded() == {"peers": "the directory does not answer (ConnectionError)"}
    begun = time.monotonic()
    assert reader.serve(keys_of("p", 6)) == 0
    assert time.monotonic() - begun < 0.3
    valkey.start()
    reader.leader.core.pool.clear()
    until(reader, lambda: peers_of(reader).problem is None and peers_of(reader).network.peers)
    until(reader, lambda: reader.serve(keys_of("p", 6)) == 6 or reader.leader.core.pool.clear())
    clean(reader)


def test_a_frozen_directory_costs_its_own_deadline_once(start: Start, valkey: Server) -> None:
    holder, reader = start("h"), start("r", directory_lease_s=60.0)
    know_each_other(holder, reader)
    valkey.freeze()
    first = timed(reader, "p", 6)[1]
    assert first < 0.25 + 0.5
    assert timed(reader, "q", 6)[1] < 0.3
    valkey.thaw()
    until(reader, lambda: peers_of(reader).problem is None)


def test_a_wrong_entry_costs_a_question(start: Start) -> None:
    holder, reader = start("h"), start("r")
    know_each_other(holder, reader)
    holder.serve(keys_of("p", 6))
    published(holder, 6)
    peers_of(holder).published.on_event = lambda event: None  # type: ignore[method-assign]
    holder.leader.core.pool.discard(keys_of("p", 6)[2:])
    assert reader.serve(keys_of("p", 6)) == 2
    clean(reader)


def test_entries_go_with_their_blocks(start: Start, valkey: Server) -> None:
    holder, keys = start("h"), keys_of("p", 6)
    know_each_other(holder)
    holder.serve(keys)
    published(holder, 6)
    client = Valkey(port=valkey.port)

    def written() -> set[bytes]:
        (name,) = client.keys("kvbm:*:has:h:*")
        return set(client.smembers(name))

    until(holder, lambda: written() == {entry(key) for key in keys})
    holder.leader.core.pool.discard(keys[2:])
    published(holder, 2)
    until(holder, lambda: written() == {entry(key) for key in keys[:2]})


@pytest.mark.parametrize(("namespace", "version"), [("f" * 64, __version__), (None, "0.0.1")])
def test_another_model_or_version_is_refused_on_both_sides(
    start: Start, caplog: pytest.LogCaptureFixture, namespace: str | None, version: str
) -> None:
    holder = start("h")
    know_each_other(holder)
    network = peers_of(holder).network
    us = network.us
    wanted = Identity("other", 1, namespace or us.namespace, version, us.secret)
    instance = Instance("127.0.0.1", network.port, us.incarnation)

    async def ask() -> str:
        with pytest.raises(Broken) as refusal:
            await Client("h", instance, wanted, Breaker((1.0,), time.monotonic)).ask(Ping, Pong)
        return str(refusal.value)

    said = asyncio.run(ask())
    mine = namespace[:16] if namespace else version
    assert said.startswith("peer h refuses: it runs ")
    assert mine in said
    until(holder, lambda: f"refused another instance: {said.split(': ', 1)[1]}" in caplog.text)
    assert "127.0.0.1" not in caplog.text


def test_another_secret_is_refused_on_both_sides(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "other"
    other.write_text("another secret of its own")
    other.chmod(0o600)
    holder, reader = start("h"), start("r", peer_secret_file=str(other))
    know_each_other(holder, reader)
    holder.serve(keys_of("p", 6))
    published(holder, 6)
    with caplog.at_level("INFO"):
        assert reader.serve(keys_of("p", 6)) == 0
        until(reader, lambda: caplog.text.count("not have the same secret") >= 1)
        until(reader, lambda: "is left alone" in caplog.text)
    assert "another secret" not in caplog.text
    assert "0123456789abcdef" not in caplog.text


def test_blocks_on_the_holders_disk_come_through_its_memory(start: Start) -> None:
    holder, reader = start("h", g3_blocks=32), start("r")
    know_each_other(holder, reader)
    keys = keys_of("p", 6)
    holder.serve(keys)
    holder.settle()
    published(holder, 6)
    holder.leader.core.pool.discard(keys[1:])
    stop = threading.Event()
    ticking = threading.Thread(
        target=lambda: [holder.leader.core.tick() or time.sleep(0.002) for _ in iter(stop.is_set, True)]
    )
    ticking.start()
    try:
        assert reader.serve(keys) == 6
    finally:
        stop.set()
        ticking.join()
    assert reader.leader.records["r0"].staged == {"peer": 6}
    clean(reader)


def test_a_holder_promises_no_more_at_once_than_its_share(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    holder, reader = start("h", held_share=0.25), start("r")
    know_each_other(holder, reader)
    holder.serve(keys_of("p", 6))
    published(holder, 6)
    held: list[int] = []
    reserve = Serving.reserve

    def watched(serving: Serving, asked: object, memory: int) -> object:
        promise = reserve(serving, asked, memory)  # type: ignore[arg-type]
        held.append(serving.held)
        return promise

    monkeypatch.setattr(Serving, "reserve", watched)
    assert reader.serve(keys_of("p", 6)) == 6  # the rest when the first are let go
    assert max(held) == 4


def test_a_lease_that_nobody_ends_ends(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    holder, reader = start("h", peer_lease_s=1.0), start("r")
    know_each_other(holder, reader)
    holder.serve(keys_of("p", 6))
    published(holder, 6)
    monkeypatch.setattr(Serving, "release", lambda *_: None)
    assert reader.serve(keys_of("p", 6)) in (0, 6)
    assert holder.leader.core.pool.statistics().active == 6
    monkeypatch.undo()
    until(holder, lambda: holder.leader.core.pool.statistics().active == 0)
    assert peers_of(holder).serving.lapsed == 6


def test_after_a_reset_nothing_is_shared(start: Start) -> None:
    holder, reader = start("h"), start("r")
    know_each_other(holder, reader)
    holder.serve(keys_of("p", 6))
    published(holder, 6)
    holder.leader.reset()
    assert reader.serve(keys_of("p", 6)) == 0
    holder.serve(keys_of("p", 6))
    reader.leader.core.pool.clear()
    until(reader, lambda: not peers_of(reader).network.peers)
    assert reader.serve(keys_of("p", 6)) == 0
    assert holder.leader.core.lower.degraded() == {"peers": "a reset began a new generation"}
