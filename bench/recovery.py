"""A start with a million blocks on disk: how long until the leader knows them, and how much memory that takes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.harness import Bench, medians
from kvbm.stores.disk.format import RECORD, Seal
from kvbm.stores.disk.meta import DiskPlace
from kvbm.stores.disk.recovery import recover

BLOCKS, BLOCK, ROUNDS = 1_000_000, 2 << 20, 5


def fill(place: DiskPlace) -> None:
    """Index files of a million blocks that were written in another order than that of their slots; no data."""
    dice = np.random.default_rng(0)
    records = np.zeros(BLOCKS, dtype=RECORD)
    records["key"] = dice.integers(0, 1 << 63, (BLOCKS, 4), dtype=np.uint64)
    records["sequence"], records["slot"] = dice.permutation(BLOCKS), np.arange(BLOCKS)
    records["length"], records["key_tail"], records["expires"] = BLOCK, 32, np.inf
    Seal(place.fingerprint).close(records)
    for rank in range(place.ranks):
        place.index(rank).write_bytes(place.header(rank) + records.tobytes())
        os.truncate(place.index(rank), place.index_bytes)
        place.data(rank).touch()
        os.truncate(place.data(rank), place.data_bytes)


def read(place: DiskPlace) -> int:
    """The limit: the same bytes, read and thrown away."""
    buffer = bytearray(8 << 20)
    total = 0
    for rank in range(place.ranks):
        with place.index(rank).open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def memory(of: str) -> int:
    """This process's KiB: "VmRSS" now, "VmHWM" at most since that was reset."""
    return int(Path("/proc/self/status").read_text().split(f"{of}:")[1].split()[0])


def grown(folder: str, ranks: int) -> None:
    """In a process of its own: MiB that a recovery, and its keys as Python objects, take at most."""
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    found = recover(DiskPlace(folder, "f" * 64, ranks, BLOCK, BLOCKS, 0), 0.0)
    assert len(found.slots) == len(found.key_list()) == BLOCKS
    print((memory("VmHWM") - before) / 1024)


def main() -> int:
    bench = Bench("recovery")
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2):
            place = DiskPlace(folder, "f" * 64, ranks, BLOCK, BLOCKS, 0)
            fill(place)
            begin = time.perf_counter()
            assert len(recover(place, 0.0).slots) == BLOCKS
            first = time.perf_counter() - begin
            cases = {"recover": lambda p=place: recover(p, 0.0), "read": lambda p=place: read(p)}
            seconds = medians(ROUNDS, cases)
            code = f"from bench.recovery import grown; grown({folder!r}, {ranks})"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            which = f"1 million blocks, {ranks} rank{'s' * (ranks > 1)}"
            bench.row(f"recovery of {which}, seconds", "-", seconds["recover"], "<=", 2.0)
            bench.row("the first one, seconds", "-", first)
            bench.row("memory it adds, GiB", "-", float(done.stdout) / 1024, "<=", 1.0)
            bench.row("the same files read and thrown away, seconds", "-", seconds["read"])
    return bench.write()


if __name__ == "__main__":
    sys.exit(main())
