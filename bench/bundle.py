"""`make gpu-bundle`: what `gpu_check.py` needs, in one folder, for a machine without internet.

    python -m bench.bundle [FOLDER] [--python 3.12]

Sources of the package and of `bench`, and wheels for that Python of what the package depends on, of the versions that
are installed here. Ends with 1 where it is larger than 64 MiB.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import requires, version
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).parents[1]
MOST: Final = 64 << 20
TOOLS: Final = ("setuptools", "wheel")
"""Build the package there, whatever that machine has; the newest that there are."""
MANYLINUX: Final = ("manylinux_2_28", "manylinux_2_17", "manylinux2014", "manylinux_2_12", "manylinux_2_5")


def needed(name: str, python: str, seen: set[str]) -> Iterator[str]:
    """What a distribution depends on, and what that does."""
    for text in requires(name) or ():
        requirement = Requirement(text)
        marks = {"extra": "", "python_version": python, "python_full_version": f"{python}.0"}
        plain = canonicalize_name(requirement.name)
        if plain in seen or (requirement.marker is not None and not requirement.marker.evaluate(marks)):
            continue
        seen.add(plain)
        yield f"{requirement.name}=={version(requirement.name)}"
        yield from needed(requirement.name, python, seen)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build/gpu-bundle")
    parser.add_argument("--python", default="3.12")
    options = parser.parse_args()
    folder, python = options.folder, options.python
    shutil.rmtree(folder, ignore_errors=True)
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    wanted = ("src", "bench", "pyproject.toml", "setup.py", "README.md", "LICENSE")
    files = subprocess.run([*listed, "--", *wanted], check=True, capture_output=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "bench/gpu_check.py").rename(folder / "gpu_check.py")
    (folder / "python").write_text(python)
    platforms = [f"--platform={each}_{platform.machine()}" for each in MANYLINUX]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    pip += ["--only-binary=:all:", f"--python-version={python}", *platforms, f"--dest={folder / 'wheels'}"]
    subprocess.run([*pip, *needed("pykvbm", python, set()), *TOOLS], check=True)
    size = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
    print(f"{folder}: {size / (1 << 20):.1f} MiB; on the machine with the GPU: python{python} gpu_check.py")
    return int(size > MOST)


if __name__ == "__main__":
    sys.exit(main())
