"""Promises that are wrong, late, or not wanted any more: no request is harmed and nothing stays held."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pytest

from kvbm.abc.transport import Completion
from kvbm.core.errors import Broken
from kvbm.core.outcome import Outcome
from kvbm.leader.requests import RequestParams
from kvbm.link.messages import unpack
from kvbm.tiers.breaker import Breaker
from kvbm.tiers.peers import connections
from kvbm.tiers.peers.client import Client
from kvbm.tiers.peers.directory import Directory
from kvbm.tiers.peers.messages import Memory, Ping, Pong, Promise, Reserve
from kvbm.tiers.peers.orders import Pull
from kvbm.tiers.peers.rank import PeerMemory
from kvbm.tiers.peers.server import Server
from kvbm.tiers.peers.serving import Serving
from tests.build.whole import LAST, TOKENS, Engine
from tests.leader.roles import keys_of
from tests.tiers.peers.conftest import Start, know_each_other, peers_of, published
from tests.tiers.peers.test_failures import clean, timed, until

pytestmark = pytest.mark.e2e  # no engine, but processes and seconds of waiting


def pair(start: Start, **settings: Any) -> tuple[Engine, Engine]:
    """A holder of six blocks of "p", and a reader that knows of it."""
    holder, reader = start("h", **settings), start("r", **settings)
    know_each_other(holder, reader)
    holder.serve(keys_of("p", 6))
    published(holder, 6)
    return holder, reader


def lie(**changes: Callable[[Any], Any]) -> Callable[..., Promise]:
    reserve = Serving.reserve

    def wrong(serving: Serving, asked: Any, memory: int) -> Promise:
        promise = reserve(serving, asked, memory)
        said = {name: change(getattr(promise, name)) for name, change in changes.items()} if promise.count else {}
        return msgspec.structs.replace(promise, **said)

    return wrong


LIES: dict[str, dict[str, Callable[[Any], Any]]] = {
    "priority": {"priorities": lambda _: bytes([200] * 6)},
    "ttl": {"ttls": lambda _: np.full(6, np.nan).tobytes()},
    "seconds": {"seconds": lambda _: float("nan")},
    "slots": {"slots": lambda slots: slots + b"\0"},
    "negative": {"slots": lambda slots: b"\xff" * len(slots)},
    "far": {"slots": lambda slots: np.full(6, 16, np.int32).tobytes()},
    "sums": {"sums": lambda sums: [sums[0][:-1]]},
    "ranks": {"sums": lambda sums: sums * 2},
    "few": {"priorities": lambda _: b""},
}


def forgiven(reader: Engine) -> None:
    """Waits until the holder is asked again."""
    until(reader, lambda: peers_of(reader).network.usable() == {"h": True})


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is left alone for long."""
    monkeypatch.setattr(connections, "_BACKOFF_S", (0.02,))


def asked(reader: Engine, question: Callable[[int], Any], kind: type[Any], **where: Any) -> Any:
    """What the holder answers on a connection of its own, as to the reader; `where` it is looked for."""
    network = peers_of(reader).network
    instance = network.members.instances["h"]._replace(**where)

    async def ask() -> Any:
        client = Client("h", instance, network.us, Breaker((1.0,), time.monotonic))
        try:
            async with asyncio.timeout(5):
                return await client.ask(question, kind)
        finally:
            await client.end()

    return asyncio.run(ask())


