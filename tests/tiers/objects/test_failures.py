"""Storage that fails, with real servers and mounts: engines go on, no byte is wrong, and the tier heals by itself."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kvbm.abc.store import MOST_BYTES
from kvbm.core.errors import Broken
from kvbm.stores.objects.folder import FolderStore
from tests.leader.roles import keys_of
from tests.seaweed import client, started
from tests.tiers.objects.faulty import Faulty, Mode
from tests.tiers.objects.test_whole import Sharing, objects

pytestmark = [pytest.mark.e2e, pytest.mark.untimed]
NUMBERS = itertools.count()
DEADLINE_S = 5.0
"""SeaweedFS takes up to two seconds where several create one object at once."""


@pytest.fixture
def engine(tmp_path: Path, faulty: Faulty) -> Iterator[Callable[..., Sharing]]:
    engines: list[Sharing] = []
    address = f"s3://bucket/failures-{next(NUMBERS)}"

    def make(**settings: Any) -> Sharing:
        given = {"g4_endpoint": faulty.endpoint, "g4_path_style": True, "g4_deadline_s": DEADLINE_S}
        engines.append(Sharing(tmp_path, settings.pop("shared", address), **(given | settings)))
        return engines[-1]

    yield make
    for each in engines:
        each.close()


def serves(engine: Sharing, name: str) -> None:
    """A request that finds nothing, and what it has computed, both in bounded time."""
    keys, begun = keys_of(name, 8), time.monotonic()
    assert engine.serve(keys) == 0
    assert engine.serve(keys) == 8
    assert time.monotonic() - begun < 2 * DEADLINE_S


def whole(engine: Sharing) -> None:
    """Nothing is held any more, once all that is on its way has ended."""
    engine.until(lambda: engine.g4.uploads.idle or engine.g4.problem is not None)
    engine.until(lambda: engine.g4.traffic.reading == 0)
    engine.until(lambda: engine.leader.core.pool.statistics().active == 0)
    assert engine.leader.core.pool.statistics().staged == 0
    engine.leader.core.pool.check()


def passes_on(one: Sharing, other: Sharing, name: str) -> None:
    """What one computes now the other finds."""
    keys = keys_of(name, 8)
    one.serve(keys)
    one.stored()
    other.knows(keys, 8)
    assert other.serve(keys) == 8


MODES: list[Mode] = ["refused", "silent", "cut", "drip", "page", "stored"]


@pytest.mark.parametrize("mode", MODES)
def test_a_server_that_fails_for_a_while(mode: Mode, engine: Callable[..., Sharing], faulty: Faulty) -> None:
    one, other, before = engine().works(), engine().works(), keys_of("before", 8)
    one.serve(before)
    one.stored()
    other.knows(before, 8)
    faulty.set(mode)
    for number in range(3):
        serves(one, f"during {mode} {number}")
    found = other.serve(before)  # looks at every byte, whatever comes
    assert found in {"stored": (8,), "cut": (0, 8)}.get(mode, (0,)), "the client may ask for the rest of what was cut"
    serves(other, f"others during {mode}")
    whole(other)
    faulty.set("good")
    one.works()
    other.works()
    passes_on(one, other, f"after {mode}")
    passes_on(other, one, f"back after {mode}")
    whole(one)
    whole(other)


def full(one: Sharing, other: Sharing, writes: Callable[[bool], None]) -> str:
    """What is there is read, and nothing is written, until there is room again. What people hear of it."""
    before = keys_of("before", 8)
    one.serve(before)
    one.stored()
    other.knows(before, 8)
    writes(False)
    for number in range(3):
        serves(one, f"without room {number}")
    one.until(lambda: one.g4.problem is None and one.g4.limits() is not None)
    health = one.side.control.health()
    assert health["degraded"] == {}
    assert other.serve(before) == 8, "what is there"
    writes(True)
    one.until(lambda: one.g4.limits() is None)
    passes_on(one, other, "there is room again")
    whole(one)
    whole(other)
    return str(health["smaller"]["g4"])


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can only be read is tried again soon."""
    monkeypatch.setattr("kvbm.tiers.objects.trials.WRITES_AGAIN_S", 0.5)


@pytest.mark.usefixtures("often")
def test_a_server_that_is_full(engine: Callable[..., Sharing], faulty: Faulty) -> None:
    said = full(engine().works(), engine().works(), lambda may: faulty.set("good" if may else "full"))
    assert "507 Insufficient Storage" in said


@pytest.mark.usefixtures("often")
def test_a_file_system_that_is_full(engine: Callable[..., Sharing], mount: Path) -> None:
    filler = mount / "filler"

    def writes(may: bool) -> None:
        if may:
            filler.unlink()
            return
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(1 << 12))

    shared = f"file://{mount}/kv"
    said = full(engine(shared=shared).works(), engine(shared=shared).works(), writes)
    assert "No space left" in said


