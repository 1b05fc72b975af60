"""A connection to one peer, made when it is first needed, and again after it broke. On the network's thread."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from kvbm.core.errors import Broken
from kvbm.tiers.breaker import Breaker
from kvbm.tiers.peers.directory import Instance
from kvbm.tiers.peers.messages import (
    Declined,
    Describe,
    Done,
    Join,
    Memory,
    Ping,
    Pong,
    Promise,
    Release,
    Reserve,
    Said,
    Welcome,
)  # fmt: skip
from kvbm.tiers.peers.session import Session

_Answer = TypeVar("_Answer", Promise, Memory, Pong)


@dataclass(frozen=True, slots=True)
class Identity:
    """This instance, as it introduces itself."""

    name: str
    incarnation: int
    namespace: str
    version: str
    secret: bytes = field(repr=False)


class Client:
    """`breaker` says whether it is asked."""

    def __init__(self, name: str, instance: Instance, us: Identity, breaker: Breaker) -> None:
        self.name, self.instance = name, instance
        self.breaker = breaker
        self.connections = 0
        """How often it was connected to. What was attached through an earlier connection is void."""
        self._us = us
        self._numbers = itertools.count(1)
        self._session: Session | None = None
        self._connecting = asyncio.Lock()
        self._listener: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Future[Said]] = {}
        self._memory: Memory | None = None
        self._ended = False

    @property
    def usable(self) -> bool:
        """Whether it is asked."""
        return self.breaker.problem is None

    @property
    def open(self) -> bool:
        return self._session is not None

    @property
    def asking(self) -> int:
        """Questions that are not answered."""
        return len(self._waiting)

    async def ask(self, question: Callable[[int], Reserve | Describe | Ping], kind: type[_Answer]) -> _Answer:
        """The answer to a question, which is given its number. Raises Broken: there is none, since the peer cannot be
        reached, refuses, or is gone."""
        session = await self._connected()
        future: asyncio.Future[Said] = asyncio.get_running_loop().create_future()
        number = next(self._numbers)
        self._waiting[number] = future
        try:
            await session.say(question(number))
            answer = await future
        finally:
            self._waiting.pop(number, None)
            if future.done() and not future.cancelled():
                future.exception()  # has been seen, also where it came when nobody waited any more
        if not isinstance(answer, kind):
            raise Broken("a peer gave an answer to another question")
        return answer

    async def tell(self, message: Release | Done) -> None:
        """Say what is not answered. Raises Broken: it is not connected."""
        if self._session is None:
            raise Broken("a peer is not connected")
        await self._session.say(message)

    async def memory(self, number: int) -> Memory:
        """Where its memory is, as of `number`. Raises as `ask`."""
        if self._memory is None or self._memory.number != number:
            self._memory = await self.ask(Describe, Memory)
        return self._memory

    async def close(self) -> None:
        """End the connection; the next question makes a new one."""
        session, self._session, self._memory = self._session, None, None
        if self._listener is not None and self._listener is not asyncio.current_task():
            self._listener.cancel()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Broken("the connection to a peer ended"))
        if session is not None:
            with suppress(OSError):
                await session.close()

    async def end(self) -> None:
        """The instance is gone: no question makes a new connection any more."""
        self._ended = True
        await self.close()

    async def _connected(self) -> Session:
        async with self._connecting:
            if self._session is not None:
                return self._session
            self._unless_ended()
            try:
                reader, writer = await asyncio.open_connection(self.instance.host, self.instance.port)
            except (OSError, ValueError, OverflowError) as error:  # what the directory has may be no address at all
                raise Broken(f"peer {self.name} cannot be reached ({type(error).__name__})") from error
            try:
                session = await Session.open(reader, writer, self._us.secret, client=True)
                await session.say(Join(self._us.name, self._us.incarnation, self._us.namespace, self._us.version))
                match await session.hear():
                    case Welcome(name=self.name, incarnation=self.instance.incarnation):
                        pass
                    case Welcome():
                        raise Broken(f"another instance answers where the directory has peer {self.name}")
                    case Declined(reason=reason):
                        raise Broken(f"peer {self.name} refuses: {reason}")
                    case _:
                        raise Broken(f"peer {self.name} does not keep to the protocol")
                self._unless_ended()
            except BaseException:
                writer.close()
                raise
            self._session, self._memory = session, None
            self.connections += 1
            self._listener = asyncio.create_task(self._listen(session))
            return session

    def _unless_ended(self) -> None:
        if self._ended:
            raise Broken(f"peer {self.name} is gone")

    async def _listen(self, session: Session) -> None:
        try:
            while True:
                answer = await session.hear()
                future = self._waiting.get(getattr(answer, "id", 0))
                if future is not None and not future.done():
                    future.set_result(answer)
                elif isinstance(answer, Promise) and answer.lease:  # nobody waits for it any more
                    await session.say(Release(answer.lease))
        except Broken:
            if self._session is session:
                await self.close()
