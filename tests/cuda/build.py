"""Builds the fake driver and what runs over it, once for each state of the sources."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
NATIVE: Final = HERE.parent.parent / "src/kvbm/native"
BUILD: Final = HERE.parent.parent / "build/cuda"
VERSIONS: Final = (13000, 12080, 12040)
"""Of the driver, as it says them: what an older one lacks is left out."""
FLAGS: Final = ("-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-fno-omit-frame-pointer")


@cache
def fake(version: int = 13000, sanitizer: str = "", source: Path = HERE / "fake.c") -> Path:
    """A libcuda.so.1 of this version, in a folder of its own."""
    flags = (*FLAGS, *_sanitized(sanitizer), f"-DFAKE_VERSION={version}", "-fPIC", "-shared", "-fvisibility=hidden")
    return _built("libcuda.so.1", (*flags, "-Wl,-soname,libcuda.so.1"), source)


@cache
def helper(sanitizer: str = "", header: Path = NATIVE / "cuda.h") -> Path:
    """The test in C of the helper."""
    flags = (*FLAGS, *_sanitized(sanitizer), f"-I{header.parent}", f"-I{NATIVE}")
    return _built("helper", flags, HERE / "helper.c", header, NATIVE / "xxh3.h")


def run_helper(version: int, sanitizer: str, seconds: float, header: Path = NATIVE / "cuda.h") -> tuple[int, str]:
    """The test's status and what it printed; 124 where it took too long."""
    program, library = helper(sanitizer, header), fake(version, sanitizer)
    # Streams of the fake's end when they want to, and a library that stays open is no leak. A sanitizer wants to be
    # loaded first, and vLLM, once it configured itself in this process, has its allocator preloaded into every child.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment |= {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    try:
        done = subprocess.run(
            [program, library, str(seconds)], capture_output=True, text=True, timeout=60 + 20 * seconds, env=environment
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        return 124, str(late)
    return done.returncode, done.stdout + done.stderr


def _sanitized(sanitizer: str) -> tuple[str, ...]:
    return (f"-fsanitize={sanitizer}",) if sanitizer else ()


def _built(name: str, flags: tuple[str, ...], *sources: Path) -> Path:
    """The first source compiled; the others are what it includes."""
    state = hashlib.sha256("\0".join(flags).encode())
    for source in sources:
        state.update(source.read_bytes())
    folder = BUILD / state.hexdigest()[:16]
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as beside:  # another process may build the same
            made = Path(beside) / name
            subprocess.run(["gcc", *flags, "-o", made, sources[0], "-ldl", "-lpthread"], check=True)
            made.rename(folder / name)
    return folder / name
