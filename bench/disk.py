"""Blocks to and from a file with a checksum of each, against fio doing as many bytes at the same depth.

python -m bench.disk [--strict]

Both sides use direct I/O on the same file of 1 GiB in build/, and memory of huge pages: a virtual disk may take each
page of memory by itself, and then the size of pages decides. Ours moves plans of 32 MiB, and checks each block it has
read or makes the checksum of each it writes. Scattered blocks have no neighbours in the file, so that nothing is
merged; each plan is still issued in the order of the file, and fio's random blocks are not. Consecutive blocks are
merged by us and moved one by one by fio.
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
FILE_BYTES, MOVED_BYTES, PLAN_BYTES = 1 << 30, 512 << 20, 32 << 20
BLOCKS = (64 << 10, 512 << 10, 2 << 20)
ROUNDS = 5
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
    """The file, memory for what is moved, and the checksum of every 64 KiB block and larger ones."""

    def __init__(self) -> None:
        PATH.parent.mkdir(exist_ok=True)
        self.array = buffer(MOVED_BYTES)
        self.memory = view = memoryview(self.array)
        view[:] = np.random.default_rng(0).bytes(MOVED_BYTES)
        self.file = OpenFile(os.open(PATH, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600))
        for half in range(2):
            assert os.pwritev(self.file.fd, [view[:MOVED_BYTES]], half * MOVED_BYTES) == MOVED_BYTES
        os.fsync(self.file.fd)
        count = {block: MOVED_BYTES // block for block in BLOCKS}
        self.sums = {b: [xxh3_64_intdigest(view[i * b : (i + 1) * b]) for i in range(n)] for b, n in count.items()}

    def regions(self, block: int) -> tuple[Region, Region]:
        host = packed("G2", int(self.array.ctypes.data), [block], MOVED_BYTES // block, owner=self.array)
        return host, packed("G3", 0, [block], FILE_BYTES // block, kind="file", owner=self.file)


class Ours:
    """MOVED_BYTES through a transport; a call returns the seconds from the first submit to the last checked block."""

    def __init__(self, disk: Disk, setup: Setup, block: int, *, write: bool, scattered: bool) -> None:
        self.disk, self.block, self.write = disk, block, write
        self.transport = setup.transport(write)
        self.host, self.stored = disk.regions(block)
        blocks, per_plan = MOVED_BYTES // block, PLAN_BYTES // block
        slots = np.arange(blocks)
        if scattered:  # of each pair of slots one, so that no two are neighbours
            slots = np.random.default_rng(1).permutation(2 * slots)
        self.plans = list(zip(slots.reshape(-1, per_plan), np.arange(blocks).reshape(-1, per_plan), strict=True))

    def __call__(self) -> float:
        over: SimpleQueue[tuple[int, Completion]] = SimpleQueue()
        if not self.write:
            self.disk.array[:] = 0  # so that what is checked has been read now
        begin = time.perf_counter()
        for number, (stored, host) in enumerate(self.plans):
            if self.write:
                for slot in host:
                    self.sum(int(slot))
                plan = Plan(self.host, host, self.stored, stored, False, "store")
            else:
                plan = Plan(self.stored, stored, self.host, host, True, "load")
            self.transport.submit(plan, lambda completion, number=number: over.put((number, completion)))
        for _ in self.plans:
            number, completion = over.get()
            assert (completion.outcomes == Outcome.DONE).all(), completion.error
            if not self.write:
                sums = self.disk.sums[self.block]
                for stored, host in zip(*self.plans[number], strict=True):
                    assert self.sum(int(host)) == sums[int(stored) % len(sums)], "the file has other bytes"
        return time.perf_counter() - begin

    def sum(self, slot: int) -> int:
        return xxh3_64_intdigest(self.disk.memory[slot * self.block : (slot + 1) * self.block])


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

    median = seconds({"fio": theirs, "fio again": theirs, "ours": ours})
    ours.transport.close()
    kind = f"{'scattered' if scattered else 'consecutive'} {'writes' if write else 'reads'}, {block >> 10} KiB"
    what = f"{kind}, {setup.engine}"
    bench.info(what, " / ".join(f"{MOVED_BYTES / median[name] / 1e9:.2f}" for name in ("ours", "fio")) + " GB/s")
    bench.row(f"A/A: fio, {what}", "bandwidth of fio", median["fio"] / median["fio again"])
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
