"""Two engines that share storage, one of which is killed while it writes:

    python -m tests.e2e.soak_storage --kills 50

The engine in this process answers random prompts out of a set and compares every answer with those of an engine without
KVBM. The other, a process group of its own, answers others of the set, and is killed at a random moment after it has
begun to answer, while it writes: before it is started all runs are deleted. At the end nothing may be held.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from kvbm.stores.objects.names import parse
from tests.e2e.engine import Engine, write_tiny
from tests.e2e.soak_peers import always_load, kill, left, start

PROMPTS, ANSWER = 60, 12
SIZES = {"g2_blocks": 160, "g4_feed_s": 0.2, "g4_deadline_s": 2.0, "g4_warm": 0.0}
OPTIONS = {"max_model_len": 2048, "num_gpu_blocks_override": 100}
MOST_S = 1.0
"""From the first answer of the other engine to its end, at most."""


@dataclass
class Result:
    """What is to be looked at."""

    seconds: float = 0.0
    requests: int = 0
    wrong: int = 0
    kills: int = 0
    tokens: int = 0
    """Of prompts, from storage."""
    corrupt: int = 0
    runs: int = 0
    """Of both, when the other was killed: those of all kills."""
    torn: int = 0
    """Files that a killed engine left half written, under names of their own."""
    left: str = ""

    def problem(self) -> str | None:
        """Why it failed."""
        if self.wrong or self.left:
            return f"{self.wrong} wrong answers, {self.left}"
        return None if self.tokens and self.kills else "nothing was shared, or nobody was killed"


def prompts() -> list[list[int]]:
    """Some of one run, some of two or three."""
    dice = random.Random(7)
    return [[dice.randrange(3, 1000) for _ in range(dice.randrange(520, 1700))] for _ in range(PROMPTS)]


def peer(model: str, settings: str) -> None:
    """Answers until it is killed."""
    always_load()
    engine, dice, wanted = Engine(Path(model), json.loads(settings), **OPTIONS), random.Random(os.getpid()), prompts()
    while True:
        engine.run(dice.sample(wanted, 2), ANSWER)
        engine.forget_device()
        print("answered", flush=True)


def soak(kills: int, folder: Path) -> Result:
    """Run it. Raises nothing: what is wrong is in the result."""
    always_load()
    model, dice, result, log = write_tiny(folder / "model"), random.Random(8), Result(), folder / "other.log"
    storage = folder / "storage"
    settings = SIZES | {"g4_url": f"file://{storage}"}
    wanted, plain = prompts(), Engine(model, **(OPTIONS | {"num_gpu_blocks_override": 400}))
    expected = [done.tokens for done in plain.run(wanted, ANSWER)]
    plain.close()
    engine, begun = Engine(model, settings, **OPTIONS), time.monotonic()
    while result.kills < kills:
        for path in runs_in(storage):
            path.unlink()
        log.unlink(missing_ok=True)
        victim, due = start(model, settings, log, "tests.e2e.soak_storage"), None
        try:
            while due is None or time.monotonic() < due:
                chosen = dice.sample(range(PROMPTS), dice.randrange(1, 4))
                done = engine.run([wanted[at] for at in chosen], ANSWER)
                result.requests += len(chosen)
                result.wrong += sum(each.tokens != expected[at] for each, at in zip(done, chosen, strict=True))
                engine.forget_device()
                if due is None and b"answered" in log.read_bytes():
                    due = time.monotonic() + dice.uniform(0, MOST_S)
                assert victim.poll() is None, log.read_text()
        finally:
            kill(victim)
        result.kills += 1
        result.runs += len(runs_in(storage))
    result.seconds = time.monotonic() - begun
    result.left = left(engine)
    status = engine.status()
    (g4,) = (each for each in status["tiers"] if each["name"] == "g4")
    result.tokens, result.corrupt = status["tokens"].get("g4", 0), g4["corrupt"]
    engine.close()
    result.torn = sum(path.name.startswith(".part-") for path in storage.rglob("*"))
    return result


def runs_in(storage: Path) -> list[Path]:
    """Files of runs."""
    files = [path for path in storage.rglob("*") if path.is_file()]
    named = [(path, parse(path.relative_to(storage).as_posix())) for path in files]
    return [path for path, ours in named if ours is not None and ours.kind == "run"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peer is not None:
        peer(given.peer, given.settings)
    with tempfile.TemporaryDirectory() as name:
        result = soak(given.kills, Path(name))
    print(json.dumps(asdict(result), indent=1))
    if (problem := result.problem()) is not None:
        print(f"FAILED: {problem}")
    return int(result.problem() is not None)


if __name__ == "__main__":
    sys.exit(main())
