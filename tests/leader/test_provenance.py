"""Only what KVBM has seen computed, or has loaded, under a request's keys is stored under them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvbm.blocks import LayerGroup
from kvbm.core.events import Admitted
from kvbm.core.keys import group_key
from kvbm.leader.provenance import Provenance
from kvbm.leader.requests import RequestParams
from tests.leader.roles import BLOCK_TOKENS, DONE, FAILED, Stage, keys_of

Make = Callable[..., Stage]
KEYS = keys_of("a", 4)


@pytest.fixture
def stage(make_stage: Make) -> Stage:
    return make_stage(64)


def found(stage: Stage, name: str, g1: list[int], count: int, *, keys: list[bytes] = KEYS) -> list[int]:
    """A request whose first `count` blocks the engine had; the blocks that are stored of it."""
    stage.begin(name, keys)
    stage.leader.match(name, count, len(keys))
    stage.place(name, g1)
    return sources(stage, name, len(keys), g1[count:])


def sources(stage: Stage, name: str, complete: int, fresh: list[int]) -> list[int]:
    stores = stage.step({name: complete}, reuse=fresh).stores
    for copy in stores:
        stage.answer(copy)
    stage.leader.core.tick()
    return [block for copy in stores for block in copy.g1_slots().tolist()]


def test_what_the_engine_found_and_kvbm_did_not_see_is_not_stored(stage: Stage) -> None:
    assert found(stage, "x", [1, 2, 3, 4], 2) == []
    assert "neither seen computed nor loaded" in stage.leader.records["x"].why[-1]
    stage.leader.finish("x", [1, 2, 3, 4], 4)
    assert stage.leader.seal(tokens=0).stores == []


def test_another_connector_fills_blocks_from_which_nothing_was_copied_yet(stage: Stage) -> None:
    """It is told of them like this, and of no step that computes them: what KVBM would still read is dropped, what it
    reads is waited for, and what was in them is no longer."""
    begun, offered = keys_of("begun", 2), keys_of("offered", 2)
    stage.begin("begun", begun)
    stage.leader.match("begun", 0, 2)
    stage.place("begun", [1, 2])
    (copy,) = stage.step({"begun": 2}, reuse=[1, 2]).stores
    stage.begin("offered", offered)
    stage.leader.match("offered", 0, 2)
    stage.place("offered", [3, 4])
    stage.leader.reuse([3, 4])
    stage.leader.advance("offered", 2)
    stage.begin("x", KEYS)
    stage.leader.match("x", 0, 4)
    stage.place("x", [1, 2, 3, 4])
    step = stage.leader.seal(tokens=0)
    assert (step.stores, step.fence) == ([], [copy.job])
    assert stage.leader.core.counts.dropped == 2
    stage.answer(copy)
    stage.leader.finish("x", [1, 2, 3, 4], 0)
    assert found(stage, "again", [1, 2, 9, 10], 2, keys=begun + keys_of("more", 2)) == []


def test_what_it_saw_computed_is(stage: Stage) -> None:
    """Also what is gone from G2 since."""
    assert found(stage, "x", [1, 2, 3, 4], 0) == [1, 2, 3, 4]
    stage.leader.finish("x", [1, 2, 3, 4], 4)
    stage.leader.core.tick()
    stage.pool.discard(KEYS)
    assert found(stage, "y", [1, 2, 3, 7], 3) == [1, 2, 3, 7]


def test_a_block_that_was_handed_out_is_not_what_it_was(stage: Stage) -> None:
    assert found(stage, "x", [1, 2, 3, 4], 0) == [1, 2, 3, 4]
    stage.leader.finish("x", [1, 2, 3, 4], 4)
    stage.step(reuse=[3])
    stage.pool.discard(KEYS)
    assert found(stage, "y", [1, 2, 3, 4], 4) == [1, 2]  # and so what follows is not proven either


def test_other_keys(stage: Stage) -> None:
    """Another adapter under the engine's own hash, say."""
    assert found(stage, "x", [1, 2, 3, 4], 0) == [1, 2, 3, 4]
    others = [*keys_of("b", 3), *keys_of("c", 1)]
    assert found(stage, "y", [1, 2, 3, 5], 3, keys=others) == []


