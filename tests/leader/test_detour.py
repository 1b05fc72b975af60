"""When a hit in host memory is too short to wait for; time is moved by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from kvbm.core.events import Gated
from kvbm.link.messages import Step
from tests.leader.roles import BLOCK_TOKENS, Stage, keys_of

Make = Callable[..., Stage]
WAIT_S = 0.025


def steps(stage: Stage, count: int = 8, seconds: float = 0.04, tokens: int = 1) -> None:
    """The engine ends what it began, and computes so many tokens at a time."""
    for _ in range(8):
        stage.leader.gate.step_ends()
    for _ in range(count):
        stage.leader.gate.step_begins(tokens)
        stage.clock.advance(seconds)
        stage.leader.gate.step_ends()


def load(stage: Stage, name: str, keys: Sequence[bytes], seconds: float, *, copy_s: float = 0.001) -> None:
    """A request that is alone waits so long for a load of `keys`, and is over."""
    copy = stage.load(name, keys, list(range(len(keys))))
    stage.clock.advance(seconds)
    stage.answer(copy, seconds=copy_s)
    stage.place(name, list(range(len(keys))))  # as vLLM does once it is there
    stage.step({name: len(keys)})
    stage.leader.finish(name, list(range(len(keys))), len(keys))
    stage.step()


def found(stage: Stage, name: str, keys: Sequence[bytes]) -> int | None:
    stage.begin(name, keys)
    return stage.leader.match(name, 0, len(keys))


def measured(stage: Stage, *, prompt_rate: float = 100 * BLOCK_TOKENS, wait: float = WAIT_S) -> list[bytes]:
    """Keys of 16 blocks in G2, of an engine that computes 100 blocks a second, where a load takes 25 ms and 1 ms for
    each block."""
    stage.keep("first", keys := keys_of("a", 16))
    steps(stage, 1, 10.0, int(10 * prompt_rate))
    for number in range(4):
        load(stage, f"measured {number}", keys[:4], wait + 0.004, copy_s=0.004)
    return keys


def test_a_hit_that_takes_longer_than_computing_is_not_made(stage: Stage) -> None:
    keys = measured(stage)
    # 25 ms less 5 that may be lost, and each block saves 10 ms less the 1 it takes: 2.2 blocks.
    assert stage.leader.detour.least(beside=False) == pytest.approx(20 / 9 * BLOCK_TOKENS)
    assert found(stage, "short", keys[:2]) == 0
    assert stage.leader.match("short", 0, 2) == 0  # asked again
    assert found(stage, "long", keys[:3]) == 3
    stage.step()
    assert [event for event in stage.events if isinstance(event, Gated)] == [Gated(2, "g2")]
    assert any("from 71 tokens on it does not" in why for why in stage.leader.records["short"].why)
    assert stage.leader.records["long"].why == []


def test_what_was_not_measured_is_not_held_against_a_load(stage: Stage) -> None:
    stage.keep("first", keys := keys_of("a", 16))
    assert found(stage, "nothing is known", keys[:1]) == 1
    stage.step()
    steps(stage, 1, 10.0, 1000 * BLOCK_TOKENS)
    for number in range(3):
        load(stage, f"measured {number}", keys, 5.0)
        assert found(stage, f"{number} waits are known", keys[:1]) == 1
        stage.step()
    load(stage, "one more", keys, 5.0)
    assert found(stage, "enough", keys[:1]) == 0


def test_who_went_away_did_not_wait(stage: Stage) -> None:
    keys = measured(stage)
    for number in range(8):
        copy = stage.load(f"{number}", keys[:4], [1, 2, 3, 4])
        stage.leader.finish(f"{number}", [1, 2, 3, 4], 0)
        stage.answer(copy)
        stage.step()
    assert found(stage, "short", keys[:2]) == 0


def test_the_shortest_of_the_last_waits_counts(stage: Stage) -> None:
    keys = measured(stage, wait=5.0)
    assert found(stage, "slow", keys) == 0
    stage.clock.advance(31)  # nothing was loaded for long: it is tried again
    load(stage, "fast", keys[:4], 0.005, copy_s=0.004)
    assert found(stage, "short", keys[:1]) == 1


def test_beside_others_a_load_costs_a_step_at_least(stage: Stage) -> None:
    keys = measured(stage, wait=0.001)
    steps(stage)
    assert found(stage, "alone", keys[:1]) == 1
    stage.leader.finish("alone", [], 0)
    stage.begin("other", keys_of("b", 1))
    stage.leader.match("other", 0, 1)
    stage.place("other", [90])
    stage.step({"other": 0})
    assert found(stage, "beside", keys[:3]) == 0  # 40 ms, less 5, against 27
    assert found(stage, "beside, long", keys[:4]) == 4
    stage.leader.finish("other", [90], 0)
    assert found(stage, "alone again", keys[:1]) == 1


def test_where_copies_are_slower_than_computing_none_is_made(stage: Stage) -> None:
    stage.keep("first", keys := keys_of("a", 16))
    steps(stage, 1, 10.0, 100_000 * BLOCK_TOKENS)
    for number in range(4):
        load(stage, f"measured {number}", keys, 0.1, copy_s=0.016)
    assert found(stage, "long", keys) == 0
    assert stage.leader.detour.shown() == {"alone": None, "beside_others": None}


@pytest.mark.parametrize(("least", "blocks"), [(0, 1), (2 * BLOCK_TOKENS, 2), (2 * BLOCK_TOKENS + 1, 3)])
def test_a_setting_wins(make_stage: Make, least: int, blocks: int) -> None:
    stage = make_stage(load_min_tokens=least)
    stage.keep("first", keys := keys_of("a", 16))
    steps(stage, 1, 10.0, 100_000 * BLOCK_TOKENS)
    for at, count in enumerate((blocks, blocks - 1)):
        if count:
            assert found(stage, f"{at}", keys[:count]) == (count if count == blocks else 0)
            stage.step()


def test_inside_a_step_nothing_is_waited_for(make_stage: Make) -> None:
    stage = make_stage(onboard="sync")
    keys = measured(stage)
    assert found(stage, "short", keys[:1]) == 1


def test_who_was_sent_here_for_it_gets_it(stage: Stage) -> None:
    keys = measured(stage)
    stage.begin("pulls", keys[:1], pull_from="other")
    assert stage.leader.match("pulls", 0, 1) == 1


def test_what_is_gated_holds_nothing(stage: Stage) -> None:
    keys = measured(stage)
    assert found(stage, "short", keys[:2]) == 0
    step: Step = stage.step()
    assert (step.loads, stage.pool.statistics().active, stage.leader.core.in_flight()) == ([], 0, (0, 0))
