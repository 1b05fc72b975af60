"""Blocks to and from a file with a checksum of each, against fio doing as many bytes at the same depth.

python -m bench.disk [--strict]

Both sides use direct I/O on the same file of 1 GiB in build/, and memory of huge pages: a virtual disk may take each
page of memory by itself, and then the size of pages decides. Ours moves plans of 32 MiB, eight at a time, and one
thread checks each block that was read or makes the checksum of each that is written; it is measured without that, too.
Scattered blocks have no neighbours in a plan, so that nothing is merged; each plan is still issued in the order of the
file, and fio's random blocks are not. Consecutive blocks are merged by us and moved one by one by fio.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

import numpy as np
from xxhash import xxh3_64_intdigest

from bench.copy import buffer
from bench.harness import Bench
from kvbm.abc.transport import Completion, Plan
from kvbm.core.outcome import Outcome
from kvbm.core.region import OpenFile, Region, packed
from kvbm.transfer.file import FileTransport

PATH = Path("build/disk.bin")
FILE_BYTES, MOVED_BYTES = 1 << 30, 512 << 20
PLAN_BYTES, WINDOW = 32 << 20, 8
MEMORY_BYTES = PLAN_BYTES * WINDOW
BLOCKS = (64 << 10, 512 << 10, 2 << 20)
ROUNDS = 4
BAR = 0.9
Engine = Literal["io_uring", "threads"]


@dataclass(frozen=True)
class Setup:
    """As many operations in flight on both sides. Stores leave a thread to loads, so they are given one more."""

    engine: Engine
    threads: int
    depth: int
    fio: tuple[str, ...]
    jobs: int

    def transport(self, write: bool) -> FileTransport:
        return FileTransport(self.threads + write, self.depth, self.engine)


SETUPS = (
    (Setup("io_uring", 2, 16, ("--ioengine=io_uring", "--iodepth=32"), 1), BLOCKS),
    (Setup("threads", 8, 1, ("--ioengine=psync", "--numjobs=8"), 8), (512 << 10,)),
)


class Disk:
    """The file, memory for the plans at hand, and the checksums of the file's blocks of each size."""

    def __init__(self) -> None:
        PATH.parent.mkdir(exist_ok=True)
        self.array = buffer(MEMORY_BYTES)
        self.memory = memory = memoryview(self.array)
        self.file = OpenFile(os.open(PATH, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600))
        self.sums: dict[int, list[int]] = {block: [] for block in BLOCKS}
        for start in range(0, FILE_BYTES, MEMORY_BYTES):
            memory[:] = np.random.default_rng(start).bytes(MEMORY_BYTES)
            assert os.pwritev(self.file.fd, [memory], start) == MEMORY_BYTES
            for block, sums in self.sums.items():
                sums += [xxh3_64_intdigest(memory[at : at + block]) for at in range(0, MEMORY_BYTES, block)]
        os.fsync(self.file.fd)

    def regions(self, block: int) -> tuple[Region, Region]:
        host = packed("G2", int(self.array.ctypes.data), [block], MEMORY_BYTES // block, owner=self.array)
        return host, packed("G3", 0, [block], FILE_BYTES // block, kind="file", owner=self.file)


class Ours:
    """MOVED_BYTES through a transport; a call returns the seconds from the first submit to the last checked block."""

    def __init__(self, disk: Disk, setup: Setup, block: int, *, write: bool, scattered: bool) -> None:
        self.disk, self.block, self.write, self.checks = disk, block, write, True
        self.transport = setup.transport(write)
        self.host, self.stored = disk.regions(block)
        slots = np.arange(MOVED_BYTES // block)
        if scattered:  # of each pair of slots one, so that no two are neighbours
            slots = np.random.default_rng(1).permutation(2 * slots)
        per_plan = PLAN_BYTES // block
        self.windows = np.arange(MEMORY_BYTES // block).reshape(WINDOW, per_plan)
        self.plans = slots.reshape(-1, per_plan)
        self.over: SimpleQueue[tuple[np.ndarray, np.ndarray, Completion]] = SimpleQueue()

    def __call__(self) -> float:
        self.disk.array[:] = 0
        begin = time.perf_counter()
        for stored, host in zip(self.plans, self.windows, strict=False):
            self.start(stored, host)
        for stored in self.plans[WINDOW:]:
            self.start(stored, self.finish())
        for _ in range(WINDOW):
            self.finish()
        return time.perf_counter() - begin

    def start(self, stored: np.ndarray, host: np.ndarray) -> None:
        if self.write and self.checks:
            self.sums(host)
        ends = (self.host, host), (self.stored, stored)
        here, there = ends if self.write else ends[::-1]
        plan = Plan(*here, *there, not self.write, "store" if self.write else "load")
        self.transport.submit(plan, lambda completion: self.over.put((stored, host, completion)))

    def finish(self) -> np.ndarray:
        """The slots in memory of the next plan that is over."""
        stored, host, completion = self.over.get()
        assert (completion.outcomes == Outcome.DONE).all(), completion.error
        if self.checks and not self.write:
            sums = self.disk.sums[self.block]
            assert self.sums(host) == [sums[slot] for slot in stored], "these are not the bytes of the file"
        return host

    def sums(self, slots: np.ndarray) -> list[int]:
        memory, block = self.disk.memory, self.block
        return [xxh3_64_intdigest(memory[at : at + block]) for at in (slots * block).tolist()]

    def unchecked(self) -> float:
        self.checks = False
        try:
            return self()
        finally:
            self.checks = True


def fio(setup: Setup, block: int, *, write: bool, scattered: bool) -> float:
    """The seconds in which fio moves MOVED_BYTES (by its own clock, without its start)."""
    each = MOVED_BYTES // setup.jobs
    extent = [f"--size={FILE_BYTES}", f"--io_size={each}"]
    if not scattered:
        extent = [f"--size={each}", f"--offset_increment={each}"]
    arguments = ["fio", "--name=disk", f"--filename={PATH}", "--direct=1", "--output-format=json", "--group_reporting"]
    arguments.append("--iomem_align=2m")
    mode = f"--rw={'rand' if scattered else ''}{'write' if write else 'read'}"
    output = subprocess.run(
        [*arguments, *setup.fio, *extent, mode, f"--bs={block}"],
        env={**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},  # huge pages for its buffers
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    figures = json.loads(output)["jobs"][0]["write" if write else "read"]
    assert figures["io_bytes"] == MOVED_BYTES, figures["io_bytes"]
    return MOVED_BYTES / float(figures["bw_bytes"])


def seconds(cases: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Medians of interleaved rounds, each of which begins with another case."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    order = list(cases.items())
    for _ in range(ROUNDS):
        order.append(order.pop(0))
        for name, case in order:
            taken[name].append(case())
    return {name: statistics.median(values) for name, values in taken.items()}


def measure(bench: Bench, disk: Disk, setup: Setup, block: int, *, write: bool, scattered: bool) -> None:
    ours = Ours(disk, setup, block, write=write, scattered=scattered)

    def theirs() -> float:
        return fio(setup, block, write=write, scattered=scattered)

    median = seconds({"fio": theirs, "fio again": theirs, "ours": ours, "unchecked": ours.unchecked})
    ours.transport.close()
    kind = f"{'scattered' if scattered else 'consecutive'} {'writes' if write else 'reads'}, {block >> 10} KiB"
    what = f"{kind}, {setup.engine}"
    bench.info(what, " / ".join(f"{MOVED_BYTES / median[name] / 1e9:.2f}" for name in ("ours", "fio")) + " GB/s")
    bench.row(f"A/A: fio, {what}", "bandwidth of fio", median["fio"] / median["fio again"])
    bench.row(f"{what}, without checksums", "bandwidth of fio", median["fio"] / median["unchecked"])
    bench.row(f"{what}, with checksums", "bandwidth of fio", median["fio"] / median["ours"], ">=", BAR)


def main() -> int:
    if shutil.which("fio") is None:
        print("bench.disk compares with fio, which is not installed (Debian: apt-get install fio): skipped")
        return 0
    bench, disk = Bench("disk"), Disk()
    bench.info("load before", round(os.getloadavg()[0], 2))
    for write in (False, True):  # what fio writes are not our blocks any more, so reads come first
        for setup, blocks in SETUPS:
            for block in blocks:
                for scattered in (False, True):
                    measure(bench, disk, setup, block, write=write, scattered=scattered)
    PATH.unlink()
    return bench.write()


if __name__ == "__main__":
    sys.exit(main())
