"""This instance's place in the directory, and the instances that live. On the network's thread, but for what says
otherwise."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from kvbm.core.errors import Broken
from kvbm.tiers.breaker import Breaker
from kvbm.tiers.namesakes import Namesake, told
from kvbm.tiers.peers.directory import Directory, Instance
from kvbm.tiers.peers.published import Published

log = logging.getLogger(__name__)

_NOT_YET: Final = "the directory has not answered yet"
_LOOKUP_S: Final = 0.25
"""The longest that the directory may take to answer."""
BACKOFF_S: Final = (0.02, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
"""Before each new try after the directory or a peer has failed; the last goes on. The first comes soon, since what is
busy is not dead."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where this instance listens; port 0: any."""

    host: str
    port: int


class Kin:
    """Why blocks that others have of the same model are not found here: asked once, where nobody shares with us."""

    def __init__(self, facts: Mapping[str, object] | None) -> None:
        self._facts = facts
        self.told: tuple[str, ...] = ()
        """Sentences for people. Any thread."""

    async def compare(self, directory: Directory, *, alone: bool) -> None:
        """Compare what this namespace is with the others in the directory, if that has not been done."""
        if (facts := self._facts) is not None and alone:
            others = await directory.namespaces()
            shared = [Namesake(f"in the directory, namespace {name}", theirs) for name, theirs in others.items()]
            self.told = tuple(told({name: str(value) for name, value in facts.items()}, shared))
            for sentence in self.told:
                log.warning("KVBM: %s", sentence)
        self._facts = None


class Membership:
    """The directory is made by `directory` on the thread. A lease there lasts `lease_s` seconds."""

    def __init__(
        self,
        directory: Callable[[], Directory],
        address: Address,
        published: Published,
        *,
        lease_s: float,
        facts: Mapping[str, object] | None = None,
    ) -> None:
        self._make, self.address, self._published, self._lease_s = directory, address, published, lease_s
        self._directory: Directory | None = None
        self._breaker = Breaker(BACKOFF_S, time.monotonic, anew=False)
        self._breaker.trip(_NOT_YET)
        self._renewed = 0.0
        """When the directory last said who lives."""
        self.kin = Kin(facts)
        self.instances: dict[str, Instance] = {}
        self.peers: tuple[str, ...] = ()
        """Those that live; empty while the directory does not say. Any thread."""
        self.sharing = True
        """Whether blocks are shared. Any thread."""

    @property
    def problem(self) -> str | None:
        """Why nothing is found in the directory; None while it is. Any thread."""
        return self._breaker.problem

    def end(self, problem: str | None = None) -> None:
        """Share nothing any more. Any thread."""
        self.sharing, self.peers = False, ()
        if problem is not None:
            self._breaker.trip(problem)

    def open(self) -> None:
        """Raises what is wrong with the directory's address: ConfigError, Broken."""
        self._directory = self._make()

    async def keep(self, port: int, changed: Callable[[], Awaitable[None]]) -> None:
        """Renew our lease, learn who lives, write down what changed, as long as blocks are shared. `port` is where
        this instance listens; `changed` is waited for after `instances` was read."""
        assert self._directory is not None
        directory, published = self._directory, self._published
        every, written, again = min(0.25, self._lease_s / 10), 0, False
        while self.sharing:
            try:
                now = time.monotonic()
                if now - self._renewed >= self._lease_s / 4:
                    there = await directory.renew(self.address.host, port)
                    if there < written:
                        log.warning("KVBM: the directory has lost the entries of this instance; KVBM writes them again")
                    if there != written:
                        published.again()
                    self.instances = await directory.instances()
                    self.peers = tuple(self.instances)
                    self._renewed = now
                    await changed()
                    await self.kin.compare(directory, alone=not self.instances)
                added, removed, afresh = published.take()
                if added or removed or afresh:
                    try:
                        await directory.update(added, removed, afresh=afresh)
                    except Exception:
                        published.again()
                        raise
                    published.told()
                written = published.written
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

    async def find(self, among: Mapping[str, Instance], entries: Sequence[bytes]) -> Mapping[str, int]:
        """How many of these blocks, in order, each of these instances says that it has; empty where the directory
        does not answer."""
        assert self._directory is not None
        try:
            async with asyncio.timeout(_LOOKUP_S):
                return await self._directory.find(among, entries)
        except (Broken, TimeoutError) as error:
            self._fail(str(error) or "the directory does not answer in time")
            return {}

    async def leave(self) -> None:
        """Have the directory forget us, if it answers."""
        if self._directory is not None:
            with suppress(Broken):
                await self._directory.leave()

    async def close(self) -> None:
        """End the connection to the directory."""
        if self._directory is not None:
            await self._directory.close()
