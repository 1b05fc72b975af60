"""Copies run beside the engine: slow ones cost it nothing, and none reads what the engine has overwritten."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kvbm.link.messages import Step
from tests.e2e.conftest import prompt_of
from tests.e2e.engine import BLOCK, Done, Engine

Plain = Callable[..., list[Done]]
DELAY = 0.2


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[Engine]:
    """Every offload copy starts 200 ms late; 24 blocks of 32 tokens on the device."""
    engine = Engine(
        tiny,
        {"transport_wrapper": f"kvbm.testing.faults:build?store_delay={DELAY}", "fence_ms": 10},
        num_gpu_blocks_override=24,
        max_model_len=640,
    )
    yield engine
    engine.close()


def _step_times(engine: Engine, prompt: list[int], tokens: int) -> tuple[list[float], int]:
    """Seconds of each decoding step, and in how many of them a copy was in flight."""
    engine.add(prompt, tokens)
    engine.step()
    times, busy = [], 0
    while engine.vllm.has_unfinished_requests():
        busy += any(engine.leader.in_flight())
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    engine.drain()
    engine.settle()
    return times, busy


def test_slow_copies_do_not_slow_steps(engine: Engine, dice: random.Random) -> None:
    engine.run([prompt_of(dice, 64)], 8)
    with_copies, busy = _step_times(engine, prompt_of(dice, 300), 220)
    engine.leader.pause()
    without, idle = _step_times(engine, prompt_of(dice, 300), 220)
    engine.leader.resume()
    assert busy > 50, "no copy was in flight while the engine stepped: this shows nothing"
    assert idle == 0
    # A step that waited for a copy takes at least the delay, and there were seven copies; a busy machine may make
    # others slow, but not the typical one.
    assert sum(seconds >= DELAY for seconds in with_copies) <= 2
    assert statistics.median(with_copies) < 1.5 * statistics.median(without)


def test_a_finished_request_keeps_no_block(engine: Engine, dice: random.Random) -> None:
    pool = engine.core.scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    engine.add(prompt_of(dice, 320), 1)
    engine.step()
    assert not engine.vllm.has_unfinished_requests()
    engine.step()
    assert engine.leader.in_flight()[0] == 1
    assert pool.get_num_free_blocks() == free
    engine.forget_device()  # the engine can: it waits for nothing
    assert engine.leader.in_flight()[0] == 1
    engine.settle()


def test_a_block_that_is_reused_while_it_is_copied_is_fenced(
    engine: Engine, plain: Plain, dice: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts fill all 23 usable blocks: the second is preempted right after its prefill, and the first takes its
    last block two steps later, while it is still being copied."""
    prompts = [prompt_of(dice, 350), prompt_of(dice, 12 * BLOCK)]
    expected = [done.tokens for done in plain(prompts, 60)]
    names = [engine.add(prompt, 60) for prompt in prompts]
    fences: list[int] = []
    seal = engine.leader.seal

    def recording(*, tokens: int) -> Step:
        step = seal(tokens=tokens)
        fences.extend(step.fence)
        return step

    monkeypatch.setattr(engine.leader, "seal", recording)
    before = engine.status()["offload"]["dropped"]
    engine.drain()
    assert fences, "no block was reused while it was copied: this shows nothing"
    engine.settle()
    assert [engine.results[name].tokens for name in names] == expected
    # What still had to be copied then is not stored, and what is stored is right: it gives the engine's own answer.
    assert engine.status()["offload"]["dropped"] > before
    longer = [[*prompt, 7] for prompt in prompts]
    expected = [done.tokens for done in plain(longer, 60)]
    for prompt, tokens in zip(longer, expected, strict=True):
        engine.forget_device()
        (again,) = engine.run([prompt], 60)
        assert again.tokens == tokens


def test_abort_at_any_moment_leaks_nothing(engine: Engine, plain: Plain, dice: random.Random) -> None:
    pool = engine.core.scheduler.kv_cache_manager.block_pool
    engine.drain()
    free = pool.get_num_free_blocks()
    prompt = prompt_of(dice, 320)
    for steps in range(6):
        name = engine.add(prompt, 50)
        for _ in range(steps):
            engine.step()
        engine.vllm.abort_request([name])
    engine.drain()
    engine.settle()
    assert pool.get_num_free_blocks() == free
    engine.leader.pool.check()
    pool_now = engine.leader.pool.statistics()
    assert (pool_now.active, pool_now.staged, pool_now.writable, pool_now.orphaned) == (0, 0, 0, 0)
    assert engine.leader.requests == {}
    engine.forget_device()
    (done,) = engine.run([prompt], 20)
    assert done.tokens == plain([prompt], 20)[0].tokens
    assert done.cached > 0


def test_a_hit_that_is_not_worth_its_wait_is_computed(tiny: Path, plain: Plain, dice: random.Random) -> None:
    settings = {"transport_wrapper": "kvbm.testing.faults:build?load_delay=0.3", "load_min_tokens": None}
    with closing(Engine(tiny, settings)) as engine:
        prompt = prompt_of(dice, 300)
        (expected,) = plain([prompt], 12)
        for cached in (
            0,
            288,
            288,
            288,
            288,
            0,
        ):  # four waits are known then, each a hundred times what computing takes
            (done,) = engine.run([prompt], 12)
            engine.settle()
            engine.forget_device()
            assert (done.tokens, done.cached) == (expected.tokens, cached)
        status = engine.status()
        assert status["onboard"]["gated"] == 9
        assert status["least_tokens"]["alone"] > 288
