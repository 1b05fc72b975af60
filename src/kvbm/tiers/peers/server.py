"""Answers other instances. On the network's thread; the leader's state under its lock only."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Final

import msgspec

from kvbm.core.errors import Broken
from kvbm.tiers.peers.client import Identity
from kvbm.tiers.peers.messages import (
    Declined,
    Describe,
    Done,
    Join,
    Memory,
    Ping,
    Pong,
    Release,
    Reserve,
    Said,
    Slab,
    Welcome,
)  # fmt: skip
from kvbm.tiers.peers.serving import Serving
from kvbm.tiers.peers.session import Session

log = logging.getLogger(__name__)

HANDSHAKE_S: Final = 2.0
READERS: Final = 256
"""Connections from other instances at once; as many, apart from these, that have not said who they are yet."""
_QUESTIONS: Final = 4096
"""That are not answered, of one connection."""
_POLL_S: Final = 0.005
"""Between two looks whether a block that is on its way has come."""


class Server:
    """`lock` is the leader's, under which `serving` is used. No question waits longer than `deadline_s`."""

    def __init__(
        self, us: Identity, serving: Serving, lock: Callable[[], AbstractContextManager[object]], deadline_s: float
    ) -> None:
        self._us, self._serving, self._lock, self._deadline_s = us, serving, lock, deadline_s
        self.slabs: tuple[int, list[Slab]] = 0, []
        """Where our memory is; its number rises with each change. Replaced as a whole."""
        self.readers: set[asyncio.Task[None]] = set()
        self.strangers = 0
        """Connections that have not said who they are."""

    def place(self, slabs: list[Slab]) -> None:
        """Our memory is here from now on, rank by rank. Any thread, one at a time."""
        self.slabs = self.slabs[0] + 1, slabs

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection until it ends."""
        task = asyncio.current_task()
        assert task is not None
        # Who does not know the secret takes no place from those who do.
        if self.strangers >= READERS or len(self.readers) >= 2 * READERS:
            writer.transport.abort()
            return
        self.readers.add(task)
        try:
            self.strangers += 1
            try:
                async with asyncio.timeout(HANDSHAKE_S):
                    session = await Session.open(reader, writer, self._us.secret, client=False)
                    join = await session.hear()
                    refusal = self._objection(join)
                    await session.say(Declined(refusal) if refusal else Welcome(self._us.name, self._us.incarnation))
            finally:
                self.strangers -= 1
            if refusal:
                log.warning("KVBM refused another instance: %s", refusal)
            elif isinstance(join, Join):
                await self._serve(session, f"{join.name}/{join.incarnation}")
        except asyncio.CancelledError:
            return  # this thread ends; asyncio would log that a task was cancelled
        except (Broken, TimeoutError) as error:
            log.info("KVBM: a connection from another instance ended: %s", error or "it did not say who it is")
        finally:
            self.readers.discard(task)
            writer.close()
            # It may never take what was said last.
            asyncio.get_running_loop().call_later(HANDSHAKE_S, writer.transport.abort)

    def _objection(self, join: Said) -> str | None:
        """Why somebody may not read here."""
        if not isinstance(join, Join):
            return "it did not say who it is"
        if join.namespace != self._us.namespace:
            return (
                f"it runs namespace {join.namespace[:16]}, this instance {self._us.namespace[:16]}: another model, "
                "other weights, or other settings that change what is in a block"
            )
        if join.version != self._us.version:
            return f"it runs KVBM {join.version}, this instance {self._us.version}"
        return "it shares nothing any more: a reset began a new generation" if self._serving.closed else None

    async def _serve(self, session: Session, reader: str) -> None:
        searches: set[str] = set()
        leases: set[int] = set()
        waiting: set[asyncio.Task[None]] = set()
        try:
            while True:
                match await session.hear():
                    case Reserve() as asked:
                        if len(waiting) >= _QUESTIONS or not _makes_sense(asked):
                            raise Broken("its questions do not make sense")
                        searches.add(f"{reader} {asked.search}")
                        task = asyncio.create_task(self.reserve(session, f"{reader} {asked.search}", asked, leases))
                        waiting.add(task)
                        task.add_done_callback(waiting.discard)
                    case Release(lease=lease):
                        if lease in leases:  # others' are not its matter
                            leases.discard(lease)
                            with self._lock():
                                self._serving.release(lease)
                    case Done(search=search):
                        searches.discard(f"{reader} {search}")
                        with self._lock():
                            self._serving.done(f"{reader} {search}")
                    case Describe(id=number):
                        version, slabs = self.slabs
                        await session.say(Memory(number, version, slabs))
                    case Ping(id=number):
                        await session.say(Pong(number))
                    case _:
                        raise Broken("it said what only who answers says")
        finally:
            for task in waiting:
                task.cancel()
            with self._lock():
                for name in searches:
                    self._serving.done(name)

    async def reserve(self, session: Session, search: str, asked: Reserve, leases: set[int]) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + min(asked.wait_s, self._deadline_s)
        while True:
            with self._lock():
                promise = self._serving.reserve(asked, self.slabs[0])
                rest = asked.keys[promise.count :]
                coming = bool(rest) and self._serving.comes(search, rest, asked.start + promise.count, asked.expected)
            # A request that is to compute them may not have come yet.
            if promise.count or not (coming or asked.expected) or loop.time() >= until:
                break
            await asyncio.sleep(_POLL_S)
        leases.add(promise.lease)
        with suppress(Broken):
            await session.say(msgspec.structs.replace(promise, coming=coming))


def _makes_sense(asked: Reserve) -> bool:
    """Whether this is looked for: what others say is looked at before anything is done with it."""
    return asked.start >= 0 and asked.wait_s >= 0 and len(set(asked.keys)) == len(asked.keys)
