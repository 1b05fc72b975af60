"""Who lives and who has what, with a real server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import msgspec
import pytest

from kvbm.core.errors import Broken, ConfigError
from kvbm.tiers.peers.directory import Directory, Instance, entry, indexed
from tests.valkey import Server

SPACE = "5" * 64
SHORT = 0.3
"""Seconds of a lease that a test waits for."""
ENTRIES = [bytes([number]) * 8 for number in range(20)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.kill()


Work = Callable[..., Coroutine[Any, Any, None]]


@pytest.fixture
def run(server: Server) -> Callable[[Work], None]:
    """Runs a coroutine with what makes a directory of an instance, on an empty server."""

    def go(work: Work) -> None:
        async def whole() -> None:
            opened: list[Directory] = []

            def make(
                name: str, number: int = 1, *, lease_s: float = 30.0, space: str = SPACE, facts: Any = None
            ) -> Directory:
                opened.append(Directory(server.url, space, name, number, lease_s=lease_s, timeout=1.0, facts=facts))
                return opened[-1]

            await make("nobody").server.flushall()
            await work(make)
            for directory in opened:
                await directory.close()

        asyncio.run(whole())

    return go


Run = Callable[[Work], None]


async def joined(directory: Directory, entries: list[bytes] | None = None) -> Instance:
    """An instance that lives and has these."""
    await directory.renew("10.1.2.3", 7)
    await directory.update(ENTRIES if entries is None else entries, [])
    return Instance("10.1.2.3", 7, directory.incarnation)


def test_who_lives_and_how_far_each_goes(run: Run) -> None:
    async def work(make: Callable[..., Directory]) -> None:
        a, b, c, other = make("a"), make("b", 2**63 - 1), make("c"), make("d", space="6" * 64)
        assert await a.instances() == {}
        await joined(a, ENTRIES[:3])
        await joined(b, [ENTRIES[0], ENTRIES[7], ENTRIES[19]])
        await joined(other)
        alive = await c.instances()
        assert alive == {"a": Instance("10.1.2.3", 7, 1), "b": Instance("10.1.2.3", 7, 2**63 - 1)}
        assert await a.instances() == {"b": alive["b"]}
        assert await c.find(alive, ENTRIES) == {"a": 2, "b": 0}  # what comes behind a gap is of no use
        assert await c.find(alive, ENTRIES[7:]) == {"b": 0}
        assert await c.find(alive, ENTRIES[8:19]) == {}
        assert await c.find(alive, []) == {}
        assert await c.find({}, ENTRIES) == {}

    run(work)


def test_what_is_no_set_is_its_owners_matter(run: Run) -> None:
    async def work(make: Callable[..., Directory]) -> None:
        good, bad, reader = make("a"), make("b"), make("c")
        alive = {"a": await joined(good), "b": await joined(bad, [])}
        await bad.server.set(bad.mine, "not a set")
        assert await reader.find(alive, ENTRIES) == {"a": 19}

    run(work)


def test_entries_end_with_their_lease(run: Run) -> None:
    async def work(make: Callable[..., Directory]) -> None:
        dying, reader = make("a", lease_s=SHORT), make("b")
        instance = await joined(dying)
        await asyncio.sleep(SHORT * 0.6)
        assert await dying.renew("10.1.2.3", 7) == len(ENTRIES)
        await asyncio.sleep(SHORT * 0.6)
        assert await reader.find({"a": instance}, ENTRIES) == {"a": 19}
        deadline = time.monotonic() + 5
        while await reader.instances():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        assert await reader.find({"a": instance}, ENTRIES) == {}
        assert not await reader.server.keys()  # its name is forgotten, too

    run(work)


def test_who_comes_back_under_its_name_has_nothing_of_before(run: Run) -> None:
    async def work(make: Callable[..., Directory]) -> None:
        old, new, reader = make("a", 1), make("a", 2), make("b")
        await joined(old)
        assert await new.renew("10.1.2.3", 8) == 0
        alive = await reader.instances()
        assert alive == {"a": Instance("10.1.2.3", 8, 2)}
        assert await reader.find(alive, ENTRIES) == {}

    run(work)


def test_updates(run: Run) -> None:
    async def work(make: Callable[..., Directory]) -> None:
        directory = make("a")
        await joined(directory, ENTRIES[:4])
        await directory.update(ENTRIES[4:6], ENTRIES[:2])
        assert await directory.renew("h", 1) == 4
        await directory.update(ENTRIES[:1], [], afresh=True)
        assert list(await directory.server.smembers(directory.mine)) == ENTRIES[:1]
        many = [number.to_bytes(8, "big") for number in range(10_000)]
        await directory.update(many, ENTRIES[:1])
        assert await directory.renew("h", 1) == 10_000
        await directory.update([], many)
        assert await directory.renew("h", 1) == 0

    run(work)


def test_facts_of_other_namespaces_end_with_their_instances(run: Run) -> None:
    async def work(make: Callable[..., Directory]) -> None:
        mine, seed = make("a", facts={"model": "m", "seed": 1}), {"model": "m", "seed": "0"}
        other, plain = make("b", space="6" * 64, lease_s=SHORT, facts=seed), make("c", space="7" * 64)
        for each in (mine, other, plain):
            await each.renew("10.1.2.3", 7)
        assert await mine.namespaces() == {"6" * 16: seed}
        assert await plain.namespaces() == {"6" * 16: seed, "5" * 16: {"model": "m", "seed": "1"}}
        deadline = time.monotonic() + 5
        while await mine.namespaces():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        assert list(await mine.server.smembers("kvbm:namespaces")) == [b"5" * 16]
        await mine.server.set("kvbm:" + "6" * 16 + ":facts", b"not msgpack")
        await mine.server.sadd("kvbm:namespaces", "6" * 16, b"\xff")
        assert await mine.namespaces() == {}

    run(work)


def test_leaving(run: Run) -> None:
    async def work(make: Callable[..., Directory]) -> None:
        leaving, reader = make("a"), make("b")
        await joined(leaving)
        await leaving.leave()
        assert await reader.instances() == {}
        assert not await reader.server.keys()

    run(work)


def test_a_search_is_one_round_trip(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(make: Callable[..., Directory]) -> None:
        reader, alive = make("reader"), {}
        for number in range(5):
            alive[f"i{number}"] = await joined(make(f"i{number}", number), ENTRIES[: number + 1])
        from valkey.asyncio.connection import Connection

        sent: list[list[bytes]] = []
        send = Connection.send_packed_command

        async def counted(connection: Any, command: Any, *args: Any, **kwargs: Any) -> None:
            sent.append(command)
            await send(connection, command, *args, **kwargs)

        await reader.find(alive, ENTRIES[:1])  # connects
        monkeypatch.setattr(Connection, "send_packed_command", counted)
        assert await reader.find(alive, ENTRIES) == {f"i{number}": number for number in range(5)}
        assert len(sent) == 1

    run(work)


def test_more_at_once_than_there_are_connections(run: Run) -> None:
    async def work(make: Callable[..., Directory]) -> None:
        directory = make("a")
        instance = await joined(directory)
        found = await asyncio.gather(*(directory.find({"a": instance}, ENTRIES) for _ in range(50)))
        assert found == [{"a": 19}] * 50
        pool = directory.server.connection_pool
        assert len(pool._available_connections) <= 4
        assert not pool._in_use_connections

    run(work)


def test_a_search_that_is_given_up_does_not_shift_the_answers(run: Run) -> None:
    async def work(make: Callable[..., Directory]) -> None:
        directory = make("a")
        instance = await joined(directory)
        for number in range(60):
            asked = asyncio.ensure_future(directory.find({"a": instance}, ENTRIES))
            for _ in range(number % 12):
                await asyncio.sleep(0)
            asked.cancel()
            at = number % 20
            assert await directory.find({"a": instance}, ENTRIES[at : at + 1]) == {"a": 0}
            assert await directory.renew("h", 1) == 20

    run(work)


@pytest.mark.parametrize(
    ("name", "lease"),
    [
        ("x", b""),
        ("x", b"garbage"),
        ("x", msgspec.msgpack.encode(["h", 1])),
        ("x", msgspec.msgpack.encode(["h", 1, 1, 1])),
        ("x", msgspec.msgpack.encode([1, 1, 1])),
        ("x", msgspec.msgpack.encode({"h": 1})),
        ("x", msgspec.msgpack.encode(["h", 0, 1])),
        ("x", msgspec.msgpack.encode(["h", 65536, 1])),
        ("x", msgspec.msgpack.encode(["h", -1, 1])),
        ("x", b"\x93\xa1\xff\x01\x01"),
        ("x", b"\x91" * 5000),
        ("x\ny", msgspec.msgpack.encode(["h", 1, 1])),
        ("", msgspec.msgpack.encode(["h", 1, 1])),
        ("x" * 5000, msgspec.msgpack.encode(["h", 1, 1])),
        (b"\xff\xfe", msgspec.msgpack.encode(["h", 1, 1])),
    ],
)
def test_what_no_instance_has_written_is_skipped(run: Run, name: bytes | str, lease: bytes) -> None:
    async def work(make: Callable[..., Directory]) -> None:
        good, reader = make("good"), make("b")
        instance = await joined(good)
        raw = name if isinstance(name, bytes) else name.encode()
        await reader.server.sadd(reader.names, raw)
        await reader.server.set(reader.lease_of.encode() + raw, lease)
        assert await reader.instances() == {"good": instance}

    run(work)


@pytest.mark.parametrize("url", ["valkey://:hidden@127.0.0.1:1/0", "unix:///hidden/127.0.0.1.sock"])
def test_errors_do_not_say_where_the_server_is(url: str) -> None:
    async def work() -> None:
        directory = Directory(url, SPACE, "a", 1, lease_s=1, timeout=0.2)
        for call in (
            directory.renew("h", 1),
            directory.instances(),
            directory.update(ENTRIES, ENTRIES, afresh=True),
            directory.find({"b": Instance("h", 1, 1)}, ENTRIES),
            directory.leave(),
        ):
            with pytest.raises(Broken) as caught:
                await call
            assert "hidden" not in str(caught.value)
            assert "127.0.0.1" not in str(caught.value)
        await directory.close()

    asyncio.run(work())


@pytest.mark.parametrize("url", ["http://user:hidden@10.0.0.9", "valkey://user:hidden@10.0.0.9:port/0"])
def test_an_address_that_is_none_is_not_shown(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Directory(url, SPACE, "a", 1, lease_s=1, timeout=0.2)
    assert "hidden" not in str(caught.value)
    assert "10.0.0.9" not in str(caught.value)


def test_a_server_that_says_no_is_reported(run: Run) -> None:
    async def work(make: Callable[..., Directory]) -> None:
        directory = make("a")
        await directory.server.set(directory.names, "not a set")
        with pytest.raises(Broken):
            await directory.instances()
        with pytest.raises(Broken):
            await directory.renew("h", 1)

    run(work)


def test_a_frozen_server_is_not_waited_for() -> None:
    server = Server()

    async def work() -> None:
        directory = Directory(server.url, SPACE, "a", 1, lease_s=1, timeout=0.2)
        await directory.renew("h", 1)
        server.freeze()
        begun = time.monotonic()
        with pytest.raises(Broken):
            await directory.instances()
        assert time.monotonic() - begun < 0.6
        await directory.close()

    try:
        asyncio.run(work())
    finally:
        server.thaw()
        server.kill()


def test_which_blocks_have_an_entry() -> None:
    chosen = indexed(0, 5000).tolist()
    assert chosen[:16] == list(range(16))
    assert chosen[16:21] == [17, 19, 21, 23, 25]
    for blocks in range(1, 5001):  # a holder of so many shows at least seven eighths of them
        shown = max(at for at in chosen if at < blocks) + 1 if blocks < 200 or blocks % 37 == 0 else blocks
        assert shown >= blocks * 7 / 8
    for first, last in ((0, 0), (0, 1), (3, 17), (15, 16), (16, 17), (100, 1000), (4095, 4097), (2**20 - 1, 2**20 + 1)):
        assert indexed(first, last).tolist() == [at for at in indexed(0, last).tolist() if at >= first]


def test_an_entry_is_as_long_as_it_can_be() -> None:
    assert entry(bytes(range(32))) == bytes(range(8))
    assert entry(b"abc") == b"abc"
