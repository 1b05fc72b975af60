"""The disk tier under an engine: first token at a hit on disk, and what writing behind the engine costs it."""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from bench import disk
from bench.harness import Bench
from bench.model import engine
from bench.throughput import OPTIONS, against, run
from bench.ttft import first_token
from kvbm.tiers.gate import Gate
from tests.e2e.engine import Engine

LENGTH, SHORT = 2000, 1000
PROMPTS = 3
ROUNDS = 3
WRITER_MB_S = 300
PERIOD_S = 0.05
FOLDER = Path("build")
rates: list[float] = []
"""What second writers reached, MB/s."""


def settle(vllm: Engine) -> None:
    """Until nothing moves any more."""
    vllm.settle()
    disk = vllm.leader.core.lower.stack.tiers["g3"]
    while any(disk.tier.in_flight()) or not disk.demotion.idle:
        vllm.leader.core.tick()
        time.sleep(0.005)


def forget_memory(vllm: Engine) -> None:
    """Only the disk has it from now on."""
    vllm.forget_device()
    with vllm.leader.core.pool.candidates(vllm.leader.core.pool.statistics().total) as held:
        held.evict()


def prompt_of(dice: random.Random, length: int = LENGTH) -> list[int]:
    return [dice.randrange(300, 40_000) for _ in range(length)]


def first_tokens(bench: Bench, folder: Path, peer: disk.Store) -> None:
    """Disk hits between device hits; direct I/O, so the page cache has nothing."""
    dice, times = random.Random(0), dict[str, list[float]]()
    vllm = engine({"g2_gb": 1, "g3_gb": 4, "g3_dir": str(folder)}, max_model_len=4096, num_gpu_blocks_override=300)
    first_token(vllm, prompt_of(dice, 64))
    for _ in range(PROMPTS):
        prompt = prompt_of(dice)
        times.setdefault("cold", []).append(first_token(vllm, prompt))
        settle(vllm)
        for _ in range(ROUNDS):
            times.setdefault("device", []).append(first_token(vllm, prompt))
            forget_memory(vllm)
            times.setdefault("g3", []).append(first_token(vllm, prompt))
            settle(vllm)
            times.setdefault("fio", []).append(peer.fio(disk.IO_URING, write=False, scattered=False))
    median = {name: statistics.median(values) for name, values in times.items()}
    blocks = (LENGTH - 1) // 32
    came, hits = vllm.status()["tokens"]["g3"], PROMPTS * ROUNDS * blocks * 32
    nbytes = blocks * vllm.status()["block_bytes"]
    reading = nbytes * median["fio"] / disk.MOVED_BYTES
    bench.info("first token, ms", {name: round(value * 1e3, 1) for name, value in median.items() if name != "fio"})
    bench.info("fio reads as many bytes in, ms", round(reading * 1e3, 1))
    what = f"G3 hit, {LENGTH} tokens"
    bench.row("tokens that came from the disk", "those of all hits there", came / hits, ">=", 1.0)
    bench.row(
        what, "device prefix hit + the bytes at fio's speed", median["g3"] / (median["device"] + reading), "<=", 1.25
    )
    bench.row(what, "cold", median["g3"] / median["cold"])
    vllm.close()


def partly(bench: Bench, folder: Path) -> None:
    """A disk from which a prompt takes as long as computing another and then it, while that other is being computed.

    Waiting for the disk is then as slow as not having it. What has come when it is the prompt's turn is free.
    """
    dice, times = random.Random(1), dict[str, list[float]]()
    options: dict[str, Any] = {"max_model_len": 2048, "num_gpu_blocks_override": 300, "max_num_seqs": 1}
    plain = engine(None, **options)
    first_token(plain, prompt_of(dice, 64))
    cold = statistics.median(first_token(plain, prompt_of(dice, SHORT)) for _ in range(ROUNDS))
    blocks = (SHORT - 1) // 32
    rate = blocks * 1.4746 / (2 * cold)
    plain.close()
    faults = f"kvbm.testing.faults:build?disk=1&load_rate={rate:.2f}"
    vllm = engine({"g2_gb": 1, "g3_gb": 4, "g3_dir": str(folder), "transport_wrapper": faults}, **options)
    prompts = [prompt_of(dice, SHORT) for _ in range(2 * ROUNDS - 1)]
    for prompt in prompts:
        first_token(vllm, prompt)
        settle(vllm)

    def turn(prompt: list[int]) -> float:
        forget_memory(vllm)
        vllm.add(prompt_of(dice, SHORT), 1)
        seconds = first_token(vllm, prompt)
        settle(vllm)
        return seconds

    shares = []
    for prompt in prompts:
        before = vllm.status()["tokens"]["g3"]
        times.setdefault("both", []).append(turn(prompt))
        shares.append(vllm.status()["tokens"]["g3"] - before)
        for name in ("computed", "computed again"):
            times.setdefault(name, []).append(turn(prompt_of(dice, SHORT)))
        with mock.patch.object(Gate, "objection", return_value=None):
            times.setdefault("loaded", []).append(turn(prompt))
    vllm.close()
    loaded = statistics.median(shares) / (blocks * 32)
    median = {name: statistics.median(values) for name, values in times.items()}
    bench.info("slow disk, MB/s", round(rate, 1))
    bench.info("tokens of a prompt that were loaded from it", shares)
    bench.info("first token behind another prompt, s", {name: round(value, 2) for name, value in median.items()})
    what = f"slow disk, {SHORT} tokens, partly loaded and partly computed"
    # Loading the rest is as fast as computing it, so that a turn may go either way; half of them are to do both.
    bench.row(f"{what}: loaded", "the prompt", loaded, "<=", 1 - 1 / blocks)
    bench.row(f"{what}: loaded", "one block", loaded * blocks, ">=", 1.0)
    bench.row(what, "computed", median["both"] / median["computed"], "<=", 1.0)
    bench.row(what, "loaded", median["both"] / median["loaded"], "<=", 1.0)
    bench.row("A/A: computed", "computed", median["computed again"] / median["computed"])


