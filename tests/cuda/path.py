"""`make test-cuda-path`: the proof without a GPU that `make test` has no time for. Prints what took how long, and how
it ended, for docs/gpu.md; ends with 1 where something failed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Final

from tests.cuda import plugin
from tests.cuda.build import run_helper

PYTEST: Final = (sys.executable, "-m", "pytest", "-q", "-p", "tests.cuda.plugin")
ON_A_GPU: Final = (
    "tests/e2e/test_onboard.py", "tests/e2e/test_requests.py", "tests/e2e/test_parallel.py",
    "tests/e2e/test_sessions.py",
    "-k", "async or not sync",
)  # fmt: skip
COMMANDS: Final[dict[str, tuple[tuple[str, ...], str]]] = {
    "mistakes planted into the helper": ((sys.executable, "-m", "tests.cuda.mutants"), ""),
    "mistakes planted into the connector": ((sys.executable, "-m", "tests.cuda.plants"), ""),
    "end to end, as model runner V1 calls": ((*PYTEST, *ON_A_GPU), ""),
    "end to end, as model runner V2 calls": ((*PYTEST, *ON_A_GPU), "v2=1"),
    "random comparison": ((sys.executable, "-m", "tests.cuda.compare", "--requests", "1250"), ""),
    "gpu-check from its bundle": ((sys.executable, "-m", "tests.cuda.bundle"), ""),
}
"""What runs, and how the engine calls."""


def sanitized() -> str:
    """The helper under every sanitizer and driver; why it failed."""
    for sanitizer, seconds in (("thread", 5.0), ("address,undefined", 2.0)):
        for version in (13000, 12080, 12040):
            status, said = run_helper(version, sanitizer, seconds)
            print(
                f"helper, {sanitizer}, CUDA {version}: {(said.strip().splitlines() or ['nothing was said'])[-1]}",
                flush=True,
            )
            if status:
                return said
    return ""


def main() -> int:
    begun, ended = time.monotonic(), dict[str, tuple[bool, float]]()
    ended["the helper under sanitizers"] = (not sanitized(), time.monotonic() - begun)
    for name, (command, options) in COMMANDS.items():
        begun = time.monotonic()
        print(f"--- {name}", flush=True)
        done = subprocess.run(command, env=os.environ | {plugin.OPTIONS: options})
        ended[name] = (done.returncode == 0, time.monotonic() - begun)
    print(time.strftime("--- %Y-%m-%d"))
    for name, (well, seconds) in ended.items():
        print(f"{'passed' if well else 'FAILED'} {name} ({seconds / 60:.1f} min)")
    return int(not all(well for well, _ in ended.values()))


if __name__ == "__main__":
    sys.exit(main())