def test_what_is_computed_on_it_is_foreign_too(stage: Stage) -> None:
    """A request computes on what it found; another finds that."""
    assert found(stage, "x", [1, 2, 3, 4], 1) == []
    assert found(stage, "y", [1, 2, 3, 4], 4) == []
    assert found(stage, "z", [5, 6, 7, 8], 0) == [5, 6, 7, 8]


def test_a_reset(stage: Stage) -> None:
    assert found(stage, "x", [1, 2, 3, 4], 0) == [1, 2, 3, 4]
    stage.leader.reset()
    assert found(stage, "y", [1, 2, 3, 5], 3) == []


def test_a_pause_sees_what_is_computed(stage: Stage) -> None:
    stage.leader.core.pause()
    assert found(stage, "x", [1, 2, 3, 4], 0) == []
    stage.leader.core.resume()
    assert found(stage, "y", [1, 2, 3, 5], 3) == [1, 2, 3, 5]


def test_found_in_the_step_that_computes_it(stage: Stage) -> None:
    """As forks of a prompt are."""
    for name in ("x", "y"):
        stage.begin(name, KEYS)
    stage.leader.match("x", 0, 4)
    stage.place("x", [1, 2, 3, 4])
    stage.leader.match("y", 3, 4)
    stage.place("y", [1, 2, 3, 5])
    (first,) = (stage.step({"x": 3, "y": 4}, reuse=[1, 2, 3, 4, 5]).stores,)
    assert [block for copy in first for block in copy.g1_slots().tolist()] == [1, 2, 3, 5]
    for copy in first:
        stage.answer(copy)


def test_a_load_that_ended_well_counts_and_another_does_not(stage: Stage) -> None:
    stage.keep("first", KEYS)
    for name, outcomes, stored in (("good", (DONE,) * 3, [14]), ("bad", (DONE, FAILED, DONE), [])):
        keys, g1 = [*KEYS[:3], *keys_of(name, 1)], [11, 12, 13, 14]
        copy = stage.load(name, keys, g1)
        stage.answer(copy, *outcomes)
        stage.place(name, g1)
        stage.leader.grow(name, g1, replace=True, found=3)  # as if the engine believed it
        assert sources(stage, name, 4, [14]) == stored
        stage.leader.finish(name, g1, 4)
        stage.leader.seal(tokens=0)


def test_a_load_whose_blocks_were_handed_out_meanwhile(stage: Stage) -> None:
    stage.keep("first", KEYS)
    copy = stage.load("x", KEYS, [11, 12, 13, 14])
    stage.leader.finish("x", [11, 12, 13, 14], 0)
    stage.step(reuse=[12])
    stage.answer(copy)
    stage.leader.core.tick()
    stage.pool.discard(KEYS)
    assert found(stage, "y", [11, 12, 13, 15], 3) == [11]


def test_inside_the_step(make_stage: Make) -> None:
    """The step that loads computes from it, and is told again what to compute if the load failed."""
    stage = make_stage(onboard="sync")
    stage.keep("first", KEYS)
    keys = [*KEYS, *keys_of("b", 2)]
    stage.begin("x", keys)
    assert stage.leader.match("x", 0, 6) == 4
    g1 = [11, 12, 13, 14, 15, 16]
    stage.place("x", g1, 4)
    step = stage.step({"x": 6}, reuse=g1[4:])
    (load,), (store,) = step.loads, step.stores
    assert store.g1_slots().tolist() == [15, 16]
    stage.answer(load, DONE, DONE, FAILED, FAILED)
    stage.answer(store, FAILED, FAILED)
    stage.leader.redo("x", 2)
    stage.leader.forget(g1[2:])
    assert found(stage, "y", [11, 12, 13, 17], 3) == []
    assert sources(stage, "x", 6, []) == []  # it was offered once
    assert found(stage, "z", [*g1, 18], 6, keys=[*keys, *keys_of("z", 1)]) == [13, 14, 15, 16, 18]


