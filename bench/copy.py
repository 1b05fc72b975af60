"""Scattered-block copies between an engine's cache (G1) and the arena (G2) against one copy of as many bytes.

python -m bench.copy [--strict]
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle

import numpy as np

from bench.harness import Bench, medians
from kvbm.abc.transport import Completion, Plan
from kvbm.core.region import Plane, Region
from kvbm.native import copy_rows, prefer
from kvbm.stores.memory import Arena
from kvbm.transfer.memcpy import MemcpyTransport
from kvbm.transfer.plan import coalesce

PLANES = 30
BATCH = 384 << 20
"""Bytes per copy: so many that the baseline's memcpy streams too (glibc's does from some hundred MiB on, and is half as
fast below). And beside a busy thread every copy, however small, waits up to 5 ms to get the GIL back: that is in the
figures, but they should show the copy."""
ROUNDS = 15
BARS = {4 << 10: 0.5, 32 << 10: 0.85, 256 << 10: 0.85}
BUSY_BAR = 1.3
WAYS, LONG = ("from start to end", "four pages at once"), 8 << 10
"""How rows from 8 KiB on can be copied; a process measures which is faster, in its first TURNS copies."""
TURNS = 18


class Memory:
    """G1 as 30 tensors, G2 as an arena, each with room for two batches; two plain buffers for the baseline."""

    def __init__(self) -> None:
        self.arena = Arena(2 * BATCH)
        self.arena.touch()
        self.tensors = [buffer(2 * BATCH // PLANES) for _ in range(PLANES)]
        self.plain = buffer(BATCH), buffer(BATCH)

    def regions(self, row: int) -> tuple[Region, Region]:
        slots = 2 * BATCH // (PLANES * row)
        planes = tuple(Plane(int(tensor.ctypes.data), row, row) for tensor in self.tensors)
        return Region("G1", "host", slots, planes, self.tensors), self.arena.region([row] * PLANES, slots)

    def baseline(self, nbytes: int) -> Callable[[], object]:
        source, destination = (buffer[:nbytes] for buffer in self.plain)
        return lambda: np.copyto(destination, source)


class Copy:
    """One batch from `source` to `destination`, of other scattered slots each time."""

    def __init__(self, source: Region, destination: Region) -> None:
        self.source, self.destination, self.rows = source, destination, coalesce(source, destination)
        self.blocks, random = source.num_slots // 2, np.random.default_rng(0)
        scattered = [random.permutation(source.num_slots)[: self.blocks] for _ in range(2 * ROUNDS)]
        self.slots = cycle(scattered)  # made before: drawing them gives up the GIL

    def __call__(self) -> None:
        """One call of the C helper on this thread."""
        rows = self.rows
        copy_rows(
            rows.source_address,
            rows.source_stride,
            rows.destination_address,
            rows.destination_stride,
            rows.row_bytes,
            next(self.slots),
            next(self.slots),
        )

    def submit(self, transport: MemcpyTransport) -> None:
        """The same as a background plan (one thread), until its completion."""
        over = threading.Event()

        def done(completion: Completion) -> None:
            assert completion.error is None
            over.set()

        transport.submit(Plan(self.source, next(self.slots), self.destination, next(self.slots), False, "store"), done)
        over.wait()


def buffer(nbytes: int) -> np.ndarray:
    """Page-aligned memory that is there, with huge pages as an engine's tensors and numpy have them."""
    memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, dtype=np.uint8)
    array[:] = 1
    return array


@contextmanager
def busy_process() -> Iterator[None]:
    """As `busy_python`, in another process: takes as much of the machine, but not the GIL."""
    process = subprocess.Popen([sys.executable, "-c", "while True: sum(range(1000))"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def busy_python() -> Iterator[None]:
    """A thread that wants the GIL all the time."""
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            sum(range(1000))

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def measure(bench: Bench, memory: Memory, row: int, bar: float) -> None:
    g1, g2 = memory.regions(row)
    down, up = Copy(g1, g2), Copy(g2, g1)
    nbytes = down.blocks * g1.slot_bytes
    baseline, size = memory.baseline(nbytes), f"{row >> 10} KiB rows"
    transport = MemcpyTransport(2)
    prefer(-1)
    for _ in range(TURNS):
        down()
    chosen = prefer()
    copies: dict[str, Callable[[], object]] = {f"G1->G2, {size}": down, f"G2->G1, {size}": up}
    whole: dict[str, Callable[[], object]] = {f"G1->G2, {size}, submit to completion": lambda: down.submit(transport)}
    alone = medians(ROUNDS, {"copyto": baseline, "copyto again": baseline, **copies, **whole})
    with busy_python():
        beside = medians(ROUNDS, {"copyto": baseline, **copies, **whole})
    with busy_process():
        apart = medians(ROUNDS, copies)
    transport.close()
    bench.info(f"copyto, {nbytes >> 20} MiB", f"{nbytes / alone['copyto'] / 1e9:.2f} GB/s")
    bench.row(f"A/A: copyto, {size}", "bandwidth of copyto", alone["copyto"] / alone["copyto again"])
    for what in (*copies, *whole):
        bench.row(what, "bandwidth of copyto", alone["copyto"] / alone[what], ">=", bar)
    for way, name in enumerate(WAYS if row >= LONG else ()):
        prefer(way)
        took = medians(ROUNDS, {"copyto": baseline, "this": down})
        used = ", which is chosen" if way == chosen else ""
        bench.row(f"G1->G2, {size}, {name}{used}", "bandwidth of copyto", took["copyto"] / took["this"])
    for what in copies:
        bench.row(f"{what}, beside a busy thread", "time of it alone", beside[what] / alone[what], "<=", BUSY_BAR)
        bench.row(f"{what}, beside a busy process", "time of it alone", apart[what] / alone[what])
    for what in ("copyto", *whole):  # the latter waits for the GIL three times: to begin, to end, and to be told
        bench.row(f"{what}, beside a busy thread", "time of it alone", beside[what] / alone[what])


def main() -> int:
    bench, memory = Bench("copy"), Memory()
    bench.info("load before", round(os.getloadavg()[0], 2))
    for row, bar in BARS.items():
        measure(bench, memory, row, bar)
    return bench.write()


if __name__ == "__main__":
    sys.exit(main())
