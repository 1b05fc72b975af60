"""Two ranks: a block counts when both have it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from kvbm.testing.faults import inject
from tests.e2e.conftest import prompt_of
from tests.e2e.engine import Done, Engine

Plain = Callable[..., list[Done]]


def _two_ranks(tiny: Path, **settings: object) -> Engine:
    return Engine(tiny, settings, tensor_parallel_size=2)


def test_a_block_counts_when_both_ranks_have_it(tiny: Path, dice: random.Random) -> None:
    with closing(_two_ranks(tiny, transport_wrapper="kvbm.testing.faults:build?store_delay=1&rank=1")) as engine:
        assert engine.status()["ranks"] == 2
        prompts = [prompt_of(dice, 330) for _ in range(3)]
        names = [engine.add(prompt, 1) for prompt in prompts]
        while engine.vllm.has_unfinished_requests():
            engine.step()
        time.sleep(0.3)  # rank 0 is done long since, rank 1 waits for a second
        engine.leader.tick()
        assert engine.leader.pool.statistics().staged == 30
        assert engine.leader.pool.statistics().registered == 0
        engine.drain()
        engine.settle()
        assert engine.leader.pool.statistics().registered == 30
        first = engine.run(prompts, 24)
        engine.settle()
        engine.forget_device()
        again = engine.run(prompts, 24)
        assert [done.tokens for done in again] == [done.tokens for done in first]
        assert all(done.cached == 320 for done in again)
        assert engine.status()["onboard"]["blocks"] == 30
        assert len(names) == 3


FAULTS = {
    "on one rank": "load_fail=0.4&store_fail=0.2&rank=1",
    "on both": "load_fail=0.3&store_fail=0.2",
    "every load on one": "load_fail=1&rank=1",
    "every store on one": "store_fail=1&rank=0",
    "late on one": "delay=1&delayed=0.3&rank=1",
}


@pytest.mark.parametrize("onboard", ["async", "sync"])
def test_what_fails_on_a_rank_is_computed(
    tiny: Path, plain: Plain, dice: random.Random, tmp_path: Path, onboard: str
) -> None:
    switch = tmp_path / "faults"
    inject(switch)
    settings = {"load_deadline_s": 0.3, "store_deadline_s": 0.3, "onboard": onboard}
    with closing(_two_ranks(tiny, transport_wrapper=f"kvbm.testing.faults:follow?{switch}", **settings)) as engine:
        for faults in FAULTS.values():
            prompts = [prompt_of(dice, dice.randrange(60, 400)) for _ in range(10)]
            expected = [done.tokens for done in plain(prompts, 12)]
            before = engine.status()
            for line in (faults, faults, ""):
                inject(switch, line)
                assert [done.tokens for done in engine.run(prompts, 12)] == expected
                engine.settle()
                engine.forget_device()
            after = engine.status()
            assert sum(after[way]["failed"] - before[way]["failed"] for way in ("onboard", "offload")) > 0
            assert after["healthy"]
            onboarded = after["onboard"]["blocks"]
            assert [done.tokens for done in engine.run(prompts, 12)] == expected
            engine.settle()
            engine.forget_device()
            assert engine.status()["onboard"]["blocks"] > onboarded
        engine.leader.pool.check()