def test_preempted_and_resumed(stage: Stage) -> None:
    stage.begin("x", KEYS)
    stage.leader.match("x", 0, 4)
    stage.place("x", [1, 2, 3, 4])
    assert sources(stage, "x", 2, [1, 2]) == [1, 2]
    stage.pool.discard(KEYS)
    stage.step(reuse=[2])  # its blocks were another's
    stage.leader.match("x", 1, 4)
    stage.place("x", [1, 7, 8, 9])
    stage.leader.grow("x", [1, 7, 8, 9], replace=True, found=1)
    assert sources(stage, "x", 4, [7, 8, 9]) == [8, 9]  # what had been offered before stays so
    stage.leader.finish("x", [1, 7, 8, 9], 4)
    assert found(stage, "y", [1, 7, 8, 5], 3) == [1, 7]


def test_a_block_that_another_began_and_this_one_ends(stage: Stage) -> None:
    """The engine had a part of the third block."""
    assert found(stage, "x", [1, 2, 3, 4], 0, keys=KEYS[:2]) == [1, 2]
    stage.begin("y", KEYS)
    stage.leader.grow("y", [1, 2, 3, 4], replace=True, found=3)
    assert sources(stage, "y", 4, []) == []


def test_a_session_goes_on_inside_a_block(stage: Stage) -> None:
    """It takes back the token that it sampled last, and what follows is another piece."""
    keys = KEYS[:3]
    stage.begin("x", keys)
    stage.leader.match("x", 0, 3)
    stage.place("x", [1, 2, 3])
    assert sources(stage, "x", 2, [1, 2, 3]) == [1, 2]
    keys[2:] = keys_of("next", 3)
    stage.leader.go_on("x", [1, 2, 3, 4, 5], 2)
    assert sources(stage, "x", 5, [3, 4, 5]) == [3, 4, 5]
    assert stage.matchable(keys) == 5
    assert stage.pool.absent(KEYS) == [2, 3]


def test_a_session_goes_on_at_a_block_it_had_offered(stage: Stage) -> None:
    """More may have been called computed than it kept."""
    keys = KEYS[:3]
    stage.begin("x", keys)
    stage.leader.match("x", 0, 3)
    stage.place("x", [1, 2, 3])
    assert sources(stage, "x", 3, [1, 2, 3]) == [1, 2, 3]
    keys[2:] = keys_of("next", 2)
    stage.leader.go_on("x", [1, 2, 3, 4], 2)
    assert sources(stage, "x", 2, [3, 4]) == []
    assert stage.leader.provenance.carried(stage.leader.requests["x"], 3) == 2
    assert sources(stage, "x", 4, []) == [4]
    stage.leader.finish("x", [1, 2, 3, 4], 4)
    assert found(stage, "y", [1, 2, 3, 4], 4, keys=keys) == [3]


def test_a_session_that_began_inside_a_block_it_found(stage: Stage) -> None:
    """The engine had a part of the third block; the session goes on in it."""
    assert found(stage, "x", [1, 2, 3, 4], 0, keys=KEYS[:2]) == [1, 2]
    stage.begin("y", KEYS)
    stage.leader.grow("y", [1, 2, 3], replace=True, found=3)
    assert sources(stage, "y", 2, [3]) == []
    stage.leader.go_on("y", [1, 2, 3, 4], 2)
    assert sources(stage, "y", 4, [3, 4]) == []


