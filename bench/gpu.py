"""Copies between a GPU and pinned host memory, beside plain copies of as many bytes: what `make gpu-check` runs.

    python -m bench.gpu [--strict] [--sections NAME,NAME] [--scale 1] [--engine bench.gpu_torch]

Each section is a process of its own that has a limit, so that one that hangs or loses the device costs no other one its
figures; what there is so far is written after each. Seconds are the device's, between two events on an idle stream
that are recorded before the first call and after the last answer. An engine is what computes beside the copies: torch,
or, in tests of this file, a simulated one.
"""

from __future__ import annotations

import argparse
import ctypes as c
import importlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from bench.harness import Bench, medians_of
from kvbm.core.config import Settings
from kvbm.core.region import Plane, Region
from kvbm.link.channel import Link, listen
from kvbm.link.messages import Allot, Copy, Hello, Ready, Result, Step
from kvbm.native import Driver, Lane, Mark
from kvbm.stores.memory import Arena
from kvbm.transfer.cuda import PIECE_BYTES, CudaDevice
from kvbm.transfer.executor import Executor
from kvbm.worker.worker import Worker

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PLANES, ROUNDS = 32, 7
BARS: Final = {64 * KIB: 0.8, 256 * KIB: 0.9, MIB: 0.9, 2 * MIB: 0.9}
"""Of a plain copy's bandwidth; shorter rows have none."""
ROWS: Final = (4 * KIB, 16 * KIB, 32 * KIB, *BARS)
DIRECTIONS: Final = {"down": False, "up": True}
SMALL, SAMPLES = 4 * KIB, 1000
_SETTLE_S: Final = 0.05
NEWEST: Final = 1 << 30
"""Of CUDA: whatever the driver has."""
UNPACED: Final = 1 << 40
"""Bytes of a chunk that all of a copy is in."""


class Engine(Protocol):
    """What computes on device 0, on a stream of its own. On one thread."""

    library: str
    """Of the driver."""

    def current(self) -> int:
        """The stream."""

    def tensor(self, nbytes: int) -> Any:
        """Zeros in the device's memory, as torch's bytes."""

    def pause(self, seconds: float) -> None:
        """Work that takes so long."""

    def products(self) -> Callable[[], None]:
        """What launches matrix products of some milliseconds."""

    def graph(self) -> Callable[[], None]:
        """What replays a graph of products."""

    def capture(self) -> bool:
        """Captures a graph, in the mode that forbids most to other threads, for some milliseconds; whether that went
        well."""


class Calls:
    """The driver's functions that a program uses without KVBM, on device 0. Any thread that has called `use`."""

    def __init__(self, library: str) -> None:
        self._library = c.CDLL(library)
        self._context = c.c_void_p()
        self("cuInit", c.c_uint(0))
        self("cuDevicePrimaryCtxRetain", c.byref(self._context), c.c_int(0))
        self.use()

    def __call__(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._library, name)(*arguments):
            raise RuntimeError(f"{name} answered {code}")

    def use(self) -> None:
        self("cuCtxSetCurrent", self._context)

    def stream(self) -> int:
        """One that does not wait for the default one."""
        made = c.c_void_p()
        self("cuStreamCreate", c.byref(made), c.c_uint(1))
        return made.value or 0

    def event(self) -> c.c_void_p:
        made = c.c_void_p()
        self("cuEventCreate", c.byref(made), c.c_uint(0))
        return made

    def record(self, event: c.c_void_p, stream: int) -> None:
        self("cuEventRecord", event, c.c_void_p(stream))

    def seconds(self, first: c.c_void_p, last: c.c_void_p) -> float:
        """From one event to the other, which is waited for."""
        ms = c.c_float()
        self("cuEventSynchronize", last)
        self("cuEventElapsedTime", c.byref(ms), first, last)
        return ms.value / 1e3

    def wait(self, stream: int) -> None:
        self("cuStreamSynchronize", c.c_void_p(stream))

    def host(self, nbytes: int) -> int:
        """Host memory that the driver allocates."""
        made = c.c_void_p()
        self("cuMemHostAlloc", c.byref(made), c.c_size_t(nbytes), c.c_uint(0))
        return made.value or 0

    def copy(self, destination: int, source: int, nbytes: int, stream: int) -> None:
        self("cuMemcpyAsync", c.c_uint64(destination), c.c_uint64(source), c.c_size_t(nbytes), c.c_void_p(stream))

    def fill(self, address: int, value: int, nbytes: int, stream: int) -> None:
        self("cuMemsetD8Async", c.c_uint64(address), c.c_ubyte(value), c.c_size_t(nbytes), c.c_void_p(stream))


