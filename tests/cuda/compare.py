"""`python -m tests.cuda.compare [--requests 1250]`: the random comparison (`tests/e2e/compare.py`) with engines that
count as engines on a GPU, in the order of calls of both of vLLM's model runners, in one process and two ranks.

The driver is simulated: one copy in 50 is refused, one in 64 takes a tenth of a second, all are delayed at random and
done in any order. Ends with 1 where an answer differs, where a copy and the engine's work overlapped, or where the same
with marks of stream 0 finds nothing wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from tests.cuda import pretend
from tests.cuda.plugin import on_a_gpu
from tests.e2e.compare import SETUPS, Alone, Result, compare
from tests.e2e.soak_peers import always_load

PACE = "latency_us=50,delay_us=2000,refuse=50,linger_us=100000"


@dataclass(frozen=True)
class Case:
    """A set-up of the comparison, and how the engine calls."""

    setup: str
    v2: int = 0
    ahead: int = 0


CASES = (
    Case("async"), Case("async", v2=1), Case("async-scheduling", ahead=1), Case("async-scheduling", v2=1, ahead=1),
    Case("two-ranks"), Case("two-ranks", v2=1), Case("priority"), Case("hybrid"), Case("peers"),
)  # fmt: skip


def run(case: Case, requests: int, seed: int, alone: Alone, folder: Path, **plant: str) -> tuple[Result, list[str]]:
    """What the comparison found, and the mistakes that the driver saw."""
    folder.mkdir()
    pace = f"{PACE},seed={seed}"
    with on_a_gpu(folder, pace, seed=seed, v2=case.v2, ahead=case.ahead, **plant):
        result = compare(case.setup, requests, seed, alone, folder / "run")
    seen = pretend.seen(folder)
    assert len(seen) >= SETUPS[case.setup].ranks
    return result, [each["last"] for each in seen if each["mistakes"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1250, help="over all cases")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--setups", help="only these, separated by commas")
    given = parser.parse_args()
    always_load()
    wrong, engines = list[str](), dict[object, Alone]()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)

        def alone(case: Case) -> Alone:
            write, ranks = of = SETUPS[case.setup].write, SETUPS[case.setup].ranks
            if of not in engines:
                path = folder / f"model {len(engines)}"
                engines[of] = stack.enter_context(closing(Alone(write(path), folder / f"alone {len(engines)}", ranks)))
            return engines[of]

        each, done = -(-given.requests // len(CASES)), 0
        for at, case in enumerate(CASES):
            if given.setups is not None and case.setup not in given.setups.split(","):
                continue
            result, mistakes = run(case, each, given.seed + at, alone(case), folder / str(at))
            done += result.requests
            said = {"case": str(case), "differ": len(result.differences), "mistakes": mistakes}
            counts = {"tokens": dict(result.tokens), "faults": dict(result.faults), "failed": dict(result.failed)}
            print(
                json.dumps(said | {"requests": result.requests, "seconds": round(result.seconds)} | counts), flush=True
            )
            if problem := result.problem():
                wrong.append(f"{case}: {problem}")
            wrong += [f"{case}: {mistake}" for mistake in mistakes]
        case = Case("async-scheduling", ahead=1)
        _, found = run(
            case, 60, given.seed, alone(case), folder / "control", plant="marks are of stream 0", most_ms="50"
        )
    if not found:
        wrong.append("the control found nothing: marks of stream 0")
    print(f"{done} requests, {len(wrong)} problems; the control found {found[:1]}; seed {given.seed}")
    print("\n".join(f"FAILED: {each}" for each in wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
