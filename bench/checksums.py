"""What checksums cost: time to first token with and without them, at hits in G2 and on disk, and while computing."""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from bench.g3 import FOLDER, LENGTH, forget_memory, prompt_of, settle
from bench.harness import Bench, medians_of
from bench.model import engine
from bench.ttft import first_token
from kvbm.abc.transport import Transport
from kvbm.manager.gate import Gate
from tests.checksums import off
from tests.e2e.engine import Engine

ROUNDS, PROMPTS = 15, 3
BAR = 1.03


def without(inner: Transport, rank: int, query: str) -> Transport:
    """No product has this."""
    off()
    return inner


def start(folder: Path, more: dict[str, Any]) -> Engine:
    settings = {"g2_gb": 1, "g3_gb": 2, "g3_dir": str(folder), **more}
    vllm = engine(settings, max_model_len=4096, num_gpu_blocks_override=300)
    first_token(vllm, prompt_of(random.Random(0), 64))
    return vllm


def measure(bench: Bench, what: str, engines: dict[str, Engine], before: Callable[[Engine], None]) -> None:
    """Hits that come from where `before` leaves the blocks."""
    prompts = [prompt_of(random.Random(at)) for at in range(PROMPTS)]

    def hit(vllm: Engine) -> float:
        seconds = []
        for prompt in prompts:
            before(vllm)
            seconds.append(first_token(vllm, prompt))
            settle(vllm)
        return statistics.median(seconds)

    for vllm in engines.values():
        for prompt in prompts:
            first_token(vllm, prompt)
            settle(vllm)
    tell(bench, what, medians_of(ROUNDS, {name: partial(hit, vllm) for name, vllm in engines.items()}))


def cold(bench: Bench, engines: dict[str, Engine]) -> None:
    """Prompts that nobody has seen, whose blocks get their checksums meanwhile."""
    dice = random.Random(9)

    def computed(vllm: Engine) -> float:
        seconds = first_token(vllm, prompt_of(dice))
        settle(vllm)
        return seconds

    tell(bench, "computed", medians_of(ROUNDS, {name: partial(computed, vllm) for name, vllm in engines.items()}))


def tell(bench: Bench, what: str, median: dict[str, float]) -> None:
    bench.info(f"{what}, {LENGTH} tokens, ms", {name: round(value * 1e3, 1) for name, value in median.items()})
    for kind in ("with", "with g2_verify"):
        bench.row(f"{what}, {LENGTH} tokens, {kind}", "without checksums", median[kind] / median["without"], "<=", BAR)
    bench.row(f"A/A: {what}", "with checksums", median["with again"] / median["with"])


def main() -> int:
    bench = Bench("checksums")
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as name, mock.patch.object(Gate, "objection", return_value=None):
        kinds: dict[str, dict[str, Any]] = {
            "with": {}, "without": {"transport_wrapper": "bench.checksums:without"}, "with again": {},
            "with g2_verify": {"g2_verify": True},
        }  # fmt: skip
        engines = {kind: start(Path(name) / kind, more) for kind, more in kinds.items()}
        measure(bench, "G2 hit", engines, Engine.forget_device)
        measure(bench, "G3 hit", engines, forget_memory)
        cold(bench, engines)
        assert all(vllm.status()["tokens"]["g3"] > 0 for vllm in engines.values())
        for vllm in engines.values():
            vllm.close()
    return bench.write()


if __name__ == "__main__":
    sys.exit(main())