@pytest.mark.usefixtures("often")
def test_a_mount_that_becomes_read_only(engine: Callable[..., Sharing], mount: Path) -> None:
    def writes(may: bool) -> None:
        subprocess.run(["mount", "-o", f"remount,{'rw' if may else 'ro'}", mount], check=True)

    shared = f"file://{mount}/kv"
    said = full(engine(shared=shared).works(), engine(shared=shared).works(), writes)
    assert "Read-only file system" in said


def test_a_mount_that_vanishes(engine: Callable[..., Sharing], mount: Path, tmp_path: Path) -> None:
    """Nothing is written to what lies below it."""
    kept, shared = tmp_path / "kept", f"file://{mount}/kv"
    kept.mkdir()
    subprocess.run(["mount", "--bind", mount, kept], check=True)
    try:
        one, other = engine(shared=shared).works(), engine(shared=shared).works()
        passes_on(one, other, "before")
        one.leader.core.pool.discard(keys_of("before", 8))
        subprocess.run(["umount", "-l", mount], check=True)
        assert one.serve(keys_of("before", 8)) == 0
        for number in range(3):
            serves(one, f"gone {number}")
        one.until(lambda: one.g4.problem is not None)
        assert "nothing is mounted there any more" in one.side.control.health()["degraded"]["g4"]
        assert [*mount.rglob("*")] == [] or all(path.is_dir() for path in mount.rglob("*"))
        subprocess.run(["mount", "--bind", kept, mount], check=True)
        one.works()
        one.leader.core.pool.discard(keys_of("before", 8))
        one.knows(keys_of("before", 8), 8)
        assert one.serve(keys_of("before", 8)) == 8, "it is looked up again"
        passes_on(one, other, "again")
        whole(one)
        whole(other)
    finally:
        subprocess.run(["umount", "-l", kept], capture_output=True, check=False)


