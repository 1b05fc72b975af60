"""The thread that talks to the directory and to other instances. It touches the leader's state under its lock only.

What it says to the directory waits in `Published` until this thread writes it down, in batches; what it does for a
request is a task of its own with a deadline. Nothing here is waited for by the engine's thread.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec

from kvbm.core.errors import Broken, KvbmError
from kvbm.tiers.breaker import Breaker
from kvbm.tiers.namesakes import Namesake, told
from kvbm.tiers.peers.client import Client, Identity
from kvbm.tiers.peers.directory import Directory, Instance, entry, indexed
from kvbm.tiers.peers.messages import Done, Memory, Ping, Pong, Promise, Release, Reserve
from kvbm.tiers.peers.published import Published
from kvbm.tiers.peers.server import HANDSHAKE_S, Server
from kvbm.tiers.peers.serving import Serving
from kvbm.tiers.tier import Give, Search, Seeker

log = logging.getLogger(__name__)

_NOT_YET: Final = "the directory has not answered yet"
_LOOKUP_S: Final = 0.25
"""The longest that the directory may take to answer."""
_BACKOFF_S: Final = (0.02, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
"""Before each new try after the directory or a peer has failed; the last goes on. The first comes soon, since what is
busy is not dead."""
_PAUSE_S: Final = 0.01
"""Before a peer that has nothing yet is asked again; one that behaves has waited itself."""


class PeerSearch(Search):
    """What is looked for: `keys` are blocks `start` and following of a prompt. `peer`: ask nobody else, and wait for
    what it is about to compute. Ends when `seconds` have passed, or `ended` is set."""

    def __init__(
        self, number: int, seeker: Seeker, keys: Sequence[bytes], start: int, give: Give, *, seconds: float,
        until: float,
    ) -> None:  # fmt: skip
        super().__init__(until)
        self.id, self.seeker, self.keys, self.start, self.give = number, seeker, keys, start, give
        self.seconds, self.peer = seconds, seeker.pull_from


class Asker(Protocol):
    """What is told of blocks that were found; from the network's thread, without the leader's lock."""

    def promised(self, search: PeerSearch, client: Client, promise: Promise, memory: Memory, start: int) -> bool:
        """A peer holds blocks `start` and following. False: nobody wants them any more."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where this instance listens; port 0: any."""

    host: str
    port: int


