"""What it costs to know what weights contain: their digest against reading the file, and the start after that."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.harness import RESULTS, Bench, medians_of
from kvbm.stores.content import Chosen, Contents
from kvbm.stores.stamps import Start

SIZE, PIECE, SEGMENT = 1 << 30, 1 << 20, 32 << 20
ROUNDS = 7
FOLDER, CACHE = RESULTS.parent / "identity", RESULTS.parent / "identity-cache"
START = Start(time.time_ns() + 10**18)


def read(path: Path, threads: int = 1) -> None:
    """All of it, and nothing is done with it."""
    file = os.open(path, os.O_RDONLY)

    def segment(at: int) -> None:
        buffer, end = bytearray(PIECE), at + SEGMENT
        while at < end and (count := os.preadv(file, [buffer], at)):
            at += count

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(segment, range(0, SIZE, SEGMENT)))
    os.close(file)


def forget(path: Path) -> None:
    """Have the page cache drop it."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def timed(path: Path, work: Callable[[], None], *, cold: bool) -> Callable[[], float]:
    def once() -> float:
        shutil.rmtree(CACHE, ignore_errors=True)
        forget(path) if cold else read(path)
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun

    return once


def main() -> int:
    bench = Bench("identity")
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "weights"
    try:
        with path.open("wb") as file:
            for _ in range(SIZE // PIECE):
                file.write(os.urandom(PIECE))
        os.utime(path)
        time.sleep(2.1)  # or its digest is not remembered
        chosen = [Chosen((("", str(path.absolute())),), (str(FOLDER.absolute()),))]
        contents = Contents(CACHE.absolute())

        def digest() -> None:
            contents.identify(lambda: chosen, START)

        for cold, name, threads in ((False, "page cache", 1), (True, "disk", 4)):
            result = medians_of(
                ROUNDS,
                {
                    "read": timed(path, lambda threads=threads: read(path, threads), cold=cold),  # type: ignore[misc]
                    "again": timed(path, lambda threads=threads: read(path, threads), cold=cold),  # type: ignore[misc]
                    "digest": timed(path, digest, cold=cold),
                },
            )
            against = f"reading it from the {name}, {threads} thread(s)"
            bench.row(f"digest, {name}: speed", against, result["read"] / result["digest"], ">=", 0.8)
            bench.row(f"reading again, {name}: speed", against, result["read"] / result["again"])
            bench.row(f"digest, {name}: GB/s", "-", SIZE / result["digest"] / 1e9)
        digest()
        begun = time.perf_counter()
        digest()
        bench.row("the digest of a second start, ms", "-", (time.perf_counter() - begun) * 1e3, "<=", 10.0)
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.rmtree(CACHE, ignore_errors=True)
    return bench.write()


if __name__ == "__main__":
    sys.exit(main())
