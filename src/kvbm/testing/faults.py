"""A transport that goes wrong on purpose."""

from __future__ import annotations

import ctypes
import heapq
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl

import numpy as np

from kvbm.abc.transport import Completion, Plan, Quiet, Transport
from kvbm.core.errors import Misuse
from kvbm.core.outcome import Outcome
from kvbm.core.region import Region
from kvbm.transfer.file import FileTransport
from kvbm.transfer.nixl.transport import NixlTransport
from kvbm.transfer.plan import checked_slots

FAULTS: Final = ("delay", "delayed", "rate", "fail", "flip", "garble", "short", "torn", "lie", "die_after")
ODDS: Final = ("delayed", "fail", "flip", "garble", "short", "torn", "lie")
PREFIXES: Final = ("", "load_", "store_", "fetch_")
OPTIONS: Final = frozenset({"serial", "seed", *(prefix + fault for prefix in PREFIXES for fault in FAULTS)})


def build(inner: Transport, rank: int, query: str) -> Transport:
    """`inner` wrapped as a query string says, e.g. ``store_delay=0.2&fail=0.1&rank=1``; as it is on other ranks.

    It is about copies between host memory and the engine, or, with ``disk=1``, about those to and from disk, or, with
    ``peer=1``, about those from other instances.

    Raises:
        ValueError: an unknown option, one given twice, or a value that is not a number; `inner` is untouched.
    """
    options = _meant(inner, rank, query)
    return inner if options is None else FaultTransport(inner, **options)


def follow(inner: Transport, rank: int, path: str) -> Transport:
    """`inner` with the faults that a file names at the moment (`inject` writes it), so that those of a running engine
    can be changed. Each line is a query string as `build` takes it. What was injected stands beside it, for `injected`,
    in files whose names go on with ``.memory``, ``.disk`` or ``.peer`` and the rank.
    """
    return _Following(inner, rank, Path(path))


def inject(path: Path, *lines: str) -> None:
    """Have all that follow this file do this from their next copy on; nothing, where there is no line."""
    for line in lines:
        _check({name: float(value) for name, value in parse_qsl(line) if name not in ("disk", "peer", "rank")})
    _replace(path, "\n".join(lines))


def injected(path: Path) -> Counter[str]:
    """What has been injected by all that follow this file, e.g. ``disk_load_flip``, in blocks."""
    found: Counter[str] = Counter()
    for told in path.parent.glob(f"{path.name}.*[0-9]"):
        kind = told.suffix[1:].rstrip("0123456789")
        found.update({f"{kind}_{what}": blocks for what, blocks in json.loads(told.read_text()).items()})
    return found


def _kind(transport: Transport) -> str:
    return {FileTransport: "disk", NixlTransport: "peer"}.get(type(transport), "memory")


def _meant(inner: Transport, rank: int, query: str) -> dict[str, float] | None:
    """The options for this transport of this rank; None: they are for others."""
    options: dict[str, float] = {}
    for name, value in parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)):
        if name in options:
            raise ValueError(f"fault option {name!r} is given twice")
        try:
            options[name] = float(value)
        except ValueError:
            raise ValueError(f"fault option {name}={value!r} is not a number") from None
    only = options.pop("rank", rank)
    kinds = [kind for kind in ("disk", "peer") if options.pop(kind, 0)] or ["memory"]
    _check(options)
    return options if only == rank and _kind(inner) in kinds else None


def _check(options: dict[str, float]) -> None:
    """Raise `ValueError` naming the first option that `FaultTransport` does not have or cannot use."""
    for name, value in options.items():
        if name not in OPTIONS:
            known = ", ".join(sorted(OPTIONS | {"disk", "peer", "rank"}))
            raise ValueError(f"unknown fault option {name!r}; there are {known}")
        if value < 0 or (name.endswith(ODDS) and value > 1):
            raise ValueError(f"fault option {name}={value:g} is out of range")


@dataclass(slots=True, eq=False)
class _Job:
    """A plan on its way. `error`: why it has to fail. `inner`: the wrapped transport's ticket once it has one.

    `faults`: what else goes wrong with it; `before`: the destination's bytes, where part of them has to come back.
    """

    plan: Plan
    done: Callable[[Completion], None]
    error: str | None
    faults: frozenset[str] = frozenset()
    before: dict[int, bytes] = field(default_factory=dict)
    inner: int | None = None


