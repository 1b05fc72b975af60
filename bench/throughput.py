"""What KVBM costs prompts that share nothing: every block is offloaded and none ever comes back."""

from __future__ import annotations

import random
import statistics
import sys
import time

from bench.harness import Bench
from bench.model import engine
from tests.e2e.engine import Engine

ROUNDS = 5
OPTIONS = {"max_model_len": 512, "num_gpu_blocks_override": 120}
REQUESTS, PROMPT, ANSWER = 8, 256, 48


def run(engine: Engine, dice: random.Random) -> float:
    """Tokens per second, prompts and answers."""
    prompts = [[dice.randrange(300, 40_000) for _ in range(PROMPT)] for _ in range(REQUESTS)]
    begin = time.perf_counter()
    engine.run(prompts, ANSWER)
    return REQUESTS * (PROMPT + ANSWER) / (time.perf_counter() - begin)


def against(plain: Engine, kvbm: Engine, dice: random.Random, rounds: int = ROUNDS) -> tuple[float, float]:
    """Tokens per second of `kvbm` over those of `plain`, and of `plain` over itself."""
    for each in (plain, kvbm):
        run(each, dice)
    ratios, controls = [], []
    for turn in range(rounds):
        # A B A, so that a slow drift of the machine cancels out; the order of A and B alternates.
        if turn % 2:
            b, a1, a2 = run(kvbm, dice), run(plain, dice), run(plain, dice)
        else:
            a1, b, a2 = run(plain, dice), run(kvbm, dice), run(plain, dice)
        ratios.append(b / ((a1 + a2) / 2))
        controls.append(a1 / a2)
    return statistics.median(ratios), statistics.median(controls)


def main() -> int:
    bench, dice = Bench("throughput"), random.Random(0)
    plain, kvbm = engine(None, **OPTIONS), engine({"g2_gb": 2}, **OPTIONS)
    ratio, control = against(plain, kvbm, dice)
    assert kvbm.status()["offload"]["blocks"] >= ROUNDS * REQUESTS * (PROMPT // 32)
    bench.info("tokens per second without KVBM", round(run(plain, dice), 1))
    bench.row("throughput, nothing shared", "the engine without KVBM", ratio, ">=", 0.98)
    bench.row("A/A: the engine without KVBM", "itself", control)
    for each in (plain, kvbm):
        each.close()
    return bench.write()


if __name__ == "__main__":
    sys.exit(main())
