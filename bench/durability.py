"""What `sync` and encryption cost: writes and reads through the store, against the same store without them."""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import xxhash

from bench.harness import Bench, medians
from kvbm.stores.cipher import Cipher
from kvbm.stores.disk import Disk
from kvbm.stores.folder import Folder
from kvbm.stores.shard import Shard, Sync
from kvbm.testing.store import HostBlocks, Result, key_of, labels
from kvbm.transfer.executor import Executor
from tests.stores.crash import transport

BLOCK, JOB, JOBS, FLIGHT, ROUNDS = 1 << 20, 16, 32, 4, 5


class Bed:
    """A store of its own folder, and as many blocks as it is given in one case."""

    def __init__(self, stack: ExitStack, sync: Sync, cipher: Cipher | None) -> None:
        folder = Folder.claim(Path(stack.enter_context(tempfile.TemporaryDirectory(dir="."))), "bench")
        stack.callback(folder.close)
        what = {"encryption": cipher.id if cipher else ""}
        place = folder.namespace(
            "e" * 64, {}, ranks=1, block_bytes=BLOCK, bound_bytes=(JOB * JOBS + 9) * BLOCK, **what
        ).place
        self.memory, executor = HostBlocks(JOB * FLIGHT, BLOCK), Executor([transport()])
        dice = np.random.default_rng(0)
        for slot in range(JOB * FLIGHT):
            self.memory.put(slot, dice.bytes(BLOCK))
        self.disk = Disk(
            Shard(place, 0, sync=sync), self.memory.region, executor.submit, executor.cancel, cipher=cipher
        )
        stack.callback(executor.close, 1)
        stack.callback(self.disk.close, 1)
        self._turn = 0

    def run(self, *, write: bool) -> None:
        """Write or read everything, some jobs at a time."""
        results: list[Result] = []
        for job in range(JOBS):
            if job >= FLIGHT:
                results[job - FLIGHT].wait()
            memory = np.arange(JOB) + job % FLIGHT * JOB
            slots, keys = np.arange(JOB) + job * JOB, [key_of(job * JOB + i) for i in range(JOB)]
            self._turn, result = self._turn + 1, Result()
            results.append(result)
            if write:
                self.disk.write(self._turn, memory, slots, labels(keys, self._turn * JOB), None, 60, result)
            else:
                self.disk.read(self._turn, slots, memory, keys, 60, result)
        for result in results:
            assert result.wait().error is None, result.wait()


def main() -> int:
    bench, total = Bench("durability"), JOB * JOBS * BLOCK
    syncs: tuple[Sync, ...] = ("never", "batch", "always")
    with ExitStack() as stack:
        beds = {f"sync={sync}": Bed(stack, sync, None) for sync in syncs}
        beds["again"] = Bed(stack, "never", None)
        beds["encrypted"] = Bed(stack, "never", Cipher(bytes(32)))
        for bed in beds.values():
            bed.run(write=True)  # the first time, the file system notes what is written
        for what, write in (("writes", True), ("reads", False)):
            cases = {name: (lambda bed=bed, write=write: bed.run(write=write)) for name, bed in beds.items()}  # type: ignore[misc]
            seconds = medians(ROUNDS, cases)
            bench.info(f"{what}, sync=never, MB/s", round(total / seconds["sync=never"] / 1e6))
            for name in beds:
                if name != "sync=never" and (write or not name.startswith("sync")):
                    bench.row(f"{what}, {name}", "sync=never", seconds["sync=never"] / seconds[name])
        block = bytes(next(iter(beds.values())).memory.get(0, BLOCK))
    begin = time.perf_counter()
    for _ in range(1000):
        xxhash.xxh3_64_intdigest(block)
    bench.info("xxh3, GB/s", round(1000 * BLOCK / (time.perf_counter() - begin) / 1e9, 1))
    return bench.write()


if __name__ == "__main__":
    sys.exit(main())
