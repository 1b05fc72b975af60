"""Every failure of shared storage with vLLM: answers are the engine's own, and the tier heals. Five minutes, by
`python -m pytest tests/e2e/storage_faults.py`.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kvbm.cli.demo.seaweed import Seaweed
from tests.e2e.test_serve import eventually
from tests.e2e.test_storage import RUN, Shared, files
from tests.seaweed import client, started
from tests.tiers.objects.faulty import Faulty, Mode

pytestmark = pytest.mark.usefixtures("always_load")
MODES: tuple[Mode, ...] = ("refused", "silent", "cut", "drip", "page", "stored", "full")


@dataclass
class Place:
    """Storage, and how it fails and works again. `found`: a part of what is there may be read meanwhile."""

    url: str
    fail: Callable[[], None]
    mend: Callable[[], None]
    settings: dict[str, Any] = field(default_factory=dict)
    found: bool = False


@pytest.fixture
def check(tiny: Path, prompts: list[list[int]], expected: list[list[int]]) -> Callable[[Place], None]:
    """What one engine has written another cannot get, and then can; no answer differs, and nothing stays held."""

    def answers(engine: Shared) -> list[int]:
        """How many tokens of each prompt were found."""
        done = engine.run(prompts, 12)
        assert [each.tokens for each in done] == expected
        return [each.cached for each in done]

    def run(place: Place) -> None:
        settings = {"g4_deadline_s": 5.0, **place.settings}
        with closing(Shared(tiny, place.url, **settings)) as engine:
            answers(engine)
            engine.stored()
        with closing(Shared(tiny, place.url, **settings)) as engine:
            engine.knows(len(prompts))
            place.fail()
            begun = time.monotonic()
            cached = answers(engine)
            assert place.found or cached == [0] * len(prompts)
            assert time.monotonic() - begun < 25
            engine.settle()
            place.mend()
            eventually(lambda: engine.leader.tick() or engine.storage.problem is None, 40)

            def heals() -> bool:
                engine.stored()
                engine.forget()
                return answers(engine) == [RUN] * len(prompts)

            eventually(heals, 60)
            eventually(lambda: engine.leader.tick() or engine.storage.traffic.reading == 0)
            pool = engine.leader.core.pool.statistics()
            assert (pool.active, pool.staged, pool.orphaned) == (0, 0, 0)
            engine.leader.core.pool.check()

    return run


@pytest.fixture
def given(weed_user: Seaweed) -> dict[str, Any]:
    return {"g4_path_style": True}


@pytest.mark.parametrize("mode", MODES)
def test_a_server_that_fails(mode: Mode, faulty: Faulty, given: dict[str, Any], check: Callable[[Place], None]) -> None:
    settings, found = {**given, "g4_endpoint": faulty.endpoint}, mode in ("cut", "stored", "full")
    check(Place(f"s3://bucket/{mode}", lambda: faulty.set(mode), lambda: faulty.set("good"), settings, found))


def test_a_server_that_is_killed_and_comes_back(
    given: dict[str, Any], check: Callable[[Place], None], tmp_path: Path
) -> None:
    server = started(tmp_path / "own")
    try:
        check(Place("s3://bucket/kv", server.kill, server.start, {**given, "g4_endpoint": server.endpoint}))
    finally:
        server.kill()


def test_a_server_that_comes_back_empty(given: dict[str, Any], check: Callable[[Place], None], tmp_path: Path) -> None:
    server = started(tmp_path / "own")

    def fail() -> None:
        for page in (store := client(server)).list(""):
            store.delete([each.name for each in page])

    try:
        check(Place("s3://bucket/kv", fail, lambda: None, {**given, "g4_endpoint": server.endpoint}))
    finally:
        server.kill()


def test_a_server_that_is_frozen(given: dict[str, Any], check: Callable[[Place], None], tmp_path: Path) -> None:
    server = started(tmp_path / "own")
    try:
        check(Place("s3://bucket/kv", server.freeze, server.thaw, {**given, "g4_endpoint": server.endpoint}))
    finally:
        server.kill()


@pytest.mark.parametrize("wrong", ["credentials", "bucket"])
def test_what_is_wrong_at_the_start(
    wrong: str, tiny: Path, prompts: list[list[int]], expected: list[list[int]], weed: Seaweed, given: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It is off for good, people hear of it, and the engine serves."""
    if wrong == "credentials":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
        settings, url, stop = {**given, "g4_endpoint": weed.endpoint}, "s3://bucket/kv", lambda: None
    else:
        from moto.server import ThreadedMotoServer

        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        port, stop = server.get_host_and_port()[1], server.stop
        settings, url = (
            {**given, "g4_endpoint": f"http://127.0.0.1:{port}", "g4_region": "us-east-1"},
            "s3://nowhere/kv",
        )
    try:
        with closing(Shared(tiny, url, works=False, **settings)) as engine:
            eventually(lambda: engine.leader.tick() or engine.storage.trials.off is not None)
            assert [done.tokens for done in engine.run(prompts, 12)] == expected
            assert engine.status()["degraded"]["g4"]
    finally:
        stop()


def hang(worker: Any) -> None:
    """In a worker's process: reads of the mount do not return."""
    import threading

    from kvbm.stores.objects.folder import FolderStore

    FolderStore.get = lambda store, name, most=0: threading.Event().wait()  # type: ignore[method-assign,assignment,return-value]


@pytest.mark.parametrize("how", ["read-only", "full", "gone", "no runs"])
def test_a_mount_that_fails(how: str, mount: Path, tmp_path: Path, check: Callable[[Place], None]) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    subprocess.run(["mount", "--bind", mount, kept], check=True)

    def remount(mode: str) -> Callable[[], None]:
        return lambda: subprocess.run(["mount", "-o", f"remount,{mode}", mount], check=True) and None

    def fill() -> None:
        with (mount / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(1 << 12))

    def spoil() -> None:
        for at, path in enumerate(files(mount / "kv")):
            path.unlink()
            _instead(at, path)

    def restore() -> None:
        for path in (mount / "kv").rglob("*"):
            if len(path.name) == 32:
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()

    ways: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "read-only": (remount("ro"), remount("rw")),
        "full": (fill, lambda: (mount / "filler").unlink()),
        "gone": (
            lambda: subprocess.run(["umount", "-l", mount], check=True) and None,
            lambda: subprocess.run(["mount", "--bind", kept, mount], check=True) and None,
        ),
        "no runs": (spoil, restore),
    }
    try:
        check(Place(f"file://{mount}/kv", *ways[how], found=how in ("read-only", "full")))
    finally:
        subprocess.run(["umount", "-l", kept], capture_output=True, check=False)


def _instead(at: int, path: Path) -> None:
    """Something that is no run."""
    if at % 3 == 0:
        os.mkfifo(path)
    elif at % 3 == 1:
        path.symlink_to("/etc/passwd")
    else:
        path.mkdir()


def test_a_mount_that_hangs(tiny: Path, tmp_path: Path, prompts: list[list[int]], expected: list[list[int]]) -> None:
    folder = tmp_path / "kv"
    with closing(Shared(tiny, folder)) as engine:
        engine.run(prompts, 12)
        engine.stored()
    with closing(Shared(tiny, folder, g4_deadline_s=2.0)) as engine:
        engine.knows(len(prompts))
        engine.core.model_executor.collective_rpc(hang)
        begun = time.monotonic()
        assert [done.tokens for done in engine.run(prompts, 12)] == expected
        assert time.monotonic() - begun < 15
        begun = time.monotonic()
    assert time.monotonic() - begun < 15, "it ends in its usual time"
