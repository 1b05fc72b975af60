"""Scheduler and worker in one process, as on a GPU without tensor parallelism: leader, worker and copies too."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.e2e.conftest import prompt_of
from tests.e2e.engine import Done

RUN = """
import json, os, sys
from pathlib import Path
from tests.e2e.engine import Engine

job = json.load(sys.stdin)
engine = Engine(Path(job["model"]), {}, distributed_executor_backend="uni")
first = engine.run(job["prompts"], 20)
engine.settle()
engine.forget_device()
again = engine.run(job["prompts"], 20)
worker = engine.core.model_executor.driver_worker.worker
report = {
    "same process": os.getpid() == engine.status()["pid"] and worker is not None,
    "first": [done.tokens for done in first],
    "again": [done.tokens for done in again],
    "cached": [done.cached for done in again],
}
engine.close()
print("REPORT", json.dumps(report))
"""


def test_one_process(tiny: Path, plain: Callable[..., list[Done]], dice: random.Random) -> None:
    prompts = [prompt_of(dice, length) for length in (100, 400)]
    job = json.dumps({"model": str(tiny), "prompts": prompts})
    # In a process of its own: vLLM's worker leaves global state behind that the other engines must not meet.
    run = subprocess.run(
        [sys.executable, "-c", RUN], input=job, capture_output=True, text=True, timeout=300, check=False
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("REPORT ")]
    assert lines, run.stderr[-3000:]
    report = json.loads(lines[0].removeprefix("REPORT "))
    expected = [done.tokens for done in plain(prompts, 20)]
    assert report["same process"]
    assert report["first"] == report["again"] == expected
    assert report["cached"] == [96, 384]
