"""No block is kept at a request's end, resets succeed, and what a later step wrote is stored under no earlier key."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvbm.core.config import Settings
from kvbm.leader.copies import InFlight
from kvbm.leader.provenance import Provenance
from tests.e2e.conftest import prompt_of
from tests.e2e.engine import Done, Engine, asynchronous_scheduling, write_tiny

Plain = Callable[..., list[Done]]
Answers = Callable[[list[list[int]]], list[list[int]]]
LENGTH = 1000
"""Tokens of a prompt: 31 blocks and a bit, of the 33 that the device has."""


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def renewed(other: Path) -> Iterator[Answers]:
    """The answers of the other weights, without KVBM."""
    engine = Engine(other)
    yield lambda prompts: [done.tokens for done in engine.run(prompts, 12)]
    engine.close()


def _small(tiny: Path, **kvbm: Any) -> Engine:
    """Twenty blocks may be copied at once; all the rest of a prompt is offered when its request has ended."""
    engine = Engine(tiny, {"store_inflight_mb": 1, **kvbm}, num_gpu_blocks_override=34)
    finish = engine.leader.finish

    def after_copies(*args: Any, **options: Any) -> None:
        engine.settle()
        finish(*args, **options)

    engine.leader.finish = after_copies  # type: ignore[method-assign]
    return engine


def _one_after_another(engine: Engine, prompts: list[list[int]], expected: list[list[int]]) -> tuple[int, int]:
    """How many answers are right when the prompts come for the second time, and how many tokens of them were hits. The
    first time each waits for the blocks of the one before it."""
    engine.run(prompts, 1)
    done = [engine.run([prompt], 12)[0] for prompt in prompts]
    return sum(each.tokens == answer for each, answer in zip(done, expected, strict=True)), sum(d.cached for d in done)


@pytest.mark.parametrize(("overlapping", "control"), [(False, False), (True, False), (False, True)])
def test_a_device_of_one_prompt(
    tiny: Path, plain: Plain, dice: random.Random, monkeypatch: pytest.MonkeyPatch, overlapping: bool, control: bool
) -> None:
    prompts = [prompt_of(dice, LENGTH) for _ in range(10)]
    expected = [done.tokens for done in plain(prompts, 12)]
    if control:  # fences for copies that no worker has begun
        monkeypatch.setattr(InFlight, "unsent", lambda *_: [])
    with asynchronous_scheduling() if overlapping else nullcontext(), closing(_small(tiny)) as engine:
        assert engine.core.scheduler.scheduler_config.async_scheduling == overlapping
        right, cached = _one_after_another(engine, prompts, expected)
        assert cached > 0
        if control:
            assert right < 10
            return
        assert right == 10
        assert engine.status()["offload"]["dropped"] > 0
        name = engine.add(prompts[0], 1)
        while not engine.results[name].reason:
            engine.step()
        assert engine.vllm.reset_prefix_cache()  # at once, whatever is being copied


def test_nothing_is_dropped_where_copies_are_not_held_up(tiny: Path, plain: Plain, dice: random.Random) -> None:
    prompts = [prompt_of(dice, LENGTH) for _ in range(6)]
    expected = [done.tokens for done in plain(prompts, 12)]
    with closing(Engine(tiny, {}, num_gpu_blocks_override=34)) as engine:
        assert _one_after_another(engine, prompts, expected)[0] == 6
        assert engine.status()["offload"]["blocks"] > 6 * 30
        assert engine.status()["offload"]["dropped"] == 0


@pytest.fixture(scope="module")
def slow(tiny: Path) -> Iterator[Engine]:
    """Copies take their time."""
    options = "load_delay=1&store_delay=0.3"
    engine = Engine(tiny, {"transport_wrapper": f"kvbm.testing.faults:build?{options}", "reset": "follow"})
    yield engine
    engine.close()


def test_a_reset_returns_when_what_had_begun_is_over(slow: Engine, dice: random.Random) -> None:
    prompt = prompt_of(dice, 300)
    slow.run([prompt], 1)
    assert slow.leader.in_flight()[0] > 0
    generation = slow.status()["generation"]
    slow.core.pause_scheduler("abort", True)
    assert slow.leader.in_flight() == (0, 0)
    slow.core.resume_scheduler()
    assert slow.status()["generation"] == generation + 1
    slow.settle()
    (again,) = slow.run([prompt], 1)
    assert again.cached == 0  # what was being copied is of the old generation


def test_a_pause_that_keeps_requests_while_one_loads(slow: Engine, plain: Plain, dice: random.Random) -> None:
    """vLLM says no, at once, whatever a connector does; the engine goes on."""
    prompt = prompt_of(dice, 300)
    (expected,) = plain([prompt], 12)
    slow.leader.reset()
    slow.run([prompt], 1)
    slow.settle()
    # Not by a plain reset, which this engine follows.
    slow.core.scheduler.kv_cache_manager.evict_blocks(set(range(1, 64)))
    name = slow.add(prompt, 12)
    while not slow.leader.in_flight()[1]:
        slow.step()
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="waiting for remote KV transfer"):
        slow.core.pause_scheduler("keep", True)
    assert time.monotonic() - begun < 0.5
    slow.core.resume_scheduler()
    slow.drain()
    assert slow.results[name].tokens == expected.tokens
    assert slow.results[name].cached > 0


@pytest.mark.parametrize("reset", ["follow", "own"])
def test_a_plain_reset(
    tiny: Path, other: Path, plain: Plain, renewed: Answers, dice: random.Random, reset: str
) -> None:
    """vLLM tells a connector nothing of it. `own` is the control: what is served is the old weights' KV."""
    prompts = [prompt_of(dice, 300) for _ in range(3)]
    new = renewed(prompts)
    with closing(Engine(tiny, {"reset": reset})) as engine:
        assert [done.tokens for done in engine.run(prompts, 12)] == [done.tokens for done in plain(prompts, 12)]
        engine.settle()
        engine.vllm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        engine.forget_device()
        done = engine.run(prompts, 12)
        follows = reset == "follow"
        assert [each.cached for each in done] == [0 if follows else 288] * 3
        assert ([each.tokens for each in done] == new) == follows
        assert engine.status()["generation"] == (1 if follows else 0)
        assert (engine.leader.isolated is not None) == follows
        if follows:  # host memory goes on
            engine.settle()
            engine.core.scheduler.kv_cache_manager.evict_blocks(set(range(1, 64)))
            again = engine.run(prompts, 12)
            assert [(each.tokens, each.cached) for each in again] == [(tokens, 288) for tokens in new]


