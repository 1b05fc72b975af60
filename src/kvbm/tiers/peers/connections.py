"""Connections to other instances, and whether they are asked. On the network's thread, but for what says otherwise."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

from kvbm.core.errors import Broken
from kvbm.tiers.breaker import Breaker
from kvbm.tiers.peers.client import Client, Identity
from kvbm.tiers.peers.loop import Loop
from kvbm.tiers.peers.membership import BACKOFF_S, Membership
from kvbm.tiers.peers.messages import Done, Ping, Pong, Release
from kvbm.tiers.peers.server import HANDSHAKE_S

log = logging.getLogger(__name__)

_BACKOFF_S: Final = BACKOFF_S
"""Before each probe of a peer."""


class Connections:
    """One to each of the `members` that was asked for something, made when it is first needed."""

    def __init__(self, us: Identity, members: Membership, loop: Loop) -> None:
        self._us, self._members, self._loop = us, members, loop
        self._clients: dict[str, Client] = {}

    def usable(self) -> dict[str, bool]:
        """Instances that live, by name, and whether they are asked. Any thread."""
        clients = dict(self._clients)
        return {name: name not in clients or clients[name].usable for name in self._members.peers}

    def client(self, name: str) -> Client:
        """The connection to an instance that lives."""
        instance = self._members.instances[name]
        client = self._clients.get(name)
        if client is None or client.instance != instance:
            breaker = Breaker(_BACKOFF_S, time.monotonic, anew=False)
            client = self._clients[name] = Client(name, instance, self._us, breaker)
        return client

    async def forget(self) -> None:
        """End connections to those that are dead or have started anew."""
        alive: Mapping[str, object] = {name: self._members.instances.get(name) for name in self._clients}
        dead = [each for name, each in self._clients.items() if alive[name] != each.instance]
        for client in dead:  # before anything is waited for: a search may make new ones meanwhile
            del self._clients[client.name]
        for client in dead:
            await client.end()

    async def end(self) -> None:
        """End all of them."""
        for client in tuple(self._clients.values()):
            await client.end()

    async def failed(self, client: Client, problem: str, *, broken: bool) -> None:
        """A circuit breaker: nobody asks this peer before it has answered a probe, over a new connection if what it
        did is worse than slow."""
        if broken:
            await client.close()
        if client.breaker.trip(problem):
            self._loop.task(self._probe(client, problem))

    async def _probe(self, client: Client, problem: str) -> None:
        told = False
        while self._clients.get(client.name) is client and self._members.sharing:
            await asyncio.sleep(client.breaker.pause)
            try:
                async with asyncio.timeout(HANDSHAKE_S):
                    await client.ask(Ping, Pong)
            except (Broken, TimeoutError) as error:
                await client.close()
                client.breaker.failed()
                if not told:
                    log.warning("KVBM: peer %s is left alone: %s; %s", client.name, problem, error or "no answer")
                told = True
            else:
                client.breaker.mend()
                client.breaker.failed()  # until blocks come
                if told:
                    log.warning("KVBM: peer %s answers again", client.name)
                return

    @staticmethod
    async def tell(client: Client, message: Release | Done) -> None:
        """Say this, if it is connected."""
        with suppress(Broken):
            await client.tell(message)