@pytest.mark.usefixtures("soon")
def test_a_promise_that_makes_no_sense_is_not_used(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, reader = pair(start)
    for name, changes in LIES.items():
        with monkeypatch.context() as patch:
            patch.setattr(Serving, "reserve", lie(**changes))
            assert reader.serve(keys_of("p", 6)) == 0, name
        assert peers_of(reader).found == 0, name
        reader.leader.core.pool.clear()
        forgiven(reader)
    assert "Traceback" not in caplog.text
    assert reader.serve(keys_of("p", 6)) == 6
    clean(reader)


def test_a_slot_that_is_promised_twice_is_read_once_as_what_it_is(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, reader = pair(start)
    monkeypatch.setattr(Serving, "reserve", lie(slots=lambda slots: slots[:4] * 6))
    assert reader.serve(keys_of("p", 6)) <= 1
    clean(reader)


@pytest.mark.usefixtures("soon")
def test_memory_that_cannot_be_is_not_read(start: Start) -> None:
    holder, reader = pair(start)
    server = peers_of(holder).network.server
    number, right = server.slabs
    wrongs: list[dict[str, Any]] = [
        {"address": 2**64 - 1}, {"address": -1}, {"stride": 0}, {"stride": 2**60}, {"slots": 2**40},
        {"metadata": b"\xff" * 50},
    ]  # fmt: skip
    for wrong in wrongs:
        number += 1
        server.slabs = number, [msgspec.structs.replace(slab, **wrong) for slab in right]
        assert reader.serve(keys_of("p", 6)) == 0, wrong
        reader.leader.core.pool.clear()
        forgiven(reader)
    server.slabs = number + 1, right
    assert reader.serve(keys_of("p", 6)) == 6
    clean(reader)


def test_a_lease_that_is_shorter_than_the_deadline_is_of_use(start: Start) -> None:
    _, reader = pair(start, peer_lease_s=1.0, peer_deadline_s=5.0)
    assert reader.serve(keys_of("p", 6)) == 6
    clean(reader)


def test_a_promise_that_comes_too_late_is_given_back(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    holder, reader = pair(start, peer_deadline_s=0.3, peer_lease_s=60.0)
    reserve = Serving.reserve

    def slow(serving: Serving, asked: Any, memory: int) -> Promise:
        promise = reserve(serving, asked, memory)
        time.sleep(0.5)
        return promise

    monkeypatch.setattr(Serving, "reserve", slow)
    assert reader.serve(keys_of("p", 6)) == 0
    monkeypatch.undo()
    until(holder, lambda: peers_of(holder).serving.promised == 6)
    until(holder, lambda: not peers_of(holder).serving.held, 3.0)
    clean(reader)


def test_a_promise_whose_memory_is_not_told_is_given_back(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    holder, reader = pair(start, peer_deadline_s=0.3, peer_lease_s=60.0)
    ask = Client.ask

    async def never(client: Client, question: Any, kind: Any) -> Any:
        if kind is Memory:
            raise TimeoutError
        return await ask(client, question, kind)

    monkeypatch.setattr(Client, "ask", never)
    assert reader.serve(keys_of("p", 6)) == 0
    assert peers_of(holder).serving.promised == 6
    until(holder, lambda: not peers_of(holder).serving.held, 3.0)


def test_who_answers_probes_only_is_asked_ever_less_often(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    _, reader = pair(start, peer_deadline_s=0.2)

    async def mute(*_: object) -> None:
        return

    monkeypatch.setattr(Server, "reserve", mute)
    waited: list[bool] = []
    for number in range(8):
        waited.append(timed(reader, "p", 6)[1] > 0.2)
        for _ in range(20):
            time.sleep(0.005)
            reader.leader.core.tick()
        reader.leader.core.pool.clear()
        assert number or waited == [True]
    assert sum(waited) <= 3
    clean(reader)


def test_two_requests_that_want_the_same_at_once(start: Start) -> None:
    """The second waits for what the first has read; each lease is ended once, and no block is read twice."""
    holder, reader = pair(start)
    keys = keys_of("p", 6)
    for name in ("a", "b"):
        reader.leader.begin(name, [*keys, LAST], RequestParams(), 7 * TOKENS)

    def found(name: str) -> bool:
        return reader.leader.match(name, 0, 6) == 6

    for name in ("a", "b"):
        reader.until(partial(found, name))
        reader.step(name, 0)  # lets go of the match
    for name in ("a", "b"):
        reader.leader.finish(name, [], 0)
    reader.step("a", 0)
    assert not peers_of(reader).sought.going
    until(holder, lambda: not peers_of(holder).serving.held)
    assert reader.leader.core.pool.statistics().registered == 6
    clean(reader)


def test_a_request_that_is_gone_before_the_answer_leaves_nothing(start: Start) -> None:
    holder, reader = pair(start, peer_lease_s=60.0)
    for number in range(20):
        reader.leader.begin(f"x{number}", [*keys_of("p", 6), LAST], RequestParams(), 7 * TOKENS)
        time.sleep(0.0005 * number)
        reader.leader.finish(f"x{number}", [], 0)
    assert not peers_of(reader).sought.going
    until(holder, lambda: not peers_of(holder).serving.held, 5.0)
    clean(reader)


def test_many_requests_at_once_do_not_make_the_directory_look_dead(start: Start) -> None:
    _, reader = pair(start)
    for number in range(40):
        reader.leader.begin(f"x{number}", [*keys_of(f"n{number}", 6), LAST], RequestParams(), 7 * TOKENS)
    deadline = time.monotonic() + 2
    while peers_of(reader).sought.going and time.monotonic() < deadline:
        assert reader.leader.core.lower.degraded() == {}
        time.sleep(0.001)
    assert peers_of(reader).network.peers == ("h",)
    for number in range(40):
        reader.leader.finish(f"x{number}", [], 0)
    clean(reader)


def test_what_a_peer_cannot_be_connected_at_is_no_error_of_ours(start: Start) -> None:
    _, reader = pair(start)
    for host, port in (("x\0y", 1), ("a" * 300, 1), ("127.0.0.1", 99999)):
        with pytest.raises(Broken, match="peer h cannot be reached"):
            asked(reader, Ping, Pong, host=host, port=port)


def test_blocks_that_are_here_already_are_not_read(start: Start) -> None:
    holder, reader = pair(start)
    keys = keys_of("p", 6)
    assert reader.serve(keys) == 6
    reader.leader.core.pool.discard([keys[0], keys[1], keys[4]])
    assert reader.serve(keys) == 6
    assert reader.leader.records["r1"].staged == {"peer": 3}
    until(holder, lambda: not peers_of(holder).serving.held)
    clean(reader)


def test_a_directory_that_fails_in_an_unknown_way_is_kept_all_the_same(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, reader = pair(start)

    async def odd(*_: object) -> None:
        raise RuntimeError("at 10.9.8.7")

    monkeypatch.setattr(Directory, "instances", odd)
    until(reader, lambda: reader.leader.core.lower.degraded())
    assert reader.leader.core.lower.degraded() == {"peers": "the directory cannot be used (RuntimeError)"}
    monkeypatch.undo()
    until(reader, lambda: not reader.leader.core.lower.degraded() and peers_of(reader).network.peers == ("h",))
    assert reader.serve(keys_of("p", 6)) == 6
    assert "10.9.8.7" not in caplog.text


def test_a_question_that_makes_no_sense_ends_the_connection(start: Start) -> None:
    holder, reader = pair(start, g3_blocks=32)
    right: dict[str, Any] = {"search": 1, "keys": keys_of("p", 2), "start": 0, "wait_s": 0.1}

    def ask(**changes: Any) -> Promise:
        what = right | changes
        return asked(reader, lambda number: Reserve(number, expected=True, **what), Promise)

    wrongs: list[dict[str, Any]] = [{"start": -9}, {"wait_s": float("nan")}, {"keys": keys_of("p", 2) * 2}]
    for wrong in wrongs:
        with pytest.raises(Broken, match="ended"):
            ask(**wrong)
        assert ask().count == 2
    assert ask(keys=[b"", b"x" * 1000]).count == 0
    assert ask(keys=[]).count == 0
    assert ask(start=2**62, keys=keys_of("none", 1)).count == 0
    until(holder, lambda: not peers_of(holder).network.busy)


def test_leases_that_do_not_exist_can_be_ended(start: Start) -> None:
    holder, reader = pair(start)
    talks = peers_of(reader).network
    assert reader.serve(keys_of("p", 6)) == 6
    for lease in (0, 1, -5, 2**63 - 1):
        talks.release(talks.connections.client("h"), lease)
    reader.leader.core.pool.clear()
    assert reader.serve(keys_of("p", 6)) == 6
    until(holder, lambda: not peers_of(holder).serving.held)
    clean(holder)


def test_the_search_is_part_of_the_wait(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder that answers late, and whose blocks then do not come, costs one deadline and not two; the next request
    does not wait for it again."""
    held: list[Callable[[], None]] = []

    def never(memory: PeerMemory, message: Pull) -> None:
        ours = unpack(message.g2)
        failed = Completion(message.job, np.full(len(ours), Outcome.FAILED, np.uint8), "late", 0.0, 0)
        held.append(partial(memory.side.read, ours, message.job, failed, np.zeros(len(ours), np.uint64)))

    reserve = Server.reserve

    async def late(*arguments: Any) -> None:
        await asyncio.sleep(0.7)
        await reserve(*arguments)

    _, reader = pair(start, peer_deadline_s=1.0)
    monkeypatch.setattr(Server, "reserve", late)
    monkeypatch.setattr(PeerMemory, "pull", never)
    begun = time.monotonic()
    assert reader.serve(keys_of("p", 6)) == 0
    assert 0.7 < time.monotonic() - begun < 1.4
    assert reader.leader.core.pool.statistics().staged  # what may still be written to is not reused
    for end in held:
        end()
    clean(reader)
