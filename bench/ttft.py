"""Time to first token at a hit in G2, against the engine's own prefix hit and against computing it."""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Sequence

from bench.harness import Bench
from bench.model import engine
from tests.e2e.engine import Engine

LENGTHS = (1000, 2000, 3000)
PROMPTS = 3
ROUNDS = 5
BARS = {"async": 1.15, "sync": 1.10}


def first_token(engine: Engine, prompt: Sequence[int]) -> float:
    """Seconds from the request's arrival to its first token."""
    begin = time.perf_counter()
    name = engine.add(prompt, 1)
    while not engine.results[name].tokens:
        engine.step()
    seconds = time.perf_counter() - begin
    engine.drain()
    return seconds


def measure(bench: Bench, mode: str) -> None:
    dice = random.Random(0)
    vllm = engine({"onboard": mode, "g2_gb": 4}, max_model_len=4096, num_gpu_blocks_override=300)
    first_token(vllm, [dice.randrange(300, 40_000) for _ in range(64)])
    for length in LENGTHS:
        times: dict[str, list[float]] = {"cold": [], "device": [], "device again": [], "g2": []}
        for _ in range(PROMPTS):
            prompt = [dice.randrange(300, 40_000) for _ in range(length)]
            times["cold"].append(first_token(vllm, prompt))
            vllm.settle()
            for _ in range(ROUNDS):
                times["device"].append(first_token(vllm, prompt))
                vllm.forget_device()
                times["g2"].append(first_token(vllm, prompt))
                times["device again"].append(first_token(vllm, prompt))
            vllm.forget_device()
        median = {name: statistics.median(values) for name, values in times.items()}
        bench.info(f"{mode} {length}, ms", {name: round(value * 1e3, 1) for name, value in median.items()})
        what = f"G2 hit, {mode}, {length} tokens"
        # Each G2 hit against the device hits right before and after it: the machine drifts more than they differ.
        around = [(a + b) / 2 for a, b in zip(times["device"], times["device again"], strict=True)]
        ratios = [g2 / near for g2, near in zip(times["g2"], around, strict=True)]
        controls = [b / a for a, b in zip(times["device"], times["device again"], strict=True)]
        bench.row(what, "device prefix hit", statistics.median(ratios), "<=", BARS[mode])
        bench.row(f"A/A: device hit, {length} tokens", "device prefix hit", statistics.median(controls))
        bar = 0.10 if length >= 2000 else None
        bench.row(what, "cold", median["g2"] / median["cold"], "<=" if bar else None, bar)
    assert vllm.status()["onboard"]["blocks"] >= PROMPTS * ROUNDS * sum((n - 1) // 32 for n in LENGTHS)
    vllm.close()


def main() -> int:
    bench = Bench("ttft")
    for mode in BARS:
        measure(bench, mode)
    return bench.write()


if __name__ == "__main__":
    sys.exit(main())
