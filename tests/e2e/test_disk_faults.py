"""What can happen to a disk while an engine serves: answers stay the same, nobody waits for long, it mends itself."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import prompt_of
from tests.e2e.engine import Done, Engine
from tests.e2e.test_disk import on_disk, settled
from tests.e2e.test_serve import eventually

Plain = Callable[..., list[Done]]
PATIENCE_S = 60.0


class Talk:
    """Asks an engine, whose G2 is too small, for the same prompts again and again."""

    def __init__(self, engine: Engine, prompts: list[list[int]], expected: list[list[int]]) -> None:
        self.engine, self.prompts, self.expected = engine, prompts, expected

    def round(self) -> int:
        """Ask for all; returns how many of their tokens came from disk. Every answer must be right."""
        before = self.engine.status()["tokens"]["g3"]
        for prompt, tokens in zip(self.prompts, self.expected, strict=True):
            begun = time.monotonic()
            (done,) = self.engine.run([prompt], 12)
            assert done.tokens == tokens
            assert time.monotonic() - begun < 8
        settled(self.engine)
        self.engine.forget_device()
        return int(self.engine.status()["tokens"]["g3"] - before)

    def until(self, holds: Callable[[dict[str, Any]], bool]) -> None:
        """Go on asking until the status is so."""
        deadline = time.monotonic() + PATIENCE_S
        while not holds(self.engine.status()):
            self.round()
            assert time.monotonic() < deadline, self.engine.status()
            time.sleep(0.2)

    def warm(self) -> None:
        self.round()
        assert self.round() > 0


@pytest.fixture
def talk(plain: Plain, dice: random.Random) -> Callable[[Engine], Talk]:
    prompts = [prompt_of(dice, 300) for _ in range(8)]
    expected = [done.tokens for done in plain(prompts, 12)]
    return lambda engine: Talk(engine, prompts, expected)


class Volume:
    """A file system of 64 MB of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "mounted"
        self.path.mkdir()
        self.mount("image")

    def mount(self, name: str) -> None:
        """A new one."""
        path = self.folder / name
        with path.open("wb") as image:
            image.truncate(64_000_000)
        self._do("mkfs.ext4", "-q", path)
        self._do("mount", "-o", "loop,errors=remount-ro", path, self.path)

    def fail(self) -> None:
        """What the kernel does when the device fails: nothing can be written any more."""
        self._do("mount", "-o", "remount,abort", self.path)

    def unmount(self) -> None:
        self._do("umount", "-l", self.path)

    @staticmethod
    def _do(*command: str | Path) -> None:
        subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    try:
        volume = Volume(tmp_path)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a file system cannot be made and mounted here: {error}")
    yield volume
    volume.unmount()


def works_again(status: dict[str, Any]) -> bool:
    return not status["degraded"]


@pytest.mark.usefixtures("always_load")
def test_a_folder_that_is_deleted_or_cut_is_made_again(
    tiny: Path, tmp_path: Path, talk: Callable[[Engine], Talk]
) -> None:
    folder = tmp_path / "disk"
    with closing(on_disk(tiny, folder)) as engine:
        asked = talk(engine)
        asked.warm()
        shutil.rmtree(folder)
        eventually(lambda: folder.exists(), 30)
        asked.until(works_again)
        asked.warm()
        (data,) = folder.glob("*/rank0.data")
        os.truncate(data, data.stat().st_size // 1000)
        asked.round()
        eventually(lambda: data.stat().st_size > 90_000_000, 30)
        asked.until(works_again)
        asked.warm()
        assert engine.status()["healthy"]


@pytest.mark.usefixtures("always_load")
def test_a_file_system_that_becomes_read_only_and_is_replaced(
    tiny: Path, volume: Volume, talk: Callable[[Engine], Talk]
) -> None:
    with closing(on_disk(tiny, volume.path / "disk", g3_gb=0.03)) as engine:
        asked = talk(engine)
        asked.warm()
        volume.fail()
        asked.until(lambda status: "g3" in status["degraded"])
        assert "read-only" in engine.status()["degraded"]["g3"].lower()
        asked.round()
        volume.unmount()
        volume.mount("another image")
        asked.until(works_again)
        asked.warm()


def test_a_full_disk_is_no_disk_tier_and_no_end(tiny: Path, volume: Volume, talk: Callable[[Engine], Talk]) -> None:
    (volume.path / "others").write_bytes(bytes(40_000_000))
    with closing(on_disk(tiny, volume.path / "disk", g3_gb=0.03)) as engine:
        assert "No space left" in engine.status()["degraded"]["g3"]
        assert talk(engine).round() == 0
        assert engine.status()["healthy"]


def test_input_and_output_errors_and_seconds_per_operation(
    tiny: Path, tmp_path: Path, talk: Callable[[Engine], Talk]
) -> None:
    faults = "kvbm.testing.faults:build?disk=1&load_fail=0.3&store_fail=0.3&seed=1"
    with closing(on_disk(tiny, tmp_path / "a", transport_wrapper=faults)) as engine:
        asked = talk(engine)
        asked.until(lambda status: status["promote"]["failed"] > 0 and status["demote"]["failed"] > 0)
        asked.until(works_again)
        engine.leader.pool.check()
        engine.leader.disk.tier.pool.check()
    slow = "kvbm.testing.faults:build?disk=1&delay=3"
    with closing(on_disk(tiny, tmp_path / "b", transport_wrapper=slow)) as engine:
        asked = talk(engine)
        asked.until(lambda status: status["promote"]["gated"] > 0)
        asked.round()
        assert engine.status()["healthy"]
