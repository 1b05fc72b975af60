"""What comes from disk before a request is scheduled; the test plays the engine and the workers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvbm.core.events import Gated
from kvbm.core.outcome import Outcome
from kvbm.link.messages import Cancel, unpack
from kvbm.tiers.disk.orders import Forget, Probe, Probed, Read
from tests.leader.roles import BLOCK_BYTES, BLOCK_TOKENS, DONE, FAILED, Stage, keys_of
from tests.leader.ways import Admitted, Promoted

Make = Callable[..., Stage]
LAST = b"last".ljust(32)
"""The block of the last token, which is always left to the engine."""


def start(stage: Stage, name: str, keys: list[bytes]) -> list[Read]:
    """A request arrives; returns what is read for it at once."""
    stage.begin(name, [*keys, LAST])
    reads: list[Read] = stage.hear(Read)
    return reads


def match(stage: Stage, name: str, keys: list[bytes], computed: int = 0) -> int | None:
    found = stage.leader.match(name, computed, len(keys))
    if found:
        request = stage.leader.requests[name]
        assert request.hold is not None
        assert request.hold.keys == tuple(keys[computed : computed + found])
    return found


# ---------------------------------------------------------------------- one request


@pytest.mark.parametrize("ranks", [1, 2])
def test_reading_begins_when_a_request_arrives_and_is_promised_when_all_is_there(make_stage: Make, ranks: int) -> None:
    stage, keys = make_stage(ranks=ranks).add_disk(), keys_of("a", 4)
    stage.on_disk("first", keys)
    (read,) = start(stage, "a", keys)
    assert read.keys == keys
    assert unpack(read.g3).tolist() == [stage.disk.look(key).slot for key in keys]
    for rank in range(ranks):
        assert match(stage, "a", keys) is None
        assert stage.pool.peek(keys) == 0
        stage.moved(read, rank=rank)
    assert match(stage, "a", keys) == 4
    assert [stage.pool.look(key).slot for key in keys] == unpack(read.g2).tolist()
    stage.place("a", list(range(5)), 4)
    (load,) = stage.step().loads
    assert load.g2 == read.g2
    assert not stage.promotion.stagings
    stage.answer(load)
    stage.leader.core.tick()
    assert stage.pool.statistics().active == 0
    assert Promoted(4, 0, ranks * 4 * BLOCK_BYTES, 0.001) in stage.events
    assert Admitted(5 * BLOCK_TOKENS, 0, 4 * BLOCK_TOKENS, 4 * BLOCK_TOKENS) in stage.events
    record = stage.leader.records["a"]
    assert (record.staged, record.why) == ({"g3": 4}, ["the request waited for blocks that come from disk"])


def test_what_is_read_is_bounded_and_goes_on_as_batches_end(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(in_flight=6, batch=4), keys_of("a", 12)
    stage.on_disk("first", keys)
    first, second = start(stage, "a", keys)
    assert (first.keys, second.keys) == (keys[:4], keys[4:6])
    assert match(stage, "a", keys) is None
    assert not stage.hear(Read)
    stage.moved(second)
    assert match(stage, "a", keys) is None
    (third,) = stage.hear(Read)
    assert third.keys == keys[6:8]
    for read in (first, third):
        stage.moved(read)
    assert match(stage, "a", keys) is None
    (fourth,) = stage.hear(Read)
    stage.moved(fourth)
    assert match(stage, "a", keys) == 12
    assert stage.leader.gate.reading == 0


def test_a_prefix_may_span_both_tiers(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(), keys_of("a", 6)
    stage.on_disk("first", keys)
    for part in (keys[:2], keys[3:4]):
        stage.pool.allocate(len(part)).stage(part).register().drop()
    (read,) = start(stage, "a", keys)
    assert read.keys == [keys[2], *keys[4:]]
    assert stage.pool.statistics().active == 3  # kept until the rest has come
    assert match(stage, "a", keys, 1) is None
    stage.moved(read)
    assert match(stage, "a", keys, 1) == 5


def test_nothing_beyond_a_gap_is_read(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(), keys_of("a", 5)
    stage.on_disk("first", keys)
    stage.disk.discard(keys[2:3])
    (read,) = start(stage, "a", keys)
    assert read.keys == keys[:2]
    stage.moved(read)
    assert match(stage, "a", keys) == 2
    assert not stage.hear(Read)


def test_a_request_that_opted_out_reads_nothing(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(), keys_of("a", 3)
    stage.on_disk("first", keys)
    stage.begin("a", [*keys, LAST], load=False)
    assert match(stage, "a", keys) == 0
    assert not stage.hear(Read)


def test_blocks_that_came_to_disk_later_are_found_when_the_request_is_scheduled(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(), keys_of("a", 3)
    assert start(stage, "a", keys) == []
    stage.on_disk("first", keys)
    assert match(stage, "a", keys) is None
    (read,) = stage.hear(Read)
    stage.moved(read)
    assert match(stage, "a", keys) == 3


def test_priority_and_end_travel_up(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(), keys_of("a", 2)
    stage.on_disk("first", keys, priority=9, ttl=60.0)
    stage.clock.advance(20)
    (read,) = start(stage, "a", keys)
    stage.moved(read)
    assert match(stage, "a", keys) == 2
    block = stage.pool.look(keys[1])
    assert (block.priority, block.expires, block.parent) == (9, 60.0, keys[0])


def test_a_block_that_ends_on_disk_before_it_is_read_does_not_live_on_in_g2(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(in_flight=1, batch=1), keys_of("a", 2)
    stage.on_disk("first", keys, ttl=60.0)
    (first,) = start(stage, "a", keys)
    stage.clock.advance(59)
    assert stage.disk.peek(keys) == 2
    stage.clock.advance(2)
    stage.disk.present(keys)  # the disk tier drops them
    stage.moved(first)
    stage.leader.core.tick()
    (second,) = stage.hear(Read)
    stage.moved(second)
    stage.leader.core.tick()
    stage.clock.advance(1)
    assert stage.pool.peek(keys, 1) == 0


# ---------------------------------------------------------------------- never slower than computing


def test_a_request_waits_while_loading_is_faster_and_then_takes_what_has_come(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(in_flight=2, batch=2), keys_of("a", 8)
    stage.on_disk("first", keys)
    stage.measure(computed=BLOCK_TOKENS * 10)  # ten blocks a second
    (first,) = start(stage, "a", keys)
    stage.clock.advance(0.1)
    assert match(stage, "a", keys) is None
    stage.moved(first)
    assert match(stage, "a", keys) is None
    second, third = stage.hear(Read)  # a block each: what would take longer than a moment is divided
    stage.clock.advance(0.5)  # the disk has become slow
    assert match(stage, "a", keys) == 2
    assert stage.hear(Cancel) == [Cancel([second.job, third.job])]
    assert [event for event in stage.events if isinstance(event, Gated)] == [Gated(6)]
    assert stage.leader.records["a"].why[-1].startswith("gated: loading 6 blocks would take")
    stage.place("a", list(range(9)), 2)
    for read in (second, third):
        stage.moved(read, FAILED, error="cancelled")
    assert [len(load.g1_slots()) for load in stage.step().loads] == [2]
    assert not stage.hear(Read)
    assert stage.disk.peek(keys) == 8
    assert stage.tier.problem is None
    assert not stage.side.suspects.failed


def test_what_is_slower_from_the_start_is_read_only_while_the_request_waits_for_its_turn(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(), keys_of("a", 4)
    stage.on_disk("first", keys)
    stage.measure(computed=BLOCK_TOKENS * 10, read=5)
    first, *others = start(stage, "a", keys)
    stage.moved(first)
    stage.clock.advance(0.2)
    stage.leader.core.tick()
    assert match(stage, "a", keys) == 1
    assert stage.hear(Cancel) == [Cancel([read.job for read in others])]
    for read in others:
        stage.moved(read, FAILED, error="cancelled")
    assert match(stage, "a", keys) == 1
    assert not stage.hear(Read)
    assert stage.events.count(Gated(3)) == 1
    stage.leader.finish("a", [], 0)
    stage.pool.discard(keys)
    stage.clock.advance(31)  # perhaps it is faster by now
    (read,) = start(stage, "b", keys)
    stage.moved(read)
    assert match(stage, "b", keys) == 4


def test_the_queue_before_it_counts(make_stage: Make) -> None:
    stage = make_stage().add_disk(in_flight=4)
    one, two = keys_of("1", 12), keys_of("2", 4)
    stage.on_disk("1", one)
    stage.on_disk("2", two)
    stage.measure(computed=BLOCK_TOKENS * 10, read=20)
    assert len(start(stage, "a", one)) == 4
    assert start(stage, "b", two) == []  # as many are in flight as may be
    assert match(stage, "b", two) == 0
    assert stage.leader.records["b"].why[0] == "gated: loading 4 blocks would take 800 ms, computing them takes 400 ms"


def test_a_disk_that_does_not_answer_makes_nobody_wait_for_ever(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(patience=10.0), keys_of("a", 4)
    stage.on_disk("first", keys)
    (read,) = start(stage, "a", keys)
    stage.tick(9.0)
    assert match(stage, "a", keys) is None  # nothing is known of how fast the engine computes
    stage.tick(2.0)
    assert stage.leader.core.lower.degraded() == {"g3": "no answer about a move within its deadline"}
    assert match(stage, "a", keys) == 0
    assert stage.hear(Cancel) == [Cancel([read.job])]
    assert start(stage, "b", keys) == []
    assert match(stage, "b", keys) == 0
    stage.moved(read)  # it comes after all: published, for it is right
    stage.leader.core.tick()
    assert stage.pool.peek(keys) == 4
    assert not stage.promotion.stagings


def test_nobody_waits_for_reads_that_find_no_room_in_g2(make_stage: Make) -> None:
    stage, keys = make_stage(8, held_share=1.0).add_disk(most=8), keys_of("a", 4)
    stage.on_disk("first", keys)
    raw = stage.pool.allocate(8)
    assert raw is not None
    assert start(stage, "a", keys) == []
    assert match(stage, "a", keys) == 0
    assert stage.leader.records["a"].why[0] == "the request did not wait for blocks on disk: G2 has no room for them"
    assert not stage.promotion.stagings
    raw.drop()


def test_only_what_may_be_loaded_is_waited_for(make_stage: Make) -> None:
    stage, keys = make_stage(16, held_share=0.25).add_disk(most=16), keys_of("a", 8)
    stage.on_disk("first", keys)
    reads = start(stage, "a", keys)
    assert [read.keys for read in reads] == [keys[:4], keys[4:]]
    stage.moved(reads[0])
    assert match(stage, "a", keys) == 4


# ---------------------------------------------------------------------- several requests


def test_a_dropped_request_cancels_its_reads_and_gives_everything_back(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(in_flight=6, batch=4), keys_of("a", 12)
    stage.on_disk("first", keys)
    first, second = start(stage, "a", keys)
    stage.moved(first)
    stage.leader.core.tick()
    (third,) = stage.hear(Read)
    stage.leader.finish("a", [], 0)
    (cancel,) = stage.hear(Cancel)
    assert sorted(cancel.jobs) == [second.job, third.job]
    assert stage.pool.statistics().active == 0
    assert stage.disk.statistics().active == 12  # some of it is still being read
    stage.moved(second, DONE, FAILED, error="cancelled")
    stage.moved(third, *[FAILED] * 4, error="cancelled")
    stage.leader.core.tick()
    assert not stage.hear(Cancel)
    assert stage.disk.statistics().active == 0
    assert stage.pool.peek(keys) == 5
    assert stage.disk.peek(keys) == 12


def test_others_wait_for_the_same_read_and_keep_it_when_the_first_goes(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(), keys_of("a", 4)
    stage.on_disk("first", keys)
    (read,) = start(stage, "a", keys)
    assert start(stage, "asks", keys) == []
    assert match(stage, "asks", keys) is None
    assert start(stage, "only arrived", keys) == []
    stage.leader.finish("a", [], 0)
    stage.leader.finish("asks", [], 0)
    assert not stage.hear(Cancel)
    stage.moved(read)
    assert match(stage, "only arrived", keys) == 4
    assert stage.leader.records["only arrived"].staged == {"g3": 4}


def test_a_request_that_comes_while_its_blocks_are_given_up_reads_them_again(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(), keys_of("a", 4)
    stage.on_disk("first", keys)
    (read,) = start(stage, "a", keys)
    stage.leader.finish("a", [], 0)
    assert len(stage.hear(Cancel)) == 1
    assert start(stage, "b", keys) == []
    assert match(stage, "b", keys) is None
    stage.moved(read, DONE, *[FAILED] * 3, error="cancelled")
    assert match(stage, "b", keys) is None
    (again,) = stage.hear(Read)
    assert again.keys == keys[1:]
    stage.moved(again)
    assert match(stage, "b", keys) == 4


def test_a_longer_prompt_reads_its_own_part_after_the_shared_one(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(batch=8), keys_of("a", 6)
    stage.on_disk("first", keys)
    (shared,) = start(stage, "a", keys[:3])
    assert start(stage, "b", keys) == []
    assert match(stage, "b", keys) is None
    stage.moved(shared)
    assert match(stage, "b", keys) is None
    (rest,) = stage.hear(Read)
    assert rest.keys == keys[3:]
    stage.moved(rest)
    assert match(stage, "b", keys) == 6


def test_what_is_held_for_requests_is_bounded(make_stage: Make) -> None:
    stage = make_stage(32).add_disk(most=10)
    for i in range(6):
        stage.on_disk(f"first {i}", keys_of(f"{i}", 6))
    for i in range(6):
        for read in start(stage, f"{i}", keys_of(f"{i}", 6)):
            stage.moved(read)
        stage.leader.core.tick()
        assert sum(staging.held for staging in stage.promotion.stagings) <= 10
        assert stage.pool.statistics().active <= 10
    assert match(stage, "0", keys_of("0", 6)) == 6
    assert match(stage, "5", keys_of("5", 6)) == 0  # rather computed than waited for
    stage.place("0", list(range(7)), 6)
    for read in start(stage, "later", keys_of("4", 6)):
        stage.moved(read)
    assert match(stage, "later", keys_of("4", 6)) in (6, None)


def test_what_nobody_comes_for_is_kept_half_a_minute(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(), keys_of("a", 4)
    stage.on_disk("first", keys)
    (read,) = start(stage, "a", keys)
    stage.moved(read)
    stage.tick(29.0)
    assert stage.pool.statistics().active == 4
    stage.tick(29.0)
    assert stage.pool.statistics().active == 4
    stage.tick(2.0)
    assert stage.pool.statistics().active == 0
    assert match(stage, "a", keys) == 4


def test_many_requests_leave_nothing_behind(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(), keys_of("a", 4)
    stage.on_disk("first", keys)
    for i in range(20):
        start(stage, f"{i}", keys)
        stage.leader.match(f"{i}", 0, 4)
    for i in range(20):
        stage.leader.finish(f"{i}", [], 0)
    (staging,) = stage.promotion.stagings
    assert (staging.requests, staging.there) == ({}, [])


# ---------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("outcome", [Outcome.CORRUPT, Outcome.MISSING])
@pytest.mark.parametrize("bad", [0, 1])
def test_a_block_that_is_not_what_was_written_is_given_up_on_every_rank(
    make_stage: Make, outcome: Outcome, bad: int
) -> None:
    stage, keys = make_stage(ranks=2).add_disk(), keys_of("a", 4)
    stage.on_disk("first", keys)
    slot = stage.disk.look(keys[1]).slot
    (read,) = start(stage, "a", keys)
    stage.moved(read, rank=1 - bad)
    stage.moved(read, DONE, outcome, DONE, DONE, rank=bad)
    assert match(stage, "a", keys) == 1
    assert stage.disk.present(keys).tolist() == [True, False, True, True]
    for rank in range(2):
        (forget,) = stage.hear(Forget, rank)
        assert (unpack(forget.g3).tolist(), forget.keys) == ([slot], [keys[1]])
    assert stage.tier.corrupt == (outcome == Outcome.CORRUPT)
    assert stage.leader.records["a"].why[-1] == "1 blocks could not be read from disk: injected"
    assert not stage.hear(Read)
    assert stage.tier.problem is None


def test_damage_counts_also_when_the_read_was_given_up(make_stage: Make) -> None:
    stage, keys = make_stage(ranks=2).add_disk(), keys_of("a", 2)
    stage.on_disk("first", keys)
    (read,) = start(stage, "a", keys)
    stage.leader.finish("a", [], 0)
    stage.moved(read, FAILED, FAILED, rank=0, error="cancelled")
    stage.moved(read, DONE, Outcome.CORRUPT, rank=1)
    stage.leader.core.tick()
    assert stage.disk.peek(keys) == 2  # the worst outcome counts: given up
    (read,) = start(stage, "b", keys)
    stage.leader.finish("b", [], 0)
    stage.moved(read, DONE, Outcome.CORRUPT)
    stage.leader.core.tick()
    assert stage.disk.present(keys).tolist() == [True, False]


def test_a_block_that_cannot_be_read_twice_is_lost_and_once_is_not(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(), keys_of("a", 3)
    stage.on_disk("first", keys)

    def fails(name: str, read: Read) -> None:
        stage.moved(read, DONE, FAILED, DONE)
        assert match(stage, name, keys) == 1
        stage.leader.finish(name, [], 0)
        stage.pool.discard(keys)

    (read,) = start(stage, "a", keys)
    fails("a", read)
    assert stage.disk.peek(keys) == 3
    (read,) = start(stage, "b", keys)
    stage.moved(read)
    assert match(stage, "b", keys) == 3  # it was read: the failure is forgotten
    assert not stage.side.suspects.failed
    stage.leader.finish("b", [], 0)
    stage.pool.discard(keys)
    for name in ("c", "d"):
        assert stage.disk.peek(keys) == 3
        (read,) = start(stage, name, keys)
        fails(name, read)
    assert stage.disk.present(keys).tolist() == [True, False, True]
    assert not stage.side.suspects.failed


def test_an_outcome_that_does_not_exist_is_a_failure(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(), keys_of("a", 2)
    stage.on_disk("first", keys)
    (read,) = start(stage, "a", keys)
    stage.moved(read, DONE, 99)  # type: ignore[arg-type]
    assert match(stage, "a", keys) == 1
    assert not stage.hear(Read)


def test_answers_of_another_length_twice_or_for_nothing_publish_nothing(make_stage: Make) -> None:
    stage, keys = make_stage(ranks=2).add_disk(), keys_of("a", 3)
    stage.on_disk("first", keys)
    (read,) = start(stage, "a", keys)
    stage.moved(read, rank=0)
    stage.moved(read, rank=0)
    assert match(stage, "a", keys) is None
    stage.moved(read, DONE, rank=1)
    stage.moved(read, rank=1)
    assert match(stage, "a", keys) == 0
    assert stage.pool.peek(keys) == 0


def test_a_reset_while_reads_are_in_flight_publishes_nothing_of_before(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(), keys_of("a", 4)
    stage.on_disk("first", keys)
    (read,) = start(stage, "a", keys)
    assert match(stage, "a", keys) is None
    stage.leader.reset()
    assert stage.hear(Cancel) == [Cancel([read.job])]
    assert match(stage, "a", keys) == 0
    assert start(stage, "b", keys) == []
    assert match(stage, "b", keys) == 0
    stage.moved(read)
    assert match(stage, "b", keys) == 0
    assert (stage.pool.peek(keys), stage.disk.peek(keys)) == (0, 0)
    stage.settle()
    stage.keep("new", keys)
    stage.write_all()
    assert stage.disk.peek(keys) == 4


def test_reads_of_two_generations_are_kept_apart(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(), keys_of("a", 4)
    stage.on_disk("first", keys)
    (old,) = start(stage, "a", keys)
    stage.leader.reset()
    stage.settle()
    assert match(stage, "a", keys) == 0  # nothing that it wants is coming
    stage.on_disk("again", keys)
    (new,) = start(stage, "b", keys)
    stage.moved(old, DONE, Outcome.MISSING, Outcome.CORRUPT, FAILED)
    assert match(stage, "b", keys) is None
    assert not stage.hear(Read)
    assert (stage.pool.peek(keys), stage.disk.peek(keys)) == (0, 4)
    stage.moved(new)
    assert match(stage, "b", keys) == 4


def test_what_is_kept_of_the_prompt_counts_as_held(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(most=8), keys_of("a", 12)
    stage.on_disk("first", keys)
    stage.pool.allocate(6).stage(keys[:6]).register().drop()
    (read,) = start(stage, "a", keys)
    assert read.keys == keys[6:8]
    assert [staging.held for staging in stage.promotion.stagings] == [8]
    stage.moved(read)
    assert match(stage, "a", keys) == 8


def test_a_pause_lets_go_of_what_was_read(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(in_flight=2, batch=2), keys_of("a", 4)
    stage.on_disk("first", keys)
    (read,) = start(stage, "a", keys)
    stage.moved(read)
    stage.leader.core.pause()
    stage.leader.core.tick()
    assert not stage.hear(Read)
    assert not stage.promotion.stagings
    assert match(stage, "a", keys) == 0
    stage.leader.core.resume()
    assert match(stage, "a", keys) is None
    assert len(stage.hear(Read)) == 1


def test_a_tier_that_breaks_holds_nothing_for_those_who_do_not_ask(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(in_flight=2, batch=2), keys_of("a", 6)
    stage.on_disk("first", keys)
    (read,) = start(stage, "a", keys)
    stage.tier.fail("broken")
    stage.moved(read)
    stage.leader.core.tick()
    assert stage.disk.statistics().active == 0
    assert match(stage, "a", keys) == 2
    stage.tick(1.0)
    (probe,) = stage.hear(Probe)
    stage.say(Probed(0, None, probe.number))
    stage.leader.core.tick()
    assert stage.tier.problem is None


# ---------------------------------------------------------------------- exclusive


def test_exclusive_gives_up_on_disk_what_has_come_up_and_writes_it_again(make_stage: Make) -> None:
    stage, keys = make_stage(16).add_disk(exclusive=True), keys_of("a", 4)
    stage.keep("a", keys)
    stage.keep("b", keys_of("b", 12))
    stage.write_all()
    stage.keep("c", keys_of("c", 8))
    stage.write_all()
    gone = [key for key in keys if stage.disk.peek([key])]
    assert gone
    stage.pool.discard(keys)
    stage.begin("again", [*gone, LAST])
    (read,) = stage.hear(Read)
    bad = len(read.keys) > 1
    stage.moved(read, DONE, *([FAILED] * (len(read.keys) - 1)))
    stage.leader.core.tick()
    assert stage.disk.present(gone).tolist() == [False] + [True] * (len(gone) - 1)
    assert match(stage, "again", gone) == 1
    assert not bad or stage.leader.records["again"].gated
    assert stage.disk.statistics().active == 0


# ---------------------------------------------------------------------- computed meanwhile


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("came", [(), (0,), (0, 1, 2, 3)])
def test_what_does_not_arrive_while_it_is_computed_is_stored(
    make_stage: Make, came: tuple[int, ...], ends: bool
) -> None:
    """The request did not wait, and its reads are cancelled."""
    stage, keys = make_stage().add_disk(batch=2), keys_of("a", 4)
    stage.on_disk("first", keys)
    reads = start(stage, "a", keys)
    stage.measure(computed=BLOCK_TOKENS * 1000, read=1)
    assert match(stage, "a", keys) == 0
    assert [read.keys for read in reads] == [keys[:2], keys[2:]]
    stage.place("a", g1 := [11, 12, 13, 14, 15])
    assert stage.step({"a": 3}, reuse=g1).stores == []
    assert stage.step({"a": 4}).stores == [], "all of it may still arrive"
    for first, read in zip((0, 2), reads, strict=True):
        stage.moved(read, *(DONE if first + at in came else FAILED for at in range(2)), error="cancelled")
    if ends:
        stage.leader.finish("a", g1, 4)
        step = stage.step()
    else:
        stage.step()  # hears of it
        step = stage.step({"a": 4})
    rest = [at for at in range(4) if at not in came]
    assert [block for copy in step.stores for block in copy.g1_slots().tolist()] == [g1[at] for at in rest]
    for copy in step.stores:
        stage.answer(copy)
    assert stage.matchable(keys) == 4
    assert [stage.pool.look(key).parent for key in keys] == [None, *keys[:3]]  # type: ignore[union-attr]
    if not ends:
        assert stage.step({"a": 4}).stores == []
        assert stage.leader.requests["a"].awaited == []


def test_what_another_request_stores_and_loses_is_stored(make_stage: Make) -> None:
    stage, keys = make_stage(), keys_of("a", 4)
    (copy,) = stage.compute("a", keys, [1, 2, 3, 4]).stores
    assert stage.compute("b", [*keys, LAST], [5, 6, 7, 8, 9]).stores[0].g1_slots().tolist() == [9]
    stage.answer(copy, DONE, FAILED, DONE, FAILED)
    stage.step()
    (again,) = stage.step({"a": 4, "b": 5}).stores
    assert again.g1_slots().tolist() == [6, 8]
    stage.answer(again)
    assert stage.matchable(keys) == 4


def test_what_is_no_more_its_own_is_not_stored(make_stage: Make) -> None:
    """It was preempted, and computes only its first block again."""
    stage, keys = make_stage().add_disk(batch=4), keys_of("a", 4)
    stage.on_disk("first", keys)
    (read,) = start(stage, "a", keys)
    stage.measure(computed=BLOCK_TOKENS * 1000, read=1)
    assert match(stage, "a", keys) == 0
    stage.place("a", g1 := [11, 12, 13, 14, 15])
    assert stage.step({"a": 4}, reuse=g1).stores == []
    stage.moved(read, *[FAILED] * 4, error="cancelled")
    assert match(stage, "a", keys) == 0
    stage.place("a", g1 := [21, 22, 23, 24, 25])
    assert [copy.g1_slots().tolist() for copy in stage.step({"a": 1}, reuse=g1).stores] == [[21]]
    stage.leader.finish("a", g1, 1)
    assert stage.step().stores == []