def test_a_session_with_an_adapter_goes_on(stage: Stage) -> None:
    """What its last step computed is confirmed when the next piece has begun."""
    stage.begin("x", KEYS)
    stage.leader.requests["x"].late = True
    stage.leader.match("x", 0, 4)
    stage.place("x", [1, 2, 3])
    assert sources(stage, "x", 2, [1, 2, 3]) == []
    stage.leader.go_on("x", [1, 2, 3, 4], 2)
    assert sources(stage, "x", 2, [3, 4]) == []
    stage.leader.confirm("x", 2)
    assert sources(stage, "x", 4, []) == [1, 2]
    stage.leader.confirm("x", 4)
    assert sources(stage, "x", 4, []) == [3, 4]


def test_more_was_found_than_has_keys(stage: Stage) -> None:
    """Another connector loaded all but the last token, a part of the last block among it."""
    assert found(stage, "x", [1, 2, 3, 4], 0) == [1, 2, 3, 4]
    stage.pool.discard(KEYS)
    keys = [*KEYS]
    stage.begin("y", keys)
    stage.leader.grow("y", [1, 2, 3, 4, 5], replace=True, found=5)
    assert sources(stage, "y", 4, []) == [1, 2, 3, 4]
    keys += keys_of("y", 1)
    assert sources(stage, "y", 5, []) == []


def test_known_only_after_the_step(stage: Stage) -> None:
    """Of a late request what is computed counts when it is confirmed, and if nobody else got the block since."""
    stage.begin("x", KEYS)
    stage.leader.requests["x"].late = True
    stage.leader.match("x", 0, 4)
    stage.place("x", [1, 2, 3, 4])
    assert sources(stage, "x", 2, [1, 2]) == []
    stage.leader.confirm("x", 2)
    assert sources(stage, "x", 4, [3, 4]) == [1, 2]
    stage.leader.reuse([4])  # it was preempted
    stage.leader.confirm("x", 4)
    assert sources(stage, "x", 4, []) == [3]
    stage.leader.finish("x", [1, 2, 3, 4], 4)
    stage.leader.seal(tokens=0)


def test_several_layer_groups(make_stage: Make) -> None:
    """The block of one group is not that of another, and what a group does not need is no hindrance."""
    groups = (LayerGroup("full", BLOCK_TOKENS), LayerGroup("window", BLOCK_TOKENS, BLOCK_TOKENS + 1))
    for others, stored in (([0, 0, 13, 14], {1, 2, 3, 5, 13, 14}), ([0, 0, 3, 14], {1, 2})):
        stage = make_stage(64, groups=groups, checkpoint_tokens=BLOCK_TOKENS)
        leader = stage.leader
        for name, found_blocks, g1, other in (("x", 0, [1, 2, 3, 4], [11, 12, 13, 14]), ("y", 3, [1, 2, 3, 5], others)):
            leader.begin(name, KEYS, RequestParams(), 4 * BLOCK_TOKENS)
            leader.match(name, found_blocks, 4)
            leader.place(name, g1, 0, Admitted(0, 0, 0), [other])
            leader.grow(name, g1, replace=True, found=found_blocks, others=[other])
            for table in (g1, other):
                leader.reuse(table[found_blocks:])
            leader.advance(name, 4, found_blocks * BLOCK_TOKENS)
            copies = leader.seal(tokens=1).stores
            for copy in copies:
                stage.answer(copy)
            leader.core.tick()
            stage.pool.discard([group_key(key, group) for key in KEYS for group in (0, 1)])
        assert {block for copy in copies for block in copy.g1_slots().tolist()} == stored


def test_blocks() -> None:
    ids: Iterator[int] = iter(range(1, 100))
    marks = Provenance(lambda: next(ids))
    marks.forget([])
    blocks = np.array([5, 900], np.int64)
    marks.expect(blocks, 7)
    marks.arrived(blocks, [b"short", b"x" * 33], 8)
    assert not marks.words[blocks, 1:3].any()
    marks.arrived(blocks, [b"short", b"x" * 33], 7)
    assert marks.words[blocks].any(axis=1).all()
    marks.clear()
    assert not marks.words.any()