@pytest.mark.parametrize("control", [False, True])
def test_what_the_engine_found_in_its_own_cache(
    tiny: Path, other: Path, renewed: Answers, dice: random.Random, monkeypatch: pytest.MonkeyPatch, control: bool
) -> None:
    """A new generation of KVBM's alone, and other weights: the engine's own cache still has the old ones' KV."""
    prompt = prompt_of(dice, 300)
    (new,) = renewed([prompt])
    if control:
        monkeypatch.setattr(Provenance, "clear", lambda _: None)
    with closing(Engine(tiny, {"reset": "own"})) as engine:
        engine.run([prompt], 12)
        engine.settle()
        engine.vllm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        engine.leader.reset()
        (found,) = engine.run([prompt], 12)
        assert found.cached > 0  # by the engine itself
        engine.settle()
        assert (engine.leader.pool.statistics().registered > 0) == control
        for turn in range(2):
            engine.forget_device()
            (done,) = engine.run([prompt], 12)
            engine.settle()
            assert (done.cached > 0) == (control or turn == 1)
            assert (done.tokens == new) != control


# ---------------------------------------------------------------------- when it counts


def _config(
    *, transfer: object = None, extension: str = "", worker: str = "vllm.v1.worker.cpu_worker.CPUWorker",
    sleep: bool = False, loader: str = "auto",
) -> Any:  # fmt: skip
    return SimpleNamespace(
        weight_transfer_config=transfer,
        parallel_config=SimpleNamespace(worker_extension_cls=extension, worker_cls=worker),
        model_config=SimpleNamespace(enable_sleep_mode=sleep),
        load_config=SimpleNamespace(load_format=loader),
    )


@pytest.mark.parametrize(
    ("config", "settings", "why"),
    [
        ({}, {}, None),
        ({}, {"reset": "follow"}, "reset=follow"),
        ({"transfer": object()}, {}, "weight_transfer_config"),
        ({"extension": "a.B"}, {}, "worker_extension_cls"),
        ({"worker": "a.B"}, {}, "worker_cls"),
        ({"sleep": True}, {}, "enable_sleep_mode"),
        ({"sleep": True}, {"reset": "own"}, None),
        ({"loader": "dummy"}, {}, "load_format=dummy"),
        ({"loader": "dummy"}, {"dummy_weights_fixed": True}, None),
    ],
)
def test_where_weights_can_change(config: dict[str, Any], settings: dict[str, Any], why: str | None) -> None:
    from kvbm.connect.vllm.resets import changing_weights

    said = changing_weights(_config(**config), Settings(**settings))
    assert (said is None) if why is None else (said is not None and why in said)


def test_a_reset_is_noticed_once() -> None:
    from kvbm.connect.vllm.resets import Resets

    pool: Any = SimpleNamespace(cached_block_hash_to_block={})
    resets, own = Resets("they can"), Resets(None)
    assert not resets.noticed()  # the engine is still being built
    for each in (resets, own):
        each.watch(pool)
        assert not each.noticed()
    pool.cached_block_hash_to_block = {}
    assert [resets.noticed(), resets.noticed(), own.noticed()] == [True, False, False]
