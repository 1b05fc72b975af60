"""A copy that fails costs a computation; never a wrong token, never the engine."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.e2e.conftest import prompt_of
from tests.e2e.engine import Done, Engine

Plain = Callable[..., list[Done]]


def _with_faults(tiny: Path, query: str, **settings: object) -> Engine:
    return Engine(tiny, {"transport_wrapper": f"kvbm.testing.faults:build?{query}", **settings})


@pytest.mark.parametrize("onboard", ["async", "sync"])
def test_failed_copies_are_computed_and_never_matched(
    tiny: Path, plain: Plain, dice: random.Random, onboard: str
) -> None:
    with closing(_with_faults(tiny, "store_fail=0.3&load_fail=0.4&seed=3", onboard=onboard)) as engine:
        prompts = [prompt_of(dice, dice.randrange(40, 500)) for _ in range(12)]
        prompts += [prompt[:200] + prompt_of(dice, 90) for prompt in prompts[:6]]
        expected = [done.tokens for done in plain(prompts, 12)]
        for _ in range(4):
            assert [done.tokens for done in engine.run(prompts, 12)] == expected
            engine.settle()
            engine.forget_device()
        status = engine.status()
        assert status["onboard"]["failed"] > 0
        assert status["offload"]["failed"] > 0
        assert status["onboard"]["blocks"] > 0
        assert status["healthy"]
        engine.leader.pool.check()
        statistics = engine.leader.pool.statistics()
        assert (statistics.active, statistics.staged, statistics.orphaned) == (0, 0, 0)


def test_wrong_bytes_change_the_answer(tiny: Path, plain: Plain, dice: random.Random) -> None:
    """The negative control of every test here: if what comes back is not what was stored, outputs differ."""
    with closing(_with_faults(tiny, "load_garble=1")) as engine:
        prompts = [prompt_of(dice, 320) for _ in range(3)]
        expected = [done.tokens for done in plain(prompts, 24)]
        assert [done.tokens for done in engine.run(prompts, 24)] == expected
        engine.settle()
        engine.forget_device()
        again = engine.run(prompts, 24)
        assert all(done.cached for done in again)
        assert [done.tokens for done in again] != expected


def test_a_dead_copy_thread_leaves_the_engine_serving(tiny: Path, plain: Plain, dice: random.Random) -> None:
    with closing(_with_faults(tiny, "die_after=6")) as engine:
        prompts = [prompt_of(dice, 200) for _ in range(10)]
        expected = [done.tokens for done in plain(prompts, 16)]
        for _ in range(3):
            assert [done.tokens for done in engine.run(prompts, 16)] == expected
            engine.forget_device()
        health = engine.side.control.health()
        assert not health["healthy"]
        assert "rank 0" in health["problems"][0]
        assert not engine.leader.requests


def test_a_lost_worker_channel_leaves_the_engine_serving(tiny: Path, plain: Plain, dice: random.Random) -> None:
    with closing(Engine(tiny, {})) as engine:
        prompts = [prompt_of(dice, 200) for _ in range(4)]
        expected = [done.tokens for done in plain(prompts, 16)]
        engine.run(prompts, 16)
        engine.settle()
        engine.forget_device()
        names = [engine.add(prompt, 16) for prompt in prompts]
        engine.step()
        engine.leader.links[0].close()
        engine.drain()
        assert [engine.results[name].tokens for name in names] == expected
        assert not engine.side.control.health()["healthy"]
        assert [done.tokens for done in engine.run(prompts, 16)] == expected