def _bytes(address: int, nbytes: int) -> npt.NDArray[np.uint8]:
    array: npt.NDArray[np.uint8] = np.ctypeslib.as_array((c.c_ubyte * nbytes).from_address(address))
    return array


class Kept(Bench):
    """Writes down each row the moment it is there: the process may be killed."""

    def __init__(self, name: str, out: Path) -> None:
        super().__init__(name)
        self._out = out

    def row(
        self, what: str, against: str, value: float, op: Literal["<=", ">="] | None = None, bar: float | None = None
    ) -> None:
        super().row(what, against, value, op, bar)
        self.keep()

    def keep(self) -> None:
        """All there is until now."""
        beside = self._out.with_suffix(".new")
        beside.write_text(json.dumps(self.said()))
        beside.rename(self._out)


class Machine:
    """Device memory, an arena that is pinned for it, and a lane each way. `scale` is of all sizes: 1 GiB on each side,
    of which a quarter is copied."""

    def __init__(self, engine: Engine, scale: float) -> None:
        self.engine, self.calls, self.driver = engine, Calls(engine.library), Driver(engine.library)
        self.space = max(8 * MIB, int(GIB * scale) // MIB * MIB)
        self.bulk = self.space // 4
        self.device = self.driver.alloc(0, self.space)
        self.arena = Arena(self.space)
        self.arena.touch()
        self.host = _bytes(self.arena.address, self.space)
        self.driver.pin(0, self.arena.address, self.space, self.space)
        self.idle, self.plain = self.calls.stream(), self.calls.stream()
        self.lanes = self.opened(NEWEST)
        self._events = self.calls.event(), self.calls.event()
        self._pinned = self.calls.host(self.space)
        self._staging = _bytes(self._pinned, self.space)
        # Of a period that no power of two divides, so that a plane differs from the one some planes further on.
        period = np.random.default_rng(1).integers(0, 256, 1_000_003, np.uint8)
        self.data = np.resize(period, self.bulk)
        """What memory is filled with to see where bytes go, again after so many bytes."""

    def opened(self, newest: int) -> dict[bool, Lane]:
        """Lanes from the device and to it that call nothing that is newer than this version of CUDA."""
        driver = Driver(self.engine.library, newest)
        return {up: driver.lane(0, up) for up in (False, True)}

    def mark(self) -> Mark:
        """Of a stream on which nothing runs."""
        return self.driver.mark(0, self.idle)

    def timed(self, call: Callable[[], object]) -> float:
        """Seconds of what `call` has waited for."""
        first, last = self._events
        self.calls.record(first, self.idle)
        call()
        self.calls.record(last, self.idle)
        return self.calls.seconds(first, last)

    def plainly(self, *, up: bool) -> None:
        """One copy of as many bytes to or from memory of the driver's own."""
        ends = (self.device, self._pinned) if up else (self._pinned, self.device)
        self.calls.copy(*ends, self.bulk, self.plain)
        self.calls.wait(self.plain)

    def get(self, at: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """Device memory from there on, until the next call."""
        self.calls.copy(self._pinned, self.device + at, nbytes, self.plain)
        self.calls.wait(self.plain)
        return self._staging[:nbytes]

    def put(self) -> None:
        """Device memory becomes what `data` says."""
        self._staging[: self.bulk] = self.data
        for at in range(0, self.space, self.bulk):
            self.calls.copy(self.device + at, self._pinned, self.bulk, self.plain)
        self.calls.wait(self.plain)

    def fill(self, value: int) -> None:
        """All of the device's memory."""
        self.calls.fill(self.device, value, self.space, self.plain)
        self.calls.wait(self.plain)


class Blocks:
    """Scattered blocks of up to 32 rows of so many bytes: a quarter of the memory. On the device a plane for each row,
    evenly spaced or not; in host memory all rows of a block together."""

    def __init__(
        self, machine: Machine, row: int, *, even: bool = True, newest: int = NEWEST, sums: bool = False
    ) -> None:
        self.machine, self.row = machine, row
        self._lanes = machine.lanes if newest == NEWEST else machine.opened(newest)
        self.planes = max(1, min(PLANES, machine.space // (8 * row)))
        self.slots = machine.space // (self.planes * row)
        order = [*range(0, self.planes, 1 if even else 2), *([] if even else range(1, self.planes, 2))]
        self._order = np.array(order, np.int64)
        slot = self.planes * row
        self._device = machine.device + self._order * self.slots * row, np.full(self.planes, row, np.int64)
        self._host = machine.arena.address + np.arange(self.planes) * row, np.full(self.planes, slot, np.int64)
        self._rows = np.full(self.planes, row, np.int64)
        random = np.random.default_rng(row)
        self.source, self.destination = (random.permutation(self.slots)[: max(1, self.slots // 4)] for _ in range(2))
        self.nbytes = len(self.source) * slot
        self._sums = np.zeros(len(self.source), np.int64) if sums else None

    def copy(self, *, up: bool, chunk: int = 0) -> None:
        """All blocks; returns when they are there."""
        machine, control = self.machine, np.zeros(2, np.int64)
        (src, src_stride), (dst, dst_stride) = (self._host, self._device) if up else (self._device, self._host)
        self._lanes[up].copy(
            src, src_stride, dst, dst_stride, self._rows, self.source, self.destination, control, machine.mark(),
            machine.arena.address, machine.space, chunk, self._sums,
        )  # fmt: skip
        assert control[0] == len(self.source)

    def right(self, *, up: bool) -> bool:
        """Whether a copy brings each byte to its place."""
        machine, plane = self.machine, self.slots * self.row
        if up:
            for at in range(0, machine.space, machine.bulk):
                machine.host[at : at + machine.bulk] = machine.data
            machine.fill(0)
        else:
            machine.host[:] = 0
            machine.put()
        self.copy(up=up)
        here = machine.host[: plane * self.planes].reshape(self.slots, self.planes, self.row)
        for at, place in enumerate(self._order.tolist()):
            there = machine.get(place * plane, plane).reshape(self.slots, self.row)
            source, destination = (here[:, at], there) if up else (there, here[:, at])
            if not (destination[self.destination] == source[self.source]).all():
                return False
        return True


# ---------------------------------------------------------------------- sections


def bandwidth(bench: Bench, machine: Machine) -> None:
    """Against a plain copy of as many bytes, by row, direction and method."""
    for row in ROWS:
        ways = {"": Blocks(machine, row)}
        if ways[""].planes > 2:  # else the first is the same
            ways[", batches"] = Blocks(machine, row, even=False)
            ways[", batches of CUDA 12.8"] = Blocks(machine, row, even=False, newest=12080)
            ways[", a call per row"] = Blocks(machine, row, even=False, newest=12040)
        ways[", with checksums"] = Blocks(machine, row, sums=True)
        for direction, up in DIRECTIONS.items():
            plain = partial(machine.timed, partial(machine.plainly, up=up))
            cases = {"plain": plain, "plain again": plain}
            for name, blocks in ways.items():
                if not blocks.right(up=up):
                    raise RuntimeError(f"rows of {row >> 10} KiB, {direction}{name}: bytes are in the wrong place")
                cases[name] = partial(machine.timed, partial(blocks.copy, up=up))
            took = medians_of(ROUNDS, cases)
            size = f"{direction}, {row >> 10} KiB rows"
            bench.info(f"plain, {size}", f"{machine.bulk / took['plain'] / 1e9:.1f} GB/s")
            bench.row(f"A/A: {size}", "bandwidth of a plain copy", took["plain"] / took["plain again"])
            for name, blocks in ways.items():
                value = took["plain"] / machine.bulk / (took[name] / blocks.nbytes)
                bar = None if name else BARS.get(row)
                bench.row(f"{size}{name}", "bandwidth of a plain copy", value, ">=", bar)
    _both(bench, machine)


def _both(bench: Bench, machine: Machine) -> None:
    """Both directions at once."""
    blocks = Blocks(machine, 256 * KIB)
    alone = {name: partial(machine.timed, partial(blocks.copy, up=up)) for name, up in DIRECTIONS.items()}
    with ThreadPoolExecutor(2) as pool:

        def both() -> None:
            for each in [pool.submit(blocks.copy, up=up) for up in (False, True)]:
                each.result()

        took = medians_of(ROUNDS, {**alone, "again": alone["down"], "both": partial(machine.timed, both)})
    bench.row("A/A: down, 256 KiB rows", "bandwidth of it alone", took["down"] / took["again"])
    for name in DIRECTIONS:
        bench.row(f"{name}, 256 KiB rows, both directions at once", "bandwidth of it alone", took[name] / took["both"])


@contextmanager
def _beside(machine: Machine, up: bool | None, chunk: int = 0) -> Iterator[list[float]]:
    """Copies without end on another thread, None: none. At the end the list says how many bytes per second they were.
    Raises what a copy raised."""
    stop, rate = threading.Event(), list[float]()

    def work(blocks: Blocks, up: bool) -> None:
        copies, begun = 0, time.perf_counter()
        while not stop.is_set() or not copies:
            blocks.copy(up=up, chunk=chunk)
            copies += 1
        rate.append(copies * blocks.nbytes / (time.perf_counter() - begun))

    if up is None:
        time.sleep(_SETTLE_S)
        yield rate
        return
    # Unevenly spaced, so that a chunk of all is one batch after another without a pause.
    with ThreadPoolExecutor(1) as pool:
        copying = pool.submit(work, Blocks(machine, 64 * KIB, even=False), up)
        time.sleep(_SETTLE_S)
        try:
            yield rate
        finally:
            stop.set()
            copying.result()


def small(bench: Bench, machine: Machine) -> None:
    """What the engine's own small copies wait for, beside a store in chunks of several sizes."""
    calls, stream = machine.calls, machine.calls.stream()
    here, events = calls.host(SMALL), (calls.event(), calls.event())
    there = machine.driver.alloc(0, SMALL)

    def sample(*, up: bool) -> float:
        time.sleep(1e-4)
        calls.record(events[0], stream)
        calls.copy(*((there, here) if up else (here, there)), SMALL, stream)
        calls.record(events[1], stream)
        return calls.seconds(*events)

    for direction, up in DIRECTIONS.items():

        def p99(copies: bool | None, chunk: int = 0, up: bool = up, direction: str = direction) -> float:
            with _beside(machine, copies, chunk) as rate:
                at = float(np.percentile([sample(up=up) for _ in range(SAMPLES)], 99)) * 1e3
            for each in rate:
                bench.info(f"beside, {direction}, chunks of {chunk >> 20} MiB (0: paced)", f"{each / 1e9:.1f} GB/s")
            return at

        alone, again = p99(None), p99(None)
        what = f"4 KiB {direction}, p99 of {SAMPLES}, ms"
        bench.row(f"A/A: {what}", "it alone", again / alone)
        bench.row(f"{what}, alone", "a wall clock", alone)
        paced = p99(up)
        bench.row(f"{what}, beside copies {direction}", "a wall clock", paced, "<=", None if up else 0.5)
        bench.row(f"A/A: {what}, beside copies {direction}", "it the first time", p99(up) / paced)
        for size in (2, 8, 32, 64):
            bench.row(f"{what}, in chunks of {size} MiB", "a wall clock", p99(up, size * MIB))
        unpaced = p99(up, UNPACED) / paced
        bench.row(f"{what}, in one chunk", "it beside paced copies", unpaced, ">=", None if up else 2.0)


def interference(bench: Bench, machine: Machine) -> None:
    """Matrix products and a graph, with copies beside them."""
    calls, events = machine.calls, (machine.calls.event(), machine.calls.event())

    def sample(work: Callable[[], None]) -> float:
        stream = machine.engine.current()
        calls.record(events[0], stream)
        work()
        calls.record(events[1], stream)
        return calls.seconds(*events)

    for name, work in {"matrix products": machine.engine.products(), "a graph": machine.engine.graph()}.items():

        def seconds(copies: bool | None, work: Callable[[], None] = work, name: str = name) -> float:
            with _beside(machine, copies) as rate:
                for _ in range(10):  # until clocks are what they are under load
                    sample(work)
                at = float(np.median([sample(work) for _ in range(30)]))
            if rate:
                bench.info(f"copies {'up' if copies else 'down'} beside {name}", f"{rate[0] / 1e9:.1f} GB/s")
            return at

        cases: dict[str, bool | None] = {"alone": None, "again": None, "stores": False, "loads": True}
        took = medians_of(8, {case: partial(seconds, copies) for case, copies in cases.items()})
        bench.row(f"A/A: {name}", "seconds of it alone", took["again"] / took["alone"])
        barred = name == "matrix products"
        for case in ("stores", "loads"):
            value = took[case] / took["alone"]
            what = f"{name}, beside {case}"
            bench.row(what, "seconds of it alone", value, "<=", 1.03 if barred else None)


def ordering(bench: Bench, machine: Machine) -> None:
    """A store waits for what writes its blocks, a load for what still uses them; and without a mark they do not."""
    calls, engine, tries = machine.calls, machine.engine, 20
    one, control = np.zeros(1, np.int64), np.zeros(2, np.int64)
    device, size, host = (np.array([each], np.int64) for each in (machine.device, MIB, machine.arena.address))

    def wrong(value: int, *, up: bool, marked: bool) -> bool:
        calls.fill(machine.device, 77, MIB, machine.plain)
        calls.wait(machine.plain)
        machine.host[:MIB] = 99
        engine.pause(2e-3)
        calls.fill(machine.device, value, MIB, engine.current())
        mark = machine.driver.mark(0, engine.current()) if marked else machine.mark()
        control[:] = 0
        sides = (host, size, device, size) if up else (device, size, host, size)
        pinned = machine.arena.address, machine.space
        machine.lanes[up].copy(*sides, size, one, one, control, mark, *pinned, 0, None)
        calls.wait(engine.current())
        if up:
            return not (machine.get(0, MIB) == 99).all()
        return not (machine.host[:MIB] == value).all()

    for marked in (True, False):
        for what, up in {"stores": False, "loads": True}.items():
            count = sum(wrong(value, up=up, marked=marked) for value in range(tries))
            if marked:
                bench.row(f"wrong {what} of {tries}", "none", count, "<=", 0)
            else:
                bench.row(f"control: wrong {what} of {tries} without the mark", "some", count, ">=", 1)


def capture(bench: Bench, machine: Machine) -> None:
    """Graphs are captured while copies run and host memory is pinned; another thread's question spoils them."""
    tries, over, event = 20, threading.Event(), machine.calls.event()
    more = Arena(64 * MIB)
    more.touch()
    machine.calls.record(event, machine.idle)

    def pins() -> int:
        """How often."""
        count = 0
        while not over.is_set():
            machine.driver.pin(0, more.address, more.size, more.size)
            machine.driver.unpin(more.address)
            count += 1
        return count

    def asks() -> None:
        machine.calls.use()
        while not over.is_set():
            with suppress(RuntimeError):  # what the driver answers does not matter
                machine.calls("cuEventQuery", event)
            time.sleep(1e-4)

    with ThreadPoolExecutor(1) as pool, _beside(machine, False), _beside(machine, True):
        pinning = pool.submit(pins)
        try:
            spoiled = sum(not machine.engine.capture() for _ in range(tries))
        finally:
            over.set()
    bench.row("times that memory was pinned beside", "1", pinning.result(), ">=", 1)
    bench.row(f"graphs spoiled of {tries} that were captured beside copies", "none", spoiled, "<=", 0)
    over.clear()
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(asks)
        try:
            failed = any(not machine.engine.capture() for _ in range(3))
        finally:
            over.set()
        asking.result()
    bench.row("control: a graph was spoiled by another thread's questions", "1", int(failed), ">=", 1)


class Leader:
    """The other end of a worker's channel."""

    def __init__(self, g1: Region, device: CudaDevice, slots: int, folder: Path) -> None:
        hello = Hello(0, 1, "gpu-check", g1.slot_bytes)
        with listen(folder / "gpu.chan") as sock:
            self.worker = Worker(Settings(), g1, hello, folder / "gpu.chan", Executor(device.transports()))
            self.link = Link(sock.accept()[0])
        assert self.link.wait(60) == hello
        self.link.send(Allot(slots))
        assert isinstance(ready := self.link.wait(60), Ready), ready
        self._job = 0

    def copy(self, kind: str, g1: Sequence[int], g2: Sequence[int]) -> None:
        """Store or load these blocks, in a step of their own."""
        self._job += 1
        step = Step(**{kind: [Copy.of(self._job, str(self._job), g1, g2)]})  # type: ignore[arg-type]
        self.worker.before_step(step)
        self.worker.before_forward(step)
        self.worker.after_forward(step)
        result = self.link.wait(60)
        assert isinstance(result, Result), result
        assert not any(result.outcomes), result

    def close(self) -> None:
        self.worker.close()
        self.link.close()


def model(bench: Bench, machine: Machine) -> None:
    """KV of a small Llama goes down and comes back into other blocks, and nothing that is computed from it changes."""
    from bench.gpu_model import BLOCK, Llama

    llama = Llama(machine.engine)
    blocks, prompt, more = llama.blocks, 16 * BLOCK, BLOCK
    device = CudaDevice(machine.driver, 0, machine.engine.current, keep=llama)
    g1 = Region("g1", "cuda", blocks, tuple(Plane(*each) for each in llama.planes()), owner=device)
    tokens = np.random.default_rng(2).integers(0, llama.vocabulary, prompt + more)
    first, second = list(range(16)), list(range(40, 24, -1))
    with tempfile.TemporaryDirectory() as folder, closing(Leader(g1, device, 64, Path(folder))) as leader:
        llama.compute(tokens[:prompt], 0, [*first, 16])
        expected = llama.compute(tokens[prompt:], prompt, [*first, 16])
        g2 = list(range(63, 47, -1))
        leader.copy("stores", first, g2)
        llama.forget()
        differs = {}
        for name, order in {"right": g2, "control": [g2[1], *g2[1:]]}.items():
            leader.copy("loads", second, order)
            differs[name] = llama.compute(tokens[prompt:], prompt, [*second, 20]) != expected
    bench.row("answers that changed, KV from host memory", "none", int(differs["right"]), "<=", 0)
    bench.row("control: answers that changed, one block that is another", "some", int(differs["control"]), ">=", 1)


def pinning(bench: Bench, machine: Machine, most: int = 64 * GIB) -> None:
    """An arena of half the free memory, at most 64 GiB."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * KIB
    size = min(most if machine.space >= GIB else 64 * MIB, free // 2) // (2 * MIB) * 2 * MIB
    steps: dict[str, Callable[[], object]] = {}
    with closing(Arena(size)) as arena:
        piece = PIECE_BYTES // (2 * MIB) * 2 * MIB
        steps["touched"] = arena.touch
        steps["pinned"] = lambda: machine.driver.pin(0, arena.address, size, piece)
        steps["given back"] = lambda: machine.driver.unpin(arena.address)
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            took = time.perf_counter() - begun
            bench.row(f"seconds per GiB, {size / GIB:.1f} GiB {name}", "a wall clock", took / (size / GIB))


SECTIONS: Final[dict[str, tuple[Callable[[Bench, Machine], None], int]]] = {
    "ordering": (ordering, 35), "bandwidth": (bandwidth, 90), "small": (small, 55), "interference": (interference, 50),
    "capture": (capture, 35), "model": (model, 40), "pinning": (pinning, 80),
}  # fmt: skip
"""In this order, and the seconds that each may take: together less than 6.5 minutes."""


def _section(name: str, engine: str, scale: float, out: Path) -> None:
    """In a process of its own."""
    bench = Kept(name, out)
    machine = Machine(importlib.import_module(engine).engine(), scale)
    version = machine.driver.version
    bench.info("device", machine.driver.describe(0)[0])
    bench.info("driver", f"CUDA {version // 1000}.{version % 1000 // 10}, copies by {machine.driver.call}")
    SECTIONS[name][0](bench, machine)
    bench.keep()


def _run(bench: Bench, name: str, options: argparse.Namespace, folder: Path) -> None:
    """Another process's rows, or why there are none."""
    out, limit = folder / f"{name}.json", SECTIONS[name][1]
    begun = time.monotonic()
    command = [sys.executable, "-m", "bench.gpu", "--only", name, "--engine", options.engine]
    command += ["--scale", str(options.scale), "--out", str(out)]
    with (folder / f"{name}.err").open("w+") as errors:
        try:
            status = subprocess.run(command, timeout=limit, stderr=errors).returncode
            ended = f"it ended with {status}" if status else ""
        except subprocess.TimeoutExpired:
            ended = f"it took longer than {limit} s"
        errors.seek(0)
        said = errors.read().strip().splitlines()[-20:]
    if out.exists():
        bench.take(json.loads(out.read_text()))
    bench.row(f"section {name} ran to its end", "1", int(not ended), ">=", 1)
    bench.info(f"section {name}", f"{time.monotonic() - begun:.0f} s")
    if ended:
        bench.info(f"why not {name}", [ended, *said])


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--engine", default="bench.gpu_torch")
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        _section(options.only, options.engine, options.scale, options.out)
        return 0
    wanted = options.sections.split(",")
    if unknown := set(wanted) - SECTIONS.keys():
        parser.error(f"no section is called {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    bench = Bench("gpu")
    with tempfile.TemporaryDirectory() as folder:
        for name in wanted:
            _run(bench, name, options, Path(folder))
            status = bench.write()
    return status


if __name__ == "__main__":
    sys.exit(main())
