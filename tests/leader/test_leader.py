"""Which block is where, who holds it, what moves next; the test plays the engine and the workers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

import tests.before  # noqa: F401
from kvbm.core.events import Admitted, Event, Unread
from kvbm.leader import core as offload
from kvbm.leader.growing import Growing
from kvbm.leader.pace import Answers
from kvbm.leader.requests import RequestParams
from kvbm.link.messages import Allot, Bye, GiveUp, Result, Sick, Touched
from tests.leader.roles import BLOCK_BYTES, BLOCK_TOKENS, DONE, FAILED, Stage, keys_of
from tests.leader.ways import Offloaded, Onboarded

Make = Callable[..., Stage]

# ---------------------------------------------------------------------- down


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_store_is_matchable_once_every_rank_is_done(make_stage: Make, ranks: int) -> None:
    stage, keys = make_stage(ranks=ranks), keys_of("a", 4)
    (store,) = stage.compute("a", keys, [5, 6, 7, 8]).stores
    assert store.g1_slots().tolist() == [5, 6, 7, 8]
    for rank in range(ranks):
        assert stage.matchable(keys) == 0
        stage.answer(store, rank=rank)
    assert stage.matchable(keys) == 4
    assert Offloaded(4, 0, ranks * 4 * BLOCK_BYTES, 0.001) in stage.events


@pytest.mark.parametrize("bad", [0, 1])
def test_a_block_that_failed_on_one_rank_is_never_matched(make_stage: Make, bad: int) -> None:
    stage, keys = make_stage(ranks=2), keys_of("a", 4)
    (store,) = stage.compute("a", keys, [5, 6, 7, 8]).stores
    stage.answer(store, DONE, DONE, FAILED, DONE, rank=bad)
    stage.answer(store, rank=1 - bad)
    assert stage.matchable(keys) == 2
    assert stage.pool.peek(keys, 3) == 1
    assert stage.pool.absent(keys) == [2]
    assert Offloaded(3, 1, 8 * BLOCK_BYTES, 0.001) in stage.events
    assert "1 blocks failed to be offloaded: injected" in stage.leader.records["a"].why


def test_an_answer_of_another_length_publishes_nothing(stage: Stage) -> None:
    keys = keys_of("a", 3)
    (store,) = stage.compute("a", keys, [1, 2, 3]).stores
    stage.answer(store, DONE)
    assert stage.matchable(keys) == 0


def test_answers_count_once(make_stage: Make) -> None:
    stage, keys = make_stage(ranks=2), keys_of("a", 2)
    (store,) = stage.compute("a", keys, [1, 2]).stores
    stage.answer(store, rank=0)
    stage.answer(store, rank=0)
    assert stage.matchable(keys) == 0
    stage.answer(store, rank=1)
    stage.answer(store, FAILED, FAILED, rank=1)
    stage.say(Result(999, 0, b"", 0, 0.0))
    assert stage.matchable(keys) == 2
    assert sum(isinstance(event, Offloaded) for event in stage.events) == 1


def test_only_what_g2_lacks_is_offloaded(stage: Stage) -> None:
    keys = keys_of("a", 6)
    stage.keep("first", keys[:3])
    stage.begin("b", keys)
    stage.place("b", [1, 2, 3, 4, 5, 6])
    (store,) = stage.step({"b": 4}).stores
    assert store.g1_slots().tolist() == [4]
    (store,) = stage.step({"b": 6}).stores
    assert store.g1_slots().tolist() == [5, 6]
    assert not stage.step({"b": 6}).stores


def test_blocks_that_are_being_stored_are_not_stored_again(stage: Stage) -> None:
    keys = keys_of("a", 2)
    assert stage.compute("a", keys, [1, 2]).stores
    stage.begin("b", keys)
    stage.place("b", [3, 4])
    assert not stage.step({"b": 2}).stores


def test_the_table_of_a_preempted_request_is_replaced(stage: Stage) -> None:
    keys = keys_of("a", 4)
    stage.begin("a", keys)
    stage.place("a", [1])
    stage.leader.grow("a", [2], replace=False)
    (store,) = stage.step({"a": 2}).stores
    assert store.g1_slots().tolist() == [1, 2]
    stage.leader.grow("a", [11, 12, 13, 14], replace=True)
    stage.leader.grow("gone", [1], replace=True)
    (store,) = stage.step({"a": 4}).stores
    assert store.g1_slots().tolist() == [13, 14]


def test_copies_in_flight_are_bounded(make_stage: Make) -> None:
    stage, keys = make_stage(store_inflight_mb=3), keys_of("a", 8)
    (first,) = stage.compute("a", keys, list(range(8))).stores
    assert first.g1_slots().tolist() == [0, 1, 2]
    assert not stage.step({"a": 8}).stores
    assert stage.leader.deferred == 1
    stage.answer(first)
    assert not stage.step({"a": 8}).stores  # results are taken when a step is sealed
    (second,) = stage.step({"a": 8}).stores
    assert second.g1_slots().tolist() == [3, 4, 5]


def test_a_block_larger_than_the_bound_is_copied_alone(make_stage: Make) -> None:
    stage = make_stage(store_inflight_mb=1)
    stage.leader._slot_bytes = 2 * BLOCK_BYTES
    (store,) = stage.compute("a", keys_of("a", 2), [1, 2]).stores
    assert store.g1_slots().tolist() == [1]


def test_a_full_pool_evicts_and_defers_what_does_not_fit(make_stage: Make) -> None:
    stage, keys = make_stage(4), keys_of("b", 6)
    stage.keep("a", keys_of("a", 4))
    (store,) = stage.compute("b", keys, list(range(6))).stores
    assert len(store.g1_slots()) == 4
    assert not stage.step({"b": 6}).stores
    assert "KVBM did not offload some blocks at once" in stage.leader.records["b"].why[-1]


# ---------------------------------------------------------------------- up


def test_the_life_of_a_load(stage: Stage) -> None:
    keys = keys_of("a", 6)
    stage.keep("first", keys[:4])
    stage.begin("b", keys)
    assert stage.leader.match("b", 1, 6) == 3
    assert stage.pool.statistics().active == 3
    stage.place("b", [10_000, 21, 22, 23, 24, 25], 3)
    step = stage.leader.seal(tokens=0)
    (load,) = step.loads
    assert (load.request, load.g1_slots().tolist()) == ("b", [21, 22, 23])
    assert not step.sync
    assert step.idle
    assert stage.pool.statistics().active == 3
    stage.answer(load)
    stage.place("b", [10_000, 21, 22, 23, 24, 25])
    (store,) = stage.step({"b": 6}).stores
    assert store.g1_slots().tolist() == [24, 25]
    record = stage.leader.records["b"]
    assert (record.matched, record.loaded, record.load, record.outcome) == (3, 3, "async", "computing")
    assert stage.pool.statistics().active == 0
    assert Onboarded(3, 0, 3 * BLOCK_BYTES, 0.001) in stage.events


def test_g2_slots_of_a_load_are_those_of_its_store(stage: Stage) -> None:
    keys = keys_of("a", 3)
    (store,) = stage.compute("a", keys, [1, 2, 3]).stores
    stage.answer(store)
    assert stage.load("b", keys, [7, 8, 9]).g2 == store.g2


def test_loads_inside_the_step(make_stage: Make) -> None:
    stage, keys = make_stage(onboard="sync"), keys_of("a", 2)
    stage.keep("first", keys)
    assert not stage.step().sync
    stage.begin("b", keys)
    assert stage.leader.match("b", 0, 1) == 1
    stage.place("b", [1, 2], 1)
    assert stage.step({"b": 2}, reuse=[1, 2]).sync


def test_a_match_without_blocks_is_let_go_when_the_step_is_sealed(stage: Stage) -> None:
    keys = keys_of("a", 2)
    stage.keep("first", keys)
    stage.begin("b", keys)
    for _ in range(3):
        assert stage.leader.match("b", 0, 2) == 2
    assert stage.pool.statistics().active == 2
    assert not stage.leader.seal(tokens=0).loads
    assert stage.pool.statistics().active == 0


def test_the_engine_may_want_less_than_was_matched(stage: Stage) -> None:
    keys = keys_of("a", 4)
    stage.keep("first", keys)
    stage.begin("b", keys)
    stage.begin("c", keys)
    assert stage.leader.match("b", 0, 4) == 4
    stage.place("b", [1, 2, 3, 4], 0)
    assert stage.pool.statistics().active == 0
    assert stage.leader.match("c", 0, 4) == 4
    stage.place("c", [5, 6, 7, 8], 2)
    (load,) = stage.step().loads
    assert load.g1_slots().tolist() == [5, 6]
    assert stage.pool.statistics().active == 2


def test_nothing_to_match(stage: Stage) -> None:
    keys = keys_of("a", 2)
    assert stage.leader.match("unknown", 0, 2) == 0
    stage.place("unknown", [1], 1)
    stage.begin("a", keys)
    assert stage.leader.match("a", 0, 2) == 0
    assert stage.leader.match("a", 2, 2) == 0
    assert stage.leader.match("a", 0, 0) == 0
    assert stage.leader.records["a"].why == [
        "G2 did not hold the next block",
        "KVBM had nothing to load: the engine itself holds all blocks but that of the last token",
    ]


def test_one_prefix_is_loaded_once(stage: Stage) -> None:
    keys = keys_of("a", 4)
    stage.keep("first", keys)
    load = stage.load("b", keys, [1, 2, 3, 4])
    stage.begin("c", keys)
    assert stage.leader.match("c", 0, 4) is None
    stage.answer(load)
    assert stage.leader.match("c", 0, 4) is None  # the engine has not taken the blocks over yet
    stage.place("b", [1, 2, 3, 4])
    assert stage.leader.match("c", 0, 4) == 4
    assert stage.leader.records["c"].why == ["the request waited for request b, which loads the same blocks"]


def test_a_resumed_request_stops_others_waiting_once_it_computes(stage: Stage) -> None:
    keys = keys_of("a", 4)
    for store in stage.compute("b", keys, [1, 2, 3, 4]).stores:
        stage.answer(store)
    load = stage.load("b", keys, [5, 6, 7, 8], begin=False)  # it was preempted
    stage.answer(load)
    stage.begin("c", keys)
    assert stage.leader.match("c", 0, 4) is None
    stage.leader.advance("b", 4)
    assert stage.leader.match("c", 0, 4) == 4


def test_without_shared_device_blocks_nobody_waits(make_stage: Make) -> None:
    stage, keys = make_stage(shares=False), keys_of("a", 2)
    stage.keep("first", keys)
    stage.load("b", keys, [1, 2])
    stage.begin("c", keys)
    assert stage.leader.match("c", 0, 2) == 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_failed_load_un_publishes_before_the_next_match(make_stage: Make, ranks: int) -> None:
    stage, keys = make_stage(ranks=ranks), keys_of("a", 4)
    stage.keep("first", keys)
    load = stage.load("b", keys, [1, 2, 3, 4])
    for rank in range(ranks - 1):
        stage.answer(load, rank=rank)
    stage.answer(load, DONE, FAILED, DONE, DONE, rank=ranks - 1)
    assert stage.leader.match("b", 0, 4) == 1
    record = stage.leader.records["b"]
    assert (record.loaded, record.outcome) == (3, "load failed, computed instead")
    assert Onboarded(3, 1, ranks * 4 * BLOCK_BYTES, 0.001) in stage.events
    assert stage.pool.absent(keys) == [1]


def test_holds_are_bounded_by_many_waiting_requests(make_stage: Make) -> None:
    stage = make_stage(100, held_share=0.3)
    for i in range(5):
        stage.keep(f"old {i}", keys_of(f"{i}", 20))
    for i in range(200):
        stage.begin(f"r{i}", keys_of(f"{i % 5}", 20))
        found = stage.leader.match(f"r{i}", 0, 19)
        assert found is None or i < 2
        assert stage.pool.statistics().active <= 30
    stage.leader.place("r0", list(range(20)), 19, Admitted(640, 0, 608))
    (load,) = stage.step().loads
    assert stage.pool.statistics().active == 19
    stores = stage.compute("new", keys_of("new", 70), list(range(100, 170))).stores
    assert len(stores[0].g1_slots()) == 70
    stage.answer(load)
    stage.place("r0", list(range(20)))
    for i in range(1, 200):
        assert stage.leader.match(f"r{i}", 0, 19) is not None or stage.pool.statistics().active == 30
    assert "the request waited: loads of other requests hold their share of G2" in stage.leader.records["r199"].why


def test_a_prompt_without_a_hit_never_waits_for_holds(make_stage: Make) -> None:
    stage, keys = make_stage(8, held_share=0.25), keys_of("a", 2)
    stage.keep("first", keys)
    stage.load("b", keys, [1, 2])
    stage.begin("c", keys_of("c", 2))
    assert stage.leader.match("c", 0, 2) == 0


def test_the_bound_leaves_room_for_one_block(make_stage: Make) -> None:
    stage, keys = make_stage(4, held_share=0.01), keys_of("a", 3)
    stage.keep("first", keys)
    stage.begin("b", keys)
    assert stage.leader.match("b", 0, 3) == 1
    assert "KVBM loaded only 1 of 3 blocks: requests may hold only a share of G2" in stage.leader.records["b"].why


def test_held_blocks_are_not_evicted(make_stage: Make) -> None:
    stage, keys = make_stage(4, held_share=1.0), keys_of("a", 4)
    stage.keep("first", keys)
    load = stage.load("b", keys, [1, 2, 3, 4])
    assert not stage.compute("c", keys_of("c", 2), [5, 6]).stores
    stage.answer(load)
    assert stage.matchable(keys) == 4


# ---------------------------------------------------------------------- fences, the end of a request


def test_the_fence_names_the_copies_that_read_what_the_step_overwrites(stage: Stage) -> None:
    (one,) = stage.compute("a", keys_of("a", 2), [1, 2]).stores
    (two,) = stage.compute("b", keys_of("b", 2), [3, 4]).stores
    (three,) = stage.compute("c", keys_of("c", 2), [5, 6]).stores
    stage.answer(three)
    assert stage.step(reuse=[2, 3, 5, 77]).fence == [one.job, two.job]
    assert stage.step(reuse=[9]).fence == []
    stage.answer(one)
    assert stage.step(reuse=[1, 4]).fence == [two.job]


def test_a_block_stored_again_in_the_step_that_reuses_it_is_still_fenced(stage: Stage) -> None:
    """A preempted request's block goes to another one, whose first step fills it and offloads it at once."""
    (old,) = stage.compute("a", keys_of("a", 2), [1, 2]).stores
    step = stage.compute("b", keys_of("b", 2), [2, 1])
    (new,) = step.stores
    assert step.fence == [old.job]
    stage.answer(old)
    assert stage.step(reuse=[1]).fence == [new.job]


