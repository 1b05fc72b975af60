"""A look at KVBM itself: its books, what happened last, how long the engine waits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvbm.blocks import Pool
from kvbm.core.events import Admitted, Cleared, Gated, Removed, Stored
from kvbm.leader.invariants import Invariants
from kvbm.leader.pace import Pace
from kvbm.leader.reports import Reports
from kvbm.link.messages import Result
from kvbm.observe.recent import Recent
from kvbm.policy.lru import LRU
from kvbm.testing.clock import ManualClock
from tests.leader.roles import Stage, keys_of
from tests.leader.ways import Offloaded

Make = Callable[..., Stage]
KEYS = keys_of("a", 4)


def _hold_more(stage: Stage) -> Callable[[], None]:
    stage.leader.core.held += 1
    return lambda: setattr(stage.leader.core, "held", stage.leader.core.held - 1)


def _load_nothing(stage: Stage) -> Callable[[], None]:
    stage.leader.book.loading[b"key"] = "nobody"
    return stage.leader.book.loading.clear


def _read_more(stage: Stage) -> Callable[[], None]:
    stage.leader.core.copies.sources |= dict.fromkeys(range(99), 7)
    return stage.leader.core.copies.sources.clear


def _expire(stage: Stage) -> Callable[[], None]:
    expiry = stage.pool._ledger._table.expiry
    expiry[50] = 1.0
    return lambda: expiry.__setitem__(50, float("inf"))


@pytest.mark.parametrize(
    ("lie", "text"),
    [
        (_hold_more, "1 blocks of G2 count as held by requests, 0 are"),
        (_load_nothing, "by a request that does not load it"),
        (_read_more, "99 blocks of the engine are read by 0"),
        (_expire, "g2: a slot that is not registered can expire"),
    ],
)
def test_an_idle_engine_finds_what_is_wrong(
    make_stage: Callable[..., Stage], tmp_path: Path, caplog: pytest.LogCaptureFixture, lie: Callable[[Stage], Any],
    text: str,
) -> None:  # fmt: skip
    reports = Reports(tmp_path, "e")
    stage = make_stage(reports=reports)
    stage.keep("first", KEYS)
    stage.tick()
    assert stage.leader.core.health.problems == []
    undo = lie(stage)
    stage.tick()
    stage.tick()
    (problem,) = stage.leader.core.health.problems
    assert text in problem
    assert caplog.text.count("an invariant does not hold") == 1
    reports.wait(10)
    (path,) = tmp_path.iterdir()
    assert str(path) in problem
    report = json.loads(path.read_text())
    assert text in report["problems"][0]
    assert "Stored" in {event["event"] for event in report["events"]}
    assert KEYS[0].hex() in {event["first_key"] for event in report["events"]}
    stage.begin("b", KEYS)
    assert stage.leader.match("b", 0, 4) == 0
    undo()


def test_books_are_right_whatever_goes_on(make_stage: Make) -> None:
    stage = make_stage(64, ranks=2, shadow_every=2).add_disk()
    for number in range(60):
        name, keys = f"r{number}", keys_of(f"p{number % 7}", 5)
        stage.begin(name, keys)
        found = stage.leader.match(name, 0, 5)
        if found is not None:
            stage.place(name, list(range(100 * number, 100 * number + 5)), found)
            assert stage.leader.check(10)["problems"] == []
            step = stage.step({name: 5} if not found else {})
            assert stage.leader.check(10)["problems"] == []
            for copy in [*step.loads, *step.stores]:
                stage.answer(copy)
            stage.leader.core.tick()
        stage.leader.finish(name, list(range(100 * number, 100 * number + 5)), 0)
        assert stage.leader.check(10)["problems"] == []
        if number % 20 == 19:
            stage.leader.reset()
            stage.settle()
            assert stage.leader.check(10)["problems"] == []
    for job in list(stage.leader.core.copies.jobs.values()):
        for rank in tuple(job.ranks):
            stage.say(Result(job.id, rank, bytes([3] * job.blocks), 0, 0.0, "injected"), rank)
    stage.leader.core.tick()
    assert stage.leader.invariants.violations == 0


def test_a_busy_engine_looks_less_often() -> None:
    clock, asked = ManualClock(), []
    audit = Invariants(lambda: asked.append(1) or [], clock)
    pools = {"g2": Pool(3000, order=LRU(3000))}
    for _ in range(10):
        audit.tick(pools, idle=False)
    assert len(asked) == 1
    clock.advance(11)
    audit.tick(pools, idle=False)
    assert len(asked) == 2
    for _ in range(8):
        audit.tick(pools, idle=True)
    assert len(asked) == 10
    assert audit.passes == {"g2": 2}  # three slices and the end


def test_a_check_ends_in_time(make_stage: Make) -> None:
    stage = make_stage(5000)
    assert stage.leader.check(0)["complete"] is False
    assert stage.leader.check(10)["complete"] is True


def test_the_last_events() -> None:
    recent = Recent(lambda: 7.0)
    for event in (
        Stored("g2", (b"k", b"l"), None), Removed("g3", (), 0), Cleared("g2", 3), Offloaded(5, 1, 10, 0.1), Gated(2),
        Admitted(100, 0, 0),
    ):  # fmt: skip
        recent.on_event(event)
    listed = recent.listed()
    assert listed[0] == {"when": 7.0, "event": "Stored", "tier": "g2", "count": 2, "first_key": b"k".hex()}
    assert [(each["event"], each["count"]) for each in listed[1:]] == [
        ("Removed", 0), ("Cleared", 3), ("Copied", 5), ("Gated", 2), ("Admitted", 100),
    ]  # fmt: skip
    for _ in range(2000):
        recent.on_event(Gated(1))
    assert len(recent.listed()) == 512


def test_how_long_the_engine_waits() -> None:
    pace = Pace(0.1)
    for number in range(100):
        pace.add(number / 1e4)
        assert pace.step() is None
    summary = pace.summary()
    assert summary["p50"] == pytest.approx(5.0)
    assert summary["p99"] == summary["max"] == pytest.approx(9.9)
    assert sum(pace.counts) == 100


def test_a_leader_that_is_slow_for_long_rests(stage: Stage) -> None:
    stage.keep("first", KEYS)
    for _ in range(31):
        stage.leader.pace.add(0.2)
        stage.step()
    stage.step()  # one that is not
    for _ in range(32):
        assert stage.leader.core.health.problems == []
        stage.leader.pace.add(0.2)
        stage.step()
    (problem,) = stage.leader.core.health.problems
    assert "more than 100 ms in each of the last 32 steps" in problem
    stage.begin("b", KEYS)
    assert stage.leader.match("b", 0, 4) == 0
    stage.tick(61)
    assert stage.leader.core.health.problems == []
    assert stage.leader.match("b", 0, 4) == 4
    stage.leader.finish("b", [], 0)
