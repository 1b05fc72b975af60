"""Inter-token latency of running requests while others hit in G2, against while the same others hit on the device."""

from __future__ import annotations

import random
import sys
import time

import numpy as np

from bench.harness import Bench
from bench.model import engine
from tests.e2e.engine import Engine

LENGTH, HITS, EVERY, ROUNDS = 992, 5, 10, 14
"""Tokens of a hitting prompt, such prompts per phase, steps between two of them, rounds."""


def phase(engine: Engine, prompts: list[list[int]], dice: random.Random) -> list[float]:
    """Two requests generate; every ten steps one of `prompts` arrives. Seconds of each step after the first hit."""
    for _ in range(2):
        engine.add([dice.randrange(300, 40_000) for _ in range(32)], HITS * EVERY + 20)
    engine.step()
    times: list[float] = []
    waiting = [*prompts]
    step = 0
    while engine.vllm.has_unfinished_requests():
        if waiting and step % EVERY == 0:
            engine.add([*waiting.pop(0), 7], 1)
        begin = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - begin)
        step += 1
    engine.drain()
    return times[: HITS * EVERY]


def main() -> int:
    bench, dice = Bench("interference"), random.Random(0)
    # The device holds one set of prompts and the running requests: hitting one set evicts the other.
    blocks = HITS * (LENGTH // 32 + 1) + 24
    vllm = engine({"g2_gb": 2}, max_model_len=1024, num_gpu_blocks_override=blocks)
    sets = [[[dice.randrange(300, 40_000) for _ in range(LENGTH)] for _ in range(HITS)] for _ in range(2)]
    for prompts in sets:
        vllm.run(prompts, 1)
        vllm.settle()
    device: list[float] = []
    again: list[float] = []
    g2: list[float] = []
    loaded = 0
    for turn in range(ROUNDS):
        here, gone = sets[(turn + 1) % 2], sets[turn % 2]
        device += phase(vllm, here, dice)
        again += phase(vllm, here, dice)
        before = vllm.status()["onboard"]["blocks"]
        g2 += phase(vllm, gone, dice)
        loaded += vllm.status()["onboard"]["blocks"] - before
    bench.info("blocks loaded in G2 phases", loaded)
    assert loaded > ROUNDS * HITS * (LENGTH // 32) * 0.8
    for share, bar in ((50, 1.05), (99, 1.15)):
        base = float(np.percentile(device, share))
        bench.info(f"p{share} with device hits, ms", round(base * 1e3, 1))
        what = f"inter-token latency p{share}, others hit in G2"
        bench.row(what, "others hit on the device", float(np.percentile(g2, share)) / base, "<=", bar)
        bench.row(f"A/A: p{share}", "others hit on the device", float(np.percentile(again, share)) / base)
    vllm.close()
    return bench.write()


if __name__ == "__main__":
    sys.exit(main())