class Network:
    """`lock` is the leader's, under which `serving` is used. Starts at once; `close` ends the thread."""

    def __init__(
        self,
        directory: Callable[[], Directory],
        us: Identity,
        address: Address,
        serving: Serving,
        published: Published,
        lock: Callable[[], AbstractContextManager[object]],
        *,
        lease_s: float,
        deadline_s: float,
        facts: Mapping[str, object] | None = None,
    ) -> None:
        self._make_directory, self._us, self._address = directory, us, address
        self._published = published
        self.server = Server(us, serving, lock, deadline_s)
        self._lease_s, self._deadline_s = lease_s, deadline_s
        self.asker: Asker | None = None
        self._breaker = Breaker(_BACKOFF_S, time.monotonic, anew=False)
        self._breaker.trip(_NOT_YET)
        self.peers: tuple[str, ...] = ()
        """Those that live."""
        self._facts: Mapping[str, object] | None = facts
        """What this namespace is, until it has been compared with others."""
        self.namesakes: tuple[str, ...] = ()
        """Why blocks that others have of the same model are not found here."""
        self._clients: dict[str, Client] = {}
        self._instances: dict[str, Instance] = {}
        self._sharing = True
        self._renewed = 0.0
        """When the directory last said who lives."""
        self._loop = asyncio.new_event_loop()
        self._started: threading.Event = threading.Event()
        self._failure: KvbmError | None = None
        self._thread = threading.Thread(target=self._run, name="kvbm-network", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """Until it listens. Raises what went wrong: Broken, ConfigError."""
        if not self._started.wait(seconds):
            raise Broken(f"the network thread did not start within {seconds:.0f} s")
        if self._failure is not None:
            raise self._failure

    @property
    def problem(self) -> str | None:
        """Why nothing is found in the directory; None while it is."""
        return self._breaker.problem

    # ------------------------------------------------------------------ from other threads

    def search(self, search: PeerSearch) -> None:
        """Begin to look for what a request wants."""
        self._soon(lambda: self._task(self._search(search)))

    def release(self, client: Client, lease: int) -> None:
        """Tell a peer that we have what it held."""
        self._soon(lambda: self._task(self._tell(client, Release(lease))))

    def failed(self, client: Client, problem: str) -> None:
        """A peer's blocks do not come, or are not what it promised: it is connected to anew."""
        client.breaker.failed()
        self._soon(lambda: self._task(self._failed(client, problem, broken=True)))

    def slow(self, client: Client, problem: str) -> None:
        """A peer's blocks do not come in time: it is left alone until it answers a probe."""
        self._soon(lambda: self._task(self._failed(client, problem, broken=False)))

    def works(self, client: Client) -> None:
        """A peer's blocks have come."""
        client.breaker.worked()

    def leave(self) -> None:
        """Share nothing any more: no blocks for others, none from them."""
        self._sharing = False
        self.peers = ()
        self._soon(lambda: self._task(self._left()))

    def close(self) -> None:
        """End the thread, after telling the directory, if that answers at once."""
        if self._thread.is_alive():
            self._soon(self._stop.set)
            self._thread.join(2.0)

    def usable(self) -> dict[str, bool]:
        """Instances that live, by name, and whether they are asked. Any thread."""
        clients = dict(self._clients)
        return {name: name not in clients or clients[name].usable for name in self.peers}

    def _soon(self, call: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # the loop is closed: the process is about to end
            self._loop.call_soon_threadsafe(call)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._main())
        except Exception:
            self._breaker.trip("the network thread died")
            log.exception("KVBM: the network thread died: nothing is shared with other instances any more")
        finally:
            self._sharing, self.peers = False, ()
            self._started.set()
            self._loop.close()

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        try:
            self._directory = self._make_directory()
            server = await asyncio.start_server(self.server.accept, self._address.host, self._address.port)
        except KvbmError as error:
            self._failure = error
            return
        except OSError as error:
            self._failure = Broken(f"cannot listen for other instances on {self._address.host}: {error.strerror}")
            return
        self._port = int(server.sockets[0].getsockname()[1])
        self._started.set()
        keeper = asyncio.ensure_future(self._keep())
        await self._stop.wait()
        server.close()
        for task in (keeper, *self._tasks, *self.server.readers):
            task.cancel()
        for client in tuple(self._clients.values()):
            await client.end()
        if self._sharing and self.problem is None:
            with suppress(Broken):
                await self._directory.leave()
        await self._directory.close()
        await asyncio.gather(keeper, *self._tasks, *self.server.readers, return_exceptions=True)

    def _task(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(self._logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @staticmethod
    async def _logged(work: Awaitable[None]) -> None:
        try:
            await work
        except Exception:
            log.exception("KVBM: the network thread goes on after an error")

    # ------------------------------------------------------------------ the directory

    async def _keep(self) -> None:
        """Renew our lease, learn who lives, write down what changed."""
        every, written, again = min(0.25, self._lease_s / 10), 0, False
        while self._sharing:
            try:
                now = time.monotonic()
                if now - self._renewed >= self._lease_s / 4:
                    there = await self._directory.renew(self._address.host, self._port)
                    if there < written:
                        log.warning("KVBM: the directory has lost the entries of this instance; KVBM writes them again")
                    if there != written:
                        self._published.again()
                    self._instances = await self._directory.instances()
                    self.peers = tuple(self._instances)
                    self._renewed = now
                    await self._forget()
                    await self._compare()
                added, removed, afresh = self._published.take()
                if added or removed or afresh:
                    try:
                        await self._directory.update(added, removed, afresh=afresh)
                    except Exception:
                        self._published.again()
                        raise
                    self._published.told()
                written = self._published.written
                if again:
                    log.warning("KVBM: the directory answers again")
                again = False
                self._breaker.worked()
                self._breaker.mend()
                await asyncio.sleep(every)
            except Exception as error:  # noqa: BLE001  # or the lease would end, and nobody notice
                # The text of what is not ours may have the server's address in it.
                ours = isinstance(error, Broken)
                self._fail(str(error) if ours else f"the directory cannot be used ({type(error).__name__})")
                await asyncio.sleep(self._breaker.pause)
                self._breaker.failed()
                again = True

    def _fail(self, problem: str) -> None:
        if self.problem in (None, _NOT_YET):
            log.warning("KVBM shares nothing with other instances meanwhile: %s", problem)
        self._breaker.trip(problem)
        self.peers = ()
        self._renewed = 0.0  # only a directory that has said who lives is well again

    async def _compare(self) -> None:
        """Once: what others have of the same model, where nobody shares with us."""
        if (facts := self._facts) is not None and not self._instances:
            others = await self._directory.namespaces()
            shared = [Namesake(f"in the directory, namespace {name}", theirs) for name, theirs in others.items()]
            self.namesakes = tuple(told({name: str(value) for name, value in facts.items()}, shared))
            for sentence in self.namesakes:
                log.warning("KVBM: %s", sentence)
        self._facts = None

    async def _forget(self) -> None:
        """End connections to those that are dead or have started anew."""
        alive = {name: self._instances.get(name) for name in self._clients}
        dead = [each for name, each in self._clients.items() if alive[name] != each.instance]
        for client in dead:  # before anything is waited for: a search may make new ones meanwhile
            del self._clients[client.name]
        for client in dead:
            await client.end()

    async def _left(self) -> None:
        self._breaker.trip("a reset began a new generation")
        for client in tuple(self._clients.values()):
            await client.end()
        with suppress(Broken):
            await self._directory.leave()

    # ------------------------------------------------------------------ reading from others

    async def _search(self, search: PeerSearch) -> None:
        assert self.asker is not None
        client: Client | None = None
        try:
            async with asyncio.timeout(search.seconds):
                client = await self._choose(search)
                if client is not None:
                    await self._ask(search, client)
        except Broken as error:
            if client is not None:
                await self._failed(client, str(error), broken=True)
        except TimeoutError:
            if client is not None:
                await self._failed(client, "no answer in time", broken=False)
        finally:
            search.ended = True
            if client is not None and client.open:
                self._task(self._tell(client, Done(search.id)))

    async def _choose(self, search: PeerSearch) -> Client | None:
        """The peer that holds most, if one holds anything."""
        if search.peer is not None:
            chosen = self._client(search.peer) if search.peer in self._instances else None
            return chosen if chosen is not None and chosen.usable else None
        usable = {name: each for name, each in self._instances.items() if self._client(name).usable}
        places = indexed(search.start, search.start + len(search.keys)) - search.start
        try:
            async with asyncio.timeout(_LOOKUP_S):
                found = await self._directory.find(usable, [entry(search.keys[at]) for at in places.tolist()])
        except (Broken, TimeoutError) as error:
            self._fail(str(error) or "the directory does not answer in time")
            return None
        best = max(found, key=lambda name: (found[name], -self._client(name).asking), default=None)
        return None if best is None else self._client(best)

    async def _ask(self, search: PeerSearch, client: Client) -> None:
        """Have the peer hold what it has, and what comes, until nothing more comes."""
        assert self.asker is not None
        at, keys, begun = 0, search.keys, self._loop.time()
        while at < len(keys) and not search.ended and self._sharing:
            rest, start = list(keys[at:]), search.start + at
            answer, memory = await self._reserve(client, search, rest, start)
            if answer.count > len(rest):
                raise Broken("a peer promised more than was asked for")
            if memory is not None and not self.asker.promised(search, client, answer, memory, start):
                self._task(self._tell(client, Release(answer.lease)))
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
                self._task(self._tell(client, Release(answer.lease)))
                raise
        # It began before it came: when, we do not know, but not before it was asked for.
        return msgspec.structs.replace(answer, seconds=answer.seconds - (self._loop.time() - begun)), memory

    def _client(self, name: str) -> Client:
        instance = self._instances[name]
        client = self._clients.get(name)
        if client is None or client.instance != instance:
            client = self._clients[name] = Client(
                name, instance, self._us, Breaker(_BACKOFF_S, time.monotonic, anew=False)
            )
        return client

    async def _failed(self, client: Client, problem: str, *, broken: bool) -> None:
        """A circuit breaker: nobody asks this peer before it has answered a probe, over a new connection if what it
        did is worse than slow."""
        if broken:
            await client.close()
        if client.breaker.trip(problem):
            self._task(self._probe(client, problem))

    async def _probe(self, client: Client, problem: str) -> None:
        told = False
        while self._clients.get(client.name) is client and self._sharing:
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
    async def _tell(client: Client, message: Release | Done) -> None:
        with suppress(Broken):
            await client.tell(message)
