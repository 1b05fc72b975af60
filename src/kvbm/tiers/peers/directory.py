"""Which instances live and what each holds, in Valkey or Redis.

Every instance of a namespace has a lease, and beside it one set of what it holds, which ends with the lease: a dead
instance's entries are gone when its time is over, without anybody removing them. What is looked up is asked of every
living instance's set, all in one round trip.

Not every block has an entry. A holder is asked anyway how far it really goes, so it is enough to know that it goes
about as far: block `n` of a prompt (from 1) has one if `n` has at most four significant bits, so 1 to 16, 18, 20, ...
32, 36, ... An entry is the first 8 bytes of the block's key. One that is wrong, or old, costs a question.

    kvbm:{namespace}:names              set of the names of instances, living or not
    kvbm:{namespace}:lease:NAME         msgpack [host, port, incarnation], for as long as the lease
    kvbm:{namespace}:has:NAME:NUMBER    set of entries of the incarnation NUMBER of NAME, for as long
    kvbm:{namespace}:facts              msgpack map of what the namespace is, for as long as an instance has a lease
    kvbm:namespaces                     set of namespaces, living or not
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

import msgspec
import numpy as np

from kvbm.core.errors import Broken, ConfigError
from kvbm.core.extras import installing
from kvbm.core.region import Slots

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_SIGNIFICANT: Final = 4
"""Bits. Each less halves the entries, and doubles what may be overlooked of a prompt: up to an eighth now."""
_NAME: Final = re.compile(r"[\w.:-]{1,120}")
"""What an instance may be called: names are logged."""
_LEASE: Final = msgspec.msgpack.Decoder(tuple[str, Annotated[int, msgspec.Meta(ge=1, le=65_535)], int])
_BATCH: Final = 4096
"""Entries of one command."""
_NAMESPACES: Final = "kvbm:namespaces"
_FACTS: Final = msgspec.msgpack.Decoder(dict[str, str])
_COMPARED: Final = 64
"""Namespaces that are compared with ours, at most."""


class Instance(NamedTuple):
    """A living instance, as the directory knows it."""

    host: str
    port: int
    incarnation: int


def indexed(first: int, last: int) -> Slots:
    """Which blocks `first` to `last - 1` of a prompt, counted from 0, have an entry: their numbers."""
    numbers = np.arange(first + 1, last + 1)
    low = np.maximum(0, np.frexp(numbers)[1] - _SIGNIFICANT)  # bits that have to be zero
    found: Slots = numbers[numbers & ((1 << low) - 1) == 0] - 1
    return found


def entry(key: bytes) -> bytes:
    """What stands for a block in the directory."""
    return key[:8]


class Directory:
    """One connection to one server. All methods belong to one event loop; all raise Broken where the server does not
    answer, or not within `timeout` seconds."""

    def __init__(
        self, url: str, namespace: str, name: str, incarnation: int, *, lease_s: float, timeout: float,
        facts: Mapping[str, object] | None = None,
    ) -> None:  # fmt: skip
        """`facts` are what the namespace is. Raises ConfigError: the URL is wrong, or the client library is missing."""
        try:
            from valkey import asyncio as valkey
            from valkey.exceptions import ValkeyError
        except ImportError:
            raise ConfigError(
                "directory", "the client for Valkey is not installed", remedy=f"Do: {installing('cluster')}"
            ) from None
        try:
            # One that is asked more waits; the other kind of pool says that the server is dead.
            connections = valkey.BlockingConnectionPool.from_url(
                url, socket_timeout=timeout, socket_connect_timeout=timeout, protocol=3, max_connections=4,
                timeout=timeout,
            )  # fmt: skip
            self.server: Any = valkey.Valkey.from_pool(connections)
        except ValueError:
            # Its own message would show the URL, which may have a password in it.
            raise ConfigError(
                "directory", "this is not the address of a Valkey or Redis server",
                remedy="Give it as valkey://HOST:PORT/0, valkeys://... for TLS, or unix://PATH.",
            ) from None  # fmt: skip
        self._errors = (ValkeyError, OSError, TimeoutError, UnicodeError)
        prefix = f"kvbm:{namespace[:16]}"
        self._namespace = namespace[:16]
        self._facts = msgspec.msgpack.encode({fact: str(value) for fact, value in facts.items()}) if facts else b""
        self.names, self.lease_of = f"{prefix}:names", f"{prefix}:lease:"
        self._has = f"{prefix}:has:"
        self.name, self.incarnation = name, incarnation
        self._lease_ms = int(lease_s * 1000)
        self.mine = self._set_of(name, incarnation)

    def _set_of(self, name: str, incarnation: int) -> str:
        return f"{self._has}{name}:{incarnation:x}"

    async def renew(self, host: str, port: int) -> int:
        """Say that this instance lives. Returns how many entries the server has of it, which is less than was written
        where the server has lost some."""
        async with self._reported():
            pipe = self.server.pipeline(transaction=False)
            pipe.set(
                self.lease_of + self.name, msgspec.msgpack.encode([host, port, self.incarnation]), px=self._lease_ms
            )
            pipe.sadd(self.names, self.name)
            if self._facts:
                pipe.set(_facts_of(self._namespace), self._facts, px=self._lease_ms)
                pipe.sadd(_NAMESPACES, self._namespace)
            pipe.pexpire(self.mine, self._lease_ms)
            pipe.scard(self.mine)
            return int((await pipe.execute())[-1])

    async def instances(self) -> dict[str, Instance]:
        """Every living instance but this one, by name. Names whose lease has ended are forgotten."""
        async with self._reported():
            names = [_text(name) for name in await self.server.smembers(self.names)]
            names = [name for name in names if name != self.name]
            if not names:
                return {}
            leases = await self.server.mget([self.lease_of + name for name in names])
            if ended := [name for name, lease in zip(names, leases, strict=True) if lease is None]:
                await self.server.srem(self.names, *ended)
        found: dict[str, Instance] = {}
        for name, lease in zip(names, leases, strict=True):
            try:
                if lease is not None and _NAME.fullmatch(name):
                    found[name] = Instance(*_LEASE.decode(lease))
            except (msgspec.MsgspecError, UnicodeError):
                continue  # not written by an instance
        return found

    async def namespaces(self) -> dict[str, dict[str, str]]:
        """The facts of other namespaces that have living instances. Those that have none are forgotten."""
        async with self._reported():
            names = sorted(_text(name) for name in await self.server.srandmember(_NAMESPACES, _COMPARED))
            names = [name for name in names if name != self._namespace]
            if not names:
                return {}
            texts = await self.server.mget([_facts_of(name) for name in names])
            if ended := [name for name, text in zip(names, texts, strict=True) if text is None]:
                await self.server.srem(_NAMESPACES, *ended)
        found = {}
        for name, text in zip(names, texts, strict=True):
            try:
                if text is not None and _NAME.fullmatch(name):
                    found[name] = _FACTS.decode(text)
            except (msgspec.MsgspecError, UnicodeError):
                continue  # not written by an instance
        return found

    async def update(self, added: Collection[bytes], removed: Collection[bytes], *, afresh: bool = False) -> None:
        """Write down which entries this instance has now, and which no more; `afresh`: all others are forgotten."""
        async with self._reported():
            pipe = self.server.pipeline(transaction=False)
            if afresh:
                pipe.delete(self.mine)
            for command, entries in ((pipe.srem, list(removed)), (pipe.sadd, list(added))):
                for at in range(0, len(entries), _BATCH):
                    command(self.mine, *entries[at : at + _BATCH])
            pipe.pexpire(self.mine, self._lease_ms)
            await pipe.execute()

    async def find(self, instances: Mapping[str, Instance], entries: Sequence[bytes]) -> dict[str, int]:
        """Of each instance the last of `entries`, as a number from 0, that it has together with all before it; those
        that do not have the first are left out. One round trip."""
        if not instances or not entries:
            return {}
        async with self._reported():
            pipe = self.server.pipeline(transaction=False)
            for name, instance in instances.items():
                pipe.smismember(self._set_of(name, instance.incarnation), entries)
            # What is no set, and so an error of one command, is nobody else's matter.
            answers = await pipe.execute(raise_on_error=False)
        found: dict[str, int] = {}
        for name, answer in zip(instances, answers, strict=True):
            there = list(itertools.takewhile(bool, answer)) if isinstance(answer, list) else []
            if there:
                found[name] = len(there) - 1
        return found

    async def leave(self) -> None:
        """This instance shares nothing any more."""
        async with self._reported():
            await self.server.delete(self.lease_of + self.name, self.mine)
            await self.server.srem(self.names, self.name)

    async def close(self) -> None:
        """End the connections."""
        try:
            await self.server.aclose()
        except self._errors:
            return

    @asynccontextmanager
    async def _reported(self) -> AsyncIterator[None]:
        try:
            yield
        except self._errors as error:
            # Not its text: that has the server's address in it.
            raise Broken(f"the directory does not answer ({type(error).__name__})") from error


def _facts_of(namespace: str) -> str:
    return f"kvbm:{namespace}:facts"


def _text(name: bytes | str) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else name
