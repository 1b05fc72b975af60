"""Hits that are declined, and what comes of comparing them; the test plays the engine and the workers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from kvbm.core.outcome import Outcome
from kvbm.leader.reports import Reports
from kvbm.leader.requests import RequestParams, Variant
from kvbm.leader.shadow import Shadow
from kvbm.link.messages import Adapter, Compare, Result, unpack
from kvbm.tiers.disk.orders import Read
from kvbm.tiers.host import Landing
from tests.leader.roles import BLOCK_TOKENS, Stage, keys_of

Make = Callable[..., Stage]
DONE, CORRUPT, FAILED = Outcome.DONE, Outcome.CORRUPT, Outcome.FAILED
KEYS = keys_of("a", 4)


@pytest.fixture
def stage(make_stage: Make) -> Stage:
    stage = make_stage(64, shadow_every=1)
    stage.keep("first", KEYS)
    return stage


def shadow_of(stage: Stage) -> Shadow:
    assert stage.leader.shadow is not None
    return stage.leader.shadow


def declined(stage: Stage, name: str = "b", keys: list[bytes] = KEYS, start: int = 20) -> None:
    """A request that is declined its hit and gets blocks."""
    stage.begin(name, keys)
    assert stage.leader.match(name, 0, len(keys)) == 0
    assert any("declined" in sentence for sentence in stage.leader.records[name].why)
    stage.place(name, list(range(start, start + len(keys))))


def answer(stage: Stage, compare: Compare, *outcomes: Outcome, rank: int = 0) -> None:
    errors = np.array([1.4 if each == CORRUPT else 0 for each in outcomes], np.float32)
    stage.say(Result(compare.job, rank, bytes(outcomes), 0, 0.1, None, errors=errors.tobytes()), rank)
    stage.leader.core.tick()


def test_a_declined_hit_is_compared_as_it_is_computed(stage: Stage) -> None:
    stored = stage.pool.scan(KEYS)[0]
    slots = stored.slots.tolist()
    stored.drop()
    declined(stage)
    first = stage.step({"b": 1}).compares
    second = stage.step({"b": 4}).compares
    (one,), (three,) = first, second
    assert one.g1_slots().tolist() == [20]
    assert three.g1_slots().tolist() == [21, 22, 23]
    assert [*unpack(one.stored), *unpack(three.stored)] == slots
    assert not {*unpack(one.scratch), *unpack(three.scratch)} & set(slots)
    assert stage.pool.statistics().writable == 4
    answer(stage, three, DONE, DONE, DONE)
    answer(stage, one, DONE)
    now, shadow = stage.pool.statistics(), shadow_of(stage)
    assert (now.writable, now.active, shadow.held) == (0, 0, 0)
    assert (shadow.counts.sampled, shadow.counts.compared, shadow.counts.mismatched, shadow.counts.skipped) == (
        1,
        4,
        0,
        0,
    )
    assert stage.matchable(KEYS) == 4
    stage.leader.finish("b", [20, 21, 22, 23], 4)


def test_the_engine_may_not_overwrite_what_is_still_copied(stage: Stage) -> None:
    declined(stage)
    (compare,) = stage.step({"b": 4}).compares
    assert stage.step(reuse=[21]).fence == [compare.job]
    answer(stage, compare, DONE, DONE, DONE, DONE)


def test_what_is_overwritten_before_a_worker_hears_of_it_is_not_compared(stage: Stage) -> None:
    declined(stage)
    stage.leader.finish("b", [20, 21, 22, 23], 4)
    step = stage.step(reuse=[21])
    assert (step.compares, step.fence) == ([], [])
    shadow = shadow_of(stage)
    assert (shadow.counts.sampled, shadow.counts.compared, shadow.counts.skipped, shadow.held) == (1, 0, 4, 0)
    assert stage.pool.statistics().writable == 0


def test_blocks_that_differ_end_all_trust(make_stage: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reports = Reports(tmp_path / "reports", "engine-1")
    stage = make_stage(64, shadow_every=1, reports=reports)
    stage.keep("first", KEYS)
    declined(stage)
    (compare,) = stage.step({"b": 4}).compares
    answer(stage, compare, DONE, CORRUPT, DONE, FAILED)
    assert stage.matchable(KEYS) == 0
    assert stage.leader.core.health.quarantined is not None
    assert stage.leader.core.health.problems == [stage.leader.core.health.quarantined]
    assert len([record for record in caplog.records if "quarantined" in record.message]) == 1
    shadow = shadow_of(stage)
    assert (shadow.counts.compared, shadow.counts.mismatched, shadow.counts.skipped) == (3, 1, 1)

    reports.wait(10)
    (path,) = (tmp_path / "reports").iterdir()
    assert str(path) in stage.leader.core.health.quarantined
    assert path.stat().st_mode & 0o777 == 0o600
    report = json.loads(path.read_text())
    assert (report["kind"], report["engine"], report["request_id"]) == ("shadow", "engine-1", "b")
    (block,) = report["differ"]
    assert block["key"] == KEYS[1].hex()
    assert (block["tier"], block["from"], block["block_of_prompt"]) == ("g2", "engine", 1)
    assert 0 <= block["age_s"] < 600
    assert block["distance_by_rank"] == {"0": pytest.approx(1.4)}

    # Nothing new is stored, nor found, by requests that live now or later, until an operator says so.
    assert stage.compute("c", keys_of("c", 2), [1, 2]).stores == []
    stage.leader.core.resume()
    assert (stage.leader.core.health.problems, stage.leader.core.health.quarantined) == ([], None)
    assert stage.matchable(KEYS) == 0
    stage.leader.finish("b", [20, 21, 22, 23], 4)
    stage.keep("d", KEYS)
    assert stage.matchable(KEYS) == 4


def test_a_quarantine_holds_on_disk_and_through_a_restart(make_stage: Make) -> None:
    stage = make_stage(64, shadow_every=1).add_disk()
    stage.on_disk("first", KEYS)
    stage.begin("b", KEYS)
    while stage.leader.match("b", 0, 4) is None:
        for read in stage.hear(Read):
            stage.moved(read)
    stage.place("b", [20, 21, 22, 23])
    (compare,) = stage.step({"b": 4}).compares
    sample = next(iter(shadow_of(stage).samples.values()))
    assert {block["from"] for block in sample.origins} == {"g3"}
    answer(stage, compare, CORRUPT, DONE, DONE, DONE)
    stage.settle()
    assert stage.disk.peek(KEYS) == 0
    assert stage.folder.generation == 1  # what a restart reads


def test_one_rank_is_enough(make_stage: Make) -> None:
    stage = make_stage(64, ranks=2, shadow_every=1)
    stage.keep("first", KEYS)
    declined(stage)
    (compare,) = stage.step({"b": 4}).compares
    answer(stage, compare, DONE, DONE, CORRUPT, DONE, rank=1)
    assert stage.leader.core.health.quarantined is None
    answer(stage, compare, DONE, DONE, DONE, DONE, rank=0)
    assert stage.leader.core.health.quarantined is not None


def test_what_cannot_be_compared_is_no_alarm(stage: Stage) -> None:
    declined(stage)
    (compare,) = stage.step({"b": 4}).compares
    answer(stage, compare, FAILED, FAILED, FAILED, FAILED)
    assert stage.leader.core.health.quarantined is None
    assert shadow_of(stage).counts.skipped == 4


def test_one_of_so_many(make_stage: Make) -> None:
    stage = make_stage(64, shadow_every=8)
    stage.keep("first", KEYS)
    missed = 0
    for number in range(400):
        name = f"r{number}"
        stage.begin(name, KEYS)
        found = stage.leader.match(name, 0, 4)
        assert found == stage.leader.match(name, 0, 4)  # the answer for a request stays
        missed += found == 0
        stage.leader.finish(name, [], 0)
    assert 20 < missed < 100


def test_off_means_off(make_stage: Make) -> None:
    stage = make_stage(64)
    stage.keep("first", KEYS)
    assert stage.leader.shadow is None
    stage.answer(stage.load("b", KEYS, [20, 21, 22, 23]))
    assert stage.step({"b": 4}).compares == []


def test_it_holds_no_more_than_its_part(make_stage: Make) -> None:
    stage, keys = make_stage(64, shadow_every=1), keys_of("long", 20)
    stage.keep("first", keys)
    declined(stage, keys=keys)
    shadow = shadow_of(stage)
    assert shadow.held == 8
    stage.begin("c", keys)
    assert stage.leader.match("c", 0, 20) == 20  # no room for another: a hit
    (compare,) = stage.step({"b": 20}).compares
    answer(stage, compare, *[DONE] * 8)
    assert (shadow.held, shadow.counts.compared) == (0, 8)


def test_nor_in_two_requests_of_one_step(make_stage: Make) -> None:
    stage, keys = make_stage(64, shadow_every=1), keys_of("long", 6)
    stage.keep("first", keys)
    for name in ("b", "c"):
        stage.begin(name, keys)
        assert stage.leader.match(name, 0, 6) == 0
    for name in ("b", "c"):
        stage.place(name, list(range(20, 26)))
    assert shadow_of(stage).held == 8
    for name in ("b", "c"):
        stage.leader.finish(name, [], 0)
    assert (shadow_of(stage).held, shadow_of(stage).counts.skipped) == (0, 8)


def test_nor_for_longer_than_its_time(stage: Stage) -> None:
    declined(stage)
    stage.tick(59)
    assert shadow_of(stage).held == 4
    stage.tick(2)
    assert shadow_of(stage).held == 0
    assert stage.step({"b": 4}).compares == []


def test_a_request_that_ends_lets_go(stage: Stage) -> None:
    declined(stage)
    (compare,) = stage.step({"b": 2}).compares
    stage.leader.finish("b", [20, 21, 22, 23], 2)
    assert shadow_of(stage).held == 4  # what is being compared is still held
    answer(stage, compare, DONE, DONE)
    assert (shadow_of(stage).held, shadow_of(stage).counts.skipped) == (0, 2)


def test_a_new_generation_says_nothing_of_the_old(stage: Stage) -> None:
    declined(stage)
    (compare,) = stage.step({"b": 2}).compares
    stage.leader.reset()
    answer(stage, compare, CORRUPT, CORRUPT)
    assert stage.leader.core.health.quarantined is None
    assert shadow_of(stage).counts.mismatched == 0
    assert stage.step({"b": 4}).compares == []
    assert shadow_of(stage).held == 0


def test_what_was_evicted_meanwhile(stage: Stage) -> None:
    stage.begin("b", KEYS)
    assert stage.leader.match("b", 0, 4) == 0
    stage.pool.discard(KEYS[2:])
    stage.place("b", [20, 21, 22, 23])
    assert shadow_of(stage).held == 0
    assert stage.step({"b": 4}).compares == []


def test_no_room_for_what_was_computed(make_stage: Make) -> None:
    stage = make_stage(8, shadow_every=1)
    stage.keep("first", KEYS)
    declined(stage)
    held = stage.pool.allocate(7)
    assert held is not None
    assert stage.step({"b": 1}).compares == []
    assert (shadow_of(stage).held, shadow_of(stage).counts.skipped) == (0, 1)
    held.drop()


def test_a_request_that_is_preempted_goes_on(stage: Stage) -> None:
    declined(stage)
    (one,) = stage.step({"b": 2}).compares
    assert stage.leader.match("b", 0, 4) == 0
    stage.place("b", [30, 31, 32, 33])
    (two,) = stage.step({"b": 4}).compares
    assert two.g1_slots().tolist() == [32, 33]
    answer(stage, one, DONE, DONE)
    answer(stage, two, DONE, DONE)
    assert shadow_of(stage).counts.compared == 4


def test_what_the_engine_holds_itself_is_not_compared(stage: Stage) -> None:
    stage.begin("b", KEYS)
    assert stage.leader.match("b", 2, 4) == 0
    stage.place("b", [10_000, 10_001, 22, 23])
    (compare,) = stage.step({"b": 4}).compares
    assert compare.g1_slots().tolist() == [22, 23]
    answer(stage, compare, DONE, DONE)


def test_a_report_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    reports = Reports(tmp_path / "file", "e")
    reports.save("shadow", {})
    reports.wait(10)
    assert "cannot be written" in caplog.text


def test_old_reports_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvbm.leader.reports.KEPT", 2)
    reports = Reports(tmp_path, "e")
    paths = []
    for number in range(4):
        paths.append(reports.save("check", {"number": number}))
        reports.wait(10)
    assert sorted(tmp_path.iterdir()) == sorted(paths[2:])


# ---------------------------------------------------------------------- before anything of others is used

THEIRS, G1 = KEYS[2:], [40, 41, 42, 43]


def _asks(stage: Stage, name: str, family: bytes = b"") -> int:
    """How much of its hit a request loads."""
    stage.leader.begin(name, KEYS, RequestParams(), len(KEYS) * BLOCK_TOKENS)
    if family:
        adapter = Adapter(1, "mine", b"")
        stage.leader.requests[name].variant = Variant(adapter, None, mock.Mock(), digest=family)
    found = stage.leader.match(name, 0, len(KEYS))
    assert found is not None
    stage.place(name, G1, found)
    for load in stage.step().loads:
        stage.answer(load)
    return found


@pytest.fixture
def careful(make_stage: Make) -> Stage:
    """Host memory has two blocks that this process stored, and behind them two that came from disk."""
    stage = make_stage(64, prove_first=True)
    stage.keep("first", KEYS)
    theirs = stage.pool.scan(THEIRS)[0]
    shadow_of(stage).origins.landed(theirs, Landing("g3"))
    theirs.drop()
    return stage


def _compared(stage: Stage, name: str, *outcomes: Outcome) -> None:
    (compare,) = stage.step({name: 4}).compares
    assert compare.g1_slots().tolist() == [42, 43], "what the process stored itself is loaded"
    answer(stage, compare, *outcomes)


def _ends(stage: Stage, name: str) -> None:
    stage.leader.finish(name, G1, 0)
    stage.step()


def test_what_others_stored_is_used_once_it_agreed(careful: Stage) -> None:
    assert _asks(careful, "b") == 2
    assert any("declined" in sentence for sentence in careful.leader.records["b"].why)
    _compared(careful, "b", DONE, DONE)
    _ends(careful, "b")
    for name, family, found in (("c", b"", 4), ("d", b"adapter", 2)):
        assert _asks(careful, name, family) == found, "of each adapter its own"
        _ends(careful, name)
    careful.leader.reset()
    careful.keep("again", KEYS)
    theirs = careful.pool.scan(THEIRS)[0]
    shadow_of(careful).origins.landed(theirs, Landing("peers"))
    theirs.drop()
    assert _asks(careful, "e") == 2, "a reset begins anew"
    _ends(careful, "e")


@pytest.mark.parametrize("outcomes", [(DONE, FAILED), (FAILED, FAILED), (DONE, CORRUPT)])
def test_nothing_is_used_until_all_agreed(careful: Stage, outcomes: tuple[Outcome, ...]) -> None:
    assert _asks(careful, "b") == 2
    _compared(careful, "b", *outcomes)
    _ends(careful, "b")
    if CORRUPT in outcomes:
        assert careful.leader.core.health.quarantined is not None
        assert careful.matchable(KEYS) == 0
    else:
        assert _asks(careful, "c") == 2
        _ends(careful, "c")


def test_what_this_process_stored_proves_nothing_of_others(make_stage: Make) -> None:
    stage = make_stage(64, prove_first=True, shadow_every=1)
    stage.keep("first", KEYS)
    declined(stage, start=20)
    (compare,) = stage.step({"b": 4}).compares
    answer(stage, compare, *[DONE] * 4)
    assert not shadow_of(stage).proven