def test_the_targets_of_a_load_are_fenced(stage: Stage) -> None:
    keys = keys_of("a", 2)
    stage.keep("first", keys)
    (store,) = stage.compute("b", keys_of("b", 2), [1, 2]).stores
    stage.begin("c", keys)
    assert stage.leader.match("c", 0, 2) == 2
    stage.place("c", [2, 9], 2)
    assert stage.step().fence == [store.job]


def test_a_finished_requests_blocks_are_fenced_while_they_are_copied(stage: Stage) -> None:
    (first,) = stage.compute("a", keys_of("a", 3), [1, 2, 3]).stores
    stage.leader.finish("a", [1, 2, 3], 3)
    assert stage.step().fence == []
    assert stage.step(reuse=[3, 4]).fence == [first.job]
    stage.answer(first)
    assert stage.step(reuse=[1]).fence == []


def test_what_a_step_needs_before_it_is_copied_is_no_failure(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    keys = keys_of("a", 3)
    (store,) = stage.compute("a", keys, [1, 2, 3]).stores
    assert stage.step(reuse=[2]).fence == [store.job]
    stage.answer(store, DONE, FAILED, FAILED)
    stage.leader.tick()
    assert stage.leader.pool.present(keys).tolist() == [True, False, False]
    assert stage.leader.dropped == 2
    assert not caplog.records
    assert "did not offload 2 blocks" in "".join(stage.leader.records["a"].why)


def _ended(stage: Stage, keys: list[bytes], g1: list[int]) -> None:
    """A request of which nothing is offered before its end."""
    stage.begin("a", keys)
    stage.place("a", g1)
    stage.leader.finish("a", g1, len(keys))


def test_what_no_worker_has_begun_is_dropped_for_the_blocks_that_are_handed_out(stage: Stage) -> None:
    """A fence would wait for nothing, and what is in these blocks after the step would be stored under these keys."""
    keys = keys_of("a", 4)
    _ended(stage, keys, [1, 2, 3, 4])
    stage.leader.reuse([2])
    step = stage.step(reuse=[2, 3, 9])
    assert (len(step.stores), step.fence, stage.leader.dropped) == (1, [], 2)
    assert stage.step(reuse=[2]).fence == []
    assert stage.step(reuse=[4]).fence == [step.stores[0].job]
    stage.answer(step.stores[0])
    stage.leader.tick()
    assert stage.pool.present(keys).tolist() == [True, False, False, True]
    assert [event for event in stage.events if isinstance(event, Offloaded)][-1].blocks == 2
    assert stage.leader._copies.blocks_read == 0


def test_nothing_of_it_is_left(stage: Stage) -> None:
    _ended(stage, keys_of("a", 2), [1, 2])
    step = stage.step(reuse=[2, 1])
    assert (step.stores, step.fence, stage.leader.dropped) == ([], [], 2)
    assert stage.leader.in_flight() == (0, 0)
    assert stage.pool.statistics().staged == 0


def test_a_block_that_is_read_by_a_copy_that_began_and_by_one_that_did_not(stage: Stage) -> None:
    keys = keys_of("a", 2)
    (first,) = stage.compute("a", keys, [1, 2]).stores
    stage.leader.requests["a"].offered = 0
    stage.leader.finish("a", [1, 2], 2)  # once more
    step = stage.step(reuse=[1, 2])
    assert (step.stores, step.fence) == ([], [first.job])
    stage.answer(first)


def test_a_reset_drops_what_no_worker_has_begun_and_waits_for_the_rest(stage: Stage) -> None:
    (first,) = stage.compute("b", keys_of("b", 1), [9]).stores
    _ended(stage, keys_of("a", 2), [1, 2])
    stage.leader.reset()
    assert stage.leader.in_flight() == (1, 0)
    over = threading.Thread(target=stage.leader.quiesce, args=(30.0,))
    over.start()
    time.sleep(0.05)
    assert over.is_alive()
    stage.answer(first)
    over.join(10)
    assert not over.is_alive()
    assert (stage.step().stores, stage.leader.dropped) == ([], 0)
    assert stage.matchable([*keys_of("b", 1), *keys_of("a", 2)]) == 0
    assert (stage.hear(GiveUp), stage.leader.problems) == ([], [])


def test_copies_that_do_not_end_are_given_up_at_a_reset(make_stage: Make) -> None:
    stage, keys = make_stage(ranks=2), keys_of("a", 2)
    (first,) = stage.compute("a", keys, [1, 2]).stores
    (second,) = stage.compute("b", keys_of("b", 1), [3]).stores
    stage.answer(first, rank=0)
    stage.leader.reset()
    over = threading.Thread(target=stage.leader.quiesce, args=(0.01,))
    over.start()
    for rank, jobs in ((0, [second.job]), (1, [first.job, second.job])):
        message = stage.workers[rank].wait(30)
        assert message == GiveUp(jobs)
    assert over.is_alive()
    for copy, rank in ((second, 0), (first, 1), (second, 1)):
        stage.say(Result(copy.job, rank, b"", 0, 0.0, "given up"), rank)
    over.join(10)
    assert not over.is_alive()
    assert (stage.leader.in_flight(), stage.leader.problems) == ((0, 0), [])
    stage.answer(first)  # a copy that ended while it was given up
    assert stage.matchable(keys) == 0


def test_workers_that_do_not_give_up_turn_kvbm_off(make_stage: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they copy still, it is not published."""
    monkeypatch.setattr(offload, "GRACE", 0.01)
    stage, keys = make_stage(), keys_of("a", 2)
    stage.keep("old", keys_of("old", 2))
    load = stage.load("c", keys_of("old", 2), [5, 6])
    (store,) = stage.compute("a", keys, [1, 2]).stores
    stage.leader.reset()
    stage.leader.quiesce(0.01)
    assert stage.leader.off == "off until the engine is started anew: 2 copies may go on after a reset"
    for copy in (store, load):
        stage.answer(copy)
    assert stage.matchable(keys) == stage.matchable(keys_of("old", 2)) == 0
    assert stage.leader.in_flight() == (0, 0)
    assert stage.pool.statistics().staged == stage.pool.statistics().active == 0


def test_nobody_waits_for_a_worker_that_is_gone(make_stage: Make) -> None:
    stage = make_stage(ranks=2)
    (store,) = stage.compute("b", keys_of("b", 1), [9]).stores
    stage.workers[0].close()
    over = threading.Thread(target=stage.leader.quiesce, args=(60.0,))
    over.start()
    time.sleep(0.05)
    assert over.is_alive(), "but for the others"
    stage.answer(store, rank=1)
    over.join(10)
    assert not over.is_alive()


def test_a_finished_request_offers_its_last_blocks(stage: Stage) -> None:
    keys = keys_of("a", 3)
    stage.begin("a", keys)
    stage.place("a", [1, 2, 3])
    (first,) = stage.step({"a": 1}).stores
    stage.answer(first)
    stage.leader.finish("a", [1, 2, 3], 2)
    (last,) = stage.step().stores
    assert last.g1_slots().tolist() == [2]
    stage.answer(last)
    assert stage.matchable(keys) == 2


@pytest.mark.parametrize("late", [False, True])
def test_a_request_that_ends_while_it_loads_offers_nothing(stage: Stage, late: bool) -> None:
    keys = keys_of("a", 4)
    stage.keep("first", keys[:2])
    load = stage.load("b", keys, [1, 2, 3, 4])
    if not late:
        stage.answer(load, FAILED, FAILED)
    stage.leader.finish("b", [1, 2, 3, 4], 4)
    assert stage.step().stores == []
    if late:
        stage.answer(load)
    assert stage.matchable(keys) == (2 if late else 0)
    assert stage.leader.records["b"].outcome == "finished"
    assert stage.pool.statistics().active == 0
    stage.begin("c", keys)
    assert stage.leader.match("c", 0, 4) == (2 if late else 0)


def test_the_blocks_of_a_loading_request_that_ends(stage: Stage) -> None:
    """The engine waits for the load of an aborted request itself; others still read its blocks."""
    shared, keys = keys_of("a", 2), keys_of("a", 4)
    stage.keep("first", keys)
    stage.pool.discard(shared)
    (store,) = stage.compute("other", shared, [1, 2]).stores
    stage.begin("b", keys)
    assert stage.leader.match("b", 2, 4) == 2
    stage.place("b", [1, 2, 3, 4], 2)
    (load,) = stage.step().loads
    stage.leader.finish("b", [1, 2, 3, 4], 2)
    assert stage.step().stores == []
    stage.answer(load)
    assert stage.step(reuse=[1, 2, 3, 4]).fence == [store.job]


def test_a_request_that_ends_with_a_hold_lets_it_go(stage: Stage) -> None:
    keys = keys_of("a", 2)
    stage.keep("first", keys)
    stage.begin("b", keys)
    assert stage.leader.match("b", 0, 2) == 2
    stage.leader.finish("b", [], 0)
    assert stage.pool.statistics().active == 0
    assert stage.leader.seal(tokens=0).loads == []


# ---------------------------------------------------------------------- what a request asks for


def test_opting_out_of_loading(stage: Stage) -> None:
    keys = keys_of("a", 2)
    stage.keep("first", keys)
    stage.begin("b", keys, load=False)
    assert stage.leader.match("b", 0, 2) == 0
    assert stage.leader.records["b"].why == ["the request may not read, or opted out of loading"]


def test_opting_out_of_saving(stage: Stage) -> None:
    assert not stage.compute("a", keys_of("a", 2), [1, 2], save=False).stores
    stage.leader.finish("a", [1, 2], 2)
    assert stage.leader.records["a"].why[-1] == "KVBM offloaded nothing more: the request opted out of saving"


def test_what_is_not_worth_keeping_is_not_copied(make_stage: Make) -> None:
    """A prompt of 3.5 blocks; what follows are its answer's."""
    stage = make_stage(save_answers=False)
    keys, g1 = keys_of("a", 6), [1, 2, 3, 4, 5, 6]
    stage.leader.begin("a", keys, RequestParams(), 112)
    assert stage.leader.match("a", 0, 3) == 0
    stage.place("a", g1)
    for complete in (2, 4, 6):
        for copy in stage.step({"a": complete}).stores:
            stage.answer(copy)
    stage.leader.finish("a", g1, 6)
    assert stage.pool.statistics().registered == stage.pool.peek(keys) == 3
    assert stage.leader.records["a"].why[-1] == "KVBM offloads only the first 3 blocks: the others are not worth it"
    stage.keep("b", keys_of("b", 6), save_tokens=70)
    assert stage.pool.peek(keys_of("b", 6)) == 2
    stage.keep("c", keys_of("c", 6))
    assert stage.pool.peek(keys_of("c", 6)) == 6


def _talk(stage: Stage, *, stripped: bool, users: int = 8) -> int:
    """Two turns of each: prompts of two blocks, answers of six. How many blocks the second turns found."""
    talks = [keys_of(f"talk {user}", 8) for user in range(users)]
    for user, keys in enumerate(talks):
        _serve(stage, f"first {user}", keys, prompt=2)
    found = 0
    for user, keys in enumerate(talks):
        keys = [*(keys[:2] if stripped else keys), *keys_of(f"then {user}", 1)]
        found += _serve(stage, f"second {user}", keys, prompt=len(keys))
    return found


def _serve(stage: Stage, name: str, keys: list[bytes], prompt: int) -> int:
    stage.leader.begin(name, keys, RequestParams(), prompt * BLOCK_TOKENS)
    found = stage.leader.match(name, 0, prompt)
    assert found is not None
    g1 = list(range(1, len(keys) + 1))
    stage.place(name, g1, found)
    for copy in stage.step(reuse=g1[found:]).loads:
        stage.answer(copy)
    for copy in stage.step({name: len(keys)}).stores:
        stage.answer(copy)
    stage.leader.finish(name, g1, len(keys))
    return found


def test_answers_that_are_not_asked_for_again_leave_first(make_stage: Make) -> None:
    """64 blocks were given, 16 of them prompts; G2 holds 32."""
    assert _talk(make_stage(32, most_doubted=0.1), stripped=True) == 16
    assert _talk(make_stage(32, most_doubted=1.0), stripped=True) < 8, "the control"


def test_answers_that_are_asked_for_again_stay(make_stage: Make) -> None:
    """What was learnt from the first talks keeps the answers of all later ones."""
    for share in (1.0, 0.1):
        stage = make_stage(100, most_doubted=share)
        assert _talk(stage, stripped=False) == 64
        assert not stage.leader.answers.rarely_asked
        for user in range(100, 110):
            _serve(stage, f"late {user}", keys_of(f"late {user}", 8), prompt=2)
        late = keys_of("late 100", 8)
        assert _serve(stage, "again", late, prompt=8) == 8


def test_whether_answers_are_asked_for_is_learnt_from_prompts() -> None:
    answers = Answers()
    for number in range(100):
        answers.given(b"end %d" % number, b"first %d" % number)
    assert answers.rarely_asked, "nobody has gone on yet"
    answers.prompted([b"end %d" % number for number in range(50)] * 2)
    assert answers.rarely_asked
    answers.prompted([b"prompt", *(b"first %d" % number for number in range(9)), b"first 8"])
    assert answers.rarely_asked
    answers.prompted([b"first 9"])
    assert not answers.rarely_asked, "a fifth of those who go on have the answer"
    answers.prompted([b"end 99"])
    assert answers.rarely_asked
    for number in range(100, 5000):
        answers.given(None, b"first %d" % number)
        answers.given(b"end %d" % number, b"first %d" % number)
    answers.prompted([b"first 4999"])
    assert not answers.rarely_asked, "what was long ago is forgotten"


def test_who_may_not_read_is_neither_a_hit_nor_a_miss(stage: Stage) -> None:
    keys = keys_of("a", 2)
    stage.begin("out", keys, load=False)
    stage.leader.begin("barred", keys, RequestParams(), 64, None, "an image has no name")
    stage.begin("in", keys)
    for name in ("out", "barred", "in"):
        for _ in range(2):
            stage.place(name, [1, 2])
    assert stage.events == [Unread(), Unread(), Admitted(64, 0, 0)]


def test_a_request_whose_keys_are_in_doubt(stage: Stage) -> None:
    keys = keys_of("a", 4)
    stage.keep("first", keys[:2])
    stage.leader.begin("b", keys, RequestParams(), len(keys) * BLOCK_TOKENS, barred="in doubt")
    assert stage.leader.match("b", 0, 4) == 0
    stage.place("b", [1, 2, 3, 4])
    assert not stage.step({"b": 4}).stores
    stage.leader.finish("b", [1, 2, 3, 4], 4)
    assert stage.leader.records["b"].why == ["in doubt", "KVBM offloaded nothing more: in doubt"]
    stage.begin("c", keys)
    assert stage.leader.match("c", 0, 4) == 2
    stage.place("c", [5, 6, 7, 8])
    (store,) = stage.step({"c": 3}).stores
    stage.leader.bar("c", "in doubt from now on")
    assert not stage.step({"c": 4}).stores
    stage.answer(store)
    stage.leader.finish("c", [5, 6, 7, 8], 4)
    assert stage.matchable(keys) == 3, "what it computed before is right"
    stage.leader.bar("gone", "nobody")


def test_higher_priorities_stay_longer(make_stage: Make) -> None:
    stage = make_stage(4)
    stage.keep("high", keys_of("high", 2), priority=50)
    stage.keep("low", keys_of("low", 2))
    stage.keep("new", keys_of("new", 2))
    assert [stage.matchable(keys_of(name, 2)) for name in ("high", "low", "new")] == [2, 0, 2]


def test_blocks_live_as_long_as_asked(stage: Stage) -> None:
    keys = keys_of("a", 2)
    stage.keep("a", keys, ttl=5)
    stage.clock.advance(4)
    assert stage.matchable(keys) == 2
    stage.clock.advance(2)
    assert stage.matchable(keys) == 0


# ---------------------------------------------------------------------- operators


def test_pause_and_resume(stage: Stage) -> None:
    keys = keys_of("a", 2)
    (store,) = stage.compute("a", keys, [1, 2]).stores
    stage.leader.pause()
    stage.answer(store)
    assert stage.matchable(keys) == 2
    stage.begin("b", keys)
    assert stage.leader.match("b", 0, 2) == 0
    stage.place("b", [3, 4])
    assert not stage.step({"b": 2}).stores
    stage.leader.finish("b", [3, 4], 2)
    assert stage.leader.records["b"].why == ["KVBM is paused", "KVBM offloaded nothing more: KVBM is paused"]
    stage.leader.resume()
    stage.begin("c", keys)
    assert stage.leader.match("c", 0, 2) == 2


def test_switched_off_is_paused(make_stage: Make) -> None:
    stage = make_stage(enabled=False)
    assert stage.leader.paused
    assert not stage.compute("a", keys_of("a", 1), [1]).stores


def test_a_reset_begins_a_new_generation(stage: Stage) -> None:
    kept, staged, loaded = keys_of("kept", 2), keys_of("staged", 2), keys_of("loaded", 2)
    stage.keep("kept", kept)
    stage.keep("loaded", loaded)
    (store,) = stage.compute("old", staged, [1, 2]).stores
    load = stage.load("loading", loaded, [3, 4])
    stage.leader.reset()
    assert [stage.matchable(keys) for keys in (kept, staged, loaded)] == [0, 0, 0]
    stage.answer(store)
    stage.answer(load)
    assert stage.matchable(staged) == 0
    assert stage.pool.statistics().generation == 1
    old = keys_of("old", 4)
    stage.leader.requests["old"].keys = old
    stage.leader.grow("old", [5, 6], replace=False)
    assert not stage.step({"old": 4}).stores
    assert stage.leader.records["old"].why[-1] == "KVBM offloaded nothing more: the cache was reset while it ran"
    (store,) = stage.compute("new", staged, [7, 8]).stores
    stage.answer(store)
    assert stage.matchable(staged) == 2


# ---------------------------------------------------------------------- what breaks


def assert_stands_aside(stage: Stage, keys: list[bytes], problem: str) -> None:
    assert stage.leader.problems == [problem]
    stage.begin("later", keys)
    assert stage.leader.match("later", 0, len(keys)) == 0
    stage.place("later", [50, 51])
    assert not stage.step({"later": 2}).stores
    assert stage.leader.records["later"].why[0] == f"KVBM is not healthy: {problem}"


def test_a_worker_that_is_gone(make_stage: Make) -> None:
    stage, keys = make_stage(ranks=2), keys_of("a", 2)
    stage.keep("first", keys)
    load = stage.load("b", keys, [1, 2])
    assert len(stage.compute("c", keys_of("c", 1), [3]).stores) == 1
    stage.workers[1].close()
    stage.leader.tick()
    stage.leader.tick()
    assert_stands_aside(stage, keys, "the worker of rank 1 is gone")
    stage.answer(load, rank=0)
    assert stage.leader.in_flight() == (1, 1)


def test_a_worker_that_says_it_is_sick(stage: Stage) -> None:
    keys = keys_of("a", 2)
    stage.keep("first", keys)
    stage.say(Sick(0, "a copy thread died"))
    stage.leader.tick()
    assert_stands_aside(stage, keys, "rank 0: a copy thread died")


def test_a_worker_that_speaks_nonsense(stage: Stage) -> None:
    keys = keys_of("a", 2)
    stage.keep("first", keys)
    stage.workers[0]._sock.sendall(b"\xff\xff\xff\xff")
    stage.leader.tick()
    assert "is not a KVBM process" in stage.leader.problems[0]
    stage.begin("b", keys)
    assert stage.leader.match("b", 0, 2) == 0


def test_a_worker_that_is_silent_past_the_deadline(make_stage: Make) -> None:
    stage, keys = make_stage(ranks=2, store_deadline_s=10.0), keys_of("a", 2)
    stage.keep("first", keys)
    (store,) = stage.compute("b", keys_of("b", 1), [1]).stores
    stage.answer(store, rank=0)
    stage.clock.advance(1000)
    stage.leader.tick()
    assert not stage.leader.problems  # the forward pass before the copy may take any time
    stage.step()
    stage.step()
    stage.clock.advance(14)
    stage.leader.tick()
    assert not stage.leader.problems
    stage.clock.advance(2)
    stage.leader.tick()
    assert_stands_aside(stage, keys, "no answer about a copy from rank 1 within its deadline")


def test_a_worker_that_leaves_in_good_order(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    keys = keys_of("a", 2)
    stage.keep("first", keys)
    stage.say(Allot(1))
    stage.say(Bye())
    stage.workers[0].close()
    stage.begin("b", keys)
    assert stage.leader.match("b", 0, 2) == 0
    assert stage.leader.problems == []
    assert "unexpected Allot" in caplog.text


def growing(stage: Stage, *usable: int) -> None:
    """So many slots of each rank are there."""
    links, there = stage.leader.links.values(), dict(enumerate(usable))
    stage.leader.growing = Growing(stage.pool, there, links, BLOCK_BYTES, time.monotonic())


def test_slots_are_used_once_every_rank_has_touched_them(make_stage: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    stage, keys = make_stage(10, ranks=2), keys_of("a", 6)
    growing(stage, 2, 4)
    assert "serving with 0.00 GB of G2" in caplog.text
    (store,) = stage.compute("a", keys, list(range(6))).stores
    assert store.g2_slots().tolist() == [0, 1]
    stage.answer(store)
    stage.say(Touched(0, 9), 0)
    assert stage.matchable(keys) == 2
    assert stage.pool.total == 4
    stage.say(Touched(1, 6), 1)
    stage.leader.tick()
    (store,) = stage.step({"a": 6}).stores
    assert sorted(store.g2_slots().tolist()) == [2, 3, 4, 5]
    stage.answer(store)
    stage.say(Touched(0, 10), 0)
    stage.say(Touched(1, 10), 1)
    assert stage.matchable(keys) == 6  # nothing was evicted for what came later
    assert (stage.pool.total, stage.pool.statistics().evictions) == (10, 0)
    assert caplog.text.count("is ready after") == 1
    assert stage.leader.smaller() == {}
    stage.pool.check()


def test_host_memory_that_ends_on_the_way_costs_nothing_that_is_there(
    make_stage: Make, caplog: pytest.LogCaptureFixture
) -> None:
    stage, keys = make_stage(10, ranks=2), keys_of("a", 4)
    growing(stage, 4, 4)
    stage.keep("a", keys)
    stage.say(Touched(0, 6, "no memory"), 0)
    stage.say(Touched(1, 5, "nor here"), 1)
    assert stage.matchable(keys) == 4
    assert stage.pool.total == 5
    assert stage.leader.problems == []
    assert "of 0.01 GB until the engine is started anew: no memory" in stage.leader.smaller()["g2"]
    assert caplog.text.count("G2 stays at") == 1
    stage.keep("b", keys_of("b", 5))
    assert stage.matchable(keys_of("b", 5)) == 5
    stage.pool.check()


def test_a_reset_while_host_memory_is_touched(stage: Stage) -> None:
    growing(stage, 3)
    stage.keep("a", keys_of("a", 3))
    stage.leader.reset()
    assert stage.pool.total == 3
    stage.say(Touched(0, stage.pool.capacity))
    stage.leader.tick()
    assert stage.pool.statistics().free == stage.pool.capacity
    stage.keep("b", keys_of("b", 9))
    assert stage.matchable(keys_of("b", 9)) == 9


def test_holds_are_a_share_of_what_is_there(make_stage: Make) -> None:
    stage, keys = make_stage(40, held_share=0.5), keys_of("a", 8)
    growing(stage, 8)
    stage.keep("a", keys)
    stage.begin("b", keys)
    assert stage.leader.match("b", 0, 8) == 4
    stage.say(Touched(0, 40))
    stage.leader.tick()
    assert stage.leader.match("b", 0, 8) == 8


def test_the_leader_says_goodbye(stage: Stage) -> None:
    stage.leader.close()
    assert stage.workers[0].take() == [Bye()]
    stage.leader.tick()
    assert stage.leader.problems == []


def test_an_observer_that_raises_is_removed(stage: Stage) -> None:
    class Raises:
        calls = 0

        def on_event(self, event: Event) -> None:
            self.calls += 1
            raise KeyError("oops")

    raises = Raises()
    stage.leader._observers.insert(0, raises)
    stage.keep("a", keys_of("a", 1))
    stage.keep("b", keys_of("b", 1))
    assert raises.calls == 1
    assert sum(isinstance(event, Offloaded) for event in stage.events) == 2


# ---------------------------------------------------------------------- records


def test_records_are_bounded(make_stage: Make) -> None:
    stage = make_stage(explain_requests=3)
    for i in range(10):
        stage.begin(f"r{i}", [])
    assert list(stage.leader.records) == ["r7", "r8", "r9"]
    assert len(stage.leader.requests) == 10
    stage.place("r0", [])
    stage.leader.finish("r0", [], 0)
    record = stage.leader.records["r9"]
    for i in range(100):
        record.note(f"{i % 50}")
    assert len(record.why) == 32


def test_a_prompt_is_counted_once(stage: Stage) -> None:
    keys = keys_of("a", 1)
    stage.leader.begin("a", keys, RequestParams(), 40)
    for _ in range(3):
        stage.place("a", [1])
    assert stage.events == [Admitted(BLOCK_TOKENS, 0, 0)]


def test_a_prompt_shorter_than_a_block(stage: Stage) -> None:
    stage.begin("a", [])
    assert stage.leader.match("a", 0, 0) == 0
    stage.place("a", [1])
    assert not stage.step({"a": 0}).stores
    stage.leader.advance("unknown", 3)
    assert stage.leader.records["a"].outcome == "computing"
    stage.leader.finish("a", [1], 0)
