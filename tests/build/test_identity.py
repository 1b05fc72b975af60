"""What is not known to be the same is not shared: weights that are digested at once, late, or never."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvbm.build import disk as build_disk
from kvbm.build import stack as build_lower
from kvbm.leader.requests import RequestParams
from kvbm.stores.content import Chosen
from kvbm.stores.stamps import Changed
from tests.build.whole import PATIENCE, Engine
from tests.leader.roles import keys_of

Make = Callable[..., Engine]
OPENING = "still being found out"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_bytes(b"one")
    return folder / "weights"


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    engines: list[Engine] = []

    def start(ranks: int = 1, **settings: Any) -> Engine:
        engines.append(Engine(tmp_path, ranks, **{"cache_dir": str(tmp_path / "cache")} | settings))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def reads(weights: Path) -> Callable[[], Sequence[Chosen]]:
    return lambda: [Chosen((("", str(weights)),), (str(weights.parent),))]


def refuses() -> Sequence[Chosen]:
    raise Changed("they are dummies")


class Slow:
    """Says what was read when it is let, or that nobody knows."""

    def __init__(self, weights: Path) -> None:
        self.go, self._weights = threading.Event(), weights

    def __call__(self) -> Sequence[Chosen]:
        assert self.go.wait(PATIENCE)
        return reads(self._weights)()


@pytest.fixture
def slow(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Slow:
    monkeypatch.setattr(build_lower, "AT_ONCE_S", 0.01)
    return Slow(weights)


def waiting(engine: Engine) -> dict[str, str]:
    return engine.leader.core.lower.degraded()


def attached(engine: Engine) -> None:
    engine.until(lambda: engine.disk_side is not None and not waiting(engine))
    disk = engine.disk_side
    assert disk is not None
    engine.disk = disk.tier.pool


def folders(path: Path) -> list[str]:
    return sorted(each.name for each in (path / "g3").glob("*") if each.is_dir())


def test_the_same_content_is_found_and_other_content_is_not(make: Make, weights: Path, tmp_path: Path) -> None:
    keys = keys_of("a", 6)
    with closing(make(choose=reads(weights))) as engine:
        assert engine.serve(keys) == 0
        engine.settle()
    copy = tmp_path / "elsewhere" / "weights"
    copy.parent.mkdir()
    copy.write_bytes(b"one")
    with closing(make(choose=reads(copy))) as engine:
        assert engine.serve(keys) == 6
    weights.write_bytes(b"two")
    engine = make(choose=reads(weights))
    assert engine.serve(keys) == 0
    assert len(folders(tmp_path)) == 2


@pytest.mark.parametrize("wrong", [refuses, lambda: 1 / 0], ids=["unknown", "an error"])
def test_what_is_not_known_stays_in_host_memory(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, wrong: Callable[[], Sequence[Chosen]]
) -> None:
    keys, seen = keys_of("a", 6), set()
    for _ in range(2):
        caplog.clear()
        with closing(make(choose=wrong)) as engine:
            assert engine.serve(keys) == 0
            assert engine.serve(keys) == 6
            status = engine.side.control.status()
            assert "it is not known what the weights contain" in status["degraded"]["g3"]
            assert status["healthy"]
            seen.add(status["fingerprint"])
            said = [record for record in caplog.records if "stores nothing on disk" in record.message]
            assert [record.levelno for record in said] == [logging.WARNING]
            engine.side.drain(PATIENCE)
            assert engine.disk_side is None
    assert len(seen) == 2, "a namespace that no other process has"
    assert not folders(tmp_path)


def test_where_nothing_is_shared_nothing_is_looked_at(make: Make) -> None:
    engine = make(g3_blocks=None, choose=lambda: pytest.fail("it was looked at"))
    other = make(g3_blocks=None, engine="f", choose=refuses)
    assert engine.serve(keys_of("a", 2)) == 0
    assert waiting(engine) == waiting(other) == {}
    fingerprints = {each.side.control.status()["fingerprint"] for each in (engine, other)}
    assert len(fingerprints) == 2


@pytest.mark.parametrize(("ranks", "replicated"), [(1, False), (2, False), (2, True)])
def test_serving_starts_meanwhile(
    make: Make, slow: Slow, ranks: int, replicated: bool, caplog: pytest.LogCaptureFixture
) -> None:
    early, later = keys_of("early", 6), keys_of("later", 4)
    with closing(make(ranks, replicated=replicated, choose=slow)) as engine:
        assert OPENING in waiting(engine)["g3"]
        assert OPENING in caplog.text
        before = engine.side.control.status()
        assert engine.serve(early) == 0
        assert engine.serve(early) == 6
        slow.go.set()
        attached(engine)
        engine.until(lambda: engine.disk_side is not None)
        after = engine.side.control.status()
        assert after["fingerprint"] != before["fingerprint"]
        assert ("demote" in before, "demote" in after) == (False, True)
        assert Path(engine.side.control.disk.inspect()["folder"]).name == after["fingerprint"][:16]
        assert engine.serve(later) == 0
        engine.settle()
        assert engine.disk.peek(early) == 6
    engine = make(ranks, replicated=replicated, choose=slow)
    attached(engine)
    assert engine.serve(early) == 6
    assert engine.serve(later) == 4


def test_the_disk_comes_late_and_has_what_was_there(make: Make, slow: Slow) -> None:
    keys = keys_of("a", 6)
    slow.go.set()
    with closing(make(choose=slow)) as engine:
        attached(engine)
        engine.serve(keys)
        engine.settle()
    slow.go.clear()
    engine = make(choose=slow)
    slow.go.set()
    attached(engine)
    assert engine.serve(keys) == 6
    assert engine.leader.records["r0"].staged == {"g3": 6}


def test_a_reset_before_the_disk_comes_ends_what_lasts(make: Make, slow: Slow) -> None:
    old, new = keys_of("old", 4), keys_of("new", 4)
    slow.go.set()
    with closing(make(choose=slow)) as engine:
        attached(engine)
        engine.serve(old)
        engine.settle()
    slow.go.clear()
    with closing(make(choose=slow)) as engine:
        engine.leader.reset()
        slow.go.set()
        attached(engine)
        engine.settle()
        assert engine.serve(old) == 0
        assert engine.serve(new) == 0
        engine.settle()
    engine = make(choose=slow)
    attached(engine)
    assert [engine.serve(keys) for keys in (old, new)] == [0, 0]


def test_a_disk_that_nobody_wants_any_more(make: Make, slow: Slow, tmp_path: Path) -> None:
    engine = make(choose=slow)
    engine.leader.core.isolate("other weights came")
    slow.go.set()
    engine.until(lambda: all(not thread.name.startswith("kvbm-attach") for thread in threading.enumerate()))
    assert engine.disk_side is None
    assert waiting(engine) == {"g3": "other weights came"}
    other = make(engine="f", choose=slow)
    attached(other)  # the folder's lock was let go


def test_a_disk_that_cannot_be_had(make: Make, slow: Slow) -> None:
    slow.go.set()
    first = make(choose=slow)
    attached(first)
    slow.go.clear()
    second = make(engine="f", choose=slow, strict=False)
    assert "is in use by engine e" in waiting(second)["g3"], "said at once"
    slow.go.set()
    assert second.serve(keys_of("a", 3)) == 0
    assert second.serve(keys_of("a", 3)) == 3


def test_what_fails_late_ends_nothing(make: Make, slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(choose=slow)

    def broken(*_: object) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(build_disk, "find", broken)
    slow.go.set()
    engine.until(lambda: "no such thing" in waiting(engine)["g3"])
    assert engine.serve(keys_of("a", 3)) == 0
    assert engine.serve(keys_of("a", 3)) == 3


# ---------------------------------------------------------------------- isolate


def test_from_some_moment_on_nothing_is_known(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """What was written before stays, unless a reset ends it; nothing of later lasts."""
    before, after = keys_of("before", 4), keys_of("after", 3)
    with closing(make()) as engine:
        engine.serve(before)
        engine.settle()
        for _ in range(2):
            engine.leader.core.isolate("other weights came")
        engine.leader.core.isolate("again")
        assert waiting(engine) == {"g3": "other weights came"}
        assert [record.message for record in caplog.records].count(
            "KVBM stores nothing on disk and shares nothing with other instances: other weights came"
        ) == 1
        assert engine.serve(before) == 4, "host memory goes on"
        engine.leader.core.pool.discard(before)
        assert engine.serve(before) == 0, "it was read from disk"
        assert engine.serve(after) == 0
        assert engine.serve(after) == 3
        written = engine.side.totals.demote.blocks
        engine.side.drain(PATIENCE)
        lower = engine.disk_side
        assert lower is not None
        monotonic = time.monotonic() + 0.3
        while time.monotonic() < monotonic:
            engine.leader.core.tick()
        assert engine.side.totals.demote.blocks == written == 4
        assert lower.tier.in_flight() == (0, 0)
        assert engine.leader.check(PATIENCE)["problems"] == []
    with closing(make()) as engine:
        assert engine.serve(after) == 0
        assert engine.serve(before) == 4
        engine.settle()
        engine.leader.core.isolate("other weights came")
        engine.leader.reset()
        engine.until(lambda: not engine.disk_side.tier.clearing)  # type: ignore[union-attr]
        assert engine.serve(before) == 0
    engine = make()
    assert engine.serve(before) == 0, "a reset ends what lasts"


def test_what_is_on_its_way_is_given_up(make: Make) -> None:
    keys = keys_of("a", 6)
    with closing(make()) as engine:
        engine.serve(keys)
        engine.settle()
    engine = make(transport_wrapper="kvbm.testing.faults:build?disk=1&load_delay=0.5")
    engine.leader.begin("r", keys, RequestParams(), 7 * 32)
    lower = engine.disk_side
    assert lower is not None
    engine.until(lambda: lower.tier.in_flight()[1])
    assert engine.leader.match("r", 0, 6) is None, "it waits for the disk"
    engine.leader.core.isolate("other weights came")
    assert engine.leader.match("r", 0, 6) == 0
    engine.until(lambda: lower.tier.in_flight() == (0, 0))
    counts = engine.leader.core.pool.statistics()
    assert (counts.staged, counts.active) == (0, 0)
    assert engine.leader.check(PATIENCE)["problems"] == []
    assert json.dumps(engine.side.control.status())
