"""Off until the engine is started anew: nothing that was being copied is published, and nothing new begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvbm.core.outcome import Outcome
from kvbm.link.messages import Allot, Bye, Copy, GiveUp, Result, Sick, Step
from kvbm.tiers.disk.orders import Write
from tests.leader.roles import Stage, keys_of
from tests.worker.test_worker import FOREVER, PATIENCE, SLOTS, Rank

# ---------------------------------------------------------------------- the leader


def test_what_is_being_copied_is_not_published(stage: Stage) -> None:
    first, second = keys_of("a", 2), keys_of("b", 2)
    stage.keep("first", first)
    load = stage.load("c", first, [1, 2])
    (store,) = stage.compute("b", second, [3, 4]).stores
    stage.leader.core.turn_off("something raised")
    stage.leader.core.turn_off("and once more")
    stage.answer(load)
    stage.answer(store)
    assert stage.matchable(second) == 0
    assert stage.matchable(first) == 2
    assert stage.leader.core.in_flight() == (0, 0)
    assert stage.pool.statistics().staged == stage.pool.statistics().active == 0
    assert stage.leader.core.health.problems == ["something raised"]
    assert stage.leader.check(5.0)["problems"] == [], "its books are right"
    stage.begin("d", first)
    assert stage.leader.match("d", 0, 2) == 0
    assert not stage.compute("e", keys_of("e", 1), [5]).stores


def test_what_was_promised_is_not_loaded_if_it_stands_aside_by_then(stage: Stage) -> None:
    """Another thread may have found out in between that nothing stored can be trusted."""
    keys = keys_of("a", 2)
    stage.keep("first", keys)
    stage.begin("b", keys)
    assert stage.leader.match("b", 0, 2) == 2
    stage.leader.core.health.sick("quarantined")
    stage.place("b", [1, 2], 2)
    assert not stage.leader.loads("b")
    assert not stage.step().loads
    assert stage.leader.check(5.0)["problems"] == []


def test_it_stays_off(stage: Stage) -> None:
    stage.leader.core.turn_off("something raised")
    stage.leader.core.resume()
    stage.clock.advance(1000)
    stage.leader.core.tick()
    assert stage.leader.core.health.aside() == "KVBM is not healthy: something raised"


def test_a_worker_that_raised_turns_the_leader_off(stage: Stage) -> None:
    keys = keys_of("a", 1)
    (store,) = stage.compute("a", keys, [1]).stores
    stage.say(Sick(0, "before_step raised"))
    stage.answer(store)
    stage.say(Bye())
    assert stage.matchable(keys) == 0
    assert stage.leader.core.health.off == "rank 0: before_step raised"
    assert stage.leader.core.health.aside() is not None
    stage.workers[0].close()
    stage.leader.core.tick()
    assert stage.leader.core.health.problems == ["rank 0: before_step raised"], "it said goodbye"


def test_what_goes_below_is_not_published(stage: Stage) -> None:
    keys = keys_of("a", 2)
    stage.add_disk()
    stage.keep("a", keys)
    stage.leader.core.tick()
    (write,) = stage.hear(Write)
    stage.leader.core.turn_off("something raised")
    stage.moved(write)
    stage.leader.core.tick()
    assert stage.disk.peek(keys) == 0
    stage.leader.core.drain(5.0)
    assert not stage.hear(Write)


def test_housekeeping_that_raises_turns_it_off(tmp_path: Path) -> None:
    from tests.build.whole import Engine

    engine = Engine(tmp_path, g3_blocks=None)
    try:
        engine.leader.core.often(lambda: 1 / 0)
        engine.leader.core.tick()
        assert "housekeeping raised ZeroDivisionError" in str(engine.leader.core.health.off)
        engine.leader.core.tick()
        assert len(engine.leader.core.health.problems) == 1
        assert not engine.side.control.health()["healthy"]
    finally:
        engine.close()


# ---------------------------------------------------------------------- a worker

Make = Callable[..., Rank]


@pytest.fixture
def make_rank(tmp_path: Path) -> Iterator[Make]:
    ranks: list[Rank] = []

    def make(faults: dict[str, float] | None = None, **settings: float) -> Rank:
        ranks.append(rank := Rank(tmp_path, faults or {}, **settings))
        rank.hear()
        rank.link.send(Allot(SLOTS))
        rank.hear()
        return rank

    yield make
    for rank in ranks:
        rank.close()


def heard(rank: Rank, count: int) -> list[Any]:
    return [rank.hear() for _ in range(count)]


def test_copies_are_given_up_and_count_as_failed(make_rank: Make) -> None:
    rank = make_rank({"delay": FOREVER})
    rank.step(Step(stores=[Copy.of(1, "a", [0], [0])], loads=[Copy.of(2, "b", [1], [1])]))
    rank.worker.turn_off("something raised")
    assert rank.worker.quiet()
    sick, *results = heard(rank, 3)
    assert sick == Sick(3, "something raised")
    assert {result.job for result in results} == {1, 2}
    assert all(result.outcomes == bytes([Outcome.FAILED]) for result in results)
    assert rank.contents() == rank.before
    rank.worker.turn_off("and once more")
    assert rank.link.take() == []


def test_a_copy_that_ended_well_meanwhile_counts_as_failed(make_rank: Make) -> None:
    rank = make_rank()
    rank.worker.voice.off = "something raised"
    rank.step(Step(stores=[Copy.of(1, "a", [0], [0])]))
    result = rank.result()
    assert (result.outcomes, result.error) == (bytes([Outcome.FAILED]), "something raised")


@pytest.mark.parametrize("is_load", [True, False])
def test_a_copy_whose_end_raises_fails(make_rank: Make, monkeypatch: pytest.MonkeyPatch, is_load: bool) -> None:
    """Else a request would wait for it for ever."""
    rank = make_rank()
    monkeypatch.setattr(rank.worker.copying, "report", lambda *_: 1 / 0)
    copies = [Copy.of(1, "a", [0], [0])]
    rank.step(Step(loads=copies) if is_load else Step(stores=copies))
    message = rank.hear()
    assert isinstance(message, Sick)
    assert "the end of a copy raised ZeroDivisionError" in message.problem
    if is_load:
        assert rank.collect().failed == {"a"}


def test_a_channel_that_raises_turns_it_off(make_rank: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = make_rank()
    monkeypatch.setattr(rank.worker.copying, "give_up", lambda _: 1 / 0)
    rank.link.send(GiveUp([1]))
    message = rank.hear()
    assert isinstance(message, Sick)
    assert "the channel raised ZeroDivisionError" in message.problem
    rank.worker.outlast_leader(PATIENCE)
    rank.step(Step(stores=[Copy.of(1, "a", [0], [0])]))
    failed = rank.hear()
    assert isinstance(failed, Result)
    assert failed.outcomes == bytes([Outcome.FAILED])
