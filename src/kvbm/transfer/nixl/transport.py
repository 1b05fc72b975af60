"""Plans over NIXL, on one thread that owns the agent: it posts pieces of plans, looks after them, and reports.

NIXL has no completion events and cannot take a transfer back. So the thread asks, in naps that grow while nothing
comes, and sleeps when nothing is on its way; and a plan that is cancelled while pieces of it fly ends when they do. If
they never do, because the other side is frozen, their memory is not usable while the agent lives: after `stuck_s`
it is replaced by a new one, what flew has failed, and peers have to be connected anew.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, TypeVar

import numpy as np

from kvbm.abc.transport import Completion, Plan, Quiet, Transport
from kvbm.core.errors import Broken, Misuse
from kvbm.core.outcome import Outcome
from kvbm.core.region import Region
from kvbm.transfer.nixl.agent import MEMORY, Agent, Lost
from kvbm.transfer.nixl.queues import Flight, NixlJob, Queues
from kvbm.transfer.plan import checked_slots, chunk_blocks

logger = logging.getLogger(__name__)

PIECE_BYTES: Final = 64 << 20
"""The most bytes of one transfer. Within a machine they are copied inside the call that posts it, and all others wait
for it: 12 ms at 5.5 GB/s. Each piece costs about half a millisecond besides."""
PIECE_ROWS: Final = 4096
"""Rows of one transfer: preparing more takes long, and some backends have only so many places."""
PATIENCE_S: Final = 0.05
"""How long a cancel waits for what flies."""
NAPS_S: Final = (5e-5, 1e-3)
"""Between two looks at transfers: an eighth of their age, at least and at most this. Spinning would take a core."""
CLOSE_S: Final = 1.0
"""How long `close` waits for what flies between memories."""
COMMAND_S: Final = 30.0

_DONE: Final = np.uint8(Outcome.DONE)
_T = TypeVar("_T")


class NixlTransport(Transport):
    """Moves slots between regions over one NIXL backend.

    `backend` is "UCX" (host memory, GPU memory and peers'; regions of kind "host", "cuda", "peer"), one for files
    ("POSIX", "GDS", "GDS_MT": "host" or "cuda", and "file"), or "OBJ" ("host" and "object"). A region is registered
    when it is first used and stays so until `forget`. `device`: GPU memory is reached, too.

    `cancel` waits 50 ms for pieces that fly and is then `UNCERTAIN`. `done` runs on the one thread there is.

    Raises:
        Broken: NIXL or the backend is not there.
    """

    def __init__(
        self,
        backend: str = "UCX",
        options: dict[str, str] | None = None,
        *,
        device: bool = False,
        piece_bytes: int = PIECE_BYTES,
        stuck_s: float = 30.0,
    ) -> None:
        self.backend = backend
        self._options = options
        self._piece_bytes, self._stuck_s = piece_bytes, stuck_s
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)
        self._quiet = threading.Condition(self._lock)
        self._queues = Queues()
        self._over: deque[NixlJob] = deque()
        self._jobs: dict[int, NixlJob] = {}
        self._flights: list[Flight] = []
        self._commands: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._lost: set[str] = set()
        self._met: dict[str, bytes] = {}
        """Agents that are connected, and the metadata by which they are."""
        self._leaving: set[str] = set()
        """Those of them to be forgotten once nothing flies. NIXL would call what flies failed, and it would land."""
        self._tickets = 0
        self._closed = False
        self._dead: str | None = None
        self.restarts = 0
        """How often the agent was replaced. Metadata and connections from before are void."""
        self._agent = self._new_agent()
        self._kinds = {kind for kind, memory in MEMORY.items() if memory in self._agent.memory_types}
        if not device:
            self._kinds.discard("cuda")
        self._thread = threading.Thread(target=self._run, name=f"kvbm-nixl-{backend.lower()}", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ the contract

    def reaches(self, source: Region, destination: Region) -> bool:
        return source.fits(destination) and self._obstacle(source, destination) is None

    def submit(self, plan: Plan, done: Callable[[Completion], None]) -> int:
        if (obstacle := self._obstacle(plan.source, plan.destination)) is not None:
            raise Misuse(obstacle)
        source, destination = checked_slots(plan)
        rows = len(plan.source.planes)
        most = max(1, min(chunk_blocks(plan.source.slot_bytes, self._piece_bytes), PIECE_ROWS // rows))
        step = math.ceil(len(source) / max(1, math.ceil(len(source) / most)))  # no piece is smaller than the others
        if self.backend == "OBJ":  # when one object's request fails, those of its piece still write
            step = 1
        outcomes = np.full(len(source), Outcome.FAILED, dtype=np.uint8)
        with self._lock:
            if self._closed:
                raise Misuse("this transport is closed")
            self._tickets += 1
            job = NixlJob(plan, source, destination, done, self._tickets, outcomes, step)
            self._jobs[job.ticket] = job
            job.error = self._dead
            if job.open:
                self._queues.add(job)
            else:
                self._end(job)
            self._work.notify()
            return job.ticket

    def cancel(self, ticket: int) -> Quiet:
        with self._lock:
            if (job := self._jobs.get(ticket)) is not None:
                job.error = job.error or "cancelled"
                self._end(job)
                here = threading.current_thread() is self._thread  # which would wait for itself
                if not self._quiet.wait_for(lambda: not job.flying, 0.0 if here else PATIENCE_S):
                    return Quiet.UNCERTAIN
        return Quiet.QUIESCED

    def alive(self) -> bool:
        return not self._closed and self._dead is None and self._thread.is_alive()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._fail("the transport was closed")
            self._work.notify()
        self._thread.join()

    # ------------------------------------------------------------------ memory and peers

    def register(self, region: Region) -> None:
        """Register a region of ours now, so that others can reach it. Raises Broken."""
        self._on_thread(lambda: self._agent.register(region))

    def forget(self, region: Region) -> None:
        """A region is not used any more: no plan with it may be pending. Raises Broken."""
        self._on_thread(lambda: self._agent.forget(region))

    def metadata(self) -> bytes:
        """What others `connect` to, with all that has been registered. It does not outlive a restart. Raises Broken."""
        return self._on_thread(lambda: self._agent.metadata())

    def connect(self, metadata: bytes) -> str:
        """Make an agent's memory reachable; the name it returns is the owner of its regions (`RemoteMemory`).

        Raises Broken: it cannot be, is connected already, or what flew when it was disconnected still does.
        """

        def connect() -> str:
            if any(self._met[name] == metadata for name in self._leaving):
                raise Broken("NIXL: transfers with this peer from before it was disconnected have not ended")
            name = self._agent.connect(metadata)
            self._lost.discard(name)
            self._met[name] = metadata
            return name

        return self._on_thread(connect)

    def disconnect(self, peer: str) -> None:
        """Forget an agent. Pending plans with it fail, those that fly when they end. Raises Broken."""

        def disconnect() -> None:
            self._lose(peer, "the peer was disconnected")
            self._leaving.add(peer)
            if (problem := self._leave()) is not None:
                raise Broken(problem)

        self._on_thread(disconnect)

    def _leave(self) -> str | None:
        """Forget the agents that are to be and with which nothing flies; what went wrong with the last one."""
        problem = None
        for peer in self._leaving - {flight.job.peer for flight in self._flights}:
            self._leaving.discard(peer)
            self._lost.discard(peer)
            self._met.pop(peer, None)
            try:
                self._agent.disconnect(peer)
            except Broken as error:
                problem = str(error)
        return problem

    # ------------------------------------------------------------------ the thread

    def _on_thread(self, call: Callable[[], _T]) -> _T:
        if threading.current_thread() is self._thread:  # inside a `done`
            return call()
        result: Future[_T] = Future()
        with self._lock:
            if self._closed or self._dead is not None:
                raise Broken(self._dead or "this transport is closed")
            self._commands.append((result, call))
            self._work.notify()
        try:
            return result.result(COMMAND_S)
        except TimeoutError:
            result.cancel()  # or it would be done when nobody knows of it
            raise Broken(f"NIXL does not answer within {COMMAND_S:.0f} s") from None

    def _run(self) -> None:
        try:
            self._serve()
            return
        except BaseException as error:
            logger.exception("the NIXL thread died: this transport moves nothing more")
            with self._lock:
                self._dead = f"the NIXL thread died: {error!r}"
                self._fail(self._dead)
                for result, _ in self._commands:
                    if result.set_running_or_notify_cancel():
                        result.set_exception(Broken(self._dead))
        self._settle_all(self._dead)  # not above: the error's frames hold what has to be destroyed
        while True:  # somebody has to say that plans failed
            with self._lock:
                self._work.wait_for(lambda: self._over or self._closed)
            if not self._next_over() and self._closed:
                return

    def _serve(self) -> None:
        while True:
            with self._lock:
                while not (self._commands or self._over or self._flights or self._queues.ready() or self._closed):
                    self._work.wait()
            moved = self._obey() + self._next_over() + self._look() + self._post()
            if self._closed and not (self._jobs or self._over or self._commands):
                self._agent.close()
                return
            if self._flights and self._stuck():
                self._restart(f"a transfer has not ended in {self._stuck_s:.0f} s")
            if moved or not self._flights:
                continue
            age = time.monotonic() - self._flights[-1].begun
            with self._lock:
                if not (self._commands or self._over):
                    self._work.wait(min(max(age / 8, NAPS_S[0]), NAPS_S[1]))

    def _obey(self) -> int:
        """Do the next thing that somebody waits for."""
        with self._lock:
            if not self._commands:
                return 0
            result, call = self._commands.popleft()
        if not result.set_running_or_notify_cancel():
            return 1
        try:
            result.set_result(call())
        except Broken as error:
            result.set_exception(error)
        except BaseException as error:
            result.set_exception(Broken(f"NIXL: {error!r}"))
            raise
        return 1

    def _post(self) -> int:
        """Begin the next piece, if there is one. The lock is not held while NIXL is in it."""
        with self._lock:
            if (job := self._queues.ready()) is None:
                return 0
            if job.peer in self._lost:
                job.error = "the peer is not connected any more"
                self._end(job)
                return 1
            flight = self._queues.take(job)
        self._flights.append(flight)
        error: Exception | None = None
        over = True
        try:
            flight.handle = self._agent.make(
                self._agent.prepare(job.plan.source, job.plan.destination),  # in no variable: it would hold the agent
                job.source[flight.blocks], job.destination[flight.blocks],
            )  # fmt: skip
        except Broken as problem:
            error = problem
        else:
            over, error = self._asked(self._agent.begin, flight)
        if over:
            self._settle(flight, error)
        return 1

    def _asked(self, call: Callable[[Any], bool], flight: Flight) -> tuple[bool, Broken | None]:
        """Whether a transfer has ended, and what went wrong with it."""
        why = ""
        try:
            return call(flight.handle), None
        except Lost as problem:
            return True, problem  # UCX drops everything that is on its way to or from somebody who is gone
        except Broken as problem:
            if self.backend != "UCX":
                return True, problem
            why = str(problem)
        # NIXL forgets a transfer of which one row failed; the bytes of the others may still land.
        self._restart(why)
        return False, None

    def _look(self) -> int:
        """Ask after everything that flies."""
        ended, agent = 0, self._agent
        for flight in list(self._flights):
            over, error = self._asked(agent.ended, flight)
            if self._agent is not agent:
                return 1
            if over:
                self._settle(flight, error)
                ended += 1
        if ended and (problem := self._leave()) is not None:
            logger.warning("%s", problem)
        return ended

    def _settle(self, flight: Flight, error: Exception | None) -> None:
        """A piece has ended: its outcome, and its job's if that was the last one."""
        self._flights.remove(flight)
        if flight.handle is not None:
            self._agent.release(flight.handle)
        with self._lock:
            job = flight.job
            self._queues.settled(job)
            if error is None:
                job.outcomes[flight.blocks] = _DONE
            else:
                job.error = job.error or str(error)
                if isinstance(error, Lost):
                    self._lose(job.peer, f"the peer is gone: {error}")
            self._end(job)
            self._quiet.notify_all()

    def _lose(self, peer: str, why: str) -> None:
        """Let nothing more be posted to this peer."""
        with self._lock:
            self._lost.add(peer)
            for job in list(self._jobs.values()):
                if job.peer == peer:
                    job.error = job.error or why
                    self._end(job)

    def _end(self, job: NixlJob) -> None:
        """Have a job reported, once, when no piece of it flies and none is to come. Lock held."""
        if not job.open and not job.flying and job.ticket in self._jobs:
            del self._jobs[job.ticket]
            self._over.append(job)
            self._work.notify()

    def _next_over(self) -> int:
        """Report the next job that is over."""
        with self._lock:
            if not self._over:
                return 0
            job = self._over.popleft()
        moved = job.outcomes == Outcome.DONE
        error = None if moved.all() else job.error
        nbytes = int(moved.sum()) * job.plan.source.slot_bytes
        try:
            job.done(Completion(job.ticket, job.outcomes, error, job.ended - job.started, nbytes))
        except Exception:
            logger.exception("the completion of a plan was not processed")
        return 1

    def _fail(self, why: str) -> None:
        """Let nothing more be posted. Lock held."""
        for job in list(self._jobs.values()):
            job.error = job.error or why
            self._end(job)

    # ------------------------------------------------------------------ when something does not end

    def _stuck(self) -> bool:
        # Files end some day; and destroying an agent would not stop their reads.
        limit = min(self._stuck_s, CLOSE_S) if self._closed else self._stuck_s
        return self.backend == "UCX" and time.monotonic() - self._flights[0].begun > limit

    def _restart(self, why: str) -> None:
        """Replace the agent, so that nothing that flew touches memory any more."""
        logger.warning("NIXL (%s) is started anew: %s", self.backend, why)
        self._settle_all(f"NIXL was started anew: {why}")
        self._agent = self._new_agent()
        self.restarts += 1

    def _settle_all(self, why: str) -> None:
        for flight in self._flights:
            if flight.handle is not None:
                self._agent.abandon(flight.handle)
                flight.handle = None
        self._agent.close()
        self._met.clear()
        self._leaving.clear()
        for flight in list(self._flights):
            self._settle(flight, Broken(why))
        with self._lock:
            self._lost = {job.peer for job in self._jobs.values() if job.peer}

    def _new_agent(self) -> Agent:
        return Agent(f"kvbm-{uuid.uuid4().hex}", self.backend, self._options)

    def _obstacle(self, source: Region, destination: Region) -> str | None:
        """Why no bytes can go from one to the other, apart from rows that differ."""
        for region in (source, destination):
            if region.kind not in self._kinds:
                return f"NIXL's {self.backend} does not reach region {region.name!r} of kind {region.kind!r}"
            if any(plane.stride < 0 for plane in region.planes):
                return f"region {region.name!r} runs backwards in memory"
            if region.kind == "object" and len(region.planes) != 1:
                return f"an object of region {region.name!r} would be written in parts"
        far = {"peer", "file", "object"} & {source.kind, destination.kind}
        if self.backend != "UCX" and not far - {"peer"}:
            return f"NIXL's {self.backend} does not move between memories"
        if source.kind == destination.kind and far:
            return f"neither {source.name!r} nor {destination.name!r} is this process's"
        return None
