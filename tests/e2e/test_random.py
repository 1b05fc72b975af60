"""Some hundred random requests, every output compared with the engine alone."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import prompt_of
from tests.e2e.engine import Done, Engine

Plain = Callable[..., list[Done]]
REQUESTS = 150
MODES = {
    "async": {"kvbm": {"onboard": "async"}},
    "sync": {"kvbm": {"onboard": "sync"}},
    "failing": {
        "kvbm": {"transport_wrapper": "kvbm.testing.faults:build?load_fail=0.1&store_fail=0.1&delay=0.01&seed=1"}
    },
    "no-prefix-cache": {"kvbm": {}, "enable_prefix_caching": False},
    "priority": {"kvbm": {}, "scheduling_policy": "priority"},
    "async-scheduling": {"kvbm": {}, "async_scheduling": True},
    "ngram": {
        "kvbm": {},
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4},
    },
}


@pytest.fixture(scope="module", params=MODES)
def engine(request: pytest.FixtureRequest, tiny: Path) -> Iterator[Engine]:
    """24 usable blocks: requests preempt each other; 128 tokens a step: prompts come in chunks; G2 of 100 blocks: it
    evicts too."""
    options = dict(MODES[request.param])
    options["kvbm"] = {"g2_blocks": 100, **options["kvbm"]}
    patch = pytest.MonkeyPatch()
    if options.get("async_scheduling"):
        _allow_async_scheduling(patch)
    engine = Engine(
        tiny, num_gpu_blocks_override=25, max_model_len=512, max_num_batched_tokens=128, max_num_seqs=8, **options
    )
    patch.undo()
    assert engine.core.scheduler.vllm_config.scheduler_config.async_scheduling == options.get("async_scheduling", False)
    yield engine
    engine.close()


def _allow_async_scheduling(patch: pytest.MonkeyPatch) -> None:
    """vLLM switches it off on CPUs whatever it is told; it is what runs on GPUs."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def keep(cls: type, config: object) -> None:
        original(cls, config)
        config.scheduler_config.async_scheduling = True

    patch.setattr(CpuPlatform, "check_and_update_config", classmethod(keep))


def test_every_output_is_the_engines_own(engine: Engine, plain: Plain) -> None:
    seed = int(os.environ.get("KVBM_TEST_SEED", time.time_ns() % 1_000_000))
    print(f"seed {seed} (KVBM_TEST_SEED repeats it)")
    dice = random.Random(seed)
    roots = [prompt_of(dice, dice.randrange(20, 330)) for _ in range(10)]
    jobs = [
        (dice.choice(roots)[: dice.randrange(1, 330)] + prompt_of(dice, dice.randrange(1, 60)), dice.randrange(1, 60))
        for _ in range(REQUESTS)
    ]
    expected = {}
    for length in {tokens for _, tokens in jobs}:
        these = [i for i, (_, tokens) in enumerate(jobs) if tokens == length]
        for i, done in zip(these, plain([jobs[i][0] for i in these], length), strict=True):
            expected[i] = done.tokens

    waiting, running, aborted = list(enumerate(jobs)), {}, set()
    while waiting or engine.vllm.has_unfinished_requests():
        while waiting and dice.random() < 0.3:
            i, (prompt, tokens) = waiting.pop(0)
            running[i] = engine.add(prompt, tokens, priority=dice.randrange(3) if _by_priority(engine) else 0)
        if running and dice.random() < 0.01:
            i = dice.choice(list(running))
            engine.vllm.abort_request([running[i]])
            aborted.add(i)
        if dice.random() < 0.01:
            engine.vllm.reset_prefix_cache()
        engine.step()
    engine.drain()
    engine.settle()

    wrong = []
    for i, name in running.items():
        tokens = engine.results[name].tokens
        if tokens != (expected[i][: len(tokens)] if i in aborted else expected[i]):
            wrong.append(i)
    assert wrong == []
    status = engine.status()
    assert status["onboard"]["blocks"] > 20
    assert status["evictions"] > 0
    assert status["healthy"]
    engine.leader.pool.check()
    statistics = engine.leader.pool.statistics()
    assert (statistics.active, statistics.staged, statistics.writable, statistics.orphaned) == (0, 0, 0, 0)
    assert not engine.leader.requests
    assert not engine.leader._loading
    assert engine.leader._held == 0


def _by_priority(engine: Engine) -> bool:
    return engine.core.scheduler.vllm_config.scheduler_config.policy == "priority"
