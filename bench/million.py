"""Engine step time with a million registered blocks and everything busy, against the same engine with KVBM empty."""

from __future__ import annotations

import gc
import hashlib
import os
import random
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bench.harness import Bench
from tests.e2e.engine import TINY, Engine

BLOCKS, SLICE, ROUNDS = 1_000_000, 1000, 3
SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
"""A model whose blocks are so small (8 KiB) that a million of them fit into the memory of a laptop."""


def model(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**(TINY | SMALL))).save_pretrained(folder)
    return folder


def fill(engine: Engine) -> None:
    """Registers blocks under keys of their own, leaving room for what the workload stores."""
    pool = engine.leader.core.pool
    for start in range(0, BLOCKS, SLICE):
        keys = [hashlib.sha256(b"%d" % i).digest() for i in range(start, start + SLICE)]
        slots = pool.allocate(SLICE)
        assert slots is not None
        slots.stage(keys).register().drop()


def workload(engine: Engine, dice: random.Random) -> list[float]:
    """Prompts that share a root come and go, generate and are offloaded; hits and misses. Seconds of each step."""
    root = [dice.randrange(3, 1000) for _ in range(512)]
    times: list[float] = []
    for burst in range(40):
        for i in range(4):
            head = root[: 32 * dice.randrange(1, 16)] if i % 2 else []
            engine.add(head + [dice.randrange(3, 1000) for _ in range(200)], 40)
        if burst % 4 == 0:
            engine.vllm.reset_prefix_cache()
        while engine.vllm.has_unfinished_requests():
            begin = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - begin)
    engine.drain()
    engine.settle()
    return times


@contextmanager
def scraping(port: int) -> Iterator[None]:
    """Asks for the metrics twice a second."""
    stop = threading.Event()

    def ask() -> None:
        while not stop.wait(0.5):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def collections() -> Iterator[list[float]]:
    """Seconds of each garbage collection of this process, which is the scheduler's."""
    pauses: list[float] = []
    begin = 0.0

    def note(phase: str, _: dict[str, int]) -> None:
        nonlocal begin
        if phase == "start":
            begin = time.perf_counter()
        else:
            pauses.append(time.perf_counter() - begin)

    gc.callbacks.append(note)
    try:
        yield pauses
    finally:
        gc.callbacks.remove(note)


def main() -> int:
    bench, dice = Bench("million"), random.Random(0)
    port = 20_000 + os.getpid() % 20_000
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(
            model(Path(folder)),
            {"strict": True, "g2_blocks": BLOCKS + 40_000, "metrics": True, "metrics_port": port},
            num_gpu_blocks_override=200,
        )
    with scraping(port):
        workload(engine, dice)
        gc.collect()
        gc.freeze()  # as vLLM's own engine process does once it has started
        empty = [workload(engine, dice) for _ in range(ROUNDS)]
        fill(engine)
        with collections() as pauses:
            full = [workload(engine, dice) for _ in range(ROUNDS)]
            gc.collect()
    assert engine.leader.core.pool.statistics().registered >= BLOCKS
    p99 = [float(np.percentile(np.concatenate(times), 99)) for times in (empty, full)]
    control = [float(np.percentile(times, 99)) for times in empty]
    bench.info(
        "step with KVBM empty, ms",
        {"p50": round(1e3 * float(np.median(np.concatenate(empty))), 2), "p99": round(1e3 * p99[0], 2)},
    )
    bench.row("engine step p99, 1 million blocks", "KVBM empty", p99[1] / p99[0], "<=", 1.05)
    bench.row("A/A: slowest round, KVBM empty", "fastest round", max(control) / min(control))
    bench.row("longest garbage collection, ms", "-", max(pauses) * 1e3, "<=", 10.0)
    engine.close()
    return bench.write()


if __name__ == "__main__":
    sys.exit(main())