def test_two_mounts_of_one_tree_that_show_different_names(
    engine: Callable[..., Sharing], mount: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them shows what it showed first, names that are gone and none that came."""
    second, shared = tmp_path / "second", f"file://{mount}/kv"
    second.mkdir()
    subprocess.run(["mount", "--bind", mount, second], check=True)
    try:
        one, keys, new = engine(shared=shared).works(), keys_of("old", 8), keys_of("new", 8)
        one.serve(keys)
        one.stored()
        listed = [*FolderStore(mount / "kv").list("")]
        names = [each.name for page in listed for each in page]

        fresh = FolderStore.list

        def stale(store: FolderStore, prefix: str) -> Any:
            if prefix.startswith("kv1/probe"):  # what it has written itself it shows
                return fresh(store, prefix)
            return iter([[each for page in listed for each in page if each.name.startswith(prefix)]])

        with monkeypatch.context() as patched:
            patched.setattr(FolderStore, "list", stale)
            FolderStore(mount / "kv").delete(names)
            other = engine(shared=f"file://{second}/kv")
            other.g4.asked(keys)
            other.until(lambda: int(other.g4.covers(keys).sum()) == 8)
            serves(other, "old")  # names that are gone are misses
            one.serve(new)
            one.stored()
        other.works()
        other.knows(new, 8)
        assert other.serve(new) == 8
        whole(other)
    finally:
        subprocess.run(["umount", "-l", second], capture_output=True, check=False)


@pytest.mark.parametrize("what", ["a FIFO", "a link", "a folder", "somebody else's"])
def test_what_is_no_run_lies_where_one_should_be(what: str, engine: Callable[..., Sharing], tmp_path: Path) -> None:
    shared, keys = f"file://{tmp_path}/shared", keys_of("a", 8)
    one = engine(shared=shared).works()
    one.serve(keys)
    one.stored()
    for path in objects(tmp_path):
        moved = path.rename(tmp_path / path.name)
        if what == "a FIFO":
            os.mkfifo(path)
        elif what == "a link":
            path.symlink_to(moved)
        elif what == "a folder":
            path.mkdir()
        else:
            path.write_text("not a run")
    one.leader.core.pool.discard(keys)
    serves(one, "a")
    whole(one)
    other = engine(shared=shared).works()
    serves(other, "a")
    assert objects(tmp_path) == [] if what != "somebody else's" else len(objects(tmp_path)) == 2
    passes_on(one, other, "another")
    assert one.g4.problem is None
    assert other.g4.problem is None


def test_a_bucket_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a server that makes none by itself."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    _, port = server.get_host_and_port()
    given = {"g4_endpoint": f"http://127.0.0.1:{port}", "g4_path_style": True, "g4_region": "us-east-1"}
    try:
        one = Sharing(tmp_path, "s3://nowhere/kv", **given)
        one.until(lambda: one.g4.trials.off is not None)
        serves(one, "anything")
        assert "no such bucket" in one.side.control.health()["degraded"]["g4"]
        one.close()
        with pytest.raises(Broken, match="no such bucket"):
            Sharing(tmp_path, "s3://nowhere/kv", **given, strict=True)
    finally:
        server.stop()


def test_an_engine_that_is_killed_while_it_writes(engine: Callable[..., Sharing], tmp_path: Path) -> None:
    """At random moments: what it has left is right, or is not found."""
    dice, first, loaded = random.Random(9), 0, 0
    other = engine(shared=f"file://{tmp_path}/shared").works()
    for _ in range(4):
        command = [sys.executable, "-m", "tests.tiers.objects.writer", tmp_path, str(first)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as victim:
            try:
                assert victim.stdout is not None
                for _ in range(dice.randrange(1, 6)):
                    first = int(victim.stdout.readline()) + 1
                time.sleep(dice.uniform(0, 0.1))
            finally:
                victim.kill()
        for number in range(max(0, first - 5), first + 1):
            keys = keys_of(f"prompt {number}", 12)
            other.g4.asked(keys)
            loaded += other.serve(keys)  # looks at every byte
    assert loaded > 0
    whole(other)


def test_what_was_stored_and_answered_by_an_error_is_there(engine: Callable[..., Sharing], faulty: Faulty) -> None:
    one, other, keys = engine().works(), engine().works(), keys_of("stored", 8)
    faulty.set("stored")
    one.serve(keys)
    one.until(lambda: one.g4.uploads.idle)
    faulty.set("good")
    one.works()
    one.leader.core.pool.discard(keys)
    one.serve(keys)
    one.stored()
    other.knows(keys, 8)
    assert other.serve(keys) == 8


def test_a_server_that_is_not_there_at_the_start(engine: Callable[..., Sharing], faulty: Faulty) -> None:
    faulty.set("refused")
    one = engine()
    serves(one, "without")
    assert one.g4.problem is not None
    assert "g4" in one.side.control.health()["degraded"]
    faulty.set("good")
    one.works()
    passes_on(one, engine().works(), "with")


def test_wrong_credentials_are_for_good(engine: Callable[..., Sharing], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    one = engine()
    one.until(lambda: one.g4.trials.off is not None)
    serves(one, "anything")
    said = one.side.control.health()["degraded"]["g4"]
    assert "refused" in said
    assert "not-the-secret" not in said
    with pytest.raises(Broken, match="refused"):
        engine(strict=True)


def test_a_server_that_is_frozen_killed_and_started_again(
    engine: Callable[..., Sharing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = started(tmp_path / "own")
    try:
        one, other = engine(g4_endpoint=server.endpoint).works(), engine(g4_endpoint=server.endpoint).works()
        passes_on(one, other, "before")
        server.freeze()
        serves(one, "frozen")
        server.thaw()
        one.works()
        prompts = [keys_of(f"prompt {number}", 12) for number in range(3)]
        for keys in prompts:
            one.serve(keys)
        one.until(lambda: one.g4.uploads.in_flight > 0 or one.g4.uploads.idle)
        server.kill()
        for number in range(3):
            serves(one, f"killed {number}")
        server.start()
        one.works()
        other.works()
        for keys in prompts:  # some were being written when it was killed
            other.serve(keys)  # looks at every byte, whatever is there
        passes_on(one, other, "again")
        third = engine(g4_endpoint=server.endpoint).works()
        third.knows(keys_of("before", 8), 8)
        assert third.serve(keys_of("before", 8)) == 8, "what was there is"
        whole(one)
        whole(other)
    finally:
        server.kill()


def test_a_server_that_has_forgotten_everything(engine: Callable[..., Sharing], tmp_path: Path) -> None:
    server = started(tmp_path / "own")
    try:
        one, other, keys = (
            engine(g4_endpoint=server.endpoint).works(),
            engine(g4_endpoint=server.endpoint).works(),
            keys_of("a", 8),
        )
        one.serve(keys)
        one.stored()
        other.knows(keys, 8)
        for page in (store := client(server)).list(""):
            store.delete([each.name for each in page])
        assert other.serve(keys) == 0
        for _ in range(2):
            other.stored()
            other.leader.core.pool.discard(keys)
            other.serve(keys)
        passes_on(other, one, "after")
    finally:
        server.kill()


def test_a_mount_that_hangs(engine: Callable[..., Sharing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls do not return; requests go on, slots come back, and the engine ends in its usual time."""
    shared, hangs, goes = f"file://{tmp_path}/kv", threading.Event(), threading.Event()
    read = FolderStore.get

    def hang(store: FolderStore, name: str, most: int = MOST_BYTES) -> Any:
        if hangs.is_set():
            goes.wait(60)
        return read(store, name, most)

    monkeypatch.setattr(FolderStore, "get", hang)
    one, other = engine(shared=shared).works(), engine(shared=shared).works()
    keys = keys_of("a", 8)
    one.serve(keys)
    one.stored()
    other.knows(keys, 8)
    hangs.set()
    try:
        begun = time.monotonic()
        assert other.serve(keys) == 0
        assert time.monotonic() - begun < 2 * DEADLINE_S
        whole(other)
        begun = time.monotonic()
        other.close()
        assert time.monotonic() - begun < 8
    finally:
        goes.set()
