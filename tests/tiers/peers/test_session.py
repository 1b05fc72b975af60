"""What goes over an authenticated connection, and what somebody in the middle, or another program, makes of it."""

from __future__ import annotations

import asyncio
import hmac
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import pytest

from kvbm.core.errors import Broken
from kvbm.tiers.peers.messages import PROTOCOL, Declined, Ping, Pong, Said, encode
from kvbm.tiers.peers.session import MAX_FIRST, MAX_FRAME, Session

SECRET = b"0123456789abcdef"
FIRST = 4 + 1 + 32
"""Bytes of the first frame of each side."""


def aio(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 5))

    return run


async def frame(reader: asyncio.StreamReader) -> bytes:
    """The next frame as it is sent."""
    head = await reader.readexactly(4)
    return head + await reader.readexactly(struct.unpack("<I", head)[0] + 32)


@dataclass
class Wire:
    """Two instances that are connected through somebody, who passes nothing on but their first frames."""

    client: Session
    server: Session
    from_client: asyncio.StreamReader
    to_client: asyncio.StreamWriter
    from_server: asyncio.StreamReader
    to_server: asyncio.StreamWriter

    async def frames(self, count: int) -> list[bytes]:
        """Has the client say `count` messages; they do not arrive."""
        for number in range(count):
            await self.client.say(Ping(number))
        return [await frame(self.from_client) for _ in range(count)]

    def deliver(self, *frames: bytes) -> None:
        self.to_server.write(b"".join(frames))


Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def pipe() -> AsyncIterator[tuple[Ends, Ends]]:
    """Both ends of a connection: who connected, who accepted."""
    accepted: asyncio.Queue[Ends] = asyncio.Queue()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await accepted.put((reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    ends = await asyncio.open_connection("127.0.0.1", server.sockets[0].getsockname()[1])
    others = await accepted.get()
    try:
        yield ends, others
    finally:
        for _, writer in (ends, others):
            writer.transport.abort()
        server.close()
        await asyncio.sleep(0)


@asynccontextmanager
async def wire(theirs: bytes = SECRET) -> AsyncIterator[Wire]:
    async with pipe() as (client, near), pipe() as (far, server):
        opening = asyncio.gather(
            Session.open(*client, SECRET, client=True), Session.open(*server, theirs, client=False)
        )
        far[1].write(await near[0].readexactly(FIRST))
        near[1].write(await far[0].readexactly(FIRST))
        one, other = await opening
        yield Wire(one, other, *near, *far)


async def heard(session: Session, count: int) -> list[Said]:
    return [await session.hear() for _ in range(count)]


async def said(session: Session, count: int) -> None:
    for number in range(count):
        await session.say(Ping(number))
        await asyncio.sleep(0)


@aio
async def test_messages_arrive_in_order_and_both_ways() -> None:
    async with wire() as middle:
        middle.deliver(*await middle.frames(3))
        assert await heard(middle.server, 3) == [Ping(0), Ping(1), Ping(2)]
        await middle.server.say(Pong(7))
        middle.to_client.write(await frame(middle.from_server))
        assert await middle.client.hear() == Pong(7)


@pytest.mark.parametrize("at", [4, 9, -32, -1])
@aio
async def test_a_byte_that_was_changed_is_noticed(at: int) -> None:
    async with wire() as middle:
        changed = bytearray((await middle.frames(1))[0])
        changed[at] ^= 1
        middle.deliver(bytes(changed))
        with pytest.raises(Broken, match="not authentic"):
            await middle.server.hear()


@aio
async def test_a_changed_length_is_noticed() -> None:
    async with wire() as middle:
        first, second = await middle.frames(2)
        middle.deliver(struct.pack("<I", len(first) - 36 - 1) + first[4:], second)
        with pytest.raises(Broken, match="not authentic"):
            await middle.server.hear()


@pytest.mark.parametrize("order", [(0, 0), (0, 2), (1, 0)], ids=["twice", "one is missing", "swapped"])
@aio
async def test_a_frame_belongs_to_its_place(order: tuple[int, int]) -> None:
    async with wire() as middle:
        frames = await middle.frames(3)
        middle.deliver(*(frames[at] for at in order))
        with pytest.raises(Broken, match="not authentic"):
            await heard(middle.server, len(order))


@aio
async def test_a_frame_belongs_to_its_connection() -> None:
    async with wire() as before, wire() as middle:
        middle.deliver(*await before.frames(1))
        with pytest.raises(Broken, match="not authentic"):
            await middle.server.hear()


@aio
async def test_a_frame_belongs_to_its_direction() -> None:
    async with wire() as middle:
        middle.to_client.write((await middle.frames(1))[0])
        with pytest.raises(Broken, match="not authentic"):
            await middle.client.hear()


@aio
async def test_a_reflected_first_frame_makes_no_connection_to_oneself() -> None:
    async with pipe() as (client, middle):
        opening = asyncio.create_task(Session.open(*client, SECRET, client=True))
        middle[1].write(await middle[0].readexactly(FIRST))
        session = await opening
        await session.say(Ping(0))
        middle[1].write(await frame(middle[0]))
        with pytest.raises(Broken, match="not authentic"):
            await session.hear()


@aio
async def test_another_secret_shows_in_the_first_message() -> None:
    async with wire(b"another secret...") as middle:
        middle.deliver(*await middle.frames(1))
        with pytest.raises(Broken, match="do not have the same secret"):
            await middle.server.hear()


@pytest.mark.parametrize(
    ("first", "problem"),
    [
        (b"KVBM" + bytes([PROTOCOL + 1]) + bytes(32), f"version {PROTOCOL + 1} of the protocol"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "not a KVBM instance"),
        (b"KVBM", "ended before it began"),
        (b"", "ended before it began"),
    ],
)
@aio
async def test_what_answers_is_something_else(first: bytes, problem: str) -> None:
    async with pipe() as (client, (_, writer)):
        writer.write(first)
        writer.write_eof()
        with pytest.raises(Broken, match=problem):
            await Session.open(*client, SECRET, client=True)


def sealed(middle: Wire, number: int, body: bytes) -> bytes:
    """A frame of somebody who knows the secret."""
    mac = hmac.digest(middle.client.out, struct.pack("<Q", number) + body, "sha256")
    return struct.pack("<I", len(body)) + body + mac


@aio
async def test_nobody_unknown_has_much_read_into_memory() -> None:
    async with wire() as middle:
        middle.deliver(struct.pack("<I", MAX_FIRST + 1))
        with pytest.raises(Broken, match="longer"):
            await middle.server.hear()


@aio
async def test_no_frame_is_longer_than_the_longest() -> None:
    async with wire() as middle:
        middle.deliver(*await middle.frames(1), struct.pack("<I", MAX_FRAME + 1))
        await middle.server.hear()
        with pytest.raises(Broken, match="longer"):
            await middle.server.hear()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        encode(Ping(1))[:-1],
        encode(Ping(1)) + b"\0",
        b"\x81\xa4type\xa7Unknown",
        b"\x82\xa4type\xa4Ping\xa2id\xa1x",
        b"\x82\xa4type\xa7Refused\xa6reason\xa1\xff",
        b"\x82\xa4type\xa4Ping\xa1x" + b"\x91" * 2000 + b"\0",
    ],
    ids=["nothing", "no msgpack", "cut", "more", "unknown", "another type", "no text", "deep"],
)
@aio
async def test_an_authentic_message_that_cannot_be_read(body: bytes) -> None:
    async with wire() as middle:
        middle.deliver(sealed(middle, 0, body))
        with pytest.raises(Broken, match="cannot be read"):
            await middle.server.hear()


@aio
async def test_the_end_of_a_connection_is_noticed_on_both_sides() -> None:
    async with wire() as middle:
        middle.to_server.transport.abort()
        with pytest.raises(Broken, match="ended"):
            await middle.server.hear()
        with pytest.raises(Broken, match="ended"):
            await said(middle.server, 1000)


@aio
async def test_closing_waits_for_nobody() -> None:
    """The other side has stopped reading, and there is more to send than the kernel takes."""
    async with wire() as middle:
        middle.from_client._transport.pause_reading()  # type: ignore[attr-defined]
        saying = [asyncio.create_task(middle.client.say(Declined("x" * 100_000))) for _ in range(200)]
        await asyncio.sleep(0)
        assert middle.client.writer.transport.get_write_buffer_size()
        await asyncio.wait_for(middle.client.close(), 1)
        assert all(isinstance(each, Broken | None) for each in await asyncio.gather(*saying, return_exceptions=True))
