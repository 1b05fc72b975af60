"""What goes from host memory to disk; the test plays the engine and the workers."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from kvbm.link.messages import unpack
from kvbm.testing.clock import ManualClock
from kvbm.tiers.demote import Budget
from kvbm.tiers.disk.orders import Forget, Read, Write
from tests.leader.roles import BLOCK_BYTES, DONE, FAILED, Stage, keys_of
from tests.leader.ways import Demoted

Make = Callable[..., Stage]


def test_what_is_new_in_g2_is_written_and_can_be_matched_once_every_rank_is_done(make_stage: Make) -> None:
    stage, keys = make_stage(ranks=2).add_disk(), keys_of("a", 3)
    stage.keep("a", keys)
    stage.leader.core.tick()
    (write,) = stage.hear(Write)
    assert stage.hear(Write, 1) == [write]
    assert (write.keys, write.parents, write.generation) == (keys, [None, *keys[:2]], 0)
    assert write.g2 == np.array([stage.pool.look(key).slot for key in keys], np.int32).tobytes()
    stage.moved(write, rank=0)
    stage.leader.core.tick()
    assert stage.disk.peek(keys) == 0
    stage.moved(write, DONE, FAILED, DONE, rank=1)
    stage.leader.core.tick()
    assert stage.disk.present(keys).tolist() == [True, False, True]
    assert unpack(write.g3).tolist()[0] == stage.disk.look(keys[0]).slot
    assert Demoted(2, 1, 5 * BLOCK_BYTES, 0.001) in stage.events
    assert stage.demotion.idle


def test_writes_are_numbered_so_that_the_leaf_is_the_oldest_of_a_batch(make_stage: Make) -> None:
    stage = make_stage().add_disk()
    stage.keep("a", keys_of("a", 6))
    assert [(len(write.keys), write.sequence) for write in stage.write_all()] == [(4, 0), (2, 4)]


def test_what_is_in_flight_is_bounded_and_what_is_held_given_back(make_stage: Make) -> None:
    stage = make_stage().add_disk(in_flight=6, batch=4)
    keys = keys_of("a", 20)
    stage.keep("a", keys)
    stage.leader.core.tick()
    writes = stage.hear(Write)
    assert [len(write.keys) for write in writes] == [4, 2]
    assert stage.pool.statistics().active == 6
    stage.leader.core.tick()
    assert not stage.hear(Write)
    assert not stage.demotion.idle
    for write in writes:
        stage.moved(write)
    stage.write_all()
    assert stage.disk.peek(keys) == 20
    assert stage.pool.statistics().active == 0


def test_a_block_that_was_evicted_before_its_write_began_is_not_written(make_stage: Make) -> None:
    stage = make_stage(8).add_disk(in_flight=2, batch=2)
    stage.keep("a", keys_of("a", 4))
    stage.keep("b", keys_of("b", 6))  # the first two of a are being written, and stay
    assert stage.pool.present(keys_of("a", 4)).tolist() == [True, True, False, False]
    written = [key for write in stage.write_all() for key in write.keys]
    assert written == keys_of("a", 2) + keys_of("b", 6)
    assert stage.demotion.cancelled == 2


def test_what_waits_is_bounded_by_g2(make_stage: Make) -> None:
    stage = make_stage(8).add_disk()
    stage.tier.fail("broken")
    for i in range(10):
        stage.keep(f"{i}", keys_of(f"{i}", 4))
        assert len(stage.demotion.queued) <= 8
        assert sum(map(len, stage.demotion.queue)) == len(stage.demotion.queued)
    assert stage.demotion.cancelled == 32
    stage.tick(1.0)
    stage.probed()
    assert [write.keys for write in stage.write_all()] == [keys_of("8", 4), keys_of("9", 4)]


def test_a_block_waits_once_however_often_it_is_asked_for(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(in_flight=1, batch=1), keys_of("a", 4)
    stage.keep("a", keys)
    for i in range(100):
        stage.begin(f"{i}", keys)
    assert len(stage.demotion.queued) == 3
    assert sum(map(len, stage.demotion.queue)) == 3
    assert [write.keys for write in stage.write_all()] == [[key] for key in keys]
    assert stage.demotion.cancelled == 0


def test_a_failed_write_is_not_served_and_leaves_no_hold(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(), keys_of("a", 3)
    stage.keep("a", keys)
    stage.write_all(fails=True)
    assert stage.disk.statistics().free == 64
    assert stage.pool.statistics().active == 0
    stage.begin("again", keys)  # asked for again: tried again
    stage.write_all()
    assert stage.disk.present(keys).tolist() == [True, True, False]  # the last token's block is not asked for


def test_a_full_disk_evicts_and_what_it_cannot_hold_is_refused(make_stage: Make) -> None:
    stage = make_stage().add_disk(4, in_flight=64, batch=8)
    stage.keep("a", keys_of("a", 3))
    stage.write_all()
    stage.keep("b", keys_of("b", 6))
    stage.write_all()
    assert stage.disk.present(keys_of("b", 6)).tolist() == [True] * 4 + [False] * 2
    assert stage.demotion.refused == 2
    stage.disk.check()


def test_priority_and_end_travel_down(make_stage: Make) -> None:
    stage = make_stage().add_disk()
    before = time.time()
    stage.keep("a", keys_of("a", 2), priority=7, ttl=50.0)
    stage.keep("b", keys_of("b", 1))
    first, second = stage.write_all()
    assert np.frombuffer(first.priorities, np.int32).tolist() == [7, 7]
    assert np.frombuffer(first.expires, np.float64) == pytest.approx([before + 50] * 2, abs=5)
    assert (np.frombuffer(second.expires, np.float64).tolist(), second.priorities) == ([np.inf], bytes(4))
    block = stage.disk.look(keys_of("a", 1)[0])
    assert (block.priority, block.expires) == (7, 50.0)
    stage.clock.advance(51)
    assert stage.disk.peek(keys_of("a", 2)) == 0


def test_blocks_on_different_terms_are_written_apart(make_stage: Make) -> None:
    stage = make_stage().add_disk(batch=8)
    keys = keys_of("a", 4)
    stage.tier.fail("not yet")
    for part, priority in ((keys[:2], 1), (keys[2:], 2)):
        staged = stage.pool.allocate(2).stage(part, parent=None if priority == 1 else keys[1], priority=priority)
        staged.register().drop()
    stage.demotion.offer(keys)
    stage.tick(1.0)
    stage.probed()
    assert [write.keys for write in stage.write_all()] == [keys[:2], keys[2:]]
    assert [stage.disk.look(key).priority for key in keys] == [1, 1, 2, 2]
    assert [stage.disk.look(key).parent for key in keys] == [None, *keys[:3]]


def test_a_block_that_ends_between_two_looks_is_no_misuse(make_stage: Make) -> None:
    stage = make_stage().add_disk()
    keys = keys_of("a", 2)
    stage.keep("a", keys, ttl=5.0)
    hold, _ = stage.pool.scan(keys)
    stage.clock.advance(10)
    with hold:
        assert stage.demotion.start(keys, evict=False) == 0


# ---------------------------------------------------------------------- what is worth a write


def test_a_block_is_written_once_it_is_asked_for_again(make_stage: Make) -> None:
    stage = make_stage().add_disk(admit="frequency")
    keys = keys_of("a", 5)
    stage.keep("a", keys)
    assert stage.write_all() == []
    assert stage.demotion.refused == 5
    stage.begin("b", keys)
    assert [write.keys for write in stage.write_all()] == [keys[:4]]  # the last token's block was never asked for


def test_below_half_the_budget_only_hot_blocks_are_written_and_without_one_nothing(make_stage: Make) -> None:
    hour = 10 * BLOCK_BYTES
    stage = make_stage().add_disk(write_bytes=hour)
    hot = keys_of("hot", 4)
    stage.begin("hot 1", hot)
    stage.begin("hot 2", hot)
    stage.keep("a", keys_of("a", 6))
    assert len(stage.write_all()) == 2
    stage.keep("b", keys_of("b", 2))
    assert stage.write_all() == []
    stage.keep("hot", hot)
    assert [write.keys for write in stage.write_all()] == [hot[:3]]
    assert stage.demotion.rules.budget.left() == pytest.approx(0.1)
    more = keys_of("more", 5)
    stage.begin("1", more)
    stage.keep("more", more)
    assert len(stage.write_all()) == 1
    assert stage.demotion.rules.budget.left() < 0
    again = keys_of("again", 5)
    stage.begin("2", again)
    stage.keep("again", again)
    assert stage.write_all() == []


def test_a_budget_is_saved_up_for_an_hour_at_most() -> None:
    clock = ManualClock()
    assert Budget(None, 3600, clock).left() == 1.0
    budget = Budget(36_000, 3600, clock)
    budget.spend(36_000)
    assert budget.left() == 0
    clock.advance(1800)
    assert budget.left() == pytest.approx(0.5)
    clock.advance(100_000)
    assert budget.left() == 1.0


def test_a_block_in_use_stays_young_on_disk(make_stage: Make) -> None:
    stage = make_stage().add_disk(8)
    old, new = keys_of("old", 3), keys_of("new", 4)
    stage.keep("old", old)
    stage.write_all()
    stage.keep("new", new)
    stage.write_all()
    stage.begin("again", [*old, b"x"])  # it is in G2, and hot
    stage.keep("more", keys_of("more", 4))
    stage.write_all()
    assert stage.disk.peek(old) == 3
    assert stage.disk.peek(new) == 1


def test_of_a_prompt_written_in_parts_the_leaf_goes_first(make_stage: Make) -> None:
    stage = make_stage().add_disk(8, batch=2)
    keys = keys_of("a", 6)
    g1 = list(range(6))
    stage.begin("a", keys)
    stage.leader.match("a", 0, 6)
    stage.place("a", g1)
    for complete in (2, 4, 6):
        for copy in stage.step({"a": complete}).stores:
            stage.answer(copy)
        stage.write_all()
    stage.leader.finish("a", g1, 6)
    stage.keep("b", keys_of("b", 5))
    stage.write_all()
    assert stage.disk.present(keys).tolist() == [True] * 3 + [False] * 3


# ---------------------------------------------------------------------- exclusive


def exclusive(make_stage: Make, slots: int = 16, **options: object) -> Stage:
    """Keeps two slots of sixteen free."""
    return make_stage(slots).add_disk(exclusive=True, batch=4, **options)


def test_exclusive_writes_what_would_be_evicted_next_and_frees_it(make_stage: Make) -> None:
    stage = exclusive(make_stage)
    stage.keep("a", keys_of("a", 8))
    assert stage.write_all() == []
    stage.keep("b", keys_of("b", 8))
    assert [write.keys for write in stage.write_all()] == [keys_of("a", 8)[6:]]
    assert stage.pool.statistics().free == 2
    assert stage.pool.peek(keys_of("a", 8)) == 6
    assert stage.disk.present(keys_of("a", 8)).tolist() == [False] * 6 + [True] * 2


def test_exclusive_keeps_in_g2_what_could_not_be_written(make_stage: Make) -> None:
    stage = exclusive(make_stage)
    stage.keep("a", keys_of("a", 16))
    stage.leader.core.tick()
    (write,) = stage.hear(Write)
    stage.moved(write, DONE, FAILED)
    stage.leader.core.tick()
    assert stage.pool.present(write.keys).tolist() == [False, True]
    assert stage.disk.present(write.keys).tolist() == [True, False]


def test_exclusive_does_not_evict_what_was_matched_meanwhile(make_stage: Make) -> None:
    stage = exclusive(make_stage, admit="all")
    keys = keys_of("a", 16)
    stage.keep("a", keys)
    stage.leader.core.tick()
    (write,) = stage.hear(Write)
    assert stage.load("b", keys[:1], [1])
    hold = stage.pool.match(keys, 14)
    assert len(hold) == 2
    stage.moved(write)
    stage.leader.core.tick()
    hold.drop()
    assert stage.pool.peek(keys) == 16


def test_exclusive_frees_at_once_what_is_not_worth_a_write(make_stage: Make) -> None:
    stage = exclusive(make_stage, admit="frequency")
    stage.keep("a", keys_of("a", 16))
    assert stage.write_all() == []
    assert stage.pool.statistics().free == 2


def test_exclusive_leaves_g2_alone_while_the_disk_is_broken(make_stage: Make) -> None:
    stage = exclusive(make_stage)
    stage.tier.fail("broken")
    stage.keep("a", keys_of("a", 16))
    stage.leader.core.tick()
    assert not stage.hear(Write)
    assert stage.pool.peek(keys_of("a", 16)) == 16


def test_exclusive_ends_where_the_disk_has_no_room(make_stage: Make) -> None:
    stage = exclusive(make_stage)
    raw = stage.disk.allocate(64)
    assert raw is not None
    stage.keep("a", keys_of("a", 16))
    assert stage.pool.peek(keys_of("a", 16)) == 16
    raw.drop()


# ---------------------------------------------------------------------- the end


def test_a_drain_writes_all_the_hottest_first(make_stage: Make) -> None:
    stage = make_stage().add_disk(admit="frequency", batch=2)
    for name in ("old", "middle", "hot"):
        stage.keep(name, keys_of(name, 3))
    assert stage.write_all() == []
    stage.leader.core.drain(0.001)
    written = [key for write in stage.write_all() for key in write.keys]
    assert written == keys_of("hot", 3) + keys_of("middle", 3) + keys_of("old", 3)
    stage.leader.core.drain(10.0)  # nothing is left
    assert stage.demotion.idle


def test_a_drain_does_not_mind_what_waited_before(make_stage: Make) -> None:
    stage = make_stage().add_disk(in_flight=1, batch=1)
    for name in ("old", "hot"):
        stage.keep(name, keys_of(name, 2))
    stage.leader.core.drain(0.001)
    written = [write.keys[0] for write in stage.write_all()]
    assert written == [*keys_of("old", 1), *keys_of("hot", 2), keys_of("old", 2)[1]]


def test_a_drain_ends_when_its_time_is_over_or_nobody_writes(
    make_stage: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "kvbm")
    stage = make_stage().add_disk()
    stage.keep("a", keys_of("a", 6))
    before = time.monotonic()
    stage.leader.core.drain(0.05)
    assert 0.05 <= time.monotonic() - before < 5
    assert "0 of 6 blocks of host memory are on disk" in caplog.text
    stage.leader.core.pause()
    stage.leader.core.drain(60.0)
    assert time.monotonic() - before < 10
    make_stage().leader.core.drain(60.0)


def test_nothing_is_written_while_kvbm_stands_aside(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(in_flight=4, batch=4), keys_of("a", 10)
    stage.keep("a", keys)
    stage.tick()
    (write,) = stage.hear(Write)
    stage.leader.core.pause()
    stage.moved(write)
    for _ in range(3):
        stage.tick()
    assert not stage.hear(Write)
    assert stage.disk.peek(keys) == 4
    stage.leader.core.resume()
    stage.write_all()
    assert stage.disk.peek(keys) == 10


def test_what_lands_from_an_exclusive_disk_is_there_no_more_and_no_rank_forgets_it(make_stage: Make) -> None:
    """Its bytes stay, and a restart finds them: they are what their key says."""
    stage, keys = make_stage().add_disk(exclusive=True), keys_of("a", 3)
    stage.keep("a", keys)
    with stage.pool.candidates(3) as held:
        stage.tier.write(held, lambda passage: None)
        (write,) = stage.hear(Write)
        stage.moved(write)
        stage.tick()
    stage.pool.discard(keys)
    assert stage.disk.peek(keys) == 3
    stage.begin("b", keys, tokens=4 * 32)
    (read,) = stage.hear(Read)
    stage.moved(read)
    stage.tick()
    assert stage.pool.peek(keys) == 3
    assert stage.disk.peek(keys) == 0
    assert not stage.hear(Forget)