@contextmanager
def second_writer(vllm: Engine) -> Iterator[None]:
    """Somebody else writes WRITER_MB_S through the same store: blocks of host memory, on disk already or not."""
    over = threading.Event()
    leader, tier = vllm.leader, vllm.leader.core.lower.stack.tiers["g3"].tier
    batch = max(1, int(WRITER_MB_S * 1e6 * PERIOD_S / vllm.status()["block_bytes"]))
    written = 0

    def write() -> None:
        nonlocal written
        due = time.monotonic()
        while not over.wait(max(0.0, due - time.monotonic())):
            due += PERIOD_S
            with leader.core.lock:
                hold = leader.core.pool.candidates(batch)
                taken = tier.write(hold, lambda _, hold=hold: hold.drop())
                written += taken
                if not taken:
                    hold.drop()

    thread = threading.Thread(target=write, daemon=True)
    begin = time.perf_counter()
    thread.start()
    yield
    over.set()
    thread.join()
    rates.append(written * vllm.status()["block_bytes"] / (time.perf_counter() - begin) / 1e6)


@contextmanager
def fio_writer(folder: Path) -> Iterator[None]:
    """The least that writing as much can cost: fio, nothing checked, no index, into memory of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    size = ["--rw=write", "--bs=1m", "--size=1g", "--time_based", "--runtime=600", f"--rate={WRITER_MB_S}m"]
    command = [
        "fio",
        "--name=peer",
        f"--filename={folder}/fio.bin",
        "--direct=1",
        "--fdatasync=300",
        "--iomem_align=2m",
    ]
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    with subprocess.Popen([*command, *disk.IO_URING.fio, *size], env=environment, stdout=subprocess.DEVNULL) as peer:
        yield
        peer.terminate()


def throughput(bench: Bench, folder: Path) -> None:
    """Prompts that share nothing: every block goes to disk, none comes back."""
    dice = random.Random(0)
    plain = engine(None, **OPTIONS)
    kvbm = engine({"g2_gb": 1, "g3_gb": 4, "g3_dir": str(folder)}, **OPTIONS)
    ratio, control = against(plain, kvbm, dice)
    settle(kvbm)
    assert kvbm.status()["demote"]["blocks"] > 0
    bench.row("throughput, nothing shared, written to disk", "the engine without KVBM", ratio, ">=", 0.97)
    bench.row("A/A: the engine without KVBM", "itself", control)
    loaded, limit = [], []
    for _ in range(ROUNDS):
        a1 = run(plain, dice)
        with second_writer(kvbm):
            b = run(kvbm, dice)
        a2 = run(plain, dice)
        with fio_writer(folder):
            c = run(plain, dice)
        loaded.append(b / ((a1 + a2) / 2))
        limit.append(c / ((a2 + run(plain, dice)) / 2))
    reached = statistics.median(rates)
    what = f"the same, and a second writer at {WRITER_MB_S} MB/s"
    bench.row(f"{what}: it wrote", "that", reached / WRITER_MB_S, ">=", 0.9)
    bench.row(what, "the engine without KVBM", statistics.median(loaded), ">=", 0.90)
    alone = "the engine without KVBM, and fio writes as much"
    bench.row(alone, "the engine without KVBM", statistics.median(limit))
    for each in (plain, kvbm):
        each.close()


def main() -> int:
    bench = Bench("g3")
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        with ExitStack() as stack:
            peer = disk.Store(stack, 2 << 20)
            peer.run(peer.disk(stack, disk.IO_URING), peer.order(scattered=False), write=True)
            first_tokens(bench, Path(folder) / "a", peer)
        partly(bench, Path(folder) / "b")
        throughput(bench, Path(folder) / "c")
    return bench.write()


if __name__ == "__main__":
    sys.exit(main())
