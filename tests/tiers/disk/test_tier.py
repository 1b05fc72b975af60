"""The disk tier as the leader sees it: whether it works, what is un-published; the test plays workers and folder."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from kvbm.blocks import Pool
from kvbm.link.messages import Cancel, Result, Sick
from kvbm.policy.lru import LRU
from kvbm.tiers.disk.adopt import adopt, leaves_first
from kvbm.tiers.disk.orders import Forget, Generation, Probe, Probed, Read, Write
from tests.leader.roles import FAILED, Stage, keys_of, recovered

Make = Callable[..., Stage]
LAST = b"last".ljust(32)


def break_it(stage: Stage, problem: str = "EIO") -> None:
    """Three writes in a row fail."""
    for i in range(3):
        assert stage.tier.problem is None
        name = f"broken {stage.clock()} {i}"
        stage.keep(name, keys_of(name, 1))
        stage.leader.core.tick()
        (write,) = stage.hear(Write)
        stage.moved(write, FAILED, error=problem)
        stage.leader.core.tick()
    assert stage.tier.problem == problem


# ---------------------------------------------------------------------- left alone, and used again


def test_a_tier_that_fails_is_left_alone_until_a_probe_goes_well(
    make_stage: Make, caplog: pytest.LogCaptureFixture
) -> None:
    stage, keys = make_stage(ranks=2).add_disk(), keys_of("a", 3)
    stage.on_disk("first", keys)
    break_it(stage)
    assert stage.leader.core.lower.degraded() == {"g3": "EIO"}
    assert not stage.leader.core.health.problems
    assert sum("is left alone" in line for line in caplog.messages) == 1
    stage.keep("b", keys_of("b", 2))
    assert not stage.hear(Write)
    stage.begin("c", [*keys, LAST])
    assert stage.leader.match("c", 0, 3) == 0
    stage.measure(read=1)
    stage.tick(0.9)
    assert not stage.hear(Probe)
    stage.tick(0.2)
    stage.probed()
    assert stage.leader.core.lower.degraded() == {}
    assert stage.leader.gate.rates()["read_blocks_per_s"] is None  # it may be faster now
    assert not stage.folder.calls
    assert stage.disk.peek(keys) == 3  # nothing had happened to the files
    assert [write.keys for write in stage.write_all()] == [keys_of("b", 2)]


def test_probes_become_rarer(make_stage: Make) -> None:
    stage = make_stage().add_disk()
    break_it(stage)
    stage.folder.problem = "still read-only"
    times = []
    for _ in range(1300):
        stage.tick(0.1)
        for probe in stage.hear(Probe):
            times.append(stage.clock())
            stage.say(Probed(0, "EROFS", probe.number))
        stage.settle()
    waits = [round(b - a) for a, b in zip([0.0, *times], times, strict=False)]
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30]
    assert stage.tier.problem == "still read-only"


def test_what_fails_after_it_was_left_alone_delays_no_probe(make_stage: Make) -> None:
    stage = make_stage().add_disk(batch=1)
    stage.folder.problem = "still read-only"
    stage.keep("a", keys_of("a", 8))
    stage.leader.core.tick()
    writes = stage.hear(Write)
    assert len(writes) == 8
    for write in writes:
        stage.moved(write, FAILED)
    stage.leader.core.tick()
    assert stage.tier.problem is not None
    times, begun = [], stage.clock()
    for _ in range(32):
        stage.tick(0.25)
        for probe in stage.hear(Probe):
            times.append(stage.clock() - begun)
            stage.say(Probed(0, "EROFS", probe.number))
        stage.settle()
    assert times == [1.0, 3.0, 7.0]


def test_one_rank_that_is_not_well_is_enough(make_stage: Make) -> None:
    stage = make_stage(ranks=2).add_disk()
    break_it(stage)
    stage.folder.problem = "EROFS"
    stage.tick(1.0)
    stage.probed(None, "it is read-only")
    stage.settle()
    assert stage.tier.problem == "EROFS"
    stage.tick(2.0)
    (probe,) = stage.hear(Probe, 0)
    stage.say(Probed(0, None, probe.number), 0)
    stage.tick()
    assert stage.tier.problem is not None  # rank 1 has not said anything
    stage.say(Probed(1, None, probe.number - 2), 1)  # nor about this probe
    stage.tick()
    assert stage.tier.problem is not None
    stage.say(Probed(1, None, probe.number), 1)
    stage.tick()
    assert stage.tier.problem is None


@pytest.mark.parametrize("survives", [False, True])
def test_files_that_were_deleted_are_made_again_and_read(make_stage: Make, survives: bool) -> None:
    stage, keys = make_stage(ranks=2).add_disk(), keys_of("a", 4)
    stage.on_disk("first", keys)
    break_it(stage)
    if survives:
        stage.folder.found = recovered(keys[:2], [None, keys[0]], [7, 5])
    stage.tick(1.0)
    stage.probed("rank0.data was deleted")
    assert stage.tier.problem == "rank 0: rank0.data was deleted"
    stage.settle()
    assert stage.folder.calls == ["restore"]
    assert stage.disk.peek(keys) == 0
    assert stage.tier.problem is not None
    stage.probed(reopen=True)
    stage.settle()
    assert stage.folder.calls == ["restore", "recover"]
    assert stage.tier.problem is None
    assert stage.disk.peek(keys) == (2 if survives else 0)
    stage.keep("b", keys_of("b", 2))
    (write,) = stage.write_all()
    assert write.sequence >= 4
    stage.tier.fail("for a moment")
    stage.tick(1.0)
    stage.probed()
    stage.settle()
    assert stage.tier.problem is None
    assert stage.folder.calls == ["restore", "recover"]  # not looked into again


def test_a_folder_that_cannot_be_read_again_is_tried_again(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(), keys_of("a", 2)
    break_it(stage)
    stage.folder.found = recovered(keys, [None, keys[0]], [0, 1])
    stage.tick(1.0)
    stage.probed("deleted")
    stage.settle()
    stage.folder.problem = "EIO again"
    stage.probed(reopen=True)
    stage.settle()
    assert stage.tier.problem == "EIO again"
    stage.folder.problem = None
    stage.tick(5.0)
    stage.probed()
    stage.settle()
    assert stage.folder.calls == ["restore", "recover", "recover"]
    assert stage.tier.problem is None
    assert stage.disk.peek(keys) == 2


def test_files_are_not_made_again_while_moves_run_or_stagings_hold_slots(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(in_flight=2, batch=2), keys_of("a", 4)
    stage.on_disk("first", keys)
    stage.begin("a", [*keys, LAST])
    (read,) = stage.hear(Read)
    stage.tier.fail("broken")
    stage.tick(1.0)
    stage.probed("deleted")
    stage.settle()
    assert not stage.folder.calls
    stage.moved(read)
    stage.tick(2.0)
    stage.folder.found = recovered(keys, [None, *keys[:3]], [0, 1, 2, 3])
    stage.probed("deleted")
    stage.settle()
    stage.probed(reopen=True)
    stage.settle()
    assert stage.tier.problem is None
    assert stage.disk.peek(keys) == 4


def test_slots_that_somebody_holds_are_not_taken_for_free(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(), keys_of("a", 2)
    stage.on_disk("first", keys)
    hold, _ = stage.disk.scan(keys)
    stage.folder.found = recovered(keys, [None, keys[0]], hold.slots.tolist())
    break_it(stage)
    stage.tick(1.0)
    stage.probed("deleted")
    stage.settle()
    stage.probed(reopen=True)
    stage.settle()
    assert "cannot be adopted" in str(stage.tier.problem)
    hold.drop()
    stage.tick(5.0)
    stage.probed()
    stage.settle()
    assert stage.tier.problem is None
    assert stage.disk.peek(keys) == 2


def test_writes_that_fail_are_noticed_although_reads_go_well(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(), keys_of("a", 2)
    stage.on_disk("first", keys)
    for i in range(3):
        assert stage.tier.problem is None
        stage.keep(f"{i}", keys_of(f"{i}", 1))
        stage.write_all(fails=True)
        stage.begin(f"r{i}", [*keys, LAST])
        for read in stage.hear(Read):
            stage.moved(read)
        stage.leader.core.tick()
        stage.leader.finish(f"r{i}", [], 0)
        stage.pool.discard(keys)
    assert stage.tier.problem == "injected"


def test_damage_and_what_was_given_up_are_no_failures_of_the_disk(make_stage: Make) -> None:
    stage = make_stage().add_disk()
    for i in range(8):
        keys = keys_of(f"{i}", 2)
        stage.on_disk(f"{i}", keys)
        stage.begin(f"r{i}", [*keys, LAST])
        (read,) = stage.hear(Read)
        if i % 2:  # given up by the leader, or by a worker that ends
            stage.leader.finish(f"r{i}", [], 0)
        stage.moved(read, FAILED, FAILED, error="the tier was cleared" if i % 2 else "cancelled")
        stage.leader.core.tick()
    assert stage.tier.problem is None


@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_that_says_nothing(make_stage: Make, silent: int) -> None:
    stage, keys = make_stage(ranks=2).add_disk(patience=5.0), keys_of("a", 2)
    stage.keep("a", keys)
    stage.leader.core.tick()
    (write,) = stage.hear(Write)
    stage.moved(write, rank=1 - silent)
    stage.tick(4.0)
    assert stage.tier.problem is None
    stage.tick(2.0)
    assert stage.tier.problem == "no answer about a move within its deadline"
    assert stage.disk.peek(keys) == 0
    assert stage.pool.statistics().active == 2  # not reused: it may still be read
    stage.tick(1.0)
    stage.probed()
    assert stage.tier.problem is None
    stage.tick(4.0)
    assert stage.tier.problem is None
    stage.moved(write, rank=silent)
    stage.leader.core.tick()
    assert stage.disk.peek(keys) == 2
    assert stage.tier.in_flight() == (0, 0)


def test_a_rank_whose_threads_died_ends_the_disk_tier_alone(make_stage: Make, caplog: pytest.LogCaptureFixture) -> None:
    stage = make_stage(ranks=2).add_disk(batch=1)
    disk, both, new = keys_of("disk", 3), keys_of("both", 2), keys_of("new", 2)
    stage.on_disk("first", disk)
    stage.keep("second", both)
    stage.write_all()
    stage.keep("third", new)
    stage.begin("waits", [*disk, LAST])
    assert stage.leader.match("waits", 0, 3) is None
    writes, reads = stage.hear(Write), stage.hear(Read)
    assert len(writes) == 2
    assert reads
    for _ in range(2):
        stage.say(Sick(1, "a thread died", "g3"), 1)
    assert stage.leader.match("waits", 0, 3) == 0, "nobody waits for what does not come"
    assert sorted(stage.hear(Cancel)[0].jobs) == sorted(move.job for move in [*writes, *reads])
    for move in [*writes, *reads]:  # whatever they say now
        stage.moved(move)
    stage.leader.core.tick()
    assert stage.disk.peek(new) == stage.pool.peek(disk) == 0
    assert stage.tier.in_flight() == (0, 0)
    assert stage.pool.statistics().active == 0
    assert stage.leader.core.health.problems == []
    assert stage.leader.core.lower.degraded() == {"g3": "rank 1: a thread died"}
    assert caplog.text.count("rank 1: a thread died") == 1
    # The rest goes on: host memory, and nothing of the disk.
    stage.load("again", both, [1, 2])
    stage.keep("more", keys_of("more", 2))
    for _ in range(50):
        stage.tick(30)
    stage.leader.core.drain(10)
    assert stage.demotion.idle
    for kind in (Write, Read, Probe):
        assert not stage.hear(kind)
    assert "disk failed" not in caplog.text
    stage.leader.reset()  # also of what another process will find there
    stage.settle()
    assert stage.hear(Generation) == [Generation(1)]
    assert stage.leader.core.lower.degraded() == {"g3": "rank 1: a thread died"}


def test_what_was_being_looked_for_on_disk_when_threads_died_does_not_wake_it(make_stage: Make) -> None:
    stage = make_stage().add_disk()
    stage.tier.fail("EIO")
    stage.tick(1.0)
    stage.probed("gone")
    stage.settle()
    stage.probed(reopen=True)
    assert stage.tier.chores.busy
    stage.say(Sick(0, "a thread died", "g3"))
    stage.settle()
    assert stage.leader.core.lower.degraded() == {"g3": "rank 0: a thread died"}


def test_threads_may_die_before_there_is_a_disk_tier(make_stage: Make) -> None:
    stage = make_stage()
    stage.say(Sick(0, "a thread died", "g3"))
    stage.leader.core.tick()
    stage.add_disk()
    lower, stage.leader.core.lower.stack = stage.leader.core.lower.stack, None
    assert lower is not None
    assert stage.leader.core.attach(lower)
    assert stage.leader.core.lower.degraded() == {"g3": "rank 0: a thread died"}
    assert stage.leader.core.health.problems == []


def test_answers_for_unknown_moves_are_nothing(make_stage: Make) -> None:
    stage = make_stage().add_disk()
    stage.say(Result(12345, 0, bytes(3), 0, 0.0))
    stage.say(Probed(0, None, 0))
    stage.say(Probed(0, "no", 17))
    stage.leader.core.tick()
    assert not stage.tier.answer(Result(12345, 0, bytes(3), 0, 0.0))
    assert stage.tier.problem is None


# ---------------------------------------------------------------------- a new generation


def test_a_reset_begins_a_new_generation_on_disk(make_stage: Make) -> None:
    stage, keys = make_stage(ranks=2).add_disk(), keys_of("a", 3)
    stage.on_disk("first", keys)
    stage.leader.reset()
    assert stage.disk.peek(keys) == 0
    assert stage.leader.core.lower.degraded() == {"g3": "a new generation is being written down"}
    stage.keep("b", keys_of("b", 2))
    stage.leader.reset()
    assert stage.demotion.idle  # nothing of before waits
    stage.keep("b again", keys_of("b", 2))
    assert not stage.hear(Write)
    stage.settle()
    for rank in range(2):
        assert stage.hear(Generation, rank) == [Generation(1)]
    assert stage.leader.core.lower.degraded() == {}
    (write,) = stage.write_all()
    assert write.generation == 1


def test_writes_in_flight_at_a_reset_are_cancelled_never_served_and_no_failure(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(batch=1), keys_of("a", 5)
    stage.keep("a", keys)
    stage.leader.core.tick()
    writes = stage.hear(Write)
    assert len(writes) == 5
    stage.leader.reset()
    stage.settle()
    assert sorted(stage.hear(Cancel)[0].jobs) == sorted(write.job for write in writes)
    stage.moved(writes[0])
    for write in writes[1:]:
        stage.moved(write, FAILED, error="blocks of generation 0, it is now 1")
    stage.leader.core.tick()
    assert stage.disk.peek(keys) == 0
    assert stage.tier.problem is None
    assert stage.disk.statistics().free == 64


def test_a_generation_that_cannot_be_written_down_keeps_the_tier_unused(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(), keys_of("a", 3)
    stage.on_disk("first", keys)
    stage.folder.problem = "EROFS"
    stage.leader.reset()
    stage.settle()
    assert stage.leader.core.lower.degraded() == {"g3": "EROFS"}
    stage.tick(1.0)
    stage.settle()
    stage.leader.reset()  # once more
    assert stage.folder.calls == ["clear for now"] * 2
    assert not stage.hear(Probe)
    assert not stage.hear(Generation)
    stage.folder.problem = None
    stage.tick(2.0)
    stage.settle()
    assert stage.folder.generation == 1
    assert stage.hear(Generation) == [Generation(1)]
    assert stage.tier.problem is not None  # only a probe can say that it works again
    stage.tick(4.0)
    stage.probed()
    assert stage.tier.problem is None
    assert stage.disk.peek(keys) == 0


def test_a_reset_of_a_broken_tier_does_not_declare_it_well(make_stage: Make) -> None:
    stage = make_stage().add_disk()
    break_it(stage)
    stage.leader.reset()
    stage.settle()
    assert stage.hear(Generation) == [Generation(1)]
    assert stage.leader.core.lower.degraded() == {"g3": "EIO"}
    stage.tick(1.0)
    stage.probed()
    assert stage.leader.core.lower.degraded() == {}


def test_blocks_found_before_a_reset_are_not_served_after_it(make_stage: Make) -> None:
    stage, keys = make_stage().add_disk(), keys_of("a", 2)
    break_it(stage)
    stage.folder.found = recovered(keys, [None, keys[0]], [0, 1])
    stage.tick(1.0)
    stage.probed("deleted")
    stage.settle()
    for probe in stage.hear(Probe):
        stage.say(Probed(0, None, probe.number))
    stage.leader.core.hear()  # the folder's thread is reading the index now
    assert stage.tier.chores.busy
    stage.leader.reset()
    stage.settle()
    assert stage.disk.peek(keys) == 0
    stage.tick(5.0)
    stage.probed()
    stage.settle()
    assert stage.tier.problem is None
    assert stage.disk.peek(keys) == 0


@pytest.mark.parametrize("problem", [None, "EROFS"])
def test_a_reset_just_before_the_end_is_written_down(make_stage: Make, problem: str | None) -> None:
    stage = make_stage().add_disk()
    stage.folder.problem = "busy"
    stage.leader.reset()
    stage.settle()
    stage.folder.problem = problem
    stage.tier.close()
    assert stage.folder.generation == (1 if problem is None else 0)
    assert stage.folder.calls[-2:] == ["clear for now", "close"]


def test_a_reset_while_a_purge_is_written_down_does_not_last(make_stage: Make) -> None:
    """What is written after a reset may be of other weights, and a purge alone must not let it outlive the process."""
    stage = make_stage().add_disk()
    stage.tier.clear()
    stage.tier.chores.wait(10)  # the purge is done, and nobody has heard of it
    stage.leader.reset()
    assert stage.tier.clearing
    stage.settle()
    assert stage.folder.calls == ["clear", "clear for now"]
    assert stage.hear(Generation) == [Generation(2)]
    assert stage.tier.problem is None
    stage.tier.clear()
    stage.settle()
    assert stage.folder.calls[-1] == "clear for now"


# ---------------------------------------------------------------------- un-publishing


def test_discarded_blocks_are_forgotten_by_every_rank(make_stage: Make) -> None:
    stage, keys = make_stage(ranks=2).add_disk(), keys_of("a", 3)
    stage.on_disk("first", keys)
    stage.tier.discard([keys[1], keys[1], b"unknown"])
    stage.tier.discard([])
    for rank in range(2):
        (forget,) = stage.hear(Forget, rank)
        assert forget.keys == [keys[1]]
    assert stage.disk.present(keys).tolist() == [True, False, True]


# ---------------------------------------------------------------------- after a restart


def adopted(keys: list[bytes], parents: list[bytes | None], **given: object) -> Pool:
    pool = Pool(len(keys), order=LRU(len(keys)))
    adopt(pool, recovered(keys, parents, range(len(keys)), **given))
    pool.check()
    return pool


def going(pool: Pool) -> list[bytes]:
    """Keys in the order in which they are evicted."""
    with pool.candidates(pool.statistics().total) as hold:
        return list(hold.keys)[::-1]


def test_parents_are_right_after_a_restart() -> None:
    keys, others = keys_of("a", 4), keys_of("b", 2)
    written = [others[0], keys[3], keys[0], keys[2], others[1]]
    pool = adopted(written, [None, keys[2], None, keys[1], others[0]])
    assert [pool.look(key).parent for key in written] == [None, keys[2], None, None, others[0]]
    assert [pool.look(key).slot for key in written] == [0, 1, 2, 3, 4]


def test_a_prompt_written_in_parts_loses_its_leaf_first() -> None:
    """Each batch of a prompt has its last block first; the batches come root first."""
    keys, old = keys_of("a", 6), keys_of("old", 2)
    written = [old[1], old[0], keys[1], keys[0], keys[3], keys[2], keys[5], keys[4]]
    parents = dict(zip(keys, [None, *keys], strict=False)) | dict(zip(old, [None, *old], strict=False))
    pool = adopted(written, [parents[key] for key in written])
    assert going(pool) == [*old[::-1], *keys[::-1]]


def test_a_root_is_as_young_as_its_youngest_prompt() -> None:
    root, first, second, between = keys_of("root", 1)[0], *keys_of("a", 1), *keys_of("b", 1), *keys_of("c", 1)
    pool = adopted([root, first, between, second], [None, root, None, root])
    assert going(pool) == [first, between, second, root]


def test_long_prompts_and_circles_end() -> None:
    keys = keys_of("a", 1000)
    pool = adopted(keys, [None, *keys[:-1]])
    assert going(pool) == keys[::-1]
    adopted(keys[:3], [keys[2], keys[0], keys[1]])  # a damaged index
    adopted(keys[:1], [keys[0]])
    adopt(Pool(1, order=LRU(1)), recovered([], [], []))


def test_a_million_blocks_take_about_a_second() -> None:
    count, chain = 1_000_000, 500
    above = np.where(np.arange(count) % chain, np.arange(count) - 1, -1)
    before = time.process_time()
    order = leaves_first(above)
    assert time.process_time() - before < 5
    assert order[:3].tolist() == [chain - 1, chain - 2, chain - 3]


def test_priority_and_end_are_kept() -> None:
    keys = keys_of("a", 3)
    expires = np.array([np.inf, time.time() + 100, 1.0])
    pool = adopted(keys, [None] * 3, priorities=np.array([0, 200, -3], np.int32), expires=expires)
    assert [pool.look(key).priority for key in keys[:2]] == [0, 100]
    assert pool.look(keys[0]).expires is None
    assert pool.look(keys[1]).expires == pytest.approx(time.monotonic() + 100, abs=5)