class FaultTransport(Transport):
    """Wraps `inner`, which it then owns. What is not made to fail is passed on.

    Options, each also as ``load_…``, ``store_…`` and ``fetch_…`` for plans with that label (which then wins):

    - `delay`: seconds before the copy starts, so that the source is really read later. Delayed plans overlap, unless
      `serial` is 1: then the delay of each begins when that of the one before is over.
    - `delayed`: probability that a plan is delayed, where it is not every one.
    - `rate`: megabytes per second, over all plans of this rank: each waits for its turn, as with `serial`.
    - `fail`: probability that a plan ends `FAILED` with "injected", uncopied.
    - `flip`: probability that, after the copy, one bit in each of the plan's blocks is flipped in the destination
      (host memory or a file), and the outcome is still `DONE`.
    - `garble`: the same, and all bytes of the blocks are overwritten.
    - `torn`: probability that only the first half of each block arrives, and the outcome is still `DONE`.
    - `lie`: probability that nothing is copied, and the outcome is still `DONE`.
    - `short`: probability that only the first half of each block arrives, and the plan ends `FAILED` with "short".
    - `die_after`: the N-th plan kills the transport: `alive()` is False, that plan, those that run and all
      later ones fail.

    `seed` starts the dice. Threads: as any transport; delays and injected failures run on one timer thread.
    """

    def __init__(self, inner: Transport, **options: float) -> None:
        _check(options)
        self._inner = inner
        self._options = options
        self._random = random.Random(int(options.get("seed", 0)))
        self._due = threading.Condition()
        self._timers: list[tuple[float, int]] = []
        self._last_due = 0.0
        self._jobs: dict[int, _Job] = {}
        self._seen: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        """Blocks that something was done to, by label and fault."""
        self._dead: str | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kvbm-faults", daemon=True)
        self._thread.start()

    def reaches(self, source: Region, destination: Region) -> bool:
        return self._inner.reaches(source, destination)

    def submit(self, plan: Plan, done: Callable[[Completion], None]) -> int:
        if not self.reaches(plan.source, plan.destination):
            raise Misuse(f"no way from region {plan.source.name!r} to {plan.destination.name!r}")
        checked_slots(plan)
        running: list[int] = []
        with self._due:
            if self._closed:
                raise Misuse("this transport is closed")
            self._seen.update(("", f"{plan.label}_"))
            if any(self._options.get(f"{of}die_after") == self._seen[of] for of in ("", f"{plan.label}_")):
                self._dead = "the transport died (injected)"
                running = self._fail_all(self._dead)
            fail = self._random.random() < self._option("fail", plan)
            faults = {"flip"} if self._random.random() < self._option("flip", plan) else set()
            ticket = self._seen[""]
            for fault in ("garble", "short", "torn", "lie"):
                # No throw unless asked for, so that a seed means the same faults with and without this option.
                if (odds := self._option(fault, plan)) > 0 and self._random.random() < odds:
                    faults.add(fault)
            error = self._dead or ("injected" if fail else None)
            delay = self._delay(plan)
            self._count(plan, "fail" if fail else "delay" if delay else None, faults)
            self._jobs[ticket] = job = _Job(plan, done, error, frozenset(faults))
            now = time.monotonic()
            rate = self._option("rate", plan)
            begin = max(now, self._last_due) if rate or self._options.get("serial") else now
            turn = len(plan.source_slots) * plan.source.slot_bytes / (rate * 1e6) if rate else 0.0
            self._last_due = begin + delay + turn
            if job.error is None and self._last_due <= now:
                self._pass_on(ticket, job)
            if job.inner is None:
                self._set_timer(0.0 if self._dead else self._last_due, ticket)
        for inner in running:
            self._inner.cancel(inner)
        return ticket

    def cancel(self, ticket: int) -> Quiet:
        with self._due:
            job = self._jobs.get(ticket)
            if job is None:
                return Quiet.QUIESCED
            if job.inner is None:
                job.error = job.error or "cancelled"
                self._set_timer(0.0, ticket)
                return Quiet.QUIESCED
        return self._inner.cancel(job.inner)

    def alive(self) -> bool:
        return not self._closed and self._dead is None and self._inner.alive()

    def close(self) -> None:
        with self._due:
            self._closed = True
            self._fail_all("the transport was closed", running=False)
            self._due.notify()
        self._thread.join()
        self._inner.close()

    def _run(self) -> None:
        while True:
            with self._due:
                if self._closed and all(job.inner is not None for job in self._jobs.values()):
                    return
                if not self._timers:
                    self._due.wait()
                    continue
                due, ticket = self._timers[0]
                if due > (now := time.monotonic()):
                    self._due.wait(due - now)
                    continue
                heapq.heappop(self._timers)
                job = self._jobs.get(ticket)
                if job is None or job.inner is not None:
                    continue  # its timer was brought forward
                if job.error is None:
                    self._pass_on(ticket, job)
                if job.error is None:
                    continue
                del self._jobs[ticket]
            job.done(_failed(ticket, job, job.error))

    def _pass_on(self, ticket: int, job: _Job) -> None:
        """Lock held, so that a cancel finds the job either here or there."""
        if job.faults & {"short", "torn", "lie"}:
            job.before = {int(slot): _peek(job.plan.destination, int(slot)) for slot in job.plan.destination_slots}
        try:
            job.inner = self._inner.submit(job.plan, partial(self._finish, ticket))
        except Misuse as error:
            job.error = str(error)

    def _finish(self, ticket: int, completion: Completion) -> None:
        """On a thread of the wrapped transport."""
        with self._due:
            job = self._jobs.pop(ticket)
            if job.faults and job.error is None:
                for slot in job.plan.destination_slots[completion.outcomes == Outcome.DONE]:
                    self._damage(job, int(slot))
            error = job.error or ("short" if "short" in job.faults else None)
        job.done(replace(completion, ticket=ticket) if error is None else _failed(ticket, job, error))

    def _damage(self, job: _Job, slot: int) -> None:
        region = job.plan.destination
        data = bytearray(_peek(region, slot))
        if "lie" in job.faults:
            data[:] = job.before[slot]
        elif job.before:
            data[len(data) // 2 :] = job.before[slot][len(data) // 2 :]
        if "garble" in job.faults:
            data[:] = b"\x3f" * len(data)
        if "flip" in job.faults:
            data[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
        _poke(region, slot, data)

    def _fail_all(self, reason: str, *, running: bool = True) -> list[int]:
        """Lock held. Returns the wrapped transport's tickets that are left to cancel, without the lock."""
        inner = []
        for ticket, job in self._jobs.items():
            if job.inner is None:
                job.error = job.error or reason
                self._set_timer(0.0, ticket)
            elif running:
                job.error = reason
                inner.append(job.inner)
        return inner

    def _set_timer(self, due: float, ticket: int) -> None:
        heapq.heappush(self._timers, (due, ticket))
        self._due.notify()

    def _delay(self, plan: Plan) -> float:
        odds = self._option("delayed", plan, 1.0)
        return self._option("delay", plan) if odds == 1 or self._random.random() < odds else 0.0

    def _count(self, plan: Plan, first: str | None, others: Iterable[str]) -> None:
        for fault in [first] if first == "fail" else [first, *others]:
            if fault is not None:
                self.injected[f"{plan.label}_{fault}"] += len(plan.destination_slots)

    def _option(self, fault: str, plan: Plan, otherwise: float = 0.0) -> float:
        return self._options.get(f"{plan.label}_{fault}", self._options.get(fault, otherwise))


class _Following(FaultTransport):
    """See `follow`."""

    def __init__(self, inner: Transport, rank: int, path: Path) -> None:
        super().__init__(inner)
        self._rank, self._path, self._read = rank, path, (0, 0)
        self._tally = path.with_name(f"{path.name}.{_kind(inner)}{rank}")

    def submit(self, plan: Plan, done: Callable[[Completion], None]) -> int:
        with self._due:
            self._look()
            before = self.injected.total()
        ticket = super().submit(plan, done)
        with self._due:
            if self.injected.total() != before:
                _replace(self._tally, json.dumps(self.injected))
        return ticket

    def _look(self) -> None:
        """Lock held."""
        status = self._path.stat()
        if (version := (status.st_ino, status.st_mtime_ns)) == self._read:
            return
        self._read, self._options = version, {}
        for line in self._path.read_text().splitlines():
            self._options |= _meant(self._inner, self._rank, line) or {}


def _replace(path: Path, text: str) -> None:
    """At once, for somebody else reads it."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(text)
    fresh.replace(path)


def _failed(ticket: int, job: _Job, error: str) -> Completion:
    outcomes = np.full(len(job.plan.destination_slots), Outcome.FAILED, dtype=np.uint8)
    return Completion(ticket, outcomes, error, 0.0, 0)


def _peek(region: Region, slot: int) -> bytes:
    """A slot's bytes."""
    if region.kind == "host":
        return b"".join(ctypes.string_at(p.address + slot * p.stride, p.row_bytes) for p in region.planes)
    with _plainly(region) as fd:
        return b"".join(os.pread(fd, p.row_bytes, p.address + slot * p.stride) for p in region.planes)


def _poke(region: Region, slot: int, data: bytes | bytearray) -> None:
    """Overwrite a slot."""
    start = 0
    for plane in region.planes:
        row, at = bytes(data[start : start + plane.row_bytes]), plane.address + slot * plane.stride
        if region.kind == "host":
            ctypes.memmove(at, row, len(row))
        else:
            with _plainly(region) as fd:
                os.pwrite(fd, row, at)
        start += plane.row_bytes


@contextmanager
def _plainly(region: Region) -> Iterator[int]:
    """A file region's file, opened without direct I/O, which would want bytes on page boundaries."""
    fd = os.open(f"/proc/self/fd/{region.owner.fd}", os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)
