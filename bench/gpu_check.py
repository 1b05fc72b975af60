"""Runs `bench.gpu` from the bundle in which this file lies, on a machine without make and without internet.

    python3.12 gpu_check.py [arguments of bench.gpu]

Needs Python 3.12 with its headers, pip, gcc and torch with CUDA; what else is needed is in the bundle, and is installed
into a folder beside this file. Figures go to build/bench/gpu.json under the working directory.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
TORCH = "import torch, sys; sys.exit(not torch.cuda.is_available())"


def lacking(arguments: Sequence[str]) -> Iterator[str]:
    """What this machine lacks, a sentence for each."""
    here, wanted = f"{sys.version_info[0]}.{sys.version_info[1]}", (HERE / "python").read_text()
    if here != wanted:
        yield f"this is Python {here}, and the bundle's wheels are for {wanted}: run python{wanted} {__file__}"
    places = sysconfig.get_paths()["include"], sysconfig.get_config_var("INCLUDEPY")
    if not any((Path(each) / "Python.h").exists() for each in places):
        yield "Python's headers are not installed: apt install python3-dev (Debian, Ubuntu)"
    if shutil.which("gcc") is None:
        yield "there is no gcc: apt install gcc (Debian, Ubuntu)"
    if _status("-c", "import pip"):
        yield "this Python has no pip: apt install python3-pip (Debian, Ubuntu)"
    if "--engine" not in arguments and _status("-c", TORCH):
        yield f"{sys.executable} has no torch that finds a GPU: run this with the Python that has"


def _status(*arguments: str) -> int:
    return subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode


def main() -> int | str:
    arguments, site = sys.argv[1:], HERE / "site"
    if found := list(lacking(arguments)):
        return "gpu-check cannot run:\n" + "\n".join(f"  {each}" for each in found)
    environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{HERE}"}
    if not (site / "kvbm").exists():
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
        ]
        pip += ["--target", str(site)]
        wheels = sorted(str(each) for each in (HERE / "wheels").glob("*.whl"))
        subprocess.run([*pip, *wheels], check=True)
        # With the bundle's setuptools, which an older machine's may not do.
        subprocess.run([*pip, "--no-build-isolation", str(HERE)], check=True, env=environment)
    return subprocess.run([sys.executable, "-m", "bench.gpu", *arguments], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
