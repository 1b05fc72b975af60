"""How long `kvbm serve` takes until it answers, and what an answer is like while G2 is still being touched.

Each side is started ROUNDS times, another one first each time, and writes answers at once.
"""

from __future__ import annotations

import statistics
import sys

from rich.console import Console

from bench.harness import RESULTS, Bench
from kvbm.cli import models
from kvbm.cli.demo.engine import Setup
from kvbm.core import config

ROUNDS, ANSWERS, TOKENS = 3, 3, 120
G2_GB = 12
PLAIN, AGAIN, TOUCHED, STRICT = "without KVBM", "without KVBM, again", "with KVBM", "with KVBM, strict"
ARGUMENTS = ["--max-model-len", "1024", "--num-gpu-blocks-override", "40", "--enforce-eager"]


def main() -> int:
    bench, folder = Bench("start"), RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    model = models.resolve("smollm2", config.load().settings.cache_dir, Console(stderr=True))
    settings = {"KVBM_G2_GB": str(G2_GB), "KVBM_ENABLED": "true"}
    setups = {
        name: Setup(name, model, ARGUMENTS, folder / f"start-{number}", given)
        for number, (name, given) in enumerate(
            {PLAIN: None, AGAIN: None, TOUCHED: settings, STRICT: settings | {"KVBM_STRICT": "true"}}.items()
        )
    }
    starts: dict[str, list[float]] = {name: [] for name in setups}
    gaps: dict[str, list[float]] = {name: [] for name in setups}
    there: list[float] = []
    order = list(setups)
    for turn in range(ROUNDS):
        order.append(order.pop(0))
        for name in order:
            with setups[name].start(print, f" {turn}" if turn else "") as engine:
                starts[name].append(engine.start_s)
                for number in range(ANSWERS):
                    first = 1 + turn * ANSWERS + number
                    question = [{"role": "user", "content": f"Count from {first} on, one number after the other."}]
                    gaps[name] += engine.client.chat(question, TOKENS).gaps_s
                if name == TOUCHED:
                    (g2,) = [tier for tier in (engine.status() or {})["tiers"] if tier["name"] == "g2"]
                    there.append(g2["total"] / g2["capacity"])
    took = {name: statistics.median(each) for name, each in starts.items()}
    bench.info("G2, GB", G2_GB)
    bench.info("seconds until it answers", {name: [round(each, 1) for each in all_] for name, all_ in starts.items()})
    bench.info("share of G2 that was there after the answer", [round(share, 2) for share in there])
    noise = max(took[AGAIN] / took[PLAIN], took[PLAIN] / took[AGAIN])
    bench.row("until it answers", PLAIN, took[TOUCHED] / took[PLAIN], "<=", 1.05 * noise)
    bench.row("until it answers, all of G2 touched before (strict)", PLAIN, took[STRICT] / took[PLAIN])
    bench.row("A/A: until it answers", PLAIN, took[AGAIN] / took[PLAIN])
    bench.row("G2 that was there after the answer", "all of it", max(there), "<=", 0.99)
    bench.between_tokens("while G2 is touched", gaps, PLAIN, AGAIN, TOUCHED, STRICT)
    return bench.write()


if __name__ == "__main__":
    sys.exit(main())
