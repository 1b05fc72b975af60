"""vLLM's own `bench serve` against a server without and with KVBM, both started as `kvbm serve` starts them.

Its datasets `random` (prompts that share nothing) and `prefix_repetition`, and conversations in the form of its dataset
`sharegpt`: its own multi-turn benchmark is not part of the package. Every run has prompts of its own. `--short`: a
trial, of one round and a few requests.
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from bench.harness import RESULTS, Bench
from kvbm.cli import models, serve
from kvbm.cli.demo.engine import Engine, Setup
from kvbm.core import config

SHORT = "--short" in sys.argv
ROUNDS, REQUESTS, ANSWER = (1, 16, 12) if SHORT else (3, 18, 21)
"""Three rounds give each row 1,080 times between tokens. A prompt token takes up to 7 ms."""
CONCURRENCY = (1, 16) if SHORT else (1, 4, 16)
PREFIXES, PREFIX, SUFFIX = (8, 128, 32) if SHORT else (6, 192, 32)
MODEL_LEN = 2 * PREFIX
G1 = {"large": PREFIXES * PREFIX // 16 + 1, "small": PREFIXES * PREFIX // 64 + 1}
"""Blocks of 32 tokens: all that a run computes of prefixes and conversations, or half of the ones and a third of the
others."""
G2_GB = 2
PLAIN, AGAIN, KVBM, FLAG_ONLY = "without KVBM", "another without KVBM", "with KVBM", "with the flag only"


@dataclass(frozen=True, slots=True)
class Ran:
    """Requests per second and the seconds between two tokens of an answer."""

    throughput: float
    gaps: list[float]


def conversations(path: Path, dice: random.Random) -> None:
    """Users in turn, each time with all that was said before; to the benchmark each turn is one of its own."""
    talks, turns = [text(dice, PREFIX // 2) for _ in range(PREFIXES)], []
    for number in range(REQUESTS):
        talks[number % PREFIXES] += text(dice, SUFFIX)
        turns.append({"conversations": [{"value": talks[number % PREFIXES]}, {"value": "yes"}]})
    path.write_text(json.dumps(turns))


def text(dice: random.Random, tokens: int) -> str:
    return "".join(f" {dice.choice(WORDS)}" for _ in range(tokens))


WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")
"""Each is one token behind a space."""


def run(workload: str, concurrency: int, engine: Engine, model: str, seed: int) -> Ran:
    """One run of vLLM's benchmark in this process, which does not import it again each time."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    talks = RESULTS / "serving-conversations.json"
    own: dict[str, dict[str, object]] = {
        "random": {"random-input-len": PREFIX, "random-output-len": ANSWER},
        "prefix_repetition": {
            "prefix-repetition-num-prefixes": PREFIXES,
            "prefix-repetition-prefix-len": PREFIX,
            "prefix-repetition-suffix-len": SUFFIX,
            "prefix-repetition-output-len": ANSWER,
        },
        "sharegpt": {"dataset-path": talks, "sharegpt-output-len": ANSWER},
    }
    flags = own[workload] | {
        "dataset-name": workload, "model": model, "served-model-name": engine.client.model, "host": "127.0.0.1",
        "port": engine.client.port, "num-prompts": REQUESTS, "max-concurrency": concurrency, "seed": seed,
        "ready-check-timeout-sec": 0, "temperature": 0,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    words += ["--ignore-eos", "--save-detailed", "--disable-tqdm"]
    if workload == "sharegpt":
        conversations(talks, random.Random(seed))
        words.append("--disable-shuffle")
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    with (RESULTS / "serving.log").open("a") as log, contextlib.redirect_stdout(log):
        said: dict[str, Any] = main(parser.parse_args(words))
    assert said["completed"] == REQUESTS, f"{workload}: {said['completed']} of {REQUESTS} requests were answered"
    return Ran(said["request_throughput"], [gap for gaps in said["itls"] for gap in gaps])


def measure(
    bench: Bench, what: str, sides: Mapping[str, Callable[[int], Ran]], beyond: Literal[1, -1]
) -> tuple[float, float]:
    """Each side in each round, another one first each time. The bar of the throughput lies on one side of 1, as far as
    the baseline is from itself. Returns the ratios of KVBM, and of the baseline again, to the baseline."""
    ran: dict[str, list[Ran]] = {name: [] for name in sides}
    order = list(sides)
    for turn in range(ROUNDS):
        order.append(order.pop(0))
        for place, name in enumerate(order):
            ran[name].append(sides[name](zlib.crc32(f"{what} {turn} {place}".encode()) % 10**6))
    rates = {name: statistics.median(each.throughput for each in runs) for name, runs in ran.items()}
    gaps = {name: [gap for each in runs for gap in each.gaps] for name, runs in ran.items()}
    noise = abs(rates[AGAIN] / rates[PLAIN] - 1)
    bench.info(f"{what}, requests/s, round by round", {
        name: [round(each.throughput, 3) for each in runs] for name, runs in ran.items()
    })  # fmt: skip
    print(
        f"{what}: requests/s {rates}, gaps { ({name: np.percentile(each, (50, 99)) for name, each in gaps.items()}) }"
    )
    bench.row(f"throughput, {what}", PLAIN, rates[KVBM] / rates[PLAIN], ">=", 1 + beyond * noise)
    bench.row(f"A/A: throughput, {what}", PLAIN, rates[AGAIN] / rates[PLAIN])
    bench.between_tokens(what, gaps, PLAIN, AGAIN, KVBM, *({FLAG_ONLY} & gaps.keys()))
    return rates[KVBM] / rates[PLAIN], rates[AGAIN] / rates[PLAIN]


def main() -> int:
    bench = Bench("serving")
    RESULTS.mkdir(parents=True, exist_ok=True)
    model = models.resolve("smollm2", config.load().settings.cache_dir, Console(stderr=True))
    bench.info("each run", f"{REQUESTS} prompts of {PREFIX} + {SUFFIX} tokens, answers of {ANSWER}; {ROUNDS} rounds")
    bench.info("G2, GB", G2_GB)
    settings = {"KVBM_G2_GB": str(G2_GB), "KVBM_STRICT": "true", "KVBM_ENABLED": "true"}
    for size, blocks in G1.items():
        given = f"--max-model-len {MODEL_LEN} --num-gpu-blocks-override {blocks} --enforce-eager".split()
        setups = {
            PLAIN: Setup(PLAIN, model, given, RESULTS / f"serving-{size}-plain"),
            KVBM: Setup(KVBM, model, given, RESULTS / f"serving-{size}-kvbm", settings),
            # A process of its own: two of the same kind differ more than one does from itself.
            AGAIN: Setup(AGAIN, model, given, RESULTS / f"serving-{size}-again"),
        }
        if size == "large":
            # What vLLM does by itself with a connector, under plain `vllm serve` with README's flag.
            environment = {serve.RESERVED: "2"}
            setups[FLAG_ONLY] = Setup(FLAG_ONLY, model, given, RESULTS / "serving-flag", settings, environment)
        with contextlib.ExitStack() as stack:
            engines = {name: stack.enter_context(each.start(print)) for name, each in setups.items()}
            ratios: list[tuple[float, float]] = []
            for workload in ("random", "prefix_repetition", "sharegpt"):
                if (workload, size) == ("random", "small"):
                    continue
                for concurrency in CONCURRENCY:
                    flag = [FLAG_ONLY] if FLAG_ONLY in engines and (workload, concurrency) == ("random", 1) else []
                    sides = {
                        name: partial(run, workload, concurrency, engines[name], model)
                        for name in (PLAIN, KVBM, AGAIN, *flag)
                    }
                    what = f"{workload}, G1 of {blocks} blocks, concurrency {concurrency}"
                    ratios.append(measure(bench, what, sides, 1 if size == "small" else -1))
            # One row's baseline differs from itself by luck: of rows without any difference one in four misses its bar.
            ours, control = (statistics.geometric_mean(each) for each in zip(*ratios, strict=True))
            bench.row(f"throughput, G1 of {blocks} blocks, mean of the rows", PLAIN, ours)
            bench.row(f"A/A: throughput, G1 of {blocks} blocks, mean of the rows", PLAIN, control)
    return bench.write()


if __name__ == "__main__":
    sys.exit(main())
