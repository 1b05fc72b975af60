"""Storage that fails, with a real server: engines go on, no byte is wrong, and the tier heals by itself.

    python -m pytest tests/tiers/objects/failures.py

Some minutes: its server takes seconds for what others do at once.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvbm.cli.demo.seaweed import Seaweed
from kvbm.core.errors import Broken
from kvbm.stores.objects.folder import FolderStore
from tests.leader.roles import keys_of
from tests.seaweed import client, started
from tests.tiers.objects.faulty import Faulty, Mode
from tests.tiers.objects.test_whole import Sharing

NUMBERS = itertools.count()
DEADLINE_S = 5.0
"""SeaweedFS takes up to two seconds where several create one object at once."""


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    server = started(tmp_path_factory.mktemp("weed"))
    yield server
    server.kill()


@pytest.fixture
def faulty(weed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    for name, value in weed.credentials.items():
        monkeypatch.setenv(name, value)
    proxy = Faulty(weed.port)
    yield proxy
    proxy.close()


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
        server.kill()
        for number in range(3):
            serves(one, f"killed {number}")
        server.start()
        one.works()
        other.works()
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

    def hang(store: FolderStore, name: str) -> Any:
        if hangs.is_set():
            goes.wait(60)
        return read(store, name)

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
