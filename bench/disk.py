"""Blocks through the disk tier's store, checksums on, against fio doing as many bytes with the same engine and depth.

python -m bench.disk [--strict]

Ours is what a worker runs: the same store and transport, jobs of 32 MiB, 256 MiB in flight. A read makes and compares
each block's checksum. A write stores it: a worker makes it when the block comes from the engine, once for all tiers;
what it costs to make it in the write is a row without a bar. Both sides use direct I/O on the same file of 1 GiB, in
build/, and huge pages: a virtual disk may take each page of memory by itself, and then the size of pages decides. Of
scattered blocks no two are neighbours in a job, so that nothing is merged. Neither side syncs (what that costs:
bench.durability), and index and checksums are on our side only.

fio has a buffer for each operation in flight and uses it again at once: with blocks of 64 KiB that is little memory,
which stays in the processor's cache. A store has to put each block into memory of its own. What that costs is shown
by two controls, a bare ring without anything around it: into buffers like fio's, and into memory like ours.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from bench.copy import buffer
from bench.harness import Bench, medians_of
from kvbm.abc.transport import Completion
from kvbm.build.disk import transport
from kvbm.core.config import Settings
from kvbm.core.outcome import Outcome
from kvbm.core.region import Slots, packed
from kvbm.native import Ring
from kvbm.stores.checksum import Words, checksums
from kvbm.stores.disk.cipher import Cipher
from kvbm.stores.disk.disk import Disk
from kvbm.stores.disk.folder import Folder
from kvbm.stores.disk.shard import Shard, Sync
from kvbm.testing.store import key_of, labels
from kvbm.transfer.executor import Executor

FOLDER = Path("build")
FILE_BYTES, MOVED_BYTES = 1 << 30, 2 << 30
JOB_BYTES, JOBS = 32 << 20, 8
BLOCKS = (64 << 10, 512 << 10, 2 << 20)
ROUNDS = 5
BAR = 0.9
DEPTHS = {False: 192, True: 128}  # operations in flight: reads may have all three rings, writes leave one free


@dataclass(frozen=True)
class Setup:
    """What a worker uses, and fio with as many operations in flight."""

    settings: Settings
    fio: tuple[str, ...]
    jobs: int = 1


IO_URING = Setup(Settings(g3_engine="io_uring"), ("--ioengine=io_uring",))
THREADS = Setup(Settings(g3_engine="threads"), ("--ioengine=psync", "--numjobs=16"), 16)


class Store:
    """A store of blocks of one size, full, and the memory they come from and go to."""

    def __init__(self, stack: ExitStack, block: int, encryption: str = "") -> None:
        self.block, self.slots = block, FILE_BYTES // block
        folder = Folder.claim(Path(stack.enter_context(tempfile.TemporaryDirectory(dir=FOLDER))), "bench")
        stack.callback(folder.close)
        bound = FILE_BYTES + 2 * self.slots * 128 + (1 << 20)
        self.place = folder.namespace(
            "e" * 64, {}, ranks=1, block_bytes=block, bound_bytes=bound, encryption=encryption
        ).place
        self.path = self.place.data(0)
        self.array = buffer(JOB_BYTES * JOBS)
        self.array[:] = np.frombuffer(np.random.default_rng(0).bytes(self.array.nbytes), dtype=np.uint8)
        self.host = packed("G2", int(self.array.ctypes.data), [block], self.array.nbytes // block, owner=self.array)
        self.sums = checksums(self.host, np.arange(self.host.num_slots), block)
        self.sequence = 0

    def disk(self, stack: ExitStack, setup: Setup, sync: Sync = "never", cipher: Cipher | None = None) -> Disk:
        executor = Executor([transport(setup.settings)])
        stack.callback(executor.close, 5)
        disk = Disk(Shard(self.place, 0, sync=sync), self.host, executor.submit, executor.cancel, cipher=cipher)
        stack.callback(disk.close, 5)
        return disk

    def order(self, scattered: bool) -> Slots:
        """The slots to move, MOVED_BYTES of them, in jobs."""
        slots = np.arange(self.slots)
        if scattered:  # of each pair of slots first the one, later the other
            dice = np.random.default_rng(1)
            slots = np.concatenate([dice.permutation(slots[half::2]) for half in (0, 1)])
        return np.tile(slots, MOVED_BYTES // FILE_BYTES).reshape(-1, JOB_BYTES // self.block)

    def run(self, disk: Disk, jobs: Slots, *, write: bool, sums: Words | None = None) -> float:
        """Move these blocks; the seconds from the first call to the last completion. `sums` of all memory, if known."""
        windows = np.arange(self.host.num_slots).reshape(JOBS, -1)
        keys = [[key_of(slot) for slot in slots] for slots in jobs.tolist()]
        over: SimpleQueue[tuple[int, Completion]] = SimpleQueue()

        def done(job: int, completion: Completion, _: Words) -> None:
            over.put((job, completion))

        begin = time.perf_counter()
        free = list(range(JOBS))
        taken: dict[int, int] = {}
        for job, slots in enumerate(jobs):
            window = free.pop() if free else taken.pop(self.finished(over))
            taken[job] = window
            if write:
                self.sequence += len(slots)
                known = None if sums is None else sums[windows[window]]
                disk.write(job, windows[window], slots, labels(keys[job], self.sequence), known, 60, done)
            else:
                disk.read(job, slots, windows[window], keys[job], 60, done)
        for _ in taken:
            self.finished(over)
        return time.perf_counter() - begin

    @staticmethod
    def finished(over: SimpleQueue[tuple[int, Completion]]) -> int:
        job, completion = over.get()
        assert (completion.outcomes == Outcome.DONE).all(), completion.error
        return job

    def bare(self, jobs: Slots, memory_bytes: int, *, write: bool) -> float:
        """The same on one ring in one call, without merging, index or checksum, to and from so much memory."""
        slots = jobs.ravel()
        memory = np.arange(len(slots)) % (memory_bytes // self.block) * self.block + self.array.ctypes.data
        segments = np.stack((memory, np.full(len(slots), self.block)), axis=1).ravel()
        results, control = np.full(len(slots), -1), np.zeros(2, dtype=np.int64)
        file = os.open(self.path, os.O_RDWR | os.O_DIRECT)
        ring = Ring(DEPTHS[write])
        begin = time.perf_counter()
        ring.run(file, write, slots * self.block, np.arange(len(slots) + 1), segments, results, control)
        seconds = time.perf_counter() - begin
        os.close(file)
        assert (results == self.block).all()
        return seconds

    def fio(self, setup: Setup, *, write: bool, scattered: bool) -> float:
        """The seconds in which fio moves as many bytes (by its own clock, without its start)."""
        each = FILE_BYTES // setup.jobs
        extent = [f"--size={FILE_BYTES if scattered else each}", f"--io_size={MOVED_BYTES // setup.jobs}"]
        if not scattered:
            extent.append(f"--offset_increment={each}")
        if setup is IO_URING:
            extent.append(f"--iodepth={DEPTHS[write]}")
        mode = f"--rw={'rand' if scattered else ''}{'write' if write else 'read'}"
        output = subprocess.run(
            ["fio", "--name=disk", f"--filename={self.path}", "--direct=1", "--output-format=json", "--group_reporting",
             "--iomem_align=2m", "--norandommap", *setup.fio, *extent, mode, f"--bs={self.block}"],
            env={**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},  # huge pages for its buffers
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        figures = json.loads(output)["jobs"][0]["write" if write else "read"]
        assert figures["io_bytes"] == MOVED_BYTES, figures["io_bytes"]
        return MOVED_BYTES / float(figures["bw_bytes"])


def measure(bench: Bench, store: Store, disk: Disk, setup: Setup, *, write: bool, scattered: bool) -> None:
    jobs = store.order(scattered)

    def theirs() -> float:
        return store.fio(setup, write=write, scattered=scattered)

    cases = {"fio": theirs, "fio again": theirs}
    cases["ours"] = lambda: store.run(disk, jobs, write=write, sums=store.sums)
    if write:
        cases["checksums made in the write"] = lambda: store.run(disk, jobs, write=write)
    elif setup is IO_URING:
        hot = min(DEPTHS[write] * store.block, store.array.nbytes)
        cases["bare, fio's memory"] = lambda: store.bare(jobs, hot, write=write)
        cases["bare, our memory"] = lambda: store.bare(jobs, store.array.nbytes, write=write)
    median = medians_of(ROUNDS, cases)
    kind = f"{'scattered' if scattered else 'consecutive'} {'writes' if write else 'reads'}, {store.block >> 10} KiB"
    what = f"{kind}, {setup.settings.g3_engine}"
    bench.info(what, " / ".join(f"{MOVED_BYTES / median[name] / 1e9:.2f}" for name in ("ours", "fio")) + " GB/s")
    bench.row(f"A/A: fio, {what}", "bandwidth of fio", median["fio"] / median["fio again"])
    for name in [*cases][3:]:
        bench.row(f"{what}, {name}", "bandwidth of fio", median["fio"] / median[name])
    bench.row(what, "bandwidth of fio", median["fio"] / median["ours"], ">=", BAR)


def main() -> int:
    if shutil.which("fio") is None:
        print("bench.disk compares with fio, which is not installed (Debian: apt-get install fio): skipped")
        return 0
    bench = Bench("disk")
    bench.info("load before", round(os.getloadavg()[0], 2))
    FOLDER.mkdir(exist_ok=True)
    for setup, block in itertools.product((IO_URING, THREADS), BLOCKS):
        with ExitStack() as stack:
            store = Store(stack, block)
            disk = store.disk(stack, setup)
            store.run(disk, store.order(scattered=False), write=True)
            for write in (False, True):  # what fio writes are not our blocks any more, so reads come first
                for scattered in (False, True):
                    measure(bench, store, disk, setup, write=write, scattered=scattered)
    return bench.write()


if __name__ == "__main__":
    sys.exit(main())
