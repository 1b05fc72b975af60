"""`python -m tests.cuda.bundle`: does what `make gpu-bundle` gathers run without anything else of this project?

Over the simulated driver, and with wheels for this Python, since 3.12 may not be here. Needs the package registry, to
gather; what is installed then comes from the bundle alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.bundle import MOST
from bench.gpu import SECTIONS

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:9/"


def check(folder: Path) -> None:
    """Raises AssertionError, or what a command ended with."""
    bundle, version = folder / "bundle", f"{sys.version_info[0]}.{sys.version_info[1]}"
    subprocess.run([sys.executable, "-m", "bench.bundle", str(bundle), "--python", version], cwd=ROOT, check=True)
    assert sum(each.stat().st_size for each in bundle.rglob("*") if each.is_file()) < MOST
    environment = os.environ | {"PYTHONPATH": "", "PIP_INDEX_URL": NOWHERE, "FAKE_CUDA": "latency_us=20"}
    command = [sys.executable, str(bundle / "gpu_check.py"), "--scale", "0.01"]
    refused = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert refused.returncode == 1, refused
    assert "has no torch that finds a GPU" in refused.stderr, refused
    (bundle / "tests").symlink_to(ROOT / "tests")  # what stands in for the GPU
    subprocess.run([*command, "--engine", "tests.cuda.gpu_engine"], cwd=folder, env=environment, check=True)
    said = json.loads((folder / "build/bench/gpu.json").read_text())
    ended = {row["what"]: row["ok"] for row in said["rows"] if row["what"].startswith("section")}
    assert len(ended) == len(SECTIONS), ended
    assert all(ended.values()), said
    assert list((bundle / "site/kvbm/native").glob("_cuda*.so"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        check(Path(name))
    print("the bundle needs nothing else")
