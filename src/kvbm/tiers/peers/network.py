"""Talks to the directory and to other instances, on a thread of its own. It touches the leader's state under its lock
only.

What it says to the directory waits in `Published` until this thread writes it down, in batches; what it does for a
request is a task of its own with a deadline. Nothing here is waited for by the engine's thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final, Protocol

import msgspec

from kvbm.core.errors import Broken, KvbmError
from kvbm.tiers.peers.client import Client, Identity
from kvbm.tiers.peers.connections import Connections
from kvbm.tiers.peers.directory import entry, indexed
from kvbm.tiers.peers.loop import Loop
from kvbm.tiers.peers.membership import Membership
from kvbm.tiers.peers.messages import Done, Memory, Promise, Release, Reserve
from kvbm.tiers.peers.server import Server
from kvbm.tiers.tier import Give, Search, Seeker

log = logging.getLogger(__name__)

_PAUSE_S: Final = 0.01
"""Before a peer that has nothing yet is asked again; one that behaves has waited itself."""


class Found(Protocol):
    """Hears of blocks that were found; from the network's thread, without the leader's lock."""

    def __call__(self, search: PeerSearch, client: Client, promise: Promise, memory: Memory, start: int) -> bool:
        """A peer holds blocks `start` and following. False: nobody wants them any more."""


class PeerSearch(Search):
    """What is looked for: `keys` are blocks `start` and following of a prompt. `peer`: ask nobody else, and wait for
    what it is about to compute. Ends when `seconds` have passed, or `ended` is set. `found` hears of what is there,
    `give` takes it."""

    def __init__(
        self, number: int, seeker: Seeker, keys: Sequence[bytes], start: int, give: Give, *, seconds: float,
        until: float, found: Found,
    ) -> None:  # fmt: skip
        super().__init__(until)
        self.id, self.seeker, self.keys, self.start, self.give = number, seeker, keys, start, give
        self.seconds, self.found, self.peer = seconds, found, seeker.pull_from


class Network:
    """Other instances as `members` tells of them: asks them as `us`, each for at most `deadline_s`, and has `server`
    answer them. Starts at once; `close` ends the thread."""

    def __init__(self, us: Identity, members: Membership, server: Server, *, deadline_s: float) -> None:
        self.us, self.members, self.server, self._deadline_s = us, members, server, deadline_s
        self._loop = Loop("kvbm-network", self._run)
        self.connections = Connections(us, members, self._loop)
        self.port = 0
        """Where it listens, once it does."""
        self._loop.start()

    def wait(self, seconds: float) -> None:
        """Until it listens. Raises what went wrong: Broken, ConfigError."""
        self._loop.wait(seconds)

    # ------------------------------------------------------------------ from other threads

    @property
    def problem(self) -> str | None:
        """Why nothing is found in the directory; None while it is."""
        return self.members.problem

    @property
    def peers(self) -> tuple[str, ...]:
        """Those that live."""
        return self.members.peers

    @property
    def namesakes(self) -> tuple[str, ...]:
        """Why blocks that others have of the same model are not found here."""
        return self.members.kin.told

    @property
    def busy(self) -> bool:
        """Whether something is being done for a request, or said to a peer."""
        return self._loop.tasks > 0

    def search(self, search: PeerSearch) -> None:
        """Begin to look for what a request wants."""
        self._loop.soon(lambda: self._search(search))

    def release(self, client: Client, lease: int) -> None:
        """Tell a peer that we have what it held."""
        self._loop.soon(lambda: self.connections.tell(client, Release(lease)))

    def failed(self, client: Client, problem: str) -> None:
        """A peer's blocks do not come, or are not what it promised: it is connected to anew."""
        client.breaker.failed()
        self._loop.soon(lambda: self.connections.failed(client, problem, broken=True))

    def slow(self, client: Client, problem: str) -> None:
        """A peer's blocks do not come in time: it is left alone until it answers a probe."""
        self._loop.soon(lambda: self.connections.failed(client, problem, broken=False))

    def works(self, client: Client) -> None:
        """A peer's blocks have come."""
        client.breaker.worked()

    def usable(self) -> dict[str, bool]:
        """Instances that live, by name, and whether they are asked."""
        return self.connections.usable()

    def leave(self) -> None:
        """Share nothing any more: no blocks for others, none from them."""
        self.members.end()
        self._loop.soon(self._leave)

    def close(self) -> None:
        """End the thread, after telling the directory, if that answers at once."""
        self._loop.close(2.0)

    # ------------------------------------------------------------------ the thread

    async def _run(self) -> None:
        listening = False
        try:
            server = await self._listen()
            listening = True
            self._loop.begun()
            await self._serve(server)
        except Exception as error:
            if isinstance(error, KvbmError) and not listening:
                raise
            self.members.end("the network thread died")
            log.exception("KVBM: the network thread died: nothing is shared with other instances any more")
        finally:
            self.members.end()

    async def _listen(self) -> asyncio.Server:
        self.members.open()
        address = self.members.address
        try:
            server = await asyncio.start_server(self.server.accept, address.host, address.port)
        except OSError as error:
            raise Broken(f"cannot listen for other instances on {address.host}: {error.strerror}") from None
        self.port = int(server.sockets[0].getsockname()[1])
        return server

    async def _serve(self, server: asyncio.Server) -> None:
        keeper = asyncio.ensure_future(self.members.keep(self.port, self.connections.forget))
        await self._loop.stopped()
        server.close()
        tasks = self._loop.cancel()
        for task in (keeper, *self.server.readers):
            task.cancel()
        await self.connections.end()
        if self.members.sharing and self.problem is None:
            await self.members.leave()
        await self.members.close()
        await asyncio.gather(keeper, *tasks, *self.server.readers, return_exceptions=True)

    async def _leave(self) -> None:
        self.members.end("a reset began a new generation")
        await self.connections.end()
        await self.members.leave()

    # ------------------------------------------------------------------ reading from others

    async def _search(self, search: PeerSearch) -> None:
        client: Client | None = None
        try:
            async with asyncio.timeout(search.seconds):
                client = await self._choose(search)
                if client is not None:
                    await self._ask(search, client)
        except Broken as error:
            if client is not None:
                await self.connections.failed(client, str(error), broken=True)
        except TimeoutError:
            if client is not None:
                await self.connections.failed(client, "no answer in time", broken=False)
        finally:
            search.ended = True
            if client is not None and client.open:
                self._loop.task(self.connections.tell(client, Done(search.id)))

    async def _choose(self, search: PeerSearch) -> Client | None:
        """The peer that holds most, if one holds anything."""
        instances, client = self.members.instances, self.connections.client
        if search.peer is not None:
            chosen = client(search.peer) if search.peer in instances else None
            return chosen if chosen is not None and chosen.usable else None
        usable = {name: each for name, each in instances.items() if client(name).usable}
        places = indexed(search.start, search.start + len(search.keys)) - search.start
        found = await self.members.find(usable, [entry(search.keys[at]) for at in places.tolist()])
        best = max(found, key=lambda name: (found[name], -client(name).asking), default=None)
        return None if best is None else client(best)

    async def _ask(self, search: PeerSearch, client: Client) -> None:
        """Have the peer hold what it has, and what comes, until nothing more comes."""
        at, keys, begun = 0, search.keys, self._loop.time()
        while at < len(keys) and not search.ended and self.members.sharing:
            rest, start = list(keys[at:]), search.start + at
            answer, memory = await self._reserve(client, search, rest, start)
            if answer.count > len(rest):
                raise Broken("a peer promised more than was asked for")
            if memory is not None and not search.found(search, client, answer, memory, start):
                self._loop.task(self.connections.tell(client, Release(answer.lease)))
                return
            at += answer.count
            # A request that is to compute them may not have come there yet.
            early = search.peer is not None and not at and self._loop.time() < begun + self._deadline_s
            if not (answer.coming or early):
                return
            if not answer.count:
                await asyncio.sleep(_PAUSE_S)

    async def _reserve(
        self, client: Client, search: PeerSearch, keys: list[bytes], start: int
    ) -> tuple[Promise, Memory | None]:
        # It waits for what comes, but answers within the deadline.
        wait_s, expected = min(self._deadline_s / 2, 0.5), search.peer is not None
        begun = self._loop.time()
        async with asyncio.timeout(self._deadline_s):
            answer = await client.ask(lambda number: Reserve(number, search.id, keys, start, wait_s, expected), Promise)
            try:
                memory = await client.memory(answer.memory) if answer.count else None
            except BaseException:
                self._loop.task(self.connections.tell(client, Release(answer.lease)))
                raise
        # It began before it came: when, we do not know, but not before it was asked for.
        return msgspec.structs.replace(answer, seconds=answer.seconds - (self._loop.time() - begun)), memory
